"""The client's side of one secure sum: what it is told goes in, what it says comes out; nothing else is read or written here.

::

    hello     its session key and a new nonce, signed
    join      the terms and everybody's hello     ->  its lot, to which its hello has committed it
    pair      everybody's lots                    ->  keys for the neighbours that have none with it yet, sealed
    deal      the keys that others sealed to it   ->  shares of two new secrets, encrypted to its neighbours; the recovery blob
    mask      who has dealt, and shares of theirs ->  its vector under masks
    sign      whose vectors arrived               ->  its signature under that
    reveal    the signatures of its neighbours    ->  for each neighbour one of the two shares, never both
    blame     (only where the sum is not what was tagged) tags of its masks

The two secrets: ``b`` seeds the mask that is its own; ``w`` opens its recovery blob, in which are the seeds of the masks that it shares with neighbours. The sum
needs ``b`` of those whose vectors arrived and ``w`` of the others. With both, a client's vector would be open.

Checked here, each before any share leaves: the clients are known and signed for this sum, the terms are those of the client's own plan, the steps come in order
and once, the sets are sets of known clients and do not overlap, enough clients and neighbours are in them, and enough neighbours have signed the same.
After a check that fails nothing more is answered for this sum.

Not covered: what the sum itself tells; a server that makes the clients of a sum up (they must be known), or that colludes with more than was assumed;
a client that lies about its own vector.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedfm.core.errors import MessageError
from fedfm.secagg import agreement, checksum, graph, shamir
from fedfm.secagg.agreement import Pair, Session
from fedfm.secagg.masks import U32, U64, Masks, chunks
from fedfm.secagg.terms import (
    HELLO,
    LOT,
    VERSION,
    Abort,
    Arrays,
    Rules,
    Terms,
    commitment,
    context_of,
    hello_message,
    index_set,
    lot_commitment,
    order_seed,
    packed,
    survivors_message,
)  # fmt: skip

SELF, WRAP = b"self", b"wrap"
SEALED, BOX = agreement.SEALED + agreement.SIGNATURE, 80
"""Bytes of a sealed and signed key, and of the two shares for one neighbour."""
# Whether a house knows a client by this public key.
Known = Callable[[str, bytes], bool]


class Member:
    """One client in one sum.

    Args:
        name: Who it is.
        session: Its keys of the job.
        job: Which run its house takes part in.
        errand: Verb, round and attempt.
        rules: Its own plan's.
        known: Whether its house knows a name by a public key.
    """

    def __init__(self, name: str, session: Session, job: str, errand: str, rules: Rules, known: Known) -> None:
        self.name, self.rules, self.context = name, rules, b""
        self.terms: Terms | None = None
        self.shared: tuple[int, ...] = ()
        self._session, self._job, self._errand, self._known = session, job, errand, known
        self._step, self._nonce, self._lot = "hello", secrets.token_bytes(32), secrets.token_bytes(LOT)
        self._roster: Arrays = {}
        self._me = 0
        self._around: tuple[int, ...] = ()
        self._reached: frozenset[int] = frozenset()
        self._secrets: dict[bytes, int] = {}
        self._held: dict[int, tuple[bytes, bytes]] = {}
        self._sizes = (0, 0)
        self._sets: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def hello(self) -> dict[str, Any]:
        """Its session key and nonce, and a commitment to its lot, signed."""
        self._enter("hello", "join")
        key, identity, lot = self._session.key.public, self._session.identity, lot_commitment(self._lot)
        signature = identity.sign(hello_message(self._job, self._errand, self.name, key, self._nonce, lot))
        return {name: _row(value) for name, value in zip(HELLO, (key, self._nonce, lot, identity.public, signature), strict=True)}

    # --- keys ----------------------------------------------------------------------------------------------------------------

    def join(self, terms: Terms, roster: Arrays) -> dict[str, Any]:
        """Agrees to the terms.

        Args:
            roster: Everybody's hello, an array with a row for each client.

        Returns:
            ``lot`` ``(32,)``.

        Raises:
            Abort: naming what is wrong.
        """
        self._enter("join", "pair")
        with self._giving_up():
            self._check_terms(terms)
            self._check_roster(terms, roster)
        self.terms, self._roster, self.context = terms, roster, context_of(terms, roster)
        return {"lot": _row(self._lot)}

    def pair(self, lots: Any) -> dict[str, Any]:
        """Learns who its neighbours are.

        Args:
            lots: Everybody's, a row each; none where everybody is a neighbour of everybody.

        Returns:
            ``to`` ``(m,)`` and ``sealed`` ``(m, 1232)``: a key, sealed and signed, for each neighbour that is not known to have one with this client.

        Raises:
            Abort: naming what is wrong.
        """
        terms = self._enter("pair", "deal")
        n = len(terms.names)
        with self._giving_up():
            if len(lots) != (n if n > graph.COMPLETE else 0):
                raise Abort(f"{len(lots)} lots were told; each of {n} clients has one, and they count above {graph.COMPLETE} clients.")
            for i, lot in enumerate(lots):
                if lot_commitment(lot.tobytes()) != self._roster["lot"][i].tobytes():
                    raise Abort(f"the lot of {self._name(i)} is not the one that it was committed to.")
        self._around = graph.neighbours(self.rules.graph(n), order_seed(self.context, lots))[self._me]
        sealed = [(other, self._sealed(other)) for other in self._around if other > self._me]
        needed = [(other, data) for other, data in sealed if data is not None]
        return {
            "to": np.array([other for other, _ in needed], dtype=np.int32),
            "sealed": _rows([data for _, data in needed], SEALED),
        }

    def _check_terms(self, terms: Terms) -> None:
        names, rules = terms.names, self.rules
        if terms.version != VERSION:
            raise Abort(f"the secure sum is of version {terms.version}; this side speaks {VERSION}.")
        if (terms.job, terms.errand) != (self._job, self._errand):
            raise Abort("the terms are those of another run or errand.")
        if list(names) != sorted(set(names)) or self.name not in names:
            raise Abort("the roster names a client twice or out of order, or does not name this one.")
        expected = rules.graph(len(names))
        if (terms.k, terms.t) != (expected.k, expected.t):
            raise Abort(
                f"the terms say {terms.k} neighbours and a threshold of {terms.t}; for {len(names)} clients this plan has {expected.k} and {expected.t}."
            )
        if (terms.min_clients, terms.reach, terms.max_weight) != (rules.min_clients, rules.reach, rules.max_weight):
            raise Abort("the terms' smallest cohort or quantiser is not that of this client's plan.")
        self._me = names.index(self.name)

    def _check_roster(self, terms: Terms, roster: Arrays) -> None:
        rows = {name: [row.tobytes() for row in roster[name]] for name in HELLO}
        if any(len(rows[name]) != len(terms.names) for name in HELLO):
            raise Abort("the roster has another number of keys than names.")
        mine = (self._session.key.public, self._nonce, lot_commitment(self._lot), self._session.identity.public)
        if tuple(rows[name][self._me] for name in ("key", "nonce", "lot", "identity")) != mine:
            raise Abort("the roster holds another key or nonce of this client than it sent for this sum.")
        for name in ("key", "identity"):
            if len(set(rows[name])) < len(terms.names):
                raise Abort(f"two clients of the roster have the same {name}.")
        for i, name in enumerate(terms.names):
            if i == self._me:
                continue
            message = hello_message(terms.job, terms.errand, name, rows["key"][i], rows["nonce"][i], rows["lot"][i])
            if not agreement.is_signed(rows["identity"][i], rows["signature"][i], message):
                raise Abort(f"the key of {name!r:.60} is not signed for this sum.")
            if not self._known(name, rows["identity"][i]):
                raise Abort(
                    f"{name!r:.60} is not known here by the identity that has signed for it. Only if it is sure to have new keys, delete its line in peers.json."
                )

    def _key(self, other: int) -> bytes:
        return bytes(self._roster["key"][other].tobytes())

    def _sealed(self, other: int) -> bytes | None:
        """The key for a neighbour, sealed; nothing where it is known to have it."""
        public, mine = self._key(other), self._session.key.public
        pair = self._session.pairs.get(public)
        if pair is None:
            seed = secrets.token_bytes(32)
            try:
                data = agreement.seal(seed, public, mine)
            except ValueError as error:
                raise self._given_up(f"the key of {self._name(other)} is none") from error
            signature = self._session.identity.sign(_pair_message(self._job, mine, public, data))
            pair = self._session.pairs[public] = Pair(agreement.derive(seed, b"pair", mine, public, data), data + signature)
        return pair.sealed

    # --- shares --------------------------------------------------------------------------------------------------------------

    def deal(self, senders: Sequence[int], sealed: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
        """Draws its two secrets and deals them.

        Args:
            senders: Who has sealed a key to this client.
            sealed: The keys, a row each.

        Returns:
            ``to`` ``(m,)``, ``box`` ``(m, 80)``: shares, encrypted; ``blob`` ``(1, 32 m + 16)``; ``commit`` ``(2 m + 2, 32)``.

        Raises:
            Abort: naming what is wrong.
        """
        terms = self._enter("deal", "mask")
        with self._giving_up():
            for other, data in zip(index_set(senders, len(terms.names), "a list of sealed keys"), sealed, strict=True):
                self._take_key(other, data.tobytes())
            reached = [other for other in self._around if self._key(other) in self._session.pairs]
            if len(reached) < terms.t:
                raise Abort(f"{len(reached)} neighbours have a key with this client; {terms.t} are needed.")
        points, context = [other + 1 for other in reached], self.context
        self._secrets = {SELF: shamir.draw(), WRAP: shamir.draw()}
        shares = {kind: list(map(shamir.to_bytes, shamir.split(secret, terms.t, points))) for kind, secret in self._secrets.items()}
        boxes = [
            agreement.encrypt(self._pair_key(other, b"box", self._me), shares[SELF][i] + shares[WRAP][i], context)
            for i, other in enumerate(reached)
        ]
        blob = agreement.encrypt(
            blob_key(self._secrets[WRAP], context), b"".join(self._pair_key(other, b"mask") for other in reached), context
        )
        dealt = [
            *((kind, other, shares[kind][i]) for kind in (SELF, WRAP) for i, other in enumerate(reached)),
            *((kind, -1, shamir.to_bytes(secret)) for kind, secret in self._secrets.items()),
        ]
        self._reached = frozenset(reached)
        return {
            "to": np.array(reached, dtype=np.int32),
            "box": _rows(boxes, BOX),
            "blob": _rows([blob], len(blob)),
            "commit": _rows([commitment(context, kind, self._me, holder, share) for kind, holder, share in dealt], 32),
        }

    def _take_key(self, other: int, data: bytes) -> None:
        public, mine = self._key(other), self._session.key.public
        if other not in self._around or other >= self._me:
            raise Abort("a key was sealed to this client by one that is not to send it one.")
        data, signature = data[: agreement.SEALED], data[agreement.SEALED :]
        # Anybody can seal to a public key; only its signature says whose secret this is.
        if not agreement.is_signed(self._roster["identity"][other].tobytes(), signature, _pair_message(self._job, public, mine, data)):
            raise Abort(f"the key of {self._name(other)} is not signed by it.")
        try:
            seed = self._session.key.open(data, public)
        except ValueError as error:
            raise Abort(f"the key of {self._name(other)} does not open: it was changed, or is for another.") from error
        self._session.pairs[public] = Pair(agreement.derive(seed, b"pair", public, mine, data))

    def _pair_key(self, other: int, use: bytes, sender: int | None = None) -> bytes:
        """A key of this sum that a neighbour has too."""
        about = b"" if sender is None else sender.to_bytes(4, "big")
        return agreement.derive(self._session.pairs[self._key(other)].key, use, self.context, about)

    # --- the vector ----------------------------------------------------------------------------------------------------------

    def mask(self, shared: Sequence[int], senders: Sequence[int], boxes: Any, narrow: U32, wide: U64) -> dict[str, Any]:
        """Its vector under masks. ``narrow`` is masked in place.

        Args:
            shared: Who has dealt.
            senders: Neighbours among them, in order.
            boxes: What each has encrypted to this client, a row each.

        Returns:
            ``narrow``, ``wide`` (with 33 values more), ``inner`` and ``outer`` tags ``(33,)``.

        Raises:
            Abort: naming what is wrong.
        """
        terms = self._enter("mask", "sign")
        with self._giving_up():
            self.shared = index_set(shared, len(terms.names), "the list of those who dealt")
            self._check_present(self.shared, "have dealt")
            others = [other for other in self._around if other in set(self.shared)]
            if list(index_set(senders, len(terms.names), "a list of shares")) != others or not self._reached.issuperset(others):
                raise Abort("the shares are not those of this client's neighbours that have dealt.")
            for other, box in zip(others, boxes, strict=True):
                self._held[other] = self._opened(other, box.tobytes())
        self._sizes = len(wide), len(narrow)
        wide = np.concatenate([wide, checksum.blinds()])
        tagger = checksum.Tagger(tag_seed(self.context), self._sizes[0])
        own = self_seed(self._secrets[SELF], self.context)
        masks = Masks(
            [own, *(self._pair_key(other, b"mask") for other in others if other > self._me)],
            [self._pair_key(other, b"mask") for other in others if other < self._me],
        )
        inner = tagger.start(wide)
        masks.add_wide(wide)
        outer = tagger.start(wide)
        for chunk in chunks(narrow):
            coefficients = tagger.coefficients(len(chunk))
            checksum.add_chunk(inner, coefficients, chunk, signed=True)
            masks.add_chunk(chunk)
            checksum.add_chunk(outer, coefficients, chunk)
        return {"narrow": narrow.view(np.int32), "wide": wide.view(np.int64), "inner": inner.view(np.int64), "outer": outer.view(np.int64)}

    def _opened(self, other: int, box: bytes) -> tuple[bytes, bytes]:
        try:
            data = agreement.decrypt(self._pair_key(other, b"box", other), box, self.context)
        except ValueError as error:
            raise Abort(
                f"the shares of {self._name(other)} do not open: it was told other terms, keys or a roster, or they were changed."
            ) from error
        # From now on the neighbour is known to have the pair's key.
        self._session.pairs[self._key(other)].sealed = None
        return data[:32], data[32:]

    # --- opening the sum -----------------------------------------------------------------------------------------------------

    def sign(self, survivors: Sequence[int], dropped: Sequence[int]) -> dict[str, Any]:
        """Signs over whom the sum is.

        Args:
            survivors: Whose vectors arrived.
            dropped: The others of those who dealt.

        Raises:
            Abort: naming what is wrong.
        """
        self._enter("sign", "reveal")
        with self._giving_up():
            self._sets = self._checked(survivors, dropped)
        message = survivors_message(self.context, self.shared, self._sets[0])
        return {"signature": _row(self._session.identity.sign(message))}

    def _checked(self, survivors: Sequence[int], dropped: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n = len(self._agreed.names)
        alive, gone = index_set(survivors, n, "the list of survivors"), index_set(dropped, n, "the list of dropouts")
        if set(alive) & set(gone):
            raise Abort("the server says of a client that its vector arrived and that it did not.")
        if self._me in gone or self._me not in alive:
            raise Abort("the server says that this client dropped out, and asks it all the same.")
        if tuple(sorted({*alive, *gone})) != self.shared:
            raise Abort("survivors and dropouts together are not those who dealt.")
        self._check_present(alive, "survive")
        return alive, gone

    def reveal(self, survivors: Sequence[int], dropped: Sequence[int], signers: Sequence[int], signatures: Any) -> dict[str, Any]:
        """For each neighbour one share: that of its own mask where its vector arrived, that of its recovery blob where not.

        Args:
            survivors: As signed.
            dropped: As signed.
            signers: Who has signed these sets.
            signatures: A row each.

        Returns:
            ``of`` ``(m,)`` and ``share`` ``(m, 32)``.

        Raises:
            Abort: naming what is wrong.
        """
        terms = self._enter("reveal", "blame")
        with self._giving_up():
            if self._checked(survivors, dropped) != self._sets:
                raise Abort("the sets are not those that this client has signed.")
            message, count = survivors_message(self.context, self.shared, self._sets[0]), 0
            around, alive = set(self._around), set(self._sets[0])
            for signer, signature in zip(index_set(signers, len(terms.names), "the list of signers"), signatures, strict=True):
                if signer not in around or signer not in alive or count >= terms.t:
                    continue
                if not agreement.is_signed(self._roster["identity"][signer].tobytes(), signature.tobytes(), message):
                    raise Abort(f"{self._name(signer)} has not signed these sets of clients.")
                count += 1
            if count < terms.t:
                raise Abort(f"{count} neighbours have signed over whom the sum is; {terms.t} are needed.")
        rows = [(other, own if other in alive else wrap) for other, (own, wrap) in sorted(self._held.items())]
        self._held.clear()
        self._secrets.clear()
        return {"of": np.array([other for other, _ in rows], dtype=np.int32), "share": _rows([share for _, share in rows], 32)}

    def blame(self) -> dict[str, Any]:
        """Tags of the masks that it shares with neighbours: ``of`` ``(m,)`` and ``tags`` ``(m, 33)``. Nothing is opened by them."""
        self._enter("blame", "done")
        others = [other for other in self._around if other in set(self.shared)]
        rows = checksum.mask_tags(tag_seed(self.context), [self._pair_key(other, b"mask") for other in others], *self._sizes)
        return {"of": np.array(others, dtype=np.int32), "tags": rows.view(np.int64)}

    # --- steps ---------------------------------------------------------------------------------------------------------------

    @property
    def _agreed(self) -> Terms:
        assert self.terms is not None
        return self.terms

    def _enter(self, step: str, following: str) -> Terms:
        if self._step != step:
            state = "gave this sum up" if self._step == "given up" else f"expects to {self._step}"
            raise Abort(f"the server asks to {step}, and this client {state}.")
        self._step = following
        return self.terms  # type: ignore[return-value]

    def _check_present(self, clients: Sequence[int], verb: str) -> None:
        terms, present = self._agreed, set(clients)
        numbers = self.rules.graph(len(terms.names))
        least = max(terms.min_clients, 3, numbers.n - numbers.dropouts)
        around = sum(other in present for other in self._around)
        if self._me not in present:
            raise Abort("the server leaves this client out, and asks it all the same.")
        if len(present) < least:
            raise Abort(f"{len(present)} of {numbers.n} clients {verb}; a sum of fewer than {least} is not opened.")
        if around < terms.t:
            raise Abort(f"{around} neighbours {verb}; {terms.t} are needed.")

    def _giving_up(self) -> _GivingUp:
        return _GivingUp(self)

    def _given_up(self, why: str) -> Abort:
        self.give_up()
        return Abort(f"{why}.")

    def give_up(self) -> None:
        """Forgets all secrets of this sum, and answers nothing more."""
        self._step = "given up"
        self._held.clear()
        self._secrets.clear()

    def _name(self, other: int) -> str:
        names = self.terms.names if self.terms is not None else ()
        return repr(names[other])[:60] if other < len(names) else f"client {other}"


class _GivingUp:
    """What is refused within ends the sum for its client."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._member.give_up()
        if isinstance(error, ValueError | IndexError | KeyError) and not isinstance(error, MessageError):
            raise Abort(f"a message of this sum is malformed ({type(error).__name__}).") from error


def blob_key(wrap: int, context: bytes) -> bytes:
    """The key of a recovery blob."""
    return agreement.derive(shamir.to_bytes(wrap), b"blob", context)


def self_seed(secret: int, context: bytes) -> bytes:
    """The seed of a client's own mask."""
    return agreement.derive(shamir.to_bytes(secret), b"self", context)


def _pair_message(job: str, sender: bytes, receiver: bytes, sealed: bytes) -> bytes:
    return packed(b"fedfm secagg pair 1", job.encode(), sender, receiver, sealed)


def tag_seed(context: bytes) -> bytes:
    """The seed of the tags' coefficients."""
    return agreement.derive(packed(context), b"tags")


def _row(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(data, dtype=np.uint8).copy()


def _rows(rows: Sequence[bytes], size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), size).copy()

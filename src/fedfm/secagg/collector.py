"""The server's side of one secure sum. It learns the sum, who took part, and nothing else of a vector; memory is one vector and the small messages.

Each message is checked as it comes, so that what is malformed is its sender's failure. Shares are committed to by who deals them: a holder that gives a wrong one is
passed over, and a dealer whose shares do not fit together is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fedfm.core.errors import MessageError
from fedfm.secagg import agreement, checksum, graph, shamir
from fedfm.secagg.graph import Graph
from fedfm.secagg.masks import U32, U64, add_masks, chunks
from fedfm.secagg.member import SELF, WRAP, blob_key, self_seed, tag_seed
from fedfm.secagg.quantise import Quantiser
from fedfm.secagg.terms import (
    HELLO,
    LOT,
    Arrays,
    Rules,
    Terms,
    commitment,
    context_of,
    hello_message,
    lot_commitment,
    order_seed,
    survivors_message,
)  # fmt: skip


class Collector:
    """One sum.

    Args:
        job: Which run.
        errand: Verb, round and attempt.
        rules: The plan's.
    """

    def __init__(self, job: str, errand: str, rules: Rules) -> None:
        self.job, self.errand, self.rules = job, errand, rules
        self.names: tuple[str, ...] = ()
        self.context = b""
        self._hellos: dict[str, Arrays] = {}
        self._lots: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._boxes: dict[int, dict[int, bytes]] = {}
        self._deals: dict[int, Arrays] = {}
        self._tags: dict[int, tuple[U64, U64]] = {}
        self._signatures: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}
        self._masks: dict[int, dict[int, U64]] = {}
        self._own: dict[int, bytes] = {}

    # --- keys and shares -----------------------------------------------------------------------------------------------------

    def hello(self, name: str, message: Arrays) -> None:
        """Takes a client's key.

        Raises:
            MessageError: if it is not signed, or is none.
        """
        key, nonce, lot, identity, signature = (message[field].tobytes() for field in HELLO)
        if not agreement.is_signed(identity, signature, hello_message(self.job, self.errand, name, key, nonce, lot)):
            raise MessageError("its key is not signed for this sum.")
        if not agreement.is_key(key):
            raise MessageError("its key is none.")
        self._hellos[name] = message

    def begin(self, body: str, quantiser: Callable[[int], Quantiser]) -> tuple[Terms, Arrays]:
        """The terms and the roster, of those who gave a key.

        Args:
            body: Digest of what all are asked.
            quantiser: That of a number of clients.

        Raises:
            MessageError: if they are too few.
        """
        self.names = tuple(sorted(self._hellos))
        self.graph: Graph = self.rules.graph(len(self.names))
        rules = self.rules
        self.quantiser = quantiser(self.graph.n)
        self.terms = Terms(
            job=self.job,
            errand=self.errand,
            names=self.names,
            k=self.graph.k,
            t=self.graph.t,
            min_clients=rules.min_clients,
            reach=rules.reach,
            max_weight=rules.max_weight,
            body=body,
            quantiser=self.quantiser.digest,
            uniform=self.quantiser.uniform,
        )
        self.roster: Arrays = {field: np.stack([self._hellos[name][field] for name in self.names]) for field in HELLO}
        self.context = context_of(self.terms, self.roster)
        self.shared: tuple[int, ...] = ()
        self.survivors: tuple[int, ...] = ()
        return self.terms, self.roster

    @property
    def needs_lots(self) -> bool:
        """Whether the graph is drawn; where it is not, everybody is a neighbour of everybody."""
        return self.graph.n > graph.COMPLETE

    @property
    def least(self) -> int:
        """Fewest clients of which a sum is opened."""
        return max(self.rules.min_clients, 3, self.graph.n - self.graph.dropouts)

    def index(self, name: str) -> int:
        """A client's place."""
        return self.names.index(name)

    def join(self, name: str, message: Arrays) -> None:
        """Takes a client's lot.

        Raises:
            MessageError: if it is not the one that it was committed to.
        """
        me, lot = self.index(name), message["lot"].tobytes()
        if lot_commitment(lot) != self.roster["lot"][me].tobytes():
            raise MessageError("its lot is not the one that it was committed to.")
        self._lots[me] = lot

    def draw(self) -> npt.NDArray[np.uint8]:
        """Draws the graph; the lots, which everybody is told.

        Raises:
            MessageError: if one is missing: a client that could withhold it after it has seen the others' would choose the graph.
        """
        rows = [self._lots[place] for place in range(self.graph.n) if place in self._lots] if self.needs_lots else []
        if self.needs_lots and len(rows) < self.graph.n:
            raise MessageError(f"{self.graph.n - len(rows)} clients did not tell their lots.")
        lots = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), LOT).copy()
        self.around = graph.neighbours(self.graph, order_seed(self.context, lots))
        return lots

    def pair(self, name: str, message: Arrays) -> None:
        """Takes the keys that a client has sealed to others.

        Raises:
            MessageError: if they are for nobody who is to get one.
        """
        me = self.index(name)
        for other, data in zip(self._places(message["to"]), message["sealed"], strict=True):
            if other not in self.around[me] or other <= me:
                raise MessageError("it has sealed a key to one that is not to get one.")
            self._sealed.setdefault(other, {})[me] = data.tobytes()

    def keys_for(self, name: str) -> tuple[list[int], list[bytes]]:
        """Who has sealed a key to a client, and the keys."""
        rows = sorted(self._sealed.get(self.index(name), {}).items())
        return [other for other, _ in rows], [data for _, data in rows]

    def deal(self, name: str, message: Arrays) -> None:
        """Takes the shares that a client deals.

        Raises:
            MessageError: if they are too few, or for others than its neighbours.
        """
        me, to = self.index(name), self._places(message["to"])
        m = len(to)
        if not set(to) <= set(self.around[me]) or m < self.graph.t:
            raise MessageError("it deals shares to others than its neighbours, or to too few.")
        if message["box"].shape[0] != m or message["commit"].shape[0] != 2 * m + 2 or message["blob"].shape != (1, 32 * m + 16):
            raise MessageError("the shares that it deals do not fit together.")
        self._deals[me] = message
        for other, box in zip(to, message["box"], strict=True):
            self._boxes.setdefault(other, {})[me] = box.tobytes()

    def close_shares(self) -> None:
        """Nobody deals any more; makes room for the sum.

        Raises:
            MessageError: if they are too few.
        """
        self.shared = tuple(sorted(self._deals))
        self._require(self.shared, "have dealt shares")
        self._narrow: U32 = np.zeros(self.quantiser.num_narrow, dtype="<u4")
        self._wide: U64 = np.zeros(self.quantiser.num_wide + checksum.TAGS, dtype="<u8")

    def boxes_for(self, name: str) -> tuple[list[int], list[bytes]]:
        """Whose shares a client gets, and the shares."""
        rows = sorted(self._boxes.get(self.index(name), {}).items())
        return [other for other, _ in rows], [data for _, data in rows]

    # --- vectors -------------------------------------------------------------------------------------------------------------

    def add(self, name: str, message: Arrays) -> None:
        """Adds a masked vector to the sum.

        Raises:
            MessageError: if it was garbled on its way.
        """
        me = self.index(name)
        narrow, wide = message["narrow"].view("<u4"), message["wide"].view("<u8")
        inner, outer = message["inner"].view("<u8"), message["outer"].view("<u8")
        tagger = checksum.Tagger(tag_seed(self.context), len(wide) - checksum.TAGS)
        tags = tagger.start(wide)
        for chunk in chunks(narrow):
            checksum.add_chunk(tags, tagger.coefficients(len(chunk)), chunk)
        if not np.array_equal(tags, outer):
            raise MessageError("its upload was garbled: its tags are not those of what arrived.")
        self._narrow += narrow
        self._wide += wide
        self._tags[me] = inner.copy(), outer.copy()

    def close_vectors(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Survivors and dropouts, which everybody is told.

        Raises:
            MessageError: if too few survive.
        """
        self.survivors = tuple(sorted(self._tags))
        self._require(self.survivors, "have sent their vector")
        return self.survivors, tuple(place for place in self.shared if place not in self._tags)

    def _require(self, clients: Sequence[int], verb: str) -> None:
        if len(clients) < self.least:
            raise MessageError(f"{len(clients)} of {self.graph.n} clients {verb}; a secure sum of fewer than {self.least} is not opened.")

    # --- opening -------------------------------------------------------------------------------------------------------------

    def sign(self, name: str, message: Arrays) -> None:
        """Takes a client's signature under the sets.

        Raises:
            MessageError: if it is none.
        """
        me, signature = self.index(name), message["signature"].tobytes()
        identity = self.roster["identity"][me].tobytes()
        if not agreement.is_signed(identity, signature, survivors_message(self.context, self.shared, self.survivors)):
            raise MessageError("it has not signed over whom the sum is.")
        self._signatures[me] = signature

    def signatures(self) -> tuple[list[int], list[bytes]]:
        """Who has signed, and the signatures."""
        rows = sorted(self._signatures.items())
        return [place for place, _ in rows], [signature for _, signature in rows]

    def reveal(self, name: str, message: Arrays) -> None:
        """Takes the shares that a client gives back.

        Raises:
            MessageError: if they are not those that it was dealt.
        """
        me, alive = self.index(name), set(self.survivors)
        shares = {other: share.tobytes() for other, share in zip(self._places(message["of"]), message["share"], strict=True)}
        for other, share in shares.items():
            deal = self._deals.get(other)
            to = [] if deal is None else deal["to"].tolist()
            if deal is None or me not in to:
                raise MessageError("it gives a share that it was not dealt.")
            row = to.index(me) + (0 if other in alive else len(to))
            if deal["commit"][row].tobytes() != commitment(self.context, SELF if other in alive else WRAP, other, me, share):
                raise MessageError(f"the share that it gives of {self.names[other]!r} is not the one that was dealt.")
        for other, share in shares.items():
            self._shares.setdefault(other, {})[me] = share

    def open(self) -> tuple[U32, U64]:
        """The sum: narrow and wide values.

        Raises:
            MessageError: if a secret cannot be put together.
        """
        alive, plus, minus = set(self.survivors), list[bytes](), list[bytes]()
        for place in self.shared:
            secret = self._secret(place, place in alive)
            if place in alive:
                self._own[place] = self_seed(secret, self.context)
                minus.append(self._own[place])
                continue
            # What is left of a dropout are the masks in its neighbours' vectors: added there where it comes later.
            for other, seed in self._recovered(place, secret).items():
                if other in alive:
                    (minus if other < place else plus).append(seed)
        add_masks(self._wide, self._narrow, plus, minus)
        return self._narrow, self._wide[: -checksum.TAGS]

    def is_tagged(self) -> bool:
        """Whether the opened sum is that of what its clients tagged."""
        total = np.zeros(checksum.TAGS, dtype="<u8")
        for inner, _ in self._tags.values():
            total += inner
        return bool(np.array_equal(total, checksum.tags(tag_seed(self.context), self._wide, self._narrow, signed=True)))

    def _secret(self, place: int, is_alive: bool) -> int:
        name, t = self.names[place], self.graph.t
        shares = sorted(self._shares.get(place, {}).items())[:t]
        if len(shares) < t:
            raise MessageError(f"{len(shares)} of the {t} shares that are needed for {name!r} came back.")
        secret = shamir.combine([holder + 1 for holder, _ in shares], [shamir.from_bytes(share) for _, share in shares])
        commits, kind = self._deals[place]["commit"], SELF if is_alive else WRAP
        if commits[-2 if is_alive else -1].tobytes() != commitment(self.context, kind, place, -1, shamir.to_bytes(secret)):
            raise MessageError(f"the shares that {name!r} dealt do not fit together.")
        return secret

    def _recovered(self, place: int, wrap: int) -> dict[int, bytes]:
        deal = self._deals[place]
        try:
            data = agreement.decrypt(blob_key(wrap, self.context), deal["blob"].tobytes(), self.context)
        except ValueError as error:
            raise MessageError(f"the recovery blob of {self.names[place]!r} does not open.") from error
        return {int(other): data[32 * i : 32 * i + 32] for i, other in enumerate(deal["to"].tolist())}

    # --- blame ---------------------------------------------------------------------------------------------------------------

    def blame(self, name: str, message: Arrays) -> None:
        """Takes the tags of a client's masks.

        Raises:
            MessageError: if they are of others than its neighbours.
        """
        me, of = self.index(name), self._places(message["of"])
        if set(of) != set(self.around[me]) & set(self.shared):
            raise MessageError("it tags other masks than those that it shares.")
        self._masks[me] = dict(zip(of, message["tags"].view("<u8"), strict=True))

    def suspects(self) -> list[str]:
        """Who masked another vector than it tagged, or says other things of a mask than the one it shares it with; of those who said anything."""
        seed, sizes = tag_seed(self.context), (len(self._wide) - checksum.TAGS, len(self._narrow))
        suspects = set[int]()
        for place, masks in self._masks.items():
            inner, outer = self._tags[place]
            tags = outer - checksum.mask_tags(seed, [self._own[place]], *sizes)[0]
            for other, mask in masks.items():
                tags = tags - mask if other > place else tags + mask
                # Where two disagree, one of them is wrong, and so both are named.
                if other in self._masks and not np.array_equal(mask, self._masks[other][place]):
                    suspects |= {place, other}
            if (int(tags[0]) - int(inner[0])) % 2**32 or not np.array_equal(tags[1:], inner[1:]):
                suspects.add(place)
        return [self.names[place] for place in sorted(suspects)]

    def _places(self, values: Any) -> list[int]:
        places = [int(value) for value in values]
        if any(a >= b for a, b in pairwise(places)) or any(not 0 <= place < len(self.names) for place in places):
            raise MessageError("it names clients twice, out of order, or some that are not in the roster.")
        return places

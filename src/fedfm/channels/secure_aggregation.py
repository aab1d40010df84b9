"""Secure aggregation: the server learns the sum of all answers and nothing else of one.

SecAgg+ with sessions. Each exchange is asked of all at once; a client that fails before its vector arrives is left out, one that fails after is in the sum::

    secagg.keys      a session key, a nonce and a commitment to a lot, signed
    secagg.lots      the roster            ->  the lot, from which neighbours are drawn (above 32 clients only)
    secagg.pairs     the roster, or lots   ->  keys for neighbours, sealed (the first time only)
    secagg.shares    keys of others        ->  shares of two secrets, encrypted to neighbours, and a recovery blob
    train, ...       shares of others      ->  the answer, quantised and under masks that cancel in the sum
    secagg.sign      whose answer arrived  ->  a signature under that
    secagg.reveal    the signatures        ->  for each neighbour one share: of its own mask, or of its recovery blob
    secagg.blame     (only where the sum is not what was tagged) tags of masks, which name who is wrong

Training, evaluation and counting pass it alike. Weights, losses and counts are inside the masked vector. The mathematics is in :mod:`fedfm.secagg`.

Bonawitz et al., `Practical Secure Aggregation for Privacy-Preserving Machine Learning <https://doi.org/10.1145/3133956.3133982>`_, 2017; Bell et al.,
`Secure Single-Server Aggregation with (Poly)Logarithmic Overhead <https://eprint.iacr.org/2020/704>`_, 2020. Ours differs: pairs agree once for a job, by X25519
and ML-KEM-768 together; a dropout costs a blob's key and no long-term key; masks are bound to the model that each client was given (against Pasquini et al.,
`Eluding Secure Aggregation <https://arxiv.org/abs/2111.07380>`_, 2021).

Covered here: a curious server; a malicious one, together with ``corrupt`` of the clients; dropouts at each step; garbled answers; recordings that are opened
later with a quantum computer. Not covered: what the sum tells, which may be much for a small cohort (privacy needs noise as well); clients that lie
about their own vector; a client that makes each sum fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedfm.core.errors import ConfigError, FedfmError, MessageError
from fedfm.core.leaves import Leaf
from fedfm.core.messages import Body, ClientId, Failure, Reply, Request
from fedfm.core.parts import (
    TICKET,
    Channel,
    Errand,
    Finding,
    Partial,
    Plan,
    RoundContext,
    Scratch,
    Sealed,
    Session,
    Traits,
    Update,
    Vault,
    errand_id,
    note,
    refuse,
    traits,
    warn,
)  # fmt: skip
from fedfm.core.session import Answer
from fedfm.core.tree import Tree
from fedfm.secagg import agreement, checksum
from fedfm.secagg.collector import Collector
from fedfm.secagg.graph import COMPLETE, design
from fedfm.secagg.member import BOX, SEALED, Member
from fedfm.secagg.quantise import GRID, Quantiser
from fedfm.secagg.terms import HELLO, LOT, Abort, Rules, Terms

log = logging.getLogger(__name__)
KEYS, LOTS, PAIRS, SHARES, SIGN, REVEAL, BLAME = (
    f"secagg.{name}" for name in ("keys", "lots", "pairs", "shares", "sign", "reveal", "blame")
)
# Names of what the server relays with a request.
_TERMS, _LOTS, _SHARED, _FROM, _DATA = "terms", "lots", "secagg.shared", "secagg.from", "secagg.data"
_SPENT_CONTEXT, _SPENT_SUM = "secagg/context/", "secagg/sum/"
# Of an answer: type and shape of each tensor; None for any length.
_Spec = Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]
_BYTES, _PLACES, _WORDS = torch.uint8, torch.int32, torch.int64


@dataclass(frozen=True)
class SecureAggregation(Channel):
    """The server sees the sum of all answers, and no client's own. At least three clients take part, four unless the recipe says otherwise.

    It needs the extra ``privacy``: ``pip install 'fedfm[privacy]'``.

    Args:
        min_clients: No sum of fewer is made or opened, and no sums at one model that together show a sum of fewer. 3 is the least, and is a decision: two of three owners
            who compare notes know what the third has sent.
        corrupt: Share of a cohort that may collude with the server without either learning more than the sum.
        dropout: Share of a cohort that may drop out. Up to 32 clients more may, as many as the threshold leaves.
        threshold: Shares that open a secret, for cohorts up to 32; ``null`` for the fewest that keep ``corrupt``. Above it is computed.
        reach: Largest magnitude of a value of an update, in each coordinate; what is beyond is cut to it and counted. Together with the cohort and
            ``max_weight`` it decides how finely values are rounded.
        max_weight: Largest weight; an owner with more examples counts as one with so many.

    Raises:
        ConfigError: if a number is out of range.
    """

    concerns = ("privacy",)
    verbs = (KEYS, LOTS, PAIRS, SHARES, SIGN, REVEAL, BLAME)
    closing = (SIGN, REVEAL, BLAME)

    min_clients: int = 4
    corrupt: float = 0.1
    dropout: float = 0.1
    threshold: int | None = None
    reach: float = 1.0
    max_weight: float = 16384.0

    def __post_init__(self) -> None:
        if self.min_clients < 3:
            raise ConfigError(
                f"SecureAggregation.min_clients is {self.min_clients}; it must be 3 or more: of the sum of two clients each learns the other's part."
            )
        for name in ("corrupt", "dropout"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ConfigError(f"SecureAggregation.{name} is {getattr(self, name)}; it is a share from 0 to below 0.5.")
        for name in ("reach", "max_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"SecureAggregation.{name} is {getattr(self, name)}; it must be a finite number above 0.")

    def traits(self) -> Traits:
        """Sums alone are seen, and of a whole cohort."""
        return traits(
            needs=["barrier"],
            hides=["single-updates"],
            promises=[
                f"the server learns sums of {self.min_clients} or more owners and no owner's own answer, though it may cheat and collude with "
                f"{self.corrupt:.0%} of a cohort. What a sum tells, it tells: this is no differential privacy"
            ],
        )

    @property
    def rules(self) -> Rules:
        """What each client itself knows of how sums are made."""
        return Rules(self.corrupt, self.dropout, self.min_clients, self.threshold, float(self.reach), float(self.max_weight))

    # --- the plan ------------------------------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> Iterator[Finding]:
        """What secure sums need of the plan, and what they do not protect.

        Raises:
            MissingExtra: if the package ``cryptography`` is not installed.
        """
        agreement.require_cryptography()
        owners = getattr(getattr(plan, "evaluate", None), "owners", None)
        if owners is not None:
            yield from self.check_cohort("evaluate", owners)
        if self.min_clients == 3:
            yield warn(
                "channel",
                "a sum of three owners shows two of them who compare notes what the third has sent. Set min_clients to 4 or more.",
            )
        is_ = frozenset[str]().union(*(part.traits().is_ for part in plan.parts().values()))
        if "embeddings" in is_:
            yield warn(
                "channel",
                "trainable embeddings are in the sum: a row that one owner alone has changed is that owner's in the sum too. In sums of 5 owners of a tiny "
                "language model 71 % of the rows that changed were one owner's, in sums of 50 a third. Freeze them (LoRA), or add differential privacy.",
            )
        if "random-cohorts" in is_:
            yield warn(
                "channel",
                f"a cohort may by chance have fewer than {self.min_clients} clients, and such a round fails. Raise the rate, or sample a fixed number (Uniform).",
            )
        if plan.on_failure == "stop":
            yield warn("on_failure", "stop ends the run at the first dropout, which SecureAggregation could do without. Use leave_out.")
        yield note(
            "channel",
            "each owner's loss, counts and scores stay at home: the report shows sums, and counts of owners, in their place.",
        )

    def check_cohort(self, what: str, num_clients: int) -> Iterator[Finding]:
        """Whether so many clients make a secure sum, and with which numbers."""
        if num_clients < self.min_clients:
            yield refuse(
                "channel",
                f"SecureAggregation makes sums of {self.min_clients} clients or more, and {num_clients} would be asked to {what}. Ask more owners"
                + (", or lower min_clients (not below 3)." if num_clients >= 3 else "."),
            )
            return
        try:
            numbers = design(num_clients, self.corrupt, self.dropout, self.threshold)
        except ValueError as error:
            yield refuse("channel", f"to {what}, {error}.")
            return
        chance = (
            ""
            if num_clients <= COMPLETE
            else f" (but for a chance of 2^-{numbers.security:.0f}; 2^-{numbers.correctness:.0f} that a sum cannot be opened)"
        )
        yield Finding(
            "promise",
            "channel",
            f"a sum of {num_clients} to {what}: {numbers.k} neighbours each, threshold {numbers.t}; holds against {numbers.colluders} colluding with the "
            f"server, and {numbers.dropouts} dropouts{chance}",
        )

    def check_leaves(self, leaves: Sequence[Leaf], num_clients: int, uniform: bool) -> Iterator[Finding]:
        """Whether the ring of so many clients holds the values, and those on a grid exactly."""
        try:
            Quantiser(tuple(leaves), num_clients, float(self.reach), float(self.max_weight), uniform)
        except MessageError as error:
            yield refuse("channel", str(error))

    def largest(self) -> float:
        """``reach``."""
        return float(self.reach)

    def fewest_honest(self, least: int, num_clients: int | None = None) -> int:
        """The survivors that a sum needs without those who may collude, of the worst number of clients with which a sum may begin."""
        least = max(least, self.min_clients)
        fewest = math.floor(least * (1 - self.corrupt))
        for n in range(least, (num_clients or 0) + 1):
            colluders, dropouts = math.ceil(self.corrupt * n), math.ceil(self.dropout * n)
            if n <= COMPLETE:
                try:
                    numbers = design(n, self.corrupt, self.dropout, self.threshold)
                except ValueError:
                    continue  # with so many no sum is made
                colluders, dropouts = numbers.colluders, numbers.dropouts
            fewest = min(fewest, max(least, n - dropouts) - colluders)
        return fewest

    # --- the server ----------------------------------------------------------------------------------------------------------

    def collect(
        self, session: Session, errand: Errand, clients: Sequence[ClientId], deadline: float | None, ctx: RoundContext
    ) -> Iterator[Update | Partial | Failure]:
        """The failures as they come, and at the end the sum of all others."""
        if clients:
            agreement.require_cryptography()
            yield from _Exchange(self, session, errand, clients, deadline, ctx).outcomes()

    # --- the client ----------------------------------------------------------------------------------------------------------

    def answer(self, client: ClientId, request: Request, scratch: Scratch) -> Sealed:
        """The client's half of an exchange.

        Raises:
            Abort: if the server does what no honest one would; nothing more is answered for this sum.
            MessageError: if the request is malformed.
        """
        if request.verb not in self.verbs:
            return super().answer(client, request, scratch)
        if request.verb == KEYS:
            agreement.require_cryptography()
            vault = _vault(scratch)
            scratch.clear()
            member = scratch["member"] = Member(client, _session(vault), vault.job, errand_id(request), self.rules, vault.known)
            vault.known(client, _session(vault).identity.public)
            return _sealed(member.hello())
        member = _member(scratch)
        if request.verb in (LOTS, PAIRS):
            return _sealed(self._paired(member, request))
        if request.verb == SHARES:
            keys = _taken(request.own_tensors, {_FROM: (_PLACES, (None,)), _DATA: (_BYTES, (None, SEALED))})
            return _sealed(member.deal(keys[_FROM], keys[_DATA]))
        if request.verb == BLAME:
            return _sealed(member.blame())
        sets = {"survivors": (_PLACES, (None,)), "dropped": (_PLACES, (None,))}
        if request.verb == SIGN:
            told = _taken(request.tensors, sets)
            self._require_far(member, told["survivors"], scratch)
            return _sealed(member.sign(told["survivors"], told["dropped"]))
        told = _taken(request.tensors, {**sets, "signers": (_PLACES, (None,)), "signatures": (_BYTES, (None, agreement.SIGNATURE))})
        # Written before a share leaves, because what has left can not be called back.
        self._note_sum(member, told["survivors"], scratch)
        return _sealed(member.reveal(told["survivors"], told["dropped"], told["signers"], told["signatures"]))

    def _paired(self, member: Member, request: Request) -> dict[str, Any]:
        """Agrees to the terms; and learns who the neighbours are, where nobody else's lot is needed for it or all are told."""
        if request.verb == PAIRS and _TERMS not in request.meta:
            return member.pair(_taken(request.tensors, {_LOTS: (_BYTES, (None, LOT))})[_LOTS])
        roster = _taken(request.tensors, {name: (_BYTES, (None, size)) for name, size in HELLO.items()})
        lot = member.join(Terms.from_json(request.meta.get(_TERMS)), roster)
        return lot if request.verb == LOTS else member.pair(np.zeros((0, LOT), dtype=np.uint8))

    def seal(self, update: Update, leaves: tuple[Leaf, ...], request: Request, scratch: Scratch) -> Sealed:
        """The answer under masks."""
        member, vault = _member(scratch), _vault(scratch)
        terms = member.terms
        if terms is None:
            raise Abort("the server asks for an answer before the terms of its sum.")
        if terms.body != _body_digest(request.body):
            raise self._given_up(
                member, "what this client is asked is not what the terms of the sum say: another model, or other settings."
            )
        quantiser = Quantiser(leaves, len(terms.names), float(self.reach), float(self.max_weight), terms.uniform)
        if terms.quantiser != quantiser.digest:
            raise self._given_up(member, "the terms of the sum name another quantiser, or other leaves, than this client's.")
        shares = _taken(request.own_tensors, {_SHARED: (_PLACES, (None,)), _FROM: (_PLACES, (None,)), _DATA: (_BYTES, (None, BOX))})
        # What is asked without a model, such as counts, is the same in every run; it is kept apart within one.
        model = request.body.tensors_digest if request.body.tensors else vault.job
        scratch["model"] = request.body.verb, model
        # Those who deal are who will be summed, if nobody drops out any more; what is refused later may be opened by others who know less.
        self._require_far(member, shares[_SHARED], scratch)
        coins = vault.key.fold("secagg rounding", errand_id(request), member.name).digest
        numbers = {"weight": update.weight, **update.metrics}
        narrow, wide = quantiser.encode(update.payload, numbers, update.weight, coins)
        self._spend(member, vault)
        masked = member.mask(shares[_SHARED], shares[_FROM], shares[_DATA], narrow, wide)
        return _sealed(masked, {} if update.ticket is None else {TICKET: update.ticket})

    def _given_up(self, member: Member, why: str) -> Abort:
        member.give_up()
        return Abort(why)

    def _spend(self, member: Member, vault: Vault) -> None:
        """Writes down that this context is used; refuses one that was."""
        used, name = _used(vault), f"{_SPENT_CONTEXT}{member.context.hex()}"
        if name in used:
            raise self._given_up(member, "the masks of this sum were used before; no client uses a mask twice.")
        vault.spent.add(name, 1.0)
        used[name] = None

    def _require_far(self, member: Member, summed: Any, scratch: Scratch) -> tuple[str, frozenset[str]]:
        """Refuses a sum that, with others at the same model, would show a sum of too few; the name of the sums at it, and the members.

        All that sums over several sets can show, added and subtracted, are sums over unions of the cells into which the sets divide the clients.
        """
        terms, model = member.terms, scratch.get("model")
        if terms is None or not isinstance(model, tuple):
            raise Abort("the server asks about a sum that this client is not in.")
        if any(not 0 <= int(place) < len(terms.names) for place in summed):
            raise self._given_up(member, "a list of clients names one that is not in the roster.")
        members = frozenset(_short(terms.names[int(place)]) for place in summed)
        prefix = f"{_SPENT_SUM}{model[0]}/{model[1]}/"
        before = [frozenset(name.removeprefix(prefix).split(",")) for name in _used(_vault(scratch)) if name.startswith(prefix)]
        fewest = _smallest_cell([*before, members])
        if members not in before and fewest < self.min_clients:
            raise self._given_up(
                member,
                f"a sum to {model[0]} at this model was opened before, over other clients: together with it this one would show a sum of {fewest}, and "
                f"{self.min_clients} is the fewest. Let the same clients take part, or begin a run with another seed.",
            )
        return prefix, members

    def _note_sum(self, member: Member, survivors: Any, scratch: Scratch) -> None:
        prefix, members = self._require_far(member, survivors, scratch)
        vault = _vault(scratch)
        name = prefix + ",".join(sorted(members))
        if name not in _used(vault):
            vault.spent.add(name, 1.0)
            _used(vault)[name] = None


class _Exchange:
    """The server's half of one errand."""

    def __init__(
        self,
        channel: SecureAggregation,
        session: Session,
        errand: Errand,
        clients: Sequence[ClientId],
        deadline: float | None,
        ctx: RoundContext,
    ) -> None:
        self.channel, self.session, self.errand, self.deadline, self.ctx = channel, session, errand, deadline, ctx
        self.job = Vault.job_of(ctx.key)
        self.collector = Collector(self.job, errand.id, channel.rules)
        self.present = list(clients)
        self.tickets: dict[ClientId, int] = {}
        self.late: dict[ClientId, str] = {}

    def outcomes(self) -> Iterator[Partial | Failure]:
        """One outcome for each client."""
        try:
            yield from self._gather()
            yield self._opened()
        except MessageError as error:
            reason = str(error)
            if self.late:
                name, why = next(iter(self.late.items()))
                reason += f" {name}: {why}"
            yield from (Failure(client, "channel", reason) for client in self.present)

    def _gather(self) -> Iterator[Failure]:
        """Everything up to the vectors. A client that fails is no more among those present."""
        errand, n = self.errand, None
        body = yield from self._agree()
        collector = self.collector
        sealed: _Spec = {"to": (_PLACES, (n,)), "sealed": (_BYTES, (n, SEALED))}
        yield from self._ask(PAIRS, body, sealed, collector.pair)
        dealt: _Spec = {"to": (_PLACES, (n,)), "box": (_BYTES, (n, BOX)), "blob": (_BYTES, (n, n)), "commit": (_BYTES, (n, 32))}
        keys = {client: _relayed(*collector.keys_for(client), SEALED) for client in self.present}
        yield from self._ask(SHARES, Body(SHARES, errand.body.round), dealt, collector.deal, keys)
        collector.close_shares()
        shared = np.array(collector.shared, dtype=np.int32)
        boxes = {client: {_SHARED: torch.from_numpy(shared), **_relayed(*collector.boxes_for(client), BOX)} for client in self.present}
        quantiser = collector.quantiser
        vector: _Spec = {
            "narrow": (_PLACES, (quantiser.num_narrow,)),
            "wide": (_WORDS, (quantiser.num_wide + checksum.TAGS,)),
            "inner": (_WORDS, (checksum.TAGS,)),
            "outer": (_WORDS, (checksum.TAGS,)),
        }
        yield from self._ask(errand.body.verb, None, vector, collector.add, boxes)

    def _agree(self) -> Generator[Failure, None, Body]:
        """Keys and, where the graph is drawn, lots; what is asked next.

        A client that withholds its lot could choose among graphs, so then all begin anew without it.
        """
        round, hello = self.errand.body.round, {name: (_BYTES, (size,)) for name, size in HELLO.items()}
        while True:
            collector = self.collector = Collector(self.job, self.errand.id, self.channel.rules)
            yield from self._ask(KEYS, Body(KEYS, round), hello, collector.hello)
            terms, roster = collector.begin(_body_digest(self.errand.body), self._quantiser)
            meta, tensors = {_TERMS: terms.to_json()}, _tensors(roster)
            if not collector.needs_lots:
                collector.draw()
                return Body(PAIRS, round, tensors, meta)
            before = len(self.present)
            yield from self._ask(LOTS, Body(LOTS, round, tensors, meta), {"lot": (_BYTES, (LOT,))}, collector.join)
            if len(self.present) == before:
                return Body(PAIRS, round, _tensors({_LOTS: collector.draw()}))

    def _quantiser(self, n: int) -> Quantiser:
        channel, errand = self.channel, self.errand
        return Quantiser(errand.leaves, n, float(channel.reach), float(channel.max_weight), errand.uniform)

    def _opened(self) -> Partial:
        """The sum.

        Raises:
            MessageError: if it cannot be opened, or is not what its clients sent.
        """
        collector, round = self.collector, self.errand.body.round
        survivors, dropped = collector.close_vectors()
        sets = {"survivors": np.array(survivors, dtype=np.int32), "dropped": np.array(dropped, dtype=np.int32)}
        self._close(SIGN, Body(SIGN, round, _tensors(sets)), {"signature": (_BYTES, (agreement.SIGNATURE,))}, collector.sign)
        signers, signatures = collector.signatures()
        rows = np.frombuffer(b"".join(signatures), dtype=np.uint8).reshape(-1, agreement.SIGNATURE).copy()
        body = Body(REVEAL, round, _tensors({**sets, "signers": np.array(signers, dtype=np.int32), "signatures": rows}))
        self._close(REVEAL, body, {"of": (_PLACES, (None,)), "share": (_BYTES, (None, 32))}, collector.reveal)
        narrow, wide = collector.open()
        if not collector.is_tagged():
            self._close(BLAME, Body(BLAME, round), {"of": (_PLACES, (None,)), "tags": (_WORDS, (None, checksum.TAGS))}, collector.blame)
            named = ", ".join(collector.suspects())
            raise MessageError(
                "the sum is not that of what its clients meant to send, and is thrown away. "
                + (f"It is the answer of {named}." if named else "Whose answer it is could not be found.")
            )
        opened = collector.quantiser.decode(narrow, wide)
        if opened.num_cut or opened.num_capped:
            log.warning(
                "round %d: %d values of all updates together were beyond SecureAggregation.reach (%g) and were cut to it; %d owners have a weight beyond "
                "max_weight (%g) and count as that",
                round, opened.num_cut, self.channel.reach, opened.num_capped, self.channel.max_weight,
            )  # fmt: skip
        names = [collector.names[place] for place in survivors]
        leaves, uniform = self.errand.leaves, self.errand.uniform
        total = Partial.of_ring(leaves, opened.ring_d, GRID, opened.bound, names, uniform, opened.unknown)
        total.tickets = {name: self.tickets[name] for name in names if name in self.tickets}
        return total

    def _ask(
        self,
        verb: str,
        body: Body | None,
        spec: _Spec,
        take: Callable[[str, dict[str, Any]], None],
        relayed: Mapping[ClientId, Tree] | None = None,
    ) -> Iterator[Failure]:
        """One exchange with all who are present; those who fail are not any more."""
        requests = {client: self.errand.request(client, body) for client in self.present}
        if relayed is not None:
            requests = {client: replace(request, own_tensors=relayed[client]) for client, request in requests.items()}
        for answer in _answers(self.session, requests, self.deadline):
            outcome = answer if isinstance(answer, Failure) else self._take(answer, verb, spec, take)
            if outcome is not None:
                self.present.remove(answer.client)
                yield outcome

    def _take(self, reply: Reply, verb: str, spec: _Spec, take: Callable[[str, dict[str, Any]], None]) -> Failure | None:
        try:
            if (reply.verb, reply.round) != (verb, self.errand.body.round):
                raise MessageError(
                    f"it answered {reply.verb} of round {reply.round}, was asked to {verb} in round {self.errand.body.round}."
                )
            ticket = _ticket(reply, self.errand, verb == self.errand.body.verb)
            take(reply.client, _taken(reply.tensors, spec))
        except FedfmError as error:
            return Failure(reply.client, "channel", str(error))
        except (ValueError, IndexError) as error:
            return Failure(reply.client, "channel", f"its answer to {verb} is malformed ({type(error).__name__}).")
        if ticket is not None:
            self.tickets[reply.client] = ticket
        return None

    def _close(self, verb: str, body: Body, spec: _Spec, take: Callable[[str, dict[str, Any]], None]) -> None:
        """An exchange after the vectors: a client that fails stays in the sum."""
        present = list(self.present)
        for failure in self._ask(verb, body, spec, take):
            log.info("round %d: %s failed in %s, and stays in the sum: %s", self.errand.body.round, failure.client, verb, failure.reason)
            self.late[failure.client] = failure.reason
        self.present = present


def _answers(session: Session, requests: Mapping[ClientId, Request], deadline: float | None) -> Iterator[Answer]:
    """One answer for each request, in whatever order they come; what nobody asked for is dropped."""
    waiting = dict.fromkeys(requests)
    for answer in session.exchange(requests, deadline):
        if answer.client not in waiting:
            log.warning("dropped an answer of %r, who was not asked or has answered already", answer.client)
            continue
        del waiting[answer.client]
        yield answer
    yield from (Failure(client, "channel", "it gave no answer.") for client in sorted(waiting))


def _ticket(reply: Reply, errand: Errand, is_answer: bool) -> int | None:
    ticket, given = reply.meta.get(TICKET), errand.own.get(reply.client, {}).get(TICKET)
    if reply.meta.keys() - ({TICKET} if is_answer else set()):
        raise MessageError(f"it tells {sorted(reply.meta)[:3]} in the clear, which nobody asked for.")
    if ticket is not None and (type(ticket) is not int or ticket != given):
        raise MessageError(f"its ticket is {ticket!r:.20}; the one that it was given is {given}.")
    return ticket if isinstance(ticket, int) else None


def _taken(tensors: Tree, spec: _Spec) -> dict[str, Any]:
    """The tensors of a message as arrays, checked.

    Raises:
        MessageError: if one is missing, unexpected, or of another type or shape.
    """
    if tensors.keys() != spec.keys():
        raise MessageError(f"a message of a secure sum holds {sorted(spec)}; this one holds {sorted(tensors)[:9]}.")
    for name, (dtype, shape) in spec.items():
        tensor = tensors[name]
        fits = tensor.dim() == len(shape) and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
        if tensor.dtype != dtype or not fits:
            raise MessageError(f"{name!r} of a secure sum is {str(tensor.dtype)[6:]}{list(tensor.shape)}, which it is not to be.")
    return {name: tensors[name].contiguous().numpy() for name in spec}


def _tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _sealed(arrays: Mapping[str, Any], meta: Mapping[str, int] | None = None) -> Sealed:
    return Sealed(_tensors(arrays), dict(meta or {}))


def _relayed(senders: Sequence[int], rows: Sequence[bytes], size: int) -> dict[str, torch.Tensor]:
    data = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), size).copy()
    return _tensors({_FROM: np.array(senders, dtype=np.int32), _DATA: data})


def _body_digest(body: Body) -> str:
    """Names what all are asked: verb, round, settings and every byte of the model."""
    text = json.dumps([body.verb, body.round, dict(body.meta), body.tensors_digest], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _vault(scratch: Scratch) -> Vault:
    vault = getattr(scratch, "vault", None)
    if vault is None:
        raise MessageError("there is no house here that lends a key, so nothing is summed securely.")
    return vault  # type: ignore[no-any-return]


def _session(vault: Vault) -> agreement.Session:
    """The client's keys of this job; drawn when they are first needed."""
    session = vault.memory.get("secagg")
    if not isinstance(session, agreement.Session):
        session = vault.memory["secagg"] = agreement.Session(agreement.Identity(vault.identity))
    return session


def _member(scratch: Scratch) -> Member:
    member = scratch.get("member")
    if not isinstance(member, Member):
        raise Abort("the server asks about a sum that this client knows nothing of; it may have been started anew since.")
    return member


def _used(vault: Vault) -> dict[str, None]:
    """Contexts and sums that this client has spent; read from its account once."""
    used = vault.memory.get("secagg used")
    if not isinstance(used, dict):
        used = vault.memory["secagg used"] = dict.fromkeys(name for name in vault.spent.names() if name.startswith("secagg/"))
    return used


def _smallest_cell(sets: Sequence[frozenset[str]]) -> int:
    """Fewest clients that are in the same of these sets as each other."""
    cells = Counter(tuple(client in members for members in sets) for client in frozenset[str]().union(*sets))
    return min(cells.values())


def _short(name: str) -> str:
    """A client in the account of sums: 8 letters."""
    return base64.urlsafe_b64encode(hashlib.blake2b(name.encode(), digest_size=6).digest()).decode()

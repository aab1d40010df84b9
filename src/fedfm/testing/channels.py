"""What every channel must do: one outcome for each client, the plain sum, and no answer that can end a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from fedfm.client.spent import SpentStore
from fedfm.core import leaves as declare
from fedfm.core.errors import FedfmError
from fedfm.core.keys import Key
from fedfm.core.leaves import Leaf, deltas
from fedfm.core.messages import Body, ClientId, Failure, Message, Reply, Request, Scalar, pack, unpack
from fedfm.core.parts import TICKET, Channel, Errand, Partial, RoundContext, Scratch, Sealed, Session, Spec, Update, Vault
from fedfm.core.session import Answer, WrappedSession
from fedfm.testing.parts import check_part, context, like, parameters, same
from fedfm.testing.sessions import Scripted

Outcome = Update | Partial | Failure
# Changes the answers of one exchange, which the verb names.
Tamper = Callable[[str, list[Answer]], Iterable[Answer]]
_ROUND, _DEADLINE = 3, 7.0
_ODD: tuple[Scalar, ...] = ("many", True, None, -1, math.nan)


def check_channel(channel: Channel, grid: int = 80) -> None:
    """Every client that is asked has one outcome, what is summed is the plain sum, and what is malformed is its client's failure.

    Both halves run in this process, and what passes between them are bytes. The laws hold with ``errand.sums`` on and off and with weights
    of any kind; a channel that hides single updates gives sums both times.

    Args:
        channel: The channel.
        grid: The sums are integers of ``2^-grid``. With 80 they have the bits of :class:`fedfm.core.sums.Partial`; each client of a coarser
            grid may add half a unit.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(channel)
    for sums in (False, True):
        for uniform in (False, True):
            bench = _Bench(channel, sums, uniform, grid)
            bench.check_sum()
            bench.check_silence()
            bench.check_strangers()
    bench = _Bench(channel, True, False, grid)
    bench.check_malformed()
    bench.check_cold()


def halves(
    channel: Channel,
    updates: Mapping[ClientId, Update],
    leaves: tuple[Leaf, ...],
    tamper: Tamper | None = None,
    vaults: Mapping[ClientId, Vault] | None = None,
) -> Scripted:
    """A session with the channel's client halves, whose answers are these updates. What passes are bytes.

    Args:
        tamper: Changes the answers of an exchange.
        vaults: What the clients' houses lend; new ones by default.
    """
    vaults = vaults or {client: vault_of(client) for client in updates}
    scratch = {client: Scratch(vault) for client, vault in vaults.items()}

    def answer(client: ClientId, request: Request) -> Answer:
        arrived = _crossed(request)
        assert isinstance(arrived, Request)
        try:
            sealed = _client_half(channel, client, updates[client], leaves, arrived, scratch[client])
        except FedfmError as error:
            return Failure(client, "channel", str(error))
        reply = _crossed(Reply(client, request.verb, request.round, sealed.tensors, sealed.meta))
        assert isinstance(reply, Reply)
        return reply

    def script(requests: Mapping[ClientId, Request]) -> Iterable[Answer]:
        answers = [answer(client, request) for client, request in requests.items()]
        verb = next(iter(requests.values())).verb if requests else ""
        return answers if tamper is None else tamper(verb, answers)

    return Scripted(script)


def vault_of(client: ClientId) -> Vault:
    """What a house lends a channel, for one client, in a run with the key of :func:`fedfm.testing.parts.context`. Every key is known."""
    key = Key.root(0)
    return Vault(client, Vault.job_of(key), key, SpentStore(None).of(client), lambda name, public: True)


def _client_half(
    channel: Channel, client: ClientId, update: Update, leaves: tuple[Leaf, ...], request: Request, scratch: Scratch
) -> Sealed:
    """What a runtime does with a request, the answer being known."""
    return channel.answer(client, request, scratch) if request.verb in channel.verbs else channel.seal(update, leaves, request, scratch)


class _Noted(WrappedSession):
    """Notes what each exchange asks, and by when."""

    def __init__(self, inner: Session) -> None:
        super().__init__(inner)
        self.requests: list[Mapping[ClientId, Request]] = []
        self.deadlines: set[float | None] = set()

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        self.requests.append(requests)
        self.deadlines.add(deadline)
        self.inner.send(requests, deadline)


class _Bench:
    """A channel, and a round of four clients that it is tried with."""

    def __init__(self, channel: Channel, sums: bool, uniform: bool, grid: int) -> None:
        self.channel, self.grid, self.name = channel, grid, type(channel).__name__
        params = parameters()
        self.leaves = (
            *deltas(Spec.of(params)),
            Leaf("method.extra", (3,), torch.float64, "method", reduce="sum"),
            declare.number("weight"),
            declare.number("loss", "mean", signed=True),
            declare.number("tokens"),
        )
        own = {f"client-{i}": {TICKET: 10 + i} for i in range(4)}
        self.errand = Errand(
            body=Body("train", _ROUND, params, {"some": "thing"}), leaves=self.leaves, params=params, own=own, sums=sums, uniform=uniform
        )
        self.ctx: RoundContext = replace(context(params, _ROUND), leaves=self.leaves)
        self.updates = {f"client-{i}": _update(f"client-{i}", i) for i in range(4)}

    @property
    def what(self) -> str:
        """The channel, and how it was asked."""
        return f"{self.name}, {'sums' if self.errand.sums else 'single updates'}{' of equal weight' if self.errand.uniform else ''}"

    def collect(self, tamper: Tamper | None = None) -> list[Outcome]:
        """The outcomes of a round, one for each client."""
        session = _Noted(halves(self.channel, self.updates, self.leaves, tamper))
        try:
            outcomes = list(self.channel.collect(session, self.errand, list(self.updates), _DEADLINE, self.ctx))
        except Exception as error:
            raise AssertionError(f"{self.what}: an answer ended the round for everybody: {type(error).__name__}: {error}") from error
        clients = sorted(client for outcome in outcomes for client in _clients(outcome))
        assert clients == sorted(self.updates), f"{self.what}: {sorted(self.updates)} were asked, and the outcomes are of {clients}"
        assert session.deadlines == {_DEADLINE}, f"{self.what}: the deadline does not reach the session: {session.deadlines}"
        return outcomes

    def sum_of(self, outcomes: Sequence[Outcome]) -> Partial:
        """All that was not a failure, as one sum."""
        total = Partial(self.leaves, self.errand.uniform)
        for outcome in outcomes:
            if isinstance(outcome, Partial):
                total.merge(outcome)
            elif isinstance(outcome, Update):
                _add(total, outcome)
        return total

    def check_sum(self) -> None:
        """The sum of all is the plain one, in whatever order the answers arrive, and says what each client remembers."""
        outcomes = self.collect()
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        assert not failures, f"{self.what}: {failures}"
        kinds = {type(outcome) for outcome in outcomes}
        hides = "single-updates" in self.channel.traits().hides
        expected = Partial if hides or self.errand.sums else Update
        assert kinds == {expected}, f"{self.what}: gives {sorted(kind.__name__ for kind in kinds)}, not {expected.__name__}"
        total, plain = self.sum_of(outcomes), Partial(self.leaves, self.errand.uniform)
        for update in self.updates.values():
            _add(plain, update)
        self._require_close(total, plain)
        again = self.sum_of(self.collect(lambda _, answers: reversed(answers)))
        assert same(total.totals(), again.totals()) and total.weight == again.weight, f"{self.what}: the order of answers changes the sum"
        tickets = {client: update.ticket for client, update in self.updates.items()}
        arrived = {outcome.client: outcome.ticket for outcome in outcomes if isinstance(outcome, Update)}
        assert (arrived or total.tickets) == tickets, f"{self.what}: tickets were {tickets}, and are {arrived or total.tickets}"
        assert not list(self.channel.collect(halves(self.channel, {}, self.leaves), self.errand, [], None, self.ctx)), (
            f"{self.what}: an empty cohort has an outcome"
        )

    def check_silence(self) -> None:
        """A client that fails, or says nothing, is a failure; the others have one outcome each."""
        first, exchanges = next(iter(self.updates)), set[str]()

        def note(exchange: str, answers: list[Answer]) -> Iterable[Answer]:
            exchanges.add(exchange)
            return answers

        self.collect(note)
        # An exchange may be for large cohorts, or for times when something is wrong.
        for verb in (verb for verb in (*self.channel.verbs, "train") if verb in exchanges):

            def without(exchange: str, answers: list[Answer], verb: str = verb) -> Iterable[Answer]:
                return [answer for answer in answers if exchange != verb or answer.client != first]

            def failing(exchange: str, answers: list[Answer], verb: str = verb) -> Iterable[Answer]:
                failure = Failure(first, "train", "no memory")
                return [failure if exchange == verb and answer.client == first else answer for answer in answers]

            self._require_failed(self.collect(without), first, f"no answer to {verb}", verb)
            outcomes = self.collect(failing)
            self._require_failed(outcomes, first, f"a failure of {verb}", verb)
            if verb in self.channel.closing:
                continue
            assert Failure(first, "train", "no memory") in outcomes, f"{self.what}: a client's own failure does not arrive unchanged"

    def check_strangers(self) -> None:
        """What nobody asked for changes nothing: answers of others, and second answers."""

        def more(exchange: str, answers: list[Answer]) -> Iterator[Answer]:
            for answer in answers:
                yield Failure("mallory", "train", "x")
                yield answer
                yield Failure(answer.client, "train", "a second answer")
                if isinstance(answer, Reply):
                    yield replace(answer, client="mallory")
                    yield answer

        expected, total = self.sum_of(self.collect()), self.sum_of(self.collect(more))
        assert same(total.totals(), expected.totals()), f"{self.what}: what nobody asked for changes the sum"

    def check_malformed(self) -> None:
        """What a client could not honestly have sent is its own failure."""
        first = next(iter(self.updates))
        for verb in (*self.channel.verbs, "train"):
            replies: list[Reply] = []

            def note(exchange: str, answers: list[Answer], verb: str = verb, replies: list[Reply] = replies) -> Iterable[Answer]:
                replies += [answer for answer in answers if isinstance(answer, Reply) and exchange == verb and answer.client == first]
                return answers

            self.collect(note)
            if not replies:
                continue  # an exchange that did not take place
            for number, (law, _) in enumerate(_malformed(replies[0])):

                def wrong(exchange: str, answers: list[Answer], verb: str = verb, number: int = number) -> Iterator[Answer]:
                    for answer in answers:
                        is_it = exchange == verb and answer.client == first and isinstance(answer, Reply)
                        yield list(_malformed(answer))[number][1] if is_it and isinstance(answer, Reply) else answer

                self._require_failed(self.collect(wrong), first, f"{verb} answered with {law}", verb)

    def check_cold(self) -> None:
        """A client whose server asks out of turn, or says what no server would, answers or refuses, and nothing else breaks."""
        client = next(iter(self.updates))
        session = _Noted(halves(self.channel, self.updates, self.leaves))
        list(self.channel.collect(session, self.errand, list(self.updates), None, self.ctx))
        requests = [asked[client] for asked in session.requests]
        for request in requests:
            self._require_answered(client, request, Scratch(vault_of(client)))
            for name in (*request.meta, "no-such-setting"):
                for value in _ODD:
                    scratch = Scratch(vault_of(client))
                    for before in requests[: requests.index(request)]:
                        self._require_answered(client, before, scratch)
                    damaged = replace(request, body=replace(request.body, meta={**request.meta, name: value}))
                    self._require_answered(client, damaged, scratch)
        try:
            self.channel.answer(client, Request.of("no-such-exchange", 1), Scratch())
        except FedfmError:
            return
        raise AssertionError(f"{self.name} answers an exchange that it does not have")

    def _require_answered(self, client: ClientId, request: Request, scratch: Scratch) -> None:
        try:
            _client_half(self.channel, client, self.updates[client], self.leaves, request, scratch)
        except FedfmError:
            return
        except Exception as error:
            raise AssertionError(f"{self.name}: {request.verb} out of turn is met with {type(error).__name__}: {error}") from error

    def _require_failed(self, outcomes: Sequence[Outcome], client: ClientId, law: str, verb: str) -> None:
        outcome = next(outcome for outcome in outcomes if client in _clients(outcome))
        if verb in self.channel.closing and isinstance(outcome, Partial):
            return  # its answer had arrived
        assert isinstance(outcome, Failure), f"{self.what}: {law} is no failure"

    def _require_close(self, total: Partial, plain: Partial) -> None:
        sums, plain_sums = total.totals(), plain.totals()
        assert list(sums) == list(plain_sums), f"{self.what}: the sum holds {list(sums)}, not {list(plain_sums)}"
        # Each client may add half a unit; a sum in float64 may round a little more.
        unit = 0.0 if self.grid == 80 else len(self.updates) * 2.0 ** -(self.grid + 1)
        for name, leaf in plain_sums.items():
            difference = float((sums[name] - leaf).abs().max())
            bound = unit * (1 + 1e-6)
            assert difference <= bound, f"{self.what}: the sum of {name!r} is off by {difference:g}, more than {bound:g}"
        assert abs(total.weight - plain.weight) <= unit, f"{self.what}: the weights add up to {total.weight}, not {plain.weight}"


def _update(client: ClientId, i: int) -> Update:
    payload = {**like(parameters(), client), "method.extra": torch.tensor([1.0, -2.5, 0.1], dtype=torch.float64) * i}
    weight = 3.0 + i
    return Update(payload, weight, client=client, metrics={"weight": weight, "loss": 0.1 - i, "tokens": 100.0 * i}, ticket=10 + i)


def _add(total: Partial, update: Update) -> None:
    total.add(update.client or "", update.payload, {"weight": update.weight, **update.metrics}, update.weight)


def _clients(outcome: Outcome) -> list[ClientId]:
    return outcome.clients if isinstance(outcome, Partial) else [outcome.client or ""]


def _crossed(message: Message) -> Message:
    return unpack(pack(message))


def _malformed(reply: Reply) -> Iterator[tuple[str, Reply]]:
    """What no honest client could have sent instead, whatever the values are."""
    yield "another verb", replace(reply, verb="evaluate")
    yield "another round", replace(reply, round=reply.round - 1)
    yield "a number that nobody asked for", replace(reply, meta={**reply.meta, "note": 1.0})
    yield "a tensor that nobody asked for", replace(reply, tensors={**reply.tensors, "note": torch.ones(1)})
    for name, value in reply.meta.items():
        others = {key: item for key, item in reply.meta.items() if key != name}
        odd: list[Scalar] = [True, 1.5, None] if isinstance(value, str) else [True, "many"]
        odd += [10**400] if type(value) is int else []
        odd += [math.inf, -math.inf, 10**400, 1e300, None] if isinstance(value, float) else []
        for other in odd:
            yield f"{other!r:.20} for {name!r}", replace(reply, meta={**others, name: other})
        if isinstance(value, float):
            yield f"no {name!r}", replace(reply, meta=others)
    for name, leaf in reply.tensors.items():
        rest = {key: item for key, item in reply.tensors.items() if key != name}
        yield f"no tensor {name!r}", replace(reply, tensors=rest)
        shapes = (leaf.unsqueeze(0), torch.cat([leaf.reshape(-1), leaf.reshape(-1)[:1]]), leaf.new_zeros(0))
        types = (leaf.bool(), leaf.to(torch.int16), leaf.half())
        for wrong in (*shapes, *types):
            yield f"{name!r} as {str(wrong.dtype)[6:]}{list(wrong.shape)}", replace(reply, tensors={**rest, name: wrong})
        if leaf.is_floating_point():
            for value in (math.nan, math.inf):
                yield f"{value} in {name!r}", replace(reply, tensors={**rest, name: torch.full_like(leaf, value)})


__all__ = ["check_channel", "halves", "vault_of"]

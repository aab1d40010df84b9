"""A round is one sentence: sample, work, encode, collect, decode, aggregate, finish, step, record.

*Work* and *encode* happen where the client is (:mod:`fedfm.verbs.train`), *collect* and *decode* in the channel; the rest is here.
Updates stream: the server holds the aggregate and one update, never a cohort (robust rules excepted).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedfm.core import leaves, messages
from fedfm.core.keys import Key
from fedfm.core.limits import Size
from fedfm.core.messages import ClientId, Failure, Reply, Request
from fedfm.core.parts import Errand, Plan, RoundContext, ServerState, Session, Spent, Update, transform_place
from fedfm.core.secret import coins
from fedfm.core.session import Answer, WrappedSession
from fedfm.core.sums import Partial
from fedfm.core.tree import Spec, Tree, norm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundRecord:
    """What a round leaves in the metrics. Only ``seconds`` depends on time.

    Args:
        cohort: Who was asked.
        failures: Who failed, where and why; one entry for each attempt.
        clients: The numbers that each client gave of its work; empty where the channel shows sums alone.
        metrics: Metrics of the round: ``train_loss`` (weighted), ``update_norm`` (of the parameters' deltas), and what observers add under ``eval``.
        bytes_up: Bytes of all replies.
        bytes_down: Bytes of all requests.
        seconds: ``train``, in which clients were waited for; ``aggregate``, all else of the round; ``evaluate``.
    """

    round: int
    cohort: tuple[ClientId, ...]
    failures: tuple[Failure, ...]
    clients: Mapping[ClientId, Mapping[str, float]]
    metrics: Mapping[str, Any]
    bytes_up: int
    bytes_down: int
    seconds: Mapping[str, float] = field(default_factory=dict)


_BOUNDS = "bounds"


def start(plan: Plan, params: Tree, sizes: Iterable[int] = ()) -> ServerState:
    """The state before the first round.

    Args:
        sizes: Numbers of training examples, of the owners who tell them.
    """
    travelling, bounds = plan.travelling(params), plan.bounding()
    parts = {"sampler": plan.sampler.init(), "server": plan.server.init(travelling), _BOUNDS: {} if bounds is None else bounds.init(sizes)}
    parts |= {transform_place(i): transform.init(travelling) for i, transform in enumerate(plan.transforms)}
    return ServerState(0, dict(params), {place: state for place, state in parts.items() if state})


WORK = ("steps", "examples", "tokens")
"""Numbers that a round tells of all clients together, where the channel shows sums alone."""


class Meter(WrappedSession):
    """A session that counts the bytes of what passes and the seconds until answers are here, and shows ``watch`` each answer."""

    def __init__(self, inner: Session, watch: Callable[[Answer], None] | None = None) -> None:
        super().__init__(inner)
        self.watch = watch
        self.bytes_up = self.bytes_down = 0
        self.waited = 0.0

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        """Counts the requests."""
        self.bytes_down += sum(messages.size(request) for request in requests.values())
        began = self.clock.now()
        self.inner.send(requests, deadline)
        self.waited += self.clock.now() - began

    def receive(self) -> Answer | None:
        """Counts the reply."""
        began = self.clock.now()
        answer = self.inner.receive()
        if isinstance(answer, Reply):
            self.bytes_up += messages.size(answer)
        if answer is not None and self.watch is not None:
            self.watch(answer)
        self.waited += self.clock.now() - began
        return answer


def play(
    plan: Plan,
    state: ServerState,
    session: Session,
    clients: Sequence[ClientId],
    key: Key,
    watch: Callable[[Answer], None] | None = None,
    spent: Spent | None = None,
) -> tuple[ServerState, RoundRecord]:
    """Plays one round.

    Args:
        clients: Everyone registered, in a fixed order.
        key: The run's root key.
        watch: Called with each answer as it arrives.
        spent: What the run has spent for good.

    Raises:
        RoundError: if fewer than ``plan.min_clients`` updates arrive, or one fails under ``on_failure: stop``.
    """
    began = session.clock.now()
    secret = coins(plan.parts().values(), key.fold("server", state.round + 1))
    ctx = RoundContext(state.round + 1, key, state.params, len(clients), spent=spent, secret=secret, rate=plan.sampler.poisson_rate())
    meter = Meter(session, watch)
    cohort, sampler = plan.sampler.sample(clients, state.of("sampler"), ctx)
    for transform in plan.transforms:
        transform.begin(ctx)
    errand, bounds = plan.work(state, cohort, ctx), plan.bounding()
    if bounds is not None:
        errand = replace(errand, limits=bounds.limits(state.of(_BOUNDS), errand.uniform))
    ctx = replace(ctx, params=errand.params, leaves=errand.leaves)
    arrivals = Arrivals(errand)
    aggregate = plan.aggregator(arrivals.of(plan.pacing.gather(plan, meter, errand, cohort, ctx)), ctx)
    aggregate, finished = finish(plan, replace(aggregate, metrics=arrivals.numbers.mean_numbers()), state, errand, ctx)
    stepped, server = plan.server.step(errand.params, aggregate, state.of("server"), ctx)
    Spec.of(errand.params).require(stepped, f"Round {ctx.round}, parameters after the server step")
    learned = {} if bounds is None else bounds.learn(state.of(_BOUNDS), arrivals.sizes())
    parts = {place: tree for place, tree in {"sampler": sampler, "server": server, _BOUNDS: learned, **finished}.items() if tree}
    after = ServerState(ctx.round, {**state.params, **stepped}, parts, {**state.counted, **arrivals.tickets})
    record = RoundRecord(
        round=ctx.round,
        cohort=tuple(cohort),
        failures=tuple(arrivals.failures),
        clients={client: arrivals.by_client[client] for client in cohort if client in arrivals.by_client},
        metrics=_metrics(plan, aggregate, errand, arrivals, cohort),
        bytes_up=meter.bytes_up,
        bytes_down=meter.bytes_down,
        seconds={"train": meter.waited, "aggregate": max(session.clock.now() - began - meter.waited, 0.0)},
    )
    return after, record


class Arrivals:
    """What is known of a round's answers, noted while they stream to the aggregator.

    Attributes:
        failures: One for each attempt that failed.
        by_client: The numbers of each client whose update counts, where the channel shows them.
        tickets: What each of these clients remembers from this round.
        numbers: The sum of all clients' numbers.
    """

    def __init__(self, errand: Errand) -> None:
        self.failures: list[Failure] = []
        self.limits = errand.limits
        self.by_client: dict[ClientId, Mapping[str, float]] = {}
        self.tickets: dict[ClientId, int] = {}
        # A number that may be withheld has no sum.
        self.numbers = Partial([leaf for leaf in leaves.numbers(errand.leaves) if not leaf.nan], errand.uniform)

    def of(self, items: Iterator[Update | Partial | Failure]) -> Iterator[Update | Partial]:
        """The updates and sums among ``items``."""
        for item in items:
            if isinstance(item, Failure):
                self.failures.append(item)
                continue
            if isinstance(item, Partial):
                self.by_client |= item.by_client
                self.tickets |= item.tickets
                self.numbers.merge(item.only_numbers())
            else:
                client = item.client or "*"
                self.by_client[client] = {"weight": item.weight, **item.metrics}
                self.tickets |= {} if item.ticket is None else {client: item.ticket}
                self.numbers.add(client, {}, {"weight": item.weight, **item.metrics}, item.weight)
            yield item

    def sizes(self) -> list[Size]:
        """The sizes of the updates that count, as far as they were judged."""
        sizes = {} if self.limits is None else self.limits.sizes
        return [sizes[client] for client in self.by_client if client in sizes]


def finish(plan: Plan, aggregate: Update, state: ServerState, errand: Errand, ctx: RoundContext) -> tuple[Update, dict[str, Tree]]:
    """The aggregate after each transform's ``finish``, right to left, and their new states by place."""
    states: dict[str, Tree] = {}
    for i, transform in reversed(list(enumerate(plan.transforms))):
        place = transform_place(i)
        aggregate, states[place] = transform.finish(aggregate, state.of(place), replace(ctx, received=errand.received.get(i, {})))
    return aggregate, states


def _metrics(plan: Plan, aggregate: Update, errand: Errand, arrivals: Arrivals, cohort: Sequence[ClientId]) -> dict[str, float]:
    # What a method adds (a control variate) is no change of the model.
    deltas = {leaf.name for leaf in errand.leaves if leaf.group == "delta"}
    update_norm = norm({name: leaf for name, leaf in aggregate.payload.items() if name in deltas})
    metrics = {"update_norm": update_norm, "num_clients": aggregate.num_clients, "weight": aggregate.weight}
    reported = [arrivals.by_client[client] for client in cohort if client in arrivals.by_client]
    losses = [(numbers["weight"], numbers["loss"]) for numbers in reported if "loss" in numbers]
    total = sum(weight for weight, _ in losses)
    if total > 0:
        metrics["train_loss"] = sum(weight * loss for weight, loss in losses) / total
    elif not reported and aggregate.num_clients and not _is_silent(plan):
        metrics |= {name: aggregate.metrics[name] for name in WORK if name in aggregate.metrics}
        if "loss" in aggregate.metrics:
            metrics["train_loss"] = aggregate.metrics["loss"]
    return metrics


def _is_silent(plan: Plan) -> bool:
    """Whether a privacy promise keeps the numbers of the work at home: their sum is then one of zeros."""
    return any("silent" in part.traits().is_ for part in (plan.local, *plan.transforms))

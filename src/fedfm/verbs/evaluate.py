"""Evaluation: each client answers with sums over its own examples, from which the task makes metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fedfm.client.house import EVALUATE_TOKENS, House
from fedfm.client.requests import counted, remembered, require_parameters, start_of, stays_home
from fedfm.client.verb import Contribution, Verb
from fedfm.core.errors import FedfmError, MessageError, PolicyError
from fedfm.core.keys import Key
from fedfm.core.leaves import Kind, Leaf
from fedfm.core.leaves import number as number_leaf
from fedfm.core.messages import Body, ClientId, Failure, Request
from fedfm.core.parts import Channel, Errand, Partial, RoundContext, ServerState, Session, Update
from fedfm.core.task import SQUARES, Examples, Task
from fedfm.core.tree import Tree
from fedfm.data import Sample, opened
from fedfm.observers import owners
from fedfm.observers.evaluate import LARGEST, VARIANCE, Evaluate, estimated, pooled_report, summary
from fedfm.verbs.train import TrainPlan

_SPLIT, _MOST = "split", "max_examples"


class EvaluationPlan(TrainPlan, Protocol):
    """A plan whose model can be evaluated."""

    @property
    def task(self) -> Task:
        """What is learned."""
        ...

    @property
    def evaluate(self) -> Evaluate:
        """When and on what."""
        ...

    @property
    def rounds(self) -> int:
        """How many rounds there are in all."""
        ...


@dataclass(frozen=True)
class Evaluation(Verb):
    """Asks clients for the sums of their metrics. Each owner is evaluated with the parameters that it keeps at home, where it keeps some."""

    name = "evaluate"

    def errand(self, plan: EvaluationPlan, state: ServerState, clients: Sequence[ClientId], classes: int, split: str = "test") -> Errand:
        """What everybody is asked after a round.

        Args:
            classes: How many there are, for classification.
        """
        most = plan.evaluate.most(state.round, plan.rounds)
        params, tuning = plan.travelling(state.params), plan.tuning
        return Errand(
            body=Body(self.name, state.round, params, {_SPLIT: split} | ({} if most is None else {_MOST: most})),
            leaves=declared(plan.task, classes, plan.channel),
            params=params,
            own={client: {**counted(state, client), **tuning.own(client)} for client in clients},
            uniform=True,
        )

    def report(
        self, plan: EvaluationPlan, state: ServerState, session: Session, clients: Sequence[ClientId], key: Key, classes: int = 2
    ) -> dict[str, Any]:
        """Asks the owners that ``plan.evaluate`` chooses, through the channel that all answers pass.

        See :func:`fedfm.observers.evaluate.summary` for what comes back.

        An answer that is not what was declared is its client's failure.
        """
        asked = plan.evaluate.chosen(clients)
        errand = self.errand(plan, state, asked, classes)
        ctx = RoundContext(state.round, key, errand.params, len(clients), leaves=errand.leaves)
        sums: dict[ClientId, Tree] = {}
        failed: dict[ClientId, str] = {}
        pooled: Partial | None = None
        for item in plan.channel.collect(session, errand, asked, plan.deadline, ctx):
            if isinstance(item, Failure):
                failed[item.client] = item.reason
            elif isinstance(item, Partial):
                pooled = item
            elif item.client is not None:
                numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in item.metrics.items()}
                sums[item.client] = {**numbers, **item.payload}
        report = summary(plan.task, {client: sums[client] for client in asked if client in sums})
        if pooled is not None:
            totals = pooled.totals()
            report |= pooled_report(plan.task, {name: value for name, value in totals.items() if not name.startswith(owners.PREFIX)})
            report |= owners.report(plan.task.metric, totals)
        return report | ({"failed": failed} if failed else {})

    def answer(self, requests: Mapping[ClientId, Request], house: House) -> Iterator[Contribution | Failure]:
        """The sums of each client's examples."""
        require_parameters(next(iter(requests.values())).body, house)
        leaves, metric = declared(house.plan.task, max(len(house.labels), 2), house.plan.channel), house.plan.task.metric
        starts: dict[ClientId, Tree] = {}
        sets: dict[ClientId, Examples] = {}
        sizes: dict[ClientId, int] = {}
        is_shared, is_personal = True, stays_home(house)
        for client, request in requests.items():
            try:
                # A memory that nothing here depends on is not read.
                memory = remembered(client, request, house) if is_personal else {}
                _, starts[client], is_own = start_of(request.tensors, request.own, memory, house)
                examples = opened(_examples(request, house, client))
                sets[client], sizes[client] = _sampled(request, examples), len(examples)
                is_shared = is_shared and not is_own
            except FedfmError as error:
                starts.pop(client, None)
                yield Failure(client, self.name, str(error))
        if not sets:
            return
        theta_kd = torch.stack([house.tuned.spec.flatten(start) for start in list(starts.values())[: 1 if is_shared else None]])
        sums = house.bank.evaluate(theta_kd, list(sets.values()))
        for row, (client, sample) in enumerate(sets.items()):
            measured = {name: value[row].cpu().clone() for name, value in sums.items()}
            totals = estimated(house.plan.task, measured, len(sample), sizes[client])
            if _shows_sums(house.plan.channel):
                value = house.plan.task.summarise(totals).get(metric.name) if float(totals.get("targets", torch.ones(()))) else None
                totals = {**totals, **owners.told(metric, value, _first(requests[client], house, client, value))}
            numbers = {name: float(value) for name, value in totals.items() if value.dim() == 0}
            # A model that diverged has no loss; NaN says so.
            numbers = {name: value if math.isfinite(value) else math.nan for name, value in numbers.items()}
            yield Contribution(Update({name: totals[name] for name in totals if name not in numbers}, 1.0, 1, client, numbers), leaves)

    def tells(self, request: Request, house: House) -> Mapping[Kind, str]:
        """Its sums hold the number of test targets, and under a classifier hits and misses of each class."""
        leaves = declared(house.plan.task, max(len(house.labels), 2), house.plan.channel)
        why = "an evaluation is the sums of the task's metrics"
        return {kind: why for leaf in leaves for kind in leaf.tells}

    def shrink(self, house: House) -> bool:
        """Halves the tokens of a batch, which bound an evaluation's memory whoever shares it."""
        if house.bank.max_tokens <= 256:
            return False
        house.bank.max_tokens //= 2
        house.choices[EVALUATE_TOKENS] = house.bank.max_tokens
        return True


def declared(task: Task, classes: int, channel: Channel) -> tuple[Leaf, ...]:
    """A sum for each of the task's statistics, and the variance of a sample's; and counts of owners, where the channel shows sums alone.

    A model may give a loss that is NaN, and a variance may be unknown; a count is a count, and not negative.
    """
    stats = task.no_stats(1, classes)
    leaves = tuple(
        Leaf(
            name=name,
            shape=tuple(value.shape[1:]),
            dtype=value.dtype,
            group="told",
            bound=LARGEST,
            reduce="sum",
            signed=name == "loss",
            nan=name == "loss",
            kinds=_kinds(name, value.dim() > 1),
        )
        for name, value in stats.items()
        if name not in SQUARES
    )
    if set(SQUARES) <= set(stats):
        leaves = (*leaves, number_leaf(VARIANCE, bound=LARGEST, nan=True, kinds=("evaluation",)))
    return (*leaves, *owners.leaves()) if _shows_sums(channel) else leaves


def _shows_sums(channel: Channel) -> bool:
    return "single-updates" in channel.traits().hides


def _first(request: Request, house: House, client: ClientId, value: float | None) -> float | None:
    """The client's score before training on the same examples; kept where this is it."""
    what = f"{request.meta.get(_SPLIT, 'test')}/{request.meta.get(_MOST)}"
    if request.round == 0:
        house.firsts.set(client, what, value)
        return None
    return house.firsts.get(client, what)


def _kinds(name: str, by_class: bool) -> tuple[Kind, ...]:
    """What a statistic tells of the owner's test rows."""
    if name == "loss":
        return ("evaluation",)
    return ("evaluation", "counts", "labels") if by_class else ("evaluation", "counts")


def _examples(request: Request, house: House, client: ClientId) -> Examples:
    split = request.meta.get(_SPLIT, "test")
    if split not in ("train", "test"):
        raise MessageError(f"a request names the split {split!r:.20}; it is train or test.")
    if split == "train" and house.plan.is_silent:
        raise PolicyError("private", "an evaluation on training rows is not covered by the plan's privacy promise.")
    shard = house.shard(client)
    examples: Examples = shard.train if split == "train" else shard.test
    return examples


def _sampled(request: Request, examples: Examples) -> Examples:
    most = request.meta.get(_MOST)
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise MessageError(f"a request's {_MOST} is {most!r:.20}, not a count of 1 or more.")
    return examples if most is None else Sample(examples, most)

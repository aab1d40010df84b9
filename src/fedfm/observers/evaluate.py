"""Evaluation: per owner and pooled, with the worst owner and the spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.messages import ClientId
from fedfm.core.parts import Finding, Part, Plan, warn
from fedfm.core.task import SQUARES, Task
from fedfm.core.tree import Tree

VARIANCE = "variance"
LARGEST = 2.0**37
"""No sum of an evaluation is larger in magnitude."""


@dataclass(frozen=True)
class Evaluate(Part):
    """When and on what the global model is evaluated. Owners answer with sums, so that pooled means the mean over all targets.

    Before training and after the last round all test data is used; in the rounds between a sample, the same one each time. A sample's sums
    are scaled to the size of its owner's test set, so that pooled estimates the same number, and its standard error is told.
    ``max_examples: null`` evaluates on all test data every time.

    Args:
        every: Rounds between evaluations; the last round is always one. 0 never evaluates.
        max_examples: Of each owner in the rounds between, evenly spread over its test set; ``None`` takes all.
        ends: Of each owner before training and after the last round; ``None`` takes all.
        owners: How many owners are evaluated, evenly spread over all and the same ones each time; ``None`` takes all. What is pooled is theirs alone.
        patience: Evaluations without a better headline after which the run ends early; ``None`` plays all rounds. Scores are compared on the
            same sample in every round. It chooses by test data, so the score of the round that is chosen is optimistic.
        min_delta: By how much, in the headline's own unit (0.01 of an accuracy is one point), a score must be better to count.

    Raises:
        ConfigError: if a number is out of range.
    """

    room = "observers"

    every: int = 1
    max_examples: int | None = 24
    ends: int | None = None
    owners: int | None = None
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"Evaluate.every is {self.every}; it must be 0 (never) or more.")
        for name in ("max_examples", "ends", "owners"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"Evaluate.{name} is {value}; it must be 1 or more, or null for all.")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"Evaluate.patience is {self.patience}; it must be 1 or more evaluations, or null to play all rounds.")
        if self.patience is not None and self.every == 0:
            raise ConfigError("Evaluate.patience needs evaluations, but every is 0, which never evaluates. Set every to 1 or more.")
        if not (self.min_delta >= 0 and math.isfinite(self.min_delta)):
            raise ConfigError(f"Evaluate.min_delta is {self.min_delta}; it must be a finite number from 0 up.")

    def check(self, plan: Plan) -> Iterator[Finding]:
        """An evaluation tells of each owner's test rows, which no privacy promise covers."""
        private = [type(part).__name__ for part in plan.parts().values() if "private" in part.traits().is_]
        if private and self.every:
            who = "sums over owners" if "single-updates" in plan.channel.traits().hides else "owners"
            yield warn(
                "evaluate",
                f"{who} tell the loss and the number of their test rows, which {private[0]} does not cover. Those rows are not trained on. "
                "Set evaluate: {every: 0} where nothing of them may be known.",
            )

    def chosen(self, clients: Sequence[ClientId]) -> Sequence[ClientId]:
        """The owners that are evaluated, of all in their fixed order."""
        if self.owners is None or self.owners >= len(clients):
            return clients
        return [clients[i * len(clients) // self.owners] for i in range(self.owners)]

    def due(self, round: int, last: int) -> bool:
        """Whether round ``round`` of ``last`` is evaluated."""
        return self.every > 0 and (round % self.every == 0 or round == last)

    def most(self, round: int, last: int) -> int | None:
        """Test examples of each owner at round ``round`` of ``last``; ``None`` for all."""
        return self.ends if round in (0, last) else self.max_examples

    def takes_the_sample(self, sizes: Sequence[int | None]) -> bool:
        """Whether the evaluations of the first and the last round are on the same examples as those between.

        Args:
            sizes: Test examples of each owner; ``None`` where one does not tell.
        """
        if self.ends == self.max_examples:
            return True
        bounds = [bound for bound in (self.ends, self.max_examples) if bound is not None]
        return bool(sizes) and all(size is not None and size <= min(bounds) for size in sizes)


def estimated(task: Task, sums: Tree, num_examples: int, num_all: int) -> Tree:
    """Sums over a whole test set, estimated from those over a sample of it: scaled by ``num_all / num_examples``, with the ``variance`` of that.

    ``variance = s^2 (1 - n/N) n/(n-1) sum_i (y_i - R x_i)^2 / max_length^2`` with ``s = N/n`` and ``R = sum y / sum x``: of the headline's
    numerator, over independent rows. It is 0 where the sample is all there is, and NaN where it is not known. Variances of owners add up.
    """
    numbers = {name: value for name, value in sums.items() if name not in SQUARES}
    if not set(SQUARES) <= set(sums):
        return numbers if num_examples == num_all else {name: value * (num_all / num_examples) for name, value in numbers.items()}
    if num_examples == num_all:
        return {**numbers, VARIANCE: torch.zeros((), dtype=torch.float64)}
    scale, squares = num_all / num_examples, _squares(task, sums, num_examples)
    correction = (1 - num_examples / num_all) * num_examples / (num_examples - 1) if num_examples > 1 else math.nan
    variance = scale * scale * correction * squares / task.max_length**2
    # What is too large to be declared is not known.
    variance = variance if variance <= LARGEST else math.nan
    return {**{name: value * scale for name, value in numbers.items()}, VARIANCE: torch.tensor(variance, dtype=torch.float64)}


def standard_error(task: Task, sums: Tree, num_examples: int) -> float | None:
    """Standard error of the headline over all data like these examples: ``sqrt(n/(n-1) sum_i (y_i - R x_i)^2) / sum x``.

    Rows are taken as independent. ``None`` where it is not known: one example, or a headline that is neither loss nor accuracy.
    """
    if num_examples < 2 or not set(SQUARES) <= set(sums) or not float(sums["targets"]):
        return None
    error = math.sqrt(num_examples / (num_examples - 1) * _squares(task, sums, num_examples)) / float(sums["targets"])
    return error if math.isfinite(error) else None


def _squares(task: Task, sums: Tree, num_examples: int) -> float:
    """``sum_i (y_i - R x_i)^2`` of the headline's numerator over examples; NaN where it is not known."""
    targets = float(sums["targets"])
    if task.headline == "loss" and targets:
        yy, xy, xx = (float(sums[name]) for name in SQUARES)
        ratio = float(sums["loss"]) / targets
        return max(yy - 2 * ratio * xy + ratio * ratio * xx, 0.0)
    if task.headline == "accuracy" and targets == num_examples:
        hits = float(sums["hits"])
        return hits * (1 - hits / targets)
    return math.nan


def pooled_report(task: Task, sums: Tree) -> dict[str, Any]:
    """``pooled`` metrics; and ``error``, the standard error of the headline, where they come from a sample."""
    error = math.nan
    if VARIANCE in sums and float(sums["targets"]) > 0:
        error = math.sqrt(float(sums[VARIANCE])) * task.max_length / float(sums["targets"])
    return {"pooled": task.summarise(sums)} | ({"error": error} if error > 0 and math.isfinite(error) else {})


def summary(task: Task, sums: Mapping[ClientId, Tree]) -> dict[str, Any]:
    """``pooled`` and per-owner metrics, and of the owners' headline metric the mean, the worst and the spread (standard deviation).

    Owners without test examples are not among ``owners``; one on whose examples the model gives NaN is, and makes ``pooled`` NaN too.
    """
    metric = task.metric
    owners = {client: task.summarise(own) for client, own in sums.items()}
    owners = {
        client: metrics
        for client, metrics in owners.items()
        if not math.isnan(metrics["loss"]) or float(sums[client].get("targets", torch.zeros(())))
    }
    if not owners:
        return {"pooled": {}, "owners": {}, "headline": metric.to_json()}
    pooled: dict[str, torch.Tensor] = {}
    for client in owners:
        for name, value in sums[client].items():
            pooled[name] = pooled[name] + value if name in pooled else value.clone()
    values = {client: metrics[metric.name] for client, metrics in owners.items()}
    worst = max(values, key=lambda client: (math.isnan(values[client]), metric.cost(values[client])))
    return {
        **pooled_report(task, pooled),
        "owners": owners,
        "headline": metric.to_json(),
        "mean": statistics.fmean(values.values()),
        "worst": {"owner": worst, metric.name: values[worst]},
        "spread": statistics.pstdev(values.values()) if all(map(math.isfinite, values.values())) else math.nan,
    }

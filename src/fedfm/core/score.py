"""How good a run's model was after each round, by the metric that leads: which round was best, and how long none was better.

Scores of all rounds are made on the same test examples, so that they can be compared: a round's score is the evaluation on the bounded sample,
before training and after the last round too, where the evaluation itself is on more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedfm.core.words import Metric, number

SCORE, EARLY = "score", "ended_early"
"""Names among a record's metrics: the headline on the sample, and why the run ended before its last round."""


@dataclass(frozen=True, slots=True)
class Score:
    """A round's score.

    Args:
        cost: The headline with its sign turned where higher is better: the lower the better. ``None`` where the round was not evaluated, or has no
            finite value.
        evaluated: Whether the round was evaluated.
        early: Where the run ended early after this round: the ``rounds``, ``patience`` and ``min_delta`` that it had.
    """

    round: int
    cost: float | None = None
    evaluated: bool = False
    early: Mapping[str, Any] | None = None

    @staticmethod
    def of(round: int, metrics: Mapping[str, Any]) -> Score:
        """The score among a record's metrics."""
        report, value = metrics.get("eval"), number(metrics.get(SCORE))
        metric = Metric.from_json(report.get("headline") if isinstance(report, Mapping) else None)
        early = metrics.get(EARLY)
        cost = None if value is None else metric.cost(value)
        return Score(round, cost, SCORE in metrics, early if isinstance(early, Mapping) else None)


def best(scores: Iterable[Score]) -> int | None:
    """The round with the best score, the first of equals; ``None`` where no round has one.

    Example:
        >>> best([Score(0, 3.0), Score(1, 2.0), Score(2, 2.0), Score(3)])
        1
    """
    first = min(((score.cost, score.round) for score in scores if score.cost is not None), default=None)
    return None if first is None else first[1]


def waited(scores: Sequence[Score], patience: int, min_delta: float) -> int:
    """Evaluations since the last that was better by more than ``min_delta``.

    Where the run went on after it had ended early with the same patience, because more rounds were asked for, it counts from there.

    Example:
        >>> waited([Score(0, 3.0, True), Score(1, 2.0, True), Score(2, 2.5, True), Score(3), Score(4, 2.0, True)], 5, 0.0)
        2
    """
    lowest: float | None = None
    count = 0
    for score in scores:
        if score.cost is not None and (lowest is None or score.cost < lowest - min_delta):
            lowest, count = score.cost, 0
        elif score.evaluated:
            count += 1
        if score.early is not None and (score.early.get("patience"), score.early.get("min_delta")) == (patience, min_delta):
            count = 0
    return count


def has_ended_early(scores: Sequence[Score], rounds: int, patience: int | None, min_delta: float) -> bool:
    """Whether the run has ended early and is not asked to go on: with no more rounds, patience or sensitivity than it had."""
    early = scores[-1].early if scores else None
    if early is None or patience is None:
        return False
    return bool(rounds <= early["rounds"] and patience <= early["patience"] and min_delta >= early["min_delta"])

"""What is told of owners where the channel shows sums alone: counts of owners, in the place of each one's score.

Each owner adds one to a count, its headline metric to a sum and a sum of squares, one to the bin of a histogram that its metric lies in, and one to the owners who gain if its
metric is better than before training. Mean and spread follow exactly; the worst tenth to within a bin: a fortieth of a share, a quarter of a loss.

Covered here: which owner has which score. Not covered: a histogram of few owners shows their scores without their names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import torch

from fedfm.core.leaves import Leaf, number
from fedfm.core.tree import Tree
from fedfm.core.words import SHARES, Metric

PREFIX = "owners."
BINS = 40
MISSING = "Each owner's own numbers stay at home, because the channel shows sums alone; these are sums and counts over all owners."
_LARGEST = 2.0**15
_COUNT, _SUM, _SQUARES, _BINS, _COMPARED, _GAINED = (
    f"{PREFIX}{name}" for name in ("count", "sum", "squares", "bins", "compared", "gained")
)


def leaves() -> tuple[Leaf, ...]:
    """What an owner adds to the sums of an evaluation."""
    counts = tuple(number(name, bound=1.0, kinds=("evaluation",)) for name in (_COUNT, _COMPARED, _GAINED))
    sums = number(_SUM, bound=_LARGEST, signed=True, kinds=("evaluation",)), number(_SQUARES, bound=_LARGEST**2, kinds=("evaluation",))
    return (*counts, *sums, Leaf(_BINS, (BINS,), torch.float64, "told", 1.0, "sum", signed=False, kinds=("evaluation",)))


def told(metric: Metric, value: float | None, first: float | None) -> dict[str, torch.Tensor]:
    """What one owner adds.

    Args:
        value: Its headline metric; ``None`` where it has no test data.
        first: The same before training, where it knows it.
    """
    known = value is not None and math.isfinite(value) and abs(value) <= _LARGEST
    x = float(value) if known and value is not None else 0.0
    bins = torch.zeros(BINS, dtype=torch.float64)
    if known:
        bins[_bin(metric, x)] = 1.0
    compared = known and first is not None
    numbers = {_COUNT: known, _SUM: x, _SQUARES: x * x, _COMPARED: compared, _GAINED: compared and metric.is_better(x, first)}
    return {**{name: torch.tensor(float(item), dtype=torch.float64) for name, item in numbers.items()}, _BINS: bins}


def report(metric: Metric, sums: Tree) -> dict[str, Any]:
    """Mean and spread of the owners' headline, and under ``sums`` how many there are, how many gain, and what nine of ten reach."""
    count, total, squares, compared, gained = (float(sums[name]) for name in (_COUNT, _SUM, _SQUARES, _COMPARED, _GAINED))
    if not count:
        return {}
    mean = total / count
    counts = {"owners": round(count), "compared": round(compared), "gained": round(gained), "most_reach": _most_reach(metric, sums[_BINS])}
    return {"mean": mean, "spread": math.sqrt(max(squares / count - mean * mean, 0.0)), "sums": counts, "missing": MISSING}


def edges(metric: Metric) -> list[float]:
    """The lower edges of the bins but the first: of 2.5 points for a share, growing by a quarter for all else."""
    return [i / BINS for i in range(1, BINS)] if metric.name in SHARES else [0.05 * 1.25**i for i in range(BINS - 1)]


def _bin(metric: Metric, value: float) -> int:
    return bisect_right(edges(metric), value)


def _most_reach(metric: Metric, bins: torch.Tensor) -> float | None:
    """The worse end of the bin that nine tenths of the owners are in or better than."""
    counts, ends = bins.tolist(), edges(metric)
    order = range(BINS) if metric.lower_is_better else range(BINS - 1, -1, -1)
    needed, seen = 0.9 * sum(counts), 0.0
    for i in order:
        seen += counts[i]
        if counts[i] and seen >= needed - 1e-9:
            return (ends[i] if i < len(ends) else None) if metric.lower_is_better else (ends[i - 1] if i else 0.0)
    return None

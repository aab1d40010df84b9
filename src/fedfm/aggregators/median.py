"""Coordinate-wise median.

Yin, Chen, Ramchandran, Bartlett, `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
<https://arxiv.org/abs/1803.01498>`_, 2018.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedfm.aggregators.trimmed_mean import TrimmedMean, singles
from fedfm.core.parts import Aggregator, Partial, RoundContext, Traits, Update, traits


@dataclass(frozen=True)
class CoordinateMedian(Aggregator):
    """The median of each coordinate; the mean of the middle two where their number is even.

    Ignores weights. Stays among honest values while fewer than half of the clients lie. Of one or two updates it is the mean.
    """

    concerns = ("robustness",)

    def traits(self) -> Traits:
        """Compares clients value by value, and is no weighted sum of them."""
        return traits(needs=["single-updates", "every-value"], hides=["weighted-sum"])

    def uniform(self) -> bool:
        """Weights are ignored."""
        return True

    def __call__(self, updates: Iterable[Update | Partial], ctx: RoundContext) -> Update:
        """The trimmed mean that keeps one or two values."""
        us = singles(updates)
        return TrimmedMean(trim=max(0, len(us) - 1) // 2)(us, ctx)

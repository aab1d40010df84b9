"""Coordinate-wise trimmed mean.

Yin, Chen, Ramchandran, Bartlett, `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
<https://arxiv.org/abs/1803.01498>`_, 2018.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fedfm.aggregators.mean import Mean
from fedfm.core.errors import ConfigError
from fedfm.core.parts import Aggregator, Partial, RoundContext, Traits, Update, traits


@dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """Drops the ``trim`` smallest and largest values of each coordinate, then averages in float64.

    Ignores weights. With ``trim=0`` it is ``Mean(weights="uniform")``.

    Args:
        trim: Clients dropped at each end; tolerates at most ``trim`` liars.

    Raises:
        ConfigError: if ``trim`` is negative, or fewer than ``2 * trim + 1`` updates arrive.
    """

    concerns = ("robustness",)

    trim: int

    def __post_init__(self) -> None:
        if self.trim < 0:
            raise ConfigError(f"TrimmedMean.trim is {self.trim}; it must be 0 or more.")

    def traits(self) -> Traits:
        """Compares clients value by value, and is no weighted sum of them."""
        return traits(needs=["single-updates", "every-value"], hides=["weighted-sum"])

    def min_updates(self) -> int:
        """One more than the rule drops."""
        return 2 * self.trim + 1

    def uniform(self) -> bool:
        """Weights are ignored."""
        return True

    def __call__(self, updates: Iterable[Update | Partial], ctx: RoundContext) -> Update:
        """The trimmed mean of each coordinate."""
        us = singles(updates)
        n = len(us)
        if n < self.min_updates() and (us or self.trim):
            raise ConfigError(f"TrimmedMean(trim={self.trim}) needs at least {self.min_updates()} updates, got {n} in round {ctx.round}.")
        if not us:
            return Mean()(us, ctx)
        payload = {}
        for name in us[0].payload:
            x_nd = torch.stack([u.payload[name] for u in us]).sort(dim=0).values
            payload[name] = x_nd[self.trim : n - self.trim].mean(dim=0, dtype=torch.float64).float()
        return Update(payload, weight=float(n), num_clients=n)


def singles(updates: Iterable[Update | Partial]) -> list[Update]:
    """Each client's update by itself, as a rule that compares clients needs them."""
    items = list(updates)
    assert not any(isinstance(item, Partial) for item in items), "the plan check refuses sums before a rule that compares clients"
    return [item for item in items if isinstance(item, Update)]

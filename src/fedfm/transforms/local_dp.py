"""Local differential privacy of counts: what an owner tells of its data has noise before it leaves.

Ghosh, Roughgarden, Sundararajan, `Universally Utility-Maximizing Privacy Mechanisms <https://arxiv.org/abs/0811.2841>`_, 2009: a count plus a
two-sided geometric number, ``P(k) ~ exp(-epsilon |k| / s)``, where ``s`` is by how much one row changes it.

Covered here: one row of the training data, in the answer to ``describe`` (examples, tokens, labels). The numbers of an owner's work do not leave at all. Not
covered: updates and evaluations; how a row decides which others are held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedfm.core.errors import ConfigError
from fedfm.core.parts import Plan, Traits, Transform, traits
from fedfm.core.privacy import Guarantee, Release
from fedfm.core.secret import Stream


@dataclass(frozen=True)
class LocalDP(Transform):
    """Adds noise at home to the counts that an owner tells: examples, tokens, and examples of each class. Updates pass whole.

    An owner tells them once in a run; asked again it tells nothing, because noise that is drawn twice can be averaged away. The numbers of its work stay at
    home, so every owner must count alike (``Mean: {weights: uniform}``).

    Args:
        epsilon: Of all counts of an owner together; a third is for examples, for tokens and for classes.
        simulated: Whether the noise comes from the run's key: a run that can be repeated, and that protects nobody.

    Raises:
        ConfigError: if ``epsilon`` is not a finite number above 0.
    """

    concerns = ("privacy",)
    covers = frozenset()

    epsilon: float
    simulated: bool = False

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ConfigError(f"LocalDP.epsilon is {self.epsilon}; it must be a finite number above 0.")

    def traits(self) -> Traits:
        """The numbers of a client's work stay at home, and exact counts do not exist for anybody else."""
        return traits(
            hides=["counts", "labels", "losses"], is_=["linear", "silent", "noisy-counts", *(["simulated"] if self.simulated else [])]
        )

    def guarantee(self, plan: Plan, num_clients: int | None = None, spent: Sequence[Release] | None = None) -> Guarantee:
        """Of the counts alone."""
        return Guarantee(
            epsilon=self.epsilon,
            delta=0.0,
            unit="one row of an owner's training data, in the counts that it tells",
            adjacency="a row added or removed",
            sampling="all rows are counted, once in a run",
            noise_by="each owner adds geometric noise to its counts, at home",
            accountant="the sum of the counts' own epsilons",
            simulated=self.simulated,
            assumes=("updates and evaluations are not covered by this part",),
        )

    def told_counts(self, counts: Sequence[float], sensitivity: float, stream: Stream) -> list[float]:
        """Counts with their third of epsilon; none is negative.

        Args:
            sensitivity: By how much one row changes them, all together.
        """
        noise = geometric(self.epsilon / (3 * sensitivity), len(counts), stream)
        return [max(0.0, float(count) + float(more)) for count, more in zip(counts, noise, strict=True)]


def geometric(rate: float, size: int, stream: Stream) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Integers with ``P(k) ~ exp(-rate |k|)``: the difference of two geometric numbers."""
    u_2n = stream.uniform(2 * size).reshape(2, -1)
    first, second = np.floor(np.log(u_2n) / -rate)
    difference: np.ndarray[tuple[int], np.dtype[np.float64]] = first - second
    return difference

"""Everyone, in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedfm.core.parts import ClientId, RoundContext, Sampler


@dataclass(frozen=True)
class All(Sampler):
    """Everyone, in every round.

    Example:
        >>> All().cohort_size(7)
        7
    """

    def sample(self, clients: Sequence[ClientId], ctx: RoundContext) -> list[ClientId]:
        """Everyone."""
        return list(clients)

    def cohort_size(self, num_clients: int) -> int:
        """Everyone."""
        return num_clients

"""Everyone, in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedfm.core.parts import ClientId, RoundContext, Sampler, Tree


@dataclass(frozen=True)
class All(Sampler):
    """Everyone, in every round.

    Example:
        >>> All().cohort_size(7)
        7
    """

    def sample(self, clients: Sequence[ClientId], state: Tree, ctx: RoundContext) -> tuple[list[ClientId], Tree]:
        """All clients."""
        return list(clients), state

    def poisson_rate(self) -> float:
        """1: who is there does not depend on who else is."""
        return 1.0

    def cohort_size(self, num_clients: int) -> int:
        """``num_clients``."""
        return num_clients

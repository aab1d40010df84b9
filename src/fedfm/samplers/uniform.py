"""A fixed number of clients, each set of that size equally likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedfm.core.errors import ConfigError
from fedfm.core.parts import ClientId, RoundContext, Sampler, Tree


@dataclass(frozen=True)
class Uniform(Sampler):
    """A fixed number of clients without replacement, each set of that size equally likely. With ``fraction=1`` it is ``All``.

    Args:
        clients: Size of a cohort; exactly one of ``clients`` and ``fraction`` is given.
        fraction: Part of all clients, in ``(0, 1]``, rounded, at least one client.

    Raises:
        ConfigError: if neither or both are given, or one is out of range.

    Example:
        >>> Uniform(fraction=0.1).cohort_size(200)
        20
    """

    clients: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if (self.clients is None) == (self.fraction is None):
            raise ConfigError(f"Uniform has clients={self.clients} and fraction={self.fraction}; give exactly one of the two.")
        if self.clients is not None and self.clients < 1:
            raise ConfigError(f"Uniform.clients is {self.clients}; a cohort has at least 1 client.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"Uniform.fraction is {self.fraction}; it must be more than 0 and at most 1.")

    def sample(self, clients: Sequence[ClientId], state: Tree, ctx: RoundContext) -> tuple[list[ClientId], Tree]:
        """The clients with the smallest draws.

        Raises:
            ConfigError: if there are fewer clients than the cohort needs.
        """
        size = self.cohort_size(len(clients))
        if size > len(clients):
            raise ConfigError(f"Uniform(clients={size}) was asked to sample from {len(clients)} clients. Lower it, or register more.")
        key = ctx.draw("sampler")
        # Each client's draw is its own: who is chosen does not depend on the order of the list.
        chosen = set(sorted(clients, key=lambda client: (key.fold(client).uniform(), client))[:size])
        return [client for client in clients if client in chosen], state

    def cohort_size(self, num_clients: int) -> int:
        """``clients``, or the rounded ``fraction`` of all."""
        if self.fraction is None:
            assert self.clients is not None
            return self.clients
        return max(1, round(self.fraction * num_clients)) if num_clients else 0

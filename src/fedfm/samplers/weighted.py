"""A fixed number of clients, drawn one after another with probability proportional to their weights.

Efraimidis, Spirakis, `Weighted random sampling with a reservoir <https://doi.org/10.1016/j.ipl.2005.11.003>`_, 2006: let each
client wait ``-log(u) / weight`` and take those that come first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedfm.core.errors import ConfigError
from fedfm.core.parts import ClientId, RoundContext, Sampler, Tree
from fedfm.core.registry import suggest


@dataclass(frozen=True)
class Weighted(Sampler):
    """A fixed number of clients without replacement, each draw proportional to the weights that are left. With equal weights it is ``Uniform``.

    Args:
        clients: Size of a cohort.
        weights: Weight of a client, more than 0; one that is not named has 1.

    Raises:
        ConfigError: if ``clients`` or a weight is out of range.
    """

    clients: int
    weights: Mapping[ClientId, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ConfigError(f"Weighted.clients is {self.clients}; a cohort has at least 1 client.")
        for client, weight in self.weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"Weighted.weights gives {client!r} the weight {weight}; it must be a finite number above 0.")

    def sample(self, clients: Sequence[ClientId], state: Tree, ctx: RoundContext) -> tuple[list[ClientId], Tree]:
        """The clients that wait the shortest time.

        Raises:
            ConfigError: if there are fewer clients than the cohort needs, or a weight names nobody.
        """
        if self.clients > len(clients):
            raise ConfigError(
                f"Weighted(clients={self.clients}) was asked to sample from {len(clients)} clients. Lower it, or register more."
            )
        for name in sorted(self.weights.keys() - set(clients)):
            raise ConfigError(
                f"Weighted.weights names {name!r}, who takes no part in this run.{suggest(name, clients)} Take the name out of the weights."
            )
        key = ctx.draw("sampler")

        def wait(client: ClientId) -> tuple[float, ClientId]:
            return -math.log1p(-key.fold(client).uniform()) / self.weights.get(client, 1.0), client

        chosen = set(sorted(clients, key=wait)[: self.clients])
        return [client for client in clients if client in chosen], state

    def cohort_size(self, num_clients: int) -> int:
        """``clients``."""
        return self.clients

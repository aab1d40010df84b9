"""Poisson sampling: each client on its own, as amplification of differential privacy by sampling assumes.

Mironov, Talwar, Zhang, `Renyi Differential Privacy of the Sampled Gaussian Mechanism <https://arxiv.org/abs/1908.10530>`_, 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedfm.core.errors import ConfigError
from fedfm.core.parts import ClientId, RoundContext, Sampler, Traits, Tree, traits


@dataclass(frozen=True)
class Poisson(Sampler):
    """Each client joins with probability ``rate``, independently of all others. With ``rate=1`` it is ``All``.

    A cohort may be empty; such a round changes nothing but the server optimizer's momentum.

    Args:
        rate: Probability in ``(0, 1]``.

    Raises:
        ConfigError: if ``rate`` is out of range.
    """

    concerns = ("privacy",)

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"Poisson.rate is {self.rate}; it must be more than 0 and at most 1.")

    def traits(self) -> Traits:
        """A cohort may be of any size."""
        return traits(is_=["random-cohorts"])

    def sample(self, clients: Sequence[ClientId], state: Tree, ctx: RoundContext) -> tuple[list[ClientId], Tree]:
        """The clients whose draw is below ``rate``. Under a privacy promise the draws are the house's own coins."""
        if ctx.secret is not None:
            u_n = ctx.secret.stream("sampler").uniform(len(clients))
            return [client for client, u in zip(clients, u_n.tolist(), strict=True) if u < self.rate], state
        key = ctx.draw("sampler")
        return [client for client in clients if key.fold(client).uniform() < self.rate], state

    def poisson_rate(self) -> float:
        """``rate``."""
        return self.rate

    def cohort_size(self, num_clients: int) -> int:
        """The expected size, rounded, at least one."""
        return min(num_clients, max(1, round(self.rate * num_clients)))

"""Federated averaging's global step.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, `Communication-Efficient Learning of Deep Networks from Decentralized Data
<https://arxiv.org/abs/1602.05629>`_, 2016.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedfm.core.errors import ConfigError
from fedfm.core.parts import RoundContext, ServerOptimizer, Traits, Tree, Update, traits


@dataclass(frozen=True)
class FedAvg(ServerOptimizer):
    """``w += lr * delta``. With ``lr=1`` the new parameters are the mean of the clients' parameters.

    Args:
        lr: Server learning rate.

    Raises:
        ConfigError: if ``lr`` is not a finite number above 0.
    """

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"FedAvg.lr is {self.lr}; it must be a finite number above 0.")

    def traits(self) -> Traits:
        """Needs a delta of each parameter. With ``lr=1`` it is the ``plain-step``."""
        return traits(needs=["deltas"], is_=["plain-step"] if self.lr == 1 else [])

    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """One step along the delta."""
        # In place: two tensors for each leaf, one of them let go, would leave the memory of a large model full of holes.
        return {name: (self.lr * update.payload[name]).add_(w).to(w.dtype) for name, w in params.items()}, state

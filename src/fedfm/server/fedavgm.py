"""Momentum on the server.

Hsu, Qi, Brown, `Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification
<https://arxiv.org/abs/1909.06335>`_, 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.parts import RoundContext, ServerOptimizer, Traits, Tree, Update, traits


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """``m = momentum * m + delta;  w += lr * m``. With ``momentum=0`` it is ``FedAvg``.

    Args:
        lr: Server learning rate.
        momentum: In ``[0, 1)``.

    Raises:
        ConfigError: if one is out of range.
    """

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"FedAvgM.lr is {self.lr}; it must be a finite number above 0.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"FedAvgM.momentum is {self.momentum}; it must be at least 0 and less than 1.")

    def traits(self) -> Traits:
        """Needs a delta of each parameter."""
        return traits(needs=["deltas"])

    def init(self, params: Tree) -> Tree:
        """``m = 0``."""
        return {f"m/{name}": torch.zeros_like(w, dtype=torch.float32) for name, w in params.items()}

    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """One step along the momentum."""
        m = {f"m/{name}": self.momentum * state[f"m/{name}"] + update.payload[name] for name in params}
        return {name: (w + self.lr * m[f"m/{name}"]).to(w.dtype) for name, w in params.items()}, m

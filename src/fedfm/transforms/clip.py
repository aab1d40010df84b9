"""Clipping to a norm.

McMahan, Ramage, Talwar, Zhang, `Learning Differentially Private Recurrent Language Models <https://arxiv.org/abs/1710.06963>`_, 2017.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedfm.core import tree
from fedfm.core.errors import ConfigError
from fedfm.core.parts import RoundContext, Traits, Transform, Tree, Update, traits


@dataclass(frozen=True)
class ClipByNorm(Transform):
    """``x * min(1, max_norm / ||x||)`` over all deltas together. With a bound above every norm it changes nothing.

    The bound holds after rounding too, so clipping twice is clipping once, bit for bit. It is no privacy guarantee: there is no noise,
    and a client that lies is not clipped. Leaves that a method adds (SCAFFOLD's control variates) pass whole.

    Args:
        max_norm: Largest Euclidean norm of an update.

    Raises:
        ConfigError: if ``max_norm`` is not a finite number above 0.

    Example:
        >>> ClipByNorm(max_norm=1.0)
        ClipByNorm(max_norm=1.0)
    """

    concerns = ("robustness", "privacy")

    max_norm: float

    def __post_init__(self) -> None:
        if not (self.max_norm > 0 and math.isfinite(self.max_norm)):
            raise ConfigError(f"ClipByNorm.max_norm is {self.max_norm}; it must be a finite number above 0.")

    def traits(self) -> Traits:
        """Computes with the values; there is nothing to decode."""
        return traits(needs=["float-leaves"], is_=["linear", "bounds"])

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Shortens the payload where it is too long."""
        norm = tree.norm({name: leaf for name, leaf in update.payload.items() if not tree.added(name, ctx.params)})
        if not norm > self.max_norm:
            return update, memory

        def shorten(name: str, leaf: torch.Tensor) -> torch.Tensor:
            if tree.added(name, ctx.params) or not leaf.is_floating_point():
                return leaf
            # Rounding the factor and the product may add half a unit each.
            return leaf * (self.max_norm / norm * (1 - torch.finfo(leaf.dtype).eps))

        return update.with_payload({name: shorten(name, leaf) for name, leaf in update.payload.items()}), memory

"""Half the bytes by dropping 16 bits of each mantissa.

Kalamkar et al., `A Study of BFLOAT16 for Deep Learning Training <https://arxiv.org/abs/1905.12322>`_, 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedfm.core import tree
from fedfm.core.parts import RoundContext, Traits, Transform, Tree, Update, traits


@dataclass(frozen=True)
class CastBF16(Transform):
    """Deltas travel as bfloat16, rounded to nearest: relative error at most 2^-9. On bfloat16 parameters it changes nothing.

    Leaves that a method adds (SCAFFOLD's control variates) pass whole.
    """

    concerns = ("compression",)

    def traits(self) -> Traits:
        """Computes with the values; decoding only widens them."""
        return traits(needs=["float-leaves"], is_=["linear"])

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Casts deltas to bfloat16."""
        payload = {
            name: leaf if tree.added(name, ctx.params) or not leaf.is_floating_point() else leaf.to(torch.bfloat16)
            for name, leaf in update.payload.items()
        }
        return update.with_payload(payload), memory

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """Casts back to the type of the parameter; to float32 where there is none of that name."""
        payload = {
            name: leaf.to(ctx.params[name].dtype if name in ctx.params else torch.float32) if leaf.is_floating_point() else leaf
            for name, leaf in update.payload.items()
        }
        return update.with_payload(payload)

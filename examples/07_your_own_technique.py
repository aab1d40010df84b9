"""A technique of your own: one class with both halves, under the public suite, in a run.

The average of LoRA's factors is not the average of their products, unless one factor is the same for everyone. So let only ``B`` travel:
``A`` stays what it was at the start, the mean becomes exact, and an update has half the bytes. After Sun, Li, Li, Ding, `Improving LoRA in
Privacy-preserving Federated Learning <https://arxiv.org/abs/2403.12313>`_, 2024; there a client freezes ``A`` while it works, here its change is dropped.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from course import base, weigh

from fedfm.core.parts import RoundContext, Transform, Tree, Update
from fedfm.testing import check_transform


@dataclass(frozen=True)
class Hold(Transform):
    """Parameters whose name matches ``pattern`` do not travel and stay what they are. Where nothing matches it is the identity."""

    pattern: str

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Leaves the held parameters out."""
        return update.with_payload({name: leaf for name, leaf in update.payload.items() if name not in self.held(ctx)}), memory

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """Their change is zero, whatever a client says."""
        return update.with_payload({**update.payload, **self.held(ctx)})

    def held(self, ctx: RoundContext) -> Tree:
        return {name: torch.zeros_like(leaf) for name, leaf in ctx.params.items() if fnmatchcase(name, self.pattern)}


def main(quick: bool = False) -> dict[str, tuple[float, int]]:
    for part in (Hold("*.bias"), Hold("nothing"), Hold("*")):
        check_transform(part)
    plan = base(quick)
    return weigh({"A and B": plan, "B alone": replace(plan, transforms=(Hold("*lora_A*"),))})


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # 01 has shown what the plan check has to say
    main()

"""A variant is the base with a part replaced. Nothing else changes, not even who is drawn in which round."""

from __future__ import annotations

import logging
from dataclasses import replace

from course import base, loss, play

from fedfm.local import FedProx
from fedfm.server import FedAdam, FedAvgM


def main(quick: bool = False) -> dict[str, float]:
    plan = base(quick)
    variants = {
        "FedAvg": plan,
        "FedAvgM": replace(plan, server=FedAvgM(momentum=0.5)),
        "FedAdam": replace(plan, server=FedAdam(lr=0.02)),
        "FedProx": replace(plan, local=FedProx(plan.local, mu=0.1)),
    }
    print(f"before   {loss(play(replace(plan, rounds=0))):.3f}")
    losses = {}
    for name, variant in variants.items():
        losses[name] = loss(play(variant))
        print(f"{name:<8} {losses[name]:.3f}")
    return losses


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # 01 has shown what the plan check has to say
    main()

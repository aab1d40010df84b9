"""What an update weighs in flight, and what making it lighter costs."""

from __future__ import annotations

import logging
from dataclasses import replace

from course import base, loss, play

from fedfm.core import words
from fedfm.core.parts import Transform
from fedfm.transforms import CastBF16, Int4, Int8, TopK

CHAINS: dict[str, tuple[Transform, ...]] = {
    "float32": (),
    "bfloat16": (CastBF16(),),
    "int8": (Int8(),),
    "int4": (Int4(),),
    "5 % of values": (TopK(fraction=0.05),),
    "5 %, int8": (TopK(fraction=0.05), Int8()),
}


def main(quick: bool = False) -> dict[str, tuple[float, int]]:
    plan = base(quick)
    found = {}
    print(f"{'an update as':<14} {'bytes':>8} {'loss':>7}")
    for name, chain in CHAINS.items():
        record = play(replace(plan, transforms=chain))
        found[name] = loss(record), record.bytes_up // len(record.clients)
        print(f"{name:<14} {words.size(found[name][1]):>8} {found[name][0]:>7.3f}")
    return found


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # 01 has shown what the plan check has to say
    main()

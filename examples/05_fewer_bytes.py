"""The bytes of an update in flight, and the loss that fewer bytes cost."""

from __future__ import annotations

import logging
from dataclasses import replace

from course import base, weigh

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
    return weigh({name: replace(plan, transforms=chain) for name, chain in CHAINS.items()})


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # 01 has shown what the plan check has to say
    main()

"""Bytes and values as a fault or a liar would change them, to be fed to whatever reads them."""

from __future__ import annotations

import math
import random
from typing import Any

# Values of other types and sizes than a field has, to be put in its place.
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 2**31, 2**63, 10**40, 1.5, -0.0, 1e308, math.nan, math.inf, "", "train", "\ud800", "\x1b[2J", [], {}, [1], {"a": 1},
    "F8_E4M3", "U64", "C64", "BOOL", "I64", [2**62, 4], [-1], [0, 2**63], [0, 2**62, 2**62], [0, 8],
)  # fmt: skip


def changed(data: bytes, draw: random.Random) -> bytes:
    """One to five bits, bytes or pieces changed, put in or taken out."""
    mutated = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at = draw.randrange(len(mutated) + 1)
        match draw.randrange(6):
            case 0 if mutated:
                mutated[min(at, len(mutated) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                mutated[at : at + 1] = bytes([draw.randrange(256)])
            case 2:
                mutated[at : at + 1] = bytes([draw.choice(b'0123456789{}[]",:FUBI\\ \n')])
            case 3:
                del mutated[at : at + draw.randrange(1, 9)]
            case 4:
                mutated[at:at] = bytes(draw.choice(b'019{}[]",:-.eE') for _ in range(draw.randrange(1, 5)))
            case _:
                del mutated[at:]
    return bytes(mutated)

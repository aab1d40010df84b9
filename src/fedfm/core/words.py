"""Numbers as a person reads them. Imports nothing heavy; what is not a finite number reads ``-``."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"


def number(value: Any) -> float | None:
    """``value`` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the floats
        return None


def _scaled(value: float, base: float, units: Sequence[str]) -> str:
    i = 0
    # 999.5 would round to 1000 of the smaller unit.
    while abs(value) >= base * 0.9995 and i < len(units) - 1:
        value /= base
        i += 1
    digits = 0 if i == 0 or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {units[i]}".rstrip()


def size(num_bytes: Any) -> str:
    """``1.23 MB``; decimal units."""
    n = number(num_bytes)
    return "-" if n is None else _scaled(n, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(value: Any) -> str:
    """``12.3 k``."""
    n = number(value)
    return "-" if n is None else _scaled(n, 1000, ("", "k", "M", "G", "T", "P", "E"))


def duration(seconds: Any) -> str:
    """``3.2 s``, ``4:05`` (minutes and seconds) or ``1:02:03``."""
    s = number(seconds)
    if s is None:
        return "-"
    if s < 59.95:
        return f"{s:.1f} s"
    minutes, rest = divmod(round(s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def loss(value: Any) -> str:
    """Four significant digits where they fit: ``3.412``, ``12.35``, ``0.034``."""
    x = number(value)
    if x is None:
        return "-"
    return f"{x:.2e}" if abs(x) >= 1e5 else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.{3 if abs(x) < 10 else 2 if abs(x) < 100 else 1}f}"


def change(before: Any, after: Any) -> str:
    """``-23.5 %``."""
    x, y = number(before), number(after)
    return "-" if x is None or y is None or x == 0 else f"{100 * (y - x) / abs(x):+.1f} %"


def clean(text: Any, width: int | None = None) -> str:
    """``text`` on one line without control characters (an owner's name must not steer a terminal), cut to ``width``."""
    shown = "".join("�" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(text))
    return shown if width is None or len(shown) <= width else shown[: width - 1] + "…"


def sparkline(values: Sequence[float | None], width: int = 16) -> str:
    """The last of ``values`` in each of at most ``width`` equal stretches, as blocks; a gap where there is no number."""
    if len(values) > width:
        values = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    numbers = [number(value) for value in values]
    finite = [value for value in numbers if value is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else BLOCKS[round((value - low) * scale)] for value in numbers)

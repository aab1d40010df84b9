"""Numbers as a person reads them. Imports nothing heavy; what is not a finite number reads ``-``."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"
SHARES = ("accuracy", "token_accuracy", "macro_f1")
"""Metrics in ``0..1`` that read as a percentage."""


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


def percent(value: Any) -> str:
    """``93.5 %``."""
    x = number(value)
    return "-" if x is None else f"{100 * x:.1f} %"


@dataclass(frozen=True)
class Metric:
    """A metric as a person reads it.

    Args:
        name: As the task calls it.
        lower_is_better: Its direction.
    """

    name: str = "loss"
    lower_is_better: bool = True

    @staticmethod
    def from_json(value: Any) -> Metric:
        """Undoes :meth:`to_json`; the loss where nothing is said."""
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            return Metric()
        return Metric(value["name"], value.get("lower_is_better") is not False)

    def to_json(self) -> dict[str, Any]:
        """As written into a run's folder."""
        return asdict(self)

    @property
    def title(self) -> str:
        """``macro F1``, ``token accuracy``."""
        return clean(self.name.replace("_", " ").replace("macro f1", "macro F1"), 24)

    def show(self, value: Any) -> str:
        """``93.5 %`` for a share, ``3.412`` for all else."""
        return percent(value) if self.name in SHARES else loss(value)

    def change(self, before: Any, after: Any) -> str:
        """``+3.5 points`` for a share, ``-23.5 %`` for all else."""
        x, y = number(before), number(after)
        if x is None or y is None or self.name not in SHARES:
            return change(before, after)
        return f"{100 * (y - x):+.1f} points"

    def cost(self, value: float) -> float:
        """``value``, with its sign turned where higher is better: the lower the better."""
        return value if self.lower_is_better else -value

    def is_better(self, value: float | None, other: float | None) -> bool:
        """Whether ``value`` is better than ``other``; False where one is missing."""
        return value is not None and other is not None and self.cost(value) < self.cost(other)


LOSS = Metric()


def listed(names: Sequence[str], limit: int = 3) -> str:
    """``a``, ``a and b``, ``a, b and c``, ``a, b, c and 5 more``."""
    shown = [clean(name, 32) for name in names[:limit]]
    if len(names) > limit:
        return f"{', '.join(shown)} and {len(names) - limit} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


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

"""Plain values: what JSON can hold, and nothing else."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any


def csv_line(cells: Iterable[str]) -> str:
    """One row of a csv file, with commas and without the line's end."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def finite(value: Any) -> Any:
    """``value`` with null in place of each number that JSON does not have (NaN, infinity), and a list in place of each tuple."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value

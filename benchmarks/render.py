"""Rewrites the tables of docs/benchmarks.md and docs/results/first-hour.md from the rows that ``--json`` wrote: ``python -m benchmarks.render results/*.json``.

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; one whose rows are not given stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks.common import COLUMNS, Row, table, where

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "benchmarks.md", DOCS / "results" / "first-hour.md")


def rendered(text: str, rows: list[Row]) -> str:
    """``text`` with the tables that ``rows`` fill and that have a place in it."""
    for name in COLUMNS:
        own_rows, (begin, end) = [row for row in rows if row["benchmark"] == name], marks(name)
        if own_rows:
            block = f"{begin}\n{where(own_rows)}\n\n{table(own_rows)}\n{end}"
            text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, block=block: block, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def marks(name: str) -> tuple[str, str]:
    """Between what a table stands."""
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def main() -> None:
    """Rewrites the pages."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="+", type=Path, help="what --json wrote; of rows in several files the later ones hold")
    given = options.parse_args()
    rows = [json.loads(line) for file in given.files for line in file.read_text().splitlines()]
    for page in PAGES:
        page.write_text(rendered(page.read_text(), rows))


if __name__ == "__main__":
    main()

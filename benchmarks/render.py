"""Rewrites the tables of docs/benchmarks.md from the rows that ``--json`` wrote: ``python -m benchmarks.render results/*.json``.

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; one whose rows are not given stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks.common import COLUMNS, Row, table, where

DOC = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def rendered(text: str, rows: list[Row]) -> str:
    """``text`` with the tables that ``rows`` fill."""
    for name in COLUMNS:
        own_rows = [row for row in rows if row["benchmark"] == name]
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if own_rows and begin not in text:
            raise SystemExit(f"{DOC} has no {begin}; the table of {name} has nowhere to go.")
        if own_rows:
            block = f"{begin}\n{where(own_rows)}\n\n{table(own_rows)}\n{end}"
            text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, block=block: block, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrites the page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="+", type=Path, help="what --json wrote; of rows in several files the later ones hold")
    given = options.parse_args()
    rows = [json.loads(line) for file in given.files for line in file.read_text().splitlines()]
    DOC.write_text(rendered(DOC.read_text(), rows))


if __name__ == "__main__":
    main()

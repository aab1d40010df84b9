"""A run's numbers as flat columns: a row for each round, and a row for each round and owner. ``metrics.csv`` holds the first."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from fedfm.core import disk, words
from fedfm.core.errors import RunError
from fedfm.core.plain import csv_line

TABLE = "metrics.csv"
_TOTALS = ("steps", "examples", "tokens")


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """One row for a record as ``metrics.jsonl`` has it; names of nested numbers are joined by ``_``.

    ``asked``, ``answered`` and ``failed`` count clients, ``not_evaluated`` those whose evaluation failed; ``steps``, ``examples`` and ``tokens``
    are totals over clients. What is told of single owners is left out.
    """
    clients = record["clients"]
    row: dict[str, Any] = {"round": record["round"]}
    row |= {
        "asked": len(record["cohort"]),
        "answered": len(clients) or int(record["metrics"].get("num_clients", 0)),
        "failed": len(record["failures"]),
    }
    row |= {name: int(sum(own.get(name) or 0 for own in clients.values())) for name in _TOTALS if clients}
    metrics = {name: value for name, value in record["metrics"].items() if name != "eval"}
    report = record["metrics"].get("eval")
    if report is not None:
        shared = {name: value for name, value in report.items() if name not in ("owners", "failed", "headline", "missing")}
        metrics["eval"] = {**shared, "owners": len(report.get("owners", {})) or report.get("sums", {}).get("owners", 0)}
        metrics["not_evaluated"] = len(report.get("failed", {}))
    beside = {name: value for name, value in record.items() if name not in ("round", "cohort", "failures", "clients", "metrics")}
    return {**row, **dict(_joined("", metrics)), **dict(_joined("", beside))}


def flat_owners(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each owner of a record: what it said of its work (``train_...``) and its evaluation (``eval_...``)."""
    evaluated = record["metrics"].get("eval", {}).get("owners", {})
    asked, failed = set(record["cohort"]), {failure["client"] for failure in record["failures"]}
    for owner in dict.fromkeys([*record["cohort"], *record["clients"], *evaluated]):
        row = {"round": record["round"], "owner": owner, "asked": owner in asked, "failed": owner in failed}
        yield {**row, **dict(_joined("train_", record["clients"].get(owner, {}))), **dict(_joined("eval_", evaluated.get(owner, {})))}


def columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns of equal length, in the order in which they appear; ``None`` where a row has no value."""
    table: dict[str, list[Any]] = {}
    for before, row in enumerate(rows):
        for name, value in row.items():
            table.setdefault(name, [None] * before).append(value)
        for values in table.values():
            if len(values) == before:
                values.append(None)
    return table


def _joined(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _joined(f"{prefix}{name}_", item)
    elif not isinstance(value, list):
        yield prefix.removesuffix("_"), value


class Table:
    """``metrics.csv``: a row is added to its end; a column that comes later is given to all rows, once.

    The file is written anew only when the set of columns grows, which the names of metrics do a few times in a run (with the first
    evaluation, and the first training), so a run of n rounds writes about n rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row, durably.

        Raises:
            RunError: if it cannot be written.
        """
        if self.names and set(row) <= set(self.names):
            disk.append(self.path, self._line(row))
        else:
            self.write(chain(self._rows() if self.names else (), [row]), dict.fromkeys([*self.names, *row]))

    def write(self, rows: Iterable[Mapping[str, Any]], names: Iterable[str] | None = None) -> None:
        """Replaces all rows, durably.

        Args:
            names: The columns, if they are known; else ``rows`` is a sequence, whose columns are taken.

        Raises:
            RunError: if it cannot be written.
        """
        if names is None:
            rows = list(rows)
            names = dict.fromkeys(name for row in rows for name in row)
        self.names = list(names)
        disk.write_lines(self.path, chain([csv_line(self.names)] if self.names else [], map(self._line, rows)))

    def _rows(self) -> Iterator[dict[str, str]]:
        """The rows so far, as text."""
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}. Resume the run, which makes it again.") from error

    def _line(self, row: Mapping[str, Any]) -> str:
        return csv_line([_cell(row.get(name)) for name in self.names])


def _cell(value: Any) -> str:
    # An owner's name is one line here, whatever is in it, so that a row is a line.
    return "" if value is None else words.clean(value)

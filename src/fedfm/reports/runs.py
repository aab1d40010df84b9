"""Several runs as one table: a sweep, or runs side by side. A row is a combination of settings, with mean and spread over its runs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedfm.core.disk import write_atomic
from fedfm.core.errors import RunError
from fedfm.core.words import LOSS, Metric, clean, duration, listed, number, size
from fedfm.reports import svg
from fedfm.reports.page import page, total, write_page
from fedfm.reports.reading import Run, read

CURVES = 7
"""Rows whose learning curves are drawn, the best ones."""
SPREAD = (
    "Mean ± standard deviation over the runs of a row (n - 1 in the denominator); their number is in brackets where it is more than one."
)


@dataclass(frozen=True)
class Entry:
    """A run of the table.

    Args:
        name: Of its folder.
        values: What tells its row from others, by field; runs with equal values share a row.
        run: What it left; ``None`` where it left nothing yet.
        error: Why it failed, where it did.
    """

    name: str
    values: Mapping[str, str]
    run: Run | None
    error: str = ""

    @staticmethod
    def of(folder: Path, values: Mapping[str, str], error: str = "", name: str | None = None) -> Entry:
        """The run in ``folder``, in whatever state it is."""
        try:
            run = read(folder) if (folder / "recipe.yaml").is_file() else None
        except RunError as damage:
            run, error = None, error or str(damage)
        if run is not None and run.ended:
            error = ""  # it was resumed by hand since it failed
        return Entry(name or folder.name, values, run, error)

    @property
    def status(self) -> str:
        """``failed``, ``done``, ``unfinished`` or ``not begun``."""
        if self.error:
            return "failed"
        return "not begun" if self.run is None or not self.run.rounds else "done" if self.run.ended else "unfinished"

    def value(self, metric: str, last: bool) -> float | None:
        """A metric on the held-out data of all owners, before training or at the last evaluation."""
        evaluated = self.run.evaluations if self.run is not None else []
        return evaluated[-1 if last else 0].pooled.get(metric) if evaluated else None

    def measures(self, metric: Metric) -> dict[str, float | None]:
        """The numbers of a row that this run adds to."""
        run = self.run if self.run is not None and self.run.rounds else None
        best = run.best if run is not None else None
        return {
            "before": self.value(metric.name, False),
            "after": self.value(metric.name, True),
            "loss_before": self.value(LOSS.name, False),
            "loss_after": self.value(LOSS.name, True),
            "bytes": None if run is None else total(run, "bytes_up") + total(run, "bytes_down"),
            "seconds": None if run is None else total(run, "seconds"),
            "best_round": None if best is None else float(best.round),
            "best_score": None if best is None else best.scored,
        }

    def to_json(self, metric: Metric) -> dict[str, Any]:
        """The run in plain values."""
        last = self.run.rounds[-1].round if self.run is not None and self.run.rounds else None
        return {
            "run": self.name,
            "values": dict(self.values),
            "seed": None if self.run is None else self.run.fields.get("seed"),
            "status": self.status,
            "rounds": last,
            **self.measures(metric),
            **({"error": self.error} if self.error else {}),
        }


@dataclass(frozen=True)
class Spread:
    """Numbers of several runs.

    Args:
        mean: ``None`` where no run has one.
        deviation: Standard deviation, with n - 1; ``None`` for fewer than two.
        num: How many runs have one.
    """

    mean: float | None
    deviation: float | None
    num: int

    @staticmethod
    def of(values: Sequence[float | None]) -> Spread:
        """The spread of those that are numbers.

        Example:
            >>> Spread.of([1.0, 3.0, None])
            Spread(mean=2.0, deviation=1.4142135623730951, num=2)
        """
        known = [value for value in values if value is not None]
        return Spread(statistics.fmean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None, len(known))

    def show(self, metric: Metric) -> str:
        """``3.412 ± 0.021 (3)``."""
        text = metric.show(self.mean)
        return text if self.deviation is None else f"{text} ± {metric.show(self.deviation)} ({self.num})"


@dataclass(frozen=True)
class Row:
    """A combination of settings.

    Args:
        values: By field.
        entries: Its runs.
        metric: The one that leads.
    """

    values: Mapping[str, str]
    entries: Sequence[Entry]
    metric: Metric

    @cached_property
    def numbers(self) -> Mapping[str, Spread]:
        """``before``, ``after``, ``loss_before``, ``loss_after``, ``bytes``, ``seconds``, ``best_round`` and ``best_score`` over its runs."""
        measures = [entry.measures(self.metric) for entry in self.entries]
        return {name: Spread.of([one[name] for one in measures]) for name in measures[0]}

    @property
    def label(self) -> str:
        """Its values in a line; the run's name where nothing tells it from others."""
        values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.values.items())
        return values or (self.entries[0].name if len(self.entries) == 1 else "all runs")

    def num(self, status: str) -> int:
        """How many of its runs are in this state."""
        return sum(entry.status == status for entry in self.entries)

    def state(self) -> str:
        """``3 runs``, ``2 of 3 done, 1 failed``."""
        n, done = len(self.entries), self.num("done")
        others = [f"{self.num(status)} {status}" for status in ("failed", "unfinished", "not begun") if self.num(status)]
        return ", ".join([f"{done} of {n} done", *others]) if others else f"{n} run{'' if n == 1 else 's'}"

    def curve(self) -> list[svg.Point]:
        """The mean headline of its runs by round, where all of them were evaluated."""
        runs = [entry.run for entry in self.entries if entry.run is not None and entry.run.evaluations]
        by_round: dict[int, list[float | None]] = {}
        for run in runs:
            for round in run.evaluations:
                by_round.setdefault(round.round, []).append(round.value if round.scored is None else round.scored)
        return [
            (float(round), Spread.of(values).mean if None not in values else None)
            for round, values in sorted(by_round.items())
            if len(values) == len(runs)
        ]

    def to_json(self) -> dict[str, Any]:
        """The row in plain values."""
        flat = {
            f"{name}_{what}": value
            for name, spread in self.numbers.items()
            for what, value in (("mean", spread.mean), ("sd", spread.deviation))
        }
        states = {status.replace(" ", "_"): self.num(status) for status in ("done", "failed", "unfinished", "not begun")}
        return {
            **self.values,
            "metric": self.metric.name,
            "runs": len(self.entries),
            **states,
            "measured": self.numbers["after"].num,
            **flat,
        }


@dataclass(frozen=True)
class Table:
    """Runs in rows.

    Args:
        title: What the runs are.
        entries: All runs.
        rows: The best first where they can be compared, else as they were given.
        notes: What a reader must know before comparing them, a sentence or more each.
        metric: The one that leads.
        page: Where it was written as a page, if it was.
    """

    title: str
    entries: Sequence[Entry]
    rows: Sequence[Row]
    notes: Sequence[str]
    metric: Metric
    page: Path | None = None

    @staticmethod
    def of(title: str, entries: Sequence[Entry]) -> Table:
        """The table of runs; those with equal values share a row."""
        metric = next((entry.run.metric for entry in entries if entry.run is not None and entry.run.evaluations), LOSS)
        groups: dict[tuple[tuple[str, str], ...], list[Entry]] = {}
        for entry in entries:
            groups.setdefault(tuple(entry.values.items()), []).append(entry)
        rows = [Row(dict(values), group, metric) for values, group in groups.items()]
        notes = incomparable(entries)
        if not notes:
            rows.sort(key=lambda row: (row.numbers["after"].mean is None, metric.cost(row.numbers["after"].mean or 0.0)))
        elif len(rows) > 1:
            notes = [*notes, "So the rows are not ranked: they stand in the order in which they were given."]
        return Table(title, entries, rows, notes, metric)

    @property
    def failed(self) -> list[Entry]:
        """Runs that failed."""
        return [entry for entry in self.entries if entry.error]

    def columns(self) -> list[str]:
        """The fields that tell rows apart, or ``run``."""
        return list(self.rows[0].values) if self.rows and self.rows[0].values else ["run"]

    def head(self) -> list[str]:
        """Titles of the columns."""
        title = self.metric.title
        losses = [] if self.metric.name == LOSS.name else ["loss before", "loss after"]
        return [*map(clean, self.columns()), f"{title} before", f"{title} after", *losses, "bytes", "seconds", "runs"]

    def cells(self, row: Row) -> list[str]:
        """What a row shows."""
        numbers = row.numbers
        own = [clean(value, 40) for value in row.values.values()] or [clean(row.label, 60)]
        losses = [] if self.metric.name == LOSS.name else [numbers[name].show(LOSS) for name in ("loss_before", "loss_after")]
        shown = [numbers[name].show(self.metric) for name in ("before", "after")]
        return [*own, *shown, *losses, size(numbers["bytes"].mean), duration(numbers["seconds"].mean), row.state()]

    def remarks(self) -> list[str]:
        """What is said below the table."""
        direction = "lower" if self.metric.lower_is_better else "higher"
        first = f"Held-out {self.metric.title}, before training and at the last evaluation; {direction} is better."
        if any(len(row.entries) > 1 for row in self.rows):
            first += f" {SPREAD}"
        failed = [f"{entry.name} failed: {clean(entry.error, 300)}" for entry in self.failed]
        return [first, *self.notes, *failed]

    def lines(self) -> list[str]:
        """The table as aligned text, with its remarks."""
        grid = [self.head(), *map(self.cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*grid)]
        texts = len(self.columns())
        lines = [
            "  ".join(
                f"{cell:<{width}}" if i < texts else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(cells, widths))
            ).rstrip()
            for cells in grid
        ]
        return [lines[0], "-" * sum((*widths, 2 * len(widths) - 2)), *lines[1:], "", *self.remarks()]

    def to_json(self) -> dict[str, Any]:
        """The table in plain values."""
        return {
            "metric": self.metric.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "runs": [entry.to_json(self.metric) for entry in self.entries],
            "notes": list(self.notes),
        }

    def written(self, folder: Path, stem: str) -> Table:
        """Writes ``STEM.csv`` (a line for each row) and ``STEM.html``; the table with the path of that.

        Raises:
            RunError: if they cannot be written, or a run is there.
        """
        if (folder / "recipe.yaml").exists():
            raise RunError(f"{folder} holds a run, and its folder is its own. Choose another --out.")
        rows = [row.to_json() if row.values else {"run": row.label, **row.to_json()} for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(folder / f"{stem}.csv", text.getvalue().encode())
        return replace(self, page=write_page(folder / f"{stem}.html", page("runs.html", self.picture())))

    def picture(self) -> dict[str, Any]:
        """What the template shows."""
        drawn = [(row, points) for row in self.rows if len(points := row.curve()) > 1][:CURVES]
        lines = [svg.Line(clean(row.label, 30), f"c{i}", points) for i, (row, points) in enumerate(drawn)]
        described = ", ".join(f"{line.label} to {self.metric.show(line.points[-1][1])}" for line in lines)
        # Labels stand at the right of the curves, about 7 units a letter.
        margin = 60 + 7 * max((len(line.label) for line in lines), default=10)
        chart = svg.chart(lines, describe=f"{self.metric.title.capitalize()} by round: {described}.", width=1060, margin=margin)
        return {
            "title": self.title,
            "head": self.head(),
            "rows": [self.cells(row) for row in self.rows],
            "texts": len(self.columns()),
            "remarks": self.remarks(),
            "chart": chart if lines else Markup(""),
            "metric": self.metric,
            "num_curves": len(lines),
            "ranked": not self.notes,
            "runs": [self._run(entry) for entry in self.entries],
        }

    def _run(self, entry: Entry) -> list[str]:
        own, metric = entry.to_json(self.metric), self.metric
        shown = [metric.show(own[name]) for name in ("before", "after", "best_score")]
        rounds = ["-" if own[name] is None else f"{own[name]:.0f}" for name in ("rounds", "best_round")]
        return [entry.name, str(own["seed"]), entry.status, rounds[0], *shown, rounds[1], size(own["bytes"]), duration(own["seconds"])]


def incomparable(entries: Sequence[Entry]) -> list[str]:
    """Which runs cannot be compared, and why; nothing where all can.

    The data of two runs is the same where their fingerprints are. The seed is part of a fingerprint, so runs with different seeds are compared by
    what their recipes say of data, task and base.
    """
    groups: list[list[Entry]] = []
    for entry in entries:
        if entry.run is None or not entry.run.rounds:
            continue
        group = next((group for group in groups if not any(_differences(entry.run, other.run) for other in group if other.run)), None)
        if group is None:
            groups.append([entry])
        else:
            group.append(entry)
    notes = []
    for group in groups[1:]:
        reasons = dict.fromkeys(
            reason for one in group for other in groups[0] if one.run and other.run for reason in _differences(one.run, other.run)
        )
        names = [listed([entry.name for entry in some]) for some in (group, groups[0])]
        notes.append(f"{names[0]} cannot be compared with {names[1]}: they have {' and '.join(reasons) or 'nothing in common'}.")
    return notes


def _differences(one: Run, other: Run) -> list[str]:
    """Why two runs cannot be compared."""

    def differ(name: str) -> bool:
        return bool(one.fields.get(name) != other.fields.get(name))

    same_seed = not differ("seed")
    from_source = isinstance(one.fields.get("model"), dict) and one.fields["model"].get("source") is not None
    reasons = []
    if (one.data != other.data) if same_seed else (differ("data") or differ("task")):
        reasons.append("other data (or task)")
    if (one.base != other.base) if same_seed or from_source else differ("model"):
        reasons.append("another base model")
    if _tested(one) != _tested(other):
        reasons.append("other parts of the test data (evaluate.ends, evaluate.owners)")
    if one.evaluations and other.evaluations and one.metric != other.metric:
        reasons.append("another metric that leads")
    return reasons


def _tested(run: Run) -> tuple[float | None, float | None]:
    evaluate = run.fields.get("evaluate")
    known = evaluate if isinstance(evaluate, dict) else {}
    return number(known.get("ends")), number(known.get("owners"))

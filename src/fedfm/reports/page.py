"""The report: one self-contained page from a run's folder.

Everything that comes from data (owners' names, reasons of failures, the recipe) is escaped, by the
template or by the pictures; the page loads nothing from anywhere and runs no script.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from fedfm.core.bad_rows import BadRows
from fedfm.core.disk import write_atomic
from fedfm.core.words import Metric, clean, count, duration, loss, number, size
from fedfm.reports import svg, table
from fedfm.reports.reading import Run, numbers, read

OWNERS_SHOWN = 24
LABELS_SHOWN = 7
FAILURES_SHOWN = 20


@dataclass(frozen=True)
class Tile:
    """One number of the first row."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class OwnerCell:
    """One owner among the small multiples."""

    name: str
    first: str
    last: str
    change: str
    better: bool
    picture: Markup


@dataclass(frozen=True)
class Bar:
    """One bar: ``pieces`` are (CSS class, share of the longest bar in %, what it is)."""

    name: str
    value: str
    pieces: Sequence[tuple[str, float, str]]


def render(folder: Path) -> Path:
    """Writes ``report.html`` into a run's folder and returns its path.

    Raises:
        RunError: if ``folder`` is not a run's, or cannot be written.
    """
    return write_page(folder / "report.html", html(folder))


def html(folder: Path) -> str:
    """The page of the run in ``folder``, as it is now.

    Raises:
        RunError: if ``folder`` is not a run's.
    """
    return page("report.html", picture(read(folder)))


def write_page(path: Path, text: str) -> Path:
    """Writes a page and returns its path.

    Raises:
        RunError: if it cannot be written.
    """
    write_atomic(path, text.encode("utf-8", "replace"))
    return path


def page(template: str, values: Mapping[str, Any]) -> str:
    """A page from a template of this folder."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"clean": clean, "loss": loss, "count": count, "size": size}
    return environment.get_template(template).render(values)


def picture(run: Run) -> dict[str, Any]:
    """What the template shows."""
    rows = table.owner_rows(run.compare) if run.compare else []
    failures = [(round.round, failure) for round in run.rounds for failure in round.failures]
    return {
        "name": run.name,
        "headline": headline(run),
        "verdict": table.verdict(run.compare) if run.compare else "",
        "best": best_round(run),
        "travelled": table.travelled(run.compare) if run.compare else "",
        "spent": table.spent(run.compare) if run.compare else "",
        "curves": bool(run.compare and table.curve(run.compare, "centralised", run.metric)),
        "tiles": tiles(run),
        "metric": run.metric,
        "chart": chart(run),
        "loss_chart": loss_chart(run),
        "metrics": metrics(run),
        "everybody": table.everybody(run.compare) if run.compare else "",
        "band": any(round.band() for round in run.evaluations),
        "wide_band": max((len(round.owners) for round in run.evaluations), default=0) > 10,
        "ends": ends(run),
        "owners": owners(run),
        "told": next((table.told_of_owners(run.metric, round.told) for round in reversed(run.evaluations) if round.told), ""),
        "num_owners": len(last_values(run)),
        "rows": comparison(rows),
        "num_rows": len(rows),
        "mean": table.mean_row(rows) if len(rows) > 1 else None,
        "pooled": table.pooled(run.compare) if run.compare else None,
        "titles": table.ENDS,
        "split": split(run.split, run.bad_rows),
        "left_out": run.bad_rows.sentence(),
        "split_area": split_area(run.split),
        "labels": labels(run.split),
        "num_split": len(run.split),
        "audit": audit(run),
        "costs": costs(run),
        "privacy": privacy(run),
        "time": time_bar(run),
        "failures": failures[:FAILURES_SHOWN],
        "num_failures": len(failures),
        "num_answers": sum(len(round.cohort) for round in run.rounds),
        "failing": Counter(str(failure.get("client", "?")) for _, failure in failures).most_common(5),
        "recipe": highlight(run.recipe),
        "envelope": flatten({**run.envelope, **run.plan}),
        "shown": OWNERS_SHOWN,
    }


def num_owners(run: Run) -> int:
    """Owners known from the split, else those ever seen."""
    return len(run.split) or len({name for round in run.rounds for name in (*round.owners, *round.cohort)})


def headline(run: Run) -> str:
    """The result in a sentence."""
    if not run.rounds:
        return "Nothing has been trained yet."
    n = num_owners(run)
    where = f" across {n} owner{'' if n == 1 else 's'}" if n else ""

    def rounds(k: int) -> str:
        return f"{k} round{'' if k == 1 else 's'}{where}"

    last, metric = run.rounds[-1].round, run.metric
    finite = [round for round in run.evaluations if round.value is not None]
    if not any(round.pooled for round in run.evaluations):
        trained = [round.train for round in run.rounds if round.train is not None]
        outcome = f"training loss from {loss(trained[0])} to {loss(trained[-1])}, nothing evaluated" if trained else "no loss was recorded"
        return f"{rounds(last)}: {outcome}."
    first, end = (finite or run.evaluations)[0], run.evaluations[-1]
    what, show = f"held-out {metric.title}", metric.show
    if end.value is None:
        return f"After {rounds(end.round)} there is no finite {what}: the model has diverged, or nobody could evaluate it."
    if end.round == 0:
        return f"Before training, the {what}{where} is {show(end.value)}."
    if first is end or first.value is None:
        return f"After {rounds(end.round)} the {what} is {show(end.value)}."
    if end.value == first.value:
        return f"{rounds(end.round)} left the {what} at {show(end.value)}."
    verb = "brought" if metric.is_better(end.value, first.value) else "took"
    way = "down" if end.value < first.value else "up"
    return f"{rounds(end.round)} {verb} the {what} {way} from {show(first.value)} to {show(end.value)} ({metric.change(first.value, end.value)})."


def best_round(run: Run) -> str:
    """Which round was best where that is not the last, and whether the run ended early."""
    best, last, metric = run.best, run.rounds[-1] if run.rounds else None, run.metric
    if best is None or last is None:
        return ""
    text = ""
    if best is not last:
        text = (
            f"Round {best.round} was best: {metric.title} {metric.show(best.scored)} on the test examples that all rounds are compared on, "
            f"where the last round has {metric.show(last.scored)}. It was chosen by test data, so its score is optimistic. "
        )
    early = last.score.early
    if early is not None:
        text += f"The run ended early after round {last.round} of {count(early.get('rounds'))}: no better score in {count(early.get('patience'))} evaluations."
    return text.strip()


def tiles(run: Run) -> list[Tile]:
    """The first row of numbers."""
    shown: list[Tile] = []
    evaluated = [round for round in run.evaluations if round.pooled]
    if evaluated:
        first, last = evaluated[0], run.evaluations[-1]
        others = [Metric(name) for name, value in last.pooled.items() if name != run.metric.name and value is not None]
        for metric in [run.metric, *others[:1]]:
            before, after = first.pooled.get(metric.name), last.pooled.get(metric.name)
            note = _from(before, after, metric) if last is not first else ""
            error = f"± {metric.show(last.error)} " if metric is run.metric and last.error is not None else ""
            shown.append(Tile(f"Held-out {metric.title}", metric.show(after), error + note))
    if len(last_values(run)) > 1 and (worst := run.evaluations[-1].worst):
        shown.append(Tile("Worst owner", run.metric.show(worst[1]), clean(worst[0], 28)))
    up, down = total(run, "bytes_up"), total(run, "bytes_down")
    if up or down:
        shown.append(Tile("Travelled", size(up + down), f"{size(up)} up, {size(down)} down"))
    seconds = total(run, "seconds")
    training = sum(round.seconds.get("train", 0.0) for round in run.rounds)
    tokens = sum(round.tokens for round in run.rounds)
    if seconds:
        shown.append(Tile("Time", duration(seconds), f"{count(tokens / training)} tokens/s in training" if tokens and training else ""))
    return shown


def metrics(run: Run) -> list[tuple[str, list[str]]]:
    """All metrics on everybody's held-out data, the headline first: before training, after it, and with the two ends where they are known."""
    evaluated = [round for round in run.evaluations if round.pooled]
    if not evaluated:
        return []
    first, last = evaluated[0], evaluated[-1]
    ends = {row.metric.name: row for row in table.metrics(run.compare)} if run.compare else {}
    rows = []
    for name in dict.fromkeys([run.metric.name, *last.pooled, *ends]):
        metric = Metric(name)
        values = [first.pooled.get(name), last.pooled.get(name)]
        if run.compare:
            values += [ends[name].local, ends[name].centralised] if name in ends else [None, None]
        rows.append((metric.title, [metric.show(value) for value in values]))
    return rows


def audit(run: Run) -> list[tuple[str, str]]:
    """The audit of the run's privacy promise, row by row, the verdict first; empty where there was none."""
    lines = run.audit.get("lines", [])
    rows = [(str(line[0]), str(line[1])) for line in lines if isinstance(line, list) and len(line) == 2]
    return sorted(rows, key=lambda row: row[0] != "verdict")


def total(run: Run, name: str) -> float:
    """A total from the ledger, or from the rounds where there is no ledger."""
    told = run.ledger.get(name)
    if isinstance(told, dict):
        told = sum(value or 0.0 for value in numbers(told).values())
    if number(told) is not None:
        return number(told) or 0.0
    return sum(sum(round.seconds.values()) if name == "seconds" else float(getattr(round, name)) for round in run.rounds)


def _from(before: float | None, after: float | None, metric: Metric) -> str:
    if before is None or after is None:
        return ""
    return f"from {metric.show(before)} ({metric.change(before, after)})"


def chart(run: Run) -> Markup:
    """The headline by round: pooled, the worst owner, the owners' range, and the two ends where they are known."""
    evaluated, metric = run.evaluations, run.metric
    # Beside the ends' curves, the run's own is on the same examples as theirs throughout.
    alike = bool(run.compare and table.curve(run.compare, "centralised", metric))
    pooled = [(r.round, r.scored if alike and r.scored is not None else r.value) for r in evaluated if r.pooled]
    lines = [
        svg.Line("worst owner", "worst", [(r.round, r.worst[1] if r.worst else None) for r in evaluated if r.owners]),
        svg.Line("pooled", "federated", pooled),
    ]
    if metric.name == "loss":
        lines.append(_training(run))
    if evaluated and max(len(r.owners) for r in evaluated) < 2:
        del lines[0]  # with one owner the worst is all there is
    band = [(float(r.round), *edges) for r in evaluated if (edges := r.band())]
    return _drawn(run, lines, band, metric)


def loss_chart(run: Run) -> Markup:
    """The loss by round, where another metric leads."""
    metric = Metric()
    if run.metric.name == metric.name:
        return Markup("")
    pooled = svg.Line("pooled", "federated", [(r.round, r.pooled.get(metric.name)) for r in run.evaluations if r.pooled])
    return _drawn(run, [pooled, _training(run)], [], metric)


def _training(run: Run) -> svg.Line:
    return svg.Line("training", "training", [(r.round, r.train) for r in run.rounds if r.train is not None])


def _drawn(run: Run, lines: Sequence[svg.Line], band: Sequence[tuple[float, float, float]], metric: Metric) -> Markup:
    compare = run.compare or {}
    row = table.pooled(compare, metric) if run.compare else None
    curves = {
        "local": svg.Line("each alone, own data", "local", table.curve(compare, "local", metric)),
        "centralised": svg.Line("centralised", "centralised", table.curve(compare, "centralised", metric)),
    }
    lines = [*(curve for curve in curves.values() if curve.points), *lines]
    levels = [
        svg.Line(label, style, [(0, value)])
        for label, style, value in (("local-only", "local", row.local), ("centralised", "centralised", row.centralised))
        if value is not None and not curves[style].points
    ] if row else []  # fmt: skip
    drawn = [line for line in lines if line.points]
    ends = ", ".join(f"{line.label} from {metric.show(line.points[0][1])} to {metric.show(line.points[-1][1])}" for line in drawn)
    return svg.chart(drawn, band, levels, f"{metric.title.capitalize()} by round: {ends}.")


def ends(run: Run) -> list[Bar]:
    """The headline on the pooled test under the four ways, as bars from zero."""
    if not run.compare:
        return []
    row = table.pooled(run.compare)
    values = {key: value for key, value in row.values().items() if value is not None}
    longest = max((abs(value) for value in values.values()), default=0.0)
    return [
        Bar(table.ENDS[key], row.metric.show(value), [(key, 100 * abs(value) / longest if longest else 0.0, "")])
        for key, value in values.items()
    ]


def last_values(run: Run) -> dict[str, float | None]:
    """Each owner's headline at the last evaluation that has owners."""
    return dict(next((r.owners for r in reversed(run.evaluations) if r.owners), {}))


def owners(run: Run) -> list[OwnerCell]:
    """Small multiples on one scale: the largest owners, and the worst ones where there are too many to show."""
    evaluated, metric = [round for round in run.evaluations if round.owners], run.metric
    last = last_values(run)
    sizes = {str(row.get("owner")): number(row.get("tokens")) or 0.0 for row in run.split}
    names = sorted(last, key=lambda name: (-sizes.get(name, 0.0), name))
    if len(names) > OWNERS_SHOWN:
        worst_first = sorted(last, key=lambda name: (-metric.cost(number(last[name]) or 0.0), name))
        half = OWNERS_SHOWN // 2
        names = names[:half] + [name for name in worst_first if name not in names[:half]][:half]
    curves = {name: [(float(r.round), r.owners.get(name)) for r in evaluated if name in r.owners] for name in names}
    values = [y for points in curves.values() for _, y in points if y is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    cells = []
    for name, points in curves.items():
        known = [y for _, y in points if y is not None]
        first, end = (known[0], known[-1]) if known else (None, None)
        better = first is not None and end is not None and not metric.is_better(first, end)
        change = metric.change(first, end)
        cells.append(OwnerCell(name, metric.show(first), metric.show(end), change, better, svg.spark(points, low, high, "federated")))
    return cells


def comparison(rows: Sequence[table.Row]) -> list[tuple[table.Row, Markup, str]]:
    """Rows of the comparison with their picture, and the change against working alone."""
    values = [value for row in rows for value in row.values().values() if value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return [(row, svg.markers(list(row.values().items()), low, high), row.gain) for row in rows[:OWNERS_SHOWN]]


def _histogram(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in numbers(row.get("labels")).items() if value}


def labels(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The commonest labels with their CSS class; the rest are ``others``."""
    totals: dict[str, float] = {}
    for row in rows:
        for name, n in _histogram(row).items():
            totals[name] = totals.get(name, 0.0) + n
    if len(totals) < 2:
        return []
    common = [(name, f"c{i}") for i, (name, _) in enumerate(sorted(totals.items(), key=lambda item: -item[1])[:LABELS_SHOWN])]
    return [*common, ("others", "other")] if len(totals) > LABELS_SHOWN else common


def split(rows: Sequence[Mapping[str, Any]], bad: BadRows) -> list[Bar]:
    """A bar per owner, the largest first: its tokens, divided by label where there are labels, and its rows that were left out."""
    classes = dict(labels(rows))
    sizes = [number(row.get("tokens")) or number(row.get("train")) or 0.0 for row in rows]
    longest = max(sizes, default=0.0)
    bars = []
    for value, row in sorted(zip(sizes, rows, strict=True), key=lambda item: (-item[0], str(item[1].get("owner"))))[:OWNERS_SHOWN]:
        width = 100 * value / longest if longest else 0.0
        parts: dict[tuple[str, str], float] = {}
        for label, n in _histogram(row).items():
            key = (classes.get(label, "other"), label if label in classes else "others")
            parts[key] = parts.get(key, 0.0) + n
        whole = sum(parts.values())
        pieces = (
            [(style, width * n / whole, f"{label}: {count(n)}") for (style, label), n in sorted(parts.items())] if classes and whole else []
        )
        told = f"{count(row.get('tokens'))} tokens · {count(row.get('train'))} train, {count(row.get('test'))} test"
        if unused := bad.owners.get(str(row.get("owner"))):
            told += f", {count(unused.total())} left out"
        bars.append(Bar(str(row.get("owner", "?")), told, pieces or [("c0", width, "")]))
    return bars


def split_area(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Where there are more owners than bars: all of them, by size."""
    if len(rows) <= OWNERS_SHOWN:
        return Markup("")
    return svg.area([number(row.get("tokens")) or 0.0 for row in rows], f"Tokens of {len(rows)} owners, largest to smallest.")


def privacy(run: Run) -> list[str]:
    """What has been spent of each privacy promise, in full sentences."""
    told = run.ledger.get("privacy")
    return [str(one["text"]) for one in told if isinstance(one, dict) and "text" in one] if isinstance(told, list) else []


def costs(run: Run) -> list[tuple[str, str]]:
    """What the run cost."""
    up, down = total(run, "bytes_up"), total(run, "bytes_down")
    answers = sum(len(round.cohort) for round in run.rounds)
    told = {name: number(run.ledger.get(name)) for name in run.ledger}
    found = [("Sent by the owners", size(up)), ("Sent to the owners", size(down))]
    if answers:
        found.append(("Per update", f"{size(up / answers)} up, {size(down / answers)} down"))
    travelled = numbers(run.compare.get("travelled")) if run.compare else {}
    full = travelled.get("bytes_if_full_model")
    if full and up + down:
        found.append(("If the whole model travelled", f"{size(full)} ({full / (up + down):,.0f} times as much)"))
    if told.get("bytes_evaluate"):
        found.append(("Evaluation, both ways", size(told["bytes_evaluate"])))
    for name, title in {
        "client_rounds": "Updates that counted",
        "steps": "Optimizer steps",
        "examples": "Examples seen",
        "tokens": "Tokens seen",
    }.items():
        if told.get(name) is not None:
            found.append((title, count(told[name])))
    if told.get("flops"):
        found.append(("Arithmetic (estimate)", f"{count(told['flops'])}FLOP"))
    if told.get("peak_memory"):
        found.append(("Peak memory", size(told["peak_memory"])))
    return [*found, ("Time", duration(total(run, "seconds")))]


def time_bar(run: Run) -> Bar | None:
    """Where the seconds went."""
    phases: dict[str, float] = {}
    for round in run.rounds:
        for name, n in round.seconds.items():
            phases[name] = phases.get(name, 0.0) + n
    whole = sum(phases.values())
    if not whole:
        return None
    pieces = [
        (f"c{i % LABELS_SHOWN}", 100 * n / whole, f"{name} {duration(n)}")
        for i, (name, n) in enumerate(sorted(phases.items(), key=lambda item: -item[1]))
    ]
    return Bar("Where the time went", duration(whole), pieces)


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted names."""
    found: list[tuple[str, str]] = []
    for name, item in value.items():
        if isinstance(item, dict):
            found.extend(flatten(item, f"{prefix}{name}."))
        elif prefix or name != "event":
            found.append((f"{prefix}{name}", clean(item, 120)))
    return found


def highlight(recipe: str) -> Markup:
    """The recipe with its keys and comments set apart."""
    lines = []
    for line in recipe.rstrip().splitlines():
        key = re.match(r"(\s*(?:- )?)([\w.]+)(:.*)", line)
        if line.lstrip().startswith("#"):
            lines.append(Markup("<i>{}</i>").format(line))
        else:
            lines.append(Markup("{}<b>{}</b>{}").format(*key.groups()) if key else escape(line))
    return Markup("\n").join(lines)

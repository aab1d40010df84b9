"""Did federating pay? The comparison of a run with its two ends, as rows, plain lines and a terminal's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedfm.core.words import LOSS, Metric, clean, count, duration, listed, number, size

if TYPE_CHECKING:
    from rich.table import Table

ENDS = {"before": "before", "local": "local-only", "federated": "federated", "centralised": "centralised"}


REMEDY = (
    "What may help them: parameters that stay with their owner (personal parts), more rounds, "
    "or another rule (aggregator, server, weights of the mean)."
)


@dataclass(frozen=True)
class Row:
    """A metric of one owner (or of all) under the four ways."""

    name: str
    before: float | None
    local: float | None
    federated: float | None
    centralised: float | None
    metric: Metric = LOSS

    def values(self) -> dict[str, float | None]:
        """By the key of :data:`ENDS`."""
        return {key: getattr(self, key) for key in ENDS}

    @property
    def pays(self) -> bool:
        """Whether this owner does better with the federation than alone."""
        return self.metric.is_better(self.federated, self.local)

    @property
    def loses(self) -> bool:
        """Whether this owner does better alone than with the federation."""
        return self.metric.is_better(self.local, self.federated)

    @property
    def gain(self) -> str:
        """The change against working alone."""
        return self.metric.change(self.local, self.federated)


def headline(compare: Mapping[str, Any]) -> Metric:
    """The metric that leads the comparison."""
    return Metric.from_json(compare.get("headline"))


def owner_rows(compare: Mapping[str, Any]) -> list[Row]:
    """A row per owner, in the order of the comparison: the headline on the owner's own test data."""
    items, metric = compare.get("owners"), headline(compare)
    return [
        _row(str(item.get("owner", "?")), item, metric) for item in (items if isinstance(items, list) else []) if isinstance(item, dict)
    ]


def mean_row(rows: list[Row]) -> Row:
    """Unweighted means, over the owners that have a number."""

    def mean(key: str) -> float | None:
        values = [value for row in rows if (value := row.values()[key]) is not None]
        return sum(values) / len(values) if values else None

    metric = rows[0].metric if rows else LOSS
    return Row("mean of owners", mean("before"), mean("local"), mean("federated"), mean("centralised"), metric)


def pooled(compare: Mapping[str, Any], metric: Metric | None = None) -> Row:
    """A metric on everybody's test data, the headline unless given; ``local`` is the mean over the owners' own models."""
    report, metric = compare.get("pooled"), metric or headline(compare)
    return _row("pooled test", report if isinstance(report, dict) else {}, metric)


def metrics(compare: Mapping[str, Any]) -> list[Row]:
    """A row for each metric on everybody's test data, the headline first."""
    report, first = compare.get("pooled"), headline(compare)
    ways = [way for way in (report if isinstance(report, dict) else {}).values() if isinstance(way, dict)]
    names = dict.fromkeys([first.name, *(str(name) for way in ways for name in way)])
    rows = [pooled(compare, first if name == first.name else Metric(name)) for name in names]
    return [row for row in rows if any(value is not None for value in row.values().values())]


def _row(name: str, ways: Mapping[str, Any], metric: Metric) -> Row:
    before, local, federated, centralised = (_value(ways.get(key), metric.name) for key in ENDS)
    return Row(name, before, local, federated, centralised, metric)


def _value(report: Any, name: str) -> float | None:
    return number(report.get(name)) if isinstance(report, dict) else None


def gap_closed(row: Row) -> float | None:
    """The share of the way from local-only to centralised that federating goes: 1 is as good as pooling the data."""
    if row.local is None or row.federated is None or row.centralised is None or not row.metric.is_better(row.centralised, row.local):
        return None
    return (row.local - row.federated) / (row.local - row.centralised)


def told_of_owners(metric: Metric, report: Mapping[str, Any]) -> str:
    """What an evaluation tells of all owners together, where the channel shows sums alone, and why it tells no more; nothing where it does not."""
    counts = report.get("sums")
    if not isinstance(counts, dict) or not counts.get("owners"):
        return ""
    direction = "or lower" if metric.lower_is_better else "or higher"
    text = f"Of {count(counts['owners'])} owners nine in ten reach a {metric.title} of {metric.show(counts.get('most_reach'))} {direction}"
    text += f" (mean {metric.show(report.get('mean'))}, standard deviation {metric.show(report.get('spread'))})"
    if counts.get("compared"):
        text += f"; {count(counts.get('gained'))} of {count(counts['compared'])} do better than before training"
    return f"{text}. {clean(report.get('missing') or '', 400)}".strip()


def verdict(compare: Mapping[str, Any]) -> str:
    """The comparison in two sentences: on each owner's own test data, and on everybody's. Nothing where numbers are missing."""
    return " ".join(filter(None, (own_verdict(owner_rows(compare)) or sums_verdict(compare), pooled_verdict(compare))))


def sums_verdict(compare: Mapping[str, Any]) -> str:
    """How many owners gain by federating, where it is not told which; nothing where nobody counted."""
    counts, metric = compare.get("sums"), headline(compare)
    if not isinstance(counts, dict) or not counts.get("owners"):
        return ""
    text = f"On own test data {count(counts.get('gain'))} of {count(counts['owners'])} owners gain by federating and {count(counts.get('lose'))} do better alone"
    means = ", ".join(f"{title} {metric.show(_value(counts.get(key), 'mean'))}" for key, title in ENDS.items())
    return f"{text} (mean {metric.title}: {means}). {clean(counts.get('missing') or '', 400)}".strip()


def own_verdict(rows: list[Row]) -> str:
    """Who gains by federating and who loses, each on its own test data; and what to try where somebody loses."""
    known = [row for row in rows if row.local is not None and row.federated is not None]
    if not known:
        return ""
    gain, lose, mean, n = [row for row in known if row.pays], [row for row in known if row.loses], mean_row(known), len(known)
    show = mean.metric.show
    means = f"{mean.metric.title} {show(mean.local)} alone, {show(mean.federated)} federated" + (
        ", in the mean over owners" if n > 1 else ""
    )
    owners = f"the owner {clean(known[0].name, 32)}" if n == 1 else f"{len(lose) if len(lose) > len(gain) else len(gain)} of {n} owners"
    if len(lose) > len(gain):
        does, others = ("does" if n == 1 or len(lose) == 1 else "do"), _others(gain, "gains", "gain")
        better = ", but the mean is better federated" if mean.pays else ""
        return f"On own test data {owners} {does} better alone{others}{better} ({means}). {REMEDY}"
    if not gain and not lose:
        return f"On own test data federating changes nothing ({means})."
    gains = "gains" if n == 1 or len(gain) == 1 else "gain"
    worse = ", but the mean is worse" if mean.loses else ""
    text = f"On own test data {owners} {gains} by federating{_others(lose, 'loses', 'lose')}{worse} ({means})."
    return f"{text} {REMEDY}" if lose else text


def _others(rows: list[Row], one: str, many: str) -> str:
    return f"; {listed([row.name for row in rows])} {one if len(rows) == 1 else many}" if rows else ""


def pooled_verdict(compare: Mapping[str, Any]) -> str:
    """How the models do on everybody's test data."""
    row = pooled(compare)
    if row.local is None or row.federated is None:
        return ""
    show = row.metric.show
    text = f"On everybody's test data, models tuned alone reach {row.metric.title} {show(row.local)} on average, the federated one {show(row.federated)}"
    if row.centralised is not None:
        text += f", one tuned on all data in one place {show(row.centralised)}"
    if not row.pays:
        return text + (": federating did not pay there." if row.loses else ".")
    closed = gap_closed(row)
    if closed is None:
        return f"{text}."
    # Beyond the end that it is measured against, a share says nothing.
    return text + (": federating does better than both." if closed > 1 else f": federating closes {100 * closed:.0f} % of the gap.")


def everybody(compare: Mapping[str, Any]) -> str:
    """On how much of everybody's test data the models were scored, where that is not all, and how exact that is."""
    sample, metric = compare.get("everybody"), headline(compare)
    sample = sample if isinstance(sample, dict) else {}
    examples, of = number(sample.get("examples")), number(sample.get("of"))
    if examples is None or of is None or examples >= of:
        return ""
    errors = sample.get("error")
    known = [(ENDS[key], _value(errors, key)) for key in ENDS]
    exact = ", ".join(f"{title} {metric.show(error)}" for title, error in known if error is not None)
    text = f"Pooled test: {count(examples)} of {count(of)} examples, the same for all models"
    return text + (f"; standard error: {exact}" if exact else "") + ". evaluate.max_examples=null scores all on all."


def travelled(compare: Mapping[str, Any]) -> str:
    """What crossed the owners' walls, or nothing where it is not known."""
    report = compare.get("travelled")
    traffic = report if isinstance(report, dict) else {}
    up, down, full = (number(traffic.get(key)) for key in ("bytes_up", "bytes_down", "bytes_if_full_model"))
    if up is None and down is None:
        return ""
    text = f"{size(up)} up and {size(down)} down"
    total = (up or 0) + (down or 0)
    return text + (f"; sending the whole model would have been {size(full)} ({full / total:,.0f} times as much)" if full and total else "")


def curve(compare: Mapping[str, Any], end: str, metric: Metric) -> list[tuple[float, float | None]]:
    """A metric by round of an end (``local``, ``centralised``) while it trained; nothing where it was not scored."""
    curves = compare.get("curves")
    points = curves.get(end) if isinstance(curves, dict) else None
    known = [point for point in (points if isinstance(points, list) else []) if isinstance(point, dict)]
    return [(number(point.get("round")) or 0.0, _value(point.get("pooled"), metric.name)) for point in known]


SPENT = {
    "federated": "federated run",
    "local": "each owner alone",
    "centralised": "all data in one place",
    "curves": "learning curves of these two",
    "evaluate": "scores of all",
}


def spent(compare: Mapping[str, Any]) -> str:
    """Where the time of the comparison went, or nothing where it is not known."""
    seconds = compare.get("seconds")
    known = {key: number(seconds.get(key)) for key in SPENT} if isinstance(seconds, dict) else {}
    return ", ".join(f"{SPENT[key]} {duration(value)}" for key, value in known.items() if value is not None)


def _sections(compare: Mapping[str, Any], limit: int) -> tuple[list[Row], int, list[Row]]:
    rows = owner_rows(compare)
    last = ([mean_row(rows)] if len(rows) > 1 else []) + [pooled(compare)]
    return rows[:limit], max(0, len(rows) - limit), [row for row in last if any(value is not None for value in row.values().values())]


def comparison_lines(compare: Mapping[str, Any], limit: int = 20) -> list[str]:
    """The comparison as aligned text: the headline per owner, its mean, the pooled test, the verdict, what travelled.

    Args:
        limit: Owners shown at most.
    """
    shown, rest, last = _sections(compare, limit)
    metric = headline(compare)
    width = max([len(metric.title), *(len(clean(row.name, 32)) for row in [*shown, *last])])
    head = f"{metric.title:<{width}}" + "".join(f"{title:>13}" for title in ENDS.values())

    def line(row: Row) -> str:
        return f"{clean(row.name, 32):<{width}}" + "".join(f"{metric.show(value):>13}" for value in row.values().values())

    lines = [head, *map(line, shown)] if shown or last else []
    if rest:
        lines.append(f"and {rest} more owners")
    if last:
        lines += ["-" * len(head), *map(line, last)]
    return lines + _remarks(compare)


def _remarks(compare: Mapping[str, Any]) -> list[str]:
    """What is said below the table, a line each."""
    moved, time = travelled(compare), spent(compare)
    verdicts = (own_verdict(owner_rows(compare)) or sums_verdict(compare), pooled_verdict(compare))
    return [text for text in (*verdicts, everybody(compare), moved and f"Travelled: {moved}.", time and f"Time: {time}.") if text]


def show_comparison(compare: Mapping[str, Any]) -> None:
    """Prints it: a table on a terminal, plain lines anywhere else."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(comparison_table(compare))
    else:
        print("\n".join(comparison_lines(compare)))


def comparison_table(compare: Mapping[str, Any], limit: int = 20) -> Table:
    """The comparison for a terminal, with the change that federating brought each owner over working alone."""
    from rich.table import Table
    from rich.text import Text

    shown, rest, last = _sections(compare, limit)
    metric = headline(compare)
    table = Table(
        title=f"Held-out {metric.title}",
        caption=Text("\n".join(_remarks(compare))),
        caption_justify="left",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("owner", no_wrap=True)
    for title in ENDS.values():
        table.add_column(title, justify="right", no_wrap=True, style="bold" if title == "federated" else "")
    table.add_column("against alone", justify="right", no_wrap=True)
    for rows in (shown, last):
        for row in rows:
            gain = Text(row.gain, "green" if row.pays else "red" if row.loses else "dim")
            table.add_row(
                Text(clean(row.name, 32)), *(Text(metric.show(value)) for value in row.values().values()), gain, end_section=row is rows[-1]
            )
        if rows is shown and rest:
            table.add_row(Text(f"and {rest} more owners", "dim"))
    return table

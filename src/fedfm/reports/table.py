"""Did federating pay? The comparison of a run with its two ends, as rows, plain lines and a terminal's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedfm.core.words import change, clean, loss, number, size

if TYPE_CHECKING:
    from rich.table import Table

ENDS = {"before": "before", "local": "local-only", "federated": "federated", "centralised": "centralised"}


@dataclass(frozen=True)
class Row:
    """Losses of one owner (or of all) under the four ways."""

    name: str
    before: float | None
    local: float | None
    federated: float | None
    centralised: float | None

    def values(self) -> dict[str, float | None]:
        """By the key of :data:`ENDS`."""
        return {key: getattr(self, key) for key in ENDS}

    @property
    def pays(self) -> bool:
        """Whether this owner does better with the federation than alone."""
        return self.federated is not None and self.local is not None and self.federated < self.local


def owner_rows(compare: Mapping[str, Any]) -> list[Row]:
    """A row per owner, in the order of the comparison."""
    items = compare.get("owners")
    return [
        Row(str(item.get("owner", "?")), *(number(item.get(key)) for key in ENDS))
        for item in (items if isinstance(items, list) else [])
        if isinstance(item, dict)
    ]


def mean_row(rows: list[Row]) -> Row:
    """Unweighted means, over the owners that have a number."""

    def mean(key: str) -> float | None:
        values = [value for row in rows if (value := row.values()[key]) is not None]
        return sum(values) / len(values) if values else None

    return Row("mean of owners", *(mean(key) for key in ENDS))


def pooled(compare: Mapping[str, Any], metric: str = "loss") -> Row:
    """A metric on everyone's test data; ``local`` is the mean over the owners' own models."""
    report = compare.get("pooled")
    told = {key: (report.get(key) if isinstance(report, dict) else None) for key in ENDS}
    return Row("pooled test", *(number(item.get(metric)) if isinstance(item, dict) else None for item in told.values()))


def gap_closed(row: Row) -> float | None:
    """The share of the way from local-only to centralised that federating goes: 1 is as good as pooling the data."""
    if row.local is None or row.federated is None or row.centralised is None or row.local <= row.centralised:
        return None
    return (row.local - row.federated) / (row.local - row.centralised)


def verdict(compare: Mapping[str, Any]) -> str:
    """The comparison in a sentence, or nothing where numbers are missing."""
    row = pooled(compare)
    if row.local is None or row.federated is None:
        return ""
    if row.federated >= row.local:
        return f"Federating did not pay here: on the pooled test, models tuned alone reach {loss(row.local)} on average, the federated one {loss(row.federated)}."
    closed, text = (
        gap_closed(row),
        f"On the pooled test, models tuned alone reach {loss(row.local)} on average, the federated one {loss(row.federated)}",
    )
    if row.centralised is None:
        return text + "."
    text += f", one tuned on all data in one place {loss(row.centralised)}"
    return text + ("." if closed is None else f": federating closes {100 * closed:.0f} % of the gap.")


def travelled(compare: Mapping[str, Any]) -> str:
    """What crossed the owners' walls, or nothing where it is not known."""
    told = compare.get("travelled")
    told = told if isinstance(told, dict) else {}
    up, down, full = (number(told.get(key)) for key in ("bytes_up", "bytes_down", "bytes_if_full_model"))
    if up is None and down is None:
        return ""
    text = f"{size(up)} up and {size(down)} down"
    total = (up or 0) + (down or 0)
    return text + (f"; sending the whole model would have been {size(full)} ({full / total:,.0f} times as much)" if full and total else "")


def _sections(compare: Mapping[str, Any], limit: int) -> tuple[list[Row], int, list[Row]]:
    rows = owner_rows(compare)
    last = ([mean_row(rows)] if len(rows) > 1 else []) + [pooled(compare)]
    return rows[:limit], max(0, len(rows) - limit), [row for row in last if any(value is not None for value in row.values().values())]


def comparison_lines(compare: Mapping[str, Any], limit: int = 20) -> list[str]:
    """The comparison as aligned text: losses per owner, their mean, the pooled test, the verdict, what travelled.

    Args:
        limit: Owners shown at most.
    """
    shown, rest, last = _sections(compare, limit)
    width = max([len("loss"), *(len(clean(row.name, 32)) for row in [*shown, *last])])
    head = f"{'loss':<{width}}" + "".join(f"{title:>13}" for title in ENDS.values())

    def line(row: Row) -> str:
        return f"{clean(row.name, 32):<{width}}" + "".join(f"{loss(value):>13}" for value in row.values().values())

    lines = [head, *map(line, shown)] if shown or last else []
    if rest:
        lines.append(f"and {rest} more owners")
    if last:
        lines += ["-" * len(head), *map(line, last)]
    if verdict(compare):
        lines.append(verdict(compare))
    if travelled(compare):
        lines.append(f"Travelled: {travelled(compare)}.")
    return lines


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
    caption = "\n".join(filter(None, (verdict(compare), travelled(compare) and f"Travelled: {travelled(compare)}.")))
    table = Table(
        title="Held-out loss",
        caption=caption,
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
            gain = Text(
                change(row.local, row.federated),
                "green" if row.pays else "red" if row.federated is not None and row.local is not None else "dim",
            )
            table.add_row(
                Text(clean(row.name, 32)), *(Text(loss(value)) for value in row.values().values()), gain, end_section=row is rows[-1]
            )
        if rows is shown and rest:
            table.add_row(Text(f"and {rest} more owners", "dim"))
    return table

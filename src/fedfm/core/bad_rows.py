"""Rows that cannot be used: how many of each kind, where the first ones are, and whose they are as far as that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from fedfm.core import words
from fedfm.core.errors import RowError

KINDS: Mapping[str, str] = {
    "unreadable": "that cannot be read",
    "owner": "without an owner",
    "label": "without a label",
    "unknown_label": "with a label that is not among the classes",
    "type": "with a value of the wrong type",
    "column": "without a column that the task reads",
    "text": "without text",
}
"""What can be wrong with a row, and how a sentence says it."""
HARMLESS = frozenset({"text"})
"""Kinds that stop nothing: where there is no text there is nothing to learn, so that leaving the row out is the only thing it can mean."""
_PLACES = 3


@dataclass
class BadRows:
    """A count of rows that cannot be used.

    Args:
        num_rows: Rows that were read, good and bad.
        counts: Bad rows of each kind.
        places: Where the first ones of each kind were read.
        reasons: What is wrong with the first one of each kind, in full.
        owners: Bad rows of each kind, for each owner that the bad row itself names.
    """

    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    owners: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, error: RowError, owner: str | None = None) -> None:
        """Counts one."""
        self.counts[error.kind] += 1
        self.reasons.setdefault(error.kind, str(error))
        places = self.places.setdefault(error.kind, [])
        if len(places) < _PLACES:
            places.append(error.place)
        if owner is not None:
            self.owners.setdefault(owner, Counter())[error.kind] += 1

    @property
    def stops(self) -> bool:
        """Whether there is one that ``bad_rows: stop`` does not let pass."""
        return bool(self.counts.keys() - HARMLESS)

    def to_json(self) -> dict[str, Any]:
        """As kept with the prepared data and in a run's journal. The reasons quote values of rows, and are not kept."""
        # A copy of the files elsewhere is the same data, so their folder is not kept.
        places = {kind: [PurePath(place).name for place in many] for kind, many in self.places.items()}
        owners = {owner: dict(kinds) for owner, kinds in sorted(self.owners.items())}
        return {"rows": self.num_rows, "counts": dict(self.counts), "places": places, "owners": owners}

    @staticmethod
    def from_json(value: Any) -> BadRows:
        """Undoes :meth:`to_json`, as far as it is what that wrote."""
        value = _mapping(value)
        places = {
            str(kind): [str(place) for place in many] for kind, many in _mapping(value.get("places")).items() if isinstance(many, list)
        }
        owners = {str(owner): _counts(kinds) for owner, kinds in _mapping(value.get("owners")).items()}
        return BadRows(int(words.number(value.get("rows")) or 0), _counts(value.get("counts")), places, {}, owners)

    def sentence(self) -> str:
        """``5 of 120 rows are left out: 3 without an owner (a.csv:2, a.csv:5, a.csv:9), 2 without text (a.csv:7, a.csv:8)``; empty if there are none."""
        if not self.counts.total():
            return ""
        kinds = ", ".join(
            f"{_kind(kind, n)} ({self._shown(kind)})" if self.places.get(kind) else _kind(kind, n) for kind, n in self._sorted()
        )
        return f"{self.counts.total()} of {self.num_rows} rows {'is' if self.counts.total() == 1 else 'are'} left out: {kinds}"

    def refusal(self) -> str:
        """Why nothing was prepared: every kind with its number, its first places and what is wrong with the first."""
        lines = [f"- {_kind(kind, n)}: {self.reasons[kind]}{self._others(kind)}" for kind, n in self._sorted()]
        total = self.counts.total()
        return "\n".join(
            [
                f"{total} of {self.num_rows} rows cannot be used, so nothing was prepared:",
                *lines,
                "Mend or remove them. Or set data.bad_rows=skip, which leaves them out and shows their numbers.",
            ]
        )

    def of(self, owner: str) -> str:
        """``2 without a label, 1 without text``: what is wrong with the rows of one owner; empty if nothing is."""
        return counted(self.owners.get(owner, {}))

    def _sorted(self) -> list[tuple[str, int]]:
        order = list(KINDS)
        return sorted(self.counts.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))

    def _shown(self, kind: str) -> str:
        places = self.places[kind]
        more = self.counts[kind] - len(places)
        return ", ".join(places) + (f" and {more} more" if more > 0 else "")

    def _others(self, kind: str) -> str:
        places = self.places[kind][1:]
        more = self.counts[kind] - 1 - len(places)
        return (f" Also {', '.join(places)}{f' and {more} more' if more > 0 else ''}.") if places else ""


def counted(counts: Mapping[str, int]) -> str:
    """``2 without a label, 1 without text``."""
    return ", ".join(_kind(kind, counts[kind]) for kind in KINDS if counts.get(kind))


def _kind(kind: str, number: int) -> str:
    return f"{number} {KINDS.get(kind, kind)}"


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _counts(value: Any) -> Counter[str]:
    numbers = {str(kind): words.number(n) for kind, n in _mapping(value).items()}
    return Counter({kind: int(n) for kind, n in numbers.items() if n is not None and n > 0})

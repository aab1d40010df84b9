"""What the server knows of the owners: who they are, and the numbers that each gives of its data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedfm.core.messages import ClientId


@dataclass(frozen=True)
class Holding:
    """What one owner tells of its data; ``None`` where it withholds a number.

    Args:
        train: Training examples.
        test: Held-out examples.
        tokens: Tokens of the training examples.
        labels: Training examples of each class that it has.
    """

    train: int | None = None
    test: int | None = None
    tokens: int | None = None
    labels: Mapping[str, int] | None = None

    def note(self) -> dict[str, Any]:
        """The fields by name. Thousands of owners have one, so nothing is copied."""
        return dict(vars(self))


@dataclass(frozen=True)
class Roster:
    """Who takes part.

    Args:
        ids: Everyone registered, in a fixed order.
        holdings: What each owner tells; nothing of an owner whose channel shows sums alone.
        totals: What all of them have together, where every owner tells or the channel adds it up.
    """

    ids: tuple[ClientId, ...]
    holdings: Mapping[ClientId, Holding] = field(default_factory=dict)
    totals: Holding = field(default_factory=Holding)

    def sizes(self) -> list[int]:
        """Training examples of each owner who tells them."""
        return [holding.train for holding in self.holdings.values() if holding.train is not None]

    def withholds(self, what: str) -> list[ClientId]:
        """Owners who do not tell their ``counts`` or ``labels``, though the channel would show them."""
        name = {"counts": "train", "labels": "labels"}[what]
        return [client for client, holding in self.holdings.items() if getattr(holding, name) is None]

    def picture(self) -> list[dict[str, Any]]:
        """The split as rows to print or plot: ``owner``, ``train``, ``test``, ``tokens``, ``labels``; null where an owner withholds it."""
        nothing = Holding()
        return [{"owner": client, **self.holdings.get(client, nothing).note()} for client in self.ids]

    def note(self) -> dict[str, Any]:
        """The roster in plain values, to be kept with a run. Only owners whose channel shows more than sums have an entry in ``holdings``."""
        holdings = {client: holding.note() for client, holding in self.holdings.items()}
        return {"ids": list(self.ids), "holdings": holdings, "totals": self.totals.note()}

    @staticmethod
    def from_note(note: Mapping[str, Any]) -> Roster:
        """Undoes :meth:`note`."""
        holdings = {client: Holding(**values) for client, values in note["holdings"].items()}
        return Roster(tuple(note["ids"]), holdings, Holding(**note["totals"]))


def total_of(holdings: Iterable[Holding]) -> Holding:
    """What all owners have together; a number that one owner withholds is ``None``."""
    known = list(holdings)

    def total(name: str) -> int | None:
        values = [getattr(holding, name) for holding in known]
        return None if None in values else sum(values)

    histograms = [holding.labels for holding in known]
    labels: dict[str, int] | None = {}
    for histogram in histograms:
        if histogram is None or labels is None:
            labels = None
            continue
        for label, count in histogram.items():
            labels[label] = labels.get(label, 0) + count
    return Holding(total("train"), total("test"), total("tokens"), labels)


def count(value: float) -> int | None:
    """A count as an integer; ``None`` for NaN, which stands for a withheld count."""
    return None if math.isnan(value) else int(value)

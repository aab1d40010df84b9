"""What a client has spent for good: privacy, mask contexts, answers that its owner's policy counts. Append-only, synced before anything leaves, never rolled back.

On disk it is ``<folder>/clients/<slug>/spent.jsonl``, a line for each expense, in a chain (:mod:`fedfm.core.chain`). A line that a crash cut
short was never synced, so nothing left on its account, and it is dropped; one that lacks its newline alone is taken as spent. Covered here: damage, and lines that were changed, moved,
put in, or taken out from among others. Not covered: an owner who puts back an older copy of the file, cuts off its last lines or deletes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfm.client.memory import home
from fedfm.core.chain import Chain, digest_of
from fedfm.core.errors import RunError
from fedfm.core.messages import ClientId
from fedfm.core.parts import Spent


class SpentStore:
    """What one or more clients have spent.

    Args:
        folder: The run's folder; ``None`` keeps it in this process, for as long as it lives.

    Example:
        >>> store = SpentStore(None)
        >>> store.of("alice").add("queries", 2)
        >>> store.of("alice").total("queries"), store.of("bob").total("queries")
        (2.0, 0.0)
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._chains: dict[ClientId, Chain] = {}

    def of(self, client: ClientId) -> Spent:
        """One client's account."""
        return _Account(self, client)

    def entries(self, client: ClientId) -> list[tuple[str, float]]:
        """Every expense, oldest first.

        Raises:
            RunError: if the file was changed by something else.
        """
        return [(_text(line.what), _amount(line.what)) for line in self._chain(client).lines()]

    def add(self, client: ClientId, what: str, amount: float) -> None:
        """Writes an expense down; durable when this returns.

        Raises:
            RunError: if it is no finite number of 0 or more, the file was changed by something else, or it cannot be written.
        """
        if not (amount >= 0 and math.isfinite(amount)):
            raise RunError(f"Client {client!r} cannot spend {amount} of {what}; an expense is a finite number, 0 or more.")
        self._chain(client).add("spent", what=what, amount=float(amount))

    def _chain(self, client: ClientId) -> Chain:
        if client not in self._chains:
            path = None if self.folder is None else home(self.folder, client) / "spent.jsonl"
            # Another client's file is not taken for this one's.
            self._chains[client] = Chain(path, _changed, digest_of("spent", client.encode()))
        return self._chains[client]


@dataclass(frozen=True)
class _Account(Spent):
    store: SpentStore
    client: ClientId

    def add(self, what: str, amount: float) -> None:
        self.store.add(self.client, what, amount)

    def total(self, what: str) -> float:
        return math.fsum(amount for name, amount in self.store.entries(self.client) if name == what)

    def names(self) -> Iterator[str]:
        return (name for name, _ in self.store.entries(self.client))


def _text(what: Any) -> str:
    return str(what.get("what"))


def _amount(what: Any) -> float:
    amount = what.get("amount")
    return float(amount) if isinstance(amount, int | float) else math.inf


def _changed(path: Path, line: int, why: str) -> RunError:
    return RunError(
        f"{path}, line {line}: this account was changed by something else than fedfm ({why}). What was spent is not known any more, "
        "so nothing leaves this house. Restore the file from a copy."
    )

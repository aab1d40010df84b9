"""What a client has spent for good: privacy, mask contexts, quotas. Append-only, synced before anything leaves, never rolled back.

On disk it is ``<folder>/clients/<slug>/spent.jsonl``, a line for each expense, each with a digest of all before it. A line that a crash cut
short was never synced, so nothing left on its account, and it is dropped; one that lacks its newline alone is taken as spent. Covered here: damage, and lines that were changed, moved,
put in, or taken out from among others. Not covered: an owner who puts back an older copy of the file, cuts off its last lines or deletes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfm.client.memory import home
from fedfm.core import disk
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
        self._held: dict[ClientId, list[tuple[str, float]]] = {}

    def of(self, client: ClientId) -> Spent:
        """One client's account."""
        return _Account(self, client)

    def entries(self, client: ClientId) -> list[tuple[str, float]]:
        """Every expense, oldest first.

        Raises:
            RunError: if the file was changed by something else.
        """
        if self.folder is None:
            return list(self._held.get(client, []))
        return [(line["what"], line["amount"]) for line in self._lines(client)[0]]

    def add(self, client: ClientId, what: str, amount: float) -> None:
        """Writes an expense down; durable when this returns."""
        if not (amount >= 0 and math.isfinite(amount)):
            raise RunError(f"Client {client!r} cannot spend {amount} of {what}; an expense is a finite number, 0 or more.")
        if self.folder is None:
            self._held.setdefault(client, []).append((what, float(amount)))
            return
        lines, size = self._lines(client)
        if size is not None:
            # What follows must begin on a line of its own.
            disk.cut(self._path(client), size, b"\n" if size else b"")
        before = lines[-1]["digest"] if lines else ""
        entry = {"what": what, "amount": float(amount)}
        disk.append(self._path(client), json.dumps({**entry, "digest": _digest(before, client, entry)}))

    def _path(self, client: ClientId) -> Path:
        assert self.folder is not None
        return home(self.folder, client) / "spent.jsonl"

    def _lines(self, client: ClientId) -> tuple[list[dict[str, Any]], int | None]:
        """The complete lines, and how many bytes they take without the last newline; ``None`` where there is no file."""
        path = self._path(client)
        try:
            *complete, rest = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], None
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error}. Nothing leaves this house until it can.") from error
        if _is_object(rest):
            # Only its newline is missing or changed. An expense is rather counted too often than forgotten.
            complete.append(rest)
        lines: list[dict[str, Any]] = []
        for i, text in enumerate(complete, 1):
            line = _checked(lines[-1]["digest"] if lines else "", client, text)
            if line is None:
                raise _changed(path, i)
            lines.append(line)
        return lines, max(sum(len(text) + 1 for text in complete) - 1, 0)


@dataclass(frozen=True)
class _Account(Spent):
    store: SpentStore
    client: ClientId

    def add(self, what: str, amount: float) -> None:
        self.store.add(self.client, what, amount)

    def total(self, what: str) -> float:
        return math.fsum(amount for name, amount in self.store.entries(self.client) if name == what)


def _is_object(text: bytes) -> bool:
    """Whether a whole JSON object stands at the beginning."""
    try:
        json.JSONDecoder().raw_decode(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _checked(before: str, client: ClientId, text: bytes) -> dict[str, Any] | None:
    """A line of the file; ``None`` where it is not what was written after ``before``."""
    try:
        line = json.loads(text)
        entry = {"what": str(line["what"]), "amount": float(line["amount"])}
        if line["digest"] != _digest(before, client, entry):
            return None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    return {**entry, "digest": line["digest"]}


def _digest(before: str, client: ClientId, entry: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps([before, client, entry["what"], entry["amount"]]).encode(), digest_size=16).hexdigest()


def _changed(path: Path, line: int) -> RunError:
    return RunError(
        f"{path}, line {line}: this account was changed by something else than fedfm. What was spent is not known any more, "
        "so nothing leaves this house. Restore the file from a copy."
    )

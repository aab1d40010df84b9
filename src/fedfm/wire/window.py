"""Whether a message is new: replays, duplicates, late and early ones are dropped and counted.

Each message has an id. The window remembers an id until the message has expired, when nobody would take it anyway, so its memory is bounded by
how much each sender may send in that time. With a file it remembers over a restart: a replay is a replay then, too.

Delivery is at least once, so taking is in two steps. ``check`` says whether a message is to be worked on. ``take`` remembers it, durably, when its
work is done. A message that was checked and not taken, because the process was killed in between, is delivered and worked on again.

Covered here: the same message twice, the same answer in two messages, a round that is over or has not begun, a run that does not exist, one
sender that floods. Not covered: a clock that is set back by more than the time since the last message (what was forgotten stays refused).
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fedfm.core import disk
from fedfm.core.errors import MessageError, RunError
from fedfm.wire.envelope import SKEW, Header
from fedfm.wire.refusal import Refused, reason
from fedfm.wire.subjects import require_name

# Messages of one sender that are remembered at a time.
_MOST = 50_000
_COMPACT = 4 * _MOST
# Seconds between two looks at all that a sender has sent.
_SWEEP = 60.0


class Window:
    """What has arrived already, and what is waited for.

    Args:
        path: Where it is remembered over a restart; ``None`` for nowhere.
        any_job: Whether messages of jobs that nobody has opened are taken: at a member, to whom a request is the first that it hears of a job.
        skew: Seconds by which clocks may differ.
        most: Messages of one sender that are remembered at a time; more are refused.
        now: Seconds since 1970.

    Raises:
        RunError: if the file is not what a window wrote.
    """

    def __init__(
        self,
        path: Path | None = None,
        any_job: bool = False,
        skew: float = SKEW,
        most: int = _MOST,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._any_job, self._skew, self._most, self._now = path, any_job, skew, most, now
        self._jobs: dict[str, tuple[int, float]] = {}
        # For each sender, what it has sent, and until when that is remembered.
        self._taken: dict[str, dict[str, float]] = {}
        self._horizon, self._lines, self._swept = -math.inf, 0, -math.inf
        self.counts: Counter[str] = Counter()
        if path is not None:
            self._load(path)

    def open(self, job: str, first: int = 0, last: float = math.inf) -> None:
        """Takes messages of these rounds of a job from now on; earlier ones are late, later ones early."""
        self._jobs[job] = (first, last)

    def close(self, job: str) -> None:
        """Takes no messages of a job from now on."""
        self._jobs.pop(job, None)

    def check(self, header: Header) -> None:
        """Refuses, and counts, a message that is not to be worked on.

        Raises:
            Refused: if it was taken before, its round is over or has not begun, or there is no such job.
        """
        try:
            self._check(header)
        except Refused as error:
            self.count(error)
            raise

    def count(self, error: MessageError) -> None:
        """Counts a message that was refused elsewhere: not signed, not a member's, expired."""
        self.counts[reason(error)] += 1

    def take(self, *headers: Header) -> None:
        """Remembers messages whose work is done, durably where the window has a file.

        Raises:
            RunError: if the file cannot be written.
        """
        lines = []
        for header in headers:
            until = header.expires + self._skew
            for name in (header.id, _errand(header)):
                self._taken.setdefault(header.sender, {})[name] = until
                lines.append(json.dumps([header.sender, name, until]))
        self._forget()
        if self._path is not None and lines:
            disk.append(self._path, "\n".join(lines))
            self._lines += len(lines)
            if self._lines > _COMPACT and self._lines > 4 * sum(map(len, self._taken.values())):
                self._compact(self._path)

    @property
    def size(self) -> int:
        """How much is remembered: two entries for each message."""
        return sum(map(len, self._taken.values()))

    def _check(self, header: Header) -> None:
        self._forget()
        taken = self._taken.get(header.sender, {})
        if header.id in taken:
            raise Refused("replay", f"A message of {header.sender} arrived again.")
        if header.expires + self._skew <= self._horizon:
            raise Refused("expired", f"A message of {header.sender} expired before the clock was set back.")
        if _errand(header) in taken:
            raise Refused(
                "duplicate",
                f"{header.sender} sent its {header.kind} {header.sequence} of round {header.round} of {header.job} a second time.",
            )
        if len(taken) >= 2 * self._most and len(self._sweep(header.sender)) >= 2 * self._most:
            raise Refused("flood", f"{header.sender} sent more than {self._most} messages that have not expired.")
        if header.job not in self._jobs:
            if not self._any_job:
                raise Refused("job", f"{header.sender} sent a {header.kind} of the job {header.job}, which is not running.")
            return
        first, last = self._jobs[header.job]
        if header.round < first:
            raise Refused("late", f"{header.sender} sent a {header.kind} of round {header.round} of {header.job}; round {first} has begun.")
        if header.round > last:
            raise Refused("early", f"{header.sender} sent a {header.kind} of round {header.round} of {header.job}, which has not begun.")

    def _forget(self) -> None:
        now = self._now()
        for sender, taken in list(self._taken.items()):
            # The first is as old as any, because they are added as they come; a few later ones may wait for it.
            expired = []
            for name, until in taken.items():
                if until >= now:
                    break
                expired.append(name)
            for name in expired:
                self._horizon = max(self._horizon, taken.pop(name))
            if not taken:
                del self._taken[sender]

    def _sweep(self, sender: str) -> dict[str, float]:
        """What is remembered of a sender, without what has expired behind something that lasts longer."""
        now, taken = self._now(), self._taken[sender]
        # Looking at all of them for every message of a flood would help the flood.
        if abs(now - self._swept) > _SWEEP:
            self._swept = now
            for name in [name for name, until in taken.items() if until < now]:
                self._horizon = max(self._horizon, taken.pop(name))
        return taken

    def _load(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}.") from error
        *lines, unfinished = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            sender, name, until = _entry(path, number, line)
            self._taken.setdefault(sender, {})[name] = until
            if not name:
                self._horizon = max(self._horizon, until)
        self._taken.pop(_HORIZON, None)
        self._forget()
        self._lines = len(lines)
        if unfinished or len(lines) > 2 * self.size:
            self._compact(path)

    def _compact(self, path: Path) -> None:
        entries: list[list[object]] = [[sender, name, until] for sender, taken in self._taken.items() for name, until in taken.items()]
        horizon: list[list[object]] = [[_HORIZON, "", self._horizon]] if math.isfinite(self._horizon) else []
        disk.write_lines(path, (json.dumps(entry) for entry in [*horizon, *entries]))
        self._lines = len(entries)


# No member has this name.
_HORIZON = "_horizon"


def _errand(header: Header) -> str:
    return f"{header.job} {header.kind} {header.round} {header.sequence}"


def _entry(path: Path, number: int, line: bytes) -> tuple[str, str, float]:
    try:
        sender, name, until = json.loads(line)
        if sender != _HORIZON:
            require_name(sender)
        if not isinstance(name, str) or isinstance(until, bool) or not isinstance(until, int | float) or not math.isfinite(until):
            raise ValueError("a field is of the wrong kind")
    except (ValueError, TypeError, RecursionError, MessageError) as error:
        raise RunError(
            f"{path}:{number} is damaged: {error}. It says which messages were taken, so nothing is received without it. Restore the file from a copy."
        ) from error
    return sender, name, float(until)

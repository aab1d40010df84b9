"""The journal: what happened in a run, a line for each event, never rewritten.

Its lines are a chain (:mod:`fedfm.core.chain`), so a changed, missing, repeated or moved line is noticed when the file is read, and refused:
what a run would go on with must be what it wrote. A line that a crash left unfinished is dropped. Rounds after the one that a ``resume`` line names are void.

Covered here: damage of any kind to lines that something follows, and to the last one. Not covered: somebody who writes the file with digests
of his own, and lines cut off the end; :func:`fedfm.run.folder.read_journal` notices those by the states and metrics beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfm.core import chain, disk
from fedfm.core.chain import Line
from fedfm.core.errors import RunError
from fedfm.core.score import Score

_KEPT = ("start", "recipe", "base", "data", "roster")


@dataclass(frozen=True)
class Mark:
    """Where a round's line lies, the digest of the state that it commits to, and how good that is."""

    round: int
    begin: int
    end: int
    state: str
    score: Score


def lines(path: Path) -> Iterator[Line]:
    """The lines one at a time, each checked; an unfinished last one is left out.

    Raises:
        RunError: naming the first line that is not what a run wrote.
    """
    for line in chain.lines(path, damaged):
        _require(path, line.number, line.what)
        yield line


def _require(path: Path, number: int, what: Mapping[str, Any]) -> None:
    wrong = _wrong(what)
    if wrong is not None:
        raise damaged(path, number, wrong)


@dataclass
class Journal:
    """What a run needs of its journal to go on. It takes little memory, however many rounds and owners there are.

    Attributes:
        first: The first line of each kind that is written once (``start``, ``recipe``, ``base``, ``data``, ``roster``).
        choices: What was chosen for the whole run (the bank's size).
        rounds: The rounds that hold, in order; round ``i`` is ``rounds[i]``.
        ended: Whether the model of the last round was written.
        size: Bytes up to the end of the last complete line.
    """

    path: Path
    first: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    choices: dict[str, int] = field(default_factory=dict)
    rounds: list[Mark] = field(default_factory=list)
    ended: bool = False
    size: int = 0
    num_lines: int = 0
    _digest: str = ""

    @staticmethod
    def read(path: Path) -> Journal:
        """The journal in a file; an empty one where there is none.

        Raises:
            RunError: naming the first line that is not what a run wrote.
        """
        journal = Journal(path)
        for line in lines(path):
            journal._take(line)
        return journal

    def add(self, event: str, **what: Any) -> None:
        """Adds a line, durably.

        Raises:
            RunError: if it cannot be written.
        """
        entry = {"event": event, **what}
        wrong = _wrong(entry)
        assert wrong is None, wrong
        text, digest = chain.sealed(self._digest, entry)
        disk.append(self.path, text)
        begin = self.size + 1 if self.size else 0
        self._take(Line(self.num_lines + 1, begin, begin + len(text.encode()), digest, entry))

    def mend(self) -> None:
        """Cuts off what a crash left of an unfinished line, so that the next one begins on a line of its own.

        Raises:
            RunError: if the file cannot be written.
        """
        if self.path.exists():
            disk.cut(self.path, self.size, b"\n" if self.size else b"")

    def line(self, mark: Mark) -> Mapping[str, Any]:
        """What a round's line says.

        Raises:
            RunError: if the file has changed since it was read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(mark.begin)
                what = chain.parsed(self.path, mark.round, file.read(mark.end - mark.begin), damaged)
                _require(self.path, mark.round, what)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}.") from error
        if what["event"] != "round" or what["round"] != mark.round:
            raise RunError(f"{self.path} was changed by something else while it was in use. Restore it from a copy.")
        return what

    def records(self, last: int) -> Iterator[Mapping[str, Any]]:
        """The record of each round up to ``last``, one at a time."""
        for mark in self.rounds[: last + 1]:
            yield self.line(mark)["record"]

    @property
    def scores(self) -> list[Score]:
        """The score of each round that holds, in order."""
        return [mark.score for mark in self.rounds]

    def _take(self, line: Line) -> None:
        what, number = line.what, line.number
        if number == 1 and line.event != "start":
            raise damaged(self.path, number, f"a run begins with 'start', not {line.event!r}")
        if line.event in _KEPT:
            self.first.setdefault(line.event, what)
        elif line.event == "plan":
            self.choices.update({name: value for name, value in what.items() if name != "event"})
        elif line.event == "round":
            if what["round"] != len(self.rounds):
                raise damaged(self.path, number, f"it tells of round {what['round']}, where round {len(self.rounds)} was next")
            score = Score.of(what["round"], what["record"]["metrics"])
            self.rounds.append(Mark(what["round"], line.begin, line.end, what["state"], score))
        elif line.event == "resume":
            if what["round"] > max(len(self.rounds) - 1, 0):
                raise damaged(self.path, number, f"it goes on from round {what['round']}, which was not completed")
            del self.rounds[what["round"] + 1 :]
        self.ended = line.event == "end" or (self.ended and line.event not in ("resume", "round"))
        self.size, self.num_lines, self._digest = line.end, number, line.digest


def damaged(path: Path, number: int, why: str) -> RunError:
    """The error of a line that is not what a run wrote."""
    return RunError(
        f"{path}:{number} is damaged: {why}. What the run has done is not known any more, so nothing goes on from here. "
        "Restore the file from a copy, or start the run again in a new folder."
    )


# --- the shape of each line -----------------------------------------------------------------------------------------

Test = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list(test: Test) -> Test:
    return lambda value: isinstance(value, list | tuple) and all(map(test, value))


def _dict(test: Test) -> Test:
    return lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value) and all(map(test, value.values()))


def _maybe(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _fields(**tests: Test) -> Test:
    return lambda value: isinstance(value, Mapping) and all(name in value and test(value[name]) for name, test in tests.items())


_HEX = re.compile("[0-9a-f]{32}")
_ENVELOPE = {"time": _text, "fedfm": _text, "torch": _text, "threads": _count}
_PRIVACY = {"privacy": _list(lambda value: isinstance(value, dict) and _text(value.get("text"))), "privacy_head": _text}


def _ledger(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    numbers = {name: number for name, number in value.items() if name not in _PRIVACY}
    return _dict(_number)(numbers) and all(test(value[name]) for name, test in _PRIVACY.items() if name in value)


_RECORD = _fields(
    round=_count,
    cohort=_list(_text),
    failures=_list(_fields(client=_text, stage=_text, reason=_text)),
    clients=_dict(_dict(_maybe(_number))),
    metrics=_dict(lambda value: True),
    bytes_up=_count,
    bytes_down=_count,
    seconds=_dict(_maybe(_number)),
)
_HOLDING = _fields(train=_maybe(_count), test=_maybe(_count), tokens=_maybe(_count), labels=_maybe(_dict(_count)))
EVENTS: Mapping[str, Mapping[str, Test]] = {
    "start": {**_ENVELOPE, "recipe": _text},
    "recipe": {"text": _text},
    "base": {"weights": _text, "tokenizer": _text},
    "data": {"fingerprint": _text, "left_out": _dict(_text), "dropped": _count, "labels": _list(_text)},
    "roster": {"ids": _list(_text), "holdings": _dict(_HOLDING), "totals": _HOLDING},
    "plan": {},
    "round": {"round": _count, "state": lambda value: _text(value) and bool(_HEX.fullmatch(value)), "record": _RECORD, "ledger": _ledger},
    "resume": {**_ENVELOPE, "round": _count, "rounds": _count},
    "end": {"round": _count, "ledger": _ledger},
}
"""Fields that each kind of line must hold. It may hold more."""


def _wrong(what: Mapping[str, Any]) -> str | None:
    """Why this cannot be a line; ``None`` where it can."""
    event = what["event"]
    if event not in EVENTS:
        return f"the event {event!r:.40} is not known to this version of fedfm"
    for name, test in EVENTS[event].items():
        if name not in what or not test(what[name]):
            return f"the {name!r} of its event {event!r} is missing or of the wrong kind"
    if event == "plan" and not all(_count(value) for name, value in what.items() if name not in ("event", "digest")):
        return "a choice of its event 'plan' is not a count"
    return None

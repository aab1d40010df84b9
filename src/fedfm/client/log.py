"""The owner's own log: every request that reached its house, and everything that left it. A line is on disk before what it tells of leaves.

On disk it is ``<folder>/clients/<slug>/log.jsonl``, a chain of lines (:mod:`fedfm.core.chain`). Events:

=============  =====================================================================================================
``policy``     the rules that hold from here on
``request``    what was asked: run, coordinator, verb, round, bytes, digest
``release``    what leaves: the leaves, bytes, the digest of these bytes, and the guarantee in words
``refusal``    the rule of the policy that refused, and why
``failure``    a request that was not answered for another reason, and what the coordinator is told of it
``question``   a person is asked; ``answer``: what the person said
``late``       a request that was over before it was worked on, or before its answer left; nothing left for it
``pause``      the owner paused the house; ``resume``: it answers again; ``leave``: it leaves the consortium
=============  =====================================================================================================

Covered here: lines that were changed, moved, put in or taken out from among others; a line that a crash cut short is dropped, and nothing left on its
account. Not covered: lines cut off the end, the whole file put back from an older copy or gone, and an owner's machine whose code was changed. Whoever
notes the digest of the last line elsewhere notices the first two: ``fedfm log --verify --head DIGEST``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fedfm.client.asking import Question, Verdict
from fedfm.client.memory import home
from fedfm.core import words
from fedfm.core.chain import Chain, Line, digest_of, lines
from fedfm.core.errors import ConfigError, RunError
from fedfm.core.messages import ClientId

NAME = "log.jsonl"
_NAMED = 6


class OwnerLog:
    """One owner's log.

    Args:
        folder: The folder in which ``clients/`` is; ``None`` keeps the log in this process.
        client: Whose it is.
    """

    def __init__(self, folder: Path | None, client: ClientId) -> None:
        self.path = None if folder is None else home(folder, client) / NAME
        self._chain = Chain(self.path, _changed, root())

    def add(self, event: str, time: datetime, **what: Any) -> str:
        """Adds a line; durable when this returns. Returns its digest.

        Raises:
            RunError: if the log was changed by something else, or cannot be written; nothing may leave then.
        """
        known = self._known
        line = self._chain.add(event, time=time.isoformat(timespec="seconds"), **what)
        known.take(line)
        return line.digest

    def note_policy(self, time: datetime, rules: Mapping[str, Any]) -> None:
        """Writes the rules down where they are not those that were written last.

        Raises:
            RunError: as :meth:`add`.
        """
        if dict(rules) != self._known.rules:
            self.add("policy", time, rules=dict(rules))

    def note_question(self, time: datetime, question: Question, answer: Verdict | None) -> None:
        """Writes a question and its answer down, each once.

        Raises:
            RunError: as :meth:`add`.
        """
        if question.id not in self._known.answers:
            self.add("question", time, id=question.id, text=question.text)
        if answer is not None and self._known.answers[question.id] != answer:
            self.add("answer", time, id=question.id, answer=answer)

    def note_pause(self, time: datetime, since: datetime | None) -> None:
        """Writes down that a pause began or ended, once.

        Args:
            since: When the pause began; ``None`` where there is none.

        Raises:
            RunError: as :meth:`add`.
        """
        known = self._known.paused
        if since is not None and not known:
            self.add("pause", time, since=since.isoformat(timespec="seconds"))
        elif since is None and known:
            self.add("resume", time, since=known)

    def note_leave(self, time: datetime, consortium: str) -> None:
        """Writes down that the owner leaves a consortium, unless that is the last line.

        Raises:
            RunError: as :meth:`add`.
        """
        if self._known.event != "leave":
            self.add("leave", time, consortium=words.clean(consortium, 80))

    @cached_property
    def _known(self) -> _Known:
        known = _Known()
        for line in self.lines():
            known.take(line)
        return known

    def lines(self) -> Iterator[Line]:
        """The lines one at a time, each checked.

        Raises:
            RunError: naming the first line that was changed.
        """
        return self._chain.lines()


@dataclass
class _Known:
    """What a house needs of its log to go on: the rules that were written last, what was asked and answered, since when it is paused, the last event."""

    rules: Mapping[str, Any] = field(default_factory=dict)
    answers: dict[str, str | None] = field(default_factory=dict)
    paused: str = ""
    event: str = ""

    def take(self, line: Line) -> None:
        self.event = line.event
        if line.event in ("pause", "resume"):
            self.paused = str(line.what["since"]) if line.event == "pause" else ""
        elif line.event == "policy":
            self.rules = line.what["rules"]
        elif line.event in ("question", "answer"):
            self.answers[line.what["id"]] = line.what.get("answer")


def read(path: Path) -> Iterator[Line]:
    """The lines of a log's file, each checked.

    Raises:
        RunError: naming the first line that was changed, or if the file cannot be read.
    """
    return lines(path, _changed, root())


def root() -> str:
    """What stands before the first line of every log."""
    return digest_of("log", b"")


def logs_in(path: Path) -> list[Path]:
    """The logs at a path: the file itself, that of an owner's folder, or those of all owners in a folder with ``clients/``.

    Raises:
        ConfigError: if there is none.
    """
    if path.is_file():
        return [path]
    logs = [path / NAME] if (path / NAME).is_file() else sorted(path.glob(f"clients/*/{NAME}"))
    if not logs:
        raise ConfigError(
            f"There is no owner's log at {path}. Give the file {NAME}, the folder that holds it, or a folder with clients/. "
            "In a simulation only owners with a policy keep a log."
        )
    return logs


def in_words(line: Line) -> str:
    """A line as a person reads it."""
    what, event = line.what, line.event
    tell: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "policy": _policy,
        "request": _request,
        "release": _release,
        "refusal": lambda what: f"refused   {_asked(what)}: rule {_text(what, 'rule')!r}, {_text(what, 'why')}",
        "failure": lambda what: f"failed    {_asked(what)}: {_text(what, 'why')} The coordinator is told: {_text(what, 'told')}",
        "question": lambda what: f"question  a person is asked ({_text(what, 'id')}): {_text(what, 'text')}",
        "answer": lambda what: f"answer    a person said {_text(what, 'answer')} ({_text(what, 'id')})",
        "late": lambda what: f"late      {_asked(what)}, for run {_text(what, 'run')}: {_text(what, 'why')}. Nothing left for it.",
        "pause": lambda what: "paused    nothing leaves this house until its owner ends the pause",
        "resume": lambda what: f"resumed   requests are answered again; it was paused since {_text(what, 'since')}",
        "leave": lambda what: f"leaves    the consortium {_text(what, 'consortium')}; no request is answered any more",
    }
    sentence = tell[event](what) if event in tell else words.clean(f"{event}  {dict(what)}", 400)
    return f"{_text(what, 'time')}  {sentence}"


def _text(what: Mapping[str, Any], name: str) -> str:
    return words.clean(what.get(name, "-"), 600)


def _asked(what: Mapping[str, Any]) -> str:
    return f"{_text(what, 'verb')}, round {_text(what, 'round')}"


def _request(what: Mapping[str, Any]) -> str:
    return (
        f"asked     {_asked(what)}, by coordinator {_text(what, 'coordinator')} for run {_text(what, 'run')} "
        f"({words.size(what.get('size'))}, {_text(what, 'request')})"
    )


def _release(what: Mapping[str, Any]) -> str:
    return (
        f"left      {_asked(what)}, for run {_text(what, 'run')}: {_leaves(what.get('leaves'))}; {words.size(what.get('size'))}, "
        f"BLAKE2b {_text(what, 'blake2b')}; {_text(what, 'guarantee')}"
    )


def _leaves(leaves: Any) -> str:
    """``4 tensors of delta (512 values), weight=1, loss withheld``."""
    if not isinstance(leaves, Mapping):
        return "-"
    tensors, numbers, withheld = leaves.get("tensors", {}), leaves.get("numbers", {}), leaves.get("withheld", [])
    parts = [
        f"{len(group['names'])} tensor{'s' if len(group['names']) > 1 else ''} of {name} ({group['values']} values)"
        for name, group in tensors.items()
    ]
    parts += [f"{name}={value}" for name, value in numbers.items()]
    parts += [f"withheld: {words.listed(withheld, _NAMED)}"] if withheld else []
    return words.clean(", ".join(parts) or "nothing but that it answered", 1000)


def _policy(what: Mapping[str, Any]) -> str:
    rules = what.get("rules", {})
    return words.clean("policy    " + "; ".join(f"{name}: {_short(value)}" for name, value in rules.items()), 1000)


def _short(value: Any) -> str:
    if value is None:
        return "any"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _changed(path: Path, line: int, why: str) -> RunError:
    return RunError(
        f"{path}, line {line}: this log was changed by something else than fedfm ({why}). What has left this house is not known any more, "
        "so nothing leaves it. Restore the file from a copy; or move it away, keep it, and begin a new one."
    )

"""Lines that nobody changes without a trace: an append-only file of JSON objects, each with a digest of itself and of all before it.

A line ends in the digest of its own bytes and of the digest of the line before it::

    {"event":"round","round":7, ... ,"digest":"4d1c..."}

So a changed, missing, repeated or moved line is noticed when the file is read. A line that a crash left unfinished is dropped; one that lacks
its newline alone is complete.

Covered here: damage and edits of any kind to lines that something follows, and to the last one. Not covered: lines cut off the end, an older copy
put back, a file that is gone, and somebody who writes all digests anew. The digest of the last line names everything before it, so whoever keeps
that digest elsewhere notices these too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fedfm.core import disk
from fedfm.core.errors import RunError

_END = re.compile(rb',"digest":"([0-9a-f]{32})"\}')
_TAIL = len(',"digest":""}') + 32
# Makes the error of a line that is not what was written: the file, the line's number, why.
Damaged = Callable[[Path, int, str], RunError]


@dataclass(frozen=True)
class Line:
    """A line of a chain.

    Args:
        number: Counted from 1.
        begin: Position of its first byte in the file.
        end: Position after its last byte, without the newline.
        digest: Digest of all lines up to this one.
        what: All its other fields.
    """

    number: int
    begin: int
    end: int
    digest: str
    what: Mapping[str, Any]

    @property
    def event(self) -> str:
        """What happened."""
        return str(self.what["event"])


def lines(path: Path, damaged: Damaged, root: str = "") -> Iterator[Line]:
    """The lines one at a time, each checked; an unfinished last one is left out, and a file that is not there has none.

    Args:
        damaged: Makes the error of a line that is wrong.
        root: Stands before the first line, so that one chain is not taken for another.

    Raises:
        RunError: naming the first line that is not what was written.
    """
    try:
        with path.open("rb") as file:
            yield from _checked(path, file, damaged, root)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error


def sealed(before: str, entry: Mapping[str, Any]) -> tuple[str, str]:
    """A line's text without its newline, and its digest.

    Args:
        before: The digest of the line before it; the root where there is none.
        entry: At least one field, and none named ``digest``.
    """
    assert entry and "digest" not in entry, entry
    body = json.dumps(entry, allow_nan=False, separators=(",", ":"))[:-1]
    digest = digest_of(before, body.encode())
    return f'{body},"digest":"{digest}"}}', digest


def digest_of(before: str, body: bytes) -> str:
    """The digest of a line.

    Args:
        body: Its bytes up to the comma before ``"digest"``.
    """
    digest = hashlib.blake2b(before.encode(), digest_size=16)
    digest.update(body)
    return digest.hexdigest()


def parsed(path: Path, number: int, text: bytes, damaged: Damaged) -> dict[str, Any]:
    """The fields of a line without its digest.

    Raises:
        RunError: if it is not a JSON object that names an event.
    """
    try:
        what: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, number, f"it is not JSON ({error})") from error
    if not isinstance(what, dict) or not isinstance(what.get("event"), str):
        raise damaged(path, number, "it names no event")
    return {name: value for name, value in what.items() if name != "digest"}


def _checked(path: Path, file: BinaryIO, damaged: Damaged, root: str) -> Iterator[Line]:
    before, begin = root, 0
    for number, raw in enumerate(file, 1):
        text = raw.removesuffix(b"\n")
        if len(text) == len(raw):
            complete = next((match for match in _END.finditer(raw) if digest_of(before, raw[: match.start()]) == match[1].decode()), None)
            if complete is None:
                return
            if complete.end() < len(raw):
                raise damaged(path, number, "something follows its end")
        match = _END.fullmatch(text, max(0, len(text) - _TAIL))
        if match is None:
            raise damaged(path, number, "it does not end in a digest")
        digest = match[1].decode()
        if digest_of(before, text[: match.start()]) != digest:
            raise damaged(path, number, "its digest is not that of its contents and of the lines before it")
        yield Line(number, begin, begin + len(text), digest, parsed(path, number, text, damaged))
        before, begin = digest, begin + len(raw)


@dataclass
class Chain:
    """A chain that is read and written. One process writes it at a time; another may read.

    Args:
        path: The file; ``None`` keeps the lines in this process.
        damaged: Makes the error of a line that is wrong.
        root: Stands before the first line.
    """

    path: Path | None
    damaged: Damaged
    root: str = ""
    _held: list[Line] = field(default_factory=list)
    _last: Line | None = None
    _size: int = -1

    def lines(self) -> Iterator[Line]:
        """The lines one at a time, each checked.

        Raises:
            RunError: naming the first line that is not what was written.
        """
        return iter(list(self._held)) if self.path is None else lines(self.path, self.damaged, self.root)

    def add(self, event: str, **what: Any) -> Line:
        """Adds a line; durable when this returns.

        Raises:
            RunError: if the file was changed by something else, or cannot be written.
        """
        self._look()
        text, digest = sealed(self._last.digest if self._last else self.root, {"event": event, **what})
        begin = self._last.end + 1 if self._last else 0
        line = Line(self._last.number + 1 if self._last else 1, begin, begin + len(text.encode()), digest, {"event": event, **what})
        if self.path is None:
            self._held.append(line)
        else:
            disk.append(self.path, text)
            self._size = line.end + 1
        self._last = line
        return line

    def _look(self) -> None:
        """Reads the file where it is not as this process left it, and cuts off what a crash left of an unfinished line."""
        if self.path is None:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._size:
            return
        self._last = None
        for line in self.lines():
            self._last = line
        end = self._last.end if self._last else 0
        if size:
            # What follows must begin on a line of its own.
            disk.cut(self.path, end, b"\n" if end else b"")
        self._size = end + 1 if end else 0

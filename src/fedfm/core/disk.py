"""Durable writes, and the one place where they happen, so that tests can crash at each of them.

A write is durable when it survives ``kill -9`` and loss of power: data synced, then renamed over
the old file, then the folder synced. A reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from fedfm.core.errors import RunError

# Called with the name of each durable step just before and just after it; chaos tests put a kill here.
on_step: Callable[[str], None] | None = None


def step(name: str) -> None:
    """Marks a durable step. ``FEDFM_KILL_AT=n`` ends the process with SIGKILL at the n-th mark, for chaos tests."""
    if on_step is not None:
        on_step(name)
    at = os.environ.get("FEDFM_KILL_AT")
    if at is not None:
        global _steps
        _steps += 1
        if _steps == int(at):
            os.kill(os.getpid(), 9)


_steps = 0


def write_atomic(path: Path, data: bytes, private: bool = False) -> None:
    """Replaces ``path`` with ``data``, durably.

    Args:
        private: Whether only its owner may read it, from its first byte on.

    Raises:
        RunError: if the disk is full or the folder cannot be written; what was there before is untouched.
    """
    _replace(path, [data], private)


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Replaces ``path`` with these parts, one after another, durably.

    Raises:
        RunError: if the disk is full or the folder cannot be written; what was there before is untouched.
    """
    _replace(path, parts)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replaces ``path`` with these lines, durably, holding one at a time.

    Raises:
        RunError: if the disk is full or the folder cannot be written; what was there before is untouched.
    """
    _replace(path, (line.encode() + b"\n" for line in lines))


def _replace(path: Path, parts: Iterable[bytes | memoryview], private: bool = False) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        step(f"before {path.name}")
        # What a crash left of an earlier write may have other rights.
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o666)
        with os.fdopen(fd, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        step(f"written {path.name}")
        temporary.replace(path)
        sync(path.parent)
        step(f"renamed {path.name}")
    except BaseException as error:
        # The lines may come from work that fails or is stopped; what is half written must not stay.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def append(path: Path, line: str) -> None:
    """Adds one line to ``path``, durably. A crash may leave a part of it; readers drop an unfinished last line.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        make_folder(path.parent)
        step(f"before append {path.name}")
        is_new = not path.exists()
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(path.parent)
        step(f"appended {path.name}")
    except OSError as error:
        raise cannot_write(path, error) from error


def cut(path: Path, size: int, end: bytes = b"") -> None:
    """Cuts ``path`` to ``size`` bytes followed by ``end``, durably. This removes what a crash left after the last complete part.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        with path.open("r+b") as file:
            file.seek(size)
            if file.read() == end:
                return
            step(f"before cut {path.name}")
            file.seek(size)
            file.write(end)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        step(f"cut {path.name}")
    except OSError as error:
        raise cannot_write(path, error) from error


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it. Each new one is synced into its parent, so that it survives loss of power."""
    missing = [folder]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    folder.mkdir(parents=True, exist_ok=True)
    if len(missing) > 1 or not any(folder.iterdir()):
        for made in missing:
            sync(made.parent)


def sync(path: Path) -> None:
    """Makes what is in a file, or the names that are in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(path: Path, busy: str, mode: int = 0o644) -> int:
    """Takes a lock file against all other processes; the descriptor, which holds it until it is closed or the process ends, however it does.

    Args:
        busy: The error where another process has it.

    Raises:
        RunError: with ``busy``, or if the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise RunError(busy) from error
    return descriptor


def cannot_write(path: Path, error: Exception) -> RunError:
    """The error a user sees when a write fails. safetensors raises an error of its own, with the number in its text."""
    if not isinstance(error, OSError):
        match = re.search(r"os error (\d+)", str(error))
        error = OSError(int(match[1]), os.strerror(int(match[1]))) if match else OSError(0, str(error))
    if error.errno == errno.ENOSPC:
        return RunError(f"The disk is full: {path} could not be written. What was saved before is intact; free space and resume.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(
            f"{path.parent} cannot be written ({error.strerror}). Choose another folder (FEDFM_CACHE names the one for prepared data) or change its permissions."
        )
    return RunError(f"{path} could not be written: {error.strerror}.")


def cache() -> Path:
    """The folder of files that can be made again: ``$FEDFM_CACHE``, else ``~/.cache/fedfm``.

    Raises:
        RunError: if there is no home.
    """
    try:
        return Path(os.environ.get("FEDFM_CACHE") or Path.home() / ".cache" / "fedfm")
    except RuntimeError as error:
        raise RunError("This user has no home folder. Set FEDFM_CACHE to a folder for prepared data and small models.") from error


def slug(name: str) -> str:
    """A file name for any owner's name: readable, short, without separators, and different for different names."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "owner"
    return f"{readable}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"

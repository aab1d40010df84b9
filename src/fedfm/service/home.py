"""A member's folder as commands see it: who answers for it, whether it has left, and what is deleted when it leaves. Read without torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fedfm.core import disk, words
from fedfm.core.errors import RunError
from fedfm.silos.membership import CLIENT, IDENTITY, MEMBERSHIP

LOCK, LEFT, PREPARED = "member.lock", "left", "prepared"
_OWN = ("jobs", "models", PREPARED, "window", "secret", "paused", IDENTITY, CLIENT, LEFT)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a member's folder, which one process answers for at a time.

    Raises:
        RunError: if another process has it.
    """
    busy = f"Another process answers for {words.clean(folder, 120)} already. Stop it first."
    descriptor = disk.lock(folder / LOCK, busy, 0o600)
    try:
        yield
    finally:
        os.close(descriptor)


def is_running(folder: Path) -> bool:
    """Whether a process answers for the member of this folder."""
    try:
        with alone(folder):
            return False
    except RunError:
        return True


def has_left(folder: Path) -> bool:
    """Whether the member of this folder has left its consortium."""
    return (folder / LEFT).exists()


def leave(folder: Path, now: datetime) -> None:
    """Writes down that the member leaves; its process ends when it sees that.

    Raises:
        RunError: if it cannot be written.
    """
    disk.write_atomic(folder / LEFT, now.isoformat(timespec="seconds").encode(), private=True)


def stay(folder: Path) -> None:
    """Undoes :meth:`leave`: the coordinator could not be told, or the member has entered again."""
    (folder / LEFT).unlink(missing_ok=True)


def delete(folder: Path) -> list[str]:
    """Deletes a member's keys, its memory of runs and its copies of rows; the owner's log stays.

    Returns:
        What there was.

    Raises:
        RunError: if something cannot be deleted, or another process answers for the folder.
    """
    with alone(folder):
        # The membership goes last: until then, the same command goes on after a crash.
        names = [name for name in (*_OWN, MEMBERSHIP) if (folder / name).exists()]
        for name in names:
            path = folder / name
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as error:
                raise disk.cannot_write(path, error) from error
        disk.sync(folder)
    return names

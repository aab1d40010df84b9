"""Folders and files that hold keys: their owner alone may look into them.

Covered here: a folder or a file that other users of this machine could read or change is refused before anything in it is used. Not covered: the
machine's administrator, backups, and disks that are not encrypted.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fedfm.core import disk, words
from fedfm.core.errors import ConfigError


def make_folder(folder: Path) -> None:
    """Makes a folder that its owner alone may enter; one that is there already must be such a folder.

    Raises:
        ConfigError: if others can enter it, or it is a file.
        RunError: if it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"{words.clean(folder, 120)} is a file; a folder is needed there.") from error
    except OSError as error:
        raise disk.cannot_write(folder, error) from error
    require_folder(folder)


def require_folder(folder: Path) -> None:
    """Refuses a folder that somebody else can enter.

    Raises:
        ConfigError: if it is not there, is no folder, belongs to somebody else, or others have rights on it.
    """
    shown = words.clean(folder, 120)
    try:
        known = folder.stat()
    except OSError as error:
        raise ConfigError(f"The folder {shown} cannot be opened: {error.strerror}.") from error
    if not stat.S_ISDIR(known.st_mode):
        raise ConfigError(f"{shown} is no folder.")
    _require(shown, known, "chmod -R go= ")


def write(path: Path, data: bytes) -> None:
    """Replaces a file, durably; its owner alone can read it, from its first byte on. A folder that is missing is made for its owner alone.

    Raises:
        RunError: if it cannot be written.
    """
    if not path.parent.exists():
        make_folder(path.parent)
    disk.write_atomic(path, data, private=True)


def read(path: Path, limit: int = 1 << 20) -> bytes:
    """The contents of a file that its owner alone can read.

    Raises:
        ConfigError: if it is not there, is longer than ``limit`` bytes, or others can read it.
    """
    shown = words.clean(path, 120)
    try:
        with path.open("rb") as file:
            _require(shown, os.fstat(file.fileno()), "chmod go= ")
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror}.") from error
    if len(data) > limit:
        raise ConfigError(f"{shown} is longer than {limit} bytes, so it is not what fedfm wrote.")
    return data


def _require(shown: str, known: os.stat_result, remedy: str) -> None:
    mode = stat.S_IMODE(known.st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{shown} holds keys and is open to other users of this machine (mode {mode:03o}). If nobody has read the keys, run: {remedy}{shown}"
        )
    if known.st_uid != os.geteuid():
        raise ConfigError(
            f"{shown} belongs to another user (uid {known.st_uid}; this is {os.geteuid()}). Run as its owner, or change its owner."
        )

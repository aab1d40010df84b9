"""What is kept to be made again: owners' tokenised rows and the tour's base models, in the clear, in the user's cache."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedfm.core import disk, words
from fedfm.core.errors import ConfigError

# Only what bears a name that we give is ours to show and delete: FEDFM_CACHE may name a folder with other things in it.
_PREPARED = re.compile(r"[0-9a-f]{24}")
_BASE = re.compile(r"[0-9a-f]{16}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}([0-9a-f]{8})?-\w+")
# Younger than this, it may still be at work.
_AT_WORK = 3600.0
DAY = 86400.0


@dataclass(frozen=True)
class Kept:
    """A folder of the cache.

    Args:
        size: Of its files, in bytes.
        age: Seconds since something in it was written.
        what: In words.
        finished: Whether it was made to its end.
    """

    path: Path
    size: int
    age: float
    what: str
    finished: bool = True


def kept() -> list[Kept]:
    """Everything, the largest first.

    Raises:
        RunError: if there is no home.
    """
    root, found = disk.cache(), []
    for path in (*_folders(root / "data"), *_folders(root / "quickstart")):
        if path.parent.name == "data" and _PREPARED.fullmatch(path.name):
            found.append(_look(path, _owners(path)))
        elif path.parent.name == "quickstart" and _BASE.fullmatch(path.name):
            found.append(_look(path, "base model of the quickstart"))
        elif _UNFINISHED.fullmatch(path.name):
            found.append(_look(path, "cut off while it was made or deleted", finished=False))
    return sorted(found, key=lambda entry: (-entry.size, entry.path))


def show(clear: bool, older_than: float | None) -> None:
    """``fedfm cache``: lists what is there, or deletes it.

    Args:
        older_than: Days; what was written since stays.

    Raises:
        ConfigError: if a number of days comes without ``clear``, or is negative.
        RunError: if something cannot be deleted.
    """
    if older_than is not None and (not clear or not older_than >= 0):
        raise ConfigError(f"--older-than is {older_than:g}; it is a number of days, 0 or more, and says what --clear deletes.")
    root, entries = disk.cache(), kept()
    print(f"{root}\n")
    if clear:
        entries = [entry for entry in entries if entry.age >= (older_than or 0.0) * DAY and (entry.finished or entry.age >= _AT_WORK)]
    for entry in entries:
        print(f"{entry.path.relative_to(root)!s:<44}{words.size(entry.size):>9}  {_days(entry.age):>9}  {entry.what}")
        if clear:
            _delete(entry.path)
    total = words.size(sum(entry.size for entry in entries))
    print(f"{'deleted' if clear else 'together'} {total}" if entries else "nothing to delete" if clear else "empty")
    if entries and not clear:
        print("Prepared rows lie there in the clear. fedfm cache --clear deletes them; a run that needs them prepares them again.")


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        # A link (the quickstart's model) leads to what is listed already.
        yield from (path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink())


def _look(path: Path, what: str, finished: bool = True) -> Kept:
    size, newest = 0, path.stat().st_mtime
    for file in path.rglob("*"):
        try:
            known = file.lstat()
        except FileNotFoundError:
            continue  # Another process has just finished with it.
        size, newest = size + (0 if file.is_dir() else known.st_size), max(newest, known.st_mtime)
    return Kept(path, size, max(time.time() - newest, 0.0), what, finished)


def _owners(path: Path) -> str:
    try:
        owners = json.loads((path / "owners.json").read_text(encoding="utf-8"))["owners"]
        names = [words.clean(name, 20) for name in owners]
    except (OSError, ValueError, LookupError, TypeError):
        return "prepared rows that cannot be read"
    return f"prepared rows of {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _days(age: float) -> str:
    for unit, seconds in (("day", DAY), ("hour", 3600.0), ("minute", 60.0)):
        if age >= seconds:
            number = int(age // seconds)
            return f"{number} {unit}{'s' if number > 1 else ''}"
    return "now"


def _delete(path: Path) -> None:
    try:
        # Under its name it is whole or not there: a run that starts now must not find a part of it.
        gone = path if path.name.startswith(".") else path.with_name(f".{path.name}-deleted")
        if gone != path:
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
        shutil.rmtree(gone)
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk.cannot_write(path, error) from error

"""Runs that exist, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedfm.core.errors import RunError
from fedfm.reports.runs import Entry, Table
from fedfm.run.folder import RECIPE


def compare_runs(folders: Sequence[Path | str]) -> Table:
    """A row for each run, the best first; or as they were given, where they cannot be compared. Its notes say which and why.

    Raises:
        RunError: if a folder holds no run, or is given twice.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not (path / RECIPE).is_file():
            raise RunError(f"{path} holds no run (there is no {RECIPE} in it). Give folders of runs.")
    names = _names(paths)
    entries = [Entry.of(path, {"run": name}, name=name) for path, name in zip(paths, names, strict=True)]
    return Table.of(f"{len(paths)} runs side by side", entries)


def _names(paths: Sequence[Path]) -> list[str]:
    """The end of each path that tells it from the others."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise RunError("A run is given twice. Give each folder once.")
    names = list[str]()
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-n:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names

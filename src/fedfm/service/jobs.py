"""What a coordinator was asked to run, and how far it is. Read without torch, so that ``fedfm status`` is quick."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedfm.core import disk, words
from fedfm.core.errors import ConfigError, RunError
from fedfm.core.journal import JOURNAL, RECIPE, Journal

JOBS, RUNS, LOCK = "jobs", "runs", "serve.lock"
# Runs that are over stay so; their journals may be long.
_ended: set[Path] = set()
State = Literal["queued", "running", "finished", "failed"]


@dataclass(frozen=True)
class Job:
    """A recipe that was submitted.

    Args:
        folder: The coordinator's folder.
        name: From the time of its submission and the recipe's name.
    """

    folder: Path
    name: str

    @property
    def recipe(self) -> Path:
        """What was submitted."""
        return self.folder / JOBS / f"{self.name}.yaml"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / RUNS / self.name

    @property
    def _failed(self) -> Path:
        return self.folder / JOBS / f"{self.name}.failed"

    @property
    def failure(self) -> str:
        """Why it ended without a result; empty where it did not."""
        return self._failed.read_text(encoding="utf-8") if self._failed.exists() else ""

    def fail(self, reason: str) -> None:
        """Writes down why it ended, durably.

        Raises:
            RunError: if it cannot be written.
        """
        disk.write_atomic(self._failed, words.clean(reason, 4000).encode())

    @property
    def state(self) -> State:
        """How far it is; a run whose coordinator is down counts as running, because it goes on when that is back.

        Raises:
            RunError: if the run's journal is damaged.
        """
        if self._failed.exists():
            return "failed"
        if not (self.run / RECIPE).is_file():
            return "queued"
        if self.run in _ended:
            return "finished"
        if not Journal.read(self.run / JOURNAL).ended:
            return "running"
        _ended.add(self.run)
        return "finished"

    @property
    def rounds(self) -> tuple[int, int]:
        """Rounds that are completed, and rounds in all.

        Raises:
            RunError: if the run's journal is damaged.
        """
        import yaml

        done = max(len(Journal.read(self.run / JOURNAL).rounds) - 1, 0)
        values = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        return done, int(values["rounds"])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Waits until no other process plays this job: one that a killed coordinator left ends a moment later."""
        descriptor = os.open(self.folder / JOBS / f"{self.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def jobs(folder: Path) -> list[Job]:
    """All jobs, in the order in which they run."""
    return [Job(folder, path.stem) for path in sorted((folder / JOBS).glob("*.yaml"))]


def job(folder: Path, name: str | None) -> Job:
    """A job by its name; the last one where none is given.

    Raises:
        ConfigError: if there is none.
    """
    known = {job.name: job for job in jobs(folder)}
    if not known:
        raise ConfigError(
            f"Nothing was submitted to {words.clean(folder, 120)} yet. Submit a recipe: fedfm run RECIPE --consortium {folder}"
        )
    if name is not None and name not in known:
        raise ConfigError(f"There is no job {words.clean(name, 80)!r}. Known: {words.listed(list(known)[-8:], 8)}.")
    return known[name or list(known)[-1]]


def is_served(folder: Path) -> bool:
    """Whether a coordinator is up."""
    try:
        with alone(folder):
            return False
    except RunError:
        return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases when a process ends, however it does.

    Raises:
        RunError: if another process has it.
    """
    descriptor = disk.lock(folder / LOCK, f"Another process serves {words.clean(folder, 120)} already.", 0o600)
    try:
        yield
    finally:
        os.close(descriptor)

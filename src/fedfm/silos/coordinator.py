"""What a coordinator is asked to run, and the process that runs it, one run after the other.

::

    <folder>/
      link.json                 where the broker is, who the coordinator is, who the members are
      jobs/<name>.yaml          a recipe that was submitted; never changed
      jobs/<name>.failed        why it ended without a result
      runs/<name>/              the run's folder, from which its progress is read

A job's name begins with the time of its submission, and jobs run in that order. Everything is a file, so whoever submits need not be there when it
runs, and a coordinator that was killed goes on where the run's folder says.

Covered here: two coordinators on one folder (the second is refused); a submission that is cut short (it is there whole or not at all). Not covered: who may write
into the folder may submit.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedfm.core import check, disk, words
from fedfm.core.errors import ConfigError, FedfmError, RunError, WireError
from fedfm.engines import Nats
from fedfm.federation import Federation
from fedfm.recipe import dump, read
from fedfm.run.folder import RECIPE, is_finished, read_journal
from fedfm.run.loop import resume, run
from fedfm.wire.link import Link

log = logging.getLogger(__name__)
LINK, JOBS, RUNS, LOCK = "link.json", "jobs", "runs", "serve.lock"
State = Literal["queued", "running", "finished", "failed"]
# Seconds: between two looks at the jobs, after a broker that went away.
_LOOK, _AGAIN = 0.5, 3.0


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
        return "finished" if is_finished(self.run) else "running"

    @property
    def rounds(self) -> tuple[int, int]:
        """Rounds that are completed, and rounds in all."""
        done = max(len(read_journal(self.run).rounds) - 1, 0) if (self.run / RECIPE).is_file() else 0
        return done, read(self.recipe).rounds


def require_folder(folder: Path) -> Link:
    """The link of a coordinator's folder.

    Raises:
        ConfigError: if it is no such folder.
    """
    if not (folder / LINK).is_file():
        raise ConfigError(f"{words.clean(folder, 120)} is no coordinator's folder: there is no {LINK} in it.")
    return Link.read(folder / LINK)


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


def submit(folder: Path, federation: Federation) -> Job:
    """Puts a recipe into the queue, for the coordinator to run when it gets to it.

    Raises:
        ConfigError: if it is no coordinator's folder.
        PlanError: if the plan cannot mean what it says.
        RunError: if it cannot be written.
    """
    link = require_folder(folder)
    plan = replace(federation, engine=Nats(str(folder.absolute() / LINK), federation.engine.device))
    check.require(plan.resolved(), len(link.peers))
    name = re.sub("[^a-z0-9]+", "-", federation.name.lower()).strip("-")[:30] or "run"
    submitted = Job(folder, f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{name}-{secrets.token_hex(2)}")
    disk.make_folder(folder / JOBS)
    disk.write_atomic(submitted.recipe, dump(plan).encode())
    return submitted


def serve(folder: Path) -> None:
    """Runs what is submitted until it is interrupted.

    Raises:
        ConfigError: if it is no coordinator's folder.
        RunError: if another process serves it, or it cannot be written.
    """
    require_folder(folder)
    with _alone(folder):
        while True:
            waiting = [job for job in jobs(folder) if job.state in ("queued", "running")]
            if waiting:
                _play(waiting[0])
            else:
                time.sleep(_LOOK)


def is_served(folder: Path) -> bool:
    """Whether a coordinator is up."""
    try:
        with _alone(folder):
            return False
    except RunError:
        return True


def status(folder: Path) -> dict[str, Any]:
    """Who belongs, and what runs.

    Raises:
        ConfigError: if it is no coordinator's folder.
    """
    link = require_folder(folder)
    told: list[dict[str, Any]] = []
    for job in jobs(folder):
        done, rounds = job.rounds
        told.append({"name": job.name, "state": job.state, "round": done, "rounds": rounds, "failure": job.failure})
    return {"consortium": link.consortium, "serving": is_served(folder), "members": sorted(link.peers), "jobs": told}


def _play(job: Job) -> None:
    """A job from where it is to its end."""
    log.info("%s begins, or goes on", job.name)
    try:
        rounds = resume(job.run) if (job.run / RECIPE).is_file() else run(read(job.recipe), out=job.run)
        for _, record in rounds:
            log.info("%s: round %d is done", job.name, record.round)
    except WireError as error:
        log.warning("%s waits for the broker: %s", job.name, error)
        time.sleep(_AGAIN)
    except FedfmError as error:
        log.error("%s ended: %s", job.name, error)
        job.fail(str(error))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases when a process ends, however it does."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise disk.cannot_write(folder / LOCK, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise RunError(f"Another process serves {words.clean(folder, 120)} already.") from error
    try:
        yield
    finally:
        os.close(fd)

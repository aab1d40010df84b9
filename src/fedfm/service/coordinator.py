"""What a coordinator is asked to run, and the process that runs it, one run after the other.

::

    <folder>/                   the consortium's (fedfm.silos.consortium)
      jobs/<name>.yaml          a recipe that was submitted; never changed
      jobs/<name>.failed        why it ended without a result
      runs/<name>/              the run's folder, from which its progress is read

While it serves, members enter, and the broker runs: the coordinator starts it where it does not run, starts it again where it ended, and stops it in the end.
A broker that ran before is left alone.

A job's name begins with the time of its submission, and jobs run in that order. Everything is a file, so whoever submits need not be there when it
runs, and a coordinator that was killed goes on where the run's folder says.

Covered here: two coordinators on one folder (the second is refused); a submission that is cut short (it is there whole or not at all). Not covered: who may write
into the folder may submit.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedfm.core import check, disk, words
from fedfm.core.errors import ConfigError, FedfmError, RunError, WireError
from fedfm.engines import Nats
from fedfm.engines.nats import make_streams
from fedfm.federation import Federation
from fedfm.recipe import dump, read
from fedfm.run.folder import RECIPE, is_finished, read_journal
from fedfm.run.loop import resume, run
from fedfm.silos import certificates
from fedfm.silos.consortium import Consortium
from fedfm.silos.enrol import Desk, Reception

if TYPE_CHECKING:
    from fedfm.wire.nats import Connection

log = logging.getLogger(__name__)
JOBS, RUNS, LOCK = "jobs", "runs", "serve.lock"
State = Literal["queued", "running", "finished", "failed"]
# Seconds: between two looks at the jobs, after a broker that went away, between two looks at when certificates end.
_LOOK, _AGAIN, _RENEW = 0.5, 3.0, 86400.0


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
        ConfigError: if there is no consortium in the folder.
        PlanError: if the plan cannot mean what it says.
        RunError: if it cannot be written.
    """
    members = Consortium.open(folder).cards()
    plan = replace(federation, engine=Nats(str(folder.absolute()), federation.engine.device))
    check.require(plan.resolved(), len(members))
    name = re.sub("[^a-z0-9]+", "-", federation.name.lower()).strip("-")[:30] or "run"
    submitted = Job(folder, f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{name}-{secrets.token_hex(2)}")
    disk.make_folder(folder / JOBS)
    disk.write_atomic(submitted.recipe, dump(plan).encode())
    return submitted


def serve(consortium: Consortium, ready: Callable[[], None] = lambda: None) -> None:
    """Lets members enter, and runs what is submitted, until it is interrupted.

    Args:
        ready: Called once, when the broker runs and members can enter.

    Raises:
        ConfigError: if the broker cannot be started: its port is taken, or NATS refuses its configuration.
        MissingExtra: if the extra ``deploy`` is not installed.
        RunError: if another process serves the folder, or it cannot be written.
    """
    folder = consortium.folder
    with _alone(folder), _broker(consortium) as is_ours, _open(Hall(consortium, is_ours)):
        ready()
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
        ConfigError: if there is no consortium in the folder.
        RunError: if its roster is damaged.
    """
    consortium = Consortium.open(folder)
    told: list[dict[str, Any]] = []
    for job in jobs(folder):
        done, rounds = job.rounds
        told.append({"name": job.name, "state": job.state, "round": done, "rounds": rounds, "failure": job.failure})
    return {
        "consortium": consortium.settings.name,
        "serving": is_served(folder),
        "members": sorted(consortium.cards()),
        "jobs": told,
    }


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
def _broker(consortium: Consortium) -> Iterator[bool]:
    """The broker while it runs, and whether we started it; then it is stopped in the end."""
    consortium.renew(certificates.now())
    is_ours = consortium.settings.broker == "own" and consortium.broker.process() is None
    if is_ours:
        consortium.broker.start()
    try:
        yield is_ours
    finally:
        if is_ours:
            consortium.broker.stop()


class Hall:
    """Where members enter, in a thread of its own, so that none waits for a run to end.

    Args:
        consortium: The coordinator's folder.
        starts_broker: Whether the broker is started again where it ended.
    """

    def __init__(self, consortium: Consortium, starts_broker: bool) -> None:
        self._consortium, self._starts_broker = consortium, starts_broker
        self._desk, self._renewed = Desk(consortium), time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedfm-hall", daemon=True)

    def open(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Lets nobody in any more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._keep_broker()
                self._receive()
            except FedfmError as error:
                log.warning("members cannot enter at the moment: %s", error)
                self._stop.wait(_AGAIN)
            except Exception:  # A hall that has died lets nobody in, ever.
                log.exception("members cannot enter at the moment")
                self._stop.wait(_AGAIN)

    def _receive(self) -> None:
        link = self._consortium.link()
        with link.connect() as connection:
            reception = Reception(self._desk, connection)
            self._make_room(connection)
            inbox = connection.inbox([reception.branch])
            while not self._stop.is_set():
                delivery = inbox.next(_LOOK)
                if delivery is not None:
                    reception.take(delivery)
                    self._make_room(connection)
                self._keep_broker()
                if time.monotonic() >= self._renewed + _RENEW:
                    self._renewed = time.monotonic()
                    self._consortium.renew(certificates.now())

    def _make_room(self, connection: Connection) -> None:
        """Makes the streams of who belongs, so that a member that is in can wait for its first message."""
        make_streams(connection, self._consortium.names, self._consortium.cards())

    def _keep_broker(self) -> None:
        if self._starts_broker and self._consortium.broker.process() is None:
            log.warning("the broker ended; it is started again")
            self._consortium.broker.start()


@contextmanager
def _open(hall: Hall) -> Iterator[None]:
    hall.open()
    try:
        yield
    finally:
        hall.close()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases when a process ends, however it does."""
    descriptor = disk.lock(folder / LOCK, f"Another process serves {words.clean(folder, 120)} already.", 0o600)
    try:
        yield
    finally:
        os.close(descriptor)

"""What a coordinator is asked to run, and the process that runs it: one run after the other, or several side by side.

::

    <folder>/                   the consortium's (fedfm.silos.consortium)
      jobs/<name>.yaml          a recipe that was submitted; never changed
      jobs/<name>.failed        why it ended without a result
      runs/<name>/              the run's folder, from which its progress is read

While it serves, members enter, and the broker runs: the coordinator starts it where it does not run, starts it again where it ended, and stops it in the end.
It writes down which process it started, so that a coordinator that was killed takes its broker over again. A broker that somebody else started is left alone.

A job's name begins with the time of its submission, and jobs run in that order. Everything is a file, so whoever submits need not be there when it
runs, and a coordinator that was killed goes on where the run's folder says.

Covered here: two coordinators on one folder (the second is refused); a submission that is cut short (it is there whole or not at all). Not covered: who may write
into the folder may submit.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedfm.core import check, disk
from fedfm.core.errors import FedfmError, WireError
from fedfm.engines import Nats
from fedfm.engines.nats import end_job, make_streams
from fedfm.federation import Federation
from fedfm.recipe import dump, read
from fedfm.run.folder import RECIPE
from fedfm.run.loop import resume, run
from fedfm.service.jobs import JOBS, Job, alone, jobs
from fedfm.service.presence import Attendance
from fedfm.service.side_by_side import Players
from fedfm.silos import certificates
from fedfm.silos.consortium import Consortium
from fedfm.silos.enrol import Desk, Reception

if TYPE_CHECKING:
    import psutil

    from fedfm.wire.nats import Connection

log = logging.getLogger(__name__)
STARTED = "started.json"
# Seconds: between two looks at the jobs, after a broker that went away, between two looks at when certificates end, between two looks at who is there.
_LOOK, _AGAIN, _RENEW, _ATTEND = 0.5, 3.0, 86400.0, 2.0
# Seconds by which the time at which a process began may be read differently: the machine's clock may have been set meanwhile.
_SAME = 2.0


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


def serve(consortium: Consortium, ready: Callable[[], None] = lambda: None, at_once: int = 1, log_level: str = "warning") -> None:
    """Lets members enter, and runs what is submitted, until it is interrupted.

    Args:
        ready: Called once, when the broker runs and members can enter.
        at_once: Runs that are played at a time. One is played in this process, more in processes of their own.
        log_level: What those show.

    Raises:
        ConfigError: if the broker cannot be started: its port is taken, or NATS refuses its configuration.
        MissingExtra: if the extra ``deploy`` is not installed.
        RunError: if another process serves the folder, or it cannot be written.
    """
    folder = consortium.folder
    with (
        alone(folder),
        _broker(consortium) as is_ours,
        _open(Hall(consortium, is_ours)),
        closing(Players(folder, at_once, log_level)) as players,
    ):
        ready()
        while True:
            waiting = [job for job in jobs(folder) if job.state in ("queued", "running")]
            if waiting and at_once == 1:
                play(waiting[0])
                continue
            players.look([job.name for job in waiting])
            time.sleep(_LOOK)


def play(job: Job) -> None:
    """A job from where it is to its end, or until the broker is away."""
    with job.held():
        if job.state not in ("queued", "running"):
            return
        log.info("%s begins, or goes on", job.name)
        _play(job)


def _play(job: Job) -> None:
    try:
        rounds = resume(job.run) if (job.run / RECIPE).is_file() else run(read(job.recipe), out=job.run)
        for _, record in rounds:
            log.info("%s: round %d is done", job.name, record.round)
    except WireError as error:
        log.warning("%s waits for the broker: %s", job.name, error)
        time.sleep(_AGAIN)
        return
    except FedfmError as error:
        log.error("%s ended: %s", job.name, error)
        job.fail(str(error))
    # What stays at the broker is deleted by its age.
    with suppress(FedfmError):
        end_job(Consortium.open(job.folder).link(), job.run)


@contextmanager
def _broker(consortium: Consortium) -> Iterator[bool]:
    """The broker while it runs, and whether we started it; then it is stopped in the end."""
    consortium.renew(certificates.now())
    running = consortium.broker.process()
    is_ours = consortium.settings.broker == "own" and (running is None or _is_started_by_us(consortium, running))
    if is_ours:
        _start_broker(consortium)
    try:
        yield is_ours
    finally:
        if is_ours:
            consortium.broker.stop()
            (consortium.broker.folder / STARTED).unlink(missing_ok=True)


def _is_started_by_us(consortium: Consortium, process: psutil.Process) -> bool:
    """Whether a coordinator of this folder has started this broker. Numbers of processes are used again, so its beginning counts too."""
    try:
        known = json.loads((consortium.broker.folder / STARTED).read_text(encoding="utf-8"))
        pid, began = int(known["pid"]), float(known["began"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    after = process.create_time() - began
    # Without a number, the coordinator was killed while it started the broker.
    return abs(after) < _SAME if pid == process.pid else pid == 0 and -_SAME < after < consortium.broker.patience


def _start_broker(consortium: Consortium) -> None:
    """Starts the broker, unless it runs, and writes down that it is ours."""

    def note(pid: int, began: float) -> None:
        disk.write_atomic(consortium.broker.folder / STARTED, json.dumps({"pid": pid, "began": began}).encode(), private=True)

    note(0, time.time())
    consortium.broker.start()
    process = consortium.broker.process()
    if process is not None:
        note(process.pid, process.create_time())


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
            reception, attendance, looked = Reception(self._desk, connection), Attendance(self._consortium, connection), -_ATTEND
            self._make_room(connection)
            inbox = connection.inbox([reception.branch])
            while not self._stop.is_set():
                delivery = inbox.next(_LOOK)
                if delivery is not None:
                    reception.take(delivery)
                    self._make_room(connection)
                if time.monotonic() >= looked + _ATTEND:
                    attendance.look()
                    looked = time.monotonic()
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
            _start_broker(self._consortium)


@contextmanager
def _open(hall: Hall) -> Iterator[None]:
    hall.open()
    try:
        yield
    finally:
        hall.close()

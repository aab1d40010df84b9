"""A sweep: the product of overrides with several values each, every combination a run of its own in a folder of its own.

``sweep.json`` holds the grid. It is written before the first run begins, so a sweep that was killed goes on when it is started again: runs that are
done are kept, those that were cut off go on, those that failed are tried again. Each run is a process, which ends when the sweep does.

How many threads and how much memory a run gets is arithmetic from the number of runs, the cores, the total memory, and the size of model and batch.
It stands in each run's recipe, so a run gives the same numbers however many are played at a time, and when it is resumed by hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO

import psutil

from fedfm.client.footprint import base_bytes, client_bytes
from fedfm.core import check, disk
from fedfm.core.errors import ConfigError, FedfmError, MissingExtra, RunError
from fedfm.core.words import LOSS, count, duration
from fedfm.engines import Embedded, Process
from fedfm.engines.embedded import total_memory
from fedfm.federation import Federation
from fedfm.models.foundation import device_of
from fedfm.recipe import dump, load, located, read
from fedfm.reports.runs import Entry, Table
from fedfm.run.folder import METRICS, RECIPE, is_finished
from fedfm.run.grid import Cell, grid
from fedfm.simulation import Simulation
from fedfm.verbs import Describe

log = logging.getLogger(__name__)
SWEEP, HIDDEN = "sweep.json", ".sweep"
# What python, torch and transformers take of a process's memory before they hold a model.
_LIBRARIES = 600_000_000
# Seconds that a process may take to end, and to let go of its folder.
_PATIENCE = 10.0
_TOLD_EVERY = 10.0

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Share:
    """What each run of a sweep gets of the machine, and how many fit on it.

    Args:
        jobs: Runs at a time.
        threads: Of each run.
        memory: Gigabytes that a run's bank may count on; ``None`` leaves it half of the machine's.
    """

    jobs: int
    threads: int
    memory: float | None

    def of(self, federation: Federation) -> Federation:
        """The federation with its share in its recipe; what the recipe says itself stays."""
        engine = federation.engine
        known = {item.name: getattr(engine, item.name) for item in fields(engine)}  # type: ignore[arg-type]
        changes = {name: getattr(self, name) for name in ("threads", "memory") if name in known and known[name] is None}
        return replace(federation, engine=replace(engine, **changes))  # type: ignore[type-var]


@dataclass(frozen=True)
class Member:
    """A run of the sweep.

    Args:
        name: Its folder's.
        values: What each field with several values has here.
        recipe: Its resolved recipe.
    """

    name: str
    values: Mapping[str, str]
    recipe: str


@dataclass
class Sweep:
    """A sweep's folder.

    Attributes:
        members: Its runs, in the order of the grid.
        errors: Why runs failed, by name.
    """

    path: Path
    title: str
    overrides: Sequence[str]
    share: Share
    members: Sequence[Member]
    errors: dict[str, str] = field(default_factory=dict)

    def save(self) -> None:
        """Writes ``sweep.json``, durably."""
        known = {
            "title": self.title,
            "overrides": list(self.overrides),
            "share": asdict(self.share),
            "runs": [asdict(member) for member in self.members],
            "errors": self.errors,
        }
        disk.write_atomic(self.path / SWEEP, (json.dumps(known, indent=1) + "\n").encode())

    @staticmethod
    def read(path: Path) -> Sweep | None:
        """The sweep in a folder; ``None`` where there is none.

        Raises:
            RunError: if its file is damaged.
        """
        try:
            known = json.loads((path / SWEEP).read_text(encoding="utf-8"))
            members = [Member(**member) for member in known["runs"]]
            return Sweep(path, known["title"], known["overrides"], Share(**known["share"]), members, known["errors"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path / SWEEP} is not what a sweep writes ({error}). Restore it, or choose another --out.") from error

    def table(self) -> Table:
        """The runs as they are now; a row for each combination, the seeds within it."""
        entries = []
        for member in self.members:
            values = {key: value for key, value in member.values.items() if key != "seed"}
            entries.append(Entry.of(self.path / member.name, values, self.errors.get(member.name, "")))
        return Table.of(self.title, entries)


def sweep(
    recipe: Federation | Path | str,
    overrides: Sequence[str],
    out: Path | str | None = None,
    *,
    jobs: int | None = None,
    threads: int | None = None,
    tell: Tell | None = None,
) -> Table:
    """Runs every combination of the overrides' values in ``out``, or goes on with the sweep that is there.

    Example::

        table = fedfm.sweep("recipe.yaml", ["tuning.LoRA.r=4,16", "seed=0..2"], "runs/ranks")

    Args:
        recipe: A federation, a recipe's file or its text.
        overrides: ``KEY=VALUE,VALUE,...`` each; ``a..b`` stands for whole numbers. See :func:`fedfm.run.grid.axis`.
        out: The sweep's folder; default ``runs/NAME-sweep``.
        jobs: Runs at a time; ``None`` for as many as cores and total memory hold. It changes no number.
        threads: Of each run; ``None`` for the cores divided by the runs that fit. A run's numbers are exact for one number of threads.
        tell: Told what happens, a line at a time.

    Returns:
        One row for each combination without the seed. It is also in ``sweep.csv`` and ``sweep.html``.

    Raises:
        ConfigError: if an override is none, or a recipe is refused; no run has begun then.
        RunError: if the folder holds a sweep of other runs, or is in use.
    """
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and not 1 <= value <= 1024:
            raise ConfigError(f"{name} is {value}; it must be from 1 to 1024.")
    tell = tell or (lambda text: None)
    base = recipe if isinstance(recipe, Federation) else load(recipe)
    cells, federations = plans(recipe, overrides)
    path = Path(out) if out is not None else Path("runs") / f"{base.name}-sweep"
    with _locked(path):
        before = Sweep.read(path)
        share = _share(before, cells, federations, threads, tell)
        title = f"{base.name}: {' '.join(overrides)}"
        members = _members(cells, [share.of(federation) for federation in federations], before, path)
        made = Sweep(path, title, overrides, share, members, {} if before is None else before.errors)
        if before is not None and len(before.members) < len(made.members):
            tell(f"{len(made.members) - len(before.members)} runs are added to the {len(before.members)} that are here.")
        for member in made.members:
            disk.write_atomic(_recipe_file(path, member), member.recipe.encode())
        made.save()
        _Play(made, jobs or share.jobs, tell).play()
        return made.table().written(path, "sweep")


def plans(recipe: Federation | Path | str, overrides: Sequence[str]) -> tuple[list[Cell], list[Federation]]:
    """The grid and its recipes, each checked as far as that goes without its model and data.

    Raises:
        ConfigError: if an override is none, a recipe is refused, or two are the same.
    """
    _, cells = grid(overrides)
    federations: list[Federation] = []
    text = dump(recipe) if isinstance(recipe, Federation) else recipe
    for cell in cells:
        try:
            plan = located(read(text, cell.overrides) if isinstance(text, Path) else load(text, cell.overrides))
            check.require(plan.resolved())
        except FedfmError as error:
            raise _refused(cell.name, error) from error
        federations.append(plan)
    first: dict[str, str] = {}
    for cell, plan in zip(cells, federations, strict=True):
        same = first.setdefault(dump(plan), cell.name)
        if same != cell.name:
            raise ConfigError(f"{cell.name} and {same} are the same recipe, written in two ways. Give each value once.")
    return cells, federations


def _members(cells: Sequence[Cell], plans: Sequence[Federation], before: Sweep | None, path: Path) -> list[Member]:
    """The runs; one that the folder knows already keeps its folder's name.

    Raises:
        RunError: if the folder knows runs that are not in the grid, or holds something else under a run's name.
    """
    if (path / RECIPE).exists():
        raise RunError(f"{path} holds a run, and its folder is its own. Choose another --out.")
    recipes = [dump(plan) for plan in plans]
    known = {} if before is None else {member.recipe: member.name for member in before.members}
    gone = [name for recipe, name in known.items() if recipe not in recipes]
    if gone and before is not None:
        raise RunError(
            f"{path} holds a sweep with other runs ({before.title}): {len(gone)} of its {len(known)} are not in this grid, such as {gone[0]}. "
            "A sweep may get more runs, and loses none. Give a grid that holds them too, with the recipe as it was, or choose another --out."
        )
    taken = set(known.values())
    members = []
    for cell, recipe in zip(cells, recipes, strict=True):
        name = known.get(recipe, cell.name)
        while recipe not in known and (name in taken or (before is None and (path / name).exists())):
            if before is None:
                raise RunError(f"{path / name} is there already, but {path} holds no sweep ({SWEEP}). Choose another --out.")
            name += "-more"
        taken.add(name)
        members.append(Member(name, cell.values, recipe))
    return members


# --- shares --------------------------------------------------------------------------------------------------------


def _share(before: Sweep | None, cells: Sequence[Cell], plans: Sequence[Federation], threads: int | None, tell: Tell) -> Share:
    """What a sweep began with, or what arithmetic gives a new one. Opens the model and the data of each kind of recipe that is to be played."""
    if before is None:
        return share(plans, _open(list(zip(cells, plans, strict=True)), tell), threads)
    if threads not in (None, before.share.threads):
        raise RunError(
            f"{before.path} began with {before.share.threads} threads for each run, and a run's numbers are exact for one number of threads. "
            "Leave --threads out, or choose another --out."
        )
    done = {member.recipe for member in before.members if _is_done(before.path / member.name)}
    _open([(cell, plan) for cell, plan in zip(cells, plans, strict=True) if dump(before.share.of(plan)) not in done], tell)
    return before.share


def _open(runs: Sequence[tuple[Cell, Federation]], tell: Tell) -> int:
    """Opens the model and the data of each kind of recipe; the most bytes that one of them takes."""
    kinds: dict[str, list[tuple[str, Federation]]] = {}
    for cell, plan in runs:
        resolved = plan.resolved()
        kind = repr((resolved.model, resolved.data, resolved.task, resolved.tuning, resolved.local))
        kinds.setdefault(kind, []).append((cell.name, plan))
    if runs:
        tell(f"{len(runs)} runs to play; opening the model and the data of {len(kinds)} kind{'' if len(kinds) == 1 else 's'} of recipe")
    return max((_opened(alike) for alike in kinds.values()), default=0)


def _opened(plans: Sequence[tuple[str, Federation]]) -> int:
    """Checks recipes of one kind against their model and data; the bytes that the largest of their banks takes.

    Args:
        plans: Recipes and the names of their runs.
    """
    name = plans[0][0]
    warnings = dict[str, None]()
    try:
        # Here and on the CPU, whatever engine plays them.
        simulation = Simulation.build(replace(plans[0][1], engine=Embedded(bank=1, device="cpu")))
        house = simulation.house
        with simulation.open() as session:
            roster = Describe().roster(simulation.federation.channel, session, house.clients, house.labels, house.key)
        for name, plan in plans:  # noqa: B007 (the error names it)
            for finding in check.require(plan.resolved(), len(house.clients), roster):
                if finding.level == "warning":
                    warnings[f"{finding.where}: {finding.text}"] = None
        bank = max(_bank(plan, len(house.clients)) for _, plan in plans)
        num_bytes = base_bytes(house) + client_bytes(house) * bank
    except FedfmError as error:
        raise _refused(name, error) from error
    for text in warnings:
        log.warning("%s", text)
    return num_bytes


def _refused(name: str, error: FedfmError) -> FedfmError:
    # One kind of error makes its message itself.
    kind = ConfigError if isinstance(error, MissingExtra) else type(error)
    return kind(f"The run {name!r} is refused, and so no run has begun. {error}")


def _bank(plan: Federation, num_clients: int) -> int:
    """Clients in the largest batch that the plan may have."""
    cohort = max(plan.resolved().sampler.cohort_size(num_clients), 1)
    return cohort if plan.engine.bank == "auto" else min(plan.engine.bank, cohort)


def share(plans: Sequence[Federation], num_bytes: int, threads: int | None = None, cores: int | None = None) -> Share:
    """The share of each run, by arithmetic: neither the clock nor free memory decides.

    As many runs at a time as there are cores (each with the threads that are asked for), and as half of the total memory holds with the whole cohort in
    one batch. A run whose clients are processes has the machine to itself.

    Args:
        plans: The recipes.
        num_bytes: Memory that the largest model and batch among them take.
        threads: Of each run, where they are asked for.
        cores: Instead of those that this process may use.
    """
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    stated = threads or max((getattr(plan.engine, "threads", None) or 0 for plan in plans), default=0)
    host = psutil.virtual_memory().total
    device = min(total_memory(device_of(plan.engine.device)) for plan in plans)
    fit = min(0.5 * host // (num_bytes + _LIBRARIES), 0.5 * device // num_bytes)
    jobs = max(1, min(len(plans), cores // (stated or 1), int(fit)))
    if any(isinstance(plan.engine, Process) for plan in plans):
        jobs = 1
    return Share(jobs, stated or max(1, cores // jobs), None if jobs == 1 else round(0.5 * device / jobs / 1e9, 3))


# --- playing -------------------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A run that is being played."""

    member: Member
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float


class _Play:
    """Plays the runs of a sweep that are not done, several at a time."""

    def __init__(self, sweep: Sweep, jobs: int, tell: Tell) -> None:
        self.sweep, self.jobs, self.tell = sweep, jobs, tell
        self.running: list[_Running] = []
        self.num_ended = 0

    def play(self) -> None:
        """Returns when every run is done or has failed."""
        waiting = [member for member in self.sweep.members if not _is_done(self.sweep.path / member.name)]
        total, self.num_ended = len(self.sweep.members), len(self.sweep.members) - len(waiting)
        if self.num_ended:
            self.tell(f"{self.num_ended} of {total} runs are done already.")
        if waiting:
            jobs, threads = min(self.jobs, len(waiting)), self.sweep.share.threads
            self.tell(f"{len(waiting)} runs to play, {jobs} at a time with {threads} thread{'' if threads == 1 else 's'} each")
        told = time.monotonic()
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    self.running.append(self._start(waiting.pop(0)))
                time.sleep(0.05)
                for running in [one for one in self.running if one.process.poll() is not None]:
                    self.running.remove(running)
                    self._ended(running)
                if self.running and time.monotonic() - told > _TOLD_EVERY:
                    told = time.monotonic()
                    self.tell("playing " + ", ".join(f"{one.member.name} (round {self._round(one.member)})" for one in self.running))
        finally:
            self._stop()

    def _start(self, member: Member) -> _Running:
        out, text = self.sweep.path / member.name, str(self.sweep.share.threads)
        _wait_until_free(out)
        logs = self.sweep.path / HIDDEN / "logs"
        disk.make_folder(logs)
        output = (logs / f"{member.name}.log").open("ab")
        # Threads are set before torch loads, so that everything in the process has as many.
        environment = {**os.environ, "OMP_NUM_THREADS": text, "MKL_NUM_THREADS": text}
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        process = subprocess.Popen(
            [sys.executable, "-m", "fedfm.run.job", str(_recipe_file(self.sweep.path, member)), str(out)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which ends its runs
        )
        return _Running(member, process, output, time.monotonic())

    def _ended(self, running: _Running) -> None:
        self.num_ended += 1
        _close(running)
        name, code = running.member.name, running.process.returncode
        where = f"[{self.num_ended}/{len(self.sweep.members)}] {name}"
        error = None if code == 0 else _last_error(Path(running.log.name), code)
        if error is None:
            self.sweep.errors.pop(name, None)
            self.tell(f"{where}: done in {duration(time.monotonic() - running.began)}{self._outcome(name)}")
        else:
            self.sweep.errors[name] = error
            self.tell(f"{where}: failed: {error}")
        self.sweep.save()

    def _outcome(self, name: str) -> str:
        entry = Entry.of(self.sweep.path / name, {})
        metric = LOSS if entry.run is None else entry.run.metric
        before, after = (metric.show(entry.value(metric.name, last)) for last in (False, True))
        return "" if after == "-" else f", {metric.title} {before} -> {after}"

    def _round(self, member: Member) -> str:
        try:
            lines = (self.sweep.path / member.name / METRICS).read_bytes().count(b"\n")
        except OSError:
            return "-"
        return count(max(lines - 1, 0))

    def _stop(self) -> None:
        for one in self.running:
            one.process.terminate()
        for one in self.running:
            try:
                one.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            _close(one)
        self.running.clear()


def _is_done(folder: Path) -> bool:
    try:
        return is_finished(folder)
    except RunError:
        return False  # playing it tells what is damaged


def _close(running: _Running) -> None:
    running.log.close()
    if running.process.stdin is not None:
        with contextlib.suppress(OSError):
            running.process.stdin.close()


def _recipe_file(path: Path, member: Member) -> Path:
    return path / HIDDEN / "recipes" / f"{member.name}.yaml"


def _last_error(path: Path, code: int) -> str:
    """Why a run failed: the message at the end of its log."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-50:] if line.strip()]
    ours = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    if code == 2 and ours is not None:
        return ours
    if code < 0:
        reason = " (the system may have run out of memory)" if code == -9 else ""
        return f"its process was ended by signal {-code}{reason}; see {path}"
    return f"{lines[-1] if lines else 'it ended without a word'} (exit code {code}); see {path}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a sweep's folder against other processes.

    Raises:
        RunError: if another one has it.
    """
    lock = path / HIDDEN / "lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk.cannot_write(lock, error) from error
    descriptor = disk.lock(lock, f"{path} is in use by another sweep. Wait for it to end, or stop it, then try again.")
    try:
        yield
    finally:
        if not (path / SWEEP).exists():
            # It was refused, and leaves nothing.
            shutil.rmtree(path / HIDDEN, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rmdir()
        os.close(descriptor)


def _wait_until_free(folder: Path) -> None:
    """Waits while a run's process of a sweep that was killed is still ending."""
    lock = folder / ".lock"
    ends = time.monotonic() + _PATIENCE
    while lock.exists() and time.monotonic() < ends:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.1)

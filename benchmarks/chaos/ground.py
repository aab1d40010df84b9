"""A consortium on this machine in which everything can be killed: a real broker over mutual TLS, and a coordinator and members that are forks.

Members keep what they remember with SCAFFOLD and with the error feedback of top-k. What is killed is started again at once, as systemd would.
The broker delivers a message again 1.5 s after its receiver was killed, instead of 12 s; nothing else differs from what ``fedfm serve`` and ``fedfm join`` do.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.forks import Fork, Trap
from fedfm.bounds import MedianBounds
from fedfm.client import log as owner_log
from fedfm.client.memory import home
from fedfm.client.policy import read_policy
from fedfm.core.errors import FedfmError, WireError
from fedfm.data import Data
from fedfm.engines import Embedded, Nats
from fedfm.engines import nats as engine
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.methods import Scaffold
from fedfm.run.folder import MODEL, RECIPE, read_journal
from fedfm.run.loop import resume, run
from fedfm.service import member as service
from fedfm.silos.membership import Membership
from fedfm.tasks import CausalLM
from fedfm.testing import tiny
from fedfm.testing.silos import Silos
from fedfm.transforms import ClipByNorm, TopK
from fedfm.tuning import LoRA

OWNERS = ("anna", "bela", "cleo")
COORDINATOR, BROKER = "coordinator", "broker"
ROUNDS = 3
ACK_WAIT = 1.5
# Seconds: that a run may take before it counts as stuck, that a round may take, that a member's last steps may take, between two looks at the processes.
PATIENCE, DEADLINE, _LAST, _LOOK = 90.0, 60.0, 3.0, 0.01


@dataclass(frozen=True)
class Strike:
    """A kill at an instant.

    Args:
        after: Seconds since the run began, or since it went on.
        victim: ``coordinator``, ``broker`` or a member.
    """

    after: float
    victim: str


@dataclass(frozen=True)
class Left:
    """What a run left, as far as it must be the same after every kill.

    Attributes:
        states: BLAKE2b of the server's state after each round: parameters, control variates, and which ticket of each member was counted.
        models: BLAKE2b of each file of the model.
        counted: Who was counted in each round, with the numbers of its work.
        metrics: What each round measured.
        released: For each member, what left it: verb, round and BLAKE2b.
    """

    states: tuple[str, ...]
    models: Mapping[str, str]
    counted: tuple[Mapping[str, Any], ...]
    metrics: tuple[Mapping[str, Any], ...]
    released: Mapping[str, frozenset[tuple[str, int, str]]]


@dataclass
class Outcome:
    """What came of a run that was disturbed.

    Attributes:
        kills: How often something was killed.
        seconds: How long it took.
        wrong: What differs from the undisturbed run, or broke a rule.
    """

    name: str
    kills: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def rows(owner: str) -> list[dict[str, str]]:
    """A member's own rows."""
    k = OWNERS.index(owner)
    return [{"text": f"{tiny.TEXT[(17 * i + 5 * k) % 256]} {tiny.TEXT[(i * (k + 1)) % 256]}"} for i in range(5 + 2 * k)]


def federation(folder: Path) -> Federation:
    """The plan of all runs, for the embedded engine, where it has the same numbers.

    Args:
        folder: Where the rows of all members are written.
    """
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"owner": owner, **row}) + "\n" for owner in OWNERS for row in rows(owner)))
    return Federation(
        model=tiny.spec("Llama"),
        data=Data(str(path), by="owner", test_fraction=0.3),
        task=CausalLM(max_length=16),
        tuning=LoRA(r=4, dropout=0.1),
        local=SGD(lr=0.1, steps=2, batch_size=2),
        method=Scaffold(),
        transforms=(TopK(fraction=0.5), ClipByNorm(max_norm=0.5)),
        engine=Embedded(bank=1, device="cpu"),
        rounds=ROUNDS,
        deadline=DEADLINE,
        # The network engine's own default, whose medians are part of the state.
        bounds=MedianBounds(),
    )


class Ground:
    """The consortium, with members that are up.

    Args:
        folder: An empty folder for all of it.

    Attributes:
        embedded: The plan of all runs, for the embedded engine, where it has the same numbers.
        whole: What an undisturbed run leaves.
        steps: The names of the durable steps of the coordinator, and of the first member, in an undisturbed run.
        seconds: How long that takes.
        members: The members' processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "runs").mkdir(parents=True)
        self.embedded = federation(folder)
        self.silos = Silos(folder / "consortium", {owner: rows(owner) for owner in OWNERS})
        self.plan = replace(self.embedded, engine=Nats(str(self.silos.home(COORDINATOR)), device="cpu"))
        self.members: dict[str, Fork] = {}
        self.homes = {owner: self.silos.home(owner) for owner in OWNERS}
        self.whole: Left | None = None
        self.steps: dict[str, list[str]] = {}
        self.seconds = 0.0

    # --- processes --------------------------------------------------------------------------------------------------------

    def join(self, name: str, trap: Trap | None = None, steps: Path | None = None, before: Callable[[], None] = lambda: None) -> None:
        """Starts a member, instead of the one that runs.

        Args:
            before: Called in the new process first.
        """
        if name in self.members:
            self.members[name].kill()
        folder = self.homes[name]

        def work() -> None:
            before()
            policy = read_policy(folder / "policy.yaml")
            service.Member(Membership.read(folder), str(folder / "rows.jsonl"), policy, device="cpu").serve()

        self.members[name] = Fork(work, self.log(name), trap, self.broker, steps)

    def renew(self, name: str, trap: Trap | None = None, steps: Path | None = None) -> None:
        """Starts a member as for the first time, so that its durable steps are the same each time."""
        if name in self.members:
            self.members[name].kill()
        (self.homes[name] / "secret").unlink(missing_ok=True)
        self.join(name, trap, steps)

    def coordinate(self, plan: Federation, trap: Trap | None = None, steps: Path | None = None, rounds: int | None = None) -> Fork:
        """Starts the coordinator of a run, which plays it or goes on with it, and waits while the broker is away."""
        out = self.out(plan)

        def work() -> None:
            while True:
                try:
                    for _ in resume(out, rounds) if (out / RECIPE).is_file() else run(plan, rounds, out=out):
                        pass
                    return
                except WireError as error:
                    print(f"the run waits for the broker: {error}", flush=True)
                    time.sleep(0.3)

        return Fork(work, self.log(COORDINATOR), trap, self.broker, steps)

    @property
    def broker(self) -> int:
        """The broker's process, 0 where it does not run."""
        process = self.silos.broker.process()
        return 0 if process is None else process.pid

    def mend(self) -> int:
        """Starts what was killed; how much that was.

        Raises:
            RuntimeError: if a member ended by itself.
        """
        num_killed = 0
        if not self.broker:
            num_killed += 1
            self.silos.broker.start()
        for name, fork in list(self.members.items()):
            status = fork.poll()
            if status == -signal.SIGKILL:
                num_killed += 1
                self.join(name)
            elif status is not None:
                self.join(name)
                raise RuntimeError(f"{name} ended by itself with {status}: {self.tail(name)}")
        return num_killed

    def strike(self, victim: str, coordinator: Fork) -> None:
        """Kills somebody; :meth:`mend` counts it and starts it again, but for the coordinator."""
        if victim == COORDINATOR:
            coordinator.kill()
        elif victim == BROKER:
            broker = self.broker
            if broker:
                os.kill(broker, signal.SIGKILL)
        else:
            self.members[victim].kill()

    # --- runs -------------------------------------------------------------------------------------------------------------

    def out(self, plan: Federation) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / plan.name

    def play(self, name: str, where: str = COORDINATOR, trap: Trap | None = None, strikes: Sequence[Strike] = ()) -> Outcome:
        """Plays a run that is disturbed, and compares it with the undisturbed one.

        Args:
            where: In whose process the trap is.
            strikes: Kills at instants.
        """
        plan, outcome = replace(self.plan, name=name), Outcome(name)
        if trap is not None and where in OWNERS:
            self.renew(where, trap)
        began = time.monotonic()
        try:
            coordinator = self.coordinate(plan, trap if where == COORDINATOR else None)
            waiting = sorted(strikes, key=lambda strike: strike.after)
            while (status := coordinator.poll()) != 0:
                if status == -signal.SIGKILL:
                    outcome.kills += 1
                    coordinator = self.coordinate(plan)
                elif status is not None:
                    raise RuntimeError(f"the coordinator ended with {status}: {self.tail(COORDINATOR)}")
                if waiting and time.monotonic() >= began + waiting[0].after:
                    self.strike(waiting.pop(0).victim, coordinator)
                outcome.kills += self.mend()
                if time.monotonic() > began + PATIENCE:
                    coordinator.kill()
                    raise RuntimeError(f"it is stuck: {self.tail(COORDINATOR)}")
                time.sleep(_LOOK)
            if trap is not None and where in OWNERS:
                # Its last steps come after the coordinator has its answer.
                until = time.monotonic() + _LAST
                while not outcome.kills and time.monotonic() < until:
                    outcome.kills += self.mend()
                    time.sleep(_LOOK)
                self.join(where)
            outcome.wrong += self.differences(plan)
        except (RuntimeError, FedfmError) as error:
            outcome.wrong.append(f"{type(error).__name__}: {error}")
        outcome.seconds = time.monotonic() - began
        return outcome

    def undisturbed(self) -> None:
        """Plays the run that all others are compared with, and holds it against the embedded engine.

        Raises:
            RuntimeError: if they differ.
        """
        for name in OWNERS:
            self.join(name)
        # A member writes its rules down in its first run alone.
        self._await(self.coordinate(replace(self.plan, name="first")))
        for name in OWNERS:
            self.renew(name, steps=self.folder / f"steps-{name}")
        plan = replace(self.plan, name="undisturbed")
        began = time.monotonic()
        self._await(self.coordinate(plan, steps=self.folder / f"steps-{COORDINATOR}"))
        self.seconds = time.monotonic() - began
        self.whole = self.left(plan)
        for name in (COORDINATOR, OWNERS[0]):
            self.steps[name] = (self.folder / f"steps-{name}").read_text().splitlines()
        embedded = replace(self.embedded, name="embedded")
        self._await(self.coordinate(embedded))
        states = tuple(mark.state for mark in read_journal(self.out(embedded)).rounds)
        if states != self.whole.states:
            raise RuntimeError("the undisturbed run has other weights than the embedded engine")

    def _await(self, coordinator: Fork, patience: float = PATIENCE) -> None:
        until = time.monotonic() + patience
        while (status := coordinator.poll()) is None and time.monotonic() < until:
            time.sleep(_LOOK)
        if status != 0:
            coordinator.kill()
            raise RuntimeError(f"the run ended with {status}: {self.tail(COORDINATOR)}")

    # --- what must hold ---------------------------------------------------------------------------------------------------

    def left(self, plan: Federation) -> Left:
        """What a run left.

        Raises:
            RunError: if the journal, or a member's log, is damaged.
        """
        out = self.out(plan)
        journal = read_journal(out)
        records = list(journal.records(len(journal.rounds) - 1))
        models = {path.name: _digest(path.read_bytes()) for path in sorted((out / MODEL).rglob("*.safetensors"))}
        return Left(
            states=tuple(mark.state for mark in journal.rounds),
            models=models,
            counted=tuple(record["clients"] for record in records),
            metrics=tuple(record["metrics"] for record in records),
            released={owner: frozenset(self.released(owner, plan.name)) for owner in OWNERS},
        )

    def released(self, owner: str, run: str) -> Iterator[tuple[str, int, str]]:
        """What left a member for a run: verb, round, BLAKE2b. Each line of the log is checked.

        Raises:
            RunError: if the log is damaged.
        """
        for line in owner_log.read(home(self.homes[owner], owner) / owner_log.NAME):
            if line.event == "release" and line.what["run"] == run:
                yield line.what["verb"], line.what["round"], line.what["blake2b"]

    def differences(self, plan: Federation) -> list[str]:
        """What differs from the undisturbed run, or breaks a rule."""
        assert self.whole is not None
        left, wrong = self.left(plan), list[str]()
        wrong += [f"{name} differ" for name in vars(left) if getattr(left, name) != getattr(self.whole, name)]
        journal = read_journal(self.out(plan))
        for record in journal.records(len(journal.rounds) - 1):
            if record["round"] and (record["failures"] or sorted(record["clients"]) != sorted(record["cohort"])):
                wrong.append(f"round {record['round']}: {record['failures'] or 'not each member was counted once'}")
        if not journal.ended:
            wrong.append("the run has no end")
        job = json.loads((self.out(plan) / engine.JOB).read_text())["name"]
        for owner in OWNERS:
            taken = [json.loads(line)[1] for line in (self.homes[owner] / "window").read_text().splitlines()]
            ours = [errand for errand in taken if errand.startswith(f"{job} ")]
            if len(ours) != len(set(ours)):
                wrong.append(f"{owner} took a message twice")
        return wrong

    def log(self, name: str) -> Path:
        """Where a process says what it does."""
        return self.folder / f"{name}.txt"

    def tail(self, name: str, lines: int = 12) -> str:
        """The last that a process said."""
        path = self.log(name)
        return " / ".join(path.read_text(errors="replace").splitlines()[-lines:])[-2000:] if path.exists() else ""


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


@contextmanager
def opened(folder: Path) -> Iterator[Ground]:
    """A ground whose members are up and whose undisturbed run was played; whatever was started is ended."""
    before = {name: os.environ.get(name) for name in ("FEDFM_CACHE", "TOKENIZERS_PARALLELISM")}
    os.environ |= {"FEDFM_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    waits = engine.ACK_WAIT, service._BEAT
    engine.ACK_WAIT, service._BEAT = ACK_WAIT, ACK_WAIT / 4
    torch.set_num_threads(1)
    ground = Ground(folder)
    try:
        with ground.silos:
            # Imports what a run needs, once. Nothing is trained here.
            for _ in run(replace(ground.embedded, name="warm", rounds=0), out=folder / "warm"):
                pass
            while threading.active_count() > 1:
                time.sleep(_LOOK)
            ground.undisturbed()
            try:
                yield ground
            finally:
                for fork in ground.members.values():
                    fork.kill()
    finally:
        engine.ACK_WAIT, service._BEAT = waits
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

"""What is done to the consortium: kills at durable steps and at instants, and what members and administrators do in the middle of a run."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from benchmarks.chaos.forks import Trap
from benchmarks.chaos.ground import BROKER, COORDINATOR, OWNERS, ROUNDS, Ground, Outcome, Strike
from fedfm.core.errors import FedfmError
from fedfm.engines.nats import HELLO, NatsSession
from fedfm.federation import Federation
from fedfm.run.folder import METRICS, read_journal
from fedfm.silos import certificates, consortium
from fedfm.silos.enrol import Desk, Entering
from fedfm.testing import tiny
from fedfm.tuning import Full
from fedfm.wire.stored import Stored

ANNA = OWNERS[0]
KINDS: Mapping[str, tuple[str, Literal["kill", "broker", "full"]]] = {
    "coordinator": (COORDINATOR, "kill"),
    "member": (ANNA, "kill"),
    "broker, at a step of the coordinator": (COORDINATOR, "broker"),
    "broker, at a step of a member": (ANNA, "broker"),
}
_UPLOAD_AT = 20
UNCERTAIN = 10
"""The last steps of a process, which it may not come to before its run is over."""


def at_steps(ground: Ground, kind: str, points: int | None = None) -> Iterator[Outcome]:
    """A run for each durable step, in which somebody is killed there.

    Args:
        kind: Who, a key of :data:`KINDS`.
        points: How many steps, evenly spread; ``None`` for all.
    """
    where, what = KINDS[kind]
    count = len(ground.steps[where])
    for step in spread(count, points):
        outcome = ground.play(f"{where}-{what}-{step}", where, Trap(step, what))
        outcome.name = f"{kind} killed {ground.steps[where][step - 1]!r} (step {step} of {count})"
        if outcome.kills != 1 and step <= count - UNCERTAIN:
            outcome.wrong.append(f"there were {outcome.kills} kills instead of 1")
        yield outcome


def spread(count: int, points: int | None) -> list[int]:
    """Some of the steps from 1 to ``count``, evenly spread; ``None`` for all."""
    return list(range(1, count + 1)) if points is None else sorted({1 + i * (count - 1) // max(points - 1, 1) for i in range(points)})


def at_instants(ground: Ground, count: int, seed: int = 0) -> Iterator[Outcome]:
    """Runs in which any of the three is killed one to three times, at random."""
    rng = random.Random(seed)
    for i in range(count):
        victims = [rng.choice((COORDINATOR, BROKER, rng.choice(OWNERS))) for _ in range(rng.randint(1, 3))]
        strikes = [Strike(rng.uniform(0.0, 1.2 * ground.seconds), victim) for victim in victims]
        outcome = ground.play(f"random-{seed}-{i}", strikes=strikes)
        outcome.name = "killed: " + ", ".join(
            f"{strike.victim} after {strike.after:.2f} s" for strike in sorted(strikes, key=lambda s: s.after)
        )
        yield outcome


# --- in the middle of a run ---------------------------------------------------------------------------------------------


def new_machine(ground: Ground) -> Outcome:
    """A member's folder is moved to another machine, where nothing was prepared, and the member goes on there."""

    def move() -> None:
        ground.members[ANNA].kill()
        folder = ground.folder / "another-machine" / ANNA
        folder.parent.mkdir()
        shutil.move(ground.homes[ANNA], folder)
        ground.homes[ANNA] = folder
        ground.join(ANNA, before=_fresh_cache(folder.parent / "cache"))

    return _in_the_middle(ground, "new-machine", move)


def renewal(ground: Ground) -> Outcome:
    """The broker, the coordinator and a member get new certificates; what they had lets nobody in any more."""

    def renew() -> None:
        with _always_stale():
            ground.silos.consortium.renew(certificates.now())
        now = certificates.now()
        ground.members[ANNA].kill()
        entering = Entering.begin(ground.silos.consortium.invite(ANNA, now), ground.homes[ANNA])
        answer = Desk(ground.silos.consortium).answer(entering.ask(now))
        if answer is None or entering.accept(answer.data, certificates.now()) is None:
            raise RuntimeError("the member got no new certificate")
        ground.join(ANNA)

    return _in_the_middle(ground, "renewal", renew)


def greeting(ground: Ground) -> Outcome:
    """A member is killed with its greeting, before the request that follows it is there: it must not find the request first when it is back."""
    plan, outcome = replace(ground.plan, name="greeting"), Outcome("killed with the greeting, before the request was there")
    with _noting(outcome), _slow_after_a_greeting():
        ground.renew(ANNA, Trap(1 + ground.steps[ANNA].index("before hello")))
        _drive(ground, plan, outcome)
        outcome.wrong += ground.differences(plan)
        if outcome.kills != 1:
            outcome.wrong.append(f"there were {outcome.kills} kills instead of 1")
    return outcome


def older_copy(ground: Ground) -> Outcome:
    """A member comes back with a copy of its folder from before its last counted work: it refuses by name, and goes on with the right one."""
    plan, outcome = replace(ground.plan, name="older-copy"), Outcome("older-copy")
    folder, old, right = ground.homes[ANNA], ground.folder / "old", ground.folder / "right"
    with _noting(outcome):
        ground._await(ground.coordinate(plan, rounds=1))
        shutil.copytree(folder, old)
        ground._await(ground.coordinate(plan, rounds=3))
        ground.members[ANNA].kill()
        shutil.move(folder, right)
        shutil.copytree(old, folder)
        ground.join(ANNA)
        ground._await(ground.coordinate(plan, rounds=4))
        ground.members[ANNA].kill()
        shutil.rmtree(folder)
        shutil.copytree(right, folder)
        ground.join(ANNA)
        ground._await(ground.coordinate(plan, rounds=5))
        *_, fourth, fifth = read_journal(ground.out(plan)).records(5)
        reasons = [failure["reason"] for failure in fourth["failures"] if failure["client"] == ANNA]
        if not any("no longer has what it remembered with ticket 3" in reason for reason in reasons):
            outcome.wrong.append(f"the older copy was not refused by name: {fourth['failures']}")
        if ANNA in fourth["clients"] or set(fourth["clients"]) != set(OWNERS[1:]):
            outcome.wrong.append(f"round 4 counted {sorted(fourth['clients'])}")
        if fifth["failures"] or set(fifth["clients"]) != set(OWNERS):
            outcome.wrong.append(f"round 5, with the right folder, failed: {fifth['failures']}")
    return outcome


def full_disk(ground: Ground, where: str, step: int) -> Outcome:
    """The disk is full at a durable step, once: a typed error, and the run goes on to its end with nobody counted twice."""
    plan, name = replace(ground.plan, name=f"full-{where}-{step}"), COORDINATOR if where == COORDINATOR else ANNA
    outcome = Outcome(f"disk full at {ground.steps[name][step - 1]!r} of {where} (step {step})")
    with _noting(outcome):
        trap = Trap(step, "full")
        if name == ANNA:
            ground.join(ANNA, trap)
        began = ground.log(COORDINATOR).stat().st_size, ground.log(ANNA).stat().st_size
        coordinator = ground.coordinate(plan, trap if name == COORDINATOR else None)
        until = time.monotonic() + 90.0
        while (status := coordinator.poll()) != 0:
            if status is not None:
                coordinator = ground.coordinate(plan)
            if ground.members[ANNA].poll() is not None:
                ground.join(ANNA)
            if time.monotonic() > until:
                coordinator.kill()
                raise RuntimeError(f"it is stuck: {ground.tail(COORDINATOR)}")
            time.sleep(0.01)
        said = _since(ground.log(COORDINATOR), began[0]) + _since(ground.log(ANNA), began[1])
        if "The disk is full" not in said:
            outcome.wrong.append("nothing said that the disk was full")
        records = list(read_journal(ground.out(plan)).records(ROUNDS))
        failures = [failure["reason"] for record in records for failure in record["failures"]]
        failures += [reason for record in records for reason in record["metrics"].get("eval", {}).get("failed", {}).values()]
        outcome.wrong += [f"failed otherwise: {reason}" for reason in failures if "disk is full" not in reason]
        if not failures:
            outcome.wrong += ground.differences(plan)
        for owner in OWNERS:
            list(ground.released(owner, plan.name))  # Each line of the log is checked.
    return outcome


def upload(ground: Ground, victim: Literal["broker", "member"]) -> Outcome:
    """A killed broker, or a killed member, in the middle of an upload of many chunks: what the broker has is not sent again."""
    outcome = Outcome(f"{victim} killed in the middle of an upload")
    plan = replace(
        ground.plan,
        name=f"upload-{victim}",
        rounds=1,
        model=tiny.spec("Llama", hidden_size=512, intermediate_size=512),
        tuning=Full(),
        method=None,
        transforms=(),
    )
    puts = ground.folder / f"puts-{victim}"
    with _noting(outcome), _watched_puts(ground, puts, victim):
        ground.join(ANNA)
        _drive(ground, plan, outcome)
        sent = [int(line) for line in puts.read_text().splitlines()]
        again = [index for index in sorted(set(sent)) if sent.count(index) > 1]
        # Those that were on their way when it was cut are sent again.
        if len(set(sent)) < _UPLOAD_AT + 5 or (victim == "member" and len(again) > 8) or (victim == "broker" and again):
            outcome.wrong.append(f"of {len(set(sent))} chunks, {len(again)} were sent again")
        record = list(read_journal(ground.out(plan)).records(1))[1]
        if record["failures"] or set(record["clients"]) != set(OWNERS) or outcome.kills != 1:
            outcome.wrong.append(f"{outcome.kills} kills; counted {sorted(record['clients'])}, failed {record['failures']}")
    return outcome


def _drive(ground: Ground, plan: Federation, outcome: Outcome, then: Callable[[], None] | None = None) -> None:
    """Plays a run to its end while what was killed is started again.

    Args:
        then: Called once, when the first round was committed.
    """
    coordinator, began = ground.coordinate(plan), time.monotonic()
    while (status := coordinator.poll()) != 0:
        if status is not None:
            raise RuntimeError(f"the coordinator ended with {status}: {ground.tail(COORDINATOR)}")
        if then is not None and _num_measured(ground.out(plan) / METRICS) >= 2:
            then()
            then = None
        outcome.kills += ground.mend()
        if time.monotonic() > began + 90.0:
            coordinator.kill()
            raise RuntimeError(f"it is stuck: {ground.tail(COORDINATOR)}")
        time.sleep(0.005)
    if then is not None:
        raise RuntimeError("the run was over before anything could be done in the middle of it")


def _in_the_middle(ground: Ground, name: str, then: Callable[[], None]) -> Outcome:
    plan, outcome = replace(ground.plan, name=name), Outcome(name)
    with _noting(outcome):
        _drive(ground, plan, outcome, then)
        outcome.wrong += ground.differences(plan)
    return outcome


@contextmanager
def _noting(outcome: Outcome) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    except (RuntimeError, FedfmError) as error:
        outcome.wrong.append(f"{type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - began


def _num_measured(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _since(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def _fresh_cache(folder: Path) -> Callable[[], None]:
    return lambda: os.environ.update(FEDFM_CACHE=str(folder))


@contextmanager
def _always_stale() -> Iterator[None]:
    before = consortium._RENEW
    consortium._RENEW = timedelta(days=100_000)
    try:
        yield
    finally:
        consortium._RENEW = before


@contextmanager
def _slow_after_a_greeting() -> Iterator[None]:
    post = NatsSession._post

    def slow(self: NatsSession, client: str, kind: str, *others: Any) -> int:
        sequence = post(self, client, kind, *others)
        if kind == HELLO:
            time.sleep(0.4)
        return sequence

    NatsSession._post = slow  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        NatsSession._post = post  # type: ignore[method-assign]


@contextmanager
def _watched_puts(ground: Ground, path: Path, victim: str) -> Iterator[None]:
    """Notes each chunk that the member sends, and kills somebody at one of them, once."""
    put, branch = Stored.put, ground.silos.names.up(ANNA)

    def watched(self: Stored, id: str, index: int, data: bytes) -> None:
        if self._branch.stream != branch.stream:
            put(self, id, index, data)
            return
        with path.open("a") as file:
            file.write(f"{index}\n")
        put(self, id, index, data)
        if path.read_text().count("\n") == _UPLOAD_AT:
            Trap(0, "broker" if victim == "broker" else "kill").spring(ground.broker)

    Stored.put = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stored.put = put  # type: ignore[method-assign]
        ground.join(ANNA)

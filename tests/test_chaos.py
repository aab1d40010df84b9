"""Coordinator, broker and members killed with SIGKILL in the middle of runs: each run ends with the weights of one that nothing disturbed.

``make chaos`` does the same at every durable step and at 200 random instants.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedfm.core.errors import MissingExtra

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.client import log as owner_log
from fedfm.client.memory import home
from fedfm.data import Data
from fedfm.run.folder import METRICS, read_journal
from fedfm.run.loop import run
from fedfm.service.coordinator import submit
from fedfm.service.jobs import Job
from fedfm.silos.consortium import COORDINATOR
from fedfm.testing.broker import server
from fedfm.testing.silos import Silos

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks run from the checkout and are never installed
ground = importlib.import_module("benchmarks.chaos.ground")

try:
    server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow
ROUNDS = 24
# Who is killed at a time; ten in all, each of which starts from cold.
KILLS = (("broker",), ("anna", "bela"), ("broker", "anna"), ("serve",), ("serve", "bela"), ("serve", "broker"))


def test_forks_are_killed_at_durable_steps_and_at_random_instants(tmp_path: Path) -> None:
    """And members move, come back with an older copy, get new certificates, and find their disks full."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-m", "benchmarks.chaos", "--quick", "--json", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = {row["kind"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert sum(row["kills"] for row in made.values()) >= 30 and not any(row["wrong"] for row in made.values())
    assert len(made) == 11 and all(row["runs"] for row in made.values())


class Cold:
    """A consortium whose processes start from nothing, as ``fedfm serve`` and ``fedfm join`` do.

    Args:
        folder: An empty folder for all of it.
    """

    def __init__(self, folder: Path) -> None:
        self.silos = Silos(folder / "silos", {owner: ground.rows(owner) for owner in ground.OWNERS})
        self.folder, self.log = self.silos.home(COORDINATOR), folder / "serve.txt"
        self.serve = self._serve()

    def _serve(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            command = [sys.executable, "-P", "-m", "fedfm.cli.main", "serve", str(self.folder)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def kill(self, victims: tuple[str, ...]) -> None:
        """Ends them with SIGKILL, and starts those of them whom nobody else does; the coordinator starts the broker."""
        for victim in victims:
            if victim == "broker":
                self.silos.kill_broker()
            elif victim == "serve":
                self.serve.kill()
                self.serve.wait()
            else:
                self.silos.kill(victim)
        if "serve" in victims:
            self.serve = self._serve()
        for victim in set(victims) & set(ground.OWNERS):
            self.silos.start(victim)

    def close(self) -> None:
        """Ends everything."""
        self.serve.kill()
        self.serve.wait()
        for owner in list(self.silos.processes):
            self.silos.kill(owner)
        self.silos.broker.stop()


@contextmanager
def cold(folder: Path) -> Iterator[Cold]:
    made = Cold(folder)
    try:
        yield made
    finally:
        made.close()


def test_ten_restarts_from_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    plan = replace(ground.federation(tmp_path), rounds=ROUNDS, name="cold", deadline=None)
    *_, _ = run(plan, out=tmp_path / "alone")
    rng = random.Random(0)
    with cold(tmp_path) as consortium:
        consortium.silos.start()
        job = submit(consortium.folder, replace(plan, data=Data(str(tmp_path / "nowhere.jsonl"), test_fraction=0.3)))
        for victims in KILLS:
            wait_for_rounds(job, num_measured(job) + 1, consortium)
            time.sleep(rng.uniform(0.0, 0.3))
            assert job.state == "running"
            consortium.kill(victims)
        wait_for_rounds(job, ROUNDS + 1, consortium)
        until = time.monotonic() + 60.0
        while job.state == "running" and time.monotonic() < until:
            time.sleep(0.05)
        assert job.state == "finished", consortium.log.read_text()[-2000:]
        journal, alone = read_journal(job.run), read_journal(tmp_path / "alone")
        assert [mark.state for mark in journal.rounds] == [mark.state for mark in alone.rounds]
        for record in journal.records(ROUNDS):
            assert not record["failures"] and (not record["round"] or sorted(record["clients"]) == sorted(ground.OWNERS))
        for owner in ground.OWNERS:
            # As `fedfm log --verify` reads it.
            lines = list(owner_log.read(home(consortium.silos.home(owner), owner) / owner_log.NAME))
            rounds = {int(line.what["round"]) for line in lines if line.event == "release" and line.what["verb"] == "train"}
            assert rounds == set(range(1, ROUNDS + 1))


def num_measured(job: Job) -> int:
    path = job.run / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rounds(job: Job, rounds: int, consortium: Cold) -> None:
    until = time.monotonic() + 120.0
    while num_measured(job) < rounds:
        assert time.monotonic() < until, (
            f"{num_measured(job)} rounds are done, {rounds} are waited for: {consortium.log.read_text()[-2000:]}"
        )
        time.sleep(0.02)

"""A consortium as people start it: a broker, a coordinator and two members, each a process of its own, and a run that is submitted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedfm.core.errors import ConfigError, MissingExtra

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.recipe import dump
from fedfm.run.folder import state_after
from fedfm.run.loop import run
from fedfm.silos.coordinator import Job, jobs, require_folder
from fedfm.testing import tiny
from fedfm.testing.broker import server
from fedfm.testing.parts import same
from fedfm.testing.silos import Consortium

try:
    server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow
OWNERS = ("anna", "bela")


def fedfm(*words: str, **options: object) -> subprocess.Popen[str]:
    import torch

    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-P", "-m", "fedfm.cli.main", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **options)  # type: ignore[call-overload, no-any-return]


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code, text
    return str(text)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return replace(tiny.federation(tmp_path / "data", OWNERS, rows=24), rounds=3, name="Three rounds")


@pytest.fixture
def consortium(tmp_path: Path, plan: Federation) -> Iterator[Consortium]:
    lines = [json.loads(line) for line in Path(plan.data.source).read_text().splitlines()]
    rows = {owner: [{"text": line["text"]} for line in lines if line["owner"] == owner] for owner in OWNERS}
    with Consortium(tmp_path / "consortium", rows) as consortium:
        yield consortium


def join(consortium: Consortium, owner: str) -> subprocess.Popen[str]:
    home = consortium.home(owner)
    return fedfm("join", str(home), "--data", str(home / "rows.jsonl"), "--policy", str(home / "policy.yaml"), "--device", "cpu")


def test_a_submitted_run_survives_its_coordinator_and_gives_the_same_weights(
    tmp_path: Path, plan: Federation, consortium: Consortium
) -> None:
    *_, (expected, _) = run(plan, out=tmp_path / "alone")
    recipe, folder = tmp_path / "recipe.yaml", consortium.home("coordinator")
    recipe.write_text(dump(replace(plan, data=Data(str(tmp_path / "nowhere.jsonl"), test_fraction=0.3))))
    members = [join(consortium, owner) for owner in OWNERS]
    coordinator = fedfm("serve", str(folder))
    try:
        following = fedfm("run", str(recipe), "--consortium", str(folder))
        job = wait_for_round(folder, 1)
        coordinator.kill()
        coordinator.communicate()
        following.send_signal(signal.SIGINT)
        text = ended(following)
        assert f"fedfm attach {folder} {job.name}" in text and "round 0" in text
        assert json.loads(ended(fedfm("status", str(folder), "--json")))["serving"] is False
        coordinator = fedfm("serve", str(folder))
        assert str(job.run / "model") in ended(fedfm("attach", str(folder)))
        told = json.loads(ended(fedfm("status", str(folder), "--json")))
        assert told["serving"] and told["members"] == list(OWNERS)
        assert [(known["state"], known["round"], known["rounds"]) for known in told["jobs"]] == [("finished", 3, 3)]
        assert "Another process serves" in ended(fedfm("serve", str(folder)), 2)
        assert same(state_after(job.run).params, expected.params)
    finally:
        for process in (coordinator, *members):
            process.kill()
            process.communicate()


def wait_for_round(folder: Path, round: int) -> Job:
    until = time.monotonic() + 90.0
    while time.monotonic() < until:
        for job in jobs(folder):
            if job.rounds[0] >= round:
                return job
        time.sleep(0.05)
    raise AssertionError(f"no job has come to round {round}")


def test_what_is_no_coordinators_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no link\.json"):
        require_folder(tmp_path)
    assert "is no coordinator's folder" in ended(fedfm("status", str(tmp_path)), 2)

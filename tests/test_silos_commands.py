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
from datetime import timedelta
from pathlib import Path

import pytest

from fedfm.core.errors import ConfigError, DataError, MissingExtra

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.cli.silos import _membership
from fedfm.client.policy import Policy, write_policy
from fedfm.data import Data
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.recipe import dump
from fedfm.run.folder import state_after
from fedfm.run.loop import run
from fedfm.service.jobs import Job, jobs
from fedfm.silos.certificates import now
from fedfm.silos.consortium import Consortium, Settings
from fedfm.silos.enrol import Desk, Entering
from fedfm.testing import tiny
from fedfm.testing.broker import free_port, server
from fedfm.testing.parts import same

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
def consortium(tmp_path: Path) -> Iterator[Path]:
    """A consortium's folder, as ``init`` makes it; whatever broker is left is stopped."""
    folder, url = tmp_path / "consortium", f"tls://127.0.0.1:{free_port()}"
    assert "fedfm consortium invite" in ended(fedfm("consortium", "init", str(folder), "--name", "test", "--url", url))
    yield folder
    Consortium.open(folder).broker.stop()


def invite(consortium: Path, owner: str) -> Path:
    path = consortium.parent / f"{owner}.json"
    ended(fedfm("consortium", "invite", str(consortium), owner, "--out", str(path)))
    return path


def join(path: Path, data: Path, *words: str) -> subprocess.Popen[str]:
    policy = data.parent / "policy.yaml"
    policy.write_text(write_policy(Policy.open()))
    return fedfm("join", str(path), "--data", str(data), "--policy", str(policy), "--device", "cpu", *words)


def said(process: subprocess.Popen[str], text: str) -> str:
    """What a process says until a line has this text."""
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def own_rows(plan: Federation, owner: str, path: Path) -> Path:
    lines = [json.loads(line) for line in Path(plan.data.source).read_text().splitlines()]
    path.write_text("".join(json.dumps({"text": line["text"]}) + "\n" for line in lines if line["owner"] == owner))
    return path


def test_from_init_to_a_model_with_the_weights_of_the_embedded_engine(tmp_path: Path, plan: Federation, consortium: Path) -> None:
    """Members wait for a coordinator that is away, a submitted run survives its coordinator, and its members keep their folders."""
    *_, (expected, _) = run(replace(plan, engine=Embedded(bank=1)), out=tmp_path / "alone")
    recipe, processes = tmp_path / "recipe.yaml", {}
    recipe.write_text(dump(replace(plan, data=Data(str(tmp_path / "nowhere.jsonl"), test_fraction=0.3))))
    try:
        for owner in OWNERS:
            data = own_rows(plan, owner, tmp_path / f"{owner}.jsonl")
            processes[owner] = join(invite(consortium, owner), data, "--folder", str(tmp_path / owner))
        assert "could not be used in time" in said(processes["anna"], "Waiting for the coordinator of test")
        processes["serve"] = fedfm("serve", str(consortium))
        for owner in OWNERS:
            assert "compare it with the coordinator" in said(processes[owner], f"{owner} waits for what test asks")
        following = fedfm("run", str(recipe), "--consortium", str(consortium))
        shown = said(following, "round 0")
        job = wait_for_round(consortium, 1)
        processes["serve"].kill()
        processes["serve"].communicate()
        following.send_signal(signal.SIGINT)
        text = ended(following)
        assert f"fedfm attach {consortium} {job.name}" in text and "round 0" in shown
        assert json.loads(ended(fedfm("status", str(consortium), "--json")))["serving"] is False
        # The broker that the killed one left is used; and a member comes back from its folder alone.
        processes["serve"] = fedfm("serve", str(consortium))
        stop(processes["anna"])
        processes["anna"] = join(tmp_path / "anna", tmp_path / "anna.jsonl")
        assert str(job.run / "model") in ended(fedfm("attach", str(consortium)))
        told = json.loads(ended(fedfm("status", str(consortium), "--json")))
        assert told["serving"] and [member["member"] for member in told["members"]] == list(OWNERS)
        assert [(known["state"], known["round"], known["rounds"]) for known in told["jobs"]] == [("finished", 3, 3)]
        assert "Another process serves" in ended(fedfm("serve", str(consortium)), 2)
        assert same(state_after(job.run).params, expected.params)
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def test_the_coordinator_keeps_the_broker_that_it_started_alone(consortium: Path) -> None:
    """It starts it, starts it again where it ended, and stops it; one that ran before goes on."""
    broker = Consortium.open(consortium).broker
    served = fedfm("serve", str(consortium))
    try:
        said(served, "Coordinating test with 0 members")
        process = broker.process()
        assert process is not None
        process.kill()
        until = time.monotonic() + 60.0
        while (again := broker.process()) in (None, process) and time.monotonic() < until:
            time.sleep(0.1)
        assert again is not None and again != process
        stop(served)
        assert broker.process() is None
        broker.start()
        served = fedfm("serve", str(consortium))
        said(served, "Coordinating test")
        stop(served)
        assert broker.process() is not None
    finally:
        broker.stop()
        served.kill()
        served.communicate()


def test_an_invitation_that_was_withdrawn_ends_the_waiting(consortium: Path, tmp_path: Path, plan: Federation) -> None:
    path, data = invite(consortium, "anna"), own_rows(plan, "anna", tmp_path / "anna.jsonl")
    broker = Consortium.open(consortium).broker
    broker.start()
    try:
        ended(fedfm("consortium", "revoke", str(consortium), "anna"))
        assert "refuses this key" in ended(join(path, data, "--folder", str(tmp_path / "anna")), 2)
    finally:
        broker.stop()


def test_a_service_starts_with_an_invitation_that_expired_after_it_was_used(tmp_path: Path) -> None:
    long_ago = now() - timedelta(days=30)
    consortium = Consortium.create(tmp_path / "consortium", Settings("test", ("tls://127.0.0.1:4222",)), long_ago)
    invitation = consortium.invite("anna", long_ago)
    invitation.write(tmp_path / "anna.json")
    entering = Entering.begin(invitation, tmp_path / "anna")
    answer = Desk(consortium, lambda: long_ago).answer(entering.ask(long_ago))
    assert answer is not None
    membership = entering.accept(answer.data, long_ago)
    assert _membership(tmp_path / "anna.json", tmp_path / "anna") == membership
    with pytest.raises(DataError, match="expired"):
        _membership(tmp_path / "anna.json", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="Leave one of them out"):
        _membership(tmp_path / "anna", tmp_path / "elsewhere")


def wait_for_round(folder: Path, round: int) -> Job:
    until = time.monotonic() + 90.0
    while time.monotonic() < until:
        for job in jobs(folder):
            if job.rounds[0] >= round:
                return job
        time.sleep(0.05)
    raise AssertionError(f"no job has come to round {round}")


def test_what_is_no_consortiums_folder_is_refused(tmp_path: Path) -> None:
    for words in (["status"], ["serve"], ["attach"]):
        assert "holds no consortium" in ended(fedfm(*words, str(tmp_path)), 2)

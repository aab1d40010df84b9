"""A consortium's days: who is there, a member that pauses, one that leaves, one that was too late, runs side by side, a broker that is away."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedfm.core.errors import ConfigError, MessageError, MissingExtra, PolicyError, RunError

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from test_silos_commands import OWNERS, consortium, ended, fedfm, invite, join, own_rows, plan, said, stop

from fedfm.cli import house
from fedfm.cli import status as shown
from fedfm.client import pause
from fedfm.client.log import OwnerLog, logs_in, read
from fedfm.client.policy import Policy
from fedfm.coordination import Coordination
from fedfm.core.clock import Virtual
from fedfm.core.messages import Body, Failure, Reply, Request
from fedfm.engines import Embedded, Nats
from fedfm.engines.nats import NatsSession
from fedfm.engines.over import Over
from fedfm.federation import Federation
from fedfm.recipe import dump
from fedfm.run.folder import state_after
from fedfm.run.loop import run
from fedfm.service import home, presence, waiting
from fedfm.service.jobs import jobs
from fedfm.service.presence import HERE, Attendance, Voice, Word
from fedfm.service.status import in_words, look
from fedfm.silos import certificates
from fedfm.silos.consortium import Consortium
from fedfm.silos.membership import Membership
from fedfm.testing.broker import server
from fedfm.testing.engines import ask
from fedfm.testing.parts import same
from fedfm.testing.silos import Silos
from fedfm.wire.traffic import Traffic
from fedfm.wire.traffic import read as read_traffic

try:
    server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow
__all__ = ["consortium", "plan"]  # fixtures


def until(ready: Callable[[], object], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "this did not come to pass"
        time.sleep(0.2)


def states(folder: Path) -> dict[str, str]:
    return {member["member"]: member["state"] for member in look(folder)["members"]}


def events(folder: Path) -> list[Mapping[str, Any]]:
    return [line.what for log in logs_in(folder) for line in read(log)]


# --- a day, with the commands that people use --------------------------------------------------------------------------------


def test_a_member_pauses_and_leaves_and_runs_go_on(tmp_path: Path, plan: Federation, consortium: Path) -> None:
    processes, homes = {}, {owner: tmp_path / owner for owner in OWNERS}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(replace(plan, rounds=1)))

    def submitted() -> list[Failure]:
        text = ended(fedfm("run", str(recipe), "--consortium", str(consortium), "--json", "--quiet"))
        told = json.loads(text[text.index("{") :])
        (*_, last) = (Path(told["run"]) / "metrics.jsonl").read_text().splitlines()
        return [Failure(failure["client"], failure["stage"], failure["reason"]) for failure in json.loads(last)["failures"]]

    try:
        processes["serve"] = fedfm("serve", str(consortium))
        for owner in OWNERS:
            data = own_rows(plan, owner, tmp_path / f"{owner}.jsonl")
            processes[owner] = join(invite(consortium, owner), data, "--folder", str(homes[owner]))
        until(lambda: states(consortium) == dict.fromkeys(OWNERS, "here"))

        # Paused: it says so at once, and the round goes on without it, long before any deadline.
        assert "nothing leaves" in ended(fedfm("pause", str(homes["anna"])))
        until(lambda: states(consortium) == {"anna": "paused", "bela": "here"})
        (failure,) = submitted()
        assert (failure.client, failure.stage) == ("anna", "pause") and "rule 'pause'" in failure.reason
        names = [line["event"] for line in events(homes["anna"])]
        assert "pause" in names and "release" not in names
        assert "answers again" in ended(fedfm("pause", str(homes["anna"]), "--resume"))
        assert submitted() == []
        assert {"resume", "release"} <= {line["event"] for line in events(homes["anna"])}

        # What a person sees of it.
        text = ended(fedfm("status", str(consortium)))
        assert "the coordinator is up, its broker runs" in text and "a round, " in text and "tokens a second" in text
        told = json.loads(ended(fedfm("status", str(consortium), "--json")))
        last = told["jobs"][-1]
        assert last["state"] == "finished" and last["bytes_up"] > 0 and last["tokens_a_second"] > 0
        assert all(last["members"][owner]["seconds"] > 0 for owner in OWNERS)

        # It leaves: off the roster and the broker, its process ends well, its log stays.
        told = json.loads(ended(fedfm("leave", str(homes["anna"]), "--delete", "--yes", "--json")))
        assert told["coordinator_knows"] and not told["running"] and {"identity.json", "jobs", "prepared", "window"} <= {*told["deleted"]}
        assert "anna has left test" in ended(processes.pop("anna"))
        assert states(consortium) == {"bela": "here"}
        rows = {row["member"]: row["state"] for row in Consortium.open(consortium).members().table(certificates.now())}
        assert rows == {"anna": "left", "bela": "member"}
        assert sorted(path.name for path in homes["anna"].iterdir()) == ["clients", home.LOCK]
        assert events(homes["anna"])[-1]["event"] == "leave"
        assert "leaves    the consortium test" in ended(fedfm("log", str(homes["anna"]), "--last", "1"))
        assert submitted() == []
        # The name can be invited again, with new keys.
        data = own_rows(plan, "anna", tmp_path / "anna.jsonl")
        (consortium.parent / "anna.json").unlink()
        processes["anna"] = join(invite(consortium, "anna"), data, "--folder", str(tmp_path / "again"))
        until(lambda: states(consortium) == dict.fromkeys(OWNERS, "here"))
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def test_two_runs_side_by_side_end_with_the_bits_of_each_alone(tmp_path: Path, plan: Federation, consortium: Path) -> None:
    plans = [replace(plan, name="one", seed=1, rounds=6), replace(plan, name="two", seed=2, rounds=6)]
    alone = [list(run(replace(each, engine=Embedded(bank=1)), out=tmp_path / each.name))[-1][0] for each in plans]
    processes = {"serve": fedfm("serve", str(consortium), "--at-once", "2")}
    try:
        for owner in OWNERS:
            data = own_rows(plan, owner, tmp_path / f"{owner}.jsonl")
            processes[owner] = join(invite(consortium, owner), data, "--folder", str(tmp_path / owner))
        until(lambda: states(consortium) == dict.fromkeys(OWNERS, "here"))
        for each in plans:
            recipe = tmp_path / f"{each.name}.yaml"
            recipe.write_text(dump(each))
            following = fedfm("run", str(recipe), "--consortium", str(consortium))
            processes[each.name] = following
        together = 0

        def over() -> bool:
            nonlocal together
            now = [(job["state"], job["round"]) for job in look(consortium)["jobs"]]
            together += now.count(("running", 1)) == 2 or sum(state == "running" and 0 < round < 6 for state, round in now) == 2
            return [state for state, _ in now] == ["finished"] * 2

        until(over, 180.0)
        assert together, "one run waited for the other"
        for each, expected in zip(plans, alone, strict=True):
            text = ended(processes.pop(each.name))
            (job,) = (job for job in jobs(consortium) if each.name in job.name)
            assert str(job.run / "model") in text and same(state_after(job.run).params, expected.params)
            # A run's log is its own.
            other = next(job for job in jobs(consortium) if each.name not in job.name)
            assert other.name not in (job.run / "log.txt").read_text()
        # Ended with the coordinator, in good order.
        stop(processes["serve"])
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def test_a_killed_coordinators_broker_is_taken_over_and_stopped_in_the_end(consortium: Path) -> None:
    broker = Consortium.open(consortium).broker
    served = fedfm("serve", str(consortium))
    said(served, "Coordinating test")
    process = broker.process()
    served.kill()
    served.communicate()
    assert process is not None and broker.process() == process
    served = fedfm("serve", str(consortium))
    try:
        said(served, "Coordinating test")
        assert broker.process() == process
        stop(served)
        assert broker.process() is None
        # A note of a process that is gone makes nobody else's broker ours.
        (broker.folder / "started.json").write_text(json.dumps({"pid": process.pid, "began": 1.0}))
        broker.start()
        served = fedfm("serve", str(consortium))
        said(served, "Coordinating test")
        stop(served)
        assert broker.process() is not None
    finally:
        broker.stop()
        served.kill()
        served.communicate()


def test_a_member_says_that_it_waits_for_the_broker(tmp_path: Path, plan: Federation) -> None:
    with Silos(tmp_path, {"anna": [{"text": "a"}]}) as silos:
        silos.broker.stop()
        silos.start()
        until(lambda: "waiting for the broker at tls://127.0.0.1" in silos.log("anna"))
        silos.broker.start()
        until(lambda: "is there again, after" in silos.log("anna"))
        silos.kill_broker()
        until(lambda: silos.log("anna").count("waiting for the broker") == 2)
        silos.broker.start()
        until(lambda: silos.log("anna").count("is there again") == 2)
        # One process answers for a folder.
        with pytest.raises(RunError, match="Another process answers"), home.alone(silos.home("anna")):
            pass


def test_waiting_is_said_at_once_and_then_every_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Virtual()
    lines = waiting.Waiting("here", now=clock.now)
    with caplog.at_level(logging.WARNING):
        for seconds in (0.0, 1.0, 58.0, 1.0, 40.0, 21.0):
            clock.advance(seconds)
            lines.away("refused")
        assert len(caplog.records) == 3
        lines.there()
        lines.there()
    assert [record.getMessage() for record in caplog.records[3:]] == ["the broker at here is there again, after 2:01"]


# --- what is over ------------------------------------------------------------------------------------------------------------


def rows(count: int) -> Sequence[Mapping[str, Any]]:
    return [{"text": f"the small cat saw the house {i}."} for i in range(count)]


@pytest.fixture
def silos(tmp_path: Path) -> Any:
    with Silos(tmp_path / "silos", {"anna": rows(6), "bela": rows(8)}) as silos:
        yield silos


def opened(plan: Federation, silos: Silos, folder: Path | None = None) -> NatsSession:
    site = Coordination.build(replace(plan, engine=Nats(str(silos.home("coordinator")), device="cpu")), ("anna", "bela"), folder)
    session = site.open()
    assert isinstance(session, NatsSession)
    return session


def test_who_was_too_late_is_told_so_and_works_on_nothing_that_is_over(plan: Federation, silos: Silos, tmp_path: Path) -> None:
    describe = Request.of("describe")
    (tmp_path / "run").mkdir()
    with opened(plan, silos, tmp_path / "run") as session:
        answer = ask(session, {"anna": describe}, deadline=0.5)["anna"]
        assert isinstance(answer, Failure) and answer.stage == "deadline"
        noted = read_traffic(tmp_path / "run" / "traffic.json")
        assert "in time" in noted["members"]["anna"]["failure"] and not noted["members"]["anna"]["waiting"]
        # Asked once more, and not waited for: the coordinator is killed, as it were.
        session.send({"anna": Request(Body("describe", 3))})
        session._owed.clear()
    with opened(plan, silos, tmp_path / "run") as session:
        session.send({"anna": Request(Body("describe", 4))}, deadline=120.0)
        silos.start("anna")
        assert isinstance(session.receive(), Reply)
        assert not session.dropped
    told = [line for line in events(silos.home("anna")) if line["event"] == "late"]
    assert [(line["round"], line["run"]) for line in told] == [(0, plan.name), (3, plan.name)]
    assert all("started anew" in line["why"] or "is over as well" in line["why"] for line in told)
    assert "before this member was ready" in told[0]["why"]
    # Neither was worked on: the log of requests has the last one alone.
    assert [line["round"] for line in events(silos.home("anna")) if line["event"] == "request"] == ["4"]
    assert "left out of round 0" in silos.log("anna")


def test_a_request_that_expired_long_ago_is_named_to_the_owner(plan: Federation, silos: Silos, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the coordinator left word of: the signed request itself says what it was."""
    from fedfm.wire.envelope import Header

    long_ago, made = 3600.0, Header.now

    def early(*args: Any) -> Header:
        header = made(*args)
        return replace(header, created=header.created - long_ago, expires=header.expires - long_ago)

    with opened(plan, silos) as session:
        with monkeypatch.context() as patch:
            patch.setattr("fedfm.engines.nats.Header.now", early)
            session.send({"anna": Request(Body("describe", 2))}, deadline=5.0)
        silos.start("anna")
        until(lambda: "left out of round 2" in silos.log("anna"))
    (line,) = (line for line in events(silos.home("anna")) if line["event"] == "late")
    assert line["round"] == 2 and "its deadline passed" in line["why"] and re.search(r"59:5\d|1:00:", line["why"])


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"round": true, "verb": "", "why": ""}', b'{"round": 1, "verb": 2, "why": ""}', b"\xff"]
)
def test_a_note_that_is_none_is_a_message_error(data: bytes) -> None:
    assert Over.unpack(Over(3, "train", "why").pack()) == Over(3, "train", "why")
    with pytest.raises(MessageError):
        Over.unpack(data)


def test_another_release_with_the_same_talk_is_welcome(plan: Federation, silos: Silos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfm.engines.nats.RELEASE", "0.0.1")
    silos.start("anna")
    with opened(plan, silos) as session:
        assert isinstance(ask(session, {"anna": Request.of("describe")})["anna"], Reply)


def test_two_sessions_at_a_time_take_their_own_answers_alone(plan: Federation, silos: Silos) -> None:
    silos.start()
    describe = dict.fromkeys(OWNERS, Request.of("describe"))
    with opened(plan, silos) as one, opened(replace(plan, name="other"), silos) as two:
        for _ in range(3):
            one.send(describe, deadline=90.0)
            two.send(describe, deadline=90.0)
            for session in (two, one):
                assert all(isinstance(session.receive(), Reply) for _ in OWNERS) and session.receive() is None
        assert not one.dropped and not two.dropped


# --- who is there ------------------------------------------------------------------------------------------------------------


def test_only_a_members_own_new_words_count(silos: Silos) -> None:
    names, link = silos.names, Membership.read(silos.home("anna")).link()
    with silos.connect("coordinator") as connection, silos.connect("anna") as anna:
        attendance = Attendance(silos.consortium, connection)
        presence.say(link, anna, names.here("anna"), HERE, Word(talk=1, run="wards", verb="train", round=3).pack(), 60.0)
        old = connection.get(names.presences, names.here("anna"))
        attendance.look()
        known = look(silos.home("coordinator"))["members"][0]
        assert known["member"] == "anna" and known["version"] == Word().release and known["state"] == "away"  # nobody serves
        presence.say(link, anna, names.here("anna"), HERE, Word(paused="2026-01-01T00:00:00+00:00").pack(), 60.0)
        attendance.look()
        assert presence.read(silos.home("coordinator"))["members"]["anna"]["paused"].startswith("2026")
        # An older word again, one in another's name, and one that is none.
        assert old is not None
        anna.publish(names.here("anna"), old)
        attendance.look()
        connection.publish(names.here("bela"), old)
        attendance.look()
        anna.publish(names.here("anna"), b"no envelope")
        attendance.look()
        told = presence.read(silos.home("coordinator"))
        assert told["dropped"] == {"replay": 1, "sender": 1, "malformed": 1} and list(told["members"]) == ["anna"]
        assert "Messages that were dropped: malformed 1, replay 1, sender 1" in in_words(look(silos.home("coordinator")))


def test_a_word_is_said_when_it_changes_and_now_and_then(silos: Silos) -> None:
    link, names = Membership.read(silos.home("anna")).link(), silos.names
    word = Word(run="one")
    with silos.connect("coordinator") as connection, silos.connect("anna") as anna, Voice(link, anna, lambda: word, beat=2.0):
        seen: list[bytes] = []

        def heard() -> int:
            data = connection.get(names.presences, names.here("anna"))
            if data is not None and data not in seen:
                seen.append(data)
            return len(seen)

        until(lambda: heard() == 1, 20)
        began = time.monotonic()
        word = Word(run="two")
        until(lambda: heard() == 2, 20)
        assert time.monotonic() - began < 1.9
        until(lambda: heard() == 3, 20)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", Word().pack().replace(b'"talk": 0', b'"talk": "x"'), Word().pack().replace(b"{}", b"[]"), b"{" * 9000]
)
def test_a_word_that_is_none_is_a_message_error(data: bytes) -> None:
    assert Word.unpack(Word(dropped={"late": 2}, talk=3).pack()) == Word(dropped={"late": 2}, talk=3)
    with pytest.raises(MessageError):
        Word.unpack(data)


def test_a_member_that_entered_again_does_not_leave_by_its_earlier_word(silos: Silos) -> None:
    link = Membership.read(silos.home("anna")).link()
    with silos.connect("coordinator") as connection, silos.connect("anna") as anna:
        attendance = Attendance(silos.consortium, connection)
        presence.say_goodbye(link, anna, 12345)
        attendance.look()
        assert set(silos.consortium.cards()) == {"anna", "bela"}
        serial = silos.consortium.members().members["anna"].serial
        presence.say_goodbye(link, anna, serial)
        attendance.look()
        attendance.look()
        assert set(silos.consortium.cards()) == {"bela"}


def test_leaving_while_the_coordinator_is_away_waits_for_it(
    silos: Silos, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(house, "_COORDINATOR", 1.0)
    silos.start("anna")
    house.leave(silos.home("anna"), False, False, False)
    assert "its coordinator is away" in capsys.readouterr().out
    assert silos.processes["anna"].wait(30) == 0 and set(silos.consortium.cards()) == {"anna", "bela"}
    with silos.connect("coordinator") as connection:
        Attendance(silos.consortium, connection).look()
    assert set(silos.consortium.cards()) == {"bela"}
    with pytest.raises(ConfigError, match="--yes"):
        house.leave(silos.home("anna"), True, False, False)
    house.leave(silos.home("anna"), True, True, False)
    assert "identity.json" in capsys.readouterr().out


# --- pause -------------------------------------------------------------------------------------------------------------------


def test_a_pause_holds_back_an_answer_that_is_ready(tmp_path: Path, plan: Federation) -> None:
    """The guard looks before work begins, and again before its answer leaves."""
    from fedfm.client.guard import Asker, Guard
    from fedfm.client.spent import SpentStore

    guard = Guard(
        client="anna", policy=Policy.open(), plan=plan.client_plan(), asker=Asker(), log=OwnerLog(tmp_path, "anna"),
        spent=SpentStore(tmp_path), base=lambda: "0", now=lambda: datetime.now(UTC), door=lambda *_: None, paused=lambda: pause.since(tmp_path),
    )  # fmt: skip
    request = Request.of("describe")
    guard.admit(request)
    assert pause.begin(tmp_path, datetime.now(UTC)) and not pause.begin(tmp_path, datetime.now(UTC))
    for use in (lambda: guard.admit(request), lambda: guard.release(request, Reply("anna", "describe", 0, {}, {}), None)):
        with pytest.raises(PolicyError, match="rule 'pause'"):
            use()
    assert not guard.spent.entries("anna")
    assert pause.end(tmp_path) and not pause.end(tmp_path)
    guard.admit(request)
    (tmp_path / pause.PAUSED).write_text("no time")
    with pytest.raises(RunError, match="--resume"):
        guard.admit(request)


def test_a_pause_is_logged_once_whoever_notes_it(silos: Silos, capsys: pytest.CaptureFixture[str]) -> None:
    folder = silos.home("anna")
    house.pause(folder, False, False)
    assert "No process answers" in capsys.readouterr().out
    silos.start("anna")
    until(lambda: "connected to" in silos.log("anna"))
    house.pause(folder, True, True)
    assert json.loads(capsys.readouterr().out) == {"member": "anna", "paused": None, "changed": True, "running": True}
    until(lambda: [line["event"] for line in events(folder)] == ["pause", "resume"])


# --- what is shown -----------------------------------------------------------------------------------------------------------


def test_traffic_adds_up_over_sessions(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    for session in (1, 2):
        traffic = Traffic(path)
        traffic.asked("anna", "train", session, 100)
        traffic.write({}, at_once=True)
        assert read_traffic(path)["members"]["anna"]["waiting"]
        traffic.answered("anna", "train", session, 50)
        traffic.answered("nobody", "train", session, 50)
        traffic.write({"late": 2}, at_once=True)
    told = read_traffic(path)
    anna = told["members"]["anna"]
    assert told["dropped"] == {"late": 4} and (anna["bytes_up"], anna["bytes_down"], anna["waiting"]) == (100, 200, False)
    assert anna["seconds"]["train"]["round"] == 2 and anna["seconds"]["train"]["seconds"] >= 0
    path.write_text("{")
    assert read_traffic(path) == {}


def test_watching_shows_it_again_and_again(silos: Silos, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_EVERY", 0.05)
    process = fedfm("status", str(silos.home("coordinator")), "--watch", "--json")
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [line["consortium"] for line in lines] == ["test", "test"]
    process.send_signal(2)
    ended(process)
    # On a terminal it is drawn in place.
    interrupt = threading.Timer(0.5, lambda: os.kill(os.getpid(), 2))
    interrupt.start()
    with pytest.raises(SystemExit) as stopped:
        shown.status(silos.home("coordinator"), True, False)
    interrupt.join()
    assert not stopped.value.code and "the coordinator is down" in capsys.readouterr().out


def test_status_needs_no_torch(silos: Silos) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from fedfm.cli import status, house; "
        f"status.status(Path({str(silos.home('coordinator'))!r}), False, True); house.pause(Path({str(silos.home('anna'))!r}), True, True); "
        "assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=env, capture_output=True)

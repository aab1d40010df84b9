"""Clients as processes: what arrives, what dies, what hangs, what lies. The clients here speak the protocol from the standard library alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfm.client.frames import Inbox, Outbox
from fedfm.client.memory import home
from fedfm.core.errors import ConfigError, MessageError
from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.tree import equal
from fedfm.engines.process import Process, ProcessSession

CLIENT = """
import json, os, signal, struct, sys, time

def receive():
    size = sys.stdin.buffer.read(8)
    if not size:
        sys.exit(0)
    data = sys.stdin.buffer.read(int.from_bytes(size, "little"))
    head = 4 + int.from_bytes(data[:4], "little")
    return json.loads(data[4:head]), data[head:]

def raw(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()

def send(body, **head):
    text = json.dumps({"v": 2, "kind": "reply", **head}).encode()
    data = struct.pack("<I", len(text)) + text + body
    raw(len(data).to_bytes(8, "little") + data)

hello, nothing = receive()
me = hello["meta"]["client"]
print("a line for the log", me, file=sys.stderr)
if me == "mute":
    time.sleep(60)
if me == "unfit":
    send(nothing, kind="failure", client=me, stage="start", reason="no model here")
    sys.exit(1)
if me == "broken":
    sys.exit(3)
send(nothing, verb="hello", round=0, client=me, meta={})
while True:
    head, tensors = receive()
    verb = head["verb"]
    reply = {"verb": verb, "round": head["round"], "client": me, "meta": {"pid": os.getpid()}, "own": {}}
    if verb == "die":
        raw((99).to_bytes(8, "little") + b"half an answer")
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "hang":
        time.sleep(60)
    if verb == "grandchild":
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=1)
        reply["meta"] = {"pid": os.getpid(), "grandchild": child.pid}
    if verb == "stall":
        raw((2 << 20).to_bytes(8, "little") + b"x" * 64)
        time.sleep(60)
    if verb == "babble":
        sys.stderr.write("x" * (20 << 20))
        sys.stderr.flush()
    if verb == "scream":
        reply = {"kind": "failure", "client": me, "stage": "train", "reason": "\\x1b[2J" + "WARNING: all is lost\\n" * 10000}
    if verb == "nap":
        time.sleep(0.3)
    if verb == "close":
        os.close(1)
        time.sleep(60)
    if verb == "other-client":
        reply["client"] = "b" if me == "a" else "a"
    if verb == "other-round":
        reply["round"] += 1
    if verb == "other-verb":
        reply["verb"] = "echo"
    if verb == "request":
        reply["kind"] = "request"
    if verb == "garbage":
        raw((5).to_bytes(8, "little") + b"hello")
    if verb == "pickle":
        tensors = b"cos\\nsystem\\n(S'true'\\ntR."
    if verb == "huge":
        raw((1 << 60).to_bytes(8, "little"))
    if verb == "twice":
        send(tensors, **reply)
    send(tensors, **reply)
"""

Open = Callable[..., ProcessSession]


@pytest.fixture
def open_session(tmp_path: Path) -> Iterator[Open]:
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    opened: list[ProcessSession] = []

    def build(clients: str | tuple[str, ...] = "ab", **kwargs: object) -> ProcessSession:
        defaults = {"command": (sys.executable, "-SEP", str(script)), "folder": tmp_path / "run", "max_bytes": 1 << 24}
        session = ProcessSession(tuple(clients), lambda client, _: Request.of("hello", meta={"client": client}), **{**defaults, **kwargs})  # type: ignore[arg-type]
        opened.append(session)
        return session

    yield build
    for session in opened:
        session.close()


def ask(session: ProcessSession, verbs: Mapping[str, str], deadline: float | None = 30.0, round: int = 1) -> dict[str, Reply | Failure]:
    answers = list(session.exchange({client: Request.of(verb, round) for client, verb in verbs.items()}, deadline))
    assert sorted(answer.client for answer in answers) == sorted(verbs), "one answer for each request"
    return {answer.client: answer for answer in answers}


def pid(answer: Reply | Failure) -> int:
    assert isinstance(answer, Reply)
    return int(answer.meta["pid"] or 0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_messages_far_larger_than_a_pipe_arrive_whole(open_session: Open) -> None:
    session = open_session("abcde")
    x = {"w": torch.randn(700, 1000, generator=torch.Generator().manual_seed(0)), "b": torch.arange(5, dtype=torch.bfloat16)}
    broadcast = Request.of("echo", 3, x)
    answers = list(session.exchange(dict.fromkeys("abcde", broadcast), 30.0))
    assert sorted(answer.client for answer in answers) == list("abcde")
    assert all(isinstance(answer, Reply) and answer.round == 3 and equal(answer.tensors, x) for answer in answers)


def test_a_client_is_one_process_that_lives_on_between_rounds(open_session: Open, tmp_path: Path) -> None:
    session = open_session()
    first = ask(session, {"a": "echo", "b": "echo"})
    again = ask(session, {"a": "echo", "b": "echo"}, round=2)
    assert len({pid(answer) for answer in first.values()}) == 2 and os.getpid() not in map(pid, first.values())
    assert {client: pid(answer) for client, answer in first.items()} == {client: pid(answer) for client, answer in again.items()}
    assert (home(tmp_path / "run", "a") / "log.txt").read_text() == "a line for the log a\n"


def test_only_those_who_are_asked_are_started(open_session: Open, tmp_path: Path) -> None:
    ask(open_session(), {"b": "echo"})
    assert not home(tmp_path / "run", "a").exists()


def test_a_client_that_is_killed_is_named_and_comes_back(open_session: Open) -> None:
    session = open_session()
    answers = ask(session, {"a": "die", "b": "echo"})
    assert answers["a"] == Failure("a", "exchange", "its process ended with signal 9 (Killed).")
    after = ask(session, {"a": "echo", "b": "echo"}, round=2)
    assert isinstance(after["a"], Reply) and pid(after["b"]) == pid(answers["b"])


def test_a_client_that_died_between_rounds_is_started_anew(open_session: Open) -> None:
    session = open_session()
    before = pid(ask(session, {"a": "echo"})["a"])
    os.kill(before, 9)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    assert pid(ask(session, {"a": "echo"}, round=2)["a"]) != before


def test_a_deadline_names_who_is_late_and_ends_it(open_session: Open) -> None:
    session = open_session()
    late = pid(ask(session, {"a": "echo"})["a"])
    began = time.monotonic()
    answers = ask(session, {"a": "hang", "b": "echo"}, deadline=0.5)
    assert isinstance(answers["b"], Reply)
    assert answers["a"] == Failure("a", "deadline", "it did not answer in time, and its process was ended.")
    assert time.monotonic() - began < 10 and not alive(late)
    assert isinstance(ask(session, {"a": "echo"}, round=2)["a"], Reply)


def test_a_client_that_stalls_in_its_answer_fails_alone(open_session: Open) -> None:
    session = open_session("abcd")
    ask(session, dict.fromkeys("abcd", "echo"))
    answers = ask(session, {"a": "stall", "b": "nap", "c": "nap", "d": "nap"}, deadline=2.5)
    assert {client for client, answer in answers.items() if isinstance(answer, Failure)} == {"a"}
    assert answers["a"].stage == "deadline"  # type: ignore[union-attr]


def test_a_deadline_covers_starting_and_waiting_for_room(open_session: Open) -> None:
    session = open_session(("mute", "a", "b"), max_processes=1, start_timeout=60.0)
    began = time.monotonic()
    answers = ask(session, dict.fromkeys(("mute", "a", "b"), "echo"), deadline=1.0)
    assert time.monotonic() - began < 10
    assert answers["mute"] == Failure("mute", "start", "it did not start in time, and its process was ended.")
    assert {answers[name].stage for name in "ab" if isinstance(answers[name], Failure)} <= {"deadline", "start"}


def test_what_a_client_has_started_ends_with_it(open_session: Open) -> None:
    session = open_session()
    answer = ask(session, {"a": "grandchild"})["a"]
    assert isinstance(answer, Reply) and alive(int(answer.meta["grandchild"] or 0))
    grandchild = int(answer.meta["grandchild"] or 0)
    session.close()
    for _ in range(100):
        if Path(f"/proc/{grandchild}/stat").exists() and " Z " not in Path(f"/proc/{grandchild}/stat").read_text():
            time.sleep(0.05)
    assert not Path(f"/proc/{grandchild}/stat").exists() or " Z " in Path(f"/proc/{grandchild}/stat").read_text()


def test_a_log_does_not_grow_without_end(open_session: Open, tmp_path: Path) -> None:
    session = open_session()
    for round in (1, 2, 3):
        ask(session, {"a": "babble"}, round=round)
    ask(session, {"a": "echo"}, round=4)
    assert (home(tmp_path / "run", "a") / "log.txt").stat().st_size < 1 << 20


def test_what_a_client_says_of_its_failure_is_one_short_clean_line(open_session: Open) -> None:
    answer = ask(open_session(), {"a": "scream"})["a"]
    assert isinstance(answer, Failure) and len(answer.reason) <= 1000
    assert "\n" not in answer.reason and "\x1b" not in answer.reason and "all is lost" in answer.reason


@pytest.mark.slow
def test_long_answers_are_read_one_at_a_time(open_session: Open) -> None:
    """Eight answers of 32 MB: the server holds the request, one answer as it arrives, and what it makes of it."""
    clients, values = "abcdefgh", 8 << 20
    session = open_session(clients, max_bytes=1 << 26)
    request = Request.of("echo", 1, {"w": torch.ones(values)})
    ask(session, dict.fromkeys(clients, "echo"))
    tracemalloc.start()
    try:
        for answer in session.exchange(dict.fromkeys(clients, request), 120.0):
            assert isinstance(answer, Reply) and float(answer.tensors["w"].sum()) == values
            # Give the others time to write what nobody reads yet.
            time.sleep(0.05)
            del answer
        assert tracemalloc.get_traced_memory()[1] < 5 * 4 * values
    finally:
        tracemalloc.stop()


def test_replies_are_yielded_as_they_arrive(open_session: Open) -> None:
    session = open_session()
    ask(session, {"a": "echo", "b": "echo"})
    replies = session.exchange({"a": Request.of("hang"), "b": Request.of("echo")})
    assert next(replies).client == "b"
    # Whoever stops listening is not answered later by those who still owe.
    assert set(ask(session, {"a": "echo", "b": "echo"}, round=2)) == {"a", "b"}


def test_a_client_does_not_pay_for_a_slow_server(open_session: Open) -> None:
    session = open_session()
    ask(session, {"a": "echo", "b": "echo"})
    replies = session.exchange({"a": Request.of("echo"), "b": Request.of("nap")}, deadline=1.0)
    first = next(replies)
    time.sleep(1.2)
    assert first.client == "a" and [type(answer) for answer in replies] == [Reply]


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        ("other-client", "nobody asked for"),
        ("other-round", "'other-round' of round 2 was answered, but 'other-round' of round 1 was asked"),
        ("other-verb", "'echo' of round 1 was answered"),
        ("request", "nobody asked for"),
        ("garbage", "claims a header"),
        ("pickle", "not safetensors"),
        ("huge", "A message of 1152921504606846976 bytes was announced where at most 16777216 are allowed"),
        ("close", "its process ended with signal 9"),
    ],
)
def test_a_client_that_breaks_the_protocol_is_named_and_ended(open_session: Open, verb: str, reason: str) -> None:
    session = open_session()
    process = pid(ask(session, {"a": "echo"})["a"])
    answer = ask(session, {"a": verb, "b": "echo"})["a"]
    assert isinstance(answer, Failure) and answer.stage == "exchange" and reason in answer.reason
    assert not alive(process)


def test_a_second_answer_is_not_taken_for_the_next_rounds(open_session: Open) -> None:
    session = open_session()
    assert isinstance(ask(session, {"a": "twice"}, round=1)["a"], Reply)
    time.sleep(0.1)
    answer = ask(session, {"a": "echo"}, round=2)["a"]
    assert isinstance(answer, Failure) and "'twice' of round 1 was answered" in answer.reason
    assert isinstance(ask(session, {"a": "echo"}, round=2)["a"], Reply)


def test_clients_that_do_not_start_are_named(open_session: Open) -> None:
    session = open_session(("a", "mute", "unfit", "broken"), start_timeout=1.0)
    answers = ask(session, dict.fromkeys(("a", "mute", "unfit", "broken"), "echo"))
    assert isinstance(answers["a"], Reply)
    assert answers["mute"] == Failure("mute", "start", "it did not start in time, and its process was ended.")
    assert answers["unfit"] == Failure("unfit", "start", "no model here")
    assert answers["broken"] == Failure("broken", "start", "its process ended with exit code 3; its log.txt tells more.")


def test_a_command_that_cannot_be_run_is_a_failure_to_start(open_session: Open) -> None:
    answer = ask(open_session(command=("/nowhere/python",)), {"a": "echo"})["a"]
    assert isinstance(answer, Failure) and answer.stage == "start" and "No such file" in answer.reason


def test_unknown_clients_fail_and_start_nothing(open_session: Open, tmp_path: Path) -> None:
    assert ask(open_session(), {"../x": "echo"})["../x"] == Failure("../x", "exchange", "there is no such client.")
    assert not (tmp_path / "run").exists()


def test_no_more_processes_than_allowed(open_session: Open) -> None:
    session = open_session("abcde", max_processes=2)
    pids: set[int] = set()
    for round in (1, 2):
        for answer in session.exchange({client: Request.of("echo", round) for client in "abcde"}, 30.0):
            pids.add(pid(answer))
            assert sum(map(alive, pids)) <= 2
    assert len(pids) > 5


def test_closing_ends_everyone_and_can_be_done_twice(open_session: Open) -> None:
    session = open_session(folder=None)
    pids = [pid(answer) for answer in ask(session, {"a": "echo", "b": "echo"}).values()]
    session.close()
    session.close()
    assert not any(map(alive, pids))


def test_clients_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    """A client at work does not listen to its pipe: its reading thread does."""
    server = f"""
import os, subprocess, sys
work = ("import sys, time; from queue import SimpleQueue; from threading import Thread; from fedfm.client.frames import Inbox;"
        "from fedfm.client.worker import _read; Thread(target=_read, args=(Inbox(0, 9), SimpleQueue())).start(); time.sleep(60)")
client = subprocess.Popen([{sys.executable!r}, "-c", work], stdin=subprocess.PIPE)
print(client.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    printed = subprocess.run([sys.executable, "-c", server], stdout=subprocess.PIPE, check=False).stdout
    until = time.monotonic() + 20
    while running(int(printed)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(int(printed))


def running(pid: int) -> bool:
    """Alive and not a zombie (an orphan's zombie stays where the container's first process does not reap)."""
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_a_client_prints_goes_to_its_log() -> None:
    code = (
        "import os; from fedfm.client import worker;"
        "worker.serve = lambda incoming, outgoing: (print('noise', flush=True), os.system('echo noise'), os.write(outgoing, os.read(incoming, 9)));"
        "worker.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b"frame", capture_output=True, check=True)
    assert done.stdout == b"frame" and done.stderr.count(b"noise") == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_frames_arrive_as_they_were_sent_however_they_are_cut(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(len(frame).to_bytes(8, "little") + frame for frame in frames)
    reading, writing = os.pipe()
    try:
        os.set_blocking(reading, False)
        inbox, received, sent = Inbox(reading, 300), [], 0
        while sent < len(stream):
            sent += os.write(writing, stream[sent : sent + data.draw(st.integers(1, 40))])
            while (frame := inbox.receive()) is not None:
                received.append(bytes(frame))
        assert received == frames
        outbox = Outbox(writing)
        for frame in frames:
            outbox.send(frame)
        assert outbox.flush() and os.read(reading, 1 << 16 if stream else 0) == stream
    finally:
        os.close(writing)
        with pytest.raises(EOFError):
            Inbox(reading, 300).receive()
        os.close(reading)


def test_a_full_pipe_takes_what_fits_and_the_rest_later() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    frame = os.urandom(1 << 20)
    inbox, outbox = Inbox(reading, 1 << 20), Outbox(writing)
    outbox.send(frame)
    turns, received = 0, None
    while received is None:
        turns += not outbox.flush()
        received = inbox.receive()
    os.close(reading)
    os.close(writing)
    assert bytes(received) == frame and turns > 2


def test_a_frame_that_is_announced_too_long_is_refused_before_it_is_buffered() -> None:
    reading, writing = os.pipe()
    os.write(writing, (11).to_bytes(8, "little"))
    with pytest.raises(MessageError, match="11 bytes was announced where at most 10"):
        Inbox(reading, 10).receive()
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"max_processes": -1}, {"start_timeout": 0.0}, {"start_timeout": float("nan")}])
def test_hyperparameters_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        Process(**wrong)  # type: ignore[arg-type]

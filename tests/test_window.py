"""What is new is taken once; what is not is dropped and counted, over restarts, in bounded memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfm.core.errors import MessageError, RunError
from fedfm.wire.envelope import Header
from fedfm.wire.refusal import REASONS, Refused
from fedfm.wire.window import Window

NOW = 1_800_000_000.0
HEADER = Header("c", "run-1", 3, 7, "reply", NOW, NOW + 60, "alice", ("c0",), "0" * 32, 10)


class Time:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def header(number: int, **changes) -> Header:
    return replace(HEADER, **{"id": f"{number:032x}", "sequence": number, **changes})


def window(path: Path | None = None, time: Time | None = None, **changes) -> Window:
    made = Window(path, now=time or Time(), **changes)
    made.open("run-1", 3, 4)
    return made


def refused(made: Window, what: Header) -> str:
    before = made.counts.total()
    try:
        made.check(what)
    except Refused as error:
        assert error.why in REASONS and made.counts.total() == before + 1
        return error.why
    assert made.counts.total() == before
    return ""


def test_each_kind_is_dropped_and_counted() -> None:
    made = window()
    made.check(HEADER)
    made.check(HEADER)  # Looking is not taking: what was not finished is delivered again.
    made.take(HEADER)
    cases = {
        "replay": HEADER,
        "duplicate": replace(HEADER, id="1" * 32),
        "late": header(8, round=2),
        "early": header(8, round=5),
        "job": header(8, job="run-2"),
        "": header(8, round=4),
    }
    assert {refused(made, what): what for what in cases.values()} == cases
    made.count(MessageError("not JSON"))
    made.count(Refused("signature", "not signed"))
    assert made.counts == Counter(["replay", "duplicate", "late", "early", "job", "malformed", "signature"])
    made.close("run-1")
    assert refused(made, header(9)) == "job"


def test_the_same_id_or_errand_of_another_sender_is_another_message() -> None:
    made = window()
    made.take(HEADER)
    assert refused(made, replace(HEADER, sender="bob")) == ""
    assert refused(made, header(8, sender="bob", kind="request")) == ""


def test_a_member_takes_the_first_request_of_a_job_that_it_has_not_heard_of() -> None:
    assert refused(Window(any_job=True, now=Time()), header(1, job="new", round=40)) == ""


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 3))
def test_each_message_is_taken_once_in_whatever_order_and_number_they_arrive(arrivals: list[int], restarts: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path, taken = Path(folder) / "window.jsonl", []
        made = window(path)
        for i, number in enumerate(arrivals):
            if restarts and i % (7 - restarts) == 0:
                made = window(path)
            # An errand may be sent again under a new id.
            what = header(number % 9, id=f"{number:032x}")
            if refused(made, what) == "":
                made.take(what)
                taken.append(number % 9)
        assert sorted(taken) == sorted({number % 9 for number in arrivals})


def test_a_replay_after_a_restart_is_a_replay(tmp_path: Path) -> None:
    path, time = tmp_path / "window.jsonl", Time()
    window(path, time).take(header(1), header(2))
    again = window(path, time)
    assert [refused(again, header(i)) for i in (1, 2, 3)] == ["replay", "replay", ""]
    assert [refused(again, header(i, id="f" * 32)) for i in (1, 2)] == ["duplicate", "duplicate"]


def test_what_a_crash_left_of_the_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "window.jsonl"
    made = window(path)
    made.take(header(1))
    made.take(header(2))
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    again = window(path)
    assert [refused(again, header(i)) for i in (1, 2, 3)] == ["replay", "replay", ""]
    again.take(header(3))
    assert refused(window(path), header(3)) == "replay"


@pytest.mark.parametrize(
    "line", ["{}", "[1,2,3]", '["alice","x",NaN]', '["../x","x",1]', "[" * 50_000, "\0", '["a","x",true]', '["a","x"]']
)
def test_a_damaged_file_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "window.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RunError, match=r"window\.jsonl:1 is damaged"):
        Window(path)


def test_memory_is_bounded_by_what_has_not_expired(tmp_path: Path) -> None:
    path, time = tmp_path / "window.jsonl", Time()
    made = window(path, time)
    for i in range(600):
        time.now += 1
        what = header(i, created=time.now, expires=time.now + 60)
        made.check(what)
        made.take(what)
        # It is remembered for a minute, and for as long as clocks may differ.
        assert made.size <= 2 * 182
    assert refused(made, header(0)) == "expired"
    assert Window(path, now=time).size <= 2 * 182
    assert len(path.read_text().splitlines()) <= 2 * 183


def test_a_flood_is_refused_and_others_are_heard() -> None:
    time = Time()
    made = window(time=time, most=100)
    for i in range(100):
        made.check(header(i))
        made.take(header(i))
    assert refused(made, header(100)) == "flood"
    assert refused(made, header(100, sender="bob")) == ""
    time.now += 200
    assert refused(made, header(100, expires=time.now + 60)) == ""


def test_one_that_lasts_long_does_not_keep_the_others() -> None:
    time = Time()
    made = window(time=time, most=100)
    made.take(header(0, expires=NOW + 1e6))
    for i in range(1, 100):
        made.take(header(i))
    assert refused(made, header(100)) == "flood"
    time.now += 200
    assert refused(made, header(100, expires=time.now + 60)) == "" and made.size == 2
    assert refused(made, header(0)) == "replay"


def test_what_was_forgotten_stays_refused_when_the_clock_is_set_back(tmp_path: Path) -> None:
    path, time = tmp_path / "window.jsonl", Time()
    made = window(path, time)
    made.take(header(1))
    time.now += 1000
    made.take(header(2, expires=time.now + 60))
    time.now = NOW
    assert refused(made, header(1)) == "expired"

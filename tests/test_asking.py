"""A run's model asked about files: metrics of all rows, an answer for each row, text after prompts."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import Pairs, Personal
from test_run import cache, metrics, small  # noqa: F401 (the cache of every test here)

from fedfm.core import disk
from fedfm.core.errors import ConfigError, DataError, RunError
from fedfm.core.keys import Key
from fedfm.data import Data
from fedfm.data.sources import open_source
from fedfm.federation import Federation
from fedfm.models import load
from fedfm.run.asking import Answers, Form, Target, evaluate, predict, renamed
from fedfm.run.generation import Drawing, Generator
from fedfm.run.loop import run
from fedfm.run.result import Result
from fedfm.tasks import CausalLM, Classification, Instruct, MaskedLM
from fedfm.testing import tiny
from fedfm.testing.tiny import LABELS, TEXT, spec
from fedfm.tuning import Full, LoRA

ROWS = [
    {
        "owner": ("ann", "bob", "cid")[i % 3],
        "text": text if i % 4 else text * 3,
        "label": LABELS[(i // 3) % 3],
        "instruction": text[: 20 + i % 17],
        "response": text[-12:],
        "number": i,
    }
    for i, text in enumerate(TEXT[:90])
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def federation(folder: Path, task: Any, **changes: Any) -> Federation:
    """Three owners with a test file of their own, which is evaluated whole at the end."""
    train, test = write(folder / "train.jsonl", ROWS[:60]), write(folder / "test.jsonl", ROWS[60:])
    return small(folder, data=Data(str(train), test=str(test), by="owner"), task=task, rounds=1, **changes)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "causal": (CausalLM(max_length=24), {}),
    "causal, a text an example": (CausalLM(max_length=24, packed=False), {}),
    "instruct": (Instruct(max_length=48), {}),
    "masked": (MaskedLM(max_length=24), {"model": spec("Bert"), "tuning": LoRA(r=2, targets=("query",))}),
    "classes": (Classification(max_length=24), {"model": spec("Roberta"), "tuning": LoRA(r=2, targets=("query",))}),
    "pairs": (Pairs("text", "instruction"), {"model": spec("Bert"), "tuning": Full()}),
}


def played(folder: Path, kind: str) -> Result:
    task, changes = KINDS[kind]
    plan = federation(folder, task, **changes)
    if kind == "pairs":
        # A task that no recipe knows is asked without a folder.
        *_, (state, _) = run(plan)
        return Result(plan, load(plan.model, task.head, task.labels, "cpu", Key.root(0)), state)
    for _ in run(plan, out=folder / "out"):
        pass
    return Result.open(folder / "out")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return played(tmp_path_factory.mktemp("classifier"), "classes")


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return played(tmp_path_factory.mktemp("instructed"), "instruct")


def answered(result: Result, source: Path, to: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows that ``predict`` writes."""
    answers = Answers(result, **options)
    predict(answers, str(source), Target(to, force=True))
    if to.suffix == ".csv":
        with to.open(newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in to.read_text().splitlines()]


def test_rows_are_read_as_the_run_read_its_own(tmp_path: Path) -> None:
    """Delimiter, encoding and what becomes of bad rows are the recipe's; options beat them."""
    result = played(tmp_path, "classes")
    source, plan = tmp_path / "rows.csv", result.federation
    columns = [*plan.task.columns]
    lines = [
        "#".join(columns),
        "#".join(f"the small cat{i}" if name == "text" else "a" for i, name in enumerate(columns)),
        "one#two#three#four",
    ]
    source.write_text("\n".join(lines) + "\n", encoding="utf-16")
    with pytest.raises(DataError):
        evaluate(result, str(source))
    data = replace(plan.data, delimiter="#", encoding="utf-16", bad_rows="skip")
    result.federation = replace(plan, data=data)
    assert evaluate(result, str(source))["examples"] == 1
    answers = Answers(result)
    predict(answers, str(source), Target(tmp_path / "out.csv"))
    assert (answers.rows, answers.unanswered, answers.unreadable) == (1, 0, 1)
    result.federation = replace(plan, data=replace(data, delimiter="|", bad_rows="stop"))
    with pytest.raises(DataError, match=":3"):
        predict(Answers(result), str(source), Target(tmp_path / "new.csv"), form=Form("#"))
    assert not (tmp_path / "new.csv").exists()


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pairs"])
def test_an_evaluation_of_the_test_file_is_the_runs_own(kind: str, tmp_path: Path) -> None:
    result = played(tmp_path, kind)
    own = metrics(tmp_path / "out")[-1]["metrics"]["eval"]
    seen: list[tuple[str, int | None, int | None]] = []
    report = evaluate(result, str(tmp_path / "test.jsonl"), by="owner", stage=lambda *stage: seen.append(stage))
    assert report["pooled"] == pytest.approx(own["pooled"], rel=1e-5)
    for owner, values in own["owners"].items():
        assert {name: report["owners"][owner][name] for name in values} == pytest.approx(values, rel=1e-5)
    assert report["worst"]["owner"] == own["worst"]["owner"] and report["spread"] == pytest.approx(own["spread"], rel=1e-4)
    assert sum(values["examples"] for values in report["owners"].values()) == report["examples"] > 0
    assert ("Evaluating", report["examples"], report["examples"]) in seen
    assert report["error"] > 0 and report["round"] == 1


def test_the_standard_error_is_that_of_a_mean(classifier: Result, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    report = evaluate(classifier, str(rows))
    guesses = [row["prediction"] for row in answered(classifier, rows, tmp_path / "out.jsonl")]
    hits = torch.tensor([float(guess == row["label"]) for guess, row in zip(guesses, ROWS, strict=True)], dtype=torch.float64)
    assert report["pooled"]["accuracy"] == pytest.approx(float(hits.mean()))
    assert report["error"] == pytest.approx(float(hits.std() / math.sqrt(len(hits)))) and "owners" not in report
    twice = write(tmp_path / "twice.jsonl", ROWS * 2)
    assert evaluate(classifier, str(twice))["error"] == pytest.approx(report["error"] / math.sqrt(2), rel=0.02)


def test_columns_of_other_names_and_other_kinds_of_files_give_the_same(classifier: Result, tmp_path: Path) -> None:
    before = evaluate(classifier, str(write(tmp_path / "rows.jsonl", ROWS)), by="owner")
    with gzip.open(tmp_path / "named.csv.gz", "wt", newline="") as file:
        table = csv.writer(file)
        table.writerow(["who", "review", "stars"])
        table.writerows([row["owner"], row["text"], row["label"]] for row in ROWS)
    after = evaluate(classifier, str(tmp_path / "named.csv.gz"), by="who", columns={"text": "review", "label": "stars"})
    assert after == before
    with pytest.raises(ConfigError, match=r"has no column 'txt'\. Did you mean 'text'"):
        renamed(Classification(), {"txt": "review"})
    with pytest.raises(DataError, match=r"named.csv.gz:2 has no column 'text'"):
        evaluate(classifier, str(tmp_path / "named.csv.gz"))


def test_a_file_with_fewer_classes_keeps_their_numbers_and_one_with_others_is_refused(classifier: Result, tmp_path: Path) -> None:
    rows = [row for row in ROWS if row["label"] == LABELS[2]]
    report = evaluate(classifier, str(write(tmp_path / "one.jsonl", rows)))
    guesses = answered(classifier, tmp_path / "one.jsonl", tmp_path / "out.jsonl")
    assert report["pooled"]["accuracy"] == pytest.approx(sum(row["prediction"] == LABELS[2] for row in guesses) / len(rows))
    with pytest.raises(DataError, match="'never'"):
        evaluate(classifier, str(write(tmp_path / "other.jsonl", [*rows, {**rows[0], "label": "never"}])))


def test_an_evaluation_leaves_no_rows_behind(classifier: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    evaluate(classifier, str(write(tmp_path / "rows.jsonl", [*ROWS, {**ROWS[0], "text": " "}])))
    with pytest.raises(DataError):
        evaluate(classifier, str(write(tmp_path / "bad.jsonl", [{"text": "the cat"}])))
    assert not list((tmp_path / "temporary").iterdir())


# --- predict ---------------------------------------------------------------------------------------------------------


def test_classes_with_probabilities_beside_each_row(classifier: Result, tmp_path: Path) -> None:
    rows = answered(classifier, write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl", probabilities=True)
    assert [{name: row[name] for name in ROWS[0]} for row in rows] == ROWS
    # The same from the merged model of transformers, a row at a time.
    for row in rows[:7]:
        ids = classifier.foundation.tokenizer(row["text"], truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p_c = classifier.model(ids).logits.double().softmax(-1)[0]
        assert [row[f"probability_{label}"] for label in LABELS] == pytest.approx(p_c.tolist(), rel=1e-4)
        assert row["prediction"] == LABELS[int(p_c.argmax())] and row["probability"] == pytest.approx(float(p_c.max()), rel=1e-4)
    plain = answered(classifier, tmp_path / "rows.jsonl", tmp_path / "out.csv")
    assert list(plain[0]) == [*ROWS[0], "prediction", "probability"]
    assert [(row["prediction"], float(row["probability"]), row["number"]) for row in plain] == [
        (row["prediction"], row["probability"], str(row["number"])) for row in rows
    ]


BAD = [{"text": ""}, {"text": None, "extra": [1, {"a": "b"}]}, {"other": "no text here"}, {"text": 7}]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_that_cannot_be_used_keep_their_places(suffix: str, classifier: Result, tmp_path: Path) -> None:
    rows = [row for i in range(300) for row in ([{**ROWS[i % 90], "number": i}, *(BAD if i % 100 == 3 else [])])]
    source, to = write(tmp_path / "rows.jsonl", rows), tmp_path / f"out{suffix}"
    answers = Answers(classifier)
    predict(answers, str(source), Target(to))
    assert answers.rows == len(rows) == 312 and answers.unanswered == 12
    assert answers.reason == f"{source}:5: there is nothing to answer in text."
    written = answered(classifier, source, to)
    empty = "" if suffix == ".csv" else None
    alone = dict(zip((row["text"] for row in ROWS), Answers(classifier).of(ROWS), strict=True))
    for row, before in zip(written, rows, strict=True):
        usable = isinstance(before.get("text"), str) and bool(before["text"])
        assert (row["prediction"] == empty) == (not usable)
        if usable:
            assert str(row["number"]) == str(before["number"]) and row["prediction"] == alone[before["text"]]["prediction"]
    if suffix == ".csv":
        assert written[5]["extra"] == '[1, {"a": "b"}]' and written[4]["extra"] == ""


def test_metrics_of_rows_add_up_to_those_of_all(tmp_path: Path) -> None:
    result = played(tmp_path, "causal, a text an example")
    rows = answered(result, tmp_path / "test.jsonl", tmp_path / "out.jsonl")
    report = evaluate(result, str(tmp_path / "test.jsonl"))
    targets = sum(row["targets"] for row in rows)
    assert targets == report["targets"]
    assert sum(row["loss"] * row["targets"] for row in rows) / targets == pytest.approx(report["pooled"]["loss"], rel=1e-4)
    assert rows[0]["perplexity"] == pytest.approx(math.exp(rows[0]["loss"]), rel=1e-4)


@pytest.mark.parametrize("kind", ["causal", "masked", "pairs"])
def test_every_task_answers_and_rows_do_not_depend_on_their_chunk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = played(tmp_path, kind)
    whole = answered(result, tmp_path / "test.jsonl", tmp_path / "out.jsonl")
    monkeypatch.setattr("fedfm.run.asking._ROWS", 4)
    again = answered(result, tmp_path / "test.jsonl", tmp_path / "again.jsonl")
    for row, other in zip(whole, again, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4) and row["number"] == other["number"]
    assert len({row["loss"] for row in whole}) > len(whole) // 2


def test_a_predict_that_is_stopped_or_fails_leaves_what_was_there(
    classifier: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, to = write(tmp_path / "rows.jsonl", ROWS * 10), tmp_path / "out.csv"
    to.write_text("before")
    with pytest.raises(RunError, match="is there already"):
        predict(Answers(classifier), str(source), Target(to))

    def stop(text: str, done: int | None = None, total: int | None = None) -> None:
        if done == 512:
            assert total == 900
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(Answers(classifier), str(source), Target(to, force=True), stop)
    with source.open("a") as file:
        file.write("{half a row\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:901 is not valid JSON"):
        predict(Answers(classifier), str(source), Target(to, force=True))
    write(source, ROWS)

    def full(name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "on_step", full)
    with pytest.raises(RunError, match="disk is full"):
        predict(Answers(classifier), str(source), Target(to, force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "rows.jsonl"] and to.read_text() == "before"


def test_what_cannot_be_written_is_refused_before_any_work(classifier: Result, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    for target, why in (
        (Target(tmp_path / "out.txt"), "no kind that can be written"),
        (Target(tmp_path), "no kind that can be written"),
        (Target(source, force=True), "is the file that is read"),
    ):
        with pytest.raises(ConfigError, match=why):
            target.require(str(source))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(RunError, match="is a folder"):
        Target(tmp_path / "folder.csv", force=True).require(str(source))
    answered(classifier, source, tmp_path / "once.jsonl")
    with pytest.raises(ConfigError, match="a column 'prediction' already"):
        answered(classifier, tmp_path / "once.jsonl", tmp_path / "twice.csv")
    twice = answered(classifier, tmp_path / "once.jsonl", tmp_path / "twice.csv", prefix="new_")
    assert twice[0]["new_prediction"] == twice[0]["prediction"]
    with pytest.raises(DataError, match=r"rows.jsonl:1 has no column 'txt'. Did you mean 'text'"):
        answered(classifier, source, tmp_path / "out.csv", columns={"text": "txt"})


def test_a_model_that_diverged_has_no_prediction(classifier: Result, tmp_path: Path) -> None:
    broken = Result(classifier.federation, tiny.foundation("Roberta", labels=LABELS), classifier.state)
    broken.theta_1d = torch.full_like(classifier.theta_1d, math.nan)
    answers = Answers(broken)
    assert {answer["prediction"] for answer in answers.of(ROWS)} == {None} and answers.unanswered == len(ROWS)


def test_a_model_that_is_nobodys_own_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = federation(tmp_path, CausalLM(max_length=24), tuning=Personal(LoRA(r=2), ("*lora_B*",)))
    *_, (state, _) = run(plan)
    result = Result(plan, load(plan.model, plan.task.head, (), "cpu", Key.root(0)), state)
    assert evaluate(result, str(tmp_path / "test.jsonl"))["examples"] and len(list(Answers(result).of(ROWS[:2]))) == 2
    assert caplog.text.count("Parameters that stay at home") == 2


# --- generate --------------------------------------------------------------------------------------------------------


def test_answers_together_are_those_alone(instructed: Result, tmp_path: Path) -> None:
    prompts = [row["instruction"] for row in ROWS[:40]]
    assert len({len(instructed.federation.task.opening(instructed.foundation.tokenizer, text)) for text in prompts}) > 5
    together = instructed.generate(prompts, 12)
    assert together == [instructed.generate(text, 12) for text in prompts] and len(set(together)) > 1
    rows = answered(instructed, write(tmp_path / "rows.jsonl", ROWS[:40]), tmp_path / "out.csv", drawing=Drawing(12))
    assert [row["answer"] for row in rows] == together


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_a_batch_with_padding_equals_single_prompts(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny.foundation(architecture)
    generator = Generator(base.model.eval(), base.tokenizer, base.max_context)
    prompts = [torch.randint(5, 290, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (3, 17, 9, 30, 9, 1)]
    alone = [Generator(base.model, base.tokenizer, base.max_context).answers([prompt], Drawing(10))[0] for prompt in prompts]
    assert generator.answers(prompts, Drawing(10)) == alone and generator._pads is True
    # Near the end of the context an answer is as short alone as together.
    assert base.max_context is not None
    long = [prompts[3].repeat(5)[: base.max_context - n] for n in (2, 5, 5)] if base.max_context < 200 else []
    mixed = [*prompts, *long]
    assert generator.answers(mixed, Drawing(10)) == [generator.answers([prompt], Drawing(10))[0] for prompt in mixed]


def test_a_model_that_minds_padding_gets_prompts_of_equal_length(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny.foundation("GPT2")
    # Positions that are not told count from the padding.
    forward = base.model.forward
    base.model.forward = lambda *args, position_ids=None, attention_mask=None, **others: forward(*args, **others)
    prompts = [torch.randint(5, 290, (n,), generator=torch.Generator().manual_seed(n)).numpy() for n in (3, 17, 17, 9)]
    generator = Generator(base.model.eval(), base.tokenizer, base.max_context)
    together = generator.answers(prompts, Drawing(4))
    assert generator._pads is False and "prompts of equal length go together" in caplog.text
    assert together == [generator.answers([prompt], Drawing(4))[0] for prompt in prompts]


def test_drawn_answers_have_their_own_numbers(instructed: Result) -> None:
    prompts = ["the small cat", "the old king saw the", "the small cat"]
    drawn = instructed.generate(prompts, 8, 1.0, 3)
    assert drawn == [instructed.generate(text, 8, 1.0, 3) for text in prompts] and drawn != instructed.generate(prompts, 8, 1.0, 4)
    # The rows of a file are drawn for apart.
    rows = [{"instruction": "the small cat"}] * 6
    answers = [answer["answer"] for answer in Answers(instructed, drawing=Drawing(8, 1.0, 3)).of(rows)]
    assert len(set(answers)) > 1 and answers == [answer["answer"] for answer in Answers(instructed, drawing=Drawing(8, 1.0, 3)).of(rows)]


def test_draws_follow_the_models_probabilities() -> None:
    from fedfm.run.generation import _noise

    logits = torch.tensor([[0.0, 1.0, 2.0]])
    noise = _noise(Drawing(1, 0.7, 0), [0])
    assert noise is not None
    counts = torch.bincount(torch.stack([noise(torch.zeros(1, 1), logits).argmax(-1)[0] for _ in range(4000)]), minlength=3)
    assert (counts / 4000).tolist() == pytest.approx((logits[0] / 0.7).softmax(-1).tolist(), abs=0.03)


def test_a_long_instruction_is_cut_in_its_middle_or_dropped(instructed: Result) -> None:
    task, tokenizer = instructed.federation.task, instructed.foundation.tokenizer
    row = {"instruction": "the king " * 400 + "the end"}
    whole, cut = (task.predictor(tokenizer, ()).prompt(row, room) for room in (None, 40))
    assert len(cut) == 40 and cut[:20].tolist() == whole[:20].tolist() and cut[20:].tolist() == whole[-20:].tolist()
    with pytest.raises(DataError, match="its prompt has"):
        Instruct(on_long="drop").predictor(tokenizer, ()).prompt(row, 40)
    with pytest.raises(ConfigError, match="does not write text"):
        Classification().opening(tokenizer, "the cat")


def test_a_folder_of_texts_is_a_file_too(tmp_path: Path) -> None:
    result = played(tmp_path, "causal")
    for owner in ("ann", "bob"):
        (tmp_path / "texts" / owner).mkdir(parents=True)
        (tmp_path / "texts" / owner / "one.txt").write_text(" ".join(TEXT[:8]))
    rows = answered(result, tmp_path / "texts", tmp_path / "out.jsonl")
    assert [row["owner"] for row in rows] == ["ann", "bob"] and rows[0]["loss"] == rows[1]["loss"]
    assert len(list(open_source(str(tmp_path / "texts")).rows())) == 2
    assert set(evaluate(result, str(tmp_path / "texts"), by="owner")["owners"]) == {"ann", "bob"}

"""A run's folder, its journal, resume, and a run beside its two ends."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from fedfm.aggregators import Mean
from fedfm.core import disk, tree
from fedfm.core.errors import DataError, FedfmError, ModelError, PlanError, RoundError, RunError
from fedfm.core.round import RoundRecord, ServerState
from fedfm.data import IID, Data
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.local import SGD, AdamW
from fedfm.methods import Scaffold
from fedfm.models import Model
from fedfm.observers import Evaluate
from fedfm.observers.base import RunInfo, Watcher
from fedfm.run.compare import compare
from fedfm.run.folder import RunFolder, _state_parts, latest_state, load_state, read_lines
from fedfm.run.ledger import Ledger
from fedfm.run.loop import resume, run
from fedfm.run.result import Result
from fedfm.samplers import Uniform
from fedfm.server import FedAdam
from fedfm.tasks import CausalLM
from fedfm.testing.tiny import TEXT, spec
from fedfm.transforms import TopK
from fedfm.tuning import LoRA


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def small(folder: Path, **changes: Any) -> Federation:
    """A federation of three owners that runs in a blink."""
    source = folder / "rows.jsonl"
    if not source.exists():
        rows = [{"owner": ("ann", "bob", "cid")[i % 3], "text": text} for i, text in enumerate(TEXT[:90])]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = Federation(
        model=spec("Llama", num_hidden_layers=1),
        data=Data(str(source), by="owner"),
        name="small",
        task=CausalLM(max_length=24, packed=False),
        tuning=LoRA(r=2),
        local=AdamW(lr=1e-2, steps=2, batch_size=2),
        engine=Embedded(bank=2, device="cpu"),
        rounds=3,
    )
    return replace(base, **changes)


STATEFUL = {"transforms": (TopK(fraction=0.25),), "server": FedAdam(lr=0.01), "sampler": Uniform(clients=2)}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "memories on both sides": STATEFUL,
    "scaffold": {"local": SGD(lr=0.1, steps=2), "method": Scaffold()},
}


def last(rounds: Iterator[tuple[ServerState, RoundRecord]]) -> ServerState:
    *_, (state, _) = rounds
    return state


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run's metrics say, but for time."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_lines(folder / "metrics.jsonl")]


def counts(folder: Path) -> dict[str, int]:
    return Ledger.from_json(json.loads((folder / "ledger.json").read_text())).counts()


def model_bytes(folder: Path) -> dict[str, bytes]:
    # An adapter tells where its base is, and a base built from a config is beside it.
    files = (path for path in sorted((folder / "model").rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder.resolve()).encode(), b"RUN") for path in files}


def same(x: Path, y: Path) -> None:
    """Two runs left the same, to the last bit."""
    assert tree.equal(latest_state(x).params, latest_state(y).params)
    assert metrics(x) == metrics(y)
    assert counts(x) == counts(y)
    assert model_bytes(x) == model_bytes(y)


# --- equivalences --------------------------------------------------------------------------------------------------


def test_a_folder_changes_no_number(tmp_path: Path) -> None:
    federation = small(tmp_path)
    states = [state for state, _ in run(federation)]
    assert [state.round for state in states] == [0, 1, 2, 3]
    assert tree.equal(last(run(federation, out=tmp_path / "out")).params, states[-1].params)
    assert tree.equal(latest_state(tmp_path / "out").params, states[-1].params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(variant: str, tmp_path: Path) -> None:
    federation = small(tmp_path, **VARIANTS[variant])
    list(run(federation, out=tmp_path / "whole"))
    for stop in range(3):
        broken = tmp_path / f"broken-{stop}"
        rounds = run(federation, out=broken)
        for _, record in rounds:
            if record.round == stop:
                break
        rounds.close()  # type: ignore[attr-defined]
        assert not (broken / "model").exists()
        assert [record.round for _, record in resume(broken)] == list(range(stop + 1, 4))
        same(tmp_path / "whole", broken)


def test_more_rounds_are_as_if_asked_for_at_once(tmp_path: Path) -> None:
    # A last round is evaluated on all test data, which must then be asked for in every round.
    federation = small(tmp_path, **STATEFUL, evaluate=Evaluate(max_examples=None))
    list(run(federation, out=tmp_path / "once"))
    list(run(federation, 1, out=tmp_path / "twice"))
    (tmp_path / "twice" / "compare.json").write_text("{}")
    list(resume(tmp_path / "twice", 3))
    same(tmp_path / "once", tmp_path / "twice")
    assert (tmp_path / "once" / "recipe.yaml").read_text() == (tmp_path / "twice" / "recipe.yaml").read_text()
    assert not (tmp_path / "twice" / "compare.json").exists(), "a comparison of another model"
    assert list(resume(tmp_path / "twice")) == []
    same(tmp_path / "once", tmp_path / "twice")


def test_whatever_else_is_damaged_is_rebuilt_from_the_journal(tmp_path: Path) -> None:
    federation, out = small(tmp_path, **STATEFUL), tmp_path / "out"
    list(run(federation, out=tmp_path / "whole"))
    list(run(federation, 2, out=out))
    with (out / "journal.jsonl").open("a") as file:
        file.write('{"event":"round","round":3,"sta')
    (out / "metrics.jsonl").write_text("half a li")
    (out / "ledger.json").unlink()
    newest = out / "state" / "round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    assert [record.round for _, record in resume(out, 3)] == [2, 3], "the damaged state is not trusted, the one before it is"
    same(tmp_path / "whole", out)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"server": FedAdam(lr=0.01), "local": SGD(lr=0.1, steps=1, batch_size=None)},
        {"method": Scaffold()},
        {"local": SGD(lr=0.1, steps=2, batch_size=None, decay=0.5)},
    ],
)
def test_the_ends_of_a_federation_of_one_are_the_federation(tmp_path: Path, changes: dict[str, Any]) -> None:
    # One owner, all of its examples in each step: alone, federated and centralised are the same descent.
    everything = SGD(lr=0.1, steps=2, batch_size=None, max_grad_norm=None)
    data = Data(small(tmp_path).data.source, partition=IID(clients=1))
    table = compare(small(tmp_path, data=data, **{"local": everything, **changes}), tmp_path / "out", stage=None)
    (row,) = table.owners
    assert row["local"]["loss"] == pytest.approx(row["federated"]["loss"], rel=1e-6) == row["centralised"]["loss"]
    assert row["federated"]["loss"] < row["before"]["loss"]
    for metric in ("loss", "perplexity"):
        assert table.pooled["local"][metric] == pytest.approx(table.pooled["federated"][metric], rel=1e-6)
    scores = [line["metrics"]["score"] for line in metrics(tmp_path / "out")]
    for points in table.curves.values():
        assert [point["round"] for point in points] == [0, 1, 2, 3]
        assert [point["pooled"]["loss"] for point in points] == pytest.approx(scores, rel=1e-6)


def test_the_curves_of_both_ends_are_bounded_and_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = small(tmp_path, rounds=6, data=Data(str(small(tmp_path).data.source), by="owner", test_fraction=0.4))
    federation = replace(federation, evaluate=Evaluate(max_examples=4))
    table = compare(federation, tmp_path / "out")
    assert [[point["round"] for point in points] for points in table.curves.values()] == [list(range(7))] * 2
    scores = [line["metrics"]["score"] for line in metrics(tmp_path / "out")]
    for points in table.curves.values():
        losses = [point["pooled"]["loss"] for point in points]
        assert losses[0] == pytest.approx(scores[0], rel=1e-6) and losses[-1] < losses[0] and len(set(losses)) == 7
    assert table.seconds["curves"] > 0 and {"local", "centralised"} <= set(table.seconds)
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'class="curve local"' in page and 'class="curve centralised"' in page and "learning curves of these two" in page
    blind = compare(replace(federation, evaluate=Evaluate(every=0)), tmp_path / "blind")
    assert blind.curves == {"local": [], "centralised": []}
    assert [(row["local"], row["centralised"]) for row in blind.owners] == [(row["local"], row["centralised"]) for row in table.owners]
    assert 'class="curve local"' not in (tmp_path / "blind" / "report.html").read_text()
    monkeypatch.setattr("fedfm.run.compare.CURVE", 2)
    assert [[point["round"] for point in points] for points in compare(federation, tmp_path / "out").curves.values()] == [[0, 3, 6]] * 2


def test_the_ends_of_a_run_that_ended_early_train_as_long_as_it_did(tmp_path: Path) -> None:
    federation = small(tmp_path, local=AdamW(lr=0.5, steps=2, batch_size=2), rounds=9, evaluate=Evaluate(patience=1))
    table = compare(federation, tmp_path / "early")
    played = metrics(tmp_path / "early")[-1]["round"]
    assert played < 9
    whole = compare(replace(federation, rounds=played, evaluate=Evaluate()), tmp_path / "whole")
    assert table.owners == whole.owners


def test_a_comparison_agrees_with_the_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = compare(small(tmp_path, sampler=Uniform(clients=2)), out)
    reports = [line["metrics"]["eval"] for line in metrics(out)]
    for way, report in (("before", reports[0]), ("federated", reports[-1])):
        assert table.pooled[way] == pytest.approx(report["pooled"])
        assert {row["owner"]: row[way]["loss"] for row in table.owners} == pytest.approx(
            {name: own["loss"] for name, own in report["owners"].items()}
        )
    assert {name: table.travelled[name] for name in ("bytes_up", "bytes_down")} == {
        name: counts(out)[name] for name in ("bytes_up", "bytes_down")
    }
    assert json.loads((out / "compare.json").read_text()) == table.to_json()
    assert compare(small(tmp_path, sampler=Uniform(clients=2)), out).owners == table.owners, "a run that is there is not played again"
    assert "local-only" in (out / "report.html").read_text()


def test_a_comparison_scores_own_data_whole_and_everybodys_on_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, out = small(tmp_path, rounds=1, data=Data(str(tmp_path / "rows.jsonl"), by="owner", test_fraction=0.4)), tmp_path / "out"
    whole = compare(federation, out)
    assert whole.everybody["examples"] == whole.everybody["of"] > 30 and not whole.everybody["error"]
    monkeypatch.setattr("fedfm.run.compare.TOGETHER", 12)
    table = compare(federation, out)
    for row, expected in zip(table.owners, whole.owners, strict=True):
        assert all(row[way] == pytest.approx(expected[way], rel=1e-5) for way in ("before", "local", "federated", "centralised"))
    assert table.everybody["examples"] == 12 and set(table.everybody["error"]) == set(table.pooled) == set(whole.pooled)
    for way, error in table.everybody["error"].items():
        assert 0 < abs(table.pooled[way]["loss"] - whole.pooled[way]["loss"]) < 5 * error
    everything = replace(federation, evaluate=Evaluate(max_examples=None))
    assert compare(everything, tmp_path / "all").everybody == whole.everybody


def test_a_run_reads_its_earlier_rounds_when_it_goes_on(tmp_path: Path) -> None:
    out, heard = tmp_path / "out", Heard()
    records = [record for _, record in run(small(tmp_path, rounds=2), out=out)]
    list(resume(out, 3, watchers=[heard]))
    assert heard.info is not None and heard.info.resumed_from == 2 and heard.info.metric.name == "loss"
    earlier = list(heard.info.earlier)
    assert [record.metrics["eval"] for record in earlier] == [record.metrics["eval"] for record in records]
    assert [record.bytes_up for record in earlier] == [record.bytes_up for record in records]
    again = Heard()
    list(resume(out, 3, watchers=[again]))
    assert again.info is not None and [record.round for record in again.info.earlier] == [0, 1, 2, 3]


class Heard(Watcher):
    """Notes what it is told when a run starts."""

    info: RunInfo | None = None

    def start(self, info: RunInfo) -> None:
        self.info = info


def test_a_run_says_what_it_does_before_and_in_its_first_round(tmp_path: Path) -> None:
    texts: list[str] = []

    class Stages(Watcher):
        def stage(self, text: str, done: int | None = None, total: int | None = None) -> None:
            texts.append(text)

    list(run(small(tmp_path, rounds=2), watchers=[Stages()]))
    for beginning in (
        "Loading the model",
        "Evaluating before training, on all",
        "Training round 1; the first",
        "Evaluating after the last",
    ):
        assert sum(text.startswith(beginning) for text in texts) == 1, beginning


# --- behaviour -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(min_size=1), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]), st.integers(0, 5)),
        unique_by=lambda item: item[0],
    )
)
def test_a_state_comes_back_in_its_order_and_bits(
    tmp_path_factory: pytest.TempPathFactory, leaves: list[tuple[str, torch.dtype, int]]
) -> None:
    params = {name: torch.arange(n).to(dtype) for name, dtype, n in leaves}
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    path.write_bytes(b"".join(_state_parts(ServerState(7, params, {"server": params, "transforms.0": {}}, {"a/b": 7}))))
    found = load_state(path)
    assert found.round == 7 and list(found.params) == list(found.of("server")) == list(params)
    assert tree.equal(found.params, params) and tree.equal(found.of("server"), params) and found.of("transforms.0") == {}
    assert found.counted == {"a/b": 7}


def test_the_ledger_adds_up(tmp_path: Path) -> None:
    records = [record for _, record in run(small(tmp_path), out=tmp_path / "out")]
    found = counts(tmp_path / "out")
    told = [told for record in records for told in record.clients.values()]
    assert found["rounds"] == 3 and found["client_rounds"] == len(told) == 9
    assert found["bytes_up"] == sum(record.bytes_up for record in records) > 0
    assert found["steps"] == 3 * 3 * 2 and found["examples"] == 3 * 3 * 2 * 2
    assert found["tokens"] == sum(own["tokens"] for own in told)
    federation = small(tmp_path)
    assert found["flops"] > 4 * found["tokens"] * 32 * federation.rounds


def test_what_a_run_leaves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(run(small(tmp_path), out=out))
    assert [line["event"] for line in read_lines(out / "journal.jsonl")] == [
        "start",
        "recipe",
        "data",
        "base",
        "roster",
        "plan",
        *["round"] * 4,
        "end",
    ]
    assert sorted(path.name for path in (out / "state").iterdir()) == ["round-000002.safetensors", "round-000003.safetensors"]
    assert {row["owner"]: row["train"] + row["test"] for row in json.loads((out / "split.json").read_text())} == {
        "ann": 30,
        "bob": 30,
        "cid": 30,
    }
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in (out / "model").iterdir()}
    base = json.loads((out / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (Path(base) / "config.json").is_file(), "a base built from a config lies where the adapter says"
    assert "small" in (out / "report.html").read_text()
    assert not [path for path in out.rglob(".*") if path.name != ".lock"], "nothing half-done is left"


def test_watchers_see_rounds_once_they_are_committed(tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []

    class Witness(Watcher):
        def start(self, info: RunInfo) -> None:
            seen.append((info.num_clients, info.cohort_size, info.resumed_from))

        def round(self, record: RoundRecord) -> None:
            assert read_lines(out / "journal.jsonl")[-1]["round"] == record.round
            seen.append(record.round)

        def close(self, summary: Any) -> None:
            seen.append(None if summary is None else summary["rounds"])

    list(run(small(tmp_path), 1, out=out, watchers=[Witness()]))
    list(resume(out, 2, watchers=[Witness()]))
    assert seen == [(3, 3, None), 0, 1, 1, (3, 3, 1), 2, 2]


def test_evaluation_keeps_its_own_time(tmp_path: Path) -> None:
    def evaluated(every: int) -> list[int]:
        return [record.round for _, record in run(small(tmp_path, evaluate=Evaluate(every=every))) if "eval" in record.metrics]

    assert evaluated(2) == [0, 2, 3] and evaluated(0) == []


def test_ctrl_c_within_a_commit_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, out = small(tmp_path), tmp_path / "out"
    monkeypatch.setattr(
        disk, "on_step", lambda name: os.kill(os.getpid(), signal.SIGINT) if name == "written round-000001.safetensors" else None
    )
    with pytest.raises(KeyboardInterrupt):
        list(run(federation, out=out))
    assert read_lines(out / "journal.jsonl")[-1]["round"] == 1 and metrics(out)[-1]["round"] == counts(out)["rounds"] == 1
    monkeypatch.setattr(disk, "on_step", None)
    list(resume(out))
    list(run(federation, out=tmp_path / "whole"))
    same(tmp_path / "whole", out)


@pytest.mark.parametrize(
    "where", ["before round-000002", "before append journal", "before append metrics", "before ledger", "before model"]
)
def test_a_full_disk_loses_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, out = small(tmp_path), tmp_path / "out"

    def full(name: str) -> None:
        if name.startswith(where) and (where == "before model" or (out / "state" / "round-000001.safetensors").exists()):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "on_step", full)
    with pytest.raises(RunError, match="disk is full"):
        list(run(federation, out=out))
    monkeypatch.setattr(disk, "on_step", None)
    list(resume(out))
    list(run(federation, out=tmp_path / "whole"))
    same(tmp_path / "whole", out)


def test_a_result_leaves_and_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    list(run(small(tmp_path), out=out))
    result = Result.open(out)
    assert result.generate("the small cat", 5) == result.generate("the small cat", 5)
    result.export(tmp_path / "merged", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.use_cache and model.num_parameters() == result.foundation.num_params
    result.export(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == (out / "model" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunError, match="holds files already"):
        result.export(tmp_path / "adapter")
    with pytest.raises(FedfmError, match="prompt has"):
        result.generate("the small cat " * 1000)


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_that_cannot_be_written_says_so(merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    list(run(small(tmp_path, engine=Embedded(device="cpu"), rounds=0), out=out))
    result = Result.open(out)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="could not be written: Not a directory"):
        result.export(tmp_path / "file" / "sub", merge)

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fedfm.tuning.layout.save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(RunError, match="disk is full"):
        result.export(tmp_path / "exported", merge)
    with pytest.raises(RunError, match="disk is full"):
        list(resume(out, rounds=1))
    assert (out / "model" / "adapter_model.safetensors").exists()


def test_a_result_opens_where_the_run_could_not_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(run(small(tmp_path, rounds=0), out=out))
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("device: auto", "device: cuda:99").replace("device: cpu", "device: cuda:99"))
    assert "cuda:99" in recipe.read_text() and Result.open(out).foundation.device.type == "cpu"


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    federation, out = small(tmp_path), tmp_path / "out"
    list(run(federation, 0, out=out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"never overwritten.*fedfm resume"):
        next(run(federation, out=out))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"thesis\.tex"):
        next(run(federation, out=tmp_path / "other"))
    with pytest.raises(RunError, match=r"rows\.jsonl"):
        next(run(federation, out=tmp_path / "rows.jsonl" / "out"))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    rounds = run(small(tmp_path), out=tmp_path / "out")
    next(rounds)
    with pytest.raises(RunError, match="in use"):
        next(resume(tmp_path / "out"))
    rounds.close()  # type: ignore[attr-defined]
    assert len(list(resume(tmp_path / "out"))) == 3


def test_a_changed_recipe_is_shown(tmp_path: Path) -> None:
    federation, out = small(tmp_path), tmp_path / "out"
    list(run(federation, 1, out=out))
    text = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(RunError, match=r"(?s)has changed.*-seed: 0.*\+seed: 1"):
        next(resume(out))
    (out / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match="Only rounds and observers"):
        next(resume(out, federation=replace(federation, aggregator=Mean(weights="uniform"))))
    with pytest.raises(RunError, match="has completed 1 rounds"):
        next(resume(out, 0))
    assert len(list(resume(out, federation=replace(federation, rounds=2)))) == 1


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        next(resume(tmp_path / "nowhere"))
    out = tmp_path / "out"
    list(run(small(tmp_path), 1, out=out))
    for path in (out / "state").iterdir():
        path.write_bytes(b"")
    with pytest.raises(RunError, match="gone or damaged"):
        next(resume(out))
    (out / "journal.jsonl").write_text("{}\nnot JSON\n{}\n")
    with pytest.raises(RunError, match=r"journal\.jsonl:1 is damaged: it does not end in a digest"):
        next(resume(out))
    with pytest.raises(RunError, match="is not the state of a run"):
        load_state(out / "recipe.yaml")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sampler": Uniform(clients=9)}, PlanError),
        ({"model": Model("/no/such/model")}, ModelError),
        ({"data": Data("/no/such/rows.jsonl", by="owner")}, DataError),
        ({"tuning": LoRA(targets=("no_such_layer",))}, FedfmError),
        ({"engine": Embedded(device="gpu")}, ModelError),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing(changes: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        list(run(small(tmp_path, **changes), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_clients_that_diverge_are_named_and_the_run_stays(tmp_path: Path) -> None:
    out, wild = tmp_path / "out", SGD(lr=1e30, steps=3, batch_size=2, max_grad_norm=None)
    with pytest.raises(RoundError, match=r"Round 1.*ann.*(NaN|reaches)"):
        list(run(small(tmp_path, local=wild), out=out))
    assert latest_state(out).round == 0 and metrics(out)[0]["metrics"]["eval"]["pooled"]["loss"] > 0


def test_a_comparison_needs_something_to_compare_on(tmp_path: Path) -> None:
    data = replace(small(tmp_path).data, test_fraction=0.0)
    with pytest.raises(DataError, match="No owner has test data"):
        compare(small(tmp_path, data=data, rounds=1), tmp_path / "out")


def test_a_folder_discards_only_its_own(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "out", "name: x\n")
    (tmp_path / "out" / "mine.txt").touch()
    folder.close()
    folder.discard()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

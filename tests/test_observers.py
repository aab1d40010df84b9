"""Observers: what a person sees of a run, and what TensorBoard gets."""

from __future__ import annotations

import io
import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfm.core import words
from fedfm.core.errors import ConfigError, MissingExtra
from fedfm.core.keys import Key
from fedfm.core.messages import Failure, Reply
from fedfm.core.parts import ServerState
from fedfm.core.round import RoundRecord
from fedfm.core.task import SQUARES
from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.models import Model
from fedfm.observers import Progress, TensorBoard
from fedfm.observers.base import RunInfo
from fedfm.observers.evaluate import Evaluate, estimated, pooled_report, summary
from fedfm.tasks import CausalLM, Classification
from fedfm.testing.sessions import Scripted
from fedfm.verbs import Evaluation

INFO = RunInfo("quick", 3, 2, 2, "Llama", 1_000_000, 10_000, choices={"bank": 2})


def record(round: int, losses: dict[str, float | None] | None, failures: tuple[Failure, ...] = ()) -> RoundRecord:
    seen = [value for value in (losses or {}).values() if value is not None]
    report = {
        "pooled": {"loss": sum(seen) / len(seen) if seen else None},
        "owners": {owner: {"loss": x} for owner, x in (losses or {}).items()},
    }
    metrics: dict[str, Any] = {
        "update_norm": 0.5,
        **({"eval": report} if losses is not None else {}),
        **({"train_loss": 2.5} if round else {}),
    }
    clients = (
        {"ana": {"loss": 2.0, "weight": 30.0, "tokens": 1000.0}, "bob": {"loss": 3.0, "weight": 10.0, "tokens": 1000.0}} if round else {}
    )
    return RoundRecord(
        round, tuple(clients), failures, clients, metrics, 2048 * bool(round), 4096 * bool(round), {"train": 2.0} if round else {}
    )


def play(progress: Progress, failures: tuple[Failure, ...] = ()) -> None:
    progress.stage("tokenizing", 0, 2)
    progress.stage("tokenizing", 2, 2)
    progress.start(INFO)
    for k in range(4):
        for owner in ("ana", "bob"):
            if k:
                progress.answer(k, Reply(owner, "train", k))
        progress.round(record(k, {"ana": 4.0 - k, "bob": 5.0 - k}, failures if k == 2 else ()))
    progress.close({})


def shown(live: bool, failures: tuple[Failure, ...] = ()) -> str:
    file, clock = io.StringIO(), itertools.count(0.0, 10.0)
    play(Progress(file, live=live, clock=lambda: next(clock)), failures)
    return file.getvalue()


# --- laws


@given(st.lists(st.none() | st.floats() | st.integers(), max_size=60), st.integers(1, 20))
def test_a_sparkline_fits_its_width_and_keeps_gaps(values: list[float | None], width: int) -> None:
    line = words.sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= {*words.BLOCKS, " "}
    if len(values) <= width:
        assert [c == " " for c in line] == [words.number(value) is None for value in values]


def test_a_sparkline_falls_when_the_loss_does() -> None:
    assert words.sparkline([3.0, 2.5, 1.0]) == "█▆▁"


@given(st.text())
def test_clean_text_cannot_steer_a_terminal(text: str) -> None:
    assert all(c.isprintable() or c == " " or not c.isascii() for c in words.clean(text))
    assert not any(c in words.clean(text) for c in "\x1b\n\r\x07\x9b\u202e")


@given(st.none() | st.floats() | st.integers() | st.text())
def test_every_value_reads(value: Any) -> None:
    for read in (words.size, words.count, words.duration, words.loss):
        assert isinstance(read(value), str)


@pytest.mark.parametrize(
    ("read", "value", "text"),
    [
        (words.size, 999, "999 B"), (words.size, 999_999, "1.00 MB"), (words.size, 1_234_567, "1.23 MB"), (words.count, 12_345, "12.3 k"), (words.count, 7, "7"),
        (words.duration, 3.21, "3.2 s"), (words.duration, 59.99, "1:00"), (words.duration, 3723, "1:02:03"), (words.loss, 3.41234, "3.412"), (words.loss, float("nan"), "-"),
        (words.loss, 12.345, "12.35"), (words.loss, 2e7, "2.00e+07"),
    ],
)  # fmt: skip
def test_numbers_read_as_a_person_writes_them(read: Any, value: Any, text: str) -> None:
    assert read(value) == text


# --- progress


def test_a_log_has_one_line_per_round_and_names_failures() -> None:
    text = shown(live=False, failures=(Failure("bob", "train", "out of memory"),))
    lines = text.splitlines()
    assert lines[:2] == ["- tokenizing 0/2", "- tokenizing 2/2"]
    assert "Llama, 1.00 M parameters, 10.0 k trainable (1 %)" in lines[2] and "bank 2" in lines[2]
    rounds = [line for line in lines if "/3 " in line and not line.startswith("done")]
    assert [line.split()[0] for line in rounds] == ["0/3", "1/3", "2/3", "3/3"]
    assert [line.split()[1] for line in rounds] == ["4.500", "3.500", "2.500", "1.500"]
    assert lines[lines.index(rounds[2]) + 1].split(maxsplit=1) == ["bob", "failed in train: out of memory"]
    # One column per number: every round's line ends where the heading's does.
    assert len({len(line) for line in [lines[3], *rounds[1:]]}) == 1
    assert "1.00 k" in rounds[1]  # 2,000 tokens in 2 seconds
    assert lines[-1].startswith("done after round 3/3") and "4.500 -> 1.500 (-66.7 %)" in lines[-1] and "6.14 kB up" in lines[-1]
    assert "\x1b" not in text


def test_time_left_is_the_pace_times_the_rounds_that_remain() -> None:
    clock = iter([0.0, 0.0, 5.0, 15.0, 25.0, 25.0])
    progress = Progress(io.StringIO(), live=False, clock=lambda: next(clock))
    progress.start(INFO)
    for k in range(3):
        progress.round(record(k, None))
    assert progress.story.left == 10.0  # the evaluation before training is not a round


def test_the_live_display_shows_owners_trends_and_the_worst() -> None:
    text = shown(live=True, failures=(Failure("bob", "train", "out of [bold]memory"),))
    for part in ("ana", "bob", "worst", "█", "-66.7 %", "out of [bold]memory", "done after round 3/3"):
        assert part in text


def test_the_live_display_counts_answers_within_a_round() -> None:
    file = io.StringIO()
    progress = Progress(file, live=True)
    progress.start(INFO)
    progress.answer(1, Reply("ana", "train", 1))
    progress.answer(1, Failure("bob", "train", "out of memory"))
    progress.close(None)
    assert "round 1, 2 of 2 answered" in file.getvalue() and "stopped after round 0/3" in file.getvalue()


def test_the_worst_owner_is_always_in_the_table() -> None:
    progress = Progress(io.StringIO(), live=False)
    progress.start(INFO)
    losses: dict[str, float | None] = {f"o{i}": float(i) for i in range(50)}
    progress.round(record(0, losses))
    assert progress.story.largest(5)[-1] == "o49" and len(progress.story.largest(5)) == 5


def test_training_losses_stand_in_where_nothing_is_evaluated() -> None:
    file = io.StringIO()
    progress = Progress(file, live=False)
    progress.start(INFO)
    progress.round(record(1, None))
    assert progress.story.history == {"ana": [2.0], "bob": [3.0]} and not progress.story.evaluated
    assert "bob 3.000" in file.getvalue()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("losses", [None, {}, {"ana": None}, {"ana": float("nan"), "bob": float("inf")}])
def test_missing_and_infinite_losses_do_not_stop_a_run(live: bool, losses: dict[str, float | None] | None) -> None:
    progress = Progress(io.StringIO(), live=live)
    progress.start(INFO)
    for k in range(3):
        progress.round(record(k, losses))
    progress.close(None)


def test_an_owner_on_whom_the_model_breaks_is_not_left_out_of_the_pooled_loss() -> None:
    def sums(loss: float, targets: int = 4) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(float(value)) for name, value in (("loss", loss), ("hits", 1), ("targets", targets))}

    found = summary(CausalLM(), {"ana": sums(8.0), "bob": sums(float("nan")), "cid": sums(0.0, 0)})
    assert set(found["owners"]) == {"ana", "bob"} and found["worst"]["owner"] == "bob" and math.isnan(found["pooled"]["loss"])
    found = summary(CausalLM(), {"ana": sums(8.0), "bob": sums(float("inf"))})
    assert found["worst"] == {"owner": "bob", "loss": math.inf} and math.isnan(found["spread"])


def test_a_resumed_run_reports_its_improvement_from_round_0() -> None:
    for live in (False, True):
        file = io.StringIO()
        progress = Progress(file, live=live, clock=itertools.count(0.0, 10.0).__next__)
        earlier = [record(k, {"ana": 4.0 - k, "bob": 5.0 - k}) for k in range(3)]
        progress.start(replace(INFO, resumed_from=2, earlier=earlier))
        progress.round(record(3, {"ana": 1.0, "bob": 2.0}))
        progress.close({})
        assert progress.story.pooled == [4.5, 3.5, 2.5, 1.5] and progress.story.history["ana"] == [4.0, 3.0, 2.0, 1.0]
        done = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).split())
        assert "4.500 -> 1.500 (-66.7 %)" in done and "6.14 kB up, 12.3 kB down in the whole run" in done
        assert "2.05 kB up and 4.10 kB down in this session" in done


def test_resuming_a_run_that_is_done_prints_the_whole() -> None:
    file = io.StringIO()
    progress = Progress(file, live=False)
    progress.start(replace(INFO, resumed_from=3, earlier=[record(k, {"ana": 4.0 - k}) for k in range(4)]))
    progress.close({})
    text = file.getvalue().splitlines()[-1]
    assert text.startswith("done after round 3/3 in 6.0 s: loss 4.000 -> 1.000 (-75.0 %)") and "0 B up and 0 B down in this session" in text


def test_accuracy_leads_on_the_terminal_where_the_task_says_so() -> None:
    metric = words.Metric("accuracy", lower_is_better=False)
    for live in (False, True):
        file = io.StringIO()
        progress = Progress(file, live=live)
        progress.start(replace(INFO, metric=metric))
        for k in range(3):
            owners = {"ana": {"loss": 1.0, "accuracy": 0.5 + k / 10}, "bob": {"loss": 3.0, "accuracy": 0.9}}
            report = {"pooled": {"loss": 2.0, "accuracy": 0.6 + k / 10}, "owners": owners, "error": 0.021}
            progress.round(replace(record(k, None), metrics={"eval": report}))
        progress.close({})
        for part in ("accuracy", "80.0 %", "+20.0 points", "2.1 %", "ana"):
            assert part in file.getvalue(), part
        assert progress.story.worst == ("ana", 0.7)
        assert "accuracy 60.0 % -> 80.0 % (+20.0 points)" in file.getvalue()


def test_a_round_says_where_its_time_went() -> None:
    for live in (False, True):
        file = io.StringIO()
        progress = Progress(file, live=live)
        progress.start(INFO)
        progress.round(replace(record(1, {"ana": 2.0}), seconds={"train": 2.0, "aggregate": 0.5, "evaluate": 33.0}))
        progress.close({})
        assert all(part in file.getvalue() for part in ("train", "2.0 s", "aggregate", "0.5 s", "evaluate", "33.0 s"))


# --- a bounded sample


def test_a_sample_estimates_the_whole_and_its_error_is_that_of_many_samples() -> None:
    rng, task = np.random.default_rng(0), CausalLM(max_length=8)
    targets = rng.integers(1, 8, 400).astype(np.float64)
    losses = targets * rng.gamma(2.0, 1.0, 400)

    def sums(index: Any) -> dict[str, torch.Tensor]:
        y, x = losses[index], targets[index]
        values = {"loss": y, "hits": x / 2, "targets": x, "loss_squares": y * y, "loss_targets": x * y, "target_squares": x * x}
        return {name: torch.tensor(value.sum()) for name, value in values.items()}

    whole = pooled_report(task, estimated(task, sums(slice(None)), 400, 400))
    assert "error" not in whole and whole["pooled"]["loss"] == losses.sum() / targets.sum()
    reports = [pooled_report(task, estimated(task, sums(rng.choice(400, 40, replace=False)), 40, 400)) for _ in range(800)]
    means, errors = [report["pooled"]["loss"] for report in reports], [report["error"] for report in reports]
    assert np.mean(means) == pytest.approx(whole["pooled"]["loss"], rel=0.02)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert "error" not in pooled_report(task, estimated(task, sums([0]), 1, 400)), "one example tells no error"


def test_owners_weigh_in_a_sample_as_they_do_in_the_whole() -> None:
    task = CausalLM(max_length=4)

    def sums(loss: float, rows: int, of: int) -> dict[str, torch.Tensor]:
        values = {"loss": loss * rows, "hits": 0.0, "targets": rows, "loss_squares": loss**2 * rows, "loss_targets": loss * rows}
        return estimated(task, {name: torch.tensor(float(x)) for name, x in {**values, "target_squares": rows}.items()}, rows, of)

    sampled = summary(task, {"ana": sums(1.0, 10, 90), "bob": sums(2.0, 10, 10)})
    assert sampled["pooled"]["loss"] == pytest.approx(1.1) and sampled["owners"]["ana"]["loss"] == pytest.approx(1.0)


def test_accuracy_of_a_sample_has_the_error_of_a_share() -> None:
    tp = torch.tensor([15.0, 15.0], dtype=torch.float64)
    miss = torch.tensor([5.0, 5.0], dtype=torch.float64)
    sums = {name: torch.tensor(x, dtype=torch.float64) for name, x in (("loss", 20.0), ("hits", 30.0), ("targets", 40.0))}
    squares = dict.fromkeys(SQUARES, torch.tensor(1.0, dtype=torch.float64))
    report = pooled_report(Classification(), estimated(Classification(), {**sums, **squares, "tp": tp, "fp": miss, "fn": miss}, 40, 4000))
    assert report["error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 39 * 0.99)) and report["pooled"]["accuracy"] == 0.75


def test_before_and_after_are_whole_and_rounds_between_are_bounded() -> None:
    evaluate = Evaluate()
    assert [evaluate.most(round, 3) for round in range(4)] == [None, 24, 24, None]
    assert [Evaluate(max_examples=None, ends=5).most(round, 3) for round in range(4)] == [5, None, None, 5]
    with pytest.raises(ConfigError, match="ends is 0"):
        Evaluate(ends=0)


def test_a_name_that_the_log_cannot_encode_does_not_stop_a_run() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    progress = Progress(file, live=False)
    progress.start(INFO)
    progress.round(record(0, {"Ωmega\x1b[31m": 1.0}))
    file.seek(0)
    assert "?mega" in file.read()


def test_an_interrupted_run_says_so() -> None:
    file = io.StringIO()
    progress = Progress(file, live=False)
    progress.start(INFO)
    progress.round(record(1, None))
    progress.close(None)
    assert file.getvalue().splitlines()[-1].startswith("stopped after round 1/3")


def test_a_run_that_never_began_says_nothing_more() -> None:
    for live in (False, True):
        file = io.StringIO()
        Progress(file, live=live).close(None)
        assert "stopped" not in file.getvalue()


def test_who_could_not_be_evaluated_is_named() -> None:
    file = io.StringIO()
    progress = Progress(file, live=False)
    progress.start(INFO)
    progress.round(replace(record(0, None), metrics={"eval": {"pooled": {"loss": 1.0}, "owners": {}, "failed": {"bob": "unreadable"}}}))
    assert "bob failed in evaluate: unreadable" in file.getvalue()


def test_rich_is_imported_for_a_terminal_only() -> None:
    code = "import io, sys; from fedfm.observers import Progress; Progress(io.StringIO()); sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(Path(words.__file__).parents[2])}).returncode == 0


# --- TensorBoard


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_round_and_a_resumed_run_takes_back_later_ones(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    watcher = TensorBoard().open(tmp_path)
    watcher.start(INFO)
    for k in range(4):
        watcher.round(record(k, {"ana": 4.0 - k, "bob <b>": None}))
    watcher.close(None)
    assert curves(tmp_path / "tensorboard")["owner/ana"] == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)]

    watcher = TensorBoard().open(tmp_path)
    watcher.start(RunInfo("quick", 3, 2, 2, "Llama", 1, 1, resumed_from=1))
    for k in (2, 3):
        watcher.round(record(k, {"ana": 8.0 - k}))
    watcher.close({})
    found = curves(tmp_path / "tensorboard")
    assert found["owner/ana"] == [(0, 4.0), (1, 3.0), (2, 6.0), (3, 5.0)]
    assert found["speed/tokens_per_second"][0] == (1, 1000.0)
    assert not any("bob" in tag for tag in found)


def test_tensorboard_needs_its_package_and_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedfm\[track\]'"):
        TensorBoard().open(Path("x"))
    monkeypatch.setitem(sys.modules, "tensorboard", sys)
    with pytest.raises(ConfigError, match="Give dir"):
        TensorBoard().open(None)


# --- evaluation across the boundary -------------------------------------------------------------------------------


SUMS = {"loss": 6.0, "hits": 1.0, "targets": 3.0, "variance": 0.0}
PLAN = Federation(Model("nowhere"), Data("stdlib"), task=CausalLM(), deadline=7.0)


class Deadlines(Scripted):
    """Notes what it was given to answer in."""

    deadline: float | None = None

    def send(self, requests, deadline=None):  # type: ignore[no-untyped-def]
        self.deadline = deadline
        super().send(requests, deadline)


def report(session: Scripted, clients: list[str]) -> dict[str, Any]:
    return Evaluation().report(PLAN, ServerState(3, {}), session, clients, Key.root(0))


@pytest.mark.parametrize(
    ("sums", "tensors", "words"),
    [
        ({}, {}, "does not tell its loss"),
        ({"loss": 1.0}, {}, "does not tell its hits"),
        ({**SUMS, "extra": 1.0}, {}, "extra"),
        (SUMS, {"targets": torch.ones(7, dtype=torch.float64)}, "unexpected ['targets']"),
        ({**SUMS, "hits": "many"}, {}, "hits is 'many'"),
        ({**SUMS, "targets": -3.0}, {}, "'targets' reaches -3; it lies in 0.."),
        ({**SUMS, "hits": math.inf}, {}, "hits is inf"),
        ({**SUMS, "loss": 1.7e308}, {}, "'loss' reaches 1.7e+308"),
        ({**SUMS, "loss": -math.inf}, {}, "loss is -inf"),
    ],
)
def test_an_evaluation_that_is_none_is_its_clients_failure(sums: dict[str, Any], tensors: dict[str, torch.Tensor], words: str) -> None:
    session = Deadlines(lambda _: [Reply("ana", "evaluate", 3, {}, SUMS), Reply("bob", "evaluate", 3, tensors, sums)])
    found = report(session, ["ana", "bob"])
    assert session.deadline == 7.0
    assert list(found["owners"]) == ["ana"] and found["pooled"]["loss"] == 2.0
    assert words in found["failed"]["bob"]


def test_a_loss_that_is_no_number_is_told() -> None:
    found = report(Deadlines(lambda _: [Reply("ana", "evaluate", 3, {}, {**SUMS, "loss": math.nan})]), ["ana"])
    assert math.isnan(found["pooled"]["loss"]) and "failed" not in found


def test_a_live_display_takes_no_screen_before_it_has_something_to_show() -> None:
    file = io.StringIO()
    progress = Progress(file, live=True)
    progress.close(None)
    assert file.getvalue() == ""

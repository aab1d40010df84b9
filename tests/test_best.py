"""The best round beside the last, and runs that end early: the same whatever interrupts them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_run import Heard, counts, metrics, same, small

from fedfm.core import disk, tree
from fedfm.core.errors import ConfigError, RunError
from fedfm.core.journal import Journal
from fedfm.core.score import Score, best, has_ended_early, waited
from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.local import AdamW
from fedfm.observers import Evaluate
from fedfm.reports import reading, render
from fedfm.run.folder import read_lines, state_after
from fedfm.run.loop import resume, run
from fedfm.run.result import Result
from fedfm.server import FedAvgM


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def worsening(folder: Path, **changes: Any) -> Federation:
    """Learns for some rounds, and is then carried too far: the server's momentum is large."""
    small(folder)
    data = Data(str(folder / "rows.jsonl"), by="owner", test_fraction=0.4)
    parts = {"local": AdamW(lr=0.3, steps=2, batch_size=2), "server": FedAvgM(lr=2.0, momentum=0.95), "data": data}
    return small(folder, **{**parts, "rounds": 6, "evaluate": Evaluate(max_examples=4), **changes})


def scores(out: Path) -> list[Score]:
    return Journal.read(out / "journal.jsonl").scores


def states(out: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("round-")) for path in (out / "state").glob("round-*"))


# --- which round is best -------------------------------------------------------------------------------------------

COSTS = st.lists(st.none() | st.floats(-5, 5), min_size=1, max_size=12)


@given(COSTS)
def test_the_best_round_is_the_first_that_no_other_beats(costs: list[float | None]) -> None:
    chosen = best(Score(i, cost, True) for i, cost in enumerate(costs))
    known = [cost for cost in costs if cost is not None]
    assert (chosen is None) == (not known)
    if chosen is not None:
        assert costs[chosen] == min(known) and min(known) not in costs[:chosen]


@given(COSTS, st.floats(0, 1))
def test_waiting_is_counted_from_the_last_that_was_better_by_enough(costs: list[float | None], min_delta: float) -> None:
    lowest, since = math.inf, -1
    for i, cost in enumerate(costs):
        if cost is not None and (lowest == math.inf or cost < lowest - min_delta):
            lowest, since = cost, i
    assert waited([Score(i, cost, True) for i, cost in enumerate(costs)], 3, min_delta) == len(costs) - 1 - since


def test_an_end_holds_until_more_is_asked_for() -> None:
    ended = [Score(0, 1.0, True), Score(1, 2.0, True, {"rounds": 9, "patience": 1, "min_delta": 0.1})]
    assert has_ended_early(ended, 9, 1, 0.1) and has_ended_early(ended, 5, 1, 0.2)
    for rounds, patience, min_delta in ((10, 1, 0.1), (9, 2, 0.1), (9, None, 0.1), (9, 1, 0.05)):
        assert not has_ended_early(ended, rounds, patience, min_delta)
    assert not has_ended_early([*ended, Score(2, 0.5, True)], 9, 1, 0.1) and not has_ended_early([], 9, 1, 0.1)
    assert waited(ended, 1, 0.1) == 0, "somebody asked for more: it counts from there"
    assert waited(ended, 2, 0.1) == 1, "with another patience it is as if that had been asked for at once"


# --- kept ----------------------------------------------------------------------------------------------------------


def test_the_best_state_is_kept_beside_the_last(tmp_path: Path) -> None:
    out = tmp_path / "out"
    params = {state.round: state.params for state, _ in run(worsening(tmp_path), out=out)}
    chosen = best(scores(out))
    assert chosen is not None and 0 < chosen < 5, "this run must get better and then worse"
    assert states(out) == sorted({chosen, 5, 6})
    assert tree.equal(state_after(out, "best").params, params[chosen]) and not tree.equal(params[chosen], params[6])
    assert state_after(out).round == 6 and state_after(out, 5).round == 5
    first, last = Result.open(out, "best"), Result.open(out)
    first.export(tmp_path / "best")
    last.export(tmp_path / "last")
    assert (tmp_path / "last" / "adapter_model.safetensors").read_bytes() == (out / "model" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "best" / "adapter_model.safetensors").read_bytes() != (out / "model" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunError, match=rf"no intact state of round 1.*Rounds with a state: {chosen} \(best\), 5, 6"):
        state_after(out, 1)
    with pytest.raises(RunError, match="no intact state of round 77"):
        state_after(out, 77)


def test_scores_of_all_rounds_are_on_the_same_examples(tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(run(worsening(tmp_path, rounds=2), out=out))
    list(run(worsening(tmp_path, rounds=2, evaluate=Evaluate(max_examples=4, ends=4)), out=tmp_path / "bounded"))
    lines, bounded = metrics(out), metrics(tmp_path / "bounded")
    for line, other in zip(lines, bounded, strict=True):
        assert line["metrics"]["score"] == other["metrics"]["score"] == other["metrics"]["eval"]["pooled"]["loss"]
    # Before and after training the evaluation itself is on more.
    assert [line["metrics"]["score"] == line["metrics"]["eval"]["pooled"]["loss"] for line in lines] == [False, True, False]


def test_where_the_sample_is_all_there_is_nothing_is_evaluated_twice(tmp_path: Path) -> None:
    list(run(small(tmp_path, rounds=1), out=tmp_path / "out"))
    list(run(small(tmp_path, rounds=1, evaluate=Evaluate(max_examples=None)), out=tmp_path / "all"))
    (first, last), (first_all, last_all) = metrics(tmp_path / "out"), metrics(tmp_path / "all")
    for line, other in ((first, first_all), (last, last_all)):
        assert line["metrics"]["score"] == line["metrics"]["eval"]["pooled"]["loss"]
        # A request that names a bound has a few more bytes, and a second evaluation would have twice as many.
        assert line["metrics"]["bytes_evaluate"] < 1.1 * other["metrics"]["bytes_evaluate"]


@pytest.mark.parametrize("patience", [None, 2])
def test_whatever_interrupts_it_the_same_is_kept(patience: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = worsening(tmp_path, evaluate=Evaluate(max_examples=4, patience=patience))
    list(run(federation, out=tmp_path / "whole"))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "state").iterdir()}
    steps: list[str] = []
    monkeypatch.setattr(disk, "on_step", steps.append)
    list(run(federation, out=tmp_path / "counted"))
    stops = [i for i, name in enumerate(steps) if "round-" in name or "journal" in name or "metrics" in name or "model" in name]
    for number in stops[:: max(1, len(stops) // 12)]:
        out, passed = tmp_path / f"broken-{number}", iter(range(len(steps) + 1))

        def crash(name: str, passed: Any = passed, number: int = number) -> None:
            if next(passed) == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(disk, "on_step", crash)
        with pytest.raises(KeyboardInterrupt):
            list(run(federation, out=out))
        monkeypatch.setattr(disk, "on_step", None)
        list(resume(out))
        same(tmp_path / "whole", out)
        assert {path.name: path.read_bytes() for path in (out / "state").iterdir()} == expected, steps[number]


def test_a_damaged_last_state_takes_the_best_round_with_it_and_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(run(small(tmp_path), out=out))
    assert best(scores(out)) == 3, "this run's last round must be its best"
    (out / "state" / "round-000003.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="no intact state of round 3"):
        state_after(out, "best")
    rounds = resume(out, 5)
    next(rounds)
    rounds.close()  # type: ignore[attr-defined]
    assert state_after(out, "best").round == 3


def test_a_run_without_evaluations_has_no_best_round(tmp_path: Path) -> None:
    list(run(small(tmp_path, rounds=1, evaluate=Evaluate(every=0)), out=tmp_path / "out"))
    with pytest.raises(RunError, match="has no best round"):
        Result.open(tmp_path / "out", "best")


# --- ending early --------------------------------------------------------------------------------------------------


def ending(folder: Path, **changes: Any) -> Federation:
    return worsening(folder, rounds=12, evaluate=Evaluate(max_examples=4, patience=2), **changes)


def test_a_run_ends_after_so_many_evaluations_without_a_better_score(tmp_path: Path) -> None:
    out, heard = tmp_path / "out", Heard()
    list(run(ending(tmp_path), out=out, watchers=[heard]))
    found = scores(out)
    chosen = best(found)
    assert chosen is not None and found[-1].round == chosen + 2 < 12
    assert found[-1].early == {"rounds": 12, "patience": 2, "min_delta": 0.0} and not any(score.early for score in found[:-1])
    assert "ended_early" in (out / "journal.jsonl").read_text() and (out / "model" / "adapter_model.safetensors").is_file()
    # The rounds before are those of a run that does not end, and the last has its evaluation on all test data.
    list(run(worsening(tmp_path, rounds=found[-1].round), out=tmp_path / "free"))
    short, free = metrics(out), metrics(tmp_path / "free")
    assert short[-1]["metrics"].pop("ended_early") and short == free
    assert tree.equal(state_after(out).params, state_after(tmp_path / "free").params)


def test_a_run_that_ended_early_goes_on_only_where_more_is_asked_for(tmp_path: Path) -> None:
    out, federation = tmp_path / "out", ending(tmp_path)
    list(run(federation, out=out))
    last = scores(out)[-1].round
    before = counts(out)
    assert list(resume(out)) == [] and list(resume(out)) == [] and counts(out) == before
    assert [record.round for _, record in resume(out, 13)][:2] == [last + 1, last + 2], "it waits anew from where more was asked for"
    assert list(resume(out)) == []
    patient = replace(federation, rounds=13, evaluate=replace(federation.evaluate, patience=5))
    list(resume(out, federation=patient))
    list(run(patient, out=tmp_path / "patient"))
    assert scores(out)[-1].round == scores(tmp_path / "patient")[-1].round, "as if that patience had been asked for at once"
    assert tree.equal(state_after(out).params, state_after(tmp_path / "patient").params)
    endless = replace(patient, evaluate=replace(patient.evaluate, patience=None))
    list(resume(out, federation=endless))
    assert scores(out)[-1].round == 13


def test_a_run_that_went_on_and_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        list(run(ending(tmp_path), out=tmp_path / name))
    list(resume(tmp_path / "whole", 13))
    rounds = resume(tmp_path / "broken", 13)
    next(rounds)
    rounds.close()  # type: ignore[attr-defined]
    list(resume(tmp_path / "broken"))
    same(tmp_path / "whole", tmp_path / "broken")


def test_without_a_folder_a_run_ends_as_early(tmp_path: Path) -> None:
    list(run(ending(tmp_path), out=tmp_path / "out"))
    assert [record.round for _, record in run(ending(tmp_path))] == [score.round for score in scores(tmp_path / "out")]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"patience": 0}, "patience is 0"),
        ({"patience": 2, "every": 0}, "every is 0"),
        ({"min_delta": -1.0}, "min_delta is -1.0"),
        ({"min_delta": math.nan}, "min_delta is nan"),
    ],
)
def test_what_cannot_end_a_run_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Evaluate(**fields)


# --- told ----------------------------------------------------------------------------------------------------------


def test_the_page_and_the_closing_line_name_the_best_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedfm.observers.progress import Progress

    out = tmp_path / "out"
    list(run(ending(tmp_path), out=out, watchers=[Progress(live=False)]))
    chosen, last = best(scores(out)), scores(out)[-1].round
    closing = capsys.readouterr().out.splitlines()[-1]
    assert closing.startswith(f"done after round {last}/12 (ended early: no better score in 2 evaluations)")
    assert f"best round {chosen} with loss " in closing and "optimistic" in closing
    text = render(out).read_text()
    assert f"Round {chosen} was best" in text and f"ended early after round {last} of 12" in text and "optimistic" in text
    left = reading.read(out)
    assert (
        left.best is not None
        and left.best.round == chosen
        and left.best.scored == read_lines(out / "metrics.jsonl")[chosen or 0]["metrics"]["score"]
    )
    list(run(small(tmp_path, rounds=1), out=tmp_path / "better", watchers=[Progress(live=False)]))
    assert "best round" not in capsys.readouterr().out and "was best" not in render(tmp_path / "better").read_text()


def test_a_score_reads_from_whatever_a_file_holds() -> None:
    for value in (None, "x", math.nan, [], True):
        assert Score.of(3, {"score": value, "eval": value, "ended_early": value}) == Score(3, None, True, None)
    share = {"score": 0.5, "eval": json.loads('{"headline": {"name": "accuracy", "lower_is_better": false}}')}
    assert Score.of(3, share).cost == -0.5

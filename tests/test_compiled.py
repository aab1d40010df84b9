"""A compiled model: the choice is arithmetic and kept, a compiler that fails leaves the run eager, numbers agree, a resumed run equals an unbroken one."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import small

from fedfm.client import compiled
from fedfm.core.parts import ServerState
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.run.folder import read_journal
from fedfm.run.loop import resume, run
from fedfm.simulation import Simulation


def plan(tmp_path: Path, compile: Any, **parts: Any) -> Federation:
    return small(tmp_path, engine=Embedded(bank=2, device="cpu", compile=compile), **parts)


def play(rounds: Any) -> ServerState:
    *_, (state, _) = rounds
    assert isinstance(state, ServerState)
    return state


def test_the_choice_is_arithmetic(tmp_path: Path) -> None:
    house = Simulation.build(plan(tmp_path, "auto")).house
    assert not compiled.pays(house, bank=2)
    house.num_rounds = 10**12
    assert compiled.pays(house, bank=2) and not compiled.pays(house, bank=1)
    house.num_rounds = 0
    assert not compiled.pays(house, bank=2)


def test_a_short_run_is_eager_and_says_so(tmp_path: Path) -> None:
    play(run(plan(tmp_path, "auto", rounds=1), out=tmp_path / "run"))
    assert read_journal(tmp_path / "run").choices["compile"] == 0


def test_without_a_compiler_the_run_is_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        state = play(run(plan(tmp_path, True, rounds=1), out=tmp_path / "run"))
    told = [record.getMessage() for record in caplog.records if "not compiled" in record.getMessage()]
    assert len(told) == 1 and "no C++ compiler" in told[0]
    assert read_journal(tmp_path / "run").choices["compile"] == 0
    eager = play(run(plan(tmp_path, False, rounds=1)))
    assert all(torch.equal(state.params[name], leaf) for name, leaf in eager.params.items())


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no code today")


def wrong(graph: Any, inputs: Any) -> Any:
    return lambda *args: [2 * x if x.is_floating_point() else x for x in graph(*args)]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "reason"), [(broken, "no code today"), (wrong, "differs from the eager one's")])
def test_a_compiler_that_fails_leaves_the_run_eager(
    backend: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch.compiler.reset()
    house = Simulation.build(plan(tmp_path, True)).house
    with caplog.at_level(logging.WARNING):
        Embedded(bank=2, device="cpu", compile=True).open(house).settle()
    assert sum(reason in record.getMessage() for record in caplog.records) == 1
    assert house.choices["compile"] == 0 and getattr(house.tuned, "compiled") is None  # noqa: B009


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"))]
)
def test_a_resumed_compiled_run_equals_an_unbroken_one(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch.compiler.reset()
    federation = plan(tmp_path, True, rounds=2)
    rounds = run(federation, out=tmp_path / "whole")
    next(rounds), next(rounds)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    whole = play(rounds)
    torch.compiler.reset()
    again = play(resume(tmp_path / "broken"))
    assert read_journal(tmp_path / "broken").choices["compile"] == 2
    assert all(torch.equal(again.params[name], leaf) for name, leaf in whole.params.items())
    eager = play(run(replace(federation, engine=replace(federation.engine, compile=False))))  # type: ignore[type-var]
    torch.testing.assert_close(dict(whole.params), dict(eager.params), rtol=1e-4, atol=1e-5)

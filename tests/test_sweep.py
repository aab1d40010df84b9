"""Sweeps: the grid, the runs in processes of their own, what survives a kill, the table; and runs that exist, side by side."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import Fedfm, call, refused  # noqa: F401
from test_reports import Page
from test_run import same, small

import fedfm
from fedfm.core.errors import ConfigError, DataError, PlanError, RunError
from fedfm.core.words import Metric
from fedfm.engines import Embedded, Process
from fedfm.recipe import dump, read
from fedfm.reports.runs import Entry, Spread, Table
from fedfm.run.folder import read_lines
from fedfm.run.grid import axis, grid, short
from fedfm.run.loop import resume, run
from fedfm.run.side_by_side import compare_runs
from fedfm.run.sweep import HIDDEN, SWEEP, Share, share, sweep


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    source = str(Path(fedfm.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))))


def recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(dump(small(folder, **{"rounds": 1, "engine": Embedded(device="cpu"), **changes})))
    return path


# --- the grid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("tuning.LoRA.r=4,16", ["4", "16"]),
        ("seed=0..2", ["0", "1", "2"]),
        ("seed=-1..1,7", ["-1", "0", "1", "7"]),
        ("server=FedAvg,FedAdam", ["FedAvg", "FedAdam"]),
        ("server={FedAdam: {lr: 0.1, tau: 1e-3}},FedAvg", ["{FedAdam: {lr: 0.1, tau: 1e-3}}", "FedAvg"]),
        ("tuning.targets=[q_proj,v_proj],[q_proj]", ["[q_proj,v_proj]", "[q_proj]"]),
        ('data.source="a,b.jsonl",c.jsonl', ['"a,b.jsonl"', "c.jsonl"]),
        ("name='it''s, here',b", ["'it''s, here'", "b"]),
        (r'name="a\",b",c', [r'"a\",b"', "c"]),
        ("name=it's,b", ["it's", "b"]),
        ('name="0..2"', ['"0..2"']),
        ("data.test_fraction=0.1..0.2", ["0.1..0.2"]),
        ("deadline=", [""]),
        ("x=[{a: 'b]'}]", ["[{a: 'b]'}]"]),
    ],
)
def test_commas_part_values_but_not_within_them(override: str, values: list[str]) -> None:
    assert list(axis(override).values) == values


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "no override"),
        ("=4", "no override"),
        ("r=4,,8", "empty value among several"),
        ("r=4,8,", "empty value among several"),
        ("r=4,8,4", "names 4 twice"),
        ("seed=0..2,1", "names 1 twice"),
        ("seed=2..0", "counts down; write 0..2"),
        ("seed=0..99999999", "a sweep has at most 10,000"),
        ("targets=[q_proj,v_proj", "] has no partner"),
        ("targets=q_proj]", "] has no partner"),
        ("source='a,b", "' has no partner"),
    ],
)
def test_what_is_no_list_of_values_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        grid([override])
    assert told in str(refusal.value)


TEXTS = st.lists(st.text("ab0.,'\"[]{}: _-", max_size=8), min_size=1, max_size=4, unique=True)


@given(TEXTS)
def test_any_text_is_a_value_when_it_is_quoted(texts: list[str]) -> None:
    quoted = ["'" + text.replace("'", "''") + "'" for text in texts]
    assert list(axis("name=" + ",".join(quoted)).values) == quoted
    assert list(axis("name=" + ",".join(map(json.dumps, texts))).values) == list(map(json.dumps, texts))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_a_grid_is_the_product_and_names_each_cell_once(sizes: list[int]) -> None:
    _, cells = grid([f"field{i}=" + ",".join(f"v/{k}" for k in range(n)) for i, n in enumerate(sizes)])
    num = 1
    for n in sizes:
        num *= n
    assert len(cells) == num == len({cell.overrides for cell in cells}) == len({cell.name for cell in cells})
    assert all("/" not in cell.name and len(cell.name) < 120 for cell in cells)


def test_names_of_cells_are_readable_and_differ() -> None:
    _, cells = grid(["tuning.LoRA.r=4,16", "server=FedAvg,{FedAdam: {lr: 0.1}}", "rounds=3", "seed=0..1"])
    assert cells[0].name == "r-4_server-FedAvg_seed-0" and cells[3].name == "r-4_server-FedAdam-lr-0.1_seed-1"
    assert cells[3].values == {"tuning.LoRA.r": "4", "server": "{FedAdam: {lr: 0.1}}", "seed": "1"} and "rounds=3" in cells[3].overrides
    assert short(["local.lr", "server.lr"]) == {"local.lr": "local.lr", "server.lr": "server.lr"}
    _, alike = grid(["data.source=a/b,a:b"])
    assert len({cell.name for cell in alike}) == 2
    assert [cell.name for cell in grid(["rounds=3"])[1]] == ["run"]
    with pytest.raises(ConfigError, match="seed is given twice"):
        grid(["seed=1", "seed=2"])
    with pytest.raises(ConfigError, match="400,000,000 recipes"):
        grid([f"{key}=1..200" for key in "ab"] + ["c=1..10000"])


# --- shares --------------------------------------------------------------------------------------------------------


def test_what_a_run_gets_is_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfm.run.sweep.psutil.virtual_memory", lambda: type("Memory", (), {"total": 64 * 10**9}))
    monkeypatch.setattr("fedfm.run.sweep.total_memory", lambda device: 64 * 10**9)
    plans = [small(tmp_path, seed=seed, engine=Embedded(device="cpu")) for seed in range(20)]
    assert share(plans, 10**9, cores=8) == Share(8, 1, 4.0)
    assert share(plans[:2], 10**9, cores=8) == Share(2, 4, 16.0)
    assert share(plans, 10**9, threads=4, cores=8) == Share(2, 4, 16.0)
    assert share(plans, 15 * 10**9, cores=8) == Share(2, 4, 16.0), "memory allows two at a time"
    assert share(plans, 10**12, cores=8) == Share(1, 8, None), "one at least"
    stated = [replace(plan, engine=Embedded(device="cpu", threads=3)) for plan in plans]
    assert share(stated, 10**9, cores=8) == Share(2, 3, 16.0)
    assert share([small(tmp_path, engine=Process(device="cpu"))] * 3, 10**9, cores=8) == Share(1, 8, None)
    given = Share(2, 4, 16.0).of(replace(plans[0], engine=Embedded(device="cpu", memory=1.0)))
    assert given.engine == Embedded(device="cpu", memory=1.0, threads=4), "what the recipe says itself stays"


# --- a whole sweep -------------------------------------------------------------------------------------------------

GRID = ["tuning.LoRA.r=2,3", "seed=0..1"]
NAMES = ["r-2_seed-0", "r-2_seed-1", "r-3_seed-0", "r-3_seed-1"]


def journals(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob("*/journal.jsonl")}


@pytest.mark.slow
def test_a_sweep_is_its_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out, told = tmp_path / "out", list[str]()
    table = sweep(recipe(tmp_path), GRID, out, jobs=2, threads=1, tell=told.append)
    assert sorted(path.name for path in out.iterdir() if path.is_dir() and path.name != HIDDEN) == NAMES
    assert any("2 at a time with 1 thread each" in text for text in told) and sum("done in" in text for text in told) == 4
    # Each is the run that fedfm run would have made of its recipe.
    for name in (NAMES[0], NAMES[3]):
        plan = read(out / name / "recipe.yaml")
        assert isinstance(plan.engine, Embedded) and plan.engine.threads == 1
        list(run(plan, out=tmp_path / name))
        same(tmp_path / name, out / name)
        assert next(line for line in read_lines(out / name / "journal.jsonl") if line["event"] == "start")["threads"] == 1
    # The table is theirs.
    losses = {name: read_lines(out / name / "metrics.jsonl")[-1]["metrics"]["eval"]["pooled"]["loss"] for name in NAMES}
    for row in table.rows:
        own = [losses[f"r-{row.values['tuning.LoRA.r']}_seed-{seed}"] for seed in (0, 1)]
        after = row.numbers["after"]
        assert after.num == 2 and after.mean == pytest.approx(sum(own) / 2)
        assert after.deviation == pytest.approx(abs(own[0] - own[1]) / 2**0.5)
    assert len(table.rows) == 2 and table.rows[0].numbers["after"].mean < table.rows[1].numbers["after"].mean  # type: ignore[operator]
    with (out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["after_mean"]) for line in lines] == [row.numbers["after"].mean for row in table.rows]
    assert {line["runs"] for line in lines} == {"2"} and {line["tuning.LoRA.r"] for line in lines} == {"2", "3"}
    shown = Page((out / "sweep.html").read_text())
    assert all(name in shown.text for name in NAMES) and "Loss by round" in shown.text and "path" in shown.tags
    # Again: nothing is played. With more runs: only those.
    before = journals(out)
    assert sweep(tmp_path / "recipe.yaml", GRID, out).to_json()["rows"] == table.to_json()["rows"] and journals(out) == before
    more = sweep(tmp_path / "recipe.yaml", ["tuning.LoRA.r=2,3", "seed=0..2"], out, tell=told.append)
    assert "2 runs are added to the 4 that are here." in told and {row.numbers["after"].num for row in more.rows} == {3}
    assert {name: text for name, text in journals(out).items() if name in before} == before
    assert read(out / "r-2_seed-2" / "recipe.yaml").engine == read(out / "r-2_seed-0" / "recipe.yaml").engine, "the share stays"
    # With fewer, or of another recipe: refused, and nothing changes.
    kept = (out / SWEEP).read_bytes()
    for overrides in (GRID, [*GRID, "rounds=2"]):
        with pytest.raises(RunError, match="are not in this grid"):
            sweep(tmp_path / "recipe.yaml", overrides, out)
    with pytest.raises(RunError, match="began with 1 threads"):
        sweep(tmp_path / "recipe.yaml", GRID, out, threads=2)
    assert (out / SWEEP).read_bytes() == kept


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_tried_again(tmp_path: Path, call: Fedfm) -> None:  # noqa: F811
    path = recipe(tmp_path, on_failure="stop")
    wild = "{SGD: {lr: 1e30, steps: 3, max_grad_norm: null}}"
    words = ["sweep", path, f"local={wild},{{SGD: {{lr: 0.1, steps: 2}}}}", "--out", "out"]
    code, out, err = call(*words)
    assert code == 1 and "1 of 2 runs failed" in err, out + err
    assert "local-SGD-lr-1e30-steps-3-max-grad-norm-null failed: Round 1" in out and "0 of 1 done, 1 failed" in out
    assert "failed" in Page((tmp_path / "out" / "sweep.html").read_text()).text
    code, out, err = call(*words, "--json", "--quiet")
    answer = json.loads(out)
    assert code == 1 and [one["status"] for one in answer["runs"]] == ["failed", "done"] and "Round 1" in answer["runs"][0]["error"]
    assert answer["rows"][-1]["after_mean"] is not None and answer["rows"][0]["local"].startswith("{SGD: {lr: 0.1")


def processes_of(out: Path) -> list[int]:
    """Runs of the sweep in ``out`` that are alive."""
    return [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and f"fedfm.run.job\0{out}".encode() in _bytes(folder / "cmdline")
    ]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def until(what: Callable[[], Any], seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_ended_takes_its_runs_with_it_and_says_how_to_go_on(ending: signal.Signals, tmp_path: Path) -> None:
    path, out = recipe(tmp_path, rounds=100), tmp_path / "out"
    words = [
        sys.executable,
        "-m",
        "fedfm.cli.main",
        "sweep",
        str(path),
        "seed=0..1",
        "rounds=100",
        "--out",
        str(out),
        "--jobs",
        "2",
        "--threads",
        "1",
    ]
    begun = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: any(len(read_lines(out / f"seed-{seed}" / "metrics.jsonl")) > 3 for seed in (0, 1)))
    begun.send_signal(ending)
    _, err = begun.communicate(timeout=60)
    if ending is signal.SIGKILL:
        assert begun.returncode == -9
    else:
        assert begun.returncode == 128 + ending and f"Go on with: fedfm sweep {path} seed=0..1" in err
    until(lambda: not processes_of(out), 30)
    assert not all((out / f"seed-{seed}" / "model").exists() for seed in (0, 1)), "it was to be ended before its runs were"
    if ending is signal.SIGKILL:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert "[2/2]" in done.stdout and "runs to play" in done.stdout
        for seed in (0, 1):
            list(run(read(out / f"seed-{seed}" / "recipe.yaml"), out=tmp_path / f"whole-{seed}"))
            same(tmp_path / f"whole-{seed}", out / f"seed-{seed}")


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "error", "told"),
    [
        (["tuning.LoRA.r=2,0"], ConfigError, "The run 'r-0' is refused, and so no run has begun"),
        (["min_clients=1,9", "sampler={Uniform: {clients: 2}}"], PlanError, "min-clients-9"),
        (["tuning.LoRA.r=2,two"], ConfigError, "a whole number"),
        (["seed=1,01"], ConfigError, "the same recipe, written in two ways"),
        (["data.source=rows.jsonl,nowhere.jsonl"], DataError, "nowhere.jsonl"),
        (["sampler={Uniform: {clients: 2}},{Uniform: {clients: 9}}"], PlanError, "only 3 owners"),
        (["tuning.LoRA.targets=[q_proj],[no_such_layer]"], Exception, "no_such_layer"),
    ],
)
def test_all_recipes_are_checked_before_the_first_run(overrides: list[str], error: type[Exception], told: str, tmp_path: Path) -> None:
    path, out = recipe(tmp_path), tmp_path / "out"
    with pytest.raises(error, match=told):
        sweep(path, overrides, out)
    assert not out.exists()


def test_a_sweep_does_not_touch_what_is_not_its_own(tmp_path: Path) -> None:
    path, out = recipe(tmp_path), tmp_path / "out"
    (out / "seed-1").mkdir(parents=True)
    with pytest.raises(RunError, match="seed-1 is there already"):
        sweep(path, ["seed=0,1"], out)
    assert [item.name for item in out.iterdir()] == ["seed-1"]
    (out / SWEEP).write_text("{")
    with pytest.raises(RunError, match="is not what a sweep writes"):
        sweep(path, ["seed=0,1"], out)
    with pytest.raises(ConfigError, match="jobs is 0"):
        sweep(path, ["seed=0,1"], out, jobs=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("a run's")
    with pytest.raises(RunError, match="holds a run"):
        sweep(path, ["seed=0,1"], tmp_path / "run")


def test_a_dry_run_lists_the_runs(call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    code, out, _ = call("sweep", "recipe.yaml", *GRID, "server=FedAvg,FedAdam", "--dry-run")
    assert code == 0 and len(out.splitlines()) == 8 and "r-3_seed-1_server-FedAdam" in out and not (tmp_path / "runs").exists()
    code, out, _ = call("sweep", "recipe.yaml", "seed=0..1", "--dry-run", "--json")
    assert code == 0 and json.loads(out) == [{"name": f"seed-{seed}", "values": {"seed": str(seed)}} for seed in (0, 1)]
    refused(call("sweep", "recipe.yaml", "seed=2..0"), "counts down")
    code, out, _ = call("sweep", "--help")
    assert code == 0 and "KEY=VALUE,VALUE" in out and "--jobs" in out


# --- side by side --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one recipe and of others."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        base = small(folder, rounds=2, engine=Embedded(device="cpu", threads=1))
        others = folder / "others.jsonl"
        others.write_text((folder / "rows.jsonl").read_text().replace("the ", "a "))
        plans = {
            "slow": replace(base, local=replace(base.local, lr=1e-4)),  # type: ignore[type-var]
            "fast": base,
            "seeded": replace(base, seed=5),
            "other-data": replace(base, data=replace(base.data, source=str(others))),
            "other-test": replace(base, evaluate=replace(base.evaluate, ends=1)),
        }
        for name, plan in plans.items():
            list(run(plan, out=folder / name))
    return folder


def test_runs_stand_side_by_side_the_best_first(runs: Path, call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    table = compare_runs([runs / "slow", runs / "fast"])
    assert [row.entries[0].name for row in table.rows] == ["fast", "slow"] and not table.notes
    code, out, _ = call("compare", runs / "slow", runs / "fast", "--out", "table")
    lines = out.splitlines()
    assert code == 0 and next(i for i, line in enumerate(lines) if line.startswith("fast")) < next(
        i for i, line in enumerate(lines) if line.startswith("slow")
    )
    page = Page((tmp_path / "table" / "compare.html").read_text())
    assert "fast" in page.text and "slow" in page.text and (tmp_path / "table" / "compare.csv").read_text().count("\n") == 3
    answer = json.loads(call("compare", runs / "slow", runs / "fast", "--json")[1])
    assert [row["run"] for row in answer["rows"]] == ["fast", "slow"] and answer["notes"] == []
    assert answer["rows"][0]["after_mean"] == read_lines(runs / "fast" / "metrics.jsonl")[-1]["metrics"]["eval"]["pooled"]["loss"]
    assert compare_runs([runs / "slow", runs / "seeded"]).notes == [], "another seed is no other data"


@pytest.mark.parametrize(("name", "why"), [("other-data", "other data"), ("other-test", "other parts of the test data")])
def test_runs_that_cannot_be_compared_are_not_ranked(name: str, why: str, runs: Path, call: Fedfm) -> None:  # noqa: F811
    for order in (["slow", name, "fast"], [name, "slow", "fast"]):
        table = compare_runs([runs / one for one in order])
        assert [row.entries[0].name for row in table.rows] == order
        assert why in table.notes[0] and "not ranked" in table.notes[-1]
    assert f"{name} cannot be compared with slow and fast" in call("compare", *(runs / one for one in ("slow", name, "fast")))[1]


def test_another_base_under_the_same_name_is_told(runs: Path, tmp_path: Path) -> None:
    entries = [Entry.of(runs / name, {"run": name}) for name in ("slow", "fast")]
    changed = replace(entries[1], run=replace(entries[1].run, base="another"))  # type: ignore[type-var]
    assert "another base model" in Table.of("two", [entries[0], changed]).notes[0]


def test_what_cannot_be_put_side_by_side_is_refused(runs: Path, call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "empty").mkdir()
    refused(call("compare", runs / "slow", tmp_path / "empty"), "holds no run")
    refused(call("compare", runs / "slow", runs / "slow"), "given twice")
    refused(call("compare", runs / "slow", runs / "fast", "rounds=3"), "rounds=3 is no run's folder")
    refused(call("compare", runs / "slow", "nowhere"), "nowhere is neither a run's folder nor KEY=VALUE")


def test_a_run_in_any_state_has_its_place(runs: Path, tmp_path: Path) -> None:
    list(run(small(tmp_path, rounds=1), out=tmp_path / "part"))
    (tmp_path / "none").mkdir()
    shutil.copytree(runs / "fast", tmp_path / "damaged")
    (tmp_path / "damaged" / "journal.jsonl").write_text("{}\n{}\n")
    rounds = resume(tmp_path / "part", 3)
    next(rounds)
    rounds.close()  # type: ignore[attr-defined]
    entries = [Entry.of(path, {"run": path.name}) for path in (tmp_path / "none", tmp_path / "damaged", tmp_path / "part", runs / "fast")]
    assert [entry.status for entry in entries] == ["not begun", "failed", "unfinished", "done"]
    table = Table.of("four", entries)
    assert "damaged failed" in "\n".join(table.lines()) and Page(table.written(tmp_path / "table", "x").page.read_text())  # type: ignore[union-attr]
    assert Entry.of(runs / "fast", {}, "it failed once").error == "", "it was resumed since"


def test_a_spread_says_how_many_it_is_of() -> None:
    assert Spread.of([None, None]).show(Metric()) == "-" and Spread.of([2.0]).show(Metric()) == "2.000"
    assert Spread.of([0.5, 0.7, None]).show(Metric("accuracy", False)) == "60.0 % ± 14.1 % (2)"

"""Each benchmark answers ``--help``; the cheapest one writes the rows that the documentation's tables are made of."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks run from the checkout and are never installed
common, page, bits, before_after = (importlib.import_module(f"benchmarks.{name}") for name in ("common", "render", "same_bits", "pairs"))
MODULES = [
    *("cohort", "memory", "owners", "start", "truth", "render", "peers", "same_bits", "pairs", "rounds", "robustness"),
    *("first_hour", "job", "silos_memory", "wire", "deployed", "chaos", "example_dp", "secagg"),
]
ROW = {
    "date": "2026-01-01T00:00:00+00:00",
    "cpu": "a CPU",
    "cores": 2,
    "load": 0.5,
    "versions": {"python": "3.11"},
    "ours_s": 2.0,
    "theirs_s": 1.0,
    "ratio": 2.0,
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )


def test_pairs_alternate_and_leave_the_warmup_out() -> None:
    seen: list[str] = []
    found = common.pairs(lambda: seen.append("a"), lambda: seen.append("b"), repetitions=2, warmup=1)
    assert "".join(seen) == "abbaab"
    row = found.to_row()
    assert row["repetitions"] == len(found.ours) == len(found.theirs) == 2
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]


def test_a_ratio_is_the_median_of_the_pairs() -> None:
    row = common.Pairs((1.0, 4.0, 3.0), (1.0, 2.0, 1.0)).to_row()
    assert (row["ours_s"], row["theirs_s"]) == (3.0, 1.0)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"]) == (2.0, 1.0, 3.0)


def test_every_table_has_its_place_in_the_page() -> None:
    text = "".join(file.read_text() for file in page.PAGES)
    for name in common.COLUMNS:
        assert text.count(f"<!-- begin {name} -->") == text.count(f"<!-- end {name} -->") == 1


def test_rendering_replaces_one_table_and_nothing_else() -> None:
    rows = [{**ROW, "benchmark": "start", "command": "fedfm --help", "imports_torch": False}]
    text = "before <!-- begin start -->old<!-- end start --> after <!-- begin memory -->kept<!-- end memory -->"
    once = page.rendered(text, rows)
    assert "old" not in once and "fedfm --help" in once and "kept" in once
    assert once.startswith("before ") and " after " in once
    assert page.rendered(once, rows) == once


def test_what_was_not_measured_says_so() -> None:
    row = {**ROW, "benchmark": "cohort", "against": "flower", "shape": "4 x 1 x 16"}
    row |= {"ours_s": None, "theirs_s": None, "ratio": None, "note": "not installed"}
    assert "not installed" in common.table([row])


@pytest.mark.parametrize(("count", "low", "high"), [(31, 10, 22), (11, 2, 10), (6, 1, 6), (5, 1, 5), (1, 1, 1)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count: int, low: int, high: int) -> None:
    ratios = [float(i) for i in range(count, 0, -1)]
    assert before_after.interval(ratios) == (low, high)


@pytest.mark.slow
def test_a_tree_beside_itself_plays_the_same_rounds(tmp_path: Path) -> None:
    words = ("--before", str(ROOT / "src"), "--after", str(ROOT / "src"), "--quick", "--pairs", "2", "--json", str(tmp_path / "rows.json"))
    shown = run("benchmarks.pairs", *words).stdout
    row = json.loads((tmp_path / "rows.json").read_text())
    assert row["same_bits"] == "yes" and row["repetitions"] == 2 and common.table([row]) in shown


LEFT = {
    "params": {"w": "0a"},
    "state": {"server/m.w": "0b", "server/v.w": "0b"},
    "model": {"model/adapter.safetensors: w": "0a"},
    "numbers": {"round 1.clients.ann.loss": (2.0).hex(), "round 1.clients.bob.loss": (1.0).hex(), "round 1.cohort.0": "ann"},
}


def compared(**changes: dict[str, object]) -> bool:
    notes = [{"where": {}, "runs": {"LoRA": run}} for run in (LEFT, {**LEFT, **changes})]
    same: bool = bits.compare(*notes)
    return same


def test_the_same_bits_are_the_same_under_other_names_of_the_servers_state(capsys: pytest.CaptureFixture[str]) -> None:
    assert compared()
    assert compared(state={"state/server/m.w": "0b", "state/server/v.w": "0b", "state/sampler/seen": "0c"})
    assert "same, other names, 1 more" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"params": {"w": "0b"}}, {"params": {"u": "0a"}}, {"model": {}}, {"state": {"server/m.w": "0b"}}])
def test_another_bit_is_told_by_the_exit_code(changes: dict[str, dict[str, object]]) -> None:
    assert not compared(**changes)


def test_numbers_that_differ_are_named_once_with_the_largest_relative_difference(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"round 1.clients.ann.loss": (1.0).hex(), "round 1.clients.bob.loss": (0.99).hex(), "round 1.cohort.0": "bob", "round 1.x": 1}
    assert compared(numbers=numbers)
    assert capsys.readouterr().out.rstrip().endswith("clients.*.loss 5.0e-01; cohort.* changed; x only after")


def test_what_the_clock_decides_is_no_number_of_a_run() -> None:
    assert dict(bits.flat({"seconds": {"train": 1.0}, "a": [0.5, {"b": 3}]})) == {"a.0": "0x1.0000000000000p-1", "a.1.b": 3}


@pytest.mark.slow
def test_a_recipe_played_twice_leaves_the_same_bits(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        run("benchmarks.same_bits", "write", str(tmp_path / name), "--only", "Stopped")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    whole = run("benchmarks.same_bits", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")).stdout
    assert "Stopped after round 2 and resumed  same     same          none" in whole


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_help(module: str) -> None:
    assert "usage:" in run(f"benchmarks.{module}", "--help").stdout


@pytest.mark.slow
def test_what_is_made_to_go_wrong_is_named(tmp_path: Path) -> None:
    """About 1,000 changed messages and files, and 60 lies; ``run`` refuses an exit code other than 0."""
    run("benchmarks.robustness", "mutations", "clients", "servers", "--quick", "--json", str(tmp_path / "rows.json"))
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert {row["section"] for row in rows} == {"mutations", "clients", "servers"} and not any(row["wrong"] for row in rows)
    assert sum(row["cases"] for row in rows) > 1000


@pytest.mark.slow
def test_quick_rows_have_the_documented_fields(tmp_path: Path) -> None:
    shown = run("benchmarks.start", "--quick", "--json", str(tmp_path / "start.json")).stdout
    rows = [json.loads(line) for line in (tmp_path / "start.json").read_text().splitlines()]
    assert [row["command"] for row in rows] == ["fedfm --help", "fedfm list"]
    for row in rows:
        assert {*ROW, "benchmark"} <= set(row)
        assert row["ratio"] == pytest.approx(row["ours_s"] / row["theirs_s"])
        assert not row["imports_torch"]
    assert common.table(rows) in shown

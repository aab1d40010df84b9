"""The tour: all of it with very little data, and a second time with the base model of the first."""

from __future__ import annotations

import json
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedfm import quickstart
from fedfm.models import Model
from fedfm.recipe import dump, read

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(cache))


def test_it_trains_tunes_compares_and_shows(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quickstart.main(tmp_path / "run", quick=True)
    assert out == tmp_path / "run"
    table = json.loads((out / "compare.json").read_text())
    assert len(table["owners"]) >= 8
    assert all(row[way]["loss"] > 0 for row in table["owners"] for way in ("before", "local", "federated", "centralised"))
    assert 0 < table["travelled"]["bytes_up"] < table["travelled"]["bytes_if_full_model"]
    train = [row["train"] for row in json.loads((out / "split.json").read_text())]
    assert all(count > 0 for count in train)
    assert "<svg" in (out / "report.html").read_text() and "http" not in Path(out / "recipe.yaml").read_text()
    said = capsys.readouterr().out
    assert all(title in said for title in ("before", "local-only", "federated", "centralised", "Travelled: ", str(out / "report.html")))


def test_the_base_is_trained_once_and_a_taken_folder_gets_a_neighbour(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = quickstart.base_model(quick=True)
    before = (model / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert quickstart.main(tmp_path / "run", quick=True) == tmp_path / "run-3"
    assert (model / "model.safetensors").stat().st_mtime_ns == before
    assert f"Found, trained by an earlier quickstart: {model}" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(model)) == quickstart.VOCABULARY


def test_a_base_that_was_cut_off_goes_on(cache: Path) -> None:
    model = quickstart.base_model(quick=True)
    weights = (model / "model.safetensors").read_bytes()
    shutil.rmtree(model)
    assert quickstart.base_model(quick=True) == model
    assert (model / "model.safetensors").read_bytes() == weights
    assert sum('"event":"resume"' in line for line in (model.parent / "journal.jsonl").read_text().splitlines()) == 1


def test_a_base_whose_writing_was_cut_off_is_written_again(cache: Path) -> None:
    model = quickstart.base_model(quick=True)
    weights, journal = (model / "model.safetensors").read_bytes(), model.parent / "journal.jsonl"
    (model / "model.safetensors").write_bytes(weights[:100])
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(takewhile(lambda line: '"event":"end"' not in line, lines)))
    assert (quickstart.base_model(quick=True) / "model.safetensors").read_bytes() == weights


def test_the_recipe_says_what_it_runs() -> None:
    recipe = read(RECIPES / "quickstart.yaml")
    assert recipe.model == Model("~/.cache/fedfm/quickstart/model") or recipe.model.source == str(
        Path.home() / ".cache/fedfm/quickstart/model"
    )
    assert dump(quickstart.federation(recipe.model.source or "")) == dump(recipe)

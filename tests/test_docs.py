"""The pages agree with the code, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fedfm.core.errors import ModelError
from fedfm.core.registry import ROOMS, entries
from fedfm.recipe import dump, load, read

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]


def test_the_recipe_reference_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.PAGE.read_text(encoding="utf-8") == make.page(), "python docs/make_reference.py writes it again"
    assert all(f"### {name}\n" in make.page() for room in ROOMS for name in entries(room))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load_and_survive_being_written(path: Path) -> None:
    federation = read(path)
    assert load(dump(federation)) == federation


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert block is not None
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(block.group(1).partition("\nfor ")[0], names)
    # The package fedfm.run is imported by now, and must not stand where the function does.
    (tmp_path / "recipe.yaml").write_text("{model: nowhere/at/all, data: {source: stdlib}}")
    with pytest.raises(ModelError, match="no model folder"):
        next(names["run"](load(tmp_path / "recipe.yaml")))  # type: ignore[operator]

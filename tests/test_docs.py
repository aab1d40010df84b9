"""The pages agree with the code, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from fedfm.cli import main as cli
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


@pytest.mark.slow
def test_the_commands_and_the_python_of_the_readme_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that has what a clone has, with an empty cache and no network."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = [shlex.split(line, comments=True) for line in re.findall(r"^fedfm .*", text, re.M)]
    assert {words[1] for words in ours} >= {"init", "check", "run", "resume", "compare"}
    for name in ("docs", "recipes", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    for words in ours:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, f"{shlex.join(words)}: {capsys.readouterr().err}"
    block = re.search(r"```python\n(.*?)```", text, re.S)
    assert block is not None
    exec(block.group(1), {})
    assert re.findall(r"^(\d) \{", capsys.readouterr().out, re.M)[-4:] == ["0", "1", "2", "3"]


def test_the_make_targets_of_the_readme_are_there() -> None:
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert targets and all(re.search(rf"^{target}: ", make, re.M) for target in targets)

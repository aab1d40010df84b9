"""Writes docs/recipes.md from the code: every part that a recipe can name, its fields, types and defaults.

``python docs/make_reference.py`` after a change; a test fails while the page is not what this would write.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

from fedfm.core import registry
from fedfm.federation import Federation

PAGE = Path(__file__).parent / "recipes.md"
HEAD = """# Recipe reference

Written by `python docs/make_reference.py` from the constructors; do not edit.

A recipe is YAML with one part per key: `tuning: {LoRA: {r: 8, alpha: 16}}`. `data` and `evaluate` are plain mappings, because their type is fixed.
What is left out has the default below. Any field can be overridden on the command line: `fedfm run recipe.yaml rounds=20 tuning.LoRA.r=16`.
Relative paths are looked up from the recipe's folder, then from where you are. `fedfm show PART` prints one part, `fedfm check RECIPE` reads a whole plan.
`fedfm init FILE` writes a first recipe for rows of your own.
"""


def text(value: str) -> str:
    """A docstring's words on one Markdown line."""
    value = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", value)
    value = re.sub(r"`([^`<]+) <([^>]+)>`_", r"[\1](\2)", " ".join(value.split()))
    return value.replace("``", "`").replace("|", "\\|")


def meanings(cls: type) -> dict[str, str]:
    """Field name to its line under Args."""
    by_field: dict[str, str] = {}
    block = re.search(r"Args:\n(.*?)(?:\n\s*\n|\Z)", inspect.cleandoc(cls.__doc__ or ""), re.S)
    name = ""
    for line in (block.group(1) if block else "").splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name, by_field[start.group(1)] = start.group(1), start.group(2)
        elif name:
            by_field[name] += " " + line.strip()
    return by_field


def default(item: Field[object]) -> str:
    """The default as a recipe would write it."""
    if item.default is not MISSING:
        return "null" if item.default is None else f"{item.default!r}"
    if item.default_factory is not MISSING:
        return repr(item.default_factory())
    return "must be given"


def table(cls: type) -> list[str]:
    """A row for each field."""
    by_field = meanings(cls)
    if not fields(cls):  # type: ignore[arg-type]
        return ["No fields.", ""]
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for item in fields(cls):  # type: ignore[arg-type]
        kind = str(item.type).replace("|", "\\|")
        rows.append(f"| `{item.name}` | `{kind}` | `{default(item)}` | {text(by_field.get(item.name, ''))} |")
    return [*rows, ""]


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## The federation", "", text((Federation.__doc__ or "").split("\n\n")[0]), "", *table(Federation)]
    for room, what in registry.ROOMS.items():
        lines += [f"## {room}: {what}", ""]
        for entry in registry.entries(room).values():
            cls = entry.load()
            summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
            more = re.split(r"\n?(?:Args|Raises|Example|Returns):\n", rest)[0]
            source = ast.get_docstring(ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))) or ""
            papers = re.findall(r"<(https?://[^>]+)>", " ".join(source.split()))
            lines += [f"### {entry.name}", "", text(summary)]
            lines += ["", text(more)] if more.strip() else []
            notes = [f"Concerns: {', '.join(entry.concerns)}."] if entry.concerns else []
            notes += ["Paper: " + ", ".join(f"<{url}>" for url in papers) + "."] if papers else []
            lines += ["", " ".join(notes)] if notes else []
            lines += ["", *table(cls)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")

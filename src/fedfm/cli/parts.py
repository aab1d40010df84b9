"""What there is to combine, read from the sources: answers before torch could be imported."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import textwrap
from pathlib import Path
from typing import Literal

from fedfm.core import registry, words
from fedfm.core.errors import ConfigError
from fedfm.core.plain import finite


def list_parts(room: str | None, as_json: bool = False) -> None:
    """``fedfm list``: the parts of one room, or of all and by concern."""
    rooms = [room] if room is not None else list(registry.ROOMS)
    entries = [entry for name in rooms for entry in registry.entries(name).values()]
    if as_json:
        show_json([{"room": entry.room, "name": entry.name, "summary": entry.summary, "concerns": entry.concerns} for entry in entries])
        return
    width = max((len(entry.name) for entry in entries), default=0) + 2
    for name in rooms:
        print(f"{name}: {registry.ROOMS[name]}")
        for entry in registry.entries(name).values():
            print(f"  {entry.name:<{width}}{_brief(entry.summary)}")
        print()
    concerns = sorted({concern for entry in entries for concern in entry.concerns})
    if concerns:
        print("By concern")
    for concern in concerns:
        names = ", ".join(entry.name for entry in entries if concern in entry.concerns)
        print(textwrap.fill(names, 120, initial_indent=f"  {concern:<20}", subsequent_indent=" " * 22))


def show(name: str, as_json: bool = False) -> None:
    """``fedfm show``: a part's documentation, fields, concerns and file.

    Raises:
        ConfigError: if there is no such part, naming the nearest.
    """
    every = {entry.name: entry for room in registry.ROOMS for entry in registry.entries(room).values()}
    if name not in every:
        raise ConfigError(f"There is no part {name!r}.{registry.suggest(name, every)} See: fedfm list")
    entry = every[name]
    path = _source(entry.module)
    node = next(item for item in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(item, ast.ClassDef) and item.name == name)
    doc, fields = ast.get_docstring(node) or "", _fields(node)
    if as_json:
        show_json({"room": entry.room, "name": name, "doc": doc, "fields": fields, "concerns": entry.concerns, "file": str(path)})
        return
    print(f"{name} ({entry.room}: {registry.ROOMS[entry.room]})\n\n{doc}\n")
    print("Fields")
    for field in fields:
        default = "   (must be given)" if field["default"] is None else f" = {field['default']}"
        print(f"  {field['name']}: {field['type']}{default}")
    if not fields:
        print("  none")
    if entry.concerns:
        print(f"\nConcerns  {', '.join(entry.concerns)}")
    print(f"\nFile      {path}")


def chosen_round(text: str) -> int | Literal["last", "best"]:
    """What ``--round`` says.

    Raises:
        ConfigError: if it is neither ``last``, ``best`` nor a number.
    """
    if text == "last":
        return "last"
    if text == "best":
        return "best"
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"--round is {words.clean(text, 40)}; it must be last, best, or a round's number.")
    return int(text)


def show_json(value: object) -> None:
    """Prints a value as one JSON document; a number that JSON does not have (NaN, infinity) becomes null."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _fields(node: ast.ClassDef) -> list[dict[str, str | None]]:
    """A part's fields as its source has them; the default is ``None`` where there is none, and ``"None"`` where that is the value."""
    items = [item for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)]
    return [
        {
            "name": ast.unparse(item.target),
            "type": ast.unparse(item.annotation),
            "default": None if item.value is None else ast.unparse(item.value),
        }
        for item in items
    ]


def _brief(summary: str) -> str:
    return textwrap.shorten(re.sub(r":\w+:`([^`]*)`|``", r"\1", summary), 100, placeholder=" ...")


def _source(module: str) -> Path:
    if module.startswith("fedfm."):
        # The path is made by hand, for an import of the room would import torch.
        return Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"The source of {module} cannot be found.")
    return Path(spec.origin)

"""What there is to combine, read from the sources: answers before torch could be imported."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from pathlib import Path

from fedfm.core import registry
from fedfm.core.errors import ConfigError


def list_parts(room: str | None) -> None:
    """``fedfm list``: the parts of one room, or of all and by concern."""
    rooms = [room] if room is not None else list(registry.ROOMS)
    found = [entry for name in rooms for entry in registry.entries(name).values()]
    width = max((len(entry.name) for entry in found), default=0) + 2
    for name in rooms:
        print(f"{name}: {registry.ROOMS[name]}")
        for entry in registry.entries(name).values():
            print(f"  {entry.name:<{width}}{_brief(entry.summary)}")
        print()
    concerns = sorted({concern for entry in found for concern in entry.concerns})
    if concerns:
        print("By concern")
    for concern in concerns:
        names = ", ".join(entry.name for entry in found if concern in entry.concerns)
        print(textwrap.fill(names, 120, initial_indent=f"  {concern:<20}", subsequent_indent=" " * 22))


def show(name: str) -> None:
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
    print(f"{name} ({entry.room}: {registry.ROOMS[entry.room]})\n\n{ast.get_docstring(node) or ''}\n")
    print("Fields")
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)]
    for item in fields:
        default = f" = {ast.unparse(item.value)}" if item.value is not None else "   (must be given)"
        print(f"  {ast.unparse(item.target)}: {ast.unparse(item.annotation)}{default}")
    if not fields:
        print("  none")
    if entry.concerns:
        print(f"\nConcerns  {', '.join(entry.concerns)}")
    print(f"\nFile      {path}")


def _brief(summary: str) -> str:
    return textwrap.shorten(re.sub(r":\w+:`([^`]*)`|``", r"\1", summary), 100, placeholder=" ...")


def _source(module: str) -> Path:
    if module.startswith("fedfm."):
        # Found without importing the room, and with it torch.
        return Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"The source of {module} cannot be found.")
    return Path(spec.origin)

"""Which parts exist, without importing them.

A room's ``__init__`` has one import line per technique; the index is read from those lines and
from the sources' syntax trees, so ``fedfm list`` answers before torch could be imported. Other
packages add parts through the entry-point group ``fedfm.parts`` (name = ``room.ClassName``).
"""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedfm.core.errors import ConfigError

if TYPE_CHECKING:
    from fedfm.core.parts import Part

ROOMS: dict[str, str] = {
    "models": "a foundation model and its tokenizer",
    "data": "sources of rows and how they are divided among owners",
    "tasks": "what is learned",
    "tuning": "which parameters train and travel",
    "local": "how a client works",
    "samplers": "who takes part in a round",
    "verbs": "what a server asks and a client answers",
    "transforms": "on an update in flight",
    "channels": "how updates reach the aggregator",
    "pacing": "when a round has enough answers",
    "bounds": "what one update may reach before the server counts it",
    "aggregators": "many updates become one",
    "server": "the global step",
    "methods": "papers made of several parts",
    "engines": "where the clients run",
    "observers": "after the round",
    "attacks": "what a curious server reads from an update",
}


@dataclass(frozen=True)
class Entry:
    """A part in the index.

    Args:
        module: Where its class is defined.
        summary: First line of its docstring.
        concerns: The survey's words for what it is about.
    """

    room: str
    name: str
    module: str
    summary: str
    concerns: tuple[str, ...]

    def load(self) -> type[Part]:
        """The class itself."""
        cls: type[Part] = getattr(importlib.import_module(self.module), self.name)
        return cls


@cache
def entries(room: str) -> dict[str, Entry]:
    """The parts of a room by name.

    Raises:
        ConfigError: if there is no such room.
    """
    if room not in ROOMS:
        raise ConfigError(f"There is no room {room!r}.{suggest(room, ROOMS)} Rooms: {', '.join(ROOMS)}.")
    init = Path(__file__).parent.parent / room / "__init__.py"
    parts: dict[str, Entry] = {}
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedfm."):
            parts.update(_read(room, node.module, {alias.name for alias in node.names}))
    parts.update(_foreign(room))
    return dict(sorted(parts.items()))


def suggest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` or nothing."""
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f" Did you mean {lower[near[0]]!r}?" if near else ""


def _read(room: str, module: str, names: set[str]) -> dict[str, Entry]:
    path = Path(__file__).parent.parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    parts = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        # Parts are frozen dataclasses; whatever else a room exports is not a part.
        if (
            isinstance(node, ast.ClassDef)
            and node.name in names
            and any("frozen=True" in ast.unparse(line) for line in node.decorator_list)
        ):
            summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
            parts[node.name] = Entry(room, node.name, module, summary, _concerns(node))
    return parts


def _concerns(node: ast.ClassDef) -> tuple[str, ...]:
    for item in node.body:
        target = item.targets[0] if isinstance(item, ast.Assign) else item.target if isinstance(item, ast.AnnAssign) else None
        if (
            isinstance(target, ast.Name)
            and target.id == "concerns"
            and isinstance(item, ast.Assign | ast.AnnAssign)
            and item.value is not None
        ):
            return tuple(ast.literal_eval(item.value))
    return ()


def _foreign(room: str) -> dict[str, Entry]:
    from importlib.metadata import entry_points

    parts = {}
    for point in entry_points(group="fedfm.parts"):
        place, _, name = point.name.partition(".")
        if place == room and name:
            parts[name] = Entry(room, name, point.module, f"from {point.dist.name if point.dist else point.module}", ())
    return parts

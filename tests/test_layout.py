"""Imports run one way, down; every technique is exported and under its room's suite. Read from the sources, without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fedfm.core import registry

SOURCE = Path(__file__).parent.parent / "src" / "fedfm"
# A room may import, when it is imported, what stands on a line above its own.
LAYERS = [
    {"core"},
    {"privacy", "secagg"},
    {"samplers", "transforms", "channels", "pacing", "bounds", "aggregators", "server", "models", "data", "reports", "wire", "attacks"},
    {"silos"},
    {"tasks", "tuning"},
    {"local"},
    {"methods", "observers", "notation"},
    {"client"},
    {"verbs"},
    {"engines"},
    {"federation"},
    {"site"},
    {"recipe", "simulation", "coordination"},
    {"run", "testing"},
    {"quickstart"},
    {"service"},
    {"cli"},
]
# Rooms that know nothing else, not even for annotations or inside a function.
STRICT = {
    "core": set(),
    "secagg": {"core"},
    "privacy": {"core"},
    "channels": {"core", "secagg"},
    "transforms": {"core", "privacy"},
    **{room: {"core"} for room in ("samplers", "pacing", "bounds", "aggregators", "server", "models", "data", "wire", "attacks")},
    "tasks": {"core", "data"},
    "tuning": {"core", "models"},
    "local": {"core", "tuning", "privacy"},
    "observers": {"core"},
    "methods": {"core", "local", "transforms", "aggregators", "server", "samplers", "channels"},
    "client": {"core", "data", "models", "tasks", "tuning", "local", "notation"},
    "verbs": {"core", "data", "tuning", "client", "observers"},
    "silos": {"core", "wire"},
    "engines": {"core", "client", "models", "notation", "wire", "silos"},
}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(body: list[ast.stmt], deferred: bool) -> Iterator[tuple[str, int]]:
    """Rooms imported when the module is, or with ``deferred`` everywhere in it, and the line."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fedfm":
            rest = node.module.split(".")[1:]
            yield from ((name, node.lineno) for name in (rest[:1] or [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[1], node.lineno) for alias in node.names if alias.name.startswith("fedfm."))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not deferred:
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not deferred:
            yield from imports(node.orelse, deferred)
        else:
            for field in ("body", "orelse", "finalbody", "handlers"):
                inner = getattr(node, field, None)
                if isinstance(inner, list):
                    yield from imports(inner, deferred)


def other_rooms(path: Path, deferred: bool = False) -> set[tuple[str, int]]:
    return {(room, line) for room, line in imports(ast.parse(path.read_text(encoding="utf-8")).body, deferred) if room != room_of(path)}


def test_every_room_has_its_layer() -> None:
    assert {room_of(path) for path in FILES} == set().union(*LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_down(path: Path) -> None:
    level = next(i for i, layer in enumerate(LAYERS) if room_of(path) in layer)
    below = set().union(*LAYERS[:level])
    wrong = [f"line {line}: fedfm.{room}" for room, line in other_rooms(path) if room not in below and room != "__version__"]
    assert not wrong, f"{path.name} stands below what it imports: {wrong}"


@pytest.mark.parametrize("room", sorted(STRICT))
def test_rooms_know_only_what_they_stand_on(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            wrong = [f"line {line}: fedfm.{other}" for other, line in other_rooms(path, deferred=True) if other not in STRICT[room]]
            assert not wrong, f"{path} imports {wrong}"


def parts_in(path: Path) -> set[str]:
    """Frozen dataclasses that inherit a room's noun."""
    nouns = {
        "Verb",
        "Pacing",
        "Bounds",
        "Sampler",
        "Transform",
        "Channel",
        "Aggregator",
        "ServerOptimizer",
        "Method",
        "LocalTrainer",
        "Tuning",
        "WrappedTuning",
        "Task",
        "Engine",
        "GradientTrainer",
        "WrappedTrainer",
        "Attack",
        "TokenAttack",
    }
    return {
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and nouns & {ast.unparse(base) for base in node.bases}
    }


@pytest.mark.parametrize(
    "room", ["samplers", "transforms", "channels", "bounds", "aggregators", "server", "local", "tasks", "tuning", "engines", "attacks"]
)
def test_every_technique_is_exported_and_so_under_its_rooms_suite(room: str) -> None:
    written = set().union(*(parts_in(path) for path in (SOURCE / room).glob("*.py") if path.name != "base.py"))
    assert written == set(registry.entries(room)), f"add one import line per technique to {room}/__init__.py"


@pytest.mark.parametrize(
    ("room", "suite"),
    [
        ("tasks", "test_tasks.py"),
        ("tuning", "test_tuning.py"),
        ("local", "test_local.py"),
        ("samplers", "test_samplers.py"),
        ("transforms", "test_transforms.py"),
        ("channels", "test_channels.py"),
        ("bounds", "test_bounds.py"),
        ("aggregators", "test_aggregators.py"),
        ("server", "test_server.py"),
        ("methods", "test_methods.py"),
        ("attacks", "test_attacks.py"),
    ],
)
def test_each_rooms_suite_reads_the_index(room: str, suite: str) -> None:
    assert f'examples("{room}"' in (Path(__file__).parent / suite).read_text(encoding="utf-8")


def test_every_part_says_what_it_is() -> None:
    for room in registry.ROOMS:
        for entry in registry.entries(room).values():
            assert entry.summary and not entry.summary.startswith(f"{entry.name}("), f"{room}.{entry.name} has no docstring"


# Circles, file by file, with imports for annotations and inside functions


def module_of(path: Path, base: Path) -> str:
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, known: set[str], package: str) -> set[str]:
    """The modules of ours that a file names in any import."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            modules |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return modules & known


@pytest.mark.parametrize("package", ["fedfm", "benchmarks"])
def test_there_is_no_circle(package: str) -> None:
    base = SOURCE.parent if package == "fedfm" else SOURCE.parents[1]
    paths = {module_of(path, base): path for path in (base / package).rglob("*.py")}
    # The package itself names what it shows, and nothing of ours imports it.
    paths.pop(package)
    graph = {module: imported(path, set(paths), package) - {module} for module, path in paths.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) == len(paths)


@pytest.mark.parametrize("folder", ["src", "benchmarks", "examples", "docs"])
def test_no_function_is_longer_than_60_lines(folder: str) -> None:
    long = [
        f"{path.name}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in (SOURCE.parents[1] / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60
    ]
    assert not long, long

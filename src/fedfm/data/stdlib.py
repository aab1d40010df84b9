"""Data that is always there: the Python standard library of the user's own machine.

Real text with natural owners: each top-level package or module of at least :data:`MIN_BYTES` is
one, unequal in size and in kind. Its manual, ``pydoc_data.topics``, belongs to none of them and is
the public text on which a base model can be trained.
"""

from __future__ import annotations

import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fedfm.core.errors import DataError
from fedfm.data.records import Record, pieces

MIN_BYTES = 100_000
"""Fewest bytes of source that make a package an owner."""
_NOT_OWNERS = {"site-packages", "dist-packages", "pydoc_data", "turtledemo"}
_TESTS = {"test", "tests", "idle_test"}


@cache
def root() -> Path:
    """Where the library lies."""
    return Path(sysconfig.get_path("stdlib"))


@cache
def files() -> tuple[Path, ...]:
    """Every source file of every owner, sorted.

    Raises:
        DataError: if this Python came without the sources of its library.
    """
    by_owner: dict[str, list[Path]] = defaultdict(list)
    for top in sorted(root().iterdir()):
        if top.name not in _NOT_OWNERS | _TESTS:
            modules = sorted(top.rglob("*.py")) if top.is_dir() else [top] if top.suffix == ".py" else []
            by_owner[top.stem] += [path for path in modules if not _TESTS.intersection(path.relative_to(top).parts[:-1])]
    owned = tuple(path for paths in by_owner.values() if sum(p.stat().st_size for p in paths) >= MIN_BYTES for path in paths)
    if not owned:
        raise DataError(f"{root()} holds no library sources, so 'stdlib' has no owners. Use a Python that has them, or other data.")
    return owned


def rows() -> Iterator[Record]:
    """Pieces of source, with columns ``text``, ``owner`` and ``path``."""
    for path in files():
        relative = path.relative_to(root())
        owner = relative.parts[0].removesuffix(".py")
        # Sources declare their own encoding.
        with tokenize.open(path) as file:
            for line, piece in pieces(file):
                yield Record({"text": piece, "owner": owner, "path": str(relative)}, f"{path}:{line}")


def public_text() -> Iterator[str]:
    """The topics of Python's manual, one at a time.

    Raises:
        DataError: if this Python came without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("This Python came without pydoc_data.topics, which is the public text. Give a text of your own.") from error
    yield from (topics[name] for name in sorted(topics))

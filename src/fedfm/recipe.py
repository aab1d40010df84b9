"""Recipes: YAML to :class:`fedfm.federation.Federation` and back. ``load(dump(federation)) == federation``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedfm import notation
from fedfm.core.errors import ConfigError
from fedfm.core.paths import usable
from fedfm.core.registry import suggest
from fedfm.federation import Federation

_LARGEST = 1 << 20  # bytes of a recipe


def read(path: Path | str, overrides: Sequence[str] = ()) -> Federation:
    """The federation that the recipe file at ``path`` describes.

    A relative path in it is taken from the file's own folder where there is such a file, else from the current directory.

    Args:
        overrides: ``key=value`` each, applied before anything is built (``rounds=20``, ``tuning.r=16``, ``transforms.0.max_norm=2``).

    Raises:
        ConfigError: telling the file, the line, the key, what was given and what is allowed.
    """
    path = usable(path, "The recipe")
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"The recipe {path} has more than {_LARGEST:,} bytes, which no recipe has. Is it another file?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = suggest(path.name, (beside.name for beside in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        raise ConfigError(f"There is no recipe at {path} (looked from {Path.cwd()}).{near}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}") from error
    return located(notation.build(Federation, text, str(path), overrides), path.parent)


def load(source: str | Path, overrides: Sequence[str] = ()) -> Federation:
    """A recipe as a federation; ``source`` is its text or its file.

    Example:
        >>> load("{model: gpt2, data: {source: stdlib}, tuning: {LoRA: {r: 4}}}").tuning.r
        4

    Raises:
        ConfigError: as :func:`read`.
    """
    if isinstance(source, Path) or ("\n" not in source and not re.search(r"^\s*\{|:(\s|$)", source)):
        return read(source, overrides)
    return notation.build(Federation, source, "recipe", overrides)


def dump(federation: Federation) -> str:
    """The recipe of a federation, every field written out, a line for each key."""
    return notation.write(federation, name=federation.name)


def located(federation: Federation, folder: Path | None = None) -> Federation:
    """The federation with relative paths that exist made absolute, looked for in ``folder`` (default: the current directory).

    Raises:
        ConfigError: if something that the recipe names cannot be a path, or is a pipe or a device.
    """

    def locate(value: str | None, what: str) -> str | None:
        if value is None or value == "stdlib" or re.match(r"\w+:", value):
            return value
        path = usable((folder or Path.cwd()) / usable(value, what), what)
        # Not resolve(): a link's own name carries the suffix that tells the format.
        return os.path.normpath(path.absolute()) if path.exists() else value

    model, data = federation.model, federation.data
    return replace(
        federation,
        policies=locate(federation.policies, "policies"),
        model=replace(model, source=locate(model.source, "model.source"), tokenizer=locate(model.tokenizer, "model.tokenizer")),
        data=replace(data, source=locate(data.source, "data.source") or data.source, test=locate(data.test, "data.test")),
    )

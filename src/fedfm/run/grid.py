"""A grid of recipes: overrides with several values each, and the product of them.

``tuning.LoRA.r=4,16 server=FedAvg,FedAdam seed=0..2`` are 2 x 2 x 3 recipes. Commas part values; not those within brackets, braces or quotes, so
``tuning.targets=[q_proj,v_proj]`` is one value and ``data.source="a,b.jsonl"`` is one text. ``a..b`` stands for the whole numbers from a to b.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fedfm.core.errors import ConfigError

MOST = 10_000
"""Recipes in a grid."""
_RANGE = re.compile(r"(-?\d{1,15})\.\.(-?\d{1,15})")
# YAML's quoted texts: '' stands for one quote, a backslash escapes in the other kind.
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""")
_AROUND = "{}[]'\" "
_CLOSES = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Axis:
    """A field of the recipe and its values, as they are written in an override.

    Args:
        key: The field, such as ``tuning.LoRA.r``.
    """

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One recipe of the grid.

    Args:
        name: Of its folder; readable, and different for different recipes of a grid.
        values: What each axis has here, by its key; fields with one value in the whole grid are not among them.
        overrides: All of the recipe's overrides.
    """

    name: str
    values: Mapping[str, str]
    overrides: tuple[str, ...]


def axis(override: str) -> Axis:
    """An override with one or more values.

    Example:
        >>> axis("tuning.targets=[q_proj,v_proj],[q_proj]").values
        ('[q_proj,v_proj]', '[q_proj]')
        >>> axis("seed=0..2,7").values
        ('0', '1', '2', '7')

    Raises:
        ConfigError: if it is no ``key=value``, a bracket or a quote does not close, a value is empty or stands twice, or a range is none.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{_shown(override)} is no override; give KEY=VALUE,VALUE,... such as tuning.LoRA.r=4,16 or seed=0..2.")
    values: list[str] = []
    for value in _parted(override, text):
        values += _range(override, value)
    if len(values) > 1 and "" in values:
        raise ConfigError(
            f"{_shown(override)} has an empty value among several. Write null for none, '' for an empty text, or remove the comma."
        )
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise ConfigError(f"{_shown(override)} names {twice} twice; each value stands once.")
    return Axis(key.strip(), tuple(values))


def _parted(override: str, text: str) -> list[str]:
    """The text cut at the commas that part values."""
    parts, begin, i, open_, before = [], 0, 0, list[str](), ","
    while i < len(text):
        char, end = text[i], i + 1
        if char in "'\"" and before in ",[{:":
            quoted = _QUOTED.match(text, i)
            if quoted is None:
                _unclosed(override, char)
            end = quoted.end()
        elif char in _CLOSES:
            open_.append(_CLOSES[char])
        elif char in "]}":
            if not open_ or open_.pop() != char:
                _unclosed(override, char)
        elif char == "," and not open_:
            parts.append(text[begin:i].strip())
            begin = end
        before, i = (before if char == " " else char), end
    if open_:
        _unclosed(override, open_[-1])
    return [*parts, text[begin:].strip()]


def _unclosed(override: str, char: str) -> NoReturn:
    raise ConfigError(
        f"{_shown(override)}: {char} has no partner, so it is not clear which commas part values. Put a text that holds it into quotes: 'key=\"a[b\"'."
    )


def _range(override: str, value: str) -> list[str]:
    match = _RANGE.fullmatch(value)
    if match is None:
        return [value]
    low, high = int(match[1]), int(match[2])
    if low > high:
        raise ConfigError(f"{_shown(override)}: {value} counts down; write {high}..{low}.")
    if high - low >= MOST:
        raise ConfigError(f"{_shown(override)}: {value} are {high - low + 1:,} values; a sweep has at most {MOST:,} runs.")
    return [str(number) for number in range(low, high + 1)]


def grid(overrides: Sequence[str]) -> tuple[list[Axis], list[Cell]]:
    """The axes, and a cell for each combination of their values; the last axis changes fastest.

    Raises:
        ConfigError: if an override is none, two are of one field, or there are more than 10,000 combinations.
    """
    axes = [axis(override) for override in overrides]
    keys = [item.key for item in axes]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice. Give all of its values in one place: {twice}=A,B.")
    num = 1
    for item in axes:
        num *= len(item.values)
    if num > MOST:
        raise ConfigError(
            f"The grid has {num:,} recipes ({' x '.join(str(len(item.values)) for item in axes)}); a sweep has at most {MOST:,}."
        )
    swept = [item for item in axes if len(item.values) > 1]
    titles = short([item.key for item in swept])
    cells = []
    for values in itertools.product(*(item.values for item in axes)):
        own = dict(zip(keys, values, strict=True))
        mine = {item.key: own[item.key] for item in swept}
        words = [f"{titles[key]}-{value.strip(_AROUND)}" for key, value in mine.items()]
        cells.append(Cell(_slug(words), mine, tuple(f"{key}={value}" for key, value in own.items())))
    names = [cell.name for cell in cells]
    if len(set(names)) == len(names):
        return axes, cells
    # Values that differ in what a file's name cannot hold.
    return axes, [Cell(f"{cell.name}-{_digest(chr(0).join(cell.overrides))}", cell.values, cell.overrides) for cell in cells]


def short(keys: Sequence[str]) -> dict[str, str]:
    """The end of each dotted key that tells it from the others.

    Example:
        >>> short(["tuning.LoRA.r", "local.lr", "server.lr"])
        {'tuning.LoRA.r': 'r', 'local.lr': 'local.lr', 'server.lr': 'server.lr'}
    """
    titles = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        titles[key] = next((end for end in ends if not any(other != key and f".{other}".endswith(f".{end}") for other in keys)), key)
    return titles


def _slug(words: Sequence[str]) -> str:
    """A folder's name of these words."""
    clean = [re.sub(r"[^A-Za-z0-9.+-]+", "-", word).strip("-.") for word in words]
    text = "_".join(word for word in clean if word) or "run"
    return text if len(text) <= 100 else f"{text[:90]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _shown(override: str) -> str:
    return f"override {override if len(override) <= 80 else override[:77] + '...'!r}"

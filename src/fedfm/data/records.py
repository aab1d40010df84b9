"""A row, where it was read, and what is in its columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TextIO

from fedfm.core.errors import RowError
from fedfm.core.registry import suggest
from fedfm.core.task import RawRow

PIECE = 4000
"""Characters of a row cut from a longer text."""

Refuse = Callable[[RowError], None]
"""Told of a row that cannot be used: it raises, or counts it and lets the others pass."""


class Record(dict[str, Any]):
    """A row, and where it was read (``path:line``)."""

    def __init__(self, row: Mapping[str, Any] | Iterable[tuple[str, Any]], where: str) -> None:
        super().__init__(row)
        self.where = where


def where(row: RawRow) -> str:
    """Where a row was read, for messages."""
    return row.where if isinstance(row, Record) else "a row"


def value_in(row: RawRow, column: str, kind: str = "column") -> Any:
    """The row's entry in ``column``.

    Args:
        kind: What the row lacks where it has no such column, a key of :data:`fedfm.core.bad_rows.KINDS`.

    Raises:
        RowError: if it has no such column.
    """
    try:
        return row[column]
    except KeyError:
        raise RowError(
            f"{where(row)} has no column {column!r}.{suggest(column, row)} Its columns: {', '.join(row)}.", kind, where(row), column
        ) from None


def text_in(row: RawRow, column: str) -> str:
    """The row's text in ``column``, which may be empty.

    Raises:
        RowError: if it is absent or not text.
    """
    value = value_in(row, column, "text")
    if not isinstance(value, str):
        kind = "text" if is_nothing(value) else "type"
        raise RowError(f"{where(row)}: column {column!r} holds {shown(value)}, which is not text.", kind, where(row))
    return _whole(row, column, value)


def written_in(row: RawRow, column: str) -> str:
    """The row's text in ``column``, which is more than white space.

    Raises:
        RowError: if it is not.
    """
    text = text_in(row, column)
    if not text or text.isspace():
        raise no_text(row, column)
    return text


def no_text(row: RawRow, *columns: str) -> RowError:
    """The error of a row whose columns hold nothing to learn from."""
    names = " and ".join(map(repr, columns))
    return RowError(f"{where(row)}: column {names} holds no text, so there is nothing to learn from.", "text", where(row))


def unknown_label(row: RawRow, label: str, classes: Collection[str], source: str) -> RowError:
    """The error of a row whose label is none of the classes.

    Args:
        source: Where the classes are from, in words.
    """
    known = ", ".join(sorted(classes)[:8])
    return RowError(
        f"{where(row)} has the label {label!r}, which is not in {source} ({len(classes)} classes: {known}{', ...' if len(classes) > 8 else ''}).",
        "unknown_label",
        where(row),
    )


def name_in(row: RawRow, column: str, kind: str = "label") -> str:
    """The row's owner or label in ``column``: text, or a number as text.

    Args:
        kind: ``owner`` or ``label``.

    Raises:
        RowError: if it is absent, empty or neither.
    """
    value = value_in(row, column, kind)
    if is_nothing(value) or not isinstance(value, str | int | float):
        why = kind if is_nothing(value) else "type"
        raise RowError(f"{where(row)}: column {column!r} holds {shown(value)}, where a name or a number is needed.", why, where(row))
    return _whole(row, column, str(value))


def is_nothing(value: Any) -> bool:
    """Whether a cell is empty; a table that was saved with gaps has NaN in them."""
    return value is None or (isinstance(value, str) and (not value or value.isspace())) or (isinstance(value, float) and value != value)


def _whole(row: RawRow, column: str, text: str) -> str:
    """The text, if it can be written down: JSON may hold one half of a character that takes two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where(row)}: column {column!r} holds half a character ({text[error.start]!a}), so its text was cut. Mend or drop this row.",
            "unreadable",
            where(row),
        ) from error
    return text


def pieces(file: TextIO) -> Iterator[tuple[int, str]]:
    """A long text as pieces of about :data:`PIECE` characters that end where a line does, each with the number of its first line."""
    first, line, held, size = 1, 1, list[str](), 0
    # The bound on readline keeps memory flat where a file is one endless line.
    while part := file.readline(PIECE):
        held.append(part)
        size += len(part)
        line += part.endswith("\n")
        if size >= PIECE:
            yield first, "".join(held)
            first, held, size = line, [], 0
    if held:
        yield first, "".join(held)


def shown(value: Any) -> str:
    """A value and its type, short enough for a message."""
    short = repr(value)
    return f"{type(value).__name__} {short if len(short) <= 40 else short[:37] + '...'}"

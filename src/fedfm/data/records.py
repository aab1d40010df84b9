"""A row, where it was read, and what is in its columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from fedfm.core.errors import DataError
from fedfm.core.registry import suggest
from fedfm.core.task import RawRow

PIECE = 4000
"""Characters of a row cut from a longer text."""


class Record(dict[str, Any]):
    """A row, and where it was read (``path:line``)."""

    def __init__(self, row: Mapping[str, Any] | Iterable[tuple[str, Any]], where: str) -> None:
        super().__init__(row)
        self.where = where


def where(row: RawRow) -> str:
    """Where a row was read, for messages."""
    return row.where if isinstance(row, Record) else "a row"


def value_in(row: RawRow, column: str) -> Any:
    """The row's entry in ``column``.

    Raises:
        DataError: if it has no such column.
    """
    try:
        return row[column]
    except KeyError:
        raise DataError(f"{where(row)} has no column {column!r}.{suggest(column, row)} Its columns: {', '.join(row)}.") from None


def text_in(row: RawRow, column: str) -> str:
    """The row's text in ``column``.

    Raises:
        DataError: if it is absent or not text.
    """
    value = value_in(row, column)
    if not isinstance(value, str):
        raise DataError(f"{where(row)}: column {column!r} holds {shown(value)}, which is not text.")
    return _whole(row, column, value)


def name_in(row: RawRow, column: str) -> str:
    """The row's owner or label in ``column``: text, or a number as text.

    Raises:
        DataError: if it is absent, empty or neither.
    """
    value = value_in(row, column)
    if value is None or value == "" or not isinstance(value, str | int | float):
        raise DataError(f"{where(row)}: column {column!r} holds {shown(value)}, where a name or a number is needed.")
    return _whole(row, column, str(value))


def _whole(row: RawRow, column: str, text: str) -> str:
    """The text, if it can be written down: JSON may hold one half of a character that takes two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where(row)}: column {column!r} holds half a character ({text[error.start]!a}), so its text was cut. Mend or drop this row."
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

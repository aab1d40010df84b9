"""Rows that train and test: an evaluation on them measures what was learned by heart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from fedfm.core.errors import RowError
from fedfm.data.records import Record
from fedfm.data.sources import open_source
from fedfm.data.spec import Data


def shared_rows(data: Data, columns: Sequence[str]) -> tuple[int, int]:
    """How many rows of the test source also stand in the training source, and how many test rows there are.

    Both are streamed once; 16 bytes are kept of each test row. Rows that cannot be read or lack a column are not counted.

    Args:
        columns: What makes two rows the same, such as a task's columns.

    Raises:
        DataError: if a source cannot be read.
    """
    if data.test is None:
        return 0, 0
    counts: dict[bytes, int] = {}
    num_rows = 0
    for record in _rows(data, data.test, columns):
        num_rows += 1
        digest = _digest(record, columns)
        counts[digest] = counts.get(digest, 0) + 1
    shared = sum(counts.pop(_digest(record, columns), 0) for record in _rows(data, data.source, columns))
    return shared, num_rows


def _rows(data: Data, location: str, columns: Sequence[str]) -> Iterator[Record]:
    for record in open_source(location, data.delimiter, data.encoding).rows(_ignore):
        if all(column in record for column in columns):
            yield record


def _ignore(error: RowError) -> None:
    """Preparing the data has counted it."""


def _digest(record: Record, columns: Sequence[str]) -> bytes:
    values = json.dumps([record[column] for column in columns], default=str)
    return hashlib.blake2b(values.encode(), digest_size=16).digest()

"""Rows that train and test: an evaluation on them measures what was learned by heart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from fedfm.data.records import Record, value_in
from fedfm.data.sources import open_source
from fedfm.data.spec import Data


def shared_rows(data: Data, columns: Sequence[str]) -> tuple[int, int]:
    """How many rows of the test source also stand in the training source, and how many test rows there are.

    Both are streamed once; 16 bytes are kept of each test row.

    Args:
        columns: What makes two rows the same, such as a task's columns.

    Raises:
        DataError: if a source or a column cannot be read.
    """
    if data.test is None:
        return 0, 0
    counts: dict[bytes, int] = {}
    num_rows = 0
    for record in open_source(data.test).rows():
        num_rows += 1
        digest = _digest(record, columns)
        counts[digest] = counts.get(digest, 0) + 1
    shared = sum(counts.pop(_digest(record, columns), 0) for record in open_source(data.source).rows())
    return shared, num_rows


def _digest(record: Record, columns: Sequence[str]) -> bytes:
    values = json.dumps([value_in(record, column) for column in columns], default=str)
    return hashlib.blake2b(values.encode(), digest_size=16).digest()

"""Chunks at the broker: several on their way at a time, so that sealing, sending, receiving and opening overlap."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import Iterable, Iterator

from fedfm.wire.nats import Connection, result
from fedfm.wire.subjects import Branch
from fedfm.wire.transfer import ChunkStore


class Stored(ChunkStore):
    """Chunks in a branch of the broker.

    Args:
        connection: To the broker.
        branch: Where they are.
        depth: Chunks that are on their way at a time, which bounds the memory.
        patience: Seconds that a chunk may take.
    """

    def __init__(self, connection: Connection, branch: Branch, depth: int = 8, patience: float = 60.0) -> None:
        self._connection, self._branch, self._depth, self._patience = connection, branch, depth, patience
        self._under_way: deque[concurrent.futures.Future[None]] = deque()

    def put(self, id: str, index: int, data: bytes) -> None:
        """Sends a chunk, while the next is made.

        Raises:
            WireError: if an earlier one could not be stored.
        """
        while len(self._under_way) >= self._depth:
            self._finish()
        self._under_way.append(self._connection.publish_soon(self._branch.chunk(id, index), data, self._patience))

    def flush(self) -> None:
        """Waits until the broker has all.

        Raises:
            WireError: if one could not be stored.
        """
        while self._under_way:
            self._finish()

    def held(self, id: str) -> set[int]:
        """Numbers of the chunks that the broker has."""
        indices = map(self._branch.index, self._connection.held(self._branch, self._branch.chunks(id), self._patience))
        return {index for index in indices if index is not None}

    def get(self, id: str, index: int) -> bytes | None:
        """A chunk, or ``None``."""
        return self._connection.get(self._branch, self._branch.chunk(id, index), self._patience)

    def get_each(self, id: str, indices: Iterable[int]) -> Iterator[bytes | None]:
        """Chunks in this order; the next ones are on their way while one is opened."""
        under_way: deque[concurrent.futures.Future[bytes | None]] = deque()
        try:
            for index in indices:
                under_way.append(self._connection.get_soon(self._branch, self._branch.chunk(id, index), self._patience))
                if len(under_way) >= self._depth:
                    yield result(under_way.popleft())
            while under_way:
                yield result(under_way.popleft())
        finally:
            for future in under_way:
                future.cancel()

    def drop(self, id: str) -> None:
        """Deletes a transfer's chunks; the coordinator alone may."""
        self._connection.purge(self._branch, self._branch.chunks(id))

    def _finish(self) -> None:
        try:
            result(self._under_way.popleft())
        except BaseException:
            for future in self._under_way:
                future.cancel()
            self._under_way.clear()
            raise

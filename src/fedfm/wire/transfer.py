"""Long payloads in pieces: what the store has is not sent again, what the receiver has is not fetched again.

The sender puts each chunk where its id and its number say, then publishes the head, which is the signed list of all chunks. When a head arrives, its
chunks are there. Both sides hold a few chunks at a time, whatever the size of the payload: the next is sealed while the last is sent, and opened
while the next arrives.

A :class:`Spool` lets a receiver read a payload several times: once to judge it, once to use it. Its first reading takes the chunks from the store and
checks every one; so when the payload is there, nothing about it can turn out wrong any more but this machine's own disk.

Covered here: a cut at any point on either side, chunks that are missing, changed, exchanged or of another transfer. Not covered: a store that keeps
nothing; whoever asked for the payload asks again.
"""

from __future__ import annotations

import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedfm.core.errors import RunError
from fedfm.wire.envelope import TAG, Envelope, Sealed
from fedfm.wire.refusal import Refused


class ChunkStore(ABC):
    """Where chunks wait for their receivers: by the id of their transfer, and their number."""

    @abstractmethod
    def put(self, id: str, index: int, data: bytes) -> None:
        """Stores a chunk. It may return before that is done, and waits while too many are under way."""

    @abstractmethod
    def flush(self) -> None:
        """Waits until every chunk that was put is stored durably."""

    @abstractmethod
    def held(self, id: str) -> set[int]:
        """Numbers of the chunks of a transfer that are stored."""

    @abstractmethod
    def get(self, id: str, index: int) -> bytes | None:
        """A chunk, or ``None`` where there is none."""

    def get_each(self, id: str, indices: Iterable[int]) -> Iterator[bytes | None]:
        """Chunks in this order. A store that is far away asks for the next ones beforehand."""
        for index in indices:
            yield self.get(id, index)

    @abstractmethod
    def drop(self, id: str) -> None:
        """Deletes a transfer's chunks."""


class Memory(ChunkStore):
    """Chunks in a dictionary, for tests and for payloads that stay in one process."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[str, int], bytes] = {}

    def put(self, id: str, index: int, data: bytes) -> None:
        """Stores a chunk."""
        self.chunks[id, index] = data

    def flush(self) -> None:
        """Nothing is under way."""

    def held(self, id: str) -> set[int]:
        """Numbers of the chunks that are stored."""
        return {index for name, index in self.chunks if name == id}

    def get(self, id: str, index: int) -> bytes | None:
        """A chunk, or ``None``."""
        return self.chunks.get((id, index))

    def drop(self, id: str) -> None:
        """Deletes a transfer's chunks."""
        for key in [key for key in self.chunks if key[0] == id]:
            del self.chunks[key]


def send(sealed: Sealed, store: ChunkStore) -> bytes:
    """Puts the chunks that the store does not have. Calling it again after a cut goes on where it ended.

    Returns:
        The message to publish now: the head, and the chunk if there is but one, which needs no store.

    Raises:
        MessageError: as the store raises it.
    """
    if sealed.num_chunks > 1:
        id = sealed.header.id
        held = store.held(id)
        for index in range(sealed.num_chunks):
            if index not in held:
                store.put(id, index, sealed.chunk(index))
        store.flush()
    return sealed.message()


def receive(envelope: Envelope, store: ChunkStore, first: int = 0) -> Iterator[bytes]:
    """The payload piece by piece, each verified before it is handed over.

    Args:
        first: The first chunk that the receiver does not have; ``first * header.chunk`` is its place in the payload.

    Raises:
        Refused: if a chunk is missing or is not the one that the sender made.
    """
    for index, data in enumerate(_chunks(envelope, store, first), first):
        yield envelope.decrypt(index, data)


def _chunks(envelope: Envelope, store: ChunkStore, first: int = 0) -> Iterable[bytes | None]:
    """The chunks as they are stored."""
    if envelope.inline is not None:
        return [envelope.inline][first:]
    return store.get_each(envelope.header.id, range(first, envelope.num_chunks))


def receive_all(envelope: Envelope, store: ChunkStore) -> bytearray:
    """The whole payload, in one buffer of its announced size, which :meth:`~fedfm.wire.envelope.Opener.read` has bounded.

    Raises:
        Refused: as :func:`receive`.
    """
    header = envelope.header
    payload = bytearray(header.size)
    for index, piece in enumerate(receive(envelope, store)):
        payload[index * header.chunk : index * header.chunk + len(piece)] = piece
    return payload


class Spool:
    """A payload that waits on this machine's disk, encrypted as it came, to be read in pieces as often as they are asked for.

    The file has no name and is gone with the spool, or with the process. In memory is one chunk.

    Args:
        envelope: Whose payload it is.
        store: Where its chunks are; they may be dropped when this returns.
        folder: Where the file is; ``None`` for the system's folder for such files.

    Raises:
        Refused: as :func:`receive`.
        RunError: if the disk does not take it.
    """

    def __init__(self, envelope: Envelope, store: ChunkStore, folder: Path | None = None) -> None:
        self.size, self._envelope, self._folder = envelope.header.size, envelope, folder
        self._last: tuple[int, bytes] = (-1, b"")
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it is closed with the spool
        except OSError as error:
            raise self._unusable(error) from error
        self._file = file
        self.close = weakref.finalize(self, file.close)
        for index, data in enumerate(_chunks(envelope, store)):
            envelope.decrypt(index, data)
            assert data is not None, "decrypt refuses what is missing"
            try:
                file.write(data)
            except OSError as error:
                raise self._unusable(error) from error

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes of the payload.

        Raises:
            RunError: if the disk does not give back what it took.
        """
        out, at, step = bytearray(stop - start), start, self._envelope.header.chunk
        while at < stop:
            index = at // step
            part = memoryview(self._chunk(index))[at - index * step : stop - index * step]
            if not part:
                raise RunError(f"Bytes {start} to {stop} were asked for of a payload that has {self.size}.")
            out[at - start : at - start + len(part)] = part
            at += len(part)
        return out

    def _chunk(self, index: int) -> bytes:
        if self._last[0] != index:
            try:
                self._file.seek(index * (self._envelope.header.chunk + TAG))
                data = self._file.read(self._envelope.header.stored(index))
                self._last = index, self._envelope.decrypt_again(index, data)
            except (OSError, Refused) as error:
                raise self._unusable(error) from error
        return self._last[1]

    def _unusable(self, error: Exception) -> RunError:
        where = self._folder or tempfile.gettempdir()
        return RunError(
            f"An answer of {self._envelope.header.sender} ({self.size} bytes) cannot be kept in {where} while it is added: {error}. "
            "Make room there, or repair the disk, and resume the run."
        )

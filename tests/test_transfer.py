"""Long payloads: a cut on either side costs what was under way, memory is a few chunks, and a wrong chunk is refused."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")

from fedfm.wire.envelope import Envelope, Header, Opener, Sealed, seal
from fedfm.wire.identity import Identity
from fedfm.wire.refusal import Refused
from fedfm.wire.transfer import ChunkStore, Memory, receive, receive_all, send

ALICE, BOB = Identity.create("alice"), Identity.create("bob")
NOW = 1_800_000_000.0
HEADER = Header("c", "run-1", 3, 7, "reply", NOW, NOW + 60)
PAYLOAD = bytes(range(256)) * 40


class Cut(Exception):
    """The connection is lost."""


class Flaky(Memory):
    """A store that is lost after some puts, which it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.puts = -1, 0

    def put(self, id: str, index: int, data: bytes) -> None:
        if self.left == 0:
            raise Cut
        self.left -= 1
        self.puts += 1
        super().put(id, index, data)


def sealed(payload: bytes = PAYLOAD, chunk: int = 1000, **changes) -> Sealed:
    return seal(payload, ALICE, [BOB.card], replace(HEADER, chunk=chunk), **changes)


def read(head: bytes) -> Envelope:
    return Opener(BOB, {"alice": ALICE.card}, "c", now=lambda: NOW).read(head)


@given(st.binary(max_size=3000), st.integers(1, 700))
@settings(max_examples=50)
def test_the_size_of_a_chunk_does_not_matter(payload: bytes, chunk: int) -> None:
    store = Memory()
    envelope = read(send(sealed(payload, chunk), store))
    assert receive_all(envelope, store) == payload == b"".join(receive(envelope, store))
    assert bool(store.chunks) == (len(payload) > chunk)
    store.drop(envelope.header.id)
    assert not store.chunks


def test_a_sender_that_is_cut_anywhere_goes_on_where_it_ended() -> None:
    num_chunks = sealed().num_chunks
    for cut in range(num_chunks):
        store, sending = Flaky(), sealed()
        store.left = cut
        with pytest.raises(Cut):
            send(sending, store)
        store.left = -1
        assert receive_all(read(send(sending, store)), store) == PAYLOAD
        assert store.puts == num_chunks


def test_a_sender_that_is_killed_anywhere_goes_on_where_it_ended_if_it_kept_its_secret() -> None:
    secret, num_chunks = bytes(range(32)), sealed().num_chunks
    for cut in (0, 1, 5, num_chunks - 1):
        store = Flaky()
        store.left = cut
        with pytest.raises(Cut):
            send(sealed(secret=secret), store)
        store.left = -1
        assert receive_all(read(send(sealed(secret=secret), store)), store) == PAYLOAD
        assert store.puts == num_chunks


def test_a_receiver_that_is_cut_anywhere_goes_on_where_it_ended() -> None:
    store = Memory()
    head = send(sealed(), store)
    for cut in range(sealed().num_chunks + 1):
        pieces = receive(read(head), store)
        had = b"".join(next(pieces) for _ in range(cut))
        asked: list[int] = []

        class Counting(Memory):
            def get(self, id: str, index: int, asked: list[int] = asked) -> bytes | None:
                asked.append(index)
                return store.get(id, index)

        assert had + b"".join(receive(read(head), Counting(), first=cut)) == PAYLOAD
        assert asked == list(range(cut, sealed().num_chunks))


def moved(store: Memory, id: str, *, onto: int, source: tuple[str, int]) -> None:
    store.chunks[id, onto] = store.chunks[source]


WRONG: dict[str, Callable[[Memory, str, str], None]] = {
    "missing": lambda store, id, other: store.chunks.pop((id, 3)) and None,
    "exchanged": lambda store, id, other: moved(store, id, onto=3, source=(id, 4)),
    "of another transfer": lambda store, id, other: moved(store, id, onto=3, source=(other, 3)),
    "shorter": lambda store, id, other: store.put(id, 3, store.chunks[id, 3][:-1]),
    "longer": lambda store, id, other: store.put(id, 3, store.chunks[id, 3] + b"x"),
    "empty": lambda store, id, other: store.put(id, 3, b""),
    "zeros": lambda store, id, other: store.put(id, 3, bytes(1016)),
    "last, earlier": lambda store, id, other: moved(store, id, onto=3, source=(id, 10)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_chunk_is_refused_before_it_is_handed_over(name: str) -> None:
    store = Memory()
    head = send(sealed(), store)
    other = read(send(sealed(), store)).header.id
    envelope = read(head)
    WRONG[name](store, envelope.header.id, other)
    pieces, arrived = receive(envelope, store), []
    with pytest.raises(Refused) as refused:
        arrived.extend(pieces)
    assert refused.value.why == "chunk" and "Chunk 3" in str(refused.value)
    assert b"".join(arrived) == PAYLOAD[:3000]


class Files(ChunkStore):
    """Chunks on the disk, so that they are not in the memory that is measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, id: str, index: int, data: bytes) -> None:
        (self.folder / f"{id}.{index}").write_bytes(data)

    def flush(self) -> None:
        pass

    def held(self, id: str) -> set[int]:
        return {int(path.suffix[1:]) for path in self.folder.glob(f"{id}.*")}

    def get(self, id: str, index: int) -> bytes | None:
        path = self.folder / f"{id}.{index}"
        return path.read_bytes() if path.exists() else None

    def drop(self, id: str) -> None:
        for path in self.folder.glob(f"{id}.*"):
            path.unlink()


def test_100_mb_pass_with_the_memory_of_a_few_chunks(tmp_path: Path) -> None:
    store, payload = Files(tmp_path), bytes(100_000_000)
    sending = seal([payload[:60_000_001], payload[60_000_001:]], ALICE, [BOB.card], HEADER)
    digest, length = hashlib.blake2b(), 0
    tracemalloc.start()
    try:
        head = send(sending, store)
        _, sent = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        envelope = read(head)
        for piece in receive(envelope, store):
            digest.update(piece)
            length += len(piece)
        _, received = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert length == len(payload) and digest.digest() == hashlib.blake2b(payload).digest()
    assert sent < 6 * HEADER.chunk and received < 6 * HEADER.chunk
    store.drop(envelope.header.id)
    assert not list(tmp_path.iterdir())

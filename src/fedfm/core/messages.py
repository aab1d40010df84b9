"""What crosses a boundary: a small typed header and safetensors bytes.

Layout of a packed message::

    4 bytes   length H of the header, little endian
    H bytes   JSON: version, kind, verb, round, client, meta, own (strings and numbers only)
    O bytes   a safetensors file for this client alone, where the header says that there is one
    the rest  a safetensors file, the same for all who share a body

Covered here: pickle never appears, sizes are bounded before anything is buffered, the header is
checked field by field. Not covered: who sent it and who can read it (the engine's business).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import torch

from fedfm.core.errors import MessageError
from fedfm.core.tree import PIECE, LazyTree, Spec, Tree, num_bytes, raw
from fedfm.core.words import clean

ClientId = str
VERSION = 2
MAX_HEADER = 1 << 20
MAX_TENSORS = 100_000
MAX_REASON = 1000
# Bytes of an index for each tensor: its name, type, shape and place.
_INDEX_BYTES = 1024
_MAX_AXES, _MAX_VALUES = 16, 1 << 48
Scalar = str | float | int | bool | None
_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Body:
    """What many clients are asked alike: a verb with tensors and metadata. Clients with equal bodies may share a bank.

    Args:
        verb: What is asked. A runtime refuses verbs that it does not know.
        round: The round it belongs to; 0 before the first.
        tensors: What the verb needs (the global parameters).
        meta: Small scalars.
    """

    verb: str
    round: int = 0
    tensors: Tree = field(default_factory=dict)
    meta: Mapping[str, Scalar] = field(default_factory=dict)

    @cached_property
    def blob(self) -> bytes:
        """Its tensors as a safetensors file, made once for all who are asked."""
        return _blob(self.tensors)

    @cached_property
    def size(self) -> int:
        """Bytes of :attr:`blob`, without making it."""
        return _blob_size(self.tensors)

    @cached_property
    def tensors_digest(self) -> str:
        """Names its tensors alone: 32 hexadecimal digits that differ where one of them does."""
        return hashlib.blake2b(self.blob, digest_size=16).hexdigest()

    @cached_property
    def digest(self) -> str:
        """Names the body: 32 hexadecimal digits that differ where anything in it does."""
        digest = hashlib.blake2b(json.dumps([self.verb, self.round, dict(self.meta)], sort_keys=True).encode(), digest_size=16)
        digest.update(self.blob)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Request:
    """What one client is asked: a body that it shares with others, and a small part of its own.

    Args:
        own: Numbers for this client alone: its ticket, which of its tickets was counted last, its rank.
        own_tensors: Small tensors for this client alone.
    """

    body: Body
    own: Mapping[str, Scalar] = field(default_factory=dict)
    own_tensors: Tree = field(default_factory=dict)

    @staticmethod
    def of(verb: str, round: int = 0, tensors: Tree | None = None, meta: Mapping[str, Scalar] | None = None, **own: Scalar) -> Request:
        """A request with a body of its own."""
        return Request(Body(verb, round, tensors or {}, meta or {}), own)

    @property
    def verb(self) -> str:  # noqa: D102
        return self.body.verb

    @property
    def round(self) -> int:  # noqa: D102
        return self.body.round

    @property
    def tensors(self) -> Tree:  # noqa: D102
        return self.body.tensors

    @property
    def meta(self) -> Mapping[str, Scalar]:  # noqa: D102
        return self.body.meta


@dataclass(frozen=True)
class Reply:
    """A client's answer. ``meta`` holds what it is willing to tell."""

    client: ClientId
    verb: str
    round: int
    tensors: Tree = field(default_factory=dict)
    meta: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client that did not answer: the stage in which it failed, and why. Both texts are cut and cleaned, because a terminal shows them.

    Args:
        stage: ``train``, ``evaluate``, ``encode``, ``decode``, ``exchange``...
        reason: One line.
    """

    client: ClientId
    stage: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage", clean(self.stage, 40))
        object.__setattr__(self, "reason", clean(" ".join(self.reason.splitlines()), MAX_REASON))


Message = Request | Reply | Failure


def _header(message: Message, own_bytes: int) -> dict[str, Any]:
    if isinstance(message, Failure):
        return {"v": VERSION, "kind": "failure", "client": message.client, "stage": message.stage, "reason": message.reason}
    head: dict[str, Any] = {"v": VERSION, "verb": message.verb, "round": message.round, "meta": dict(message.meta)}
    if isinstance(message, Reply):
        return {**head, "kind": "reply", "client": message.client}
    return {**head, "kind": "request", "own": dict(message.own), "own_bytes": own_bytes}


def _header_bytes(message: Message, own_bytes: int = 0) -> bytes:
    return json.dumps(_header(message, own_bytes), allow_nan=True, separators=(",", ":")).encode()


def pack(message: Message) -> bytes:
    """The message as bytes.

    Raises:
        MessageError: if its header is too long or a tensor's type has no place in a message.
    """
    return b"".join(pack_parts(message))


def pack_parts(message: Message) -> list[bytes]:
    """:func:`pack` in pieces, of which the last and largest is the same object for all requests that share a body.

    Raises:
        MessageError: if its header is too long or a tensor's type has no place in a message.
    """
    own = _blob(message.own_tensors) if isinstance(message, Request) and message.own_tensors else b""
    shared = message.body.blob if isinstance(message, Request) else _blob(_tensors(message))
    head = _header_bytes(message, len(own))
    if len(head) > MAX_HEADER:
        raise _too_long(head)
    return [struct.pack("<I", len(head)) + head + own, shared]


def pack_views(message: Message) -> list[bytes | memoryview]:
    """:func:`pack` in pieces that are views of the message's own tensors, so that nothing large is copied. They must not change meanwhile.

    Raises:
        MessageError: as :func:`pack_parts`.
    """
    tensors = _tensors(message)
    own = _blob(message.own_tensors) if isinstance(message, Request) and message.own_tensors else b""
    head = _header_bytes(message, len(own))
    if len(head) > MAX_HEADER:
        raise _too_long(head)
    return [struct.pack("<I", len(head)) + head + own, *file_views(tensors)]


def size(message: Message) -> int:
    """``len(pack(message))`` without copying a tensor."""
    own = _blob_size(message.own_tensors) if isinstance(message, Request) and message.own_tensors else 0
    # Thousands of requests may share a body, which knows its own size.
    shared = message.body.size if isinstance(message, Request) else _blob_size(_tensors(message))
    return 4 + len(_header_bytes(message, own)) + own + shared


def _too_long(head: bytes) -> MessageError:
    return MessageError(f"A message's header has {len(head)} bytes, at most {MAX_HEADER} are allowed. Send what is large as a tensor.")


def _tensors(message: Message) -> Tree:
    return {} if isinstance(message, Failure) else message.tensors


def file_views(tensors: Tree, metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """A safetensors file in pieces that are views of the tensors, so that nothing large is copied. They must not change meanwhile.

    Args:
        metadata: Texts that go into its header.

    Raises:
        MessageError: if a tensor's type has no place in it.
    """
    index, names = _index(tensors, metadata)
    return [struct.pack("<Q", len(index)) + index, *(raw(tensors[name]) for name in names)]


def _blob(tensors: Tree) -> bytes:
    """A safetensors file."""
    return b"".join(file_views(tensors))


def _blob_size(tensors: Tree) -> int:
    return 8 + len(_index(tensors)[0]) + num_bytes(tensors)


def _index(tensors: Tree, metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[str]]:
    """The header of a safetensors file, which names the leaves in the tree's order, and the order in which they follow it."""
    return _index_of(Spec.of(tensors), None if metadata is None else tuple(metadata.items()))


# The clients of a round answer with the same names and shapes.
@lru_cache(maxsize=32)
def _index_of(spec: Spec, metadata: tuple[tuple[str, str], ...] | None) -> tuple[bytes, list[str]]:
    by_name = spec.by_name
    # Widest type first, so that each leaf is aligned.
    names = sorted(by_name, key=lambda name: -by_name[name][1].itemsize)
    index: dict[str, dict[str, Any]] = {name: {} for name in by_name}
    if metadata is not None:
        index = {"__metadata__": dict(metadata), **index}
    start = 0
    for name in names:
        shape, dtype = by_name[name]
        if dtype not in _DTYPES:
            raise MessageError(f"Tensor {name!r} is {str(dtype)[6:]}; a message carries {', '.join(str(dtype)[6:] for dtype in _DTYPES)}.")
        end = start + math.prod(shape) * dtype.itemsize
        index[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    head = json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode()
    return head.ljust(math.ceil(len(head) / 8) * 8), names


class Source(Protocol):
    """Bytes that lie somewhere and are read in pieces."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def read(self, start: int, stop: int) -> bytes | bytearray | memoryview:
        """Those from ``start`` to ``stop``."""
        ...


class _Held(NamedTuple):
    """Bytes in memory."""

    view: memoryview

    @property
    def size(self) -> int:
        return len(self.view)

    def read(self, start: int, stop: int) -> memoryview:
        return self.view[start:stop]


def unpack(data: bytes | memoryview, max_bytes: int | None = None, max_tensors: int = MAX_TENSORS) -> Message:
    """The message in ``data``, checked.

    Raises:
        MessageError: on anything that :func:`pack` could not have made, more than ``max_bytes`` of it, or more than ``max_tensors`` in it.
    """
    return _unpacked(_Held(memoryview(data).cast("B")), max_bytes, max_tensors, is_lazy=False)


def unpack_from(source: Source, max_bytes: int | None = None, max_tensors: int = MAX_TENSORS) -> Message:
    """The message in ``source``: header and index are checked now, and its tensors are read when they are used (:class:`~fedfm.core.tree.LazyTree`).

    Raises:
        MessageError: as :func:`unpack`, where the header or the index shows it.
    """
    return _unpacked(source, max_bytes, max_tensors, is_lazy=True)


def _unpacked(source: Source, max_bytes: int | None, max_tensors: int, is_lazy: bool) -> Message:
    if max_bytes is not None and source.size > max_bytes:
        raise MessageError(f"A message of {source.size} bytes arrived where at most {max_bytes} are allowed.")
    if source.size < 4:
        raise MessageError(f"A message of {source.size} bytes is too short to be one.")
    (n,) = struct.unpack("<I", source.read(0, 4))
    if n > MAX_HEADER or 4 + n > source.size:
        raise MessageError(f"A message claims a header of {n} bytes; at most {min(MAX_HEADER, source.size - 4)} are possible.")
    head, start = _head(source.read(4, 4 + n)), 4 + n
    own_bytes = head.get("own_bytes", 0)
    if not isinstance(own_bytes, int) or isinstance(own_bytes, bool) or not 0 <= own_bytes <= source.size - start:
        raise MessageError(f"A message claims {own_bytes!r} bytes of its own.")
    own_tensors = _load(source, start, start + own_bytes, max_tensors, is_lazy=False) if own_bytes else {}
    kind, start = head.get("kind"), start + own_bytes
    tensors = _load(source, start, source.size, max_tensors, is_lazy) if kind != "failure" else {}
    if own_bytes and kind != "request":
        raise MessageError("Only a request has tensors of its own.")
    if kind == "failure":
        return Failure(_text(head, "client"), _text(head, "stage"), _text(head, "reason"))
    meta = _scalars(head, "meta")
    number = head.get("round")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise MessageError(f"A message's round is {number!r}, not a count.")
    if kind == "request":
        return Request(Body(_text(head, "verb"), number, tensors, meta), _scalars(head, "own"), own_tensors)
    if kind == "reply":
        return Reply(_text(head, "client"), _text(head, "verb"), number, tensors, meta)
    raise MessageError(f"A message of unknown kind {kind!r} arrived.")


def _head(text: bytes | bytearray | memoryview) -> dict[str, Any]:
    try:
        head = json.loads(str(text, "utf-8"))
        # Half of a surrogate pair is legal in JSON and can be neither written nor shown.
        json.dumps(head, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise MessageError(f"A message's header is not JSON: {error}.") from error
    version = head.get("v") if isinstance(head, dict) else None
    if version != VERSION:
        raise MessageError(f"A message of version {version!r} arrived; this side speaks {VERSION}.")
    return head  # type: ignore[no-any-return]


class _Place(NamedTuple):
    """Where a tensor is: bytes ``first`` to ``last`` after the index."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    last: int


class _Unread(LazyTree):
    """The tensors of a safetensors file that is read when they are used.

    Args:
        start: Where the tensors begin in ``source``.
    """

    def __init__(self, source: Source, start: int, places: Sequence[_Place]) -> None:
        names, shapes, dtypes = (tuple(place[i] for place in places) for i in (0, 2, 1))
        super().__init__(Spec(names, shapes, dtypes))  # type: ignore[arg-type]
        self._source, self._start, self._places = source, start, {place.name: place for place in places}

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The values of a leaf, read now."""
        _, dtype, _, first, last = self._places[name]
        step = PIECE * dtype.itemsize
        for begin in range(first, last, step):
            end = min(begin + step, last)
            data = bytearray(self._source.read(self._start + begin, self._start + end))
            yield _tensor(data, dtype, ((end - begin) // dtype.itemsize,), 0, end - begin)


def _load(source: Source, start: int, stop: int, most: int, is_lazy: bool) -> Tree:
    """The tensors of a safetensors file as :func:`_blob` writes it. All of its index is checked before the first tensor is built."""
    index, data_start = _read_index(source, start, stop, most)
    places = [_Place(name, *_claim(name, entry)) for name, entry in index.items()]
    end = 0
    for place in sorted(places, key=lambda place: (place.first, place.last)):
        if place.first != end:
            raise MessageError(f"A message's tensor {place.name!r} begins at byte {place.first} where {end} is next.")
        end = place.last
    if end != stop - data_start:
        raise MessageError(f"A message's tensors claim {end} bytes and have {stop - data_start}.")
    if is_lazy:
        return _Unread(source, data_start, places)
    data = bytearray(source.read(data_start, stop))
    return {place.name: _tensor(data, place.dtype, place.shape, place.first, place.last) for place in places}


def _read_index(source: Source, start: int, stop: int, most: int) -> tuple[dict[str, Any], int]:
    """The index of a safetensors file from ``start`` to ``stop``, and where its tensors begin."""
    if stop - start < 8:
        raise MessageError("A message's tensors are not safetensors: their index is missing.")
    (length,) = struct.unpack("<Q", source.read(start, start + 8))
    if length > min(stop - start - 8, _INDEX_BYTES * (most + 1)):
        raise MessageError(f"A message's tensors are not safetensors: an index of {length} bytes is claimed.")
    text = bytes(source.read(start + 8, start + 8 + length))
    # Every entry names its place, and counting takes a hundredth of the time that reading takes. One tensor may have that name itself.
    if (entries := text.count(b'"data_offsets"')) > most + 1:
        raise MessageError(f"A message holds {entries} tensors where at most {most} are allowed.")
    try:
        index = json.loads(str(text, "utf-8"))
        json.dumps(index, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise MessageError(f"A message's tensors are not safetensors: {error}.") from error
    if not isinstance(index, dict):
        raise MessageError("A message's tensors are not safetensors: their index names nothing.")
    if len(index) > most:
        raise MessageError(f"A message holds {len(index)} tensors where at most {most} are allowed.")
    return index, start + 8 + length


def _claim(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Type, shape and place of a tensor, checked against each other."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MessageError(f"A message's tensor {name!r} is not safetensors.")
    dtype, shape, offsets = _BY_NAME.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise MessageError(f"A message's tensor {name!r} is {str(entry['dtype'])[:20]}, which no message carries.")
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(map(_is_count, shape)):
        raise MessageError(f"A message's tensor {name!r} claims the shape {str(shape)[:80]}.")
    # An axis of length 0 makes the product small whatever the others claim.
    if math.prod(max(1, axis) for axis in shape) > _MAX_VALUES:
        raise MessageError(f"A message's tensor {name!r} claims the shape {str(shape)[:80]}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise MessageError(f"A message's tensor {name!r} claims the place {str(offsets)[:80]}.")
    first, last = offsets
    if last - first != math.prod(shape) * dtype.itemsize or first % dtype.itemsize:
        raise MessageError(f"A message's tensor {name!r} of shape {shape} claims bytes {first} to {last}.")
    return dtype, tuple(shape), first, last


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_VALUES


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...], first: int, last: int) -> torch.Tensor:
    if first == last:
        return torch.zeros(shape, dtype=dtype)
    if dtype == torch.bool and max(data[first:last]) > 1:
        raise MessageError("A message's tensor of booleans holds something else.")
    return torch.frombuffer(data, dtype=dtype, count=(last - first) // dtype.itemsize, offset=first).view(shape)


def _scalars(head: dict[str, Any], name: Literal["meta", "own"]) -> dict[str, Scalar]:
    value = head.get(name)
    if not isinstance(value, dict) or not all(isinstance(item, Scalar) for item in value.values()):
        raise MessageError(f"A message's {name} must map names to strings or numbers.")
    return value


def _text(head: dict[str, Any], name: Literal["client", "verb", "stage", "reason"]) -> str:
    value = head.get(name)
    if not isinstance(value, str):
        raise MessageError(f"A message's {name} is {value!r}, not text.")
    return value

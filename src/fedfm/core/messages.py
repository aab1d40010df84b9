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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from fedfm.core.errors import MessageError
from fedfm.core.tree import Tree, num_bytes, raw
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
        raise MessageError(f"A message's header has {len(head)} bytes, at most {MAX_HEADER} are allowed. Send what is large as a tensor.")
    return [struct.pack("<I", len(head)) + head + own, shared]


def size(message: Message) -> int:
    """``len(pack(message))`` without copying a tensor."""
    own = _blob_size(message.own_tensors) if isinstance(message, Request) and message.own_tensors else 0
    # Thousands of requests may share a body, which knows its own size.
    shared = message.body.size if isinstance(message, Request) else _blob_size(_tensors(message))
    return 4 + len(_header_bytes(message, own)) + own + shared


def _tensors(message: Message) -> Tree:
    return {} if isinstance(message, Failure) else message.tensors


def _blob(tensors: Tree) -> bytes:
    """A safetensors file."""
    index, names = _index(tensors)
    leaves = [raw(tensors[name]) for name in names]
    return b"".join([struct.pack("<Q", len(index)), index, *leaves])


def _blob_size(tensors: Tree) -> int:
    return 8 + len(_index(tensors)[0]) + num_bytes(tensors)


def _index(tensors: Tree) -> tuple[bytes, list[str]]:
    """The header of a safetensors file, which names the leaves in the tree's order, and the order in which they follow it."""
    # Widest type first, so that each leaf is aligned.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    index: dict[str, dict[str, Any]] = {name: {} for name in tensors}
    start = 0
    for name in names:
        leaf = tensors[name]
        if leaf.dtype not in _DTYPES:
            raise MessageError(
                f"Tensor {name!r} is {str(leaf.dtype)[6:]}; a message carries {', '.join(str(dtype)[6:] for dtype in _DTYPES)}."
            )
        end = start + leaf.numel() * leaf.element_size()
        index[name] = {"dtype": _DTYPES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [start, end]}
        start = end
    head = json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode()
    return head.ljust(math.ceil(len(head) / 8) * 8), names


def unpack(data: bytes | memoryview, max_bytes: int | None = None, max_tensors: int = MAX_TENSORS) -> Message:
    """The message in ``data``, checked.

    Raises:
        MessageError: on anything that :func:`pack` could not have made, more than ``max_bytes`` of it, or more than ``max_tensors`` in it.
    """
    view = memoryview(data).cast("B")
    if max_bytes is not None and len(view) > max_bytes:
        raise MessageError(f"A message of {len(view)} bytes arrived where at most {max_bytes} are allowed.")
    if len(view) < 4:
        raise MessageError(f"A message of {len(view)} bytes is too short to be one.")
    (n,) = struct.unpack("<I", view[:4])
    if n > MAX_HEADER or 4 + n > len(view):
        raise MessageError(f"A message claims a header of {n} bytes; at most {min(MAX_HEADER, len(view) - 4)} are possible.")
    try:
        head = json.loads(str(view[4 : 4 + n], "utf-8"))
        # Half of a surrogate pair is legal in JSON and can be neither written nor shown.
        json.dumps(head, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise MessageError(f"A message's header is not JSON: {error}.") from error
    version = head.get("v") if isinstance(head, dict) else None
    if version != VERSION:
        raise MessageError(f"A message of version {version!r} arrived; this side speaks {VERSION}.")
    own_bytes = head.get("own_bytes", 0)
    if not isinstance(own_bytes, int) or isinstance(own_bytes, bool) or not 0 <= own_bytes <= len(view) - 4 - n:
        raise MessageError(f"A message claims {own_bytes!r} bytes of its own.")
    own_tensors = _load(view[4 + n : 4 + n + own_bytes], max_tensors) if own_bytes else {}
    tensors = _load(view[4 + n + own_bytes :], max_tensors) if head.get("kind") != "failure" else {}
    kind = head.get("kind")
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


def _load(view: memoryview, most: int) -> Tree:
    """The tensors of a safetensors file as :func:`_blob` writes it. All of its index is checked before the first tensor is built."""
    index, start = _read_index(view, most)
    claims: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []
    for name, entry in index.items():
        claims.append((name, *_claim(name, entry)))
    end = 0
    for name, _, _, first, last in sorted(claims, key=lambda claim: claim[3:]):
        if first != end:
            raise MessageError(f"A message's tensor {name!r} begins at byte {first} where {end} is next.")
        end = last
    if end != len(view) - start:
        raise MessageError(f"A message's tensors claim {end} bytes and have {len(view) - start}.")
    data = bytearray(view[start:])
    return {name: _tensor(data, dtype, shape, first, last) for name, dtype, shape, first, last in claims}


def _read_index(view: memoryview, most: int) -> tuple[dict[str, Any], int]:
    if len(view) < 8:
        raise MessageError("A message's tensors are not safetensors: their index is missing.")
    (length,) = struct.unpack("<Q", view[:8])
    if length > min(len(view) - 8, _INDEX_BYTES * (most + 1)):
        raise MessageError(f"A message's tensors are not safetensors: an index of {length} bytes is claimed.")
    text = bytes(view[8 : 8 + length])
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
    return index, 8 + length


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

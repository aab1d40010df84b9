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
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from fedfm.core.errors import MessageError
from fedfm.core.tree import Tree, num_bytes

ClientId = str
VERSION = 2
MAX_HEADER = 1 << 20
Scalar = str | float | int | bool | None
_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Body:
    """What many clients are asked alike: a verb with tensors and metadata. Clients with equal bodies may share a bank.

    Args:
        verb: A runtime refuses verbs it does not know.
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
    def verb(self) -> str:
        """The body's."""
        return self.body.verb

    @property
    def round(self) -> int:
        """The body's."""
        return self.body.round

    @property
    def tensors(self) -> Tree:
        """The body's."""
        return self.body.tensors

    @property
    def meta(self) -> Mapping[str, Scalar]:
        """The body's."""
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
    """A client that did not answer, where it broke, and why.

    Args:
        stage: ``train``, ``evaluate``, ``encode``, ``decode``, ``exchange``...
        reason: One line.
    """

    client: ClientId
    stage: str
    reason: str


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
    """The message as bytes. A body that many requests share is encoded once.

    Raises:
        MessageError: if its header is too long or a tensor's type has no place in a message.
    """
    own = _blob(message.own_tensors) if isinstance(message, Request) and message.own_tensors else b""
    shared = message.body.blob if isinstance(message, Request) else _blob(_tensors(message))
    head = _header_bytes(message, len(own))
    if len(head) > MAX_HEADER:
        raise MessageError(f"A message's header has {len(head)} bytes, at most {MAX_HEADER} are allowed. Send what is large as a tensor.")
    return b"".join([struct.pack("<I", len(head)), head, own, shared])


def size(message: Message) -> int:
    """``len(pack(message))`` without copying a tensor."""
    own = _blob_size(message.own_tensors) if isinstance(message, Request) and message.own_tensors else 0
    # A body is the same for many, who may be thousands.
    shared = message.body.size if isinstance(message, Request) else _blob_size(_tensors(message))
    return 4 + len(_header_bytes(message, own)) + own + shared


def _tensors(message: Message) -> Tree:
    return {} if isinstance(message, Failure) else message.tensors


def _blob(tensors: Tree) -> bytes:
    """A safetensors file."""
    index, names = _index(tensors)
    leaves = [tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data for name in names]
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


def unpack(data: bytes | memoryview, max_bytes: int | None = None) -> Message:
    """The message in ``data``, checked.

    Raises:
        MessageError: on anything that :func:`pack` could not have made, or more than ``max_bytes`` of it.
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
    own_tensors = _load(view[4 + n : 4 + n + own_bytes]) if own_bytes else {}
    tensors = _load(view[4 + n + own_bytes :])
    kind = head.get("kind")
    if kind == "failure" and not tensors:
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


def _load(view: memoryview) -> Tree:
    """The tensors of a safetensors file."""
    try:
        loaded = load_safetensors(bytes(view))
        # A tree has an order, and safetensors does not keep it.
        (length,) = struct.unpack("<Q", view[:8])
        tensors = {name: loaded[name] for name in json.loads(str(view[8 : 8 + length], "utf-8")) if name in loaded}
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise MessageError(f"A message's tensors are not safetensors: {error}.") from error
    for name, leaf in tensors.items():
        if leaf.dtype not in _DTYPES:
            raise MessageError(f"A message's tensor {name!r} is {str(leaf.dtype)[6:]}, which no message carries.")
    return tensors


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

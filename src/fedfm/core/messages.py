"""What crosses a boundary: a small typed header and safetensors bytes.

Layout of a packed message::

    4 bytes   length H of the header, little endian
    H bytes   JSON: version, kind, verb, round, client, meta (strings and numbers only)
    the rest  a safetensors file

Covered here: pickle never appears, sizes are bounded before anything is buffered, the header is
checked field by field. Not covered: who sent it and who can read it (the engine's business).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from fedfm.core.errors import MessageError
from fedfm.core.parts import ClientId
from fedfm.core.tree import Tree, num_bytes

VERSION = 1
MAX_HEADER = 1 << 20
Scalar = str | float | int | bool | None
_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A verb with tensors and metadata, for one client.

    Args:
        verb: ``describe``, ``train``, ``evaluate``, ``stop``; a runtime refuses verbs it does not know.
        round: The round it belongs to; 0 before the first.
        tensors: What the verb needs (the global parameters).
        meta: Small scalars.
    """

    verb: str
    round: int = 0
    tensors: Tree = field(default_factory=dict)
    meta: Mapping[str, Scalar] = field(default_factory=dict)


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


def _header(message: Message) -> dict[str, Any]:
    if isinstance(message, Request):
        return {"v": VERSION, "kind": "request", "verb": message.verb, "round": message.round, "meta": dict(message.meta)}
    if isinstance(message, Reply):
        return {"v": VERSION, "kind": "reply", "verb": message.verb, "round": message.round, "client": message.client, "meta": dict(message.meta)}
    return {"v": VERSION, "kind": "failure", "client": message.client, "stage": message.stage, "reason": message.reason}


def _header_bytes(message: Message) -> bytes:
    return json.dumps(_header(message), allow_nan=True, separators=(",", ":")).encode()


def pack(message: Message) -> bytes:
    """The message as bytes."""
    head = _header_bytes(message)
    tensors = {} if isinstance(message, Failure) else {name: t.detach().cpu().contiguous() for name, t in message.tensors.items()}
    return struct.pack("<I", len(head)) + head + save_safetensors(tensors)


def size(message: Message) -> int:
    """``len(pack(message))`` without copying a tensor."""
    tensors = {} if isinstance(message, Failure) else message.tensors
    start, index = 0, {}
    # safetensors lays tensors out by decreasing alignment, then name; the header's length depends on the offsets' digits.
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), _rank(item[1].dtype), item[0])):
        n = t.numel() * t.element_size()
        index[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + n]}
        start += n
    head = len(json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode())
    return 4 + len(_header_bytes(message)) + 8 + math.ceil(head / 8) * 8 + num_bytes(tensors)


def _rank(dtype: torch.dtype) -> int:
    # safetensors orders dtypes by its own enumeration, widest first; ties are broken by this.
    order = ["I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL"]
    return order.index(_DTYPES[dtype])


def unpack(data: bytes | memoryview, max_bytes: int | None = None) -> Message:
    """The message in ``data``, checked.

    Raises:
        MessageError: on anything that :func:`pack` could not have made, or more than ``max_bytes`` of it.
    """
    data = bytes(data)
    if max_bytes is not None and len(data) > max_bytes:
        raise MessageError(f"A message of {len(data)} bytes arrived where at most {max_bytes} are allowed.")
    if len(data) < 4:
        raise MessageError(f"A message of {len(data)} bytes is too short to be one.")
    (n,) = struct.unpack("<I", data[:4])
    if n > MAX_HEADER or 4 + n > len(data):
        raise MessageError(f"A message claims a header of {n} bytes; at most {min(MAX_HEADER, len(data) - 4)} are possible.")
    try:
        head = json.loads(data[4 : 4 + n])
    except (ValueError, RecursionError) as error:
        raise MessageError(f"A message's header is not JSON: {error}.") from error
    if not isinstance(head, dict) or head.get("v") != VERSION:
        raise MessageError(f"A message of version {head.get('v') if isinstance(head, dict) else None!r} arrived; this side speaks {VERSION}.")
    kind = head.get("kind")
    if kind == "failure":
        return Failure(_text(head, "client"), _text(head, "stage"), _text(head, "reason"))
    try:
        tensors = load_safetensors(data[4 + n :])
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise MessageError(f"A message's tensors are not safetensors: {error}.") from error
    meta = head.get("meta")
    if not isinstance(meta, dict) or not all(isinstance(v, Scalar) for v in meta.values()):
        raise MessageError("A message's meta must map names to strings or numbers.")
    number = head.get("round")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise MessageError(f"A message's round is {number!r}.")
    if kind == "request":
        return Request(_text(head, "verb"), number, tensors, meta)
    if kind == "reply":
        return Reply(_text(head, "client"), _text(head, "verb"), number, tensors, meta)
    raise MessageError(f"A message of unknown kind {kind!r} arrived.")


def _text(head: dict[str, Any], name: Literal["client", "verb", "stage", "reason"]) -> str:
    value = head.get(name)
    if not isinstance(value, str):
        raise MessageError(f"A message's {name} is {value!r}, not text.")
    return value

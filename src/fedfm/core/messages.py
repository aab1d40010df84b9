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
        return {
            "v": VERSION,
            "kind": "reply",
            "verb": message.verb,
            "round": message.round,
            "client": message.client,
            "meta": dict(message.meta),
        }
    return {"v": VERSION, "kind": "failure", "client": message.client, "stage": message.stage, "reason": message.reason}


def _header_bytes(message: Message) -> bytes:
    return json.dumps(_header(message), allow_nan=True, separators=(",", ":")).encode()


def pack(message: Message) -> bytes:
    """The message as bytes.

    Raises:
        MessageError: if its header is too long or a tensor's type has no place in a message.
    """
    head, tensors = _header_bytes(message), _tensors(message)
    if len(head) > MAX_HEADER:
        raise MessageError(f"A message's header has {len(head)} bytes, at most {MAX_HEADER} are allowed. Send what is large as a tensor.")
    index, names = _index(tensors)
    leaves = [tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data for name in names]
    return b"".join([struct.pack("<I", len(head)), head, struct.pack("<Q", len(index)), index, *leaves])


def size(message: Message) -> int:
    """``len(pack(message))`` without copying a tensor."""
    tensors = _tensors(message)
    return 4 + len(_header_bytes(message)) + 8 + len(_index(tensors)[0]) + num_bytes(tensors)


def _tensors(message: Message) -> Tree:
    return {} if isinstance(message, Failure) else message.tensors


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
    try:
        loaded = load_safetensors(bytes(view[4 + n :]))
        # A tree has an order, and safetensors does not keep it.
        (length,) = struct.unpack("<Q", view[4 + n : 12 + n])
        tensors = {name: loaded[name] for name in json.loads(str(view[12 + n : 12 + n + length], "utf-8")) if name in loaded}
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise MessageError(f"A message's tensors are not safetensors: {error}.") from error
    for name, leaf in tensors.items():
        if leaf.dtype not in _DTYPES:
            raise MessageError(f"A message's tensor {name!r} is {str(leaf.dtype)[6:]}, which no message carries.")
    kind = head.get("kind")
    if kind == "failure" and not tensors:
        return Failure(_text(head, "client"), _text(head, "stage"), _text(head, "reason"))
    meta = head.get("meta")
    if not isinstance(meta, dict) or not all(isinstance(value, Scalar) for value in meta.values()):
        raise MessageError("A message's meta must map names to strings or numbers.")
    number = head.get("round")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise MessageError(f"A message's round is {number!r}, not a count.")
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

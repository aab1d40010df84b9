"""Unbiased stochastic quantisation, block by block.

Alistarh, Grubic, Li, Tomioka, Vojnovic, `QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding
<https://arxiv.org/abs/1610.02132>`_, 2016. We scale by the largest magnitude of a block instead of its norm, which has less variance.

A leaf ``w`` of n values travels as ``w`` (codes), ``w::scale`` (one float32 per block) and, where the receiver has no parameter of
that name, ``w::shape``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from fedfm.core.errors import ConfigError, MessageError
from fedfm.core.keys import Key
from fedfm.core.parts import RoundContext, Traits, Transform, Tree, Update, traits
from fedfm.core.tree import added

_SCALE, _SHAPE = "::scale", "::shape"


@dataclass(frozen=True)
class Int8(Transform):
    """``floor(127 x / s + u)`` with ``s`` the block's largest magnitude and ``u`` uniform in [0, 1): ``E[decode(encode(x))] = x``, error below ``s / 127``.

    Blocks of one magnitude come back exactly. Integer leaves, and those that a method adds (SCAFFOLD's control variates), pass whole.

    Args:
        block: Values that share a scale; 4 bytes each ``block`` bytes.

    Raises:
        ConfigError: if ``block`` is less than 1.
    """

    concerns = ("compression",)

    block: int = 1024

    def __post_init__(self) -> None:
        _require_block(self)

    def traits(self) -> Traits:
        """Computes with the values and leaves codes."""
        return traits(needs=["float-leaves"], hides=["float-leaves"])

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Encodes values as codes and scales."""
        return update.with_payload(dict(_encode(update.payload, 127, self.block, ctx.params, ctx.draw("int8")))), memory

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """Decodes codes and scales to values."""
        return update.with_payload(dict(_decode(update.payload, 127, self.block, ctx.params)))


@dataclass(frozen=True)
class Int4(Transform):
    """:class:`Int8` with 7 levels on each side of zero, two codes in a byte; error below ``s / 7``.

    Args:
        block: Values that share a scale.

    Raises:
        ConfigError: if ``block`` is less than 1.
    """

    concerns = ("compression",)

    block: int = 1024

    def __post_init__(self) -> None:
        _require_block(self)

    def traits(self) -> Traits:
        """Computes with the values and leaves codes."""
        return traits(needs=["float-leaves"], hides=["float-leaves"])

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Encodes values as codes and scales."""
        return update.with_payload(dict(_encode(update.payload, 7, self.block, ctx.params, ctx.draw("int4")))), memory

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """Decodes codes and scales to values."""
        return update.with_payload(dict(_decode(update.payload, 7, self.block, ctx.params)))


def _require_block(part: Int8 | Int4) -> None:
    if part.block < 1:
        raise ConfigError(f"{type(part).__name__}.block is {part.block}; a block has at least 1 value.")


def _encode(payload: Tree, levels: int, block: int, params: Tree, key: Key) -> Iterator[tuple[str, torch.Tensor]]:
    generator = key.generator()
    for name, leaf in payload.items():
        if added(name, params) or not leaf.is_floating_point():
            yield name, leaf
            continue
        x_bs = _blocks(leaf.detach().cpu().float().reshape(-1), block)
        scale_b1 = x_bs.abs().amax(dim=1, keepdim=True)
        y_bs = x_bs / scale_b1.where(scale_b1 > 0, 1.0) * levels
        # Rounding y + u up to the next level is kept out of the code's range.
        code_bs = (y_bs + torch.rand(y_bs.shape, generator=generator)).floor_().clamp_(-levels, levels)
        code_n = code_bs.reshape(-1)[: leaf.numel()].to(torch.int8)
        yield name, code_n if levels > 7 else _pack(code_n)
        yield name + _SCALE, scale_b1.reshape(-1)
        if name not in params:
            yield name + _SHAPE, torch.tensor(leaf.shape, dtype=torch.int64)


def _decode(payload: Tree, levels: int, block: int, params: Tree) -> Iterator[tuple[str, torch.Tensor]]:
    used = set()
    for name, code in payload.items():
        if name.endswith((_SCALE, _SHAPE)):
            continue
        if added(name, params):
            yield name, code
            continue
        if name + _SCALE not in payload:
            if code.is_floating_point():
                raise MessageError(f"Tensor {name!r} arrived without the scales of its quantisation.")
            yield name, code
            continue
        used |= {name + _SCALE} if name in params else {name + _SCALE, name + _SHAPE}
        shape = tuple(params[name].shape) if name in params else _shape(name, payload)
        n, scale_b = math.prod(shape), payload[name + _SCALE]
        expected = (torch.int8, n) if levels > 7 else (torch.uint8, (n + 1) // 2)
        if (code.dtype, tuple(code.shape)) != (expected[0], (expected[1],)):
            raise MessageError(f"Tensor {name!r} has {list(code.shape)} codes of {code.dtype}, expected {expected[1]} of {expected[0]}.")
        if scale_b.dtype != torch.float32 or tuple(scale_b.shape) != (-(-n // block),):
            raise MessageError(
                f"Tensor {name!r} of {n} values in blocks of {block} arrived with {list(scale_b.shape)} scales of {scale_b.dtype}."
            )
        if not bool(((scale_b >= 0) & scale_b.isfinite()).all()):
            raise MessageError(f"Tensor {name!r} has a scale that is negative or not finite.")
        code_n = code if levels > 7 else _unpack(code, n)
        if bool((code_n.abs() > levels).any()) or bool((code_n < -levels).any()):
            raise MessageError(f"Tensor {name!r} has a code beyond {levels}.")
        # Dividing first gives the largest value of a block back exactly.
        x_bs = _blocks(code_n.float() / levels, block) * scale_b[:, None]
        yield name, x_bs.reshape(-1)[:n].reshape(shape).to(params[name].dtype if name in params else torch.float32)
    unused = sorted(name for name in payload if name.endswith((_SCALE, _SHAPE)) and name not in used)
    if unused:
        raise MessageError(f"Tensors {unused[:3]} belong to no quantised tensor.")


def _blocks(x_n: torch.Tensor, block: int) -> torch.Tensor:
    return pad(x_n, (0, -x_n.numel() % block)).view(-1, block)


def _shape(name: str, payload: Tree) -> tuple[int, ...]:
    shape = payload.get(name + _SHAPE)
    if shape is None or shape.dtype != torch.int64 or shape.dim() != 1 or shape.numel() > 8 or bool((shape < 0).any()):
        raise MessageError(f"Tensor {name!r} is no parameter and came without a shape of its own.")
    # An axis of length 0 makes the product small whatever the others claim.
    if math.prod(max(1, n) for n in shape.tolist()) > 1 << 40:
        raise MessageError(f"Tensor {name!r} claims the shape {shape.tolist()}.")
    return tuple(shape.tolist())


def _pack(code_n: torch.Tensor) -> torch.Tensor:
    # Codes -7..7 as 0..14; an odd one out is paired with the code of zero.
    nibble_n2 = pad((code_n + 7).to(torch.uint8), (0, code_n.numel() % 2), value=7).view(-1, 2)
    return nibble_n2[:, 0] | nibble_n2[:, 1] << 4


def _unpack(byte_n: torch.Tensor, n: int) -> torch.Tensor:
    return torch.stack([byte_n & 15, byte_n >> 4], dim=1).reshape(-1)[:n].to(torch.int8) - 7

"""Linear tags of a vector: they find a garbled upload, and who sent it.

With coefficients that all clients draw from the context, a vector of narrow values ``v``, wide values ``y`` and ``33`` numbers ``z`` has the tags ``(33,)``

    sum_j r_j v_j + z_0   and   sum_j R_bj y_j + z_b,  b = 1..32        mod 2^64

Two vectors that differ have the same tags with a chance of at most 2^-32: of narrow values, which differ by less than 2^32, one coefficient of 32 bits
is decided by the others; of wide ones, where a flipped top bit passes half of all coefficients, all of 32 would have to be.

- The *inner* tags are those of the vector before it is masked. ``z`` are random and are themselves part of what is masked and summed, so that a client's
  inner tags say nothing about its vector; the sum of all inner tags is the tags of the sum.
- The *outer* tags are those of the masked vector. The server computes them again when it arrives.
- Tags of *masks* link the two: outer tags less those of the masks are the inner tags (the narrow one modulo 2^32, where masked values wrap). So a client
  that masked another vector than it tagged is found, and nothing is opened for it.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from fedfm.secagg.masks import CHUNK, U32, U64, Stream, chunks

TAGS = 33
"""Tags of a vector: one of the narrow values, 32 of the wide ones."""


class Tagger:
    """Computes tags under one context's coefficients: the wide values first, then chunk by chunk.

    Args:
        seed: 32 bytes that the coefficients are drawn from.
        num_wide: Wide values, ``z`` not counted.
    """

    def __init__(self, seed: bytes, num_wide: int) -> None:
        self._stream, self._buffer = Stream(seed), bytearray(4 * CHUNK)
        self._drawn = np.frombuffer(self._buffer, dtype="<u4")
        self._wide = self._stream.u64((TAGS - 1) * num_wide).reshape(TAGS - 1, num_wide)

    def start(self, wide: U64) -> U64:
        """The tags of a vector whose narrow values are all zero.

        Args:
            wide: The wide values and ``z``.
        """
        total = wide[-TAGS:].copy()
        total[1:] += (self._wide * wide[:-TAGS]).sum(axis=1, dtype=np.uint64)
        return total

    def coefficients(self, size: int) -> npt.NDArray[np.int64]:
        """Those of the next chunk."""
        self._stream.into(self._buffer, 4 * size)
        return self._drawn[:size].astype(np.int64)


def add_chunk(tags: U64, coefficients: npt.NDArray[np.int64], chunk: U32, signed: bool = False) -> None:
    """Adds a chunk of narrow values to the tags.

    Args:
        signed: Whether they are integers with a sign; those of a vector that is masked, and of masks, have none.
    """
    values = (chunk.view("<i4") if signed else chunk).astype(np.int64)
    tags[:1] += np.dot(coefficients, values).astype(np.uint64)


def tags(seed: bytes, wide: U64, narrow: U32, signed: bool = False) -> U64:
    """The tags of a whole vector.

    Args:
        wide: The wide values and ``z``.
    """
    tagger = Tagger(seed, len(wide) - TAGS)
    total = tagger.start(wide)
    for chunk in chunks(narrow):
        add_chunk(total, tagger.coefficients(len(chunk)), chunk, signed)
    return total


def mask_tags(seed: bytes, masks: list[bytes], num_wide: int, num_narrow: int) -> U64:
    """The tags of masks, a row for each seed in ``masks``.

    Args:
        num_wide: Wide values, ``z`` not counted.
    """
    tagger, streams = Tagger(seed, num_wide), [Stream(mask) for mask in masks]
    rows = [tagger.start(stream.u64(num_wide + TAGS)) for stream in streams]
    buffer = bytearray(4 * CHUNK)
    values = np.frombuffer(buffer, dtype="<u4")
    for first in range(0, num_narrow, CHUNK):
        size = min(CHUNK, num_narrow - first)
        coefficients = tagger.coefficients(size)
        for row, stream in zip(rows, streams, strict=True):
            stream.into(buffer, 4 * size)
            add_chunk(row, coefficients, values[:size])
    return np.stack(rows) if rows else np.zeros((0, TAGS), dtype="<u8")


def blinds() -> U64:
    """``z``, from the operating system's generator."""
    return np.frombuffer(secrets.token_bytes(8 * TAGS), dtype="<u8").copy()

"""Masks: the keystream of AES-256-CTR under a 32-byte seed, added to a vector of a ring.

The counter begins at 0, because a seed serves one stream. Values are little endian. The whole trick of the speed is a cached block of zeros that
is encrypted into one buffer, again and again, which then is added in place: all of it stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

CHUNK = 1 << 15
"""Values of a vector that are masked at a time."""
_ZEROS = bytes(4 * CHUNK)
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


class Stream:
    """The keystream of a seed, read from its beginning.

    Args:
        seed: 32 bytes.
    """

    def __init__(self, seed: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        assert len(seed) == 32, len(seed)
        self._cipher: CipherContext = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()

    def into(self, buffer: bytearray | memoryview, size: int) -> None:
        """Writes the next ``size`` bytes into ``buffer``, at most as many as a chunk has."""
        self._cipher.update_into(_ZEROS if size == len(_ZEROS) else memoryview(_ZEROS)[:size], buffer)

    def u64(self, size: int) -> U64:
        """The next ``size`` values of 64 bits."""
        return np.frombuffer(self._cipher.update(bytes(8 * size)), dtype="<u8")


class Masks:
    """Several streams that are added to, or taken from, one vector: its wide values of 64 bits first, then the narrow ones of 32 bits, chunk by chunk.

    Args:
        plus: Seeds of the streams that are added.
        minus: Seeds of those that are subtracted.
    """

    def __init__(self, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
        self._plus, self._minus = [Stream(seed) for seed in plus], [Stream(seed) for seed in minus]
        self._buffer = bytearray(4 * CHUNK)
        self._values: U32 = np.frombuffer(self._buffer, dtype="<u4")

    def add_wide(self, wide: U64) -> None:
        """Masks the wide values in place; comes before the first chunk of narrow ones."""
        for stream in self._plus:
            wide += stream.u64(len(wide))
        for stream in self._minus:
            wide -= stream.u64(len(wide))

    def add_chunk(self, chunk: U32) -> None:
        """Masks the next chunk of narrow values in place."""
        size = len(chunk)
        values = self._values[:size]
        for stream in self._plus:
            stream.into(self._buffer, 4 * size)
            np.add(chunk, values, out=chunk)
        for stream in self._minus:
            stream.into(self._buffer, 4 * size)
            np.subtract(chunk, values, out=chunk)


def chunks(values: U32) -> Iterator[U32]:
    """Views of a vector, a chunk each."""
    for first in range(0, len(values), CHUNK):
        yield values[first : first + CHUNK]


def add_masks(wide: U64, narrow: U32, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Masks a whole vector in place."""
    masks = Masks(plus, minus)
    masks.add_wide(wide)
    for chunk in chunks(narrow):
        masks.add_chunk(chunk)

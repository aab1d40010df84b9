"""Coins that nobody can guess or repeat: cohorts, batches and noise under a privacy promise.

A :class:`Secret` is 32 bytes of the operating system's generator. Each of its streams is AES-256 in counter mode under a key derived from them, and
is given out once. So a run that is killed and resumed never draws the same noise again.

Normal numbers are Box and Muller's transform in float64 of 53-bit uniform numbers. The largest is 8.6, which cuts off a chance of 2^-53. A sum with noise is
rounded to a grid of about 2^-24 standard deviations: the low bits of a float64, which could tell which sums are possible, never leave
(Jin et al., `Are We There Yet? Timing and Floating-Point Attacks on Differential Privacy Systems <https://arxiv.org/abs/2112.05307>`_, 2022).

Covered here: whoever has the run's key, the recipe or an earlier state cannot compute what is drawn. Not covered: a machine whose memory is read; the time
that drawing takes.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from fedfm.core.errors import MissingExtra
from fedfm.core.keys import Key

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 1 << 15  # pairs of normal numbers at once: their temporaries stay in cache
_GRID = 24  # bits below a standard deviation that a noisy sum keeps


class Secret:
    """Where the coins of one round in one house come from.

    Args:
        seed: 32 bytes.

    Example:
        >>> coins = Secret.system()
        >>> bool((coins.stream("noise").uniform(3) < 1).all())
        True
    """

    def __init__(self, seed: bytes) -> None:
        assert len(seed) == 32, len(seed)
        self._seed = seed
        self._given: set[tuple[str | int, ...]] = set()

    @staticmethod
    def system() -> Secret:
        """From the operating system's generator. Nothing can draw the same again."""
        return Secret(os.urandom(32))

    @staticmethod
    def simulated(key: Key) -> Secret:
        """From a run's key, for simulations that can be repeated. It protects nothing: whoever has the key can take the noise away."""
        return Secret(key.fold("simulated coins").digest)

    def stream(self, *names: str | int) -> Stream:
        """The stream of these names, which is given out once.

        Raises:
            AssertionError: if it was given out before: noise that is used twice cancels.
        """
        assert names not in self._given, f"the stream {names} was given out before"
        self._given.add(names)
        tagged = repr([(type(name).__name__, name) for name in names]).encode()
        return Stream(hashlib.blake2b(tagged, key=self._seed, digest_size=32, person=b"fedfm coins").digest())


class Stream:
    """Random numbers one after the other: AES-256 in counter mode.

    Args:
        key: 32 bytes, used for nothing else.

    Raises:
        MissingExtra: if ``cryptography`` is not installed.
    """

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise MissingExtra("cryptography", "privacy", "Noise that nobody can guess") from error
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def bytes(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        return self._cipher.update(bytes(size))

    def words(self, size: int) -> NDArray[np.uint64]:
        """The next ``size`` numbers of 64 bits."""
        return np.frombuffer(self.bytes(8 * size), dtype="<u8")

    def uniform(self, size: int) -> NDArray[np.float64]:
        """The next ``size`` numbers, uniform in (0, 1): the middles of 2^53 equal parts."""
        return ((self.words(size) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, size: int) -> NDArray[np.float64]:
        """The next ``size`` standard normal numbers."""
        out = np.empty(size + size % 2)
        for first in range(0, len(out), 2 * _CHUNK):
            part = out[first : first + 2 * _CHUNK].reshape(-1, 2)
            u_2n = self.uniform(part.size).reshape(2, -1)
            radius_n, angle_n = np.sqrt(-2 * np.log(u_2n[0])), 2 * math.pi * u_2n[1]
            np.multiply(radius_n, np.cos(angle_n), out=part[:, 0])
            np.multiply(radius_n, np.sin(angle_n), out=part[:, 1])
        return out[:size]

    def noisy(self, x: torch.Tensor, std: float) -> torch.Tensor:
        """``x`` with normal noise of standard deviation ``std`` on each value, float64, on a grid of about ``2^-24 std``. With ``std=0`` it is ``x``."""
        x = x.detach().cpu().double()
        if std == 0:
            return x
        noise = torch.from_numpy(self.normal(x.numel())).view(x.shape)
        grid = 2.0 ** (math.floor(math.log2(std)) - _GRID)
        return noise.mul_(std).add_(x).div_(grid).round_().mul_(grid)


class _Words(Protocol):
    @property
    def is_(self) -> frozenset[str]: ...


class _HasTraits(Protocol):
    def traits(self) -> _Words: ...


def coins(parts: Iterable[_HasTraits], key: Key) -> Secret | None:
    """Where the coins of a plan come from: nowhere without a privacy promise, from ``key`` where the promise is simulated, else from the system.

    Args:
        key: Names the round, and the client in a client's house.
    """
    kinds = [words for part in parts if "private" in (words := part.traits().is_)]
    if not kinds:
        return None
    return Secret.simulated(key) if all("simulated" in words for words in kinds) else Secret.system()

"""Skellam noise: integers whose sum over clients is distributed like one of them, so that each adds its share inside a secure sum.

Agarwal, Kairouz, Liu, `The Skellam Mechanism for Differentially Private Federated Learning <https://arxiv.org/abs/2110.04995>`_, 2021, Theorem 3.5: of an
integer vector whose sensitivity is ``D1`` and ``D2`` in the two norms, with noise of variance ``v`` on each value, at integer orders ``a > 1``::

    rdp(a) <= a D2^2 / (2 v) + min(((2 a - 1) D2^2 + 6 D1) / (4 v^2), 3 D1 / (2 v))

Here ``v = (z D2)^2``, ``D1 <= sqrt(d) D2`` and ``D2 >= (SCALE + 1) sqrt(d)``, so that the bound depends on ``z`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedfm.core.errors import MissingExtra
from fedfm.core.secret import Stream

SCALE = 32.0
"""Integers of a value as long as the bound, over the root of the number of values."""
_ORDERS = np.arange(2, 513, dtype=np.float64)
_REACH = 9.5  # standard deviations that the table holds; beyond lies less than 2^-64
_CHUNK = 1 << 16
_BITS = 18  # of a random number that choose its bucket


def rdp(noise: float) -> NDArray[np.float64]:
    """The Renyi divergence at the orders 2 to 512 of one release.

    Args:
        noise: ``z``, above 0.
    """
    square = noise * noise
    second = ((2 * _ORDERS - 1) + 6 / SCALE) / (4 * square * square * (SCALE + 1) ** 2)
    third = 3 / (2 * square * SCALE)
    bound: NDArray[np.float64] = _ORDERS / (2 * square) + np.minimum(second, third)
    return bound


def epsilon_of_rdp(releases: Sequence[tuple[float, int]], delta: float) -> float:
    """Epsilon of releases together.

    Args:
        releases: The multiplier ``z`` of each kind, and how many there are.

    Raises:
        MissingExtra: if ``dp-accounting`` is not installed.
    """
    try:
        from dp_accounting.rdp import compute_epsilon
    except ImportError as error:
        raise MissingExtra("dp-accounting", "privacy", "To compute an epsilon") from error
    return float(compute_epsilon(_ORDERS, np.sum([number * rdp(noise) for noise, number in releases], axis=0), delta)[0])


def draw(stream: Stream, size: int, variance: float) -> NDArray[np.int64]:
    """``size`` integers of the Skellam distribution with mean 0, by inversion of its distribution function in units of 2^-64.

    Each value's distribution is within ``2^-64`` times the length of the table of the true one.
    """
    table, guide, first = _table(variance)
    out = np.empty(size, dtype=np.int64)
    for begin in range(0, size, _CHUNK):
        words = stream.words(min(_CHUNK, size - begin))
        bucket = (words >> np.uint64(64 - _BITS)).astype(np.int64)
        found = guide[bucket]
        # In most buckets the distribution function makes no step, so that the leading bits decide.
        unsure = np.flatnonzero(found != guide[bucket + 1])
        found[unsure] = np.searchsorted(table, words[unsure], side="right")
        out[begin : begin + len(words)] = found
    return out + first


@lru_cache(maxsize=8)
def _table(variance: float) -> tuple[NDArray[np.uint64], NDArray[np.int32], int]:
    """Where the distribution function steps, in units of 2^-64; how many steps are below each bucket of leading bits; the integer before the first."""
    from scipy.special import ive

    reach = math.ceil(_REACH * math.sqrt(variance)) + 10
    share_k = ive(np.abs(np.arange(-reach, reach + 1)), variance)
    # Both tails are summed from their ends, where what is small is not lost beside what is large.
    lower_k = np.cumsum(share_k)[:-1] / share_k.sum()
    upper_k = np.cumsum(share_k[::-1])[:-1][::-1] / share_k.sum()
    low = lower_k < 0.5
    steps = np.empty(len(lower_k), dtype=np.uint64)
    steps[low] = (lower_k[low] * 2.0**64).astype(np.uint64)
    steps[~low] = np.uint64(2**64 - 1) - (upper_k[~low] * 2.0**64).astype(np.uint64)
    begins = np.arange(1 << _BITS, dtype=np.uint64) << np.uint64(64 - _BITS)
    guide = np.append(np.searchsorted(steps, begins, side="right"), len(steps)).astype(np.int32)
    return steps, guide, -reach

"""Shamir's secret sharing of 256-bit elements: any ``threshold`` shares give the secret, fewer say nothing about it.

Shamir, `How to share a secret <https://doi.org/10.1145/359168.359176>`_, 1979. The field has the largest prime below ``2^256``, so that an element
is 32 bytes and, but for 1 in 2^248, a key.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache

PRIME = 2**256 - 189
SIZE = 32
"""Bytes of an element."""


def draw() -> int:
    """A secret, from the operating system's generator."""
    return secrets.randbelow(PRIME)


def split(secret: int, threshold: int, points: Sequence[int]) -> list[int]:
    """A share for each point.

    Args:
        secret: In ``0..PRIME-1``.
        threshold: How many shares open it, from 1 to the number of points.
        points: Distinct, from 1 on.

    Example:
        >>> shares = split(42, 2, [1, 2, 3])
        >>> combine([1, 3], [shares[0], shares[2]])
        42
    """
    assert 0 <= secret < PRIME and 1 <= threshold <= len(points) and 0 not in points, (threshold, points)
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    shares = []
    for point in points:
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * point % PRIME
        shares.append((value + secret) % PRIME)
    return shares


def combine(points: Sequence[int], shares: Sequence[int]) -> int:
    """The secret of these shares: the value at 0 of the polynomial through them."""
    return sum(weight * share for weight, share in zip(_weights(tuple(points)), shares, strict=True)) % PRIME


@lru_cache(maxsize=4096)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0: ``prod_j x_j / (x_j - x_i)``."""
    weights = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


def to_bytes(element: int) -> bytes:
    """32 bytes, big endian."""
    return element.to_bytes(SIZE, "big")


def from_bytes(data: bytes) -> int:
    """Undoes :func:`to_bytes`.

    Raises:
        ValueError: if it is no element.
    """
    element = int.from_bytes(data, "big")
    if len(data) != SIZE or element >= PRIME:
        raise ValueError("no element of the field")
    return element

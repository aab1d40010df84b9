"""Clip and noise of one release.

Balle, Wang, `Improving the Gaussian Mechanism for Differential Privacy <https://arxiv.org/abs/1805.06530>`_, 2018: noise of ``s`` times the bound gives
``(epsilon, delta)`` exactly if ``delta >= Phi(1 / 2s - epsilon s) - exp(epsilon) Phi(-1 / 2s - epsilon s)``.
"""

from __future__ import annotations

import math

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.tree import Tree, norm


def noise_multiplier(epsilon: float, delta: float) -> float:
    """The smallest ``s`` for one release of which a unit is added or removed, to ten digits.

    Raises:
        ConfigError: if a number is out of range.

    Example:
        >>> round(noise_multiplier(1.0, 1e-5), 6)
        3.730632
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ConfigError(f"epsilon is {epsilon}; it must be a finite number above 0.")
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta}; it is the chance that the guarantee fails, above 0 and below 1.")
    low, high = 0.0, 1.0
    while _delta_of(high, epsilon) > delta:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta_of(middle, epsilon) > delta else (low, middle)
    return high


def _delta_of(noise: float, epsilon: float) -> float:
    below = _phi(1 / (2 * noise) - epsilon * noise)
    # The second term's logarithm: exp(epsilon) alone overflows.
    tail = _phi(-1 / (2 * noise) - epsilon * noise)
    return below - (math.exp(epsilon + math.log(tail)) if tail > 0 else 0.0)


def _phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def noisy(update: Tree, bound: float, multiplier: float, key: Key) -> dict[str, torch.Tensor]:
    """The update shortened to ``bound``, with Gaussian noise of ``multiplier * bound`` on each value.

    The noise is drawn from ``key``, so it can be repeated: it is for tests and comparisons, and protects nobody.
    """
    scale = min(1.0, bound / max(norm(update), 1e-300))
    generator = key.generator()
    return {name: leaf.cpu() * scale + multiplier * bound * torch.randn(leaf.shape, generator=generator) for name, leaf in update.items()}

"""Canary owners: made-up owners whose presence an audit tries to see.

Each canary has numbers of the model for itself and moves only those, by plus or minus one length drawn by coins, so that canaries do not disturb each other and all
of them together touch every number. They are far longer than any bound allows, and turn around after each round: noise that is the same in
every round then takes itself away, and noise that is new does not.

A fair coin decides for each canary whether it is in the run. Directions and coins come from the operating system and leave no file.

Covered here: promises to owners that are kept by a clip and noise on the sum of their updates. Not covered: rows inside an owner
(:mod:`fedfm.run.audit_rows`), and whatever a canary does not do, such as sending a message that no client sends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fedfm.core.errors import ConfigError
from fedfm.core.secret import Secret

if TYPE_CHECKING:
    from numpy.typing import NDArray

LONG = 64.0  # a canary's length, in units of the bound


@dataclass(frozen=True)
class Canaries:
    """Canaries of a model with ``d`` numbers.

    Args:
        owner_d: ``(d,)``, which canary a number belongs to.
        sign_d: ``(d,)``, plus or minus 1.
        present_n: ``(n,)``, the secret coins.
    """

    owner_d: NDArray[np.int64]
    sign_d: NDArray[np.float64]
    present_n: NDArray[np.bool_]

    @staticmethod
    def drawn(num_canaries: int, size: int, coins: Secret) -> Canaries:
        """Canaries for ``size`` numbers.

        Raises:
            ConfigError: if there are fewer numbers than canaries.
        """
        if size < num_canaries:
            raise ConfigError(f"{num_canaries} canaries need as many numbers of the model, and there are {size}. Take fewer canaries.")
        place_d = np.argsort(coins.stream("places").words(size), kind="stable")
        owner_d = np.empty(size, dtype=np.int64)
        owner_d[place_d] = np.arange(size) % num_canaries
        sign_d = 1.0 - 2.0 * (coins.stream("signs").words(size) & np.uint64(1)).astype(np.float64)
        present_n = (coins.stream("coins").words(num_canaries) & np.uint64(1)).astype(bool)
        return Canaries(owner_d, sign_d, present_n)

    def __len__(self) -> int:
        return len(self.present_n)

    @cached_property
    def _places(self) -> list[NDArray[np.int64]]:
        """The numbers of each canary."""
        return np.split(np.argsort(self.owner_d, kind="stable"), np.cumsum(self.size_n)[:-1])

    @property
    def size_n(self) -> NDArray[np.int64]:
        """``(n,)``, how many numbers each canary has."""
        return np.bincount(self.owner_d, minlength=len(self))

    def update(self, canary: int, round: int, length: float) -> NDArray[np.float64]:
        """``(d,)``, what a canary sends in a round."""
        mine, update_d = self._places[canary], np.zeros(len(self.owner_d))
        update_d[mine] = turn(round) * length / math.sqrt(len(mine)) * self.sign_d[mine]
        return update_d

    def seen(self, sum_d: NDArray[np.float64], round: int) -> NDArray[np.float64]:
        """``(n,)``, the part of each canary in a sum of round ``round``: its length where it was in, 0 where it was not."""
        return turn(round) * np.bincount(self.owner_d, self.sign_d * sum_d, len(self)) / np.sqrt(self.size_n)


def turn(round: int) -> float:
    """Which way canaries go in a round."""
    return 1.0 if round % 2 else -1.0

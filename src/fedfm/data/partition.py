"""Simulated owners: rules that divide rows among clients, each row to exactly one.

Hsu, Qi, Brown, `Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification <https://arxiv.org/abs/1909.06335>`_, 2019 (Dirichlet over labels);
McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
<https://arxiv.org/abs/1602.05629>`_, 2017 (IID, shards);
Li, Diao, Chen, He, `Federated Learning on Non-IID Data Silos
<https://arxiv.org/abs/2102.02079>`_, 2022 (quantity skew).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedfm.core.batch import IntArray
from fedfm.core.errors import ConfigError
from fedfm.core.parts import Part

_ATTEMPTS = 1000


class Partitioner(Part, ABC):
    """Divides rows among simulated clients.

    Attributes:
        clients: How many.
        label: Column of the label; ``None`` takes the task's.
        needs_label: Whether the rule looks at labels.
    """

    room = "data"
    needs_label: ClassVar[bool] = False
    clients: int
    label: str | None = None

    @abstractmethod
    def assign(self, label_n: IntArray, rng: np.random.Generator) -> IntArray:
        """The client of each row, ``(N,)``.

        Args:
            label_n: The label of each row as a number, in the order in which labels sort; 0 where the rule does not look at labels.
        """


@dataclass(frozen=True)
class IID(Partitioner):
    """Rows at random, sizes equal to within one row.

    Args:
        clients: How many clients.

    Raises:
        ConfigError: if there are fewer rows than clients.
    """

    clients: int

    def __post_init__(self) -> None:
        _require_clients(self)

    def assign(self, label_n: IntArray, rng: np.random.Generator) -> IntArray:
        """The client of each row."""
        _require_rows(self, len(label_n), self.clients)
        return rng.permutation(np.arange(len(label_n)) % self.clients)


@dataclass(frozen=True)
class Dirichlet(Partitioner):
    """Label skew: client k gets a share ``p_lk`` of the rows with label l, ``p_l ~ Dirichlet(alpha, ..., alpha)``.

    With ``alpha -> inf`` every client has the same share of every label; with ``alpha -> 0`` each label has one client.

    Args:
        alpha: Concentration, above 0.
        clients: How many clients.
        label: Column of the label; ``None`` takes the task's.
        min_size: Fewest rows of a client; shares are drawn again until all have them.

    Raises:
        ConfigError: if ``min_size`` cannot be met.
    """

    alpha: float
    clients: int
    label: str | None = None
    min_size: int = 1

    needs_label = True

    def __post_init__(self) -> None:
        _require_clients(self)
        _require_alpha(self, self.alpha)
        if self.min_size < 0:
            raise ConfigError(f"{self!r}: min_size must be 0 or more.")

    def assign(self, label_n: IntArray, rng: np.random.Generator) -> IntArray:
        """The client of each row."""
        _require_rows(self, len(label_n), self.clients * self.min_size)
        groups = [np.flatnonzero(label_n == label) for label in range(label_n.max(initial=-1) + 1)]
        client_n = np.zeros(len(label_n), dtype=np.int64)
        for _ in range(_ATTEMPTS):
            for rows in groups:
                client_n[rng.permutation(rows)] = _divide(len(rows), rng.dirichlet(np.full(self.clients, self.alpha)))
            if np.bincount(client_n, minlength=self.clients).min() >= self.min_size:
                return client_n
        raise ConfigError(
            f"{self!r}: {_ATTEMPTS} draws over {len(label_n)} rows left a client with fewer than min_size={self.min_size}. "
            "Raise alpha, lower min_size or ask for fewer clients."
        )


@dataclass(frozen=True)
class QuantitySkew(Partitioner):
    """Rows at random, sizes ``n_k = p_k n`` with ``p ~ Dirichlet(alpha, ..., alpha)``: unequal owners of equal data.

    With ``alpha -> inf`` it is ``IID``.

    Args:
        alpha: Concentration, above 0.
        clients: How many clients; some may get no rows, and are then left out.
    """

    alpha: float
    clients: int

    def __post_init__(self) -> None:
        _require_clients(self)
        _require_alpha(self, self.alpha)

    def assign(self, label_n: IntArray, rng: np.random.Generator) -> IntArray:
        """The client of each row."""
        return rng.permutation(_divide(len(label_n), rng.dirichlet(np.full(self.clients, self.alpha))))


@dataclass(frozen=True)
class Shards(Partitioner):
    """Rows sorted by label and cut into equal shards, dealt at random: each client sees few labels.

    Args:
        clients: How many clients.
        shards_per_client: Shards that each gets; labels per client are about as many.
        label: Column of the label; ``None`` takes the task's.

    Raises:
        ConfigError: if there are fewer rows than shards.
    """

    clients: int
    shards_per_client: int = 2
    label: str | None = None

    needs_label = True

    def __post_init__(self) -> None:
        _require_clients(self)
        if self.shards_per_client < 1:
            raise ConfigError(f"{self!r}: shards_per_client must be 1 or more.")

    def assign(self, label_n: IntArray, rng: np.random.Generator) -> IntArray:
        """The client of each row."""
        num_shards = self.clients * self.shards_per_client
        _require_rows(self, len(label_n), num_shards)
        shuffled = rng.permutation(len(label_n))
        order = shuffled[np.argsort(label_n[shuffled], kind="stable")]
        owner_of_shard = rng.permutation(np.arange(num_shards) % self.clients)
        client_n = np.empty(len(label_n), dtype=np.int64)
        client_n[order] = owner_of_shard[np.arange(len(label_n)) * num_shards // len(label_n)]
        return client_n


def _divide(n: int, share_k: np.ndarray[tuple[int], np.dtype[np.float64]]) -> IntArray:
    """Clients of ``n`` rows in order, as close to their shares as whole rows allow."""
    ends = np.round(np.cumsum(share_k / share_k.sum()) * n).astype(np.int64)
    return np.repeat(np.arange(len(share_k)), np.diff(ends, prepend=0))


def _require_clients(part: Partitioner) -> None:
    if part.clients < 1:
        raise ConfigError(f"{part!r}: clients must be 1 or more.")


def _require_alpha(part: Partitioner, alpha: float) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"{part!r}: alpha must be a finite number above 0; for equal shares use IID.")


def _require_rows(part: Partitioner, rows: int, needed: int) -> None:
    if rows < needed:
        raise ConfigError(f"{part!r} needs at least {needed} rows, but the source has {rows}. Ask for fewer clients.")

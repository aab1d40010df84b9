"""Small parts that more than one test needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.parts import ClientId
from fedfm.core.tree import Spec, Tree
from fedfm.tuning.base import Tuning, WrappedTuning


@dataclass(frozen=True)
class Hadamard(Tuning):
    """LoHa, as another package would bring it: it reads its adapters and does nothing else."""

    peft_type = "LOHA"

    r: int = 8

    @classmethod
    def from_peft(cls, config, tensors):
        return cls(r=int(config["r"]))

    def attach(self, foundation):
        raise NotImplementedError

    def save(self, foundation, params, folder):
        raise NotImplementedError

    def merge(self, foundation, params):
        raise NotImplementedError


@dataclass(frozen=True)
class Personal(WrappedTuning):
    """Some leaves of ``inner`` train and stay with their client. With an empty ``home`` it is ``inner``.

    Args:
        inner: What trains.
        home: Patterns of the names that stay (``*lora_B*``).
    """

    inner: Tuning
    home: tuple[str, ...] = ()

    def travels(self, spec: Spec) -> tuple[str, ...]:
        return tuple(name for name in self.inner.travels(spec) if not any(fnmatchcase(name, pattern) for pattern in self.home))


@dataclass(frozen=True)
class Ranks(WrappedTuning):
    """Clients with the first rows of ``A`` and columns of ``B`` only. The scale stays that of the full rank.

    Args:
        inner: LoRA of the full rank.
        ranks: Each client's rank; a client that is not named has the full one.

    Raises:
        ConfigError: if a rank is less than 1.
    """

    inner: Tuning
    ranks: tuple[tuple[ClientId, int], ...] = ()

    def __post_init__(self) -> None:
        if any(rank < 1 for _, rank in self.ranks):
            raise ConfigError(f"Ranks.ranks is {self.ranks}; a rank is 1 or more.")

    def own(self, client: ClientId) -> Mapping[str, int]:
        ranks = dict(self.ranks)
        return {"rank": ranks[client]} if client in ranks else {}

    def cut(self, tree: Tree, own: Mapping[str, object]) -> dict[str, torch.Tensor]:
        if "rank" not in own:
            return dict(tree)
        rank = own["rank"]
        return {
            name: leaf[:rank] if name.endswith(".lora_A.weight") else leaf[:, :rank] if name.endswith(".lora_B.weight") else leaf
            for name, leaf in tree.items()
        }

    def pad(self, tree: Tree, spec: Spec, own: Mapping[str, object]) -> dict[str, torch.Tensor]:
        shapes = dict(zip(spec.names, spec.shapes, strict=True))
        full = {name: leaf.new_zeros(shapes[name]) for name, leaf in tree.items()}
        for name, leaf in tree.items():
            full[name][tuple(slice(size) for size in leaf.shape)] = leaf
        return full

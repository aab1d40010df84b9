"""Small parts that more than one test needs."""

from __future__ import annotations

from dataclasses import dataclass

from fedfm.tuning.base import Tuning


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

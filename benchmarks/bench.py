"""A federation that is being timed: its run, its folder, and the tokens of its first round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.bare import Trainer, synchronize
from benchmarks.work import Shape, Size, federation
from fedfm.core.parts import ServerState
from fedfm.core.round import RoundRecord
from fedfm.core.tree import norm, sub
from fedfm.data import plan
from fedfm.federation import Federation
from fedfm.models import Foundation, load
from fedfm.run.folder import read_journal
from fedfm.run.loop import run
from fedfm.simulation import Simulation


@dataclass
class Bench:
    """One shape: the federation, its rivals, and the tokens of its first round."""

    federation: Federation
    shape: Shape
    folder: Path

    def __post_init__(self) -> None:
        self.out = self.folder / "run"
        self.rounds: Iterator[tuple[ServerState, RoundRecord]] = run(self.federation, out=self.out)
        self.start, _ = next(self.rounds)  # round 0: data and model are ready, nothing has trained
        self.after, self.record = next(self.rounds)
        self.house = Simulation.build(self.federation).house
        self.device = self.foundation().device

    @property
    def bank(self) -> int:
        """Clients in a batch: what the recipe says, or what the engine chose."""
        return read_journal(self.out).choices.get("bank", self.shape.clients)

    @property
    def compiled(self) -> bool:
        """Whether the model was compiled."""
        return bool(read_journal(self.out).choices.get("compile", 0))

    def foundation(self) -> Foundation:
        """The base, once more: each rival has its own."""
        return load(self.federation.model, "causal_lm", self.house.labels, self.house.device, self.house.key)

    @cached_property
    def batches_c(self) -> list[list[torch.Tensor]]:
        """The token ids of every step of every client in the first round."""
        house, work, found = self.house, self.federation.local.work, []
        for client in self.record.cohort:
            examples = house.shard(client).train
            index = plan(examples, work, house.key.fold("batches", 1, client), house.key.fold("buckets", 1))
            found.append(
                [torch.from_numpy(np.stack([examples.ids(int(i)) for i in own]).astype(np.int64)).to(self.device) for own in index]
            )
        return found

    def difference(self, trainer: Trainer) -> float:
        """The first round's update against the one-by-one loop's, relative."""
        want = sub({name: p.cpu() for name, p in trainer.one_by_one(self.start.params, self.batches_c).items()}, self.start.params)
        return norm(sub(sub(self.after.params, self.start.params), want)) / norm(want)

    def round(self) -> None:
        """One federated round."""
        next(self.rounds)
        synchronize(self.device)


@contextmanager
def bench(
    folder: Path, size: Size, shape: Shape, steps: int, bank: int | None, device: str, registered: int | None = None, compile: bool = False
) -> Iterator[Bench]:
    """A federation that has played one round."""
    with TemporaryDirectory(dir=folder) as name:
        made = federation(folder, size, shape, registered=registered or 2 * shape.clients, steps=steps, rounds=1_000_000, bank=bank)
        made = replace(made, engine=replace(made.engine, device=device, compile=compile))  # type: ignore[type-var]
        found = Bench(made, shape, Path(name))
        try:
            yield found
        finally:
            found.rounds.close()  # type: ignore[attr-defined]

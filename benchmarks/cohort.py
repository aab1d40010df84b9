"""A federated LoRA round, everything included, against training on the same tokens without federating.

Timed is one step of ``fedfm.run.loop.run``: sampling, the bank, local steps, aggregation, the server's step, and the round's state, journal
and ledger on disk. Against it, in turn and in the same process:

- centralised: a plain PyTorch loop, all rows in one batch, one adapter. The federated round may cost at most 1.05 times as much.
- one by one: the same loop, one client after the other, and the mean.
- peft: one client after the other through ``peft`` and its model's own loss.
- flower: Flower's simulation of the same clients, in its own environment (``python -m benchmarks.peers install``).

Before anything is timed, the first federated round is compared with the one-by-one loop on the same tokens: the update must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks import common
from benchmarks.bare import Trainer, synchronize
from benchmarks.common import Row, say
from benchmarks.peers.run import flower
from benchmarks.work import SHAPES, Shape, Size, federation, parse, workshop
from fedfm.core.parts import ServerState
from fedfm.core.round import RoundRecord
from fedfm.core.tree import norm, sub
from fedfm.data import plan
from fedfm.federation import Federation
from fedfm.models import Foundation, load
from fedfm.run.folder import read_journal
from fedfm.run.loop import run
from fedfm.simulation import Simulation

GPU_SHAPES: tuple[Shape, ...] = (Shape(16, 1, 512), Shape(32, 1, 256), Shape(64, 1, 256))
GPU_SIZES = {
    "100M": Size(hidden=768, layers=12, intermediate=2048, heads=12, vocab=8192, dtype="bfloat16"),
    "300M": Size(hidden=1024, layers=24, intermediate=2816, heads=16, vocab=8192, dtype="bfloat16"),
    "1B": Size(hidden=2048, layers=16, intermediate=8192, heads=32, vocab=8192, dtype="bfloat16"),
}
RIVALS = ("centralised", "one by one", "peft", "flower")


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
    folder: Path, size: Size, shape: Shape, steps: int, bank: int | None, device: str, registered: int | None = None
) -> Iterator[Bench]:
    """A federation that has played one round."""
    with TemporaryDirectory(dir=folder) as name:
        made = federation(folder, size, shape, registered=registered or 2 * shape.clients, steps=steps, rounds=1_000_000, bank=bank)
        made = replace(made, engine=replace(made.engine, device=device))  # type: ignore[type-var]
        found = Bench(made, shape, Path(name))
        try:
            yield found
        finally:
            found.rounds.close()  # type: ignore[attr-defined]


def rows_of(found: Bench, rivals: tuple[str, ...], repetitions: int, size: Size) -> Iterator[Row]:
    """A row for each rival."""
    hand = Trainer.by_hand(found.foundation().model)
    difference = found.difference(hand)
    tolerance = 1e-2 if size.dtype == "float32" else 0.5
    if not difference < tolerance:
        raise SystemExit(
            f"{found.shape}: the federated update differs from the one-by-one loop's by {difference:.1e} of its norm; they do not do the same."
        )
    start, batches_c, device = found.start.params, found.batches_c, found.device
    together, optimizer = [torch.cat(step) for step in zip(*batches_c, strict=True)], hand.optimizer()
    loops: dict[str, Callable[[], object]] = {
        "centralised": lambda: hand.train(together, optimizer),
        "one by one": lambda: hand.one_by_one(start, batches_c),
    }
    if "peft" in rivals:
        peft = Trainer.with_peft(found.foundation().model)
        loops["peft"] = lambda: peft.one_by_one(start, batches_c)

    for rival in rivals:
        say(f"{found.shape}: against {rival}")
        timed = common.pairs(found.round, loops[rival], repetitions).to_row() if rival in loops else flower(found, repetitions)
        yield {
            "benchmark": "cohort",
            **common.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": size.dtype,
            "shape": str(found.shape),
            "steps": len(together),
            "base_params": found.house.foundation.num_params,
            "bank": found.bank,
            "adamw": hand.adamw,
            "difference": difference,
            "against": rival,
            **timed,
        }


def main() -> None:
    """The table."""
    options = common.parser(__doc__)
    options.add_argument("--gpu", choices=GPU_SIZES, help="on an accelerator instead, bf16, with a base of this size")
    options.add_argument("--shapes", help="such as 16x1x64,8x2x128: clients x batch x tokens")
    options.add_argument("--against", default=",".join(RIVALS), help="which of: %(default)s")
    options.add_argument("--vocab", type=int, default=2048, help="of the base (default %(default)s)")
    options.add_argument("--steps", type=int, default=10, help="local steps in a round (default %(default)s)")
    options.add_argument("--repetitions", type=int, default=11, help="pairs timed for each ratio (default %(default)s)")
    options.add_argument("--bank", type=int, help="clients per batch; the engine chooses where this is left out")
    given = options.parse_args()
    rivals = tuple(given.against.split(","))
    if unknown := set(rivals) - set(RIVALS):
        options.error(f"--against {', '.join(sorted(unknown))}: known are {', '.join(RIVALS)}")
    if given.gpu and not torch.cuda.is_available():
        options.error("--gpu: this machine has no CUDA device")
    size, shapes = GPU_SIZES.get(given.gpu, Size(vocab=given.vocab)), GPU_SHAPES if given.gpu else SHAPES
    if given.quick:
        size, shapes, given.steps, given.repetitions = Size(32, 2, 64, 4, 512), (Shape(4, 1, 16),), 2, 2
    if given.shapes:
        shapes = tuple(parse(options, text) for text in given.shapes.split(","))
    if given.gpu:
        # Flower's clients are timed on the CPU, where its simulation packs several at a time.
        rivals = tuple(rival for rival in rivals if rival != "flower")
    rows: list[Row] = []
    with workshop(size) as folder:
        for shape in shapes:
            with bench(folder, size, shape, given.steps, given.bank, "cuda" if given.gpu else "cpu") as found:
                for row in rows_of(found, rivals, given.repetitions, size):
                    rows.append(row)
                    common.save(rows, given.json)
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

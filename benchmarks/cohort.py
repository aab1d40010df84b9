"""A federated LoRA round, everything included, against training on the same tokens without federating.

Timed is one step of ``fedfm.run.loop.run``: sampling, the bank, local steps, aggregation, the server's step, and the round's state, journal
and ledger on disk. Against it, in turn and in the same process:

- centralised: a plain PyTorch loop, all rows in one batch, one adapter. The federated round may cost at most 1.05 times as much.
- one by one: the same loop, one client after the other, and the mean.
- peft: one client after the other through ``peft`` and its model's own loss.
- trainer: ``transformers.Trainer`` with ``peft`` on the same batches as the centralised loop, as people would run it. It needs ``accelerate``.
- flower: Flower's simulation of the same clients, in its own environment (``python -m benchmarks.peers install``).

With ``--compile`` torch compiles both sides, the bank and the loops written by hand, so that compiled is held against compiled and eager against
eager; what others wrote runs as they wrote it.

Before anything is timed, the first federated round is compared with the one-by-one loop on the same tokens: the update must be the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch

from benchmarks import common
from benchmarks.bare import Trainer, huggingface
from benchmarks.bench import Bench, bench
from benchmarks.common import Row, say
from benchmarks.peers.run import flower
from benchmarks.work import SHAPES, Shape, Size, parse, workshop

GPU_SHAPES: tuple[Shape, ...] = (Shape(16, 1, 512), Shape(32, 1, 256), Shape(64, 1, 256))
GPU_SIZES = {
    "100M": Size(hidden=768, layers=12, intermediate=2048, heads=12, vocab=8192, dtype="bfloat16"),
    "300M": Size(hidden=1024, layers=24, intermediate=2816, heads=16, vocab=8192, dtype="bfloat16"),
    "1B": Size(hidden=2048, layers=16, intermediate=8192, heads=32, vocab=8192, dtype="bfloat16"),
}
RIVALS = ("centralised", "one by one", "peft", "trainer", "flower")


def rows_of(found: Bench, rivals: tuple[str, ...], repetitions: int, size: Size) -> Iterator[Row]:
    """A row for each rival."""
    hand = Trainer.by_hand(found.foundation().model)
    if found.compiled:
        hand = hand.compiled()
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
    if "trainer" in rivals and not importlib.util.find_spec("accelerate"):
        say("transformers.Trainer needs accelerate, which is not installed: left out")
        rivals = tuple(rival for rival in rivals if rival != "trainer")
    if "trainer" in rivals:
        loops["trainer"] = huggingface(found.foundation().model, together, found.folder / "trainer")

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
            "compiled": "yes" if found.compiled else "no",
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
    options.add_argument("--compile", action="store_true", help="compile the bank and the loops written by hand")
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
            with bench(folder, size, shape, given.steps, given.bank, "cuda" if given.gpu else "cpu", compile=given.compile) as found:
                for row in rows_of(found, rivals, given.repetitions, size):
                    rows.append(row)
                    common.save(rows, given.json)
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

"""What DP-SGD costs beside plain training: a bank's local work with ExampleDP over the same without, both in one sitting.

``python -m benchmarks.example_dp`` prints a row for each shape. Both take the same number of steps and expect the same batches; seconds are the
process's own (CPU) for each token, so that other work on the machine matters less, and so that the chance of Poisson batches does not. The solving of the noise, once for each
owner in a run, is told beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

from benchmarks.work import SHAPES, Shape, Size, federation, parse, workshop
from fedfm.client.bank import Bank, Job
from fedfm.core.keys import Key
from fedfm.core.secret import Secret
from fedfm.local import AdamW, ExampleDP
from fedfm.simulation import Simulation


def main() -> None:
    """A line of JSON for each shape."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--shapes", nargs="*", help="clients x batch x tokens, such as 16x1x64")
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--rows", type=int, default=64, help="rows of each owner")
    chosen = options.parse_args()
    shapes = [parse(options, text) for text in chosen.shapes] if chosen.shapes else list(SHAPES)
    size = Size()
    with workshop(size) as folder:
        for shape in shapes:
            plan = federation(folder, size, shape, registered=shape.clients, steps=max(1, chosen.rows // shape.batch), rounds=1)
            simulation = Simulation.build(plan)
            print(json.dumps(compared(simulation, shape, chosen.steps, chosen.repeats)), flush=True)


def compared(simulation: Simulation, shape: Shape, steps: int, repeats: int) -> dict[str, object]:
    """Seconds for each token with and without, and their ratio."""
    house = simulation.house
    inner = AdamW(lr=1e-3, steps=steps, batch_size=shape.batch, max_grad_norm=1.0)
    private = ExampleDP(inner, max_norm=1.0, delta=1e-5, noise_multiplier=1.0)
    sets = {client: house.shard(client).train for client in house.clients}
    seconds: dict[str, list[float]] = {"plain": [], "private": []}
    for repeat in range(repeats + 1):
        for name, trainer in (("plain", inner), ("private", private)):
            bank = Bank(house.tuned, house.plan.task, trainer, house.bank.pad_id, house.foundation.device, house.key)
            bank.shares(house.start, sets.values())
            jobs = [Job(client, own, secret=Secret.simulated(Key.root(repeat).fold(client))) for client, own in sets.items()]
            began = time.process_time()
            trained = bank.train(house.start, jobs, repeat + 1)
            spent = (time.process_time() - began) / sum(own.metrics["tokens"] for own in trained)
            if repeat:  # the first is a warm-up
                seconds[name].append(spent)
    began = time.perf_counter()
    solved = replace(private, noise_multiplier=None, epsilon=3.0, rounds=20)
    for own in sets.values():
        solved.noise_of(len(own))
    plain, noisy = (statistics.median(seconds[name]) for name in ("plain", "private"))
    return {
        "shape": str(shape),
        "rows": len(next(iter(sets.values()))),
        "parameters": house.tuned.spec.size,
        "plain_us_per_token": round(1e6 * plain, 2),
        "private_us_per_token": round(1e6 * noisy, 2),
        "ratio": round(noisy / plain, 3),
        "solve_s": round(time.perf_counter() - began, 2),
    }


if __name__ == "__main__":
    main()

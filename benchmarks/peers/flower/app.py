"""Federated averaging of a ``peft`` LoRA in Flower's simulation; prints the seconds of each round. Runs in Flower's own environment.

What is done in its favour: an actor lives as long as the run and keeps model and data between messages, only adapters travel, nothing is
evaluated, and logging is off. A round ends when its aggregate is there.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import load_file

from benchmarks.peers.flower.client import app as client_app

WARMUP = 2


class Timed(FedAvg):  # type: ignore[misc]
    """FedAvg that notes when each round's aggregate is complete."""

    ended: tuple[float, ...] = ()

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """FedAvg's aggregate; notes the time."""
        replies = list(replies)
        failed = [reply.error for reply in replies if reply.has_error()]
        if failed:
            raise RuntimeError(f"round {server_round}: {len(failed)} clients failed: {failed[0]}")
        aggregate = super().aggregate_train(server_round, replies)
        self.ended = (*self.ended, time.perf_counter())
        return aggregate


def main() -> None:
    """Runs one simulation."""
    given = json.loads(sys.argv[1])
    logging.getLogger("flwr").setLevel(logging.ERROR)
    strategy = Timed(
        fraction_train=given["cohort"] / given["registered"],
        fraction_evaluate=0.0,
        min_train_nodes=given["cohort"],
        min_available_nodes=given["registered"],
    )

    def serve(grid: Grid, context: Any) -> None:
        start = ArrayRecord(load_file(Path(given["folder"], "start.safetensors")))
        config = ConfigRecord({name: given[name] for name in ("folder", "steps", "batch", "cpus")})
        strategy.start(grid, start, num_rounds=WARMUP + given["rounds"], train_config=config)

    server = ServerApp()
    server.main()(serve)
    # The driver imports torch before Ray starts; its actors would inherit a thread count that is not theirs.
    os.environ.pop("OMP_NUM_THREADS", None)
    run_simulation(
        server_app=server,
        client_app=client_app,
        num_supernodes=given["registered"],
        backend_config={"client_resources": {"num_cpus": given["cpus"], "num_gpus": 0.0}, "init_args": {"num_cpus": os.cpu_count()}},
    )
    ray.shutdown()
    seconds = [after - before for before, after in zip(strategy.ended, strategy.ended[1:], strict=False)][WARMUP - 1 :]
    if len(seconds) != given["rounds"]:
        raise SystemExit(f"{len(strategy.ended)} of {WARMUP + given['rounds']} rounds were completed")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()

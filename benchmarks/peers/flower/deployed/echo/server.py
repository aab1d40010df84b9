"""Rounds of federated averaging with members that only answer; notes when each round's aggregate is there."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Noted(FedAvg):  # type: ignore[misc]
    """FedAvg that writes down the time at which each round's aggregate is complete."""

    out = ""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """FedAvg's aggregate; notes the time and how many answered."""
        replies = list(replies)
        answered = sum(not reply.has_error() for reply in replies)
        aggregate = super().aggregate_train(server_round, replies)
        with open(self.out, "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(f"{server_round} {answered} {time.time()}\n")
        return aggregate


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Any) -> None:
    """Plays the rounds."""
    config = context.run_config
    strategy = Noted(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=config["members"], min_available_nodes=config["members"]
    )  # fmt: skip
    strategy.out = config["out"]
    arrays = ArrayRecord({"values": Array(np.zeros(config["values"], dtype=np.float32))})
    strategy.start(grid, arrays, num_rounds=config["rounds"])

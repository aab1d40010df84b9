"""Evaluation: per owner and pooled, with the worst owner and the spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.messages import ClientId
from fedfm.core.parts import Part
from fedfm.core.task import Task
from fedfm.core.tree import Tree


@dataclass(frozen=True)
class Evaluate(Part):
    """When and on what the global model is evaluated. Owners answer with sums, so that pooled means the mean over all targets.

    Args:
        every: Rounds between evaluations; the last round is always one. 0 never evaluates.
        max_examples: Of each owner, evenly spread over its test set; ``None`` takes all.
        owners: How many owners are evaluated, evenly spread over all and the same ones each time; ``None`` takes all. What is pooled is theirs alone.

    Raises:
        ConfigError: if a number is out of range.
    """

    room = "observers"

    every: int = 1
    max_examples: int | None = None
    owners: int | None = None

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"Evaluate.every is {self.every}; it must be 0 (never) or more.")
        if self.max_examples is not None and self.max_examples < 1:
            raise ConfigError(f"Evaluate.max_examples is {self.max_examples}; it must be 1 or more.")
        if self.owners is not None and self.owners < 1:
            raise ConfigError(f"Evaluate.owners is {self.owners}; it must be 1 or more, or null for all.")

    def chosen(self, clients: Sequence[ClientId]) -> Sequence[ClientId]:
        """The owners that are evaluated, of all in their fixed order."""
        if self.owners is None or self.owners >= len(clients):
            return clients
        return [clients[i * len(clients) // self.owners] for i in range(self.owners)]

    def due(self, round: int, last: int) -> bool:
        """Whether round ``round`` of ``last`` is evaluated."""
        return self.every > 0 and (round % self.every == 0 or round == last)


def summary(task: Task, sums: Mapping[ClientId, Tree]) -> dict[str, Any]:
    """``pooled`` and per-owner metrics, and of the owners' losses the mean, the worst and the spread (standard deviation).

    Owners without test examples are not among ``owners``; one on whose examples the model gives NaN is, and makes ``pooled`` NaN too.
    """
    owners = {client: task.summarise(own) for client, own in sums.items()}
    owners = {
        client: metrics
        for client, metrics in owners.items()
        if not math.isnan(metrics["loss"]) or float(sums[client].get("targets", torch.zeros(())))
    }
    if not owners:
        return {"pooled": {}, "owners": {}}
    pooled: dict[str, torch.Tensor] = {}
    for client in owners:
        for name, value in sums[client].items():
            pooled[name] = pooled[name] + value if name in pooled else value.clone()
    losses = {client: metrics["loss"] for client, metrics in owners.items()}
    worst = max(losses, key=lambda client: (math.isnan(losses[client]), losses[client]))
    return {
        "pooled": task.summarise(pooled),
        "owners": owners,
        "mean": statistics.fmean(losses.values()),
        "worst": {"owner": worst, "loss": losses[worst]},
        "spread": statistics.pstdev(losses.values()) if all(map(math.isfinite, losses.values())) else math.nan,
    }

"""Counts what a run cost."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fedfm.core.round import RoundRecord


@dataclass(frozen=True)
class Ledger:
    """Totals of a run. A resumed run's equal those of an unbroken one, except ``peak_memory`` and ``seconds``.

    Args:
        rounds: Rounds completed.
        client_rounds: Updates that counted.
        failures: Attempts that failed.
        bytes_up: Bytes of all training replies.
        bytes_down: Bytes of all training requests.
        bytes_evaluate: Bytes of evaluation, both ways.
        steps: Optimizer steps of all clients.
        examples: Examples trained on, repeats counted.
        tokens: Tokens trained on, padding and evaluation not counted.
        flops: Estimate of the arithmetic of training: ``tokens * (4 N + 2 n)``, ``N`` parameters of the base (forward, and backward
            to activations) and ``n`` trainable ones (their gradients); attention's own products are not in it.
        peak_memory: Bytes that this process held at most, on the host or on the accelerator, whichever is more.
        seconds: Wall-clock time of rounds and evaluations.
        privacy: The privacy that was spent, by promise, as :class:`fedfm.core.privacy.Guarantee` tells it; empty where nothing is promised.
        privacy_head: The last line of ``privacy.jsonl`` when this was written.
    """

    rounds: int = 0
    client_rounds: int = 0
    failures: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_evaluate: int = 0
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    flops: int = 0
    peak_memory: int = 0
    seconds: float = 0.0
    privacy: Sequence[Mapping[str, Any]] = ()
    privacy_head: str = ""

    def add(self, record: RoundRecord, flops_per_token: int) -> Ledger:
        """The totals after one more round; round 0 is the evaluation before training."""

        def total(name: str) -> int:
            if not record.clients:
                return int(record.metrics.get(name, 0))
            return sum(int(numbers.get(name, 0)) for numbers in record.clients.values())

        return replace(
            self,
            rounds=record.round,
            client_rounds=self.client_rounds + (len(record.clients) or int(record.metrics.get("num_clients", 0))),
            failures=self.failures + len(record.failures),
            bytes_up=self.bytes_up + record.bytes_up,
            bytes_down=self.bytes_down + record.bytes_down,
            bytes_evaluate=self.bytes_evaluate + int(record.metrics.get("bytes_evaluate", 0)),
            steps=self.steps + total("steps"),
            examples=self.examples + total("examples"),
            tokens=self.tokens + total("tokens"),
            flops=self.flops + total("tokens") * flops_per_token,
            peak_memory=max(self.peak_memory, peak_memory()),
            seconds=self.seconds + sum(record.seconds.values()),
        )

    def counts(self) -> dict[str, int]:
        """The totals that do not depend on time or machine."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int) and name != "peak_memory"}

    def to_json(self) -> dict[str, Any]:
        """The totals as ``ledger.json`` holds them."""
        return {**asdict(self), "privacy": list(self.privacy)}

    @staticmethod
    def from_json(totals: Mapping[str, Any]) -> Ledger:
        """Undoes :meth:`to_json`."""
        return Ledger(**{**totals, "privacy": tuple(totals.get("privacy", ()))})


def peak_memory() -> int:
    """Most bytes that this process has held at once, on the host or on the accelerator, whichever is more."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(host, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)

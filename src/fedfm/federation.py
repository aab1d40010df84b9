"""A whole experiment as a value: one part of each kind.

Variants take a federation and replace a part: ``replace(base, server=FedAdam(lr=0.1))``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal

from fedfm.aggregators import Mean
from fedfm.channels import Plain
from fedfm.core.errors import ConfigError
from fedfm.core.parts import Aggregator, Channel, Engine, LocalTrainer, Method, Part, Sampler, ServerOptimizer, Transform
from fedfm.core.task import Task
from fedfm.data import Data
from fedfm.engines import Embedded
from fedfm.local import AdamW
from fedfm.models import Model
from fedfm.observers import Evaluate, Observer
from fedfm.samplers import All
from fedfm.server import FedAvg
from fedfm.tasks import CausalLM
from fedfm.tuning import LoRA
from fedfm.tuning.base import Tuning


@dataclass(frozen=True)
class Federation:
    """One part of each kind, and the few numbers of the run.

    Args:
        name: Names the run's folder where ``--out`` does not.
        model: The base model.
        data: Who owns what.
        rounds: How many rounds to run in all.
        seed: Root of all randomness.
        min_clients: Fewest updates with which a round counts.
        on_failure: What a client's failure does: ``leave_out`` goes on without it, ``retry`` asks once more and then leaves it out, ``stop`` ends the run.
        deadline: Seconds a client has to answer; ``None`` waits.

    Raises:
        ConfigError: if a number is out of range.
    """

    model: Model
    data: Data
    name: str = "run"
    task: Task = field(default_factory=CausalLM)
    tuning: Tuning = field(default_factory=LoRA)
    local: LocalTrainer = field(default_factory=AdamW)
    sampler: Sampler = field(default_factory=All)
    transforms: tuple[Transform, ...] = ()
    channel: Channel = field(default_factory=Plain)
    aggregator: Aggregator = field(default_factory=Mean)
    server: ServerOptimizer = field(default_factory=FedAvg)
    method: Method | None = None
    engine: Engine = field(default_factory=Embedded)
    evaluate: Evaluate = field(default_factory=Evaluate)
    observers: tuple[Observer, ...] = ()
    rounds: int = 10
    seed: int = 0
    min_clients: int = 1
    on_failure: Literal["leave_out", "retry", "stop"] = "leave_out"
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ConfigError(f"rounds is {self.rounds}; it must be 0 or more.")
        if self.min_clients < 1:
            raise ConfigError(f"min_clients is {self.min_clients}; it must be 1 or more.")
        if self.on_failure not in ("leave_out", "retry", "stop"):
            raise ConfigError(f"on_failure is {self.on_failure!r}; it must be leave_out, retry or stop.")
        if self.deadline is not None and self.deadline <= 0:
            raise ConfigError(f"deadline is {self.deadline} seconds; it must be more than 0, or null to wait.")

    def resolved(self) -> Federation:
        """The federation with its method's parts in place."""
        if self.method is None:
            return self
        applied: Federation = self.method.apply(replace(self, method=None))
        return applied

    def parts(self) -> dict[str, Part]:
        """Every part by its place in the recipe, nested ones too."""
        found: dict[str, Part] = {}

        def visit(place: str, value: object) -> None:
            if isinstance(value, tuple):
                for i, item in enumerate(value):
                    visit(f"{place}.{i}", item)
            elif is_dataclass(value) and isinstance(value, Part):
                found[place] = value
                for item in fields(value):
                    visit(f"{place}.{item.name}", getattr(value, item.name))

        for item in fields(self):
            visit(item.name, getattr(self, item.name))
        return found

"""A whole experiment as a value: one part of each kind.

Variants take a federation and replace a part: ``replace(base, server=FedAdam(lr=0.1))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal, Self

from fedfm.aggregators import Mean
from fedfm.channels import Plain
from fedfm.client.plan import ClientPlan
from fedfm.core import display
from fedfm.core.errors import ConfigError
from fedfm.core.messages import ClientId
from fedfm.core.parts import (
    Aggregator,
    Channel,
    Errand,
    LocalTrainer,
    Method,
    Pacing,
    Part,
    RoundContext,
    Sampler,
    ServerOptimizer,
    ServerState,
    Transform,
)  # fmt: skip
from fedfm.core.task import Task
from fedfm.core.tree import Spec, Tree
from fedfm.data import Data
from fedfm.engines import Embedded, Engine
from fedfm.local import AdamW
from fedfm.models import Model
from fedfm.observers import Evaluate, Observer
from fedfm.pacing import Barrier
from fedfm.samplers import All
from fedfm.server import FedAvg
from fedfm.tasks import CausalLM
from fedfm.tuning import LoRA
from fedfm.tuning.base import Tuning
from fedfm.verbs import Train


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
        policies: A folder with the policies of simulated owners, a file ``OWNER.yaml`` each; an owner without one allows everything.

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
    pacing: Pacing = field(default_factory=Barrier)
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
    policies: str | None = None

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ConfigError(f"rounds is {self.rounds}; it must be 0 or more.")
        if self.min_clients < 1:
            raise ConfigError(f"min_clients is {self.min_clients}; it must be 1 or more.")
        if self.on_failure not in ("leave_out", "retry", "stop"):
            raise ConfigError(f"on_failure is {self.on_failure!r}; it must be leave_out, retry or stop.")
        if self.deadline is not None and self.deadline <= 0:
            raise ConfigError(f"deadline is {self.deadline} seconds; it must be more than 0, or null to wait.")

    def __repr__(self) -> str:
        """The constructor's call, a line for each field."""
        lines = "".join(f"    {item.name}={getattr(self, item.name)!r},\n" for item in fields(self))
        return f"{type(self).__name__}(\n{lines})"

    def _repr_html_(self) -> str:
        """The parts as a small table, for a notebook."""
        return display.table(f"Federation {self.name}", ((item.name, repr(getattr(self, item.name))) for item in fields(self)))

    def resolved(self) -> Federation:
        """The federation with its method's parts in place, and each part with what it takes from the plan (noise that a budget asks for)."""
        plan = self if self.method is None else self.method.apply(replace(self, method=None))
        return replace(plan, local=plan.local.solved(plan), transforms=tuple(transform.solved(plan) for transform in plan.transforms))

    def with_parts(self, **parts: Part) -> Self:
        """The federation with these parts in place of its own."""
        return replace(self, **parts)  # type: ignore[arg-type]

    def client_plan(self) -> ClientPlan:
        """The parts that clients get, with the method applied."""
        plan = self.resolved()
        return ClientPlan(plan.model, plan.task, plan.tuning, plan.local, plan.transforms, plan.channel)

    def travelling(self, params: Tree) -> Tree:
        """The parameters that leave their house; the others stay at home."""
        return {name: params[name] for name in self.tuning.travels(Spec.of(params))}

    def work(self, state: ServerState, cohort: Sequence[ClientId], ctx: RoundContext) -> Errand:
        """What a cohort is asked to do in a round."""
        return Train().errand(self, state, cohort, ctx)

    def parts(self) -> dict[str, Part]:
        """Every part by its place in the recipe, nested ones too."""
        by_place: dict[str, Part] = {}

        def visit(place: str, value: object) -> None:
            if isinstance(value, tuple):
                for i, item in enumerate(value):
                    visit(f"{place}.{i}", item)
            elif is_dataclass(value) and isinstance(value, Part):
                by_place[place] = value
                for item in fields(value):
                    visit(f"{place}.{item.name}", getattr(value, item.name))

        for item in fields(self):
            visit(item.name, getattr(self, item.name))
        return by_place

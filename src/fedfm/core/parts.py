"""The nouns: what a federation is made of.

A *part* is a frozen dataclass. Its fields are its hyperparameters, its ``repr`` is its
configuration; state goes in and comes out. The classes here are abstract, every part of a room
is final: parts compose, nobody subclasses a part to tweak it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fedfm.core.keys import Key
from fedfm.core.tree import Spec, Tree

if TYPE_CHECKING:
    from fedfm.core.check import Finding, Plan
    from fedfm.core.messages import Failure, Reply, Request

ClientId = str


@dataclass(frozen=True)
class Update:
    """What a client, or many together, contribute to a round.

    Args:
        payload: What leaves the client: a delta (``w_after - w_before``) for each trainable tensor, and leaves that a method adds.
        weight: How much it counts in a weighted mean: the number of training examples (not trusted by robust rules).
        num_clients: How many clients it stands for.
        client: Whose it is; ``None`` once it is a sum.
        metrics: What the client is willing to tell about its work (``loss``, ``tokens``, ``steps``...), numbers only.
    """

    payload: Tree
    weight: float = 1.0
    num_clients: int = 1
    client: ClientId | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def with_payload(self, payload: Tree) -> Update:
        """The same update carrying something else."""
        return replace(self, payload=payload)


@dataclass(frozen=True)
class RoundContext:
    """Where and when a part acts.

    Args:
        round: Counted from 1.
        key: The run's key; fold it with a name before drawing.
        params: The global trainable parameters at the start of the round.
        num_clients: How many clients are registered.
        client: Set where a part acts on one client's behalf.
    """

    round: int
    key: Key
    params: Tree
    num_clients: int
    client: ClientId | None = None

    def draw(self, name: str) -> Key:
        """The key of ``name`` in this round, for this client where there is one."""
        key = self.key.fold(name, self.round)
        return key if self.client is None else key.fold(self.client)


@dataclass(frozen=True)
class Traits:
    """What a part needs from the plan, hides from it, and promises.

    A part that needs what another hides is refused before anything runs. Words in use:
    ``single-updates`` (each client's update, one by one), ``float-leaves`` (tensors that can still be computed with),
    ``named-leaves`` (one tensor per parameter), ``stateful-clients`` (a client's memory from its last round),
    ``uniform-weights``, ``weighted-sum`` (a mean of some kind).
    """

    needs: frozenset[str] = frozenset()
    hides: frozenset[str] = frozenset()
    promises: tuple[str, ...] = ()


def traits(needs: Iterable[str] = (), hides: Iterable[str] = (), promises: Iterable[str] = ()) -> Traits:
    """Shorthand for :class:`Traits`."""
    return Traits(frozenset(needs), frozenset(hides), tuple(promises))


class Part:
    """Anything a recipe can name. ``concerns`` are the survey's words for what it is about."""

    room: ClassVar[str] = ""
    concerns: ClassVar[tuple[str, ...]] = ()

    def traits(self) -> Traits:
        """What this part needs, hides and promises."""
        return Traits()

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Findings about this part in this plan, beyond its traits."""
        yield from ()


class Sampler(Part, ABC):
    """Who takes part in a round."""

    room = "samplers"

    @abstractmethod
    def sample(self, clients: Sequence[ClientId], ctx: RoundContext) -> list[ClientId]:
        """The cohort of round ``ctx.round``, drawn from ``ctx.key`` alone, in a fixed order."""

    @abstractmethod
    def cohort_size(self, num_clients: int) -> int:
        """The largest cohort that ``sample`` can be relied on to give (the expected one for random sizes)."""


class Transform(Part, ABC):
    """An update in flight. ``encode`` acts on the client, ``decode`` and ``finish`` on the server; all default to nothing.

    In a chain ``encode`` runs left to right, ``decode`` and ``finish`` right to left.
    """

    room = "transforms"

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The update as it leaves the client, and what the client remembers (its own, from round to round)."""
        return update, memory

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """Undoes the representation of one update as it arrives. Its input is not trusted.

        Raises:
            MessageError: if the payload is not what ``encode`` could have made.
        """
        return update

    def finish(self, aggregate: Update, ctx: RoundContext) -> Update:
        """What is done once, to the aggregate."""
        return aggregate


class Aggregator(Part, ABC):
    """Many updates become one."""

    room = "aggregators"

    @abstractmethod
    def __call__(self, updates: Iterable[Update], ctx: RoundContext) -> Update:
        """The aggregate. Takes each update as it arrives; its result does not depend on their order."""

    def min_updates(self) -> int:
        """The fewest updates with which the rule means something."""
        return 1


class ServerOptimizer(Part, ABC):
    """The global step."""

    room = "server"

    def init(self, params: Tree) -> Tree:
        """Its state before the first round."""
        return {}

    @abstractmethod
    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """New parameters and new state from the aggregated delta."""

    def broadcast(self, params: Tree, state: Tree) -> Tree:
        """What goes out beside the parameters, under names of its own (SCAFFOLD's control variate)."""
        return {}


@dataclass
class Cohort:
    """The clients that share a batch: K rows of parameters and whatever their trainer keeps. Changed in place.

    Rows are sorted by number of steps, most first, so the clients still at work are always a prefix.

    Args:
        theta_kd: Trainable parameters, a row per client.
        start_d: The parameters all started from.
        received: Leaves that came with the parameters (``ServerOptimizer.broadcast``).
        memory: What each client remembers from its last round, leaf name to ``(K, ...)``.
        slots: Optimizer state, each ``(K, D)`` or ``(K,)``.
    """

    theta_kd: torch.Tensor
    start_d: torch.Tensor
    received: Tree = field(default_factory=dict)
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    slots: dict[str, torch.Tensor] = field(default_factory=dict)

    def head(self, k: int) -> Cohort:
        """The first ``k`` clients, sharing storage."""
        return Cohort(
            self.theta_kd[:k],
            self.start_d,
            self.received,
            {name: x[:k] for name, x in self.memory.items()},
            {name: x[:k] for name, x in self.slots.items()},
        )


@dataclass(frozen=True)
class Work:
    """How much a client does in a round.

    Args:
        batch_size: Examples per micro-batch; ``None`` takes all of the client's examples at once.
        steps: Optimizer steps; or
        epochs: passes over the client's examples. Exactly one of the two.
        accumulate: Micro-batches per optimizer step.
        max_grad_norm: Bound on each client's own gradient norm; ``None`` for no bound.
    """

    batch_size: int | None
    steps: int | None
    epochs: int | None
    accumulate: int = 1
    max_grad_norm: float | None = None


class Objective(ABC):
    """What K clients minimise in one step: each the mean loss over its own targets. What is drawn (dropout, masks) is the same in every call of a step.

    The loss of the first call of a step, whichever it is, is the one that a round reports.
    """

    @abstractmethod
    def losses(self, theta_kd: torch.Tensor) -> torch.Tensor:
        """Each client's loss ``(K,)`` at its row of ``theta_kd``: a forward pass, no graph."""

    @abstractmethod
    def gradient(self, theta_kd: torch.Tensor) -> torch.Tensor:
        """Each client's gradient ``(K, D)``, summed over its micro-batches and clipped to ``Work.max_grad_norm``. The caller may overwrite it."""

    @abstractmethod
    def per_example(self, theta_kd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of each example's own mean loss ``(N, D)``, not clipped, and each example's client ``(N,)``.

        An example is a slice of a bank of N, so the tuning must bank. Where a client's examples have as many targets each, their mean is ``gradient``
        before it is clipped.

        Raises:
            ConfigError: if the model runs one client at a time.
        """

    @abstractmethod
    def keys(self, name: str) -> list[Key]:
        """A key for each client in this round and step, for what a trainer draws."""


class LocalTrainer(Part, ABC):
    """How a client works. Acts on whole banks: every array has a leading client axis."""

    room = "local"

    @property
    @abstractmethod
    def work(self) -> Work:
        """How much a client does in a round."""

    @abstractmethod
    def lr_at(self, step: int, num_steps: int, round: int) -> float:
        """The learning rate of local step ``step`` (from 0) of ``num_steps``."""

    def init(self, cohort: Cohort) -> None:
        """Puts the trainer's slots into the cohort."""

    @abstractmethod
    def descend(self, cohort: Cohort, objective: Objective, lr_k: torch.Tensor, step: int) -> None:
        """One step of every client, in place, with gradients off. ``lr_k`` is ``(K, 1)``; ``step`` counts from 0."""

    def extra(self, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the float32 leaves that ``finish`` adds to a payload, for ``size`` trainable values."""
        return {}

    def finish(self, cohort: Cohort, lr_sum_k: torch.Tensor, steps_k: torch.Tensor) -> dict[str, torch.Tensor]:
        """Leaves added to the payload, each ``(K, ...)``; may write ``cohort.memory``. ``lr_sum_k`` is the sum of the rates used."""
        return {}


class GradientTrainer(LocalTrainer):
    """A trainer that takes one gradient in each step."""

    def descend(self, cohort: Cohort, objective: Objective, lr_k: torch.Tensor, step: int) -> None:
        """The gradient, and a step along it."""
        self.step(cohort, objective.gradient(cohort.theta_kd), lr_k, step)

    @abstractmethod
    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:
        """One step of every client, in place. ``lr_k`` is ``(K, 1)``; ``grad_kd`` may be overwritten; ``step`` counts from 0."""


class WrappedTrainer(GradientTrainer):
    """A trainer around another, declared as a field: forwards everything, so that a subclass overrides only what it changes.

    Attributes:
        inner: The trainer that takes the steps.
    """

    inner: GradientTrainer
    # What only forwards has nothing to say of its own.

    @property
    def work(self) -> Work:  # noqa: D102
        return self.inner.work

    def lr_at(self, step: int, num_steps: int, round: int) -> float:  # noqa: D102
        return self.inner.lr_at(step, num_steps, round)

    def init(self, cohort: Cohort) -> None:  # noqa: D102
        self.inner.init(cohort)

    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:  # noqa: D102
        self.inner.step(cohort, grad_kd, lr_k, step)

    def extra(self, size: int) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return self.inner.extra(size)

    def finish(self, cohort: Cohort, lr_sum_k: torch.Tensor, steps_k: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: D102
        return self.inner.finish(cohort, lr_sum_k, steps_k)


def innermost(local: LocalTrainer) -> LocalTrainer:
    """The trainer that takes the steps, without what ties it to a federation (FedProx's pull, SCAFFOLD's correction)."""
    while isinstance(local, WrappedTrainer):
        local = local.inner
    return local


class Channel(Part, ABC):
    """How updates reach the aggregator. May need several exchanges in a round."""

    room = "channels"

    @abstractmethod
    def collect(
        self, session: Session, requests: Mapping[ClientId, Request], deadline: float | None, ctx: RoundContext
    ) -> Iterator[Update | Failure]:
        """The updates as they arrive (still encoded), and who failed: one outcome for each request."""


class Engine(Part, ABC):
    """Where the clients run. One verb."""

    room = "engines"

    @abstractmethod
    def open(self, site: Any) -> Session:
        """Starts what the engine needs; ``site`` is a :class:`fedfm.client.site.Site`."""


class Session(ABC):
    """An engine that is running."""

    @abstractmethod
    def exchange(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> Iterator[Reply | Failure]:
        """Sends each client its request; yields the replies as they arrive, one for each request.

        Args:
            deadline: Seconds after which clients that have not answered have failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends every client. Calling it twice is fine."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Method(Part, ABC):
    """A paper made of several parts: rewrites a federation."""

    room = "methods"

    @abstractmethod
    def apply(self, federation: Any) -> Any:
        """The federation with this method's parts in place."""


__all__ = [
    "Aggregator", "Channel", "ClientId", "Cohort", "Engine", "GradientTrainer", "LocalTrainer", "Method", "Objective", "Part", "RoundContext",
    "Sampler", "ServerOptimizer", "Session", "Spec", "Traits", "Transform", "Tree", "Update", "Work", "WrappedTrainer", "innermost", "traits",
]  # fmt: skip

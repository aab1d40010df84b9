"""The nouns: what a federation is made of.

A *part* is a frozen dataclass. Its fields are its hyperparameters, its ``repr`` is its
configuration; state goes in and comes out. The classes here are abstract, every part of a room
is final: parts compose, nobody subclasses a part to tweak it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, TypeVar

import torch

from fedfm.core import leaves
from fedfm.core.errors import MessageError
from fedfm.core.keys import Key
from fedfm.core.leaves import Leaf
from fedfm.core.limits import Limits, Size, norms_of
from fedfm.core.messages import Body, ClientId, Failure, Request, Scalar
from fedfm.core.privacy import Guarantee, Release
from fedfm.core.secret import Secret, Stream
from fedfm.core.session import Session
from fedfm.core.sums import Partial
from fedfm.core.tree import Spec, Tree


@dataclass(frozen=True)
class Update:
    """What a client, or many together, contribute to a round.

    Args:
        payload: The tensors that leave the client: a delta (``w_after - w_before``) for each parameter that travels, and leaves that a method adds;
            or whatever else its trainer declares.
        weight: How much it counts in a weighted mean: the number of training examples (not trusted by robust rules).
        num_clients: How many clients it stands for.
        client: Whose it is; ``None`` once it is a sum.
        metrics: The single numbers that leave with it (``loss``, ``tokens``, ``steps``...).
        ticket: Names what the client remembers from this work; ``None`` where it remembers nothing.
    """

    payload: Tree
    weight: float = 1.0
    num_clients: int = 1
    client: ClientId | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    ticket: int | None = None

    def with_payload(self, payload: Tree) -> Update:
        """The same update with another payload."""
        return replace(self, payload=payload)


class Spent(ABC):
    """What one client has spent for good: privacy, masks, quotas. Synced before anything leaves, and never rolled back."""

    @abstractmethod
    def add(self, what: str, amount: float) -> None:
        """Writes down that ``amount`` more of ``what`` is spent; durable when this returns.

        Raises:
            RunError: if it cannot be written; nothing may leave then.
        """

    @abstractmethod
    def total(self, what: str) -> float:
        """All that was spent of ``what``, by rounds that count and by rounds that do not."""

    @abstractmethod
    def entries(self) -> list[tuple[str, float]]:
        """Every expense, oldest first.

        Raises:
            RunError: if the account was changed by something else.
        """

    def names(self) -> Iterator[str]:
        """What something was spent of, oldest first; the same may come more than once."""
        return (name for name, _ in self.entries())


@dataclass
class Vault:
    """What a house lends to the client's half of a channel that keeps secrets: who the client is, whom it knows, and where it writes what is used up.

    Args:
        client: Whose it is.
        job: Names the run, here and at the server.
        key: The run's key; for what is drawn and is no secret.
        spent: What the client has spent for good.
        known: Whether the house knows a client by a public key (Ed25519, 32 bytes). One that it has not met is known by this key from now on, if the
            house allows that.
        identity: The client's private key (Ed25519, 32 bytes); ``None`` where the channel draws one.
        memory: Lasts as long as the house is open, and is never written.
    """

    client: ClientId
    job: str
    key: Key
    spent: Spent
    known: Callable[[ClientId, bytes], bool]
    identity: bytes | None = None
    memory: dict[str, object] = field(default_factory=dict)

    @staticmethod
    def job_of(key: Key) -> str:
        """The name of the run with this key."""
        return key.fold("job").digest.hex()[:32]


@dataclass(frozen=True)
class RoundContext:
    """Where and when a part acts.

    Args:
        round: Counted from 1.
        key: The run's key; fold it with a name before drawing.
        params: The parameters that travel, at the start of the round; on one client's behalf, as that client holds them.
        num_clients: How many clients are registered.
        client: Set where a part acts on one client's behalf.
        leaves: What an aggregate of this round holds.
        received: What the part itself sends to clients (``Transform.broadcast``).
        spent: What the house has spent for good: a client's in its own house, the run's on the server.
        secret: Under a privacy promise: where cohorts and noise come from.
        rate: On the server: the probability with which each client is in the cohort, independently of all others; ``None`` where it is not so.
    """

    round: int
    key: Key
    params: Tree
    num_clients: int
    client: ClientId | None = None
    leaves: tuple[Leaf, ...] = ()
    received: Tree = field(default_factory=dict)
    spent: Spent | None = None
    secret: Secret | None = None
    rate: float | None = None

    def draw(self, name: str) -> Key:
        """The key of ``name`` in this round, for this client where there is one."""
        key = self.key.fold(name, self.round)
        return key if self.client is None else key.fold(self.client)


@dataclass(frozen=True)
class ServerState:
    """Everything the server needs to go on.

    Args:
        round: Rounds completed.
        params: The global trainable parameters. Those that stay at home keep their values from the start.
        parts: The state of each part that has one, under the part's place in the recipe (``server``, ``transforms.0``, ``sampler``).
        counted: The ticket of each client that was counted last; a client goes on from what it remembered then.
    """

    round: int
    params: Tree
    parts: Mapping[str, Tree] = field(default_factory=dict)
    counted: Mapping[ClientId, int] = field(default_factory=dict)

    def of(self, place: str) -> Tree:
        """The state of the part at ``place``; empty where it has none."""
        return self.parts.get(place, {})


@dataclass(frozen=True)
class Traits:
    """What a part needs from the plan, hides from it, and promises.

    A part that needs what another hides is refused before anything runs. Words in use:
    ``single-updates`` (each client's update, one by one), ``float-leaves`` (tensors that can still be computed with),
    ``named-leaves`` (one tensor per parameter), ``deltas`` (an aggregate that holds a change of each parameter), ``all-parameters`` (none of them
    stays at home), ``stateful-clients`` (a client's memory from its last round), ``uniform-weights``, ``weighted-sum`` (a mean of some kind),
    ``counts`` (the owners tell how many examples they have), ``every-value`` (each client's own value of each parameter: a sparse update leaves
    most of them out, and a rule that compares clients would count a zero as a vote), ``barrier`` (a round
    waits for its whole cohort).

    What a part *is* lets others ask for a property instead of a class: ``plain-step`` (the new parameters are the mean of the clients'),
    ``gradient-steps`` (a client moves by its gradients and nothing else), ``linear`` (decoding commutes with addition), ``bounds``
    (no update leaves it longer than its bound), ``private`` (a privacy promise, which every leaf that leaves must be covered by),
    ``server-noise`` (a promise whose noise is added after the answers have left their houses), ``silent`` (the numbers of a client's work stay at home),
    ``noisy-counts`` (counts are told with noise), ``simulated`` (a promise whose coins come from the run's key), ``embeddings`` (rows of an embedding
    train and travel), ``random-cohorts`` (the size of a cohort is left to chance).
    """

    needs: frozenset[str] = frozenset()
    hides: frozenset[str] = frozenset()
    promises: tuple[str, ...] = ()
    is_: frozenset[str] = frozenset()


def traits(needs: Iterable[str] = (), hides: Iterable[str] = (), promises: Iterable[str] = (), is_: Iterable[str] = ()) -> Traits:
    """Shorthand for :class:`Traits`."""
    return Traits(frozenset(needs), frozenset(hides), tuple(promises), frozenset(is_))


@dataclass(frozen=True)
class Finding:
    """One thing the plan check has to say.

    Args:
        level: ``refusal`` stops the run, ``warning`` does not, ``note`` is for ``fedfm check`` alone, ``promise`` is what the plan guarantees.
        where: The part's place in the recipe.
        text: What, why, and the remedy.
    """

    level: Literal["refusal", "warning", "note", "promise"]
    where: str
    text: str


def refuse(where: str, text: str) -> Finding:
    """A finding that stops the run."""
    return Finding("refusal", where, text)


def warn(where: str, text: str) -> Finding:
    """A finding that does not stop the run."""
    return Finding("warning", where, text)


def promise(where: str, text: str) -> Finding:
    """A finding that says what the plan guarantees."""
    return Finding("promise", where, text)


def note(where: str, text: str) -> Finding:
    """A finding that is so of every plan with this part: ``fedfm check`` shows it, a run does not repeat it."""
    return Finding("note", where, text)


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

    def guarantee(self, plan: Plan, num_clients: int | None = None, spent: Sequence[Release] | None = None) -> Guarantee | None:
        """The privacy that all rounds of the plan keep; ``None`` where this part promises none.

        Args:
            num_clients: How many owners there are, where that is known.
            spent: What was released, instead of all rounds of the plan.

        Raises:
            PrivacyError: if what it promises cannot be named in this plan.
        """
        return None


class Sampler(Part, ABC):
    """Chooses who takes part in a round."""

    room = "samplers"

    def init(self) -> Tree:
        """Its state before the first round."""
        return {}

    @abstractmethod
    def sample(self, clients: Sequence[ClientId], state: Tree, ctx: RoundContext) -> tuple[list[ClientId], Tree]:
        """The cohort of round ``ctx.round``, drawn from ``ctx.key`` and the state alone, in a fixed order; and the new state."""

    def poisson_rate(self) -> float | None:
        """The probability with which each client joins, independently of all others; ``None`` where it is not so."""
        return None

    @abstractmethod
    def cohort_size(self, num_clients: int) -> int:
        """The largest cohort that ``sample`` can be relied on to give (the expected one for random sizes)."""

    def largest_cohort(self, num_clients: int) -> int:
        """The largest cohort that ``sample`` may give."""
        return num_clients if self.poisson_rate() is not None else min(self.cohort_size(num_clients), num_clients)


class Transform(Part, ABC):
    """Changes an update in flight. ``encode`` acts on the client, ``decode`` and ``finish`` on the server; by default each returns its input.

    In a chain ``encode`` runs left to right, ``decode`` and ``finish`` right to left.

    Attributes:
        covers: The groups of leaves that it changes. All others pass whole.
    """

    room = "transforms"
    covers: ClassVar[frozenset[str]] = frozenset({"delta"})

    def init(self, params: Tree) -> Tree:
        """Its state on the server before the first round."""
        return {}

    def broadcast(self, state: Tree) -> Tree:
        """What goes out with the parameters, and reaches ``encode`` and ``decode`` as ``ctx.received``."""
        return {}

    def leaves(self, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        """What an update holds once it is decoded, given what it held before: a transform that tells something more adds a leaf."""
        return leaves

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The update as it leaves the client, and what the client remembers (its own, from round to round)."""
        return update, memory

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """Undoes the representation of one update as it arrives. Its input is not trusted.

        Raises:
            MessageError: if the payload is not what ``encode`` could have made.
        """
        return update

    def finish(self, aggregate: Update, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The aggregate after this transform's one step on it, and the new state."""
        return aggregate, state

    def told_counts(self, counts: Sequence[float], sensitivity: float, stream: Stream) -> list[float] | None:
        """Counts as an owner may tell them under this part; ``None`` where it says nothing of counts.

        Args:
            sensitivity: By how much one row changes them, all together.
            stream: The owner's own coins.
        """
        return None

    def begin(self, ctx: RoundContext) -> None:
        """Called on the server before a cohort is asked: a transform whose noise is in the answers writes down here what they spend."""

    def release(self, plan: Plan) -> Release | None:
        """What a round spends on the server; ``None`` where it adds no noise there."""
        return None

    def solved(self, plan: Plan) -> Transform:
        """The same transform with what it takes from the plan: noise that a budget asks for."""
        return self


def transform_place(i: int) -> str:
    """Where the transform at index ``i`` stands in the recipe: the name of its state and of what is said of it."""
    return f"transforms.{i}"


class Aggregator(Part, ABC):
    """Many updates become one."""

    room = "aggregators"

    @abstractmethod
    def __call__(self, updates: Iterable[Update | Partial], ctx: RoundContext) -> Update:
        """The aggregate. Takes each update, or sum of updates, as it arrives; its result does not depend on their order."""

    def takes_sums(self) -> bool:
        """Whether a sum of many is enough. A rule that says no gets each client's update by itself."""
        return False

    def uniform(self) -> bool:
        """Whether every client counts alike, whatever the weight that it tells."""
        return False

    def min_updates(self) -> int:
        """The fewest updates with which the rule means something."""
        return 1


class ServerOptimizer(Part, ABC):
    """Takes the global step."""

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
        start_kd: The parameters that each started from.
        received: Leaves that came with the parameters (``ServerOptimizer.broadcast``).
        memory: What each client remembers from its last round, leaf name to ``(K, ...)``.
        slots: Optimizer state, each ``(K, D)`` or ``(K,)``.
    """

    theta_kd: torch.Tensor
    start_kd: torch.Tensor
    received: Tree = field(default_factory=dict)
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    slots: dict[str, torch.Tensor] = field(default_factory=dict)

    def head(self, k: int) -> Cohort:
        """The first ``k`` clients, sharing storage."""
        return Cohort(
            self.theta_kd[:k],
            self.start_kd[:k],
            self.received,
            {name: x[:k] for name, x in self.memory.items()},
            {name: x[:k] for name, x in self.slots.items()},
        )


@dataclass(frozen=True)
class Work:
    """How much a client does in a round.

    Args:
        batch_size: Examples per micro-batch; ``None`` takes all of the client's examples at once.
        steps: Optimizer steps; ``None`` where ``epochs`` is given.
        epochs: Passes over the client's examples; ``None`` where ``steps`` is given.
        accumulate: Micro-batches per optimizer step.
        max_grad_norm: Bound on each client's own gradient norm; ``None`` for no bound.
        poisson: Whether each example is in a step's batch with one probability, independently of all others, so that ``batch_size`` is what is
            expected. Such batches are drawn from the house's own coins.
    """

    batch_size: int | None
    steps: int | None
    epochs: int | None
    accumulate: int = 1
    max_grad_norm: float | None = None
    poisson: bool = False

    def size(self, num_examples: int) -> int:
        """Examples of a step of a client that has so many."""
        return num_examples if self.batch_size is None else min(num_examples, self.batch_size * self.accumulate)

    def num_steps(self, num_examples: int) -> int:
        """Steps of a round of a client that has so many examples."""
        if num_examples == 0:
            return 0
        assert (self.steps is None) != (self.epochs is None), self
        return self.steps if self.steps is not None else (self.epochs or 0) * -(-num_examples // self.size(num_examples))


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

    @abstractmethod
    def clipped_sum(self, theta_kd: torch.Tensor, max_norm: float) -> torch.Tensor:
        """The sum over each client's examples ``(K, D)`` of the gradient of its own mean loss, shortened to ``max_norm`` where it is longer.

        An example whose gradient is not finite adds nothing. Works where the model runs one client at a time, too: an example at a time.
        """

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """How many examples each client has in all."""

    @abstractmethod
    def noisy(self, sum_kd: torch.Tensor, std_k: Sequence[float]) -> torch.Tensor:
        """``sum_kd`` with normal noise of each client's standard deviation, from its house's own coins; once in a step."""


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

    def leaves(self, trained: Spec, travelling: Spec) -> tuple[Leaf, ...]:
        """What leaves a client that works like this: a delta of each parameter that travels, unless said otherwise.

        Args:
            trained: All parameters that train.
            travelling: Those of them that leave the house.
        """
        return leaves.deltas(travelling)

    def finish(self, cohort: Cohort, lr_sum_k: torch.Tensor, steps_k: torch.Tensor) -> dict[str, torch.Tensor]:
        """Leaves added to the payload, each ``(K, ...)``; may write ``cohort.memory``. ``lr_sum_k`` is the sum of the rates used."""
        return {}

    def solved(self, plan: Plan) -> LocalTrainer:
        """The same trainer with what it takes from the plan: how many rounds a budget must last."""
        return self

    def release(self, num_examples: int) -> Release | None:
        """What a round's work of a client with so many examples spends of its privacy; ``None`` where it promises none."""
        return None

    def require_affordable(self, spent: Sequence[Release], num_examples: int) -> None:
        """Refuses a round that would spend more than the budget.

        Args:
            spent: All that the owner has released before.

        Raises:
            PrivacyError: with what is spent, and what one more round would come to.
        """


class GradientTrainer(LocalTrainer):
    """A trainer that takes one gradient in each step."""

    def descend(self, cohort: Cohort, objective: Objective, lr_k: torch.Tensor, step: int) -> None:
        """The gradient, and a step along it."""
        self.step(cohort, objective.gradient(cohort.theta_kd), lr_k, step)

    @abstractmethod
    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:
        """One step of every client, in place. ``lr_k`` is ``(K, 1)``; ``grad_kd`` may be overwritten; ``step`` counts from 0."""


class WrappedTrainer(GradientTrainer):
    """A trainer around another: forwards everything, so that a subclass overrides only what it changes. The subclass declares ``inner`` as a field.

    Attributes:
        inner: The trainer that takes the steps.
    """

    inner: GradientTrainer
    # A method that only forwards needs no docstring.

    @property
    def work(self) -> Work:  # noqa: D102
        return self.inner.work

    def lr_at(self, step: int, num_steps: int, round: int) -> float:  # noqa: D102
        return self.inner.lr_at(step, num_steps, round)

    def init(self, cohort: Cohort) -> None:  # noqa: D102
        self.inner.init(cohort)

    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:  # noqa: D102
        self.inner.step(cohort, grad_kd, lr_k, step)

    def leaves(self, trained: Spec, travelling: Spec) -> tuple[Leaf, ...]:  # noqa: D102
        return self.inner.leaves(trained, travelling)

    def finish(self, cohort: Cohort, lr_sum_k: torch.Tensor, steps_k: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: D102
        return self.inner.finish(cohort, lr_sum_k, steps_k)


def innermost(local: LocalTrainer) -> LocalTrainer:
    """The trainer that takes the steps, without the trainers around it (FedProx, SCAFFOLD, ExampleDP), which tie it to a federation."""
    while isinstance(inner := getattr(local, "inner", None), LocalTrainer):
        local = inner
    return local


@dataclass(frozen=True)
class Errand:
    """What the server asks of a cohort, and what may come back.

    Args:
        body: What all are asked alike.
        leaves: What an answer holds once it is decoded, of a client of full size; so does the aggregate.
        params: The parameters that travel, of full size.
        own: Numbers for one client alone.
        params_of: The parameters as a client with these own numbers holds them.
        pad: Brings a client's payload to full size.
        transforms: What encodes a payload on its way, left to right.
        received: What each transform sends to clients, by its index.
        sums: Whether a sum of the answers is enough.
        uniform: Whether every client counts alike.
        attempt: How often it was given out before, in this round.
        limits: What one answer may reach; ``None`` for whatever its leaves' bounds allow.
    """

    body: Body
    leaves: tuple[Leaf, ...]
    params: Tree = field(default_factory=dict)
    own: Mapping[ClientId, Mapping[str, Scalar]] = field(default_factory=dict)
    params_of: Callable[[Mapping[str, Scalar]], Tree] | None = None
    pad: Callable[[Tree, Mapping[str, Scalar]], Tree] | None = None
    transforms: tuple[Transform, ...] = ()
    received: Mapping[int, Tree] = field(default_factory=dict)
    sums: bool = False
    uniform: bool = False
    attempt: int = 0
    limits: Limits | None = None

    @property
    def id(self) -> str:
        """Names the errand. What a channel keeps of a client for one errand never serves another."""
        return f"{self.body.verb}/{self.body.round}/{self.attempt}"

    def request(self, client: ClientId, body: Body | None = None) -> Request:
        """What one client is asked.

        Args:
            body: Instead of the errand's own: what a channel asks in an exchange of its own, or relays with the errand.
        """
        named = {ERRAND: self.id} if body is not None or self.attempt else {}
        return Request(body or self.body, {**self.own.get(client, {}), **named})

    def decoded(self, update: Update, ctx: RoundContext) -> Update:
        """One client's update as the aggregator takes it: decoded right to left, checked against what was declared, at full size.

        Raises:
            MessageError: if it is not what its client could honestly have sent.
        """
        own = self.own.get(update.client or "", {})
        params = self.params if self.params_of is None else self.params_of(own)
        for i, transform in reversed(list(enumerate(self.transforms))):
            update = transform.decode(update, replace(ctx, params=params, client=update.client, received=self.received.get(i, {})))
        expected = self.leaves if params is self.params else resized(self.leaves, params, self.params)
        leaves.require(expected, update.payload, f"update of {update.client!r}")
        return update if self.pad is None else update.with_payload(self.pad(update.payload, own))

    def judge(self, update: Update) -> None:
        """Holds one client's decoded update to the round's limits, before it counts. What streams in pieces calls ``limits.judge`` at its end.

        Raises:
            MessageError: with its size and the bound.
        """
        if self.limits is not None:
            self.limits.judge(update.client or "", norms_of(self.leaves, update.payload), update.weight)


def resized(declared: Sequence[Leaf], params: Tree, full: Iterable[str]) -> tuple[Leaf, ...]:
    """The leaves of a client whose parameters have other shapes; those of ``full`` that it does not hold are left out."""
    names = set(full)
    return tuple(
        replace(leaf, shape=tuple(params[leaf.name].shape)) if leaf.name in params else leaf
        for leaf in declared
        if leaf.name in params or leaf.name not in names
    )


@dataclass
class Sealed:
    """An answer as it leaves the house.

    Args:
        tensors: What crosses the boundary.
        meta: Numbers that cross it in the clear.
    """

    tensors: Tree
    meta: Mapping[str, Scalar]


# Names in the own part of a request: the ticket of what the client will remember, the one that was counted last, and the errand.
TICKET, COUNTED, ERRAND = "ticket", "counted", "errand"


def errand_id(request: Request) -> str:
    """The errand that a request belongs to."""
    return str(request.own.get(ERRAND, f"{request.verb}/{request.round}/0"))


class Scratch(dict[str, object]):
    """What a channel keeps of one client between the exchanges of one errand, and no longer.

    Args:
        vault: What the house lends to a channel that keeps secrets; ``None`` where there is no house.
    """

    def __init__(self, vault: Vault | None = None) -> None:
        super().__init__()
        self.vault = vault


class Channel(Part, ABC):
    """How answers reach the aggregator: a half on the server and a half on each client. May need several exchanges.

    Training, evaluation and counting all pass it, so that what it protects is protected everywhere.

    Attributes:
        verbs: Exchanges of its own, which :meth:`answer` answers.
        closing: Those of them that follow the answers. A client that fails in one of them may be in the sum all the same.
    """

    room = "channels"
    verbs: ClassVar[tuple[str, ...]] = ()
    closing: ClassVar[tuple[str, ...]] = ()

    def check_cohort(self, what: str, num_clients: int) -> Iterator[Finding]:
        """Findings about so many clients that are asked together.

        Args:
            what: What they are asked to, in words.
        """
        yield from ()

    def check_leaves(self, leaves: Sequence[Leaf], num_clients: int, uniform: bool) -> Iterator[Finding]:
        """Findings about what the answers of so many clients hold.

        Args:
            uniform: Whether every client counts alike.
        """
        yield from ()

    def largest(self) -> float:
        """The largest magnitude of a value of an update that passes whole."""
        return math.inf

    def fewest_honest(self, least: int, num_clients: int | None = None) -> int:
        """The fewest honest clients among those whose answers become an aggregate.

        Args:
            least: Answers with which a round counts.
            num_clients: Most clients that are asked together; ``None`` where that is not known.
        """
        return least

    @abstractmethod
    def collect(
        self, session: Session, errand: Errand, clients: Sequence[ClientId], deadline: float | None, ctx: RoundContext
    ) -> Iterator[Update | Partial | Failure]:
        """The server's half: yields answers as they arrive, decoded and checked, or sums of them, and failures. Each client has one outcome.

        Where ``errand.sums`` is off, the caller needs single updates.
        """

    @abstractmethod
    def seal(self, update: Update, leaves: tuple[Leaf, ...], request: Request, scratch: Scratch) -> Sealed:
        """The client's half: an answer as it leaves the house.

        Args:
            leaves: What the answer holds, as the client itself declares it.
            scratch: What :meth:`answer` has kept for this client in this round.

        Raises:
            FedfmError: if it must not leave.
        """

    def answer(self, client: ClientId, request: Request, scratch: Scratch) -> Sealed:
        """The client's half of an exchange of the channel's own."""
        raise MessageError(f"{type(self).__name__} has no exchange {request.verb!r}.")


class Pacing(Part, ABC):
    """Decides when a round has enough answers."""

    room = "pacing"

    @abstractmethod
    def gather(
        self, plan: Plan, session: Session, errand: Errand, cohort: Sequence[ClientId], ctx: RoundContext
    ) -> Iterator[Update | Partial | Failure]:
        """What the cohort answers, as it arrives, until the round has enough; failures too, one for each attempt.

        Raises:
            RoundError: if the round cannot be completed under the recipe's rule.
        """


class Bounds(Part, ABC):
    """What one update may reach before the server counts it. Known before a round begins, so that updates are judged one by one."""

    room = "bounds"

    def init(self, sizes: Iterable[int] = ()) -> Tree:
        """Its state before the first round.

        Args:
            sizes: Numbers of training examples, of the owners who tell them.
        """
        return {}

    @abstractmethod
    def limits(self, state: Tree, uniform: bool) -> Limits:
        """The bounds of a round.

        Args:
            uniform: Whether all clients count alike.
        """

    @abstractmethod
    def learn(self, state: Tree, sizes: Iterable[Size]) -> Tree:
        """The state after a round, whose size does not grow with the number of rounds or clients.

        Args:
            sizes: Of the updates that count, in any order.
        """


P = TypeVar("P", bound="Plan")


class Method(Part, ABC):
    """A paper made of several parts: rewrites a federation."""

    room = "methods"

    @abstractmethod
    def apply(self, plan: P) -> P:
        """The plan with this method's parts in place (``plan.with_parts``)."""


class Plan(Protocol):
    """What the check and the round read of a federation."""

    @property
    def sampler(self) -> Sampler:
        """Who takes part in a round."""
        ...

    @property
    def local(self) -> LocalTrainer:
        """How a client works."""
        ...

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """Changes of an update in flight, left to right on the client."""
        ...

    @property
    def channel(self) -> Channel:
        """How updates reach the aggregator."""
        ...

    @property
    def pacing(self) -> Pacing:
        """When a round has enough answers."""
        ...

    def bounding(self) -> Bounds | None:
        """What one update may reach; ``None`` for no bound."""
        ...

    @property
    def aggregator(self) -> Aggregator:
        """Many updates become one."""
        ...

    @property
    def server(self) -> ServerOptimizer:
        """The global step."""
        ...

    @property
    def min_clients(self) -> int:
        """Fewest updates with which a round counts."""
        ...

    @property
    def on_failure(self) -> Literal["leave_out", "retry", "stop"]:
        """What a client's failure does."""
        ...

    @property
    def deadline(self) -> float | None:
        """Seconds a client has to answer."""
        ...

    @property
    def task(self) -> Part:
        """What is learned."""
        ...

    @property
    def rounds(self) -> int:
        """How many rounds to run in all."""
        ...

    def parts(self) -> dict[str, Part]:
        """Every part by its place in the recipe, nested ones too (``transforms.0``, ``local.inner``)."""
        ...

    def with_parts(self: P, **parts: Part) -> P:
        """The plan with these parts in place of its own."""
        ...

    def travelling(self, params: Tree) -> Tree:
        """The parameters that leave their house; the others stay at home."""
        ...

    def work(self, state: ServerState, cohort: Sequence[ClientId], ctx: RoundContext) -> Errand:
        """What a cohort is asked to do in a round."""
        ...


__all__ = [
    "COUNTED", "ERRAND", "TICKET", "Aggregator", "Bounds", "Channel", "ClientId", "Cohort", "Errand", "Finding", "GradientTrainer", "Guarantee", "Leaf", "LocalTrainer",
    "Method", "Objective", "P", "Pacing", "Part", "Partial", "Plan", "Release", "RoundContext", "Sampler", "Scratch", "Sealed", "Secret", "ServerOptimizer", "ServerState", "Session", "Spec",
    "Spent", "Traits", "Transform", "Tree", "Update", "Vault", "Work", "WrappedTrainer", "errand_id", "innermost", "note", "promise", "refuse", "traits", "warn",
]  # fmt: skip

"""Updates of one owner as a server would see them: alone, with adapters only, in a sum, with noise, and as the plan sends them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fedfm.aggregators import Mean
from fedfm.attacks.base import Base, Secret, Seen
from fedfm.channels import Plain
from fedfm.client.bank import Job
from fedfm.client.house import House
from fedfm.client.plan import ClientPlan
from fedfm.client.policy import OPEN, read_policies
from fedfm.core.batch import IntArray
from fedfm.core.errors import DataError, ModelError, RoundError
from fedfm.core.messages import ClientId
from fedfm.core.parts import Aggregator, Partial, RoundContext, ServerOptimizer, Transform, Tree, Update
from fedfm.core.round import play, start
from fedfm.core.task import Examples, Vocabulary
from fedfm.data import Shard, opened
from fedfm.engines import Embedded
from fedfm.local import SGD, ExampleDP
from fedfm.models import Foundation
from fedfm.samplers import All
from fedfm.simulation import Simulation
from fedfm.tuning import Full
from fedfm.tuning.base import Tuned, Tuning
from fedfm.tuning.sites import is_conv1d, is_linear, output_layer

RATE = 1.0
"""Learning rate of the one step that updates are made with."""
# One step down the gradient of all examples together: the update that says most.
_ONE_STEP = SGD(lr=RATE, steps=1, batch_size=None)

_CANDIDATES = 4  # texts of each kind that the server asks about
_KEPT = 1 << 26  # parameters of a model whose candidates' updates are remembered


class Chosen:
    """Some examples of many. Satisfies :class:`fedfm.core.task.Examples`."""

    def __init__(self, examples: Examples, index: Sequence[int]) -> None:
        self.examples, self.index = examples, list(index)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the tokenizer that made the ids."""
        return self.examples.vocabulary

    @property
    def lengths(self) -> IntArray:
        """Number of tokens of each example ``(N,)``."""
        return self.examples.lengths[self.index]

    def ids(self, i: int) -> IntArray:
        """Token ids of example ``i``."""
        return self.examples.ids(self.index[i])

    def start(self, i: int) -> int:
        """Index of the first target of example ``i``."""
        return self.examples.start(self.index[i])

    def label(self, i: int) -> int:
        """Class of example ``i``."""
        return self.examples.label(self.index[i])


@dataclass
class _Rooms(House):
    """A house whose clients have some of their training examples.

    Attributes:
        chosen: Which ones; a client that is not named has all.
    """

    chosen: Mapping[ClientId, Sequence[int]] = field(default_factory=dict)

    def shard(self, client: ClientId) -> Shard:
        """A client's data, opened, cut to what was chosen."""
        shard = super().shard(client)
        if client in self.chosen:
            shard.train = Chosen(shard.train, self.chosen[client])  # type: ignore[assignment]
        return shard


@dataclass(frozen=True)
class Trial:
    """What one update is made from.

    Args:
        texts: The owner's examples in it.
        outsiders: Examples that are not in it: the owner's own from which another update would be made, or held-out ones.
        others: For each other owner of the group, its examples in the sum.
        number: Counted from 0.
    """

    texts: Examples
    outsiders: Examples
    others: Mapping[ClientId, Examples]
    index: Mapping[ClientId, Sequence[int]]
    number: int

    @property
    def candidates(self) -> list[tuple[Examples, int, bool]]:
        """Texts that the server asks about, at most four that are in the update and four that are not: where they are, and whether they are in it."""
        return [(own, i, own is self.texts) for own in (self.texts, self.outsiders) for i in range(min(len(own), _CANDIDATES))]


@dataclass
class Bench:
    """A tuning of the base, and the updates that it gives with these examples.

    Attributes:
        params: The parameters that the server sends out.
    """

    house: House
    params: Tree
    _alone: dict[tuple[int, int], Tree] = field(default_factory=dict)

    def update(self, client: ClientId, examples: Examples) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The change after one step on these examples, and the numbers that come with it."""
        (trained,) = self.house.bank.train(self.params, [Job(client, examples)], 1)
        if not trained.finite:
            raise DataError(f"The update of {client} is not finite, so there is nothing to read in it.")
        travels = set(self.house.plan.tuning.travels(self.house.tuned.spec))
        return {name: leaf.cpu() for name, leaf in trained.delta.items() if name in travels}, dict(trained.metrics)

    def seen(self, base: Base, owner: ClientId, trial: Trial, delta: Tree, told: Mapping[str, float], rate: float | None = None) -> Seen:
        """What the server has of a trial.

        Args:
            rate: Of the update's steps; ``None`` where they are not known.
        """
        return Seen(base, self.params, delta, told, len(trial.texts), rate, self.alone(owner, trial), len(trial.candidates))

    def alone(self, client: ClientId, trial: Trial) -> Callable[[int], Tree]:
        """What each candidate of a trial would make by itself; remembered for the trial's other cases where memory holds it."""
        candidates = trial.candidates
        is_small = self.house.tuned.spec.size <= _KEPT

        def of(i: int) -> Tree:
            if (trial.number, i) in self._alone:
                return self._alone[trial.number, i]
            examples, place, _ = candidates[i]
            change, _ = self.update(client, Chosen(examples, [place]))
            if any(number != trial.number for number, _ in self._alone):
                self._alone.clear()
            if is_small:
                self._alone[trial.number, i] = change
            return change

        return of


@dataclass(frozen=True)
class Rounds:
    """What a server saw of a round of the plan.

    Args:
        delta: One owner's update as it was decoded, or the sum of all where the channel shows sums alone.
        told: The numbers that came with it.
        released: The aggregate after the server's own noise: what everybody sees in the next model. ``None`` where the server adds nothing.
        hidden: Whether ``delta`` is a sum.
        rate: The sum of the learning rates of its steps, where it can be known.
    """

    delta: Tree
    told: Mapping[str, float]
    released: Tree | None
    hidden: bool
    rate: float | None = None


class Owner:
    """One owner's house for the test: its own model, its own data, and a group that it would be summed with.

    Args:
        site: The federation with its data.
        owner: Whose update is looked at.
        group: How many owners are in a sum, this one included.
        params: The parameters of a run to go on from; ``None`` for the plan's start.
    """

    def __init__(self, site: Simulation, owner: ClientId, group: int, params: Tree | None = None) -> None:
        self.site, self.owner, self.plan, self.key = site, owner, site.federation, site.key.fold("leak")
        others = [client for client in site.clients if client != owner]
        self.others = others[: max(group - 1, 0)]
        self.sent = params
        self._model: tuple[Foundation, Tuned] | None = None
        policies = {} if self.plan.policies is None else read_policies(self.plan.policies)
        self.withholds_counts = policies.get(owner, OPEN).withholds("counts")
        shard = site.house.shard(owner)
        self.train, self.test = opened(shard.train), opened(shard.test)

    def trials(self, num_texts: int, num: int) -> Iterator[Trial]:
        """Trials of ``num_texts`` examples each, one after the other through the owner's data; as many as it has examples for, at least one."""
        for number in range(max(min(num, len(self.train) // num_texts), 1)):
            index: dict[ClientId, Sequence[int]] = {self.owner: _slice(number, num_texts, len(self.train))}
            others: dict[ClientId, Examples] = {}
            for client in self.others:
                examples = opened(self.site.house.shard(client).train)
                index[client] = _slice(number, num_texts, len(examples))
                others[client] = Chosen(examples, index[client])
            # Without held-out examples the owner's next ones are asked about, which are not in this update.
            after = [(index[self.owner][-1] + 1 + i) % len(self.train) for i in range(_CANDIDATES)]
            rest = [i for i in after if i not in index[self.owner]]
            outsiders = Chosen(self.test, range(len(self.test))) if len(self.test) else Chosen(self.train, rest)
            yield Trial(Chosen(self.train, index[self.owner]), outsiders, others, index, number)

    def bench(self, tuning: Tuning) -> Bench:
        """The base under a tuning; the plan's own begins where the run is."""
        house = self._house(replace(self.site.house.plan, tuning=tuning, local=_ONE_STEP, transforms=(), channel=Plain()), [self.owner])
        params = house.start if self.sent is None or tuning != self.plan.tuning else self.sent
        return Bench(house, params)

    @cached_property
    def full(self) -> Bench:
        """All parameters train."""
        return self.bench(Full())

    @cached_property
    def base(self) -> Base:
        """What everybody knows of the base."""
        foundation = self.full.house.foundation
        if self.sent is not None and self.plan.tuning == Full():
            # The server knows the parameters that it sent out, and what their first layer reads.
            foundation.model.load_state_dict(self.sent, strict=False)
        longest = min(self.plan.task.max_length, int(max(self.train.lengths)))
        return describe(foundation, self.train.vocabulary, longest)

    def round(self, trial: Trial) -> Rounds:
        """A round of the plan in which each owner has the trial's examples.

        Raises:
            RoundError: if the owner cannot take part.
        """
        hidden = "single-updates" in self.plan.channel.traits().hides
        finishes = any(type(transform).finish is not Transform.finish for transform in self.plan.transforms)
        clients = [self.owner, *self.others] if hidden or finishes else [self.owner]
        seen: list[Update | Partial] = []
        released: list[Update] = []
        house = self._round_house(clients, trial.index)
        plan = replace(
            self.plan,
            local=house.plan.local,
            sampler=All(),
            # One update is no cohort: a robust rule would refuse it.
            aggregator=_Watched(self.plan.aggregator if len(clients) > 1 else Mean(weights="uniform"), hidden, seen),
            server=_Stopped(released),
            min_clients=1,
            on_failure="leave_out",
        )
        params = house.start if self.sent is None else self.sent
        with Embedded(bank=1, device=self.plan.engine.device).open(house) as session:
            _, record = play(plan, start(plan, params), session, clients, house.key)
        own = [item for item in seen if isinstance(item, Partial) or item.client == self.owner]
        if not own:
            why = next((failure.reason for failure in record.failures if failure.client == self.owner), "it was not asked")
            raise RoundError(f"{self.owner} takes no part in a round of this plan: {why}")
        delta, told = (own[0].mean(), {}) if isinstance(own[0], Partial) else (own[0].payload, dict(own[0].metrics))
        if self.withholds_counts:
            told = {}
        names = set(params)
        return Rounds(
            {name: leaf for name, leaf in delta.items() if name in names},
            told,
            {name: leaf for name, leaf in released[0].payload.items() if name in names} if finishes else None,
            hidden,
            self._rate(told),
        )

    def _rate(self, told: Mapping[str, float]) -> float | None:
        """What the server makes of the plan's trainer and the number of steps that it was told."""
        local, steps = self.plan.local, int(told.get("steps", 0))
        if "gradient-steps" not in local.traits().is_ or not steps:
            return None
        return sum(local.lr_at(step, steps, 1) for step in range(steps))

    def _round_house(self, clients: Sequence[ClientId], chosen: Mapping[ClientId, Sequence[int]]) -> House:
        """A house that remembers nothing of another trial; the model is loaded for the first one alone."""
        house = self._house(self.client_plan(), clients, chosen)
        if self._model is None:
            self._model = house.foundation, house.tuned
        house.foundation, house.tuned = self._model
        return house

    def client_plan(self) -> ClientPlan:
        """What the owner is told, with the noise that the owner's real number of rows asks for, not that of the trial's few."""
        plan = self.site.house.plan
        if not isinstance(plan.local, ExampleDP):
            return plan
        noise = plan.local.noise_of(len(self.train))
        return replace(plan, local=replace(plan.local, noise_multiplier=noise, epsilon=None))

    def _house(self, plan: ClientPlan, clients: Sequence[ClientId], chosen: Mapping[ClientId, Sequence[int]] | None = None) -> House:
        house = self.site.house
        return _Rooms(
            plan=plan,
            shards={client: house.shards[client] for client in clients},
            labels=house.labels,
            key=house.key,
            num_clients=len(clients),
            cohort_size=len(clients),
            num_rounds=house.num_rounds,
            device=house.device,
            chosen={client: (chosen or {})[client] for client in clients if client in (chosen or {})},
        )


@dataclass(frozen=True)
class _Watched(Aggregator):
    """The plan's own rule, which keeps what it is given. Where the server sees single updates, it is asked for them."""

    inner: Aggregator
    hidden: bool
    seen: list[Update | Partial] = field(repr=False, compare=False)

    def __call__(self, updates: Any, ctx: RoundContext) -> Update:
        given: list[Update | Partial] = list(updates)
        self.seen.extend(_copy(item) if isinstance(item, Partial) else item for item in given)
        return self.inner(iter(given), ctx)

    def takes_sums(self) -> bool:
        return self.hidden

    def uniform(self) -> bool:
        return self.inner.uniform()


def _copy(total: Partial) -> Partial:
    # A rule takes the sum that it is given apart.
    copied = Partial(total.leaves, total.uniform)
    copied.merge(total)
    return copied


@dataclass(frozen=True)
class _Stopped(ServerOptimizer):
    """Keeps the aggregate and takes no step."""

    released: list[Update] = field(repr=False, compare=False)

    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        self.released.append(update)
        return params, state


def secret_of(trial: Trial, owner_train: Examples, num_classes: int, in_sum: bool) -> Secret:
    """What the owner has in a trial.

    Args:
        owner_train: All of its training examples.
        in_sum: Whether the server sees a sum with the others.
    """
    texts = trial.texts
    counts = Counter(owner_train.lengths.tolist())
    usual = max(sum(counts[n + near] for near in (-1, 0, 1)) for n in counts) / len(owner_train)
    labels = tuple(texts.label(i) for i in range(len(texts)))
    everybody = [texts, *trial.others.values()] if in_sum else []
    return Secret(
        texts=_ids(texts),
        labels=labels if num_classes and min(labels) >= 0 else (),
        num_classes=num_classes,
        members=tuple(inside for *_, inside in trial.candidates),
        usual_length=usual,
        group=tuple(ids for examples in everybody for ids in _ids(examples)),
    )


def _ids(examples: Examples) -> tuple[IntArray, ...]:
    return tuple(examples.ids(i) for i in range(len(examples)))


def _slice(number: int, num: int, total: int) -> list[int]:
    """The indices of a trial; from the beginning again where there are no more."""
    return sorted({(number * num + i) % total for i in range(num)})


def mean_of(trees: Iterable[Tree]) -> dict[str, torch.Tensor]:
    """The mean, leaf by leaf; one tree at a time is held beside it."""
    total: dict[str, torch.Tensor] = {}
    num = 0
    for tree in trees:
        num += 1
        total = {name: leaf + total[name] if name in total else leaf.clone() for name, leaf in tree.items()}
    return {name: leaf / num for name, leaf in total.items()}


class _Reached(Exception):
    """The first attention layer was called."""


def describe(foundation: Foundation, vocabulary: Vocabulary, longest: int) -> Base:
    """What everybody knows of a base: where its embeddings are, and what its first attention layer reads.

    Args:
        longest: Tokens of the longest text. That the server knows it favours its attacks.

    Raises:
        ModelError: if no layer of it multiplies by a matrix.
    """
    model = foundation.model
    names = {id(p): name for name, p in model.named_parameters()}
    embedding, output = model.get_input_embeddings(), output_layer(foundation)
    output_name = None if output is None else names.get(id(output.weight))
    embedding_name = names.get(id(embedding.weight))
    places = [
        name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
    ]
    first = _first_layers(model, foundation.device)
    return Base(
        size=min(vocabulary.size, embedding.weight.shape[0]),
        special=tuple(vocabulary.special),
        embedding=embedding_name,
        output=None if output_name == embedding_name else output_name,
        positions=f"{places[0]}.weight" if places else None,
        classes=_class_layer(foundation),
        first=tuple(name for name, _ in first),
        turned=is_conv1d(first[0][1]),
        inputs=lambda ids_nl: _read_by(model, first[0][1], ids_nl.to(foundation.device)).cpu(),
        longest=longest,
    )


def _first_layers(model: nn.Module, device: torch.device) -> list[tuple[str, nn.Module]]:
    """The linear layers that read the same as the first one that is called."""
    calls: list[tuple[str, nn.Module, torch.Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append((name, module, args[0])))
        for name, module in model.named_modules()
        if is_linear(module)
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 2, dtype=torch.int64, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise ModelError(f"{type(model).__name__} has no linear layer, so nothing is known of what its gradient shows.")
    return [(name, module) for name, module, x in calls if x is calls[0][2]]


@torch.no_grad()
def _read_by(model: nn.Module, layer: nn.Module, ids_nl: torch.Tensor) -> torch.Tensor:
    """What a layer reads when the model is called with these ids: ``(N, L, d)``. The model is not run further."""
    kept: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0])
        raise _Reached

    hook = layer.register_forward_pre_hook(stop)
    try:
        model(input_ids=ids_nl)
    except _Reached:
        pass
    finally:
        hook.remove()
    return kept[0].reshape(*ids_nl.shape, -1)


def _class_layer(foundation: Foundation) -> tuple[str, ...]:
    """The parameters of a classifier's last layer."""
    if foundation.head != "sequence_classification":
        return ()
    num = len(foundation.labels)
    layers = [name for name, module in foundation.model.named_modules() if isinstance(module, nn.Linear) and module.out_features == num]
    names = {name for name, _ in foundation.model.named_parameters()}
    return tuple(name for leaf in ("weight", "bias") if (name := f"{layers[-1]}.{leaf}") in names)

"""Local work: a client trains from the global parameters and answers with what its trainer declares, a delta in most cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from fedfm.client.bank import Job, Trained
from fedfm.client.house import House
from fedfm.client.plan import ClientPlan
from fedfm.client.requests import HOME, counted, number, remembered, require_parameters, start_of, stays_home, under
from fedfm.client.verb import Contribution, Verb
from fedfm.core import leaves
from fedfm.core.errors import DataError, FedfmError
from fedfm.core.leaves import Kind, Leaf
from fedfm.core.messages import Body, ClientId, Failure, Request, Scalar
from fedfm.core.parts import COUNTED, TICKET, Errand, LocalTrainer, Plan, RoundContext, ServerState, Transform, Update, transform_place
from fedfm.core.privacy import released
from fedfm.core.secret import Secret, coins
from fedfm.core.task import Examples
from fedfm.core.tree import Spec, Tree
from fedfm.data import opened
from fedfm.tuning.base import Tuning

_UNIFORM, _LOCAL = "uniform", "local/"


class TrainPlan(Plan, Protocol):
    """A plan whose clients train a model."""

    @property
    def tuning(self) -> Tuning:
        """Which parameters train and travel."""
        ...


@dataclass(frozen=True)
class Train(Verb):
    """Asks a cohort to train. The request's own part says with which ticket a client remembers, and which of its tickets was counted last."""

    name = "train"
    banked = True

    def errand(self, plan: TrainPlan, state: ServerState, cohort: Sequence[ClientId], ctx: RoundContext) -> Errand:
        """What a cohort is asked to do in a round."""
        params, tuning = plan.travelling(state.params), plan.tuning
        full = Spec.of(params)
        received = {i: transform.broadcast(state.of(transform_place(i))) for i, transform in enumerate(plan.transforms)}
        tensors = {**params, **plan.server.broadcast(params, state.of("server"))}
        for i, tree in received.items():
            tensors |= {f"{transform_place(i)}/{name}": leaf for name, leaf in tree.items()}
        unequal = {client: own for client in cohort if (own := tuning.own(client))}
        return Errand(
            body=Body(self.name, ctx.round, tensors, {_UNIFORM: plan.aggregator.uniform()}),
            leaves=declared(plan.local, plan.transforms, Spec.of(state.params), full),
            params=params,
            own={client: {TICKET: ctx.round, **counted(state, client), **unequal.get(client, {})} for client in cohort},
            params_of=partial(tuning.cut, params) if unequal else None,
            pad=partial(_pad, tuning, full) if unequal else None,
            transforms=plan.transforms,
            received=received,
            sums=plan.aggregator.takes_sums(),
            uniform=plan.aggregator.uniform(),
        )

    def tells(self, request: Request, house: House) -> Mapping[Kind, str]:
        """The weight, unless clients count alike; the loss, where a sum of all would miss it."""
        channel, needed = house.plan.channel, dict[Kind, str]()
        if not request.meta.get(_UNIFORM):
            needed["counts"] = "this round weighs clients by how many examples they have; with uniform weights it would not"
        if "single-updates" in channel.traits().hides:
            needed["losses"] = f"{type(channel).__name__} shows sums alone, in which a loss cannot be left out"
        return needed

    def answer(self, requests: Mapping[ClientId, Request], house: House) -> Iterator[Contribution | Failure]:
        """Trains the clients as one bank."""
        # All requests have one body, so it is checked once.
        require_parameters(next(iter(requests.values())).body, house)
        desks: dict[ClientId, Desk] = {}
        for client, request in requests.items():
            try:
                desks[client] = Desk.open(client, request, house)
            except FedfmError as error:
                # One client's error must not fail the others in its bank.
                yield Failure(client, self.name, str(error))
        if not desks:
            return
        jobs = [Job(client, desk.examples, under(_LOCAL, desk.memory), desk.secret) for client, desk in desks.items()]
        some = next(iter(desks.values()))
        start = {**some.start, **{name: leaf for name, leaf in some.received.items() if not name.startswith("transforms.")}}
        starts_kd = None
        if any(desk.is_own for desk in desks.values()):
            starts_kd = torch.stack([house.tuned.spec.flatten(desk.start) for desk in desks.values()])
        layouts: dict[tuple[torch.Size, ...], Layout] = {}
        for trained in house.bank.train(start, jobs, some.request.round, starts_kd=starts_kd):
            try:
                desk = desks[trained.client]
                if desk.shapes not in layouts:
                    layouts[desk.shapes] = Layout.of(house.plan, house.tuned.spec, desk.params)
                yield desk.finish(trained, layouts[desk.shapes])
            except FedfmError as error:
                yield Failure(trained.client, self.name, str(error))
            except Exception as error:
                # The others have trained already, and must not do so again.
                yield Failure(trained.client, self.name, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Layout:
    """What clients of one size send: declared once for all of them.

    Args:
        sent: The payload before the transforms, as the trainer declares it.
        leaves: All that the answer holds once it is decoded.
    """

    sent: tuple[Leaf, ...]
    leaves: tuple[Leaf, ...]

    @staticmethod
    def of(plan: ClientPlan, trained: Spec, params: Tree) -> Layout:
        """The layout of a client that holds these parameters."""
        travelling = Spec.of(params)
        return Layout(plan.local.leaves(trained, travelling), declared(plan.local, plan.transforms, trained, travelling))


@dataclass
class Desk:
    """What one client works with in a round.

    Args:
        params: The parameters that travel, as the client holds them.
        start: All that trains, at full size: what travelled, and what stays at home.
        is_own: Whether the client's start is not everybody's.
        received: What came with the parameters, for the trainer and each transform.
        secret: Under a privacy promise: the coins of this client in this round.
    """

    client: ClientId
    request: Request
    house: House
    memory: Tree
    examples: Examples
    params: Tree
    start: Tree
    is_own: bool
    received: Tree
    secret: Secret | None

    @staticmethod
    def open(client: ClientId, request: Request, house: House) -> Desk:
        """Reads the client's memory and data, and puts its parameters together.

        Raises:
            FedfmError: if one of them is damaged, gone, or not what was asked for, or the owner's privacy budget does not allow another round.
        """
        memory = remembered(client, request, house)
        params, start, is_own = start_of(request.tensors, request.own, memory, house)
        received = {name: leaf for name, leaf in request.tensors.items() if name not in house.tuned.spec.names}
        examples, plan = opened(house.shard(client).train), house.plan
        if "private" in plan.local.traits().is_:
            plan.local.require_affordable(released(house.spent.of(client)), len(examples))
        secret = coins((plan.local, *plan.transforms), house.key.fold("client", request.round, client))
        return Desk(client, request, house, memory, examples, params, start, is_own, received, secret)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the parameters that travel: clients that agree in them send the same leaves."""
        return tuple(leaf.shape for leaf in self.params.values())

    def finish(self, trained: Trained, layout: Layout) -> Contribution:
        """The client's contribution. Its memory is durable when this returns.

        Raises:
            FedfmError: if the work diverged, a transform refuses it, or the memory cannot be written.
        """
        client, house, request = self.client, self.house, self.request
        if not trained.finite:
            raise DataError(f"its loss or parameters became NaN or infinite in round {request.round} (loss {trained.metrics['loss']})")
        plan, spec = house.plan, house.tuned.spec
        travelling = {name: leaf for name, leaf in trained.delta.items() if name in self.params}
        made = {**trained.delta, **plan.tuning.cut(travelling, request.own)}
        payload = {leaf.name: made[leaf.name] for leaf in layout.sent}
        memory: dict[str, torch.Tensor] = {_LOCAL + name: leaf for name, leaf in trained.memory.items()}
        if stays_home(house):
            values = spec.unflatten(trained.params_d)
            memory |= {HOME + name: values[name] for name in spec.names if name not in self.params}
        update = Update(payload, self.weight(), 1, client, self.numbers(trained))
        spent, release = house.spent.of(client), plan.local.release(len(self.examples))
        if release is not None:
            # Whatever becomes of this answer, its noise is spent.
            spent.add(release.name, release.steps)
        ctx = RoundContext(request.round, house.key, self.params, house.num_clients, client, spent=spent, secret=self.secret)
        for i, transform in enumerate(plan.transforms):
            received = under(f"{transform_place(i)}/", self.received)
            update, after = transform.encode(update, under(f"{transform_place(i)}/", self.memory), replace(ctx, received=received))
            memory |= {f"{transform_place(i)}/{name}": leaf for name, leaf in after.items()}
        ticket = house.memory.save(client, number(request.own, TICKET) or 0, number(request.own, COUNTED), memory)
        metrics = {"weight": update.weight, **update.metrics}
        return Contribution(replace(update, metrics=metrics, ticket=ticket), layout.leaves, plan.transforms)

    def weight(self) -> float:
        """The number of examples; 1 where it is withheld."""
        return 1.0 if self.house.withholds(self.client, "counts") else float(len(self.examples))

    def numbers(self, trained: Trained) -> dict[str, float]:
        """The numbers of the client's work. Where they are withheld, counts are 0 and the loss is missing."""
        house, numbers = self.house, dict(trained.metrics)
        if house.withholds(self.client, "counts"):
            numbers = {name: value if name == "loss" else 0.0 for name, value in numbers.items()}
        if house.withholds(self.client, "losses"):
            del numbers["loss"]
        return numbers


def declared(local: LocalTrainer, transforms: Sequence[Transform], trained: Spec, travelling: Spec) -> tuple[Leaf, ...]:
    """What a client's answer holds once it is decoded; both halves read it.

    Args:
        trained: All parameters that train.
        travelling: Those of them that leave the house.
    """
    answer_leaves = (
        *local.leaves(trained, travelling),
        leaves.number("weight", silent=1.0),
        leaves.number("loss", "mean", bound=2.0**30, signed=True, optional=True, kinds=("losses",)),
        *(leaves.number(name) for name in ("steps", "examples", "tokens")),
        leaves.number("padding", "mean", bound=1.0),
    )
    for transform in transforms:
        answer_leaves = transform.leaves(answer_leaves)
    return answer_leaves


def _pad(tuning: Tuning, full: Spec, payload: Tree, own: Mapping[str, Scalar]) -> Tree:
    deltas = {name: leaf for name, leaf in payload.items() if name in full.names}
    return {**payload, **tuning.pad(deltas, full, own)}

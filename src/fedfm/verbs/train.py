"""Local work: a client trains from the global parameters and answers with what its trainer declares, a delta in most cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from fedfm.client.bank import Job, Trained
from fedfm.client.house import House
from fedfm.client.verb import Contribution, Verb
from fedfm.core import leaves
from fedfm.core.errors import DataError, FedfmError, MessageError
from fedfm.core.leaves import Leaf
from fedfm.core.messages import Body, ClientId, Failure, Request, Scalar
from fedfm.core.parts import Errand, LocalTrainer, Plan, RoundContext, ServerState, Transform, Update, resized
from fedfm.core.task import Examples
from fedfm.core.tree import Spec, Tree
from fedfm.tuning.base import Tuning

_TICKET, _COUNTED, _UNIFORM = "ticket", "counted", "uniform"
HOME, _LOCAL = "home/", "local/"


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
        received = {i: transform.broadcast(state.of(place(i))) for i, transform in enumerate(plan.transforms)}
        tensors = {**params, **plan.server.broadcast(params, state.of("server"))}
        for i, tree in received.items():
            tensors |= {f"{place(i)}/{name}": leaf for name, leaf in tree.items()}
        unequal = {client: own for client in cohort if (own := tuning.own(client))}
        return Errand(
            body=Body(self.name, ctx.round, tensors, {_UNIFORM: plan.aggregator.uniform()}),
            leaves=declared(plan.local, plan.transforms, Spec.of(state.params), full),
            params=params,
            own={client: {_TICKET: ctx.round, **counted(state, client), **unequal.get(client, {})} for client in cohort},
            params_of=partial(tuning.cut, params) if unequal else None,
            pad=partial(_pad, tuning, full) if unequal else None,
            transforms=plan.transforms,
            received=received,
            sums=plan.aggregator.takes_sums(),
            uniform=plan.aggregator.uniform(),
        )

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
        jobs = [Job(client, desk.examples, under(_LOCAL, desk.memory)) for client, desk in desks.items()]
        some = next(iter(desks.values()))
        start = {**some.start, **{name: leaf for name, leaf in some.received.items() if not name.startswith("transforms.")}}
        starts_kd = None
        if any(desk.is_own for desk in desks.values()):
            starts_kd = torch.stack([house.tuned.spec.flatten(desk.start) for desk in desks.values()])
        for trained in house.bank.train(start, jobs, some.request.round, starts_kd=starts_kd):
            try:
                yield desks[trained.client].finish(trained)
            except FedfmError as error:
                yield Failure(trained.client, self.name, str(error))


@dataclass
class Desk:
    """What one client works with in a round.

    Args:
        params: The parameters that travel, as the client holds them.
        start: All that trains, at full size: what travelled, and what stays at home.
        is_own: Whether the client's start is not everybody's.
        received: What came with the parameters, for the trainer and each transform.
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

    @staticmethod
    def open(client: ClientId, request: Request, house: House) -> Desk:
        """Reads the client's memory and data, and puts its parameters together.

        Raises:
            FedfmError: if one of them is damaged, gone, or not what was asked for.
        """
        memory = house.memory.load(client, number(request.own, _COUNTED))
        params, start, is_own = parameters(request, house, memory)
        received = {name: leaf for name, leaf in request.tensors.items() if name not in house.tuned.spec.names}
        return Desk(client, request, house, memory, opened(house.shard(client).train), params, start, is_own, received)

    def finish(self, trained: Trained) -> Contribution:
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
        payload = {leaf.name: made[leaf.name] for leaf in plan.local.leaves(spec, Spec.of(self.params))}
        own_params = spec.unflatten(trained.params_d)
        memory: dict[str, torch.Tensor] = {_LOCAL + name: leaf for name, leaf in trained.memory.items()}
        memory |= {HOME + name: own_params[name] for name in spec.names if name not in self.params}
        update = Update(payload, self.weight(), 1, client, self.numbers(trained))
        ctx = RoundContext(request.round, house.key, self.params, house.num_clients, client, spent=house.spent.of(client))
        for i, transform in enumerate(plan.transforms):
            received = under(f"{place(i)}/", self.received)
            update, after = transform.encode(update, under(f"{place(i)}/", self.memory), replace(ctx, received=received))
            memory |= {f"{place(i)}/{name}": leaf for name, leaf in after.items()}
        ticket = house.memory.save(client, number(request.own, _TICKET) or 0, number(request.own, _COUNTED), memory)
        metrics = {"weight": update.weight, **update.metrics}
        full = declared(plan.local, plan.transforms, spec, Spec.of(self.params))
        return Contribution(replace(update, metrics=metrics, ticket=ticket), resized(full, self.params, spec.names))

    def weight(self) -> float:
        """The number of examples; 1 where the owner withholds it.

        Raises:
            DataError: if the mean is weighted by a number that the owner withholds.
        """
        if "counts" not in self.house.policy(self.client).withhold:
            return float(len(self.examples))
        if not self.request.meta.get(_UNIFORM):
            raise DataError("its owner withholds how many examples it has, and this round weighs clients by them. Use uniform weights.")
        return 1.0

    def numbers(self, trained: Trained) -> dict[str, float]:
        """The numbers of the client's work; counts are 0 where the owner withholds them."""
        if "counts" not in self.house.policy(self.client).withhold:
            return trained.metrics
        return {name: value if name == "loss" else 0.0 for name, value in trained.metrics.items()}


def require_parameters(body: Body, house: House) -> None:
    """Refuses a body that does not hold the parameters that travel, with the model's shapes and types, and finite.

    Raises:
        MessageError: naming the first that is missing or wrong.
    """
    spec = house.tuned.spec
    travelling = set(house.plan.tuning.travels(spec))
    missing = [name for name in spec.names if name in travelling and name not in body.tensors]
    if missing:
        raise MessageError(f"a request to {body.verb} must hold the parameters; {missing[:3]} are missing.")
    rows = [row for row in zip(spec.names, spec.shapes, spec.dtypes, strict=True) if row[0] in travelling]
    names, shapes, dtypes = zip(*rows, strict=True) if rows else ((), (), ())
    Spec(names, shapes, dtypes).require({name: body.tensors[name] for name in names}, f"a request to {body.verb}")


def parameters(request: Request, house: House, memory: Tree) -> tuple[Tree, Tree, bool]:
    """A client's parameters: those that travel, as it holds them; all that it starts from, at full size; and whether that start is its own alone.

    :func:`require_parameters` has checked the body.

    Raises:
        MessageError: if the request's own part is not what this plan's clients are sent.
    """
    tuning, spec = house.plan.tuning, house.tuned.spec
    sent = {name: request.tensors[name] for name in tuning.travels(spec)}
    params = tuning.cut(sent, request.own)
    full = tuning.pad(params, spec, request.own)
    home = [name for name in spec.names if name not in sent]
    if not home:
        return params, full, params.keys() != sent.keys() or any(params[name] is not sent[name] for name in sent)
    kept = under(HOME, memory)
    # In the order of the specification, which is how a row of the bank is laid out.
    start = {name: full[name] if name in full else kept.get(name, house.start[name]) for name in spec.names}
    return params, start, True


def declared(local: LocalTrainer, transforms: Sequence[Transform], trained: Spec, travelling: Spec) -> tuple[Leaf, ...]:
    """What a client's answer holds once it is decoded; both halves read it.

    Args:
        trained: All parameters that train.
        travelling: Those of them that leave the house.
    """
    answer_leaves = (
        *local.leaves(trained, travelling),
        leaves.number("weight"),
        leaves.number("loss", "mean", bound=2.0**30, signed=True),
        *(leaves.number(name) for name in ("steps", "examples", "tokens")),
        leaves.number("padding", "mean", bound=1.0),
    )
    for transform in transforms:
        answer_leaves = transform.leaves(answer_leaves)
    return answer_leaves


def counted(state: ServerState, client: ClientId) -> dict[str, Scalar]:
    """The part of a request that says which of the client's tickets was counted last."""
    return {_COUNTED: state.counted[client]} if client in state.counted else {}


def number(own: Mapping[str, Scalar], name: str) -> int | None:
    """A count in a request's own part.

    Raises:
        MessageError: if it is something else.
    """
    value = own.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise MessageError(f"a request's {name} is {value!r:.20}, not a count.")
    return value


def opened(examples: Examples) -> Examples:
    """The examples, their files opened, so that damaged ones are named before a bank begins."""
    lengths = examples.lengths
    if len(lengths) != len(examples):
        raise DataError(
            f"{len(lengths)} examples are there, and {len(examples)} were prepared. Clear the cache and prepare the data again."
        )
    # A truncated file lacks its end.
    if len(examples) and len(examples.ids(len(examples) - 1)) != lengths[-1]:
        raise DataError("its prepared token ids are fewer than its index says. Clear the cache and prepare the data again.")
    return examples


def place(i: int) -> str:
    """A transform's place in the recipe."""
    return f"transforms.{i}"


def under(prefix: str, tree: Tree) -> dict[str, torch.Tensor]:
    """The leaves of a tree whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): leaf for name, leaf in tree.items() if name.startswith(prefix)}


def _pad(tuning: Tuning, full: Spec, payload: Tree, own: Mapping[str, Scalar]) -> Tree:
    deltas = {name: leaf for name, leaf in payload.items() if name in full.names}
    return {**payload, **tuning.pad(deltas, full, own)}

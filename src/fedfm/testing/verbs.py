"""What every verb must do: answer each request once, with what it declares, and meet what is damaged with a failure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch

from fedfm.channels import Plain
from fedfm.client.house import House
from fedfm.client.runtime import Runtime
from fedfm.client.verb import Contribution, Verb, verbs
from fedfm.core import leaves as declare
from fedfm.core.errors import FedfmError, MessageError
from fedfm.core.messages import ClientId, Failure, Reply, Request, Scalar, pack, unpack
from fedfm.core.parts import Errand, RoundContext
from fedfm.core.session import Answer
from fedfm.testing.parts import check_part, same
from fedfm.testing.sessions import Scripted


def check_verb(verb: Verb, house: House, errand: Errand) -> None:
    """Each request has one answer that fits its declaration and that the server's half reads; a damaged one is a failure of its client alone.

    Args:
        verb: The verb, which must be in the index.
        house: At least two clients, under a plan with the channel ``Plain``.
        errand: What the verb asks all of them.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(verb)
    name = type(verb).__name__
    assert verbs().get(verb.name) == verb, f"{name} is not what the index has as {verb.name!r}; export it, or name it in the entry points"
    assert isinstance(house.plan.channel, Plain) and len(house.clients) > 1, "the suite needs two clients and the channel Plain"
    bench = _Bench(name, verb, house, errand)
    bench.check_contributions()
    bench.check_collected()
    bench.check_damaged()


class _Bench:
    """A verb and the errand that it is tried with."""

    def __init__(self, name: str, verb: Verb, house: House, errand: Errand) -> None:
        self.name, self.verb, self.house, self.errand = name, verb, house, errand
        self.requests = {client: errand.request(client) for client in house.clients}

    def arrived(self) -> dict[ClientId, Request]:
        """The requests as they arrive, with one body."""
        crossed: dict[ClientId, Request] = {}
        for client, request in self.requests.items():
            other = unpack(pack(request))
            assert isinstance(other, Request) and other.body.digest == request.body.digest and dict(other.own) == dict(request.own), (
                f"{self.name}: the request of {client} does not survive the wire"
            )
            crossed[client] = other
        body = next(iter(crossed.values())).body
        return {client: replace(request, body=body) for client, request in crossed.items()}

    def check_contributions(self) -> None:
        """One outcome for each, that is what its leaves say."""
        outcomes = list(self.verb.answer(self.arrived(), self.house))
        clients = sorted(item.client if isinstance(item, Failure) else item.update.client or "" for item in outcomes)
        assert clients == sorted(self.requests), f"{self.name}: {sorted(self.requests)} were asked, and {clients} answered"
        for item in outcomes:
            assert isinstance(item, Contribution), f"{self.name}: an undamaged request fails: {item}"
            _require_declared(self.name, item, self.errand)

    def check_collected(self) -> None:
        """The server reads every answer through the plain channel, and the same again when it asks again."""
        once, again = self.handle(self.arrived()), self.handle(self.arrived())
        for client, x in once.items():
            y = again[client]
            assert isinstance(x, Reply) and isinstance(y, Reply), f"{self.name}: {client} fails: {x}, {y}"
            assert x.meta == y.meta or math.nan in map(_number, x.meta.values()), (
                f"{self.name}: {client}, asked again, tells something else"
            )
            assert same(x.tensors, y.tensors), f"{self.name}: {client}, asked again, answers something else"
        ctx = RoundContext(self.errand.body.round, self.house.key, self.errand.params, self.house.num_clients, leaves=self.errand.leaves)
        for sums in (False, True):
            errand = replace(self.errand, sums=sums)
            for outcome in Plain().collect(Scripted(lambda requests: once.values()), errand, self.house.clients, None, ctx):
                assert not isinstance(outcome, Failure), (
                    f"{self.name}: the server does not read what {outcome.client} says: {outcome.reason}"
                )

    def check_damaged(self) -> None:
        """Whoever gets a damaged request fails, whoever shares a bank with it does not, and nothing is raised."""
        first, *others = self.requests
        for law, must_fail, damaged in self._damaged(self.arrived()[first]):
            # The others' requests are whole. They share the damaged request's body where only its own part is wrong.
            whole = {client: request for client, request in self.arrived().items() if client != first}
            if "its own" in law:
                whole = {client: replace(request, body=damaged.body) for client, request in whole.items()}
            try:
                # A runtime turns any exception into a failure, which would hide what is wrong.
                with suppress(FedfmError):
                    list(self.verb.answer({first: damaged}, self.house))
            except Exception as error:
                raise AssertionError(f"{self.name}: a request with {law} is met with {type(error).__name__}: {error}") from error
            answers = self.handle({first: damaged, **whole})
            assert not must_fail or isinstance(answers[first], Failure), f"{self.name}: a request with {law} is answered"
            for client in others:
                assert isinstance(answers[client], Reply), f"{self.name}: a request with {law} fails {client} too: {answers[client]}"

    def handle(self, requests: Mapping[ClientId, Request]) -> dict[ClientId, Answer]:
        """A fresh runtime's answers, one for each request."""
        answers = list(Runtime(self.house).handle(requests))
        clients = sorted(answer.client for answer in answers)
        assert clients == sorted(requests), f"{self.name}: {sorted(requests)} were asked, and {clients} answered"
        return {answer.client: answer for answer in answers}

    def _damaged(self, request: Request) -> Iterator[tuple[str, bool, Request]]:
        """What is wrong, whether it must fail, and the request."""
        body = request.body
        for name, leaf in body.tensors.items():
            others, is_parameter = {key: item for key, item in body.tensors.items() if key != name}, name in self.errand.params
            yield f"no {name!r}", is_parameter, replace(request, body=replace(body, tensors=others))
            for wrong in _wrong(leaf):
                damaged = replace(body, tensors={**body.tensors, name: wrong})
                yield f"{name!r} as {str(wrong.dtype)[6:]}{list(wrong.shape)}", is_parameter, replace(request, body=damaged)
        odd: tuple[Scalar, ...] = ("many", -1, True, 0.5, math.nan, 1 << 40)
        for name in request.own:
            for value in odd:
                yield f"{value!r} as its own {name!r}", True, replace(request, own={**request.own, name: value})
        yield "something unknown of its own", False, replace(request, own={**request.own, "no-such-number": "many"})
        for name in (*body.meta, "no-such-setting"):
            for value in (*odd, None):
                yield f"{value!r} for {name!r}", False, replace(request, body=replace(body, meta={**body.meta, name: value}))
            rest = {key: item for key, item in body.meta.items() if key != name}
            yield f"no {name!r}", False, replace(request, body=replace(body, meta=rest))
        yield "nothing in it", bool(self.errand.params), Request.of(body.verb, body.round)


def _require_declared(name: str, contribution: Contribution, errand: Errand) -> None:
    update, leaves = contribution.update, contribution.leaves
    whose = f"{name}: the answer of {update.client}"
    declared = {leaf.name: leaf for leaf in declare.numbers(leaves)}
    numbers = {"weight": update.weight, **update.metrics} if "weight" in declared else dict(update.metrics)
    assert set(numbers) == set(declared), f"{whose} tells {sorted(numbers)}, and declares {sorted(declared)}"
    try:
        for key, leaf in declared.items():
            leaf.require(numbers[key], whose)
        if not errand.transforms:
            declare.require(leaves, update.payload, whose)
    except MessageError as error:
        raise AssertionError(str(error)) from error
    assert {leaf.name for leaf in leaves} <= {leaf.name for leaf in errand.leaves}, f"{whose} holds leaves that its errand does not declare"


def _wrong(leaf: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors that are no parameter of this leaf's shape."""
    yield leaf.unsqueeze(0)
    yield leaf.reshape(-1)[:-1] if leaf.numel() else leaf.new_zeros(1)
    if leaf.dim() == 2 and leaf.shape[0] != leaf.shape[1]:
        yield leaf.T.contiguous()
    for dtype in (torch.bool, torch.int32, torch.float16, torch.float64):
        if dtype != leaf.dtype:
            yield leaf.to(dtype)
    if leaf.is_floating_point():
        yield torch.full_like(leaf, math.nan)
        yield torch.full_like(leaf, math.inf)


def _number(value: Scalar) -> float | None:
    return math.nan if isinstance(value, float) and math.isnan(value) else None


__all__ = ["check_verb"]

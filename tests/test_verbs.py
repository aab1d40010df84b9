"""What a server asks and a client answers, verb by verb, under one suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
from parts import AdaptiveClip, Personal, Ranks, Scalars, ScalarsServer

from fedfm.client.verb import Contribution, Verb
from fedfm.core import leaves
from fedfm.core.messages import Body
from fedfm.core.parts import Errand, RoundContext, Update
from fedfm.core.round import start
from fedfm.federation import Federation
from fedfm.methods import Scaffold
from fedfm.simulation import Simulation
from fedfm.tasks import Classification
from fedfm.testing import check_verb, examples, tiny
from fedfm.testing.tiny import spec
from fedfm.tuning import LoRA
from fedfm.verbs import Describe, Evaluation, Train

VERBS = examples("verbs", {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three unequal owners and a model of one layer."""
    folder = tmp_path_factory.mktemp("verbs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(folder / "cache"))
        yield tiny.federation(folder, "abcab")


def trained(simulation: Simulation) -> Errand:
    plan, clients = simulation.federation, simulation.clients
    state = start(plan, simulation.house.start)
    return plan.work(state, clients, RoundContext(1, simulation.key, state.params, len(clients)))


def evaluated(simulation: Simulation) -> Errand:
    plan, house = simulation.federation, simulation.house
    return Evaluation().errand(plan, start(plan, house.start), house.clients, max(len(house.labels), 2))


ERRANDS: dict[type[Verb], Callable[[Simulation], Errand]] = {
    Train: trained,
    Evaluation: evaluated,
    Describe: lambda simulation: Describe().errand(simulation.house.labels),
}
CLASSES = {"task": Classification(max_length=16), "model": spec("Bert", num_hidden_layers=1)}
PLANS: dict[str, tuple[dict[str, Any], tuple[type[Verb], ...]]] = {
    "plain": ({}, (Train, Evaluation, Describe)),
    "classes": (CLASSES, (Evaluation, Describe)),
    "a method that sends more, and a transform that does": ({"method": Scaffold(), "transforms": (AdaptiveClip(),)}, (Train,)),
    "two ranks": ({"tuning": Ranks(LoRA(r=2), (("a", 1),))}, (Train, Evaluation)),
    "a leaf at home": ({"tuning": Personal(LoRA(r=2), ("*lora_B*",))}, (Train, Evaluation)),
    "scalars": ({"local": Scalars(steps=1), "server": ScalarsServer()}, (Train,)),
}


def test_every_verb_has_an_errand() -> None:
    assert {type(verb) for verb in VERBS} <= set(ERRANDS)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kinds) in PLANS.items() for kind in kinds])
def test_conformance(base: Federation, name: str, kind: type[Verb]) -> None:
    simulation = Simulation.build(replace(base, **PLANS[name][0]))
    check_verb(kind(), simulation.house, ERRANDS[kind](simulation))


# The suite catches what it is there to catch.


@dataclass(frozen=True)
class Half(Verb):
    """Answers every second client."""

    name = "half"

    def answer(self, requests, house):
        yield from (contribution(client) for client in list(requests)[::2])


@dataclass(frozen=True)
class Chatty(Verb):
    """Tells more than it declares."""

    name = "chatty"

    def answer(self, requests, house):
        yield from (contribution(client, more=1.0) for client in requests)


@dataclass(frozen=True)
class Boundless(Verb):
    """Tells numbers beyond what it declares."""

    name = "boundless"

    def answer(self, requests, house):
        yield from (contribution(client, size=-1.0) for client in requests)


@dataclass(frozen=True)
class Trusting(Verb):
    """Believes its server."""

    name = "trusting"

    def answer(self, requests, house):
        yield from (contribution(client, size=request.meta["least"] + 1.0) for client, request in requests.items())


@dataclass(frozen=True)
class Fickle(Verb):
    """Says something else when it is asked again."""

    name = "fickle"

    def answer(self, requests, house):
        yield from (contribution(client, size=float(next(COUNTER))) for client in requests)


COUNTER = count()
SIZE = leaves.number("size")


def contribution(client: str, size: float = 3.0, **more: float) -> Contribution:
    return Contribution(Update({}, client=client, metrics={"size": size, **more}), (SIZE,))


@pytest.mark.parametrize(
    ("verb", "law"),
    [
        (Half(), "were asked, and .* answered"),
        (Chatty(), "tells .'more', 'size'., and declares .'size'."),
        (Boundless(), "'size' reaches -1"),
        (Trusting(), "is met with (KeyError|TypeError)"),
        (Fickle(), "asked again, tells something else"),
        (Train(), "not what the index has"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Verb) else "",
)
def test_a_broken_verb_fails(base: Federation, verb: Verb, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {part.name: part for part in (Half(), Chatty(), Boundless(), Trusting(), Fickle())}
    for module in ("fedfm.client.runtime", "fedfm.testing.verbs"):
        monkeypatch.setattr(f"{module}.verbs", lambda: known)
    errand = Errand(Body(verb.name, meta={"least": 2}), (SIZE,), uniform=True)
    with pytest.raises(AssertionError, match=law):
        check_verb(verb, Simulation.build(base).house, errand)

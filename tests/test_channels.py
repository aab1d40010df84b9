"""How answers reach the aggregator: every client has one outcome, and nothing that is not a number is believed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from parts import Masks

from fedfm.channels import Plain, SecureAggregation
from fedfm.core import leaves as declare
from fedfm.core.leaves import Leaf
from fedfm.core.messages import Body, Failure, Reply, Request
from fedfm.core.parts import Channel, Errand, Partial, Sealed, Update
from fedfm.testing import check_channel, examples
from fedfm.testing.channels import halves
from fedfm.testing.parts import context
from fedfm.testing.sessions import Scripted

LEAVES = (Leaf("w", (2,)), declare.number("weight"), declare.number("loss", "mean", signed=True))
ERRAND = Errand(Body("train", 3), LEAVES, params={"w": torch.zeros(2)}, own={"b": {"ticket": 7}})


def collect(*answers: Reply | Failure, clients: str = "ab", errand: Errand = ERRAND) -> list[Update | Partial | Failure]:
    return list(Plain().collect(Scripted(lambda requests: answers), errand, list(clients), None, context(errand.params, 3)))


def reply(client: str = "a", verb: str = "train", round: int = 3, **meta: object) -> Reply:
    return Reply(client, verb, round, {"w": torch.ones(2)}, {"weight": 1.0, "loss": 0.5, **meta})  # type: ignore[dict-item]


# The suite's values reach 8, and its weights 6.
SECURE = SecureAggregation(min_clients=3, reach=8.0, max_weight=8.0)


@pytest.mark.parametrize(
    "channel", [*(channel for channel in examples("channels", {}) if channel != SecureAggregation()), SECURE], ids=repr
)
def test_conformance(channel: Channel) -> None:
    check_channel(channel, 80 if channel != SECURE else 20)


@pytest.mark.parametrize("grid", [24, 32])
def test_a_channel_with_two_exchanges_conforms_to_its_grid(grid: int) -> None:
    check_channel(Masks(grid=grid), grid)
    with pytest.raises(AssertionError, match="is off by"):
        check_channel(Masks(grid=grid), grid=60)


def test_replies_become_updates_in_their_order() -> None:
    b, a = collect(reply("b", weight=12, loss=1.5, ticket=7), reply("a"))
    assert isinstance(b, Update) and isinstance(a, Update)
    assert (b.client, b.weight, dict(b.metrics), b.num_clients, b.ticket) == ("b", 12.0, {"loss": 1.5}, 1, 7)
    assert (a.client, a.weight, dict(a.metrics), a.ticket) == ("a", 1.0, {"loss": 0.5}, None)
    assert torch.equal(a.payload["w"], torch.ones(2))


def test_updates_stream() -> None:
    def answers() -> Iterator[Reply]:
        yield reply("a")
        raise AssertionError("asked for more before the first update was taken")

    outcomes = Plain().collect(Scripted(lambda requests: answers()), ERRAND, ["a", "b"], None, context({}, 3))
    assert isinstance(next(outcomes), Update)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(round=2), "round 2"),
        (reply(verb="evaluate"), "evaluate"),
        (reply(weight=0), "weight is 0"),
        (reply(weight=-3.0), "'weight' reaches -3"),
        (reply(weight=math.nan), "nan"),
        (reply(weight=10**400), "weight is 1000"),
        (reply(weight=2.0**31), "'weight' reaches"),
        (reply(weight=True), "True"),
        (reply(weight="many"), "many"),
        (reply(loss=math.nan), "loss is nan"),
        (reply(loss=-math.inf), "loss is -inf"),
        (reply(loss=None), "does not tell its loss"),
        (reply(note=1.0), "['note']"),
        (reply(ticket=-1), "ticket is -1"),
        (reply(ticket=0.5), "ticket is 0.5"),
        (reply(ticket=2**31), "ticket is 2147483648"),
        (reply(ticket=10**400), "ticket is 1000"),
    ],
)
def test_what_cannot_be_believed_is_a_failure(answer: Reply, words: str) -> None:
    for sums in (False, True):
        (failure,) = collect(answer, clients="a", errand=replace(ERRAND, sums=sums))
        assert isinstance(failure, Failure) and (failure.client, failure.stage) == ("a", "channel") and words in failure.reason


def test_each_request_has_one_outcome(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = collect(reply("a"), reply("a", weight=99), reply("mallory"), Failure("mallory", "train", "x"), clients="abc")
    assert [outcome.client for outcome in outcomes if not isinstance(outcome, Partial)] == ["a", "b", "c"]
    assert isinstance(outcomes[0], Update) and outcomes[0].weight == 1.0
    assert all(isinstance(outcome, Failure) and "no answer" in outcome.reason for outcome in outcomes[1:])
    assert "mallory" in caplog.text


def test_one_lost_client_loses_a_sum_and_the_next_try_gives_it() -> None:
    updates = {client: Update({"w": torch.ones(2)}, 2.0, client=client, metrics={"weight": 2.0, "loss": 1.0}) for client in "abc"}
    lost = halves(Masks(), updates, LEAVES, lambda verb, answers: answers[:2] if verb == "train" else answers)
    outcomes = list(Masks().collect(lost, ERRAND, list("abc"), None, context(ERRAND.params, 3)))
    assert {outcome.client for outcome in outcomes if isinstance(outcome, Failure)} == set("abc")
    (total,) = Masks().collect(halves(Masks(), updates, LEAVES), ERRAND, list("abc"), None, context(ERRAND.params, 3))
    assert isinstance(total, Partial) and total.weight == 6 and total.mean()["w"].tolist() == [1.0, 1.0]


def test_a_client_under_masks_refuses_what_would_show_it() -> None:
    update = Update({"w": torch.ones(2)}, 2.0, client="a", metrics={"weight": 2.0, "loss": 1.0})
    (alone,) = Masks().collect(halves(Masks(), {"a": update}, LEAVES), ERRAND, ["a"], None, context(ERRAND.params, 3))
    assert isinstance(alone, Failure) and "one client hides nothing" in alone.reason
    with pytest.raises(Exception, match="did not relay"):
        Masks().seal(update, LEAVES, Request.of("train", 3), {"secret": 5})


# The suite catches what it is there to catch.


@dataclass(frozen=True)
class Impatient(Channel):
    """Forgets those who say nothing."""

    def collect(self, session, errand, clients, deadline, ctx):
        for outcome in Plain().collect(session, errand, clients, deadline, ctx):
            if not (isinstance(outcome, Failure) and "no answer" in outcome.reason):
                yield outcome

    def seal(self, update, leaves, request, scratch):
        return Plain().seal(update, leaves, request, scratch)


@dataclass(frozen=True)
class Gullible(Channel):
    """Believes what arrives."""

    def collect(self, session, errand, clients, deadline, ctx):
        for answer in session.exchange({client: errand.request(client) for client in clients}, deadline):
            if isinstance(answer, Failure):
                yield answer
                continue
            numbers = dict(answer.meta)
            yield Update(answer.tensors, numbers.pop("weight"), client=answer.client, metrics=numbers)

    def seal(self, update, leaves, request, scratch):
        return Plain().seal(update, leaves, request, scratch)


@dataclass(frozen=True)
class Lazy(Channel):
    """Never tells the session until when it waits."""

    def collect(self, session, errand, clients, deadline, ctx):
        yield from Plain().collect(session, errand, clients, None, ctx)

    def seal(self, update, leaves, request, scratch):
        return Plain().seal(update, leaves, request, scratch)


@dataclass(frozen=True)
class Rounding(Channel):
    """Cuts what it seals."""

    def collect(self, session, errand, clients, deadline, ctx):
        yield from Plain().collect(session, errand, clients, deadline, ctx)

    def seal(self, update, leaves, request, scratch):
        sealed = Plain().seal(update, leaves, request, scratch)
        return Sealed({name: leaf.bfloat16().to(leaf.dtype) for name, leaf in sealed.tensors.items()}, sealed.meta)


@dataclass(frozen=True)
class Fragile(Channel):
    """Counts on a server that asks in turn."""

    verbs = ("fragile.hello",)

    def collect(self, session, errand, clients, deadline, ctx):
        hello = dict.fromkeys(clients, Request(Body("fragile.hello", errand.body.round)))
        honest = {client: Reply(client, "fragile.hello", errand.body.round) for client in clients}
        said = {answer.client for answer in session.exchange(hello, deadline) if answer == honest.get(answer.client)}
        yield from (Failure(client, "train", "no memory") for client in clients if client not in said)
        yield from Plain().collect(session, errand, [client for client in clients if client in said], deadline, ctx)

    def answer(self, client, request, scratch):
        scratch["said"] = True
        return Sealed({}, {})

    def seal(self, update, leaves, request, scratch):
        assert scratch["said"]
        return Plain().seal(update, leaves, request, scratch)


@pytest.mark.parametrize(
    ("channel", "law"),
    [
        (Impatient(), "were asked, and the outcomes are of"),
        (Gullible(), "ended the round for everybody|tickets were"),
        (Lazy(), "the deadline does not reach the session"),
        (Rounding(), "is off by"),
        (Fragile(), "out of turn is met with KeyError"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Channel) else "",
)
def test_a_broken_channel_fails(channel: Channel, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_channel(channel)

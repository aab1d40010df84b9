"""How updates reach the aggregator: every request has one outcome, and nothing that is not a number is believed."""

from __future__ import annotations

import math

import pytest
import torch

from fedfm.channels import Plain
from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.parts import Session, Update
from fedfm.testing import check_part, examples
from fedfm.testing.parts import context


class Answers(Session):
    """A session that gives these answers."""

    def __init__(self, *answers) -> None:
        self.answers = answers

    def exchange(self, requests, deadline=None):
        yield from self.answers

    def close(self) -> None: ...


REQUEST = Request.of("train", 3)


def collect(*answers, clients="ab"):
    return list(Plain().collect(Answers(*answers), dict.fromkeys(clients, REQUEST), None, context({}, 3)))


def reply(client="a", verb="train", round=3, **meta) -> Reply:
    return Reply(client, verb, round, {"w": torch.ones(2)}, meta)


@pytest.mark.parametrize("channel", examples("channels", {}), ids=repr)
def test_conformance(channel) -> None:
    check_part(channel)
    cohort = {f"client-{i}": REQUEST for i in range(5)}
    given = {name: reply(name, weight=i + 1) for i, name in enumerate(cohort)}
    outcomes = list(channel.collect(Answers(*given.values()), cohort, None, context({}, 3)))
    assert sum(outcome.num_clients for outcome in outcomes if isinstance(outcome, Update)) == 5


def test_replies_become_updates_in_their_order() -> None:
    b, a = collect(reply("b", weight=12, loss=1.5, note="hello", done=True), reply("a"))
    assert isinstance(b, Update) and isinstance(a, Update)
    assert (b.client, b.weight, dict(b.metrics), b.num_clients) == ("b", 12.0, {"loss": 1.5}, 1)
    assert (a.client, a.weight, dict(a.metrics)) == ("a", 1.0, {})
    assert torch.equal(a.payload["w"], torch.ones(2))


def test_updates_stream() -> None:
    def answers():
        yield reply("a")
        raise AssertionError("asked for more before the first update was taken")

    session = Answers()
    session.exchange = lambda requests, deadline=None: answers()  # type: ignore[method-assign]
    assert isinstance(next(Plain().collect(session, {"a": REQUEST}, None, context({}, 3))), Update)


def test_failures_pass() -> None:
    failure = Failure("a", "train", "no memory")
    assert collect(failure, reply("b"))[0] is failure


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(round=2), "round 2"),
        (reply(verb="evaluate"), "evaluate"),
        (reply(weight=0), "weight is 0"),
        (reply(weight=-3.0), "-3.0"),
        (reply(weight=math.nan), "nan"),
        (reply(weight=10**400), "weight is 1000"),
        (reply(weight=True), "True"),
        (reply(weight="many"), "many"),
        (reply(loss=math.nan), "loss is nan"),
        (reply(loss=-math.inf), "loss is -inf"),
    ],
)
def test_what_cannot_be_believed_is_a_failure(answer: Reply, words: str) -> None:
    (failure,) = collect(answer, clients="a")
    assert isinstance(failure, Failure) and (failure.client, failure.stage) == ("a", "channel") and words in failure.reason


def test_each_request_has_one_outcome(caplog) -> None:
    outcomes = collect(reply("a"), reply("a", weight=99), reply("mallory"), Failure("mallory", "train", "x"), clients="abc")
    assert [outcome.client for outcome in outcomes] == ["a", "b", "c"]
    assert isinstance(outcomes[0], Update) and outcomes[0].weight == 1.0
    assert all(isinstance(outcome, Failure) and "no answer" in outcome.reason for outcome in outcomes[1:])
    assert "mallory" in caplog.text

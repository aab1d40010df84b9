"""When a round has enough answers, and what a client's failure does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedfm.aggregators import CoordinateMedian, Mean, TrimmedMean
from fedfm.core import leaves as declare
from fedfm.core.errors import RoundError
from fedfm.core.leaves import Leaf
from fedfm.core.messages import Body, ClientId, Failure, Reply, Request
from fedfm.core.parts import Errand, Pacing, Partial, Update
from fedfm.core.session import Answer
from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.models import Model
from fedfm.pacing import Barrier
from fedfm.testing import check_part, examples
from fedfm.testing.parts import context
from fedfm.testing.sessions import Scripted

COHORT = ["a", "b", "c"]
PLAN = Federation(model=Model(source="none"), data=Data("none.jsonl"))
ERRAND = Errand(Body("train", 3), (Leaf("w", (2,)), declare.number("weight")), params={"w": torch.zeros(2)})


class Clients:
    """A cohort of whom some fail, each so many times.

    Attributes:
        asked: Who was asked, exchange by exchange.
    """

    def __init__(self, fail: Mapping[ClientId, int]) -> None:
        self.left, self.asked = dict(fail), list[list[ClientId]]()

    def __call__(self, requests: Mapping[ClientId, Request]) -> list[Answer]:
        self.asked.append(list(requests))
        return [self.answer(client) for client in requests]

    def answer(self, client: ClientId) -> Answer:
        self.left[client] = self.left.get(client, 0) - 1
        if self.left[client] >= 0:
            return Failure(client, "train", f"{client} broke")
        return Reply(client, "train", 3, {"w": torch.ones(2)}, {"weight": 2.0})


def gather(
    fail: Mapping[ClientId, int], cohort: list[ClientId] = COHORT, sums: bool = False, pacing: Pacing | None = None, **changes: Any
) -> tuple[list[Update | Partial | Failure], Clients]:
    clients, plan, errand = Clients(fail), replace(PLAN, **changes), replace(ERRAND, sums=sums)
    items = (pacing or Barrier()).gather(plan, Scripted(clients), errand, cohort, context(errand.params, 3))
    return list(items), clients


def names(items: list[Update | Partial | Failure], kind: type) -> list[ClientId]:
    return sorted(
        client
        for item in items
        if isinstance(item, kind)
        for client in (item.clients if isinstance(item, Partial) else [item.client or ""])
    )


@pytest.mark.parametrize("pacing", examples("pacing", {}), ids=repr)
@pytest.mark.parametrize("sums", [False, True])
def test_everybody_who_answers_counts_once(pacing: Pacing, sums: bool) -> None:
    check_part(pacing)
    items, clients = gather({}, sums=sums, pacing=pacing)
    assert names(items, Partial if sums else Update) == COHORT and clients.asked == [COHORT]


@pytest.mark.parametrize("sums", [False, True])
def test_a_failure_is_left_out_or_asked_once_more(sums: bool) -> None:
    kind = Partial if sums else Update
    items, clients = gather({"b": 1}, sums=sums)
    assert (names(items, kind), names(items, Failure), clients.asked) == (["a", "c"], ["b"], [COHORT])
    items, clients = gather({"b": 1}, sums=sums, on_failure="retry")
    assert (names(items, kind), names(items, Failure), clients.asked) == (COHORT, ["b"], [COHORT, ["b"]])
    items, clients = gather({"b": 9}, sums=sums, on_failure="retry")
    # Each attempt has its failure, and nobody is asked a third time.
    assert (names(items, kind), names(items, Failure), clients.asked) == (["a", "c"], ["b", "b"], [COHORT, ["b"]])


def test_a_failure_stops_a_run_that_says_so() -> None:
    with pytest.raises(RoundError, match=r"client 'b' failed in train: b broke .*on_failure: stop"):
        gather({"b": 1}, on_failure="stop")
    items, _ = gather({}, on_failure="stop")
    assert names(items, Update) == COHORT


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"min_clients": 2}, 2),
        ({"min_clients": 3}, 3),
        ({"aggregator": TrimmedMean(trim=1)}, 3),
        ({"aggregator": CoordinateMedian(), "min_clients": 2}, 2),
        ({"aggregator": Mean()}, 1),
    ],
)
def test_a_round_needs_as_many_as_the_plan_and_its_rule_say(changes: dict[str, Any], needed: int, sums: bool) -> None:
    for num_failed in range(4):
        fail = dict.fromkeys(COHORT[:num_failed], 1)
        if 3 - num_failed >= needed:
            assert len(names(gather(fail, sums=sums, **changes)[0], Failure)) == num_failed
        else:
            with pytest.raises(
                RoundError, match=rf"{3 - num_failed} of 3 clients gave an update, at least {needed} are needed. a: a broke"
            ):
                gather(fail, sums=sums, **changes)


def test_a_cohort_that_is_empty_by_chance_is_a_round_without_an_update() -> None:
    assert gather({}, cohort=[])[0] == []
    with pytest.raises(RoundError, match="0 of 0 clients"):
        gather({}, cohort=[], min_clients=2)

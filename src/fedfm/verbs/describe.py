"""Asks what an owner has: numbers of examples and tokens, and how many examples of each class. The roster is made from the answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedfm.client.house import House
from fedfm.client.verb import Contribution, Verb
from fedfm.core import leaves
from fedfm.core.errors import DataError, FedfmError
from fedfm.core.keys import Key
from fedfm.core.leaves import Kind, Leaf
from fedfm.core.messages import Body, ClientId, Failure, Request
from fedfm.core.parts import Channel, Errand, Partial, RoundContext, Session, Transform, Update
from fedfm.core.roster import Holding, Roster, count, total_of
from fedfm.core.secret import Secret

_COUNTS = ("train", "test", "tokens")
_LABELS = "labels"


@dataclass(frozen=True)
class Describe(Verb):
    """Asks owners what they have. An owner's policy may withhold the counts, the labels or both, and a privacy promise does; a number that is withheld is NaN."""

    name = "describe"

    def errand(self, labels: Sequence[str], sums: bool = False) -> Errand:
        """What everybody is asked, before the first round.

        Args:
            labels: The classes, in the order of their indices.
        """
        return Errand(Body(self.name), _declared(len(labels)), sums=sums, uniform=True)

    def roster(self, channel: Channel, session: Session, clients: Sequence[ClientId], labels: Sequence[str], key: Key) -> Roster:
        """Asks everyone, through the channel that all answers pass.

        Raises:
            DataError: naming an owner that does not answer.
        """
        errand, ctx = self.errand(labels), RoundContext(0, key, {}, len(clients))
        holdings: dict[ClientId, Holding] = {}
        totals: Holding | None = None
        for item in channel.collect(session, errand, clients, None, ctx):
            if isinstance(item, Failure):
                raise DataError(f"{item.client} does not say what it has ({item.stage}): {item.reason}")
            if isinstance(item, Partial):
                totals = _holding(item.totals(), labels)
            elif item.client is not None:
                holdings[item.client] = _holding({**item.payload, **item.metrics}, labels)
        ordered = {client: holdings[client] for client in clients if client in holdings}
        return Roster(tuple(clients), ordered, totals or total_of(ordered.values()))

    def tells(self, request: Request, house: House) -> Mapping[Kind, str]:
        """Everything, where a sum of all would miss it; else a number that is withheld is NaN."""
        channel = house.plan.channel
        if "single-updates" not in channel.traits().hides:
            return {}
        why = f"{type(channel).__name__} shows sums alone, in which they cannot be left out"
        return {"counts": why, "labels": why} if house.labels else {"counts": why}

    def answer(self, requests: Mapping[ClientId, Request], house: House) -> Iterator[Contribution | Failure]:
        """What each owner has, as far as its policy and the plan's privacy promise let it."""
        declared = _declared(len(house.labels))
        for client in requests:
            try:
                yield Contribution(_answer(client, house), declared)
            except FedfmError as error:
                yield Failure(client, self.name, str(error))


def _declared(num_labels: int) -> tuple[Leaf, ...]:
    counts = tuple(leaves.number(name, nan=True, bound=2.0**37) for name in _COUNTS)
    histogram = Leaf(_LABELS, (num_labels,), torch.float64, "told", leaves.MOST, "sum", signed=False, nan=True, kinds=("counts", "labels"))
    return (*counts, histogram) if num_labels else counts


def _answer(client: ClientId, house: House) -> Update:
    noisy = next((part for part in house.plan.transforms if "noisy-counts" in part.traits().is_), None)
    if noisy is not None and not house.policy(client).withholds("counts"):
        return _noisy(client, house, noisy)
    shard, counts_kept = house.shard(client), house.withholds(client, "counts")
    labels_kept = counts_kept or house.withholds(client, "labels")
    counts = (len(shard.train), len(shard.test), shard.tokens)
    numbers = {name: math.nan if counts_kept else float(value) for name, value in zip(_COUNTS, counts, strict=True)}
    payload: dict[str, torch.Tensor] = {}
    if house.labels:
        histogram = shard.histogram()
        values = [math.nan if labels_kept else float(histogram.get(label, 0)) for label in house.labels]
        payload[_LABELS] = torch.tensor(values, dtype=torch.float64)
    return Update(payload, client=client, metrics=numbers)


def _noisy(client: ClientId, house: House, part: Transform) -> Update:
    """The counts with noise, once in a run: noise that is drawn twice can be averaged away. Asked again, an owner tells nothing."""
    shard, spent = house.shard(client), house.spent.of(client)
    expense = f"counts told with noise in {house.run}"
    if spent.total(expense):
        nothing = {_LABELS: torch.full((len(house.labels),), math.nan, dtype=torch.float64)} if house.labels else {}
        return Update(nothing, client=client, metrics=dict.fromkeys(_COUNTS, math.nan))
    spent.add(expense, 1)
    simulated = "simulated" in part.traits().is_
    secret = Secret.simulated(house.key.fold("counts", client)) if simulated else Secret.system()
    stream = secret.stream("counts")

    def told(counts: Sequence[float], sensitivity: float) -> list[float]:
        values = part.told_counts(counts, sensitivity, stream)
        assert values is not None, part
        return values

    train, test = told([len(shard.train), len(shard.test)], 1.0)
    (tokens,) = told([shard.tokens], float(house.plan.task.max_length))
    histogram, payload = shard.histogram(), dict[str, torch.Tensor]()
    if house.labels:
        values = told([histogram.get(label, 0) for label in house.labels], 1.0)
        kept = house.policy(client).withholds("labels")
        payload[_LABELS] = torch.tensor([math.nan] * len(values) if kept else values, dtype=torch.float64)
    return Update(payload, client=client, metrics=dict(zip(_COUNTS, (train, test, tokens), strict=True)))


def _holding(numbers: Mapping[str, torch.Tensor | float], labels: Sequence[str]) -> Holding:
    histogram: dict[str, int] | None = {}
    if labels:
        values = torch.as_tensor(numbers[_LABELS]).tolist()
        known = not any(map(math.isnan, values))
        histogram = {label: int(value) for label, value in zip(labels, values, strict=True) if value} if known else None
    train, test, tokens = (count(float(numbers[name])) for name in _COUNTS)
    return Holding(train, test, tokens, histogram)

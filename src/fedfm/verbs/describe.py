"""Asks what an owner has: numbers of examples and tokens, and how many examples of each class. The roster is made from the answers.

Where nobody has named the classes, owners are asked before for the names that occur in their rows, as a list in JSON.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedfm.client.house import House
from fedfm.client.verb import Contribution, Verb
from fedfm.core import leaves, words
from fedfm.core.errors import PAUSE, ConfigError, DataError, FedfmError
from fedfm.core.keys import Key
from fedfm.core.leaves import Kind, Leaf
from fedfm.core.messages import Body, ClientId, Failure, Request
from fedfm.core.parts import Channel, Errand, Partial, RoundContext, Session, Transform, Update
from fedfm.core.roster import Holding, Roster, count, total_of
from fedfm.core.secret import Secret

log = logging.getLogger(__name__)
_COUNTS = ("train", "test", "tokens")
_LABELS = "labels"
# In the body of a request for names of classes; the leaf that holds them, and its bytes, padded with zeros.
_WHAT, _CLASSES, _BYTES = "what", "classes", 1 << 16
_NAMES = (Leaf(_CLASSES, (_BYTES,), torch.uint8, "told", 255.0, "each", signed=False, kinds=("labels",)),)
_REMEDY = "Name all classes in the recipe, task: {Classification: {labels: [ONE, OTHER, ...]}}, and nobody is asked"


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

        Of an owner that has paused its house, nothing is known, and the others go on.

        Raises:
            DataError: naming each owner that does not answer, and why.
        """
        errand, ctx = self.errand(labels), RoundContext(0, key, {}, len(clients))
        holdings: dict[ClientId, Holding] = {}
        totals: Holding | None = None
        for item in _answers(channel.collect(session, errand, clients, None, ctx), len(clients)):
            if isinstance(item, Partial):
                totals = _holding(item.totals(), labels)
            elif item.client is not None:
                holdings[item.client] = _holding({**item.payload, **item.metrics}, labels)
        ordered = {client: holdings[client] for client in clients if client in holdings}
        return Roster(tuple(clients), ordered, totals or total_of(ordered.values()))

    def classes(self, channel: Channel, session: Session, clients: Sequence[ClientId], key: Key) -> tuple[str, ...]:
        """The classes that occur in anybody's rows, sorted.

        Raises:
            ConfigError: naming owners who withhold theirs, or if the channel cannot carry names, or fewer than two occur.
            DataError: naming each owner that does not answer, and why.
        """
        if "single-updates" in channel.traits().hides:
            raise ConfigError(f"{type(channel).__name__} shows sums alone, and names of classes cannot be added. {_REMEDY}.")
        errand, ctx = Errand(Body(self.name, meta={_WHAT: _CLASSES}), _NAMES, uniform=True), RoundContext(0, key, {}, len(clients))
        known: set[str] = set()
        silent: list[ClientId] = []
        for item in _answers(channel.collect(session, errand, clients, None, ctx), len(clients)):
            assert isinstance(item, Update) and item.client is not None
            names = _names(item.payload[_CLASSES], item.client)
            known.update(names)
            silent += [] if names else [item.client]
        if silent:
            raise ConfigError(
                f"Nobody has named the classes, and {words.listed(sorted(silent), 8)} may not tell those of its rows (rule 'may_leave' of its owner's policy, or the plan's privacy promise). "
                f"{_REMEDY}; or ask these owners to let 'labels' leave."
            )
        if len(known) < 2:
            raise ConfigError(f"All rows of all owners have the same class ({words.listed(sorted(known))}). {_REMEDY}.")
        return tuple(sorted(known))

    def tells(self, request: Request, house: House) -> Mapping[Kind, str]:
        """Everything, where a sum of all would miss it; else a number that is withheld is NaN."""
        channel = house.plan.channel
        if "single-updates" not in channel.traits().hides:
            return {}
        why = f"{type(channel).__name__} shows sums alone, in which they cannot be left out"
        return {"counts": why, "labels": why} if house.labels else {"counts": why}

    def answer(self, requests: Mapping[ClientId, Request], house: House) -> Iterator[Contribution | Failure]:
        """What each owner has, as far as its policy and the plan's privacy promise let it."""
        names = next(iter(requests.values())).meta.get(_WHAT) == _CLASSES
        declared, answer = (_NAMES, _own_names) if names else (_declared(len(house.labels)), _answer)
        for client in requests:
            try:
                yield Contribution(answer(client, house), declared)
            except FedfmError as error:
                yield Failure(client, self.name, str(error))


def _answers(outcomes: Iterable[Update | Partial | Failure], count: int) -> Iterator[Update | Partial]:
    """What was answered; owners who have paused are left out, as long as somebody has not.

    Args:
        count: How many were asked.

    Raises:
        DataError: in the end, naming each owner that does not answer, and why.
    """
    failures: list[Failure] = []
    for item in outcomes:
        if isinstance(item, Failure):
            failures.append(item)
        else:
            yield item
    if len(failures) < count and all(failure.stage == PAUSE for failure in failures):
        for failure in failures:
            log.warning("%s does not say what it has: %s", failure.client, failure.reason)
        return
    reasons = sorted(f"{failure.client} does not say what it has ({failure.stage}): {failure.reason}" for failure in failures)
    more = f" {len(reasons) - 8} more owners do not either." if len(reasons) > 8 else ""
    raise DataError(" ".join(reasons[:8]) + more)


def _own_names(client: ClientId, house: House) -> Update:
    """The classes of one owner's rows; zeros where it withholds them."""
    bytes_n = torch.zeros(_BYTES, dtype=torch.uint8)
    if not house.withholds(client, "labels"):
        text = json.dumps(sorted(house.shard(client).labels)).encode()
        if len(text) > _BYTES:
            raise DataError(f"the names of its classes take {len(text)} bytes, and at most {_BYTES} are asked for. {_REMEDY}.")
        bytes_n[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return Update({_CLASSES: bytes_n}, client=client)


def _names(bytes_n: torch.Tensor, client: ClientId) -> tuple[str, ...]:
    """What an owner said; empty where it withholds it.

    Raises:
        DataError: if that is no list of names.
    """
    text = bytes_n.numpy().tobytes().rstrip(b"\0")
    if not text:
        return ()
    try:
        names = json.loads(text)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("it is no list of names")
        "".join(names).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{client} does not say which classes its rows have: {words.clean(error, 200)}.") from error
    return tuple(names)


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

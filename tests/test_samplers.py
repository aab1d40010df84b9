"""Who takes part: laws of every sampler, limits, and how often each client is drawn."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from fedfm.core.errors import ConfigError
from fedfm.core.parts import RoundContext, Sampler
from fedfm.samplers import All, Poisson, Uniform, Weighted
from fedfm.testing import check_sampler, examples
from fedfm.testing.parts import context

EXAMPLES = {
    "Uniform": [Uniform(clients=4), Uniform(fraction=0.3), Uniform(fraction=1.0), Uniform(fraction=1e-9)],
    "Poisson": [Poisson(rate=0.25), Poisson(rate=1.0)],
    "Weighted": [Weighted(clients=3), Weighted(clients=5, weights={"client-1": 10.0, "client-2": 1e-3})],
}
CLIENTS = [f"client-{i}" for i in range(12)]


def sample(sampler: Sampler, clients: list[str], ctx: RoundContext) -> list[str]:
    cohort, state = sampler.sample(clients, {}, ctx)
    assert state == {}
    return cohort


@pytest.mark.parametrize("sampler", examples("samplers", EXAMPLES), ids=repr)
def test_conformance(sampler: Sampler) -> None:
    check_sampler(sampler)


@pytest.mark.parametrize("sampler", examples("samplers", EXAMPLES), ids=repr)
def test_who_is_drawn_does_not_depend_on_the_order_of_the_list(sampler: Sampler) -> None:
    for round in range(1, 20):
        ctx = context({}, round)
        assert set(sample(sampler, CLIENTS, ctx)) == set(sample(sampler, CLIENTS[::-1], ctx))


@pytest.mark.parametrize("sampler", [Uniform(fraction=1.0), Poisson(rate=1.0), Uniform(clients=12), Weighted(clients=12)], ids=repr)
def test_limit_is_all(sampler: Sampler) -> None:
    assert sample(sampler, CLIENTS, context({})) == sample(All(), CLIENTS, context({}))


def frequencies(sampler: Sampler, rounds: int) -> dict[str, float]:
    counts = Counter(client for round in range(rounds) for client in sample(sampler, CLIENTS, context({}, round)))
    return {client: counts[client] / rounds for client in CLIENTS}


@pytest.mark.parametrize(("sampler", "rate"), [(Uniform(clients=3), 0.25), (Poisson(rate=0.25), 0.25), (Weighted(clients=3), 0.25)])
def test_clients_are_equally_likely(sampler: Sampler, rate: float) -> None:
    rounds = 4000
    slack = 5 * math.sqrt(rate * (1 - rate) / rounds)
    assert all(abs(frequency - rate) < slack for frequency in frequencies(sampler, rounds).values())


def test_first_weighted_draw_is_proportional() -> None:
    weights = {client: float(i + 1) for i, client in enumerate(CLIENTS)}
    rounds, total = 4000, sum(weights.values())
    for client, frequency in frequencies(Weighted(clients=1, weights=weights), rounds).items():
        p = weights[client] / total
        assert abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / rounds)


def test_second_weighted_draw_is_proportional_among_those_left() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    rounds = 4000
    pairs = Counter(frozenset(sample(Weighted(2, weights), ["a", "b", "c"], context({}, round))) for round in range(rounds))
    expected = {"ab": 1 / 8 * 2 / 7 + 2 / 8 * 1 / 6, "ac": 1 / 8 * 5 / 7 + 5 / 8 * 1 / 3, "bc": 2 / 8 * 5 / 6 + 5 / 8 * 2 / 3}
    for pair, p in expected.items():
        assert abs(pairs[frozenset(pair)] / rounds - p) < 5 * math.sqrt(p * (1 - p) / rounds)


def test_poisson_draws_are_independent_and_may_be_nobody() -> None:
    sizes = [len(sample(Poisson(rate=0.1), CLIENTS, context({}, round))) for round in range(2000)]
    assert min(sizes) == 0
    mean, variance = 1.2, 12 * 0.1 * 0.9
    assert abs(sum(sizes) / 2000 - mean) < 5 * math.sqrt(variance / 2000)
    assert abs(sum((size - mean) ** 2 for size in sizes) / 2000 - variance) < 0.25
    # Another client's presence changes nothing for those who were there.
    assert all(
        sample(Poisson(rate=0.3), CLIENTS[:6], context({}, round))
        == [c for c in sample(Poisson(rate=0.3), CLIENTS, context({}, round)) if c in CLIENTS[:6]]
        for round in range(50)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Uniform(), "exactly one"),
        (lambda: Uniform(clients=3, fraction=0.5), "exactly one"),
        (lambda: Uniform(clients=0), "0"),
        (lambda: Uniform(fraction=1.5), "1.5"),
        (lambda: Uniform(fraction=math.nan), "nan"),
        (lambda: Poisson(rate=0.0), "0.0"),
        (lambda: Poisson(rate=math.nan), "nan"),
        (lambda: Weighted(clients=0), "0"),
        (lambda: Weighted(clients=1, weights={"a": -1.0}), "'a'"),
        (lambda: Weighted(clients=1, weights={"a": math.inf}), "inf"),
        (lambda: sample(Uniform(clients=13), CLIENTS, context({})), "12 clients"),
        (lambda: sample(Weighted(clients=13), CLIENTS, context({})), "12 clients"),
        (lambda: sample(Weighted(clients=1, weights={"client-l": 2.0}), CLIENTS, context({})), "Did you mean 'client-"),
    ],
)
def test_refusals(make, words) -> None:
    with pytest.raises(ConfigError, match=words):
        make()

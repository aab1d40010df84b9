"""Many updates become one: laws of every rule, exact means, and what liars can and cannot do."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfm.aggregators import CoordinateMedian, Mean, TrimmedMean
from fedfm.core.errors import ConfigError, MessageError
from fedfm.core.leaves import Leaf
from fedfm.core.parts import Aggregator, Partial, Update
from fedfm.core.sums import WEIGHTED_GRID
from fedfm.testing import check_aggregator, examples
from fedfm.testing.parts import context

EXAMPLES = {"Mean": [Mean(), Mean(weights="uniform")], "TrimmedMean": [TrimmedMean(trim=0), TrimmedMean(trim=2)]}


def updates(x_nd, weights=None) -> list[Update]:
    """An update of one leaf from each row."""
    return [Update({"w": torch.as_tensor(x, dtype=torch.float32)}, 1.0 if weights is None else weights[i]) for i, x in enumerate(x_nd)]


def run(aggregator: Aggregator, us: list[Update]) -> torch.Tensor:
    return aggregator(us, context({"w": torch.zeros(us[0].payload["w"].shape)})).payload["w"]


@pytest.mark.parametrize("aggregator", examples("aggregators", EXAMPLES), ids=repr)
def test_conformance(aggregator: Aggregator) -> None:
    check_aggregator(aggregator)


# The mean

ROWS = st.lists(st.tuples(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), st.floats(1e-3, 1e5)), min_size=1, max_size=12)


@given(ROWS, st.randoms(use_true_random=False))
def test_mean_has_the_same_bits_in_any_order(rows, random) -> None:
    us = [Update({"w": torch.tensor(x)}, weight=w) for x, w in rows]
    first = Mean()(us, context({}))
    random.shuffle(us)
    again = Mean()(us, context({}))
    assert torch.equal(first.payload["w"], again.payload["w"]) and first.weight == again.weight


@given(ROWS)
def test_mean_is_the_exact_weighted_mean_rounded_once(rows) -> None:
    total = math.fsum(w for _, w in rows)
    exact = [math.fsum(w * x[i] for x, w in rows) / total for i in range(3)]
    mean = run(Mean(), updates([x for x, _ in rows], [w for _, w in rows]))
    # Each product may be cut by half a unit of the grid.
    cut = len(rows) * 2.0 ** -(WEIGHTED_GRID + 1) / total
    assert torch.allclose(mean.double(), torch.tensor(exact, dtype=torch.float64), rtol=2**-23, atol=cut)


def test_mean_of_equal_weights_is_uniform_and_scale_of_weights_is_irrelevant() -> None:
    x_nd = torch.randn(5, 4)
    uniform = run(Mean(weights="uniform"), updates(x_nd, [1, 2, 3, 4, 5]))
    assert torch.equal(uniform, run(Mean(), updates(x_nd, [8.0] * 5)))
    weighted = run(Mean(), updates(x_nd, [1, 2, 3, 4, 5]))
    assert torch.equal(weighted, run(Mean(), updates(x_nd, [4, 8, 12, 16, 20])))
    assert not torch.equal(weighted, uniform)


@given(ROWS, st.integers(0, 12))
def test_the_mean_of_sums_is_the_mean_to_the_bit(rows, cut: int) -> None:
    """Two channels, a buffer or a worker elsewhere add up a part of the cohort each."""
    us = [Update({"w": torch.tensor(x)}, weight=w, client=str(i)) for i, (x, w) in enumerate(rows)]
    ctx = context({"w": torch.zeros(3)})
    for mean in (Mean(), Mean(weights="uniform")):
        parts = [Partial((Leaf("w", (3,)),), mean.uniform()) for _ in range(2)]
        for i, u in enumerate(us):
            parts[i >= cut].add(str(i), u.payload, {}, u.weight)
        whole = mean(us, ctx)
        for order in (parts, parts[::-1]):
            summed = mean(order, ctx)
            assert torch.equal(whole.payload["w"], summed.payload["w"])
            assert (whole.weight, whole.num_clients) == (summed.weight, summed.num_clients)
        # What was added up elsewhere is not changed by being added once more.
        assert parts[0].num_clients == min(cut, len(us))


def test_mean_takes_leaves_by_name() -> None:
    us = [Update({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}), Update({"b": torch.tensor([4.0]), "a": torch.tensor([3.0])})]
    assert {name: leaf.item() for name, leaf in Mean()(us, context({})).payload.items()} == {"a": 2.0, "b": 3.0}


def test_mean_does_not_hold_a_cohort() -> None:
    alive: list[int] = []

    class Watched(dict):
        def __init__(self, i: int) -> None:
            super().__init__(w=torch.ones(3) * i)
            alive.append(i)
            self.i = i

        def __del__(self) -> None:
            alive.remove(self.i)

    def stream():
        for i in range(20):
            assert len(alive) <= 2
            yield Update(Watched(i))

    assert Mean()(stream(), context({})).num_clients == 20


def test_mean_refuses_what_cannot_be_summed() -> None:
    for value in (math.nan, math.inf, 2.0**39):
        with pytest.raises(MessageError):
            run(Mean(), updates([[value]]))


def test_mean_is_quick() -> None:
    # 16 clients with LoRA on 24 matrices, as in the cohort benchmark: about 10 ms, and 50 times that on a busy machine.
    us = [Update({f"layer{i}": torch.randn(8, 288) for i in range(24)}) for _ in range(16)]
    took = []
    for _ in range(5):
        began = time.perf_counter()
        Mean()(us, context({}))
        took.append(time.perf_counter() - began)
    assert min(took) < 0.5


# Robust rules

MATRIX = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=n, max_size=n)
)


@given(MATRIX)
def test_median_is_numpys(x_nd) -> None:
    assert np.allclose(run(CoordinateMedian(), updates(x_nd)).numpy(), np.median(np.array(x_nd, dtype=np.float64), axis=0), rtol=1e-6)


@given(MATRIX)
def test_trimming_nothing_is_the_uniform_mean(x_nd) -> None:
    weights = [float(i + 1) for i in range(len(x_nd))]
    trimmed, mean = run(TrimmedMean(0), updates(x_nd, weights)), run(Mean(weights="uniform"), updates(x_nd, weights))
    assert torch.allclose(trimmed, mean, rtol=1e-6, atol=1e-12)


@given(st.integers(1, 3), st.integers(0, 50), st.sampled_from([1e30, -1e30, 1e3, math.pi, 0.0]))
def test_robust_rules_stay_among_honest_values(liars: int, seed: int, lie: float) -> None:
    honest = torch.randn(2 * liars + 2, 5, generator=torch.Generator().manual_seed(seed))
    us = updates([*honest, *(torch.full((5,), lie) for _ in range(liars))], [1.0] * len(honest) + [1e6] * liars)
    for rule in (CoordinateMedian(), TrimmedMean(trim=liars)):
        result = run(rule, us)
        assert ((honest.min(0).values - 1e-6 <= result) & (result <= honest.max(0).values + 1e-6)).all()
    if lie == 1e3:
        assert run(Mean(weights="uniform"), us).min() > 100


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(trim=1)], ids=repr)
def test_robust_rules_move_with_their_input(rule: Aggregator) -> None:
    x_nd = torch.randn(7, 4)
    shift = torch.tensor([1.0, -2.0, 0.5, 4.0])
    assert torch.allclose(run(rule, updates(x_nd + shift)), run(rule, updates(x_nd)) + shift, atol=1e-6)
    assert torch.allclose(run(rule, updates(x_nd * -3)), run(rule, updates(x_nd)) * -3, atol=1e-6)


def test_tiny_deltas_are_told_apart() -> None:
    # Relative to weights of size 1 these differences would drown in float32; they are deltas, in float64.
    x = [[1e-5 * (1 + 1e-6 * i)] for i in range(4)]
    assert run(CoordinateMedian(), updates(x)).item() == pytest.approx(1e-5 * (1 + 1.5e-6), rel=1e-7)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="'example'"):
        Mean(weights="example")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="-1"):
        TrimmedMean(trim=-1)
    for us in ([], updates([[1.0], [2.0]])):
        with pytest.raises(ConfigError, match="at least 3 updates, got"):
            TrimmedMean(trim=1)(us, context({}))

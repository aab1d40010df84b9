"""Changes of an update in flight: laws of every transform, bounds, unbiasedness, telescoping sums, and what is refused on arrival."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfm.aggregators import CoordinateMedian, TrimmedMean
from fedfm.core import tree
from fedfm.core.check import check
from fedfm.core.errors import ConfigError, MessageError, RunError
from fedfm.core.parts import Aggregator, Finding, RoundContext, Spec, Transform, Update
from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.models import Model
from fedfm.testing import check_transform, examples
from fedfm.testing.parts import context, like, parameters, same
from fedfm.transforms import CastBF16, CentralDP, ClipByNorm, DistributedDP, Int4, Int8, LocalDP, TopK

EXAMPLES = {
    "CentralDP": [
        CentralDP(clip=0.5, delta=1e-5, noise_multiplier=1.0),
        CentralDP(clip=0.5, delta=1e-5, noise_multiplier=0.5, quantile=0.5),
        CentralDP(clip=1e9, delta=1e-5, noise_multiplier=0.0),
    ],
    "DistributedDP": [
        DistributedDP(clip=0.5, delta=1e-5, noise_multiplier=1.0, sharers=3),
        DistributedDP(clip=10.0, delta=1e-5, noise_multiplier=0.0),
    ],
    "LocalDP": [LocalDP(epsilon=1.0)],
    "ClipByNorm": [ClipByNorm(max_norm=0.5), ClipByNorm(max_norm=1e9)],
    "Int8": [Int8(), Int8(block=1), Int8(block=5)],
    "Int4": [Int4(), Int4(block=1), Int4(block=5)],
    "TopK": [TopK(fraction=0.1), TopK(k=3, error_feedback=False), TopK(k=10**6), TopK(fraction=1.0)],
}
PARAMS = parameters()
CTX = context(PARAMS, client="client-1")


def trip(transform: Transform, payload, ctx: RoundContext = CTX):
    """The payload as it is decoded on arrival."""
    encoded, _ = transform.encode(Update(payload), {}, ctx)
    return transform.decode(encoded, ctx).payload


@pytest.mark.parametrize("transform", examples("transforms", EXAMPLES), ids=repr)
def test_conformance(transform: Transform) -> None:
    check_transform(transform)


@pytest.mark.parametrize(
    "chain",
    [
        (TopK(fraction=0.3), Int8()),
        (TopK(fraction=0.3), Int4(block=3)),
        (CastBF16(), Int8()),
        (TopK(fraction=0.5), CastBF16(), Int4()),
        (ClipByNorm(1.0), TopK(k=5), Int8()),
    ],
    ids=repr,
)
def test_chains_round_trip(chain: tuple[Transform, ...]) -> None:
    payload = {**like(PARAMS, "chain"), "method.extra": torch.linspace(-1, 1, 11)}
    update, memory = Update(payload), {}
    for transform in chain:
        update, memory = transform.encode(update, memory, CTX)
    for transform in reversed(chain):
        update = transform.decode(update, CTX)
    Spec.of(payload).require(update.payload, "the chain")


# Clipping


@given(st.floats(1e-6, 1e6), st.integers(0, 100), st.sampled_from([torch.float32, torch.bfloat16]))
def test_clip_bounds_after_rounding_and_is_idempotent(max_norm: float, seed: int, dtype: torch.dtype) -> None:
    payload = {name: leaf.to(dtype) for name, leaf in like(PARAMS, seed).items()}
    clip = ClipByNorm(max_norm)
    once, _ = clip.encode(Update(payload), {}, CTX)
    assert tree.norm(once.payload) <= max_norm
    twice, _ = clip.encode(once, {}, CTX)
    assert same(once.payload, twice.payload)


def test_clip_keeps_direction_and_short_updates() -> None:
    payload = like(PARAMS, "clip")
    norm = tree.norm(payload)
    assert trip(ClipByNorm(norm), payload) is payload
    clipped = trip(ClipByNorm(norm / 4), payload)
    assert all(torch.allclose(clipped[name] * 4, leaf, rtol=1e-5) for name, leaf in payload.items())
    assert tree.norm(clipped) == pytest.approx(norm / 4, rel=1e-6)


def test_clip_leaves_integers_and_what_is_not_finite_to_others() -> None:
    payload = {"x": torch.tensor([3.0, 4.0]), "i": torch.tensor([7])}
    assert trip(ClipByNorm(1.0), payload)["i"].tolist() == [7]
    assert trip(ClipByNorm(1.0), {"x": torch.tensor([math.nan, 1.0])})["x"].isnan().any()


# Casting


def test_cast_is_exact_for_bfloat16_values_and_within_half_a_unit_else() -> None:
    payload = like(PARAMS, "cast")
    arrived = trip(CastBF16(), payload)
    assert all(((arrived[name] - x).abs() <= x.abs() * 2**-8).all() for name, x in payload.items())
    assert same(trip(CastBF16(), arrived), arrived)
    encoded, _ = CastBF16().encode(Update(payload), {}, CTX)
    assert tree.num_bytes(encoded.payload) * 2 == tree.num_bytes(payload)


# Quantisation


@pytest.mark.parametrize("transform", [Int8(block=16), Int4(block=16)], ids=repr)
def test_quantisation_is_unbiased_and_bounded(transform: Transform) -> None:
    levels, draws = (127 if isinstance(transform, Int8) else 7), 1500
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    params = {"w": torch.zeros(64)}
    ctx = context(params, client="client-1")
    decoded = torch.stack([trip(transform, {"w": x}, replace(ctx, round=round))["w"] for round in range(draws)]).double()
    step = x.view(-1, 16).abs().amax(1).repeat_interleave(16).double() / levels
    assert ((decoded - x).abs() < step * (1 + 1e-6)).all()
    # Stochastic rounding has a deviation of at most half a step.
    assert ((decoded.mean(0) - x).abs() <= 5 * step / 2 / math.sqrt(draws) + 1e-7).all()


@pytest.mark.parametrize("transform", [Int8(block=4), Int4(block=4)], ids=repr)
@given(value=st.floats(-(2.0**127), 2.0**127, width=32), sign=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=20))
def test_blocks_of_one_magnitude_come_back_exactly(transform: Transform, value: float, sign: list[float]) -> None:
    x = torch.tensor(sign) * value
    assert torch.equal(trip(transform, {"w": x}, context({"w": x}, client="c"))["w"], x)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), max_size=30), st.integers(1, 9))
def test_quantised_values_stay_within_a_step(values: list[float], block: int) -> None:
    x = torch.tensor(values)
    for transform, levels in ((Int8(block), 127), (Int4(block), 7)):
        y = trip(transform, {"w": x}, context({"w": x}, client="c"))["w"]
        scales = torch.nn.functional.pad(x, (0, -len(values) % block)).view(-1, block).abs().amax(1) if values else torch.zeros(0)
        assert ((y - x).double().abs() <= scales.repeat_interleave(block)[: len(values)].double() / levels * (1 + 1e-5)).all()


def test_quantisation_sends_fewer_bytes() -> None:
    params = {"w": torch.zeros(100, 1024)}
    ctx = context(params, client="c")
    for transform, bits in ((Int8(), 8), (Int4(), 4)):
        encoded, _ = transform.encode(Update({"w": torch.randn(100, 1024)}), {}, ctx)
        assert tree.num_bytes(encoded.payload) == 100 * (1024 * bits // 8 + 4)


def test_quantisation_draws_for_each_client_and_round() -> None:
    payload = like(PARAMS, "draw")
    arrived = [trip(Int4(), payload, ctx) for ctx in (CTX, replace(CTX, client="client-2"), replace(CTX, round=2))]
    assert not same(arrived[0], arrived[1]) and not same(arrived[0], arrived[2])


def test_quantisation_passes_integers() -> None:
    indices = torch.arange(5, dtype=torch.int32)
    assert torch.equal(trip(Int8(), {"i": indices})["i"], indices)


@pytest.mark.parametrize(
    "change",
    [
        {"w": torch.full((6,), -128, dtype=torch.int8)},
        {"w::scale": torch.tensor([-1.0, 1.0])},
        {"w::scale": torch.tensor([math.inf, 1.0])},
        {"w::scale": torch.tensor([1.0])},
        {"w::scale": torch.tensor([1.0, 1.0], dtype=torch.float64)},
        {"v::scale": torch.tensor([1.0])},
        {"w::shape": torch.tensor([6])},
        {"extra": torch.zeros(3, dtype=torch.int8), "extra::scale": torch.zeros(1)},
        {"extra": torch.zeros(0, dtype=torch.int8), "extra::scale": torch.zeros(0), "extra::shape": torch.tensor([0, 2**62, 2**62])},
        {"extra": torch.zeros(1, dtype=torch.int8), "extra::scale": torch.zeros(1), "extra::shape": torch.ones(1000, dtype=torch.int64)},
        {"made::extra": torch.ones(3)},
        {
            "made::extra": torch.zeros(0, dtype=torch.int8),
            "made::extra::scale": torch.zeros(0),
            "made::extra::shape": torch.tensor([0, 2**62, 2**62]),
        },
    ],
    ids=str,
)
def test_int8_refuses_what_it_could_not_have_sent(change) -> None:
    ctx = context({"w": torch.zeros(2, 3)}, client="c")
    encoded, _ = Int8(block=4).encode(Update({"w": torch.randn(2, 3)}), {}, ctx)
    Int8(block=4).decode(encoded, ctx)
    with pytest.raises(MessageError):
        Int8(block=4).decode(encoded.with_payload({**encoded.payload, **change}), ctx)


# Top-k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_of_everything_is_the_identity(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    payload = like(params, "top")
    ctx = context(params, client="c")
    encoded, memory = TopK(fraction=1.0).encode(Update(payload), {}, ctx)
    assert same(TopK(fraction=1.0).decode(encoded, ctx).payload, payload)
    assert not memory["topk.residual"].any()


def test_topk_keeps_the_largest_of_all_leaves_together() -> None:
    params = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    payload = {"a": torch.tensor([[1.0, -9.0], [0.1, 0.0]]), "b": torch.tensor([8.0, -0.5, 2.0])}
    ctx = context(params, client="c")
    encoded, memory = TopK(k=3).encode(Update(payload), {}, ctx)
    assert encoded.payload["topk::indices"].tolist() == [1, 4, 6] and encoded.payload["topk::values"].tolist() == [-9.0, 8.0, 2.0]
    assert memory["topk.residual"].tolist() == [1.0, 0.0, pytest.approx(0.1), 0.0, 0.0, -0.5, 0.0]
    assert TopK(k=3).decode(encoded, ctx).payload["b"].tolist() == [8.0, 0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_feedback_telescopes(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    spec, topk = Spec.of(params), TopK(fraction=0.1)
    given_d, sent_d, memory = torch.zeros(spec.size).double(), torch.zeros(spec.size).double(), {}
    for round in range(1, 21):
        ctx = context(params, round, client="c")
        payload = like(params, "ef", round)
        update, memory = topk.encode(Update(payload), memory, ctx)
        given_d += spec.flatten(payload)
        sent_d += spec.flatten(topk.decode(update, ctx).payload)
    assert torch.allclose(sent_d + memory["topk.residual"], given_d, atol=1e-5)
    # Without the feedback most of what was given is lost.
    assert (memory["topk.residual"].norm() / given_d.norm()) < 2


def test_topk_without_feedback_remembers_nothing() -> None:
    _, memory = TopK(k=1, error_feedback=False).encode(Update(like(PARAMS, 0)), {"other": torch.ones(1)}, CTX)
    assert set(memory) == {"other"}


def test_topk_refuses_another_models_memory() -> None:
    with pytest.raises(RunError, match="residual of 3"):
        TopK(k=1).encode(Update(like(PARAMS, 0)), {"topk.residual": torch.zeros(3)}, CTX)


@pytest.mark.parametrize("index", [[2, 1], [1, 1], [-1, 1], [0, 5], [0, 2**31 - 1]], ids=str)
def test_topk_refuses_indices_it_could_not_have_sent(index: list[int]) -> None:
    ctx = context({"w": torch.zeros(5)}, client="c")
    payload = {"topk::values": torch.ones(2), "topk::indices": torch.tensor(index, dtype=torch.int32)}
    with pytest.raises(MessageError, match=r"0\.\.4"):
        TopK(k=2).decode(Update(payload), ctx)


def test_topk_refuses_a_parameter_sent_twice() -> None:
    ctx = context({"w": torch.zeros(5)}, client="c")
    encoded, _ = TopK(k=2).encode(Update({"w": torch.randn(5)}), {}, ctx)
    with pytest.raises(MessageError, match="'w'"):
        TopK(k=2).decode(encoded.with_payload({**encoded.payload, "w": torch.randn(5)}), ctx)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClipByNorm(0.0), "0.0"),
        (lambda: ClipByNorm(math.nan), "nan"),
        (lambda: ClipByNorm(math.inf), "inf"),
        (lambda: Int8(block=0), "Int8.block is 0"),
        (lambda: Int4(block=-3), "Int4.block is -3"),
        (lambda: TopK(), "exactly one"),
        (lambda: TopK(fraction=0.1, k=3), "exactly one"),
        (lambda: TopK(fraction=0.0), "0.0"),
        (lambda: TopK(fraction=1.1), "1.1"),
        (lambda: TopK(k=0), "k is 0"),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


# In a plan

BASE = Federation(Model(source="nowhere"), Data(source="stdlib"), local=SGD())


def refusals(**parts) -> list[Finding]:
    return [finding for finding in check(replace(BASE, **parts)) if finding.level == "refusal"]


def test_a_bound_before_an_error_feedback_is_no_bound() -> None:
    ctx, clip, topk = CTX, ClipByNorm(1.0), TopK(fraction=0.5)
    memory, longest = {}, 0.0
    for _ in range(20):
        bounded, _ = clip.encode(Update(like(PARAMS, 0)), {}, ctx)
        sent, memory = topk.encode(bounded, memory, ctx)
        longest = max(longest, tree.norm(topk.decode(sent, ctx).payload))
    assert longest > 1.05
    (finding,) = refusals(transforms=(clip, CastBF16(), topk))
    assert finding.where == "transforms.2" and "Put ClipByNorm after TopK" in finding.text
    assert not refusals(transforms=(clip, replace(topk, error_feedback=False))) and not refusals(transforms=(topk, clip))


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(trim=1)], ids=repr)
@pytest.mark.parametrize("feedback", [True, False])
def test_what_is_not_sent_is_no_vote(rule: Aggregator, feedback: bool) -> None:
    (finding,) = refusals(transforms=(TopK(fraction=0.1, error_feedback=feedback),), aggregator=rule)
    assert finding.where == "aggregator" and "needs every-value, which TopK (transforms.0) hides" in finding.text
    assert not refusals(transforms=(ClipByNorm(1.0),), aggregator=rule)

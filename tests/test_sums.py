"""Laws of exact sums that hold one limb or two: the integers are the same, in any order, in pieces, and on any grid."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfm.core.errors import MessageError
from fedfm.core.leaves import Leaf, deltas
from fedfm.core.sums import FLOAT_GRID, GRID, WEIGHTED_GRID, ExactSum, Partial
from fedfm.core.tree import PIECE, Spec, pieces
from fedfm.testing.parts import same

GRIDS = st.sampled_from([24, WEIGHTED_GRID, FLOAT_GRID, 60, GRID])
# Small, large, and next to where a second limb is needed.
VALUE = st.one_of(st.floats(-1.0, 1.0, width=32), st.floats(-1e5, 1e5, width=32), st.sampled_from([0.0, 2.0**18, -(2.0**22), 1e-30]))
TERMS = st.lists(st.tuples(VALUE, VALUE, st.floats(0.5, 1e3)), min_size=1, max_size=80)


def total(terms, grid: int, wide: bool = False) -> ExactSum:
    """The sum of some terms; ``wide`` takes the second limb from the start."""
    grown = ExactSum.of_integers(torch.zeros(2, dtype=torch.int64), grid, 2.0 ** (62 - grid) if wide else 0.0)
    for x, y, weight in terms:
        grown.add(torch.tensor([x, y]), weight)
    return grown


@given(TERMS, GRIDS, st.randoms(use_true_random=False))
def test_one_limb_two_limbs_and_any_order_are_the_same_bits(terms, grid: int, rng) -> None:
    first, shuffled = total(terms, grid), total(rng.sample(terms, len(terms)), grid)
    assert torch.equal(first.value(), shuffled.value())
    if grid > 24:
        wide = total(terms, grid, wide=True)
        assert wide.limbs == 2 and torch.equal(first.value(), wide.value())


@given(TERMS, GRIDS)
def test_a_sum_is_that_of_the_terms_cut_onto_its_grid(terms, grid: int) -> None:
    # Python rounds halves to even, as the grid does, and its integers are as long as they need to be.
    for i, value in enumerate(total(terms, grid).value().tolist()):
        exact = Fraction(sum(round(Fraction(term[i] * term[2]) * 2**grid) for term in terms), 2**grid)
        assert value == pytest.approx(float(exact), rel=1e-15, abs=0.0)


@given(TERMS, st.integers(0, 80), GRIDS, GRIDS)
def test_sums_of_different_grids_add_without_a_cut(terms, cut: int, grid: int, other: int) -> None:
    x, y, z = total(terms[:cut], grid), total(terms[cut:], other), total(terms[cut:], other)
    before = y.value()
    x.merge(y)
    assert torch.equal(y.value(), before)
    z.merge(total(terms[:cut], grid))
    assert torch.equal(x.value(), z.value()) and x.grid == z.grid == max(grid, other)
    exact = before + total(terms[:cut], grid).value()
    assert torch.allclose(x.value(), exact, rtol=1e-15, atol=1e-15 * before.abs().max().item())


def test_a_second_limb_is_taken_when_the_terms_could_need_it_and_not_before() -> None:
    grown = ExactSum(1, FLOAT_GRID)
    for _ in range(3):
        grown.add(torch.tensor([2.0**16]))
    assert grown.limbs == 1
    grown.add(torch.tensor([-(2.0**16)]))
    assert grown.limbs == 2 and grown.value().item() == 2.0**17


@pytest.mark.parametrize("grid", [FLOAT_GRID, WEIGHTED_GRID])
def test_what_is_beyond_a_sum_is_refused_and_leaves_it_alone(grid: int) -> None:
    grown = total([(0.5, -0.25, 1.0)], grid)
    for value in (math.nan, math.inf, 2.0**38):
        with pytest.raises(MessageError):
            grown.add(torch.tensor([1.0, value]))
    assert grown.value().tolist() == [0.5, -0.25] and grown.limbs == 1


@given(st.integers(0, 10**6), st.sampled_from([1, 2, PIECE - 1, PIECE + 1, 3 * PIECE]))
def test_pieces_of_any_size_are_the_whole(seed: int, step: int) -> None:
    x = torch.randn(2 * PIECE + 5, generator=torch.Generator().manual_seed(seed))[: min(2 * PIECE + 5, 4000 * step)]
    whole, cut = ExactSum(x.numel(), FLOAT_GRID), ExactSum(x.numel(), FLOAT_GRID)
    whole.add(x, 3.7)
    cut.add_pieces(iter(torch.split(x, step)), x.abs().max().item(), 3.7)
    assert torch.equal(whole.value(), cut.value())


def test_the_mean_of_deltas_is_that_of_two_limbs_within_the_stated_grid() -> None:
    """32 clients with deltas of every size that occurs; the mean in float32 is that on the finest grid, to its last bit but for the smallest values."""
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.linspace(-9, 0, 5000)
    for uniform in (True, False):
        partial, fine = Partial((Leaf("w", (5000,)),), uniform), ExactSum(5000)
        weights = [1.0] * 32 if uniform else [float(17 + 31 * i) for i in range(32)]
        for i, weight in enumerate(weights):
            x = torch.randn(5000, generator=generator) * scale
            partial.add(str(i), {"w": x}, {}, weight)
            fine.add(x, weight)
        assert [part.total.limbs for part in partial._parts] == [1]
        exact = fine.value() / sum(weights)
        cut = 32 * 2.0 ** -((FLOAT_GRID if uniform else WEIGHTED_GRID) + 1) / sum(weights)
        mean = partial.mean()["w"].double()
        assert float((mean - exact).abs().sub(exact.abs() * 2.0**-24).max()) <= cut
        large = exact.abs() > 1e-5
        assert float((mean == exact.float().double())[large].double().mean()) > 0.999


def test_the_grid_follows_from_the_plan_alone() -> None:
    def grids(*leaves: Leaf, uniform: bool = False) -> list[int]:
        return [part.total.grid for part in Partial(leaves, uniform)._parts]

    half = Leaf("h", (2,), torch.bfloat16)
    counts = Leaf("c", (2,), torch.float64, "told", reduce="sum")
    assert grids(Leaf("w", (2,)), half, counts) == [WEIGHTED_GRID, GRID]
    assert grids(Leaf("w", (2,)), half, uniform=True) == [FLOAT_GRID]
    assert grids(Leaf("w", (2,)), Leaf("d", (2,), torch.float64)) == [GRID]
    assert grids(Leaf("w", (2,), reduce="sum")) == [FLOAT_GRID]


def test_small_leaves_and_large_ones_are_the_vector_that_they_make(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
        for name, shape in {"a": (3,), "bb": (), "ccc": (PIECE + 7,), "dddd": (0,), "eeeee": (2, 5), "ffffff": (PIECE,)}.items()
    }
    spec, partial = Spec.of(tree), Partial(deltas(Spec.of(tree)))
    partial.add("x", tree, {}, 3.0)
    whole = ExactSum(spec.size, WEIGHTED_GRID)
    whole.add(spec.flatten(tree), 3.0)
    assert same(partial.mean(), spec.unflatten((whole.value() / 3.0).float()))
    monkeypatch.setattr("fedfm.core.sums._PART", PIECE)
    split = Partial(deltas(spec))
    split.add("x", tree, {}, 3.0)
    assert len(split._parts) == 4 and same(split.take_mean(), partial.mean())
    assert [piece.numel() for piece in pieces(tree, "ccc")] == [PIECE, 7] and not list(pieces(tree, "dddd"))

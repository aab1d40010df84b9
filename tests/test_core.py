"""Laws of the ground: keys, trees, exact sums, the plan check, the index of parts, the round."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfm.aggregators import CoordinateMedian, Mean, TrimmedMean
from fedfm.core import registry, tree
from fedfm.core.check import check, require
from fedfm.core.errors import ConfigError, MessageError, PlanError, RoundError
from fedfm.core.keys import Key
from fedfm.core.leaves import Leaf, number
from fedfm.core.messages import Failure, Reply
from fedfm.core.parts import Finding, Transform
from fedfm.core.round import play, start
from fedfm.core.sums import ExactSum, Partial
from fedfm.core.tree import Spec
from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.local import SGD, FedProx
from fedfm.models import Model
from fedfm.samplers import Poisson, Uniform
from fedfm.server import FedAvg, FedAvgM
from fedfm.testing.parts import like, parameters, same
from fedfm.testing.sessions import Scripted
from fedfm.transforms import CastBF16, ClipByNorm, Int4, Int8, TopK

# Keys

NAME = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.integers(-(10**12), 10**12))
ROOT = Key.root(0)


@given(st.lists(NAME, max_size=4), st.lists(NAME, max_size=4))
def test_folding_is_associative(x, y) -> None:
    assert ROOT.fold(*x).fold(*y) == ROOT.fold(*x, *y)


@given(st.lists(NAME, max_size=3), st.lists(NAME, max_size=3))
def test_different_names_are_different_keys(x, y) -> None:
    assert (ROOT.fold(*x) == ROOT.fold(*y)) == ([(type(n), n) for n in x] == [(type(n), n) for n in y])


def test_keys_are_the_same_in_every_process() -> None:
    # A golden value: a change of it would break every resumed run.
    assert Key.root(7).fold("noise", 3, "alice").digest.hex()[:16] == "abe60f838c8dfbfc"
    code = "from fedfm.core.keys import Key; print(Key.root(7).fold('noise', 3, 'alice').seed(), 'torch' in __import__('sys').modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": "src", "PYTHONHASHSEED": "1"},
                          cwd=Path(__file__).parent.parent).stdout.split()  # fmt: skip
    assert lines == [str(Key.root(7).fold("noise", 3, "alice").seed()), "False"]


def test_streams_repeat_and_are_uniform() -> None:
    key = ROOT.fold("draw")
    assert torch.equal(torch.rand(5, generator=key.generator()), torch.rand(5, generator=key.generator()))
    assert key.numpy().random() == key.numpy().random()
    draws = [key.fold(i).uniform() for i in range(4000)]
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / 4000 - 0.5) < 5 / math.sqrt(12 * 4000)


# Trees


@given(st.integers(0, 20), st.sampled_from([(), (4,), (2, 3)]))
def test_unflatten_undoes_flatten(seed: int, lead: tuple[int, ...]) -> None:
    x = like(parameters(), seed)
    spec = Spec.of(x)
    x_d = spec.flatten(x)
    assert x_d.shape == (spec.size,) and same(spec.unflatten(x_d), x)
    rows = spec.unflatten(x_d.expand(*lead, -1).contiguous()) if lead else spec.unflatten(x_d)
    assert all(torch.equal(leaf[(0,) * len(lead)], x[name]) for name, leaf in rows.items())


def test_flatten_follows_the_spec_not_the_tree() -> None:
    x = {"b": torch.tensor([1.0]), "a": torch.tensor([2.0])}
    assert Spec.of(x).flatten({"a": x["a"], "b": x["b"]}).tolist() == [1.0, 2.0]
    assert Spec.of({}).flatten({}).shape == (0,)


def test_arithmetic() -> None:
    x, y = like(parameters(), 1), like(parameters(), 2)
    flat = Spec.of(x).flatten
    assert torch.equal(flat(tree.sub(x, y)), flat(x) - flat(y))
    assert tree.norm(x) == pytest.approx(flat(x).double().norm().item(), rel=1e-12)
    assert tree.num_bytes(x) == 4 * Spec.of(x).size
    assert tree.equal(x, dict(reversed(x.items()))) and not tree.equal(x, y)


def test_require_names_what_is_wrong() -> None:
    params = parameters()
    spec = Spec.of(params)
    spec.require(params, "it")
    for broken, words in [
        ({**params, "new": torch.zeros(1)}, "unexpected ['new']"),
        ({name: leaf for name, leaf in params.items() if name != "one"}, "missing ['one']"),
        ({**params, "one": torch.zeros(2)}, "'one' is float32[2], expected float32[1]"),
        ({**params, "one": torch.zeros(1).double()}, "'one' is float64[1], expected float32[1]"),
        ({**params, "one": torch.tensor([math.nan])}, "'one' holds NaN"),
        ({**params, "one": torch.tensor([-math.inf])}, "'one' holds NaN or infinity"),
    ]:
        with pytest.raises(MessageError) as error:
            spec.require(broken, "it")
        assert words in str(error.value)


@given(st.lists(st.sampled_from([0.0, 1.0, 3e38, -3e38, math.nan, math.inf, -math.inf]), max_size=6))
def test_not_finite_is_found_and_large_values_are_not_mistaken_for_it(values: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        expected = None if all(map(math.isfinite, values)) else "x"
        assert tree.first_not_finite({"i": torch.ones(1, dtype=torch.int64), "x": torch.tensor(values, dtype=dtype)}) == expected
    assert tree.first_not_finite({"x": torch.full((4,), 1.7e308, dtype=torch.float64)}) is None


# Exact sums

TERMS = st.lists(st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(1e-3, 1e4)), min_size=1, max_size=150)


@given(TERMS, st.randoms(use_true_random=False))
def test_a_sum_has_the_same_bits_in_any_order_and_is_right(terms, random) -> None:
    first, again = ExactSum(1), ExactSum(1)
    for x, weight in terms:
        first.add(torch.tensor([x]), weight)
    random.shuffle(terms)
    for x, weight in terms:
        again.add(torch.tensor([x]), weight)
    assert torch.equal(first.value(), again.value())
    exact = float(sum(Fraction(x * weight) for x, weight in terms))
    assert first.value().item() == pytest.approx(exact, rel=1e-15, abs=len(terms) * 2.0**-80)


def test_a_sum_may_be_read_while_it_grows_and_in_pieces() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    total, read = ExactSum(len(x)), ExactSum(len(x))
    for i in range(1, 130):
        total.add(x, i / 7)
        read.add(x, i / 7)
        if i % 5 == 0:
            read.value()
    assert torch.equal(total.value(), read.value())
    assert torch.allclose(total.value(), x.double() * sum(range(1, 130)) / 7, rtol=1e-12)
    assert ExactSum(0).value().shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**38])
def test_what_a_sum_cannot_hold_is_refused_and_leaves_it_alone(value: float) -> None:
    total = ExactSum(2)
    total.add(torch.tensor([1.0, 2.0]))
    with pytest.raises(MessageError):
        total.add(torch.tensor([1.0, value]))
    assert total.value().tolist() == [1.0, 2.0]


def test_a_total_is_refused_before_it_wraps() -> None:
    total = ExactSum(1)
    with pytest.raises(MessageError):
        for _ in range(10):
            total.add(torch.tensor([2.0**36]))
    assert total.value().item() == 3 * 2.0**36


# Sums of many answers

LEAVES = (Leaf("w", (3,)), Leaf("hits", (2,), torch.float64, "told", reduce="sum"), number("weight"), number("loss", "mean", signed=True))


def answer(seed: int) -> tuple[str, dict[str, torch.Tensor], dict[str, float], float]:
    generator = torch.Generator().manual_seed(seed)
    weight = float(torch.randint(1, 50, (1,), generator=generator))
    tensors = {"w": torch.randn(3, generator=generator), "hits": torch.randint(9, (2,), generator=generator).double()}
    return f"client-{seed}", tensors, {"weight": weight, "loss": float(torch.randn(1, generator=generator))}, weight


def total(answers, uniform: bool = False) -> Partial:
    partial = Partial(LEAVES, uniform)
    for one in answers:
        partial.add(*one)
    return partial


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=9, unique=True),
    st.integers(0, 9),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_parts_of_a_sum_are_the_sum_in_any_order(seeds, cut: int, uniform: bool, rng) -> None:
    answers = [answer(seed) for seed in seeds]
    whole = total(answers, uniform)
    shuffled = rng.sample(answers, len(answers))
    first, second = total(shuffled[:cut], uniform), total(shuffled[cut:], uniform)
    second.merge(first)
    assert same(second.mean(), whole.mean()) and second.mean_numbers() == whole.mean_numbers() and second.weight == whole.weight
    assert sorted(second.clients) == sorted(whole.clients) and second.by_client == whole.by_client


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True), st.booleans())
def test_a_sum_is_the_weighted_mean_of_deltas_and_the_sum_of_counts(seeds, uniform: bool) -> None:
    answers = [answer(seed) for seed in seeds]
    whole = total(answers, uniform)
    weights = [Fraction(1 if uniform else weight) for *_, weight in answers]
    for i in range(3):
        exact = sum(w * Fraction(float(tensors["w"][i])) for w, (_, tensors, _, _) in zip(weights, answers, strict=True)) / sum(weights)
        assert math.isclose(whole.mean()["w"][i].item(), exact, rel_tol=1e-6, abs_tol=1e-9)
    assert whole.mean()["hits"].tolist() == sum(tensors["hits"] for _, tensors, _, _ in answers).tolist()
    loss = sum(w * Fraction(numbers["loss"]) for w, (_, _, numbers, _) in zip(weights, answers, strict=True)) / sum(weights)
    assert whole.mean_numbers()["loss"] == float(loss)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True), st.integers(24, 40))
def test_a_ring_with_a_bound_is_the_same_sum(seeds, grid: int) -> None:
    answers = [answer(seed) for seed in seeds]
    on_grid = [
        (client, {name: (leaf * 2**8).round() / 2**8 for name, leaf in tensors.items()}, numbers, weight)
        for client, tensors, numbers, weight in answers
    ]
    on_grid = [
        (client, tensors, {**numbers, "loss": round(numbers["loss"] * 256) / 256}, weight) for client, tensors, numbers, weight in on_grid
    ]
    ring = torch.zeros(3 + 2 + 2 + 1, dtype=torch.int64)
    for _, tensors, numbers, weight in on_grid:
        values = [*(tensors["w"].double() * weight).tolist(), *tensors["hits"].tolist(), weight, numbers["loss"] * weight, weight]
        ring += torch.tensor([round(value * 2**grid) for value in values])
    opened = Partial.of_ring(LEAVES, ring, grid, 2.0**20, [client for client, *_ in answers])
    plain = total(on_grid)
    assert same(opened.mean(), plain.mean()) and opened.mean_numbers() == plain.mean_numbers() and opened.weight == plain.weight
    plain.merge(opened)
    assert plain.num_clients == 2 * len(answers)


def test_a_sum_refuses_what_it_cannot_hold_and_stays_as_it_was() -> None:
    partial = total([answer(0)])
    before = partial.mean()
    client, tensors, numbers, weight = answer(1)
    for broken in (
        ({**tensors, "w": torch.tensor([math.nan, 0, 0])}, numbers),
        ({**tensors, "hits": torch.tensor([1e12, 0], dtype=torch.float64)}, numbers),
        (tensors, {**numbers, "loss": math.inf}),
    ):
        with pytest.raises(MessageError):
            partial.add(client, *broken, weight)
    assert same(partial.mean(), before) and partial.num_clients == 1
    with pytest.raises(MessageError, match="different leaves"):
        partial.merge(Partial(LEAVES[:1]))


# The plan check

BASE = Federation(Model(source="nowhere"), Data(source="stdlib"), local=SGD())


def refusals(num_clients: int | None = None, **parts) -> list[Finding]:
    return [finding for finding in check(replace(BASE, **parts), num_clients) if finding.level == "refusal"]


def test_the_default_plan_is_sound() -> None:
    assert not refusals(10) and require(BASE, 10) == check(BASE, 10)


@pytest.mark.parametrize(
    ("left", "right", "sound"),
    [
        (TopK(k=5), Int8(), True),
        (Int8(), TopK(k=5), False),
        (Int8(), Int8(), False),
        (Int8(), Int4(), False),
        (Int4(), ClipByNorm(1.0), False),
        (ClipByNorm(1.0), Int4(), True),
        (CastBF16(), Int8(), True),
        (Int8(), CastBF16(), False),
        (TopK(k=5), TopK(k=2), False),
        (TopK(k=5), CastBF16(), True),
        (TopK(k=5), ClipByNorm(1.0), True),
    ],
    ids=repr,
)
def test_order_of_transforms(left, right, sound: bool) -> None:
    findings = refusals(transforms=(left, right))
    assert sound == (not findings)
    if findings:
        assert findings[0].where == "transforms.1" and f"Put {type(right).__name__} before {type(left).__name__}" in findings[0].text


def test_cohorts_that_are_too_small_or_too_large() -> None:
    assert "7 owners" in refusals(7, sampler=Uniform(clients=8))[0].text
    assert "TrimmedMean needs 5" in refusals(10, sampler=Uniform(clients=4), aggregator=TrimmedMean(trim=2))[0].text
    (finding,) = refusals(10, sampler=Uniform(clients=2), min_clients=3)
    assert finding.where == "min_clients" and "min_clients is 3" in finding.text
    assert not refusals(None, sampler=Uniform(clients=1000))


def test_what_loses_values_behind_top_k_is_told() -> None:
    def warned(*transforms: Transform) -> list[str]:
        return [finding.text for finding in check(replace(BASE, transforms=transforms)) if "TopK" in finding.text]

    assert "ClipByNorm and CastBF16 change after TopK" in warned(TopK(k=1), ClipByNorm(1.0), CastBF16())[0]
    assert not warned(TopK(k=1), Int8()) and not warned(TopK(k=1, error_feedback=False), CastBF16())


def test_refusals_are_raised_together_and_come_first() -> None:
    with pytest.raises(PlanError) as error:
        require(replace(BASE, transforms=(Int8(), ClipByNorm(1.0)), sampler=Uniform(clients=8)), 7)
    assert str(error.value).count("\n- ") == 2
    findings = check(replace(BASE, local=FedProx(inner=SGD(steps=1)), transforms=(Int8(), ClipByNorm(1.0))))
    levels = [finding.level for finding in findings]
    assert levels[0] == "refusal" and set(levels[1:]) == {"warning", "note"}


def test_nested_parts_are_checked_at_their_place() -> None:
    assert set(replace(BASE, local=FedProx(inner=SGD()), transforms=(CastBF16(),)).parts()) >= {
        "local",
        "local.inner",
        "transforms.0",
        "sampler",
    }


# The index of parts


def test_the_index_knows_every_part_without_importing_it() -> None:
    code = (
        "from fedfm.core import registry; import sys\n"
        "print(sum(len(registry.entries(room)) for room in registry.ROOMS), *(m for m in ('torch', 'numpy', 'transformers') if m in sys.modules))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": "src"},
                          cwd=Path(__file__).parent.parent).stdout.split()  # fmt: skip
    assert len(lines) == 1 and int(lines[0]) >= 25


@pytest.mark.parametrize("room", list(registry.ROOMS))
def test_what_the_index_says_is_what_is_imported(room: str) -> None:
    for name, entry in registry.entries(room).items():
        part = entry.load()
        assert dataclasses.is_dataclass(part) and part.__name__ == name
        assert (part.__doc__ or "").startswith(entry.summary[:20]) and part.concerns == entry.concerns


def test_unknown_names_suggest_the_nearest() -> None:
    assert registry.suggest("trimedmean", registry.entries("aggregators")) == " Did you mean 'TrimmedMean'?"
    with pytest.raises(ConfigError, match="Did you mean 'samplers'"):
        registry.entries("sampler")
    assert registry.suggest("zzz", ["Mean"]) == ""


# The round


TOLD = {"weight": 2.0, "loss": 1.0, "steps": 1.0, "examples": 2.0, "tokens": 8.0, "padding": 0.0}


class Echo(Scripted):
    """Clients whose delta is 1, or what ``say`` makes of their request; counts how often each is asked."""

    def __init__(self, say: dict, order: int = 1) -> None:
        super().__init__(self.answers)
        self.say, self.order, self.asked = say, order, dict[str, int]()

    def answers(self, requests):
        for client in list(requests)[:: self.order]:
            self.asked[client] = self.asked.get(client, 0) + 1
            answer = self.say.get(client, lambda request, n: {"w": torch.ones(3)})(requests[client], self.asked[client])
            yield answer if isinstance(answer, Failure) else Reply(client, "train", requests[client].round, answer, TOLD)


PARAMS = {"w": torch.zeros(3)}
CLIENTS = ["a", "b", "c"]


def one_round(plan, session, clients=CLIENTS):
    return play(plan, start(plan, PARAMS), session, clients, Key.root(0))


@pytest.mark.parametrize(
    "lie",
    [
        {"w": torch.tensor([math.nan, 1.0, 1.0])},
        {"w": torch.tensor([1e30, 1.0, 1.0])},
        {"w": torch.ones(4)},
        {"w": torch.ones(3, dtype=torch.float64)},
        {"w": torch.ones(3), "x": torch.ones(1)},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("aggregator", [Mean(), CoordinateMedian()], ids=repr)
def test_an_update_that_cannot_be_averaged_is_its_clients_failure(lie, aggregator) -> None:
    plan = replace(BASE, aggregator=aggregator)
    state, record = one_round(plan, Echo({"b": lambda request, n: lie}))
    assert [(failure.client, failure.stage) for failure in record.failures] == [("b", "decode")]
    assert set(record.clients) == {"a", "c"} and state.params["w"].tolist() == [1.0] * 3
    with pytest.raises(RoundError, match="'b' failed in decode"):
        one_round(replace(plan, on_failure="stop"), Echo({"b": lambda request, n: lie}))
    with pytest.raises(RoundError, match="at least 3 are needed"):
        one_round(replace(plan, min_clients=3), Echo({"b": lambda request, n: lie}))


def test_retry_asks_those_who_failed_once_more() -> None:
    def late(request, n):
        return Failure("b", "exchange", "asleep") if n == 1 else {"w": torch.ones(3) * 4}

    session = Echo({"b": late})
    state, record = one_round(replace(BASE, on_failure="retry"), session)
    assert session.asked == {"a": 1, "b": 2, "c": 1} and len(record.failures) == 1 and set(record.clients) == set(CLIENTS)
    assert state.params["w"].tolist() == [2.0] * 3


def test_the_order_of_replies_is_irrelevant() -> None:
    say = {client: (lambda request, n, i=i: {"w": torch.tensor([0.1, 1e-7, -3.3]) * (i + 0.7)}) for i, client in enumerate(CLIENTS)}
    (x, record_x), (y, record_y) = (one_round(BASE, Echo(say, order)) for order in (1, -1))
    assert same(x.params, y.params) and replace(record_x, seconds={}) == replace(record_y, seconds={})


def test_a_poisson_round_may_be_empty() -> None:
    plan = replace(BASE, sampler=Poisson(rate=1e-9), server=FedAvgM())
    state, record = one_round(plan, Echo({}))
    assert record.cohort == () and state.round == 1 and state.params["w"].tolist() == [0.0] * 3
    with pytest.raises(RoundError):
        one_round(replace(plan, min_clients=2), Echo({}))


def test_a_round_is_the_mean_of_what_was_decoded() -> None:
    ctx_free = replace(BASE, transforms=(CastBF16(),), server=FedAvg(lr=0.5))
    state, record = one_round(ctx_free, Echo({"a": lambda request, n: {"w": torch.full((3,), 4.0, dtype=torch.bfloat16)}}))
    assert state.params["w"].tolist() == [1.0] * 3
    assert record.metrics["num_clients"] == 3 and record.metrics["weight"] == 6.0 and record.metrics["train_loss"] == 1.0
    assert record.bytes_up > 0 and record.bytes_down > 0

"""Noise that clients add inside a secure sum: its distribution, its accounting, and its grid."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import Masks

from fedfm.aggregators import Mean
from fedfm.channels import SecureAggregation
from fedfm.core import check
from fedfm.core.errors import RunError
from fedfm.core.keys import Key
from fedfm.core.leaves import deltas, number
from fedfm.core.messages import Body, Failure, Reply
from fedfm.core.parts import Channel, Errand, Partial, RoundContext, Update
from fedfm.core.privacy import Release, released
from fedfm.core.round import WORK, play, start
from fedfm.core.secret import Secret
from fedfm.core.session import Answer, WrappedSession
from fedfm.core.tree import Spec
from fedfm.federation import Federation
from fedfm.observers import Evaluate
from fedfm.privacy import calibrate_skellam, epsilon_of, skellam
from fedfm.run.loop import run
from fedfm.samplers import All
from fedfm.simulation import Simulation
from fedfm.testing import tiny
from fedfm.testing.channels import halves
from fedfm.testing.parts import context, like, parameters
from fedfm.transforms import ClipByNorm, DistributedDP
from fedfm.transforms.distributed_dp import grid_of

pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
PARAMS = parameters()
SIZE = sum(leaf.numel() for leaf in PARAMS.values())


def draws(variance: float, size: int, seed: int = 0) -> np.ndarray:
    return skellam.draw(Secret.simulated(Key.root(seed)).stream("noise"), size, variance)


@pytest.mark.parametrize(("variance", "clients"), [(2.5, 1), (40.0, 1), (40.0, 4), (900.0, 3)])
def test_the_sum_of_shares_is_skellam_noise_of_the_whole_variance(variance: float, clients: int) -> None:
    from scipy import stats

    x = sum(draws(variance / clients, 100_000, seed) for seed in range(clients))
    edges = np.unique(stats.skellam.ppf(np.linspace(0.02, 0.98, 25), variance / 2, variance / 2)).astype(int)
    observed = np.histogram(x, [-np.inf, *(edges + 0.5), np.inf])[0]
    chances = np.diff([0.0, *stats.skellam.cdf(edges, variance / 2, variance / 2), 1.0])
    assert stats.chisquare(observed, chances * len(x)).pvalue > 1e-3
    # Survivors more than were counted on only add noise.
    more = x + draws(variance / clients, 100_000, 99)
    assert more.var() > x.var()


def test_the_bound_holds_for_the_true_divergence() -> None:
    """In one dimension the divergence of two shifted Skellam distributions can be summed."""
    from scipy.special import ive

    for noise, orders in ((0.8, (2, 3)), (1.5, (2, 3, 8)), (4.0, (2, 3, 8, 20))):
        shift = int(skellam.SCALE) + 1
        variance = (noise * shift) ** 2
        reach = int((12 * noise + max(orders)) * shift)
        k = np.arange(-reach, reach + 1)
        log_p, log_q = (np.log(np.maximum(ive(np.abs(k - by), variance), 1e-300)) for by in (0, shift))
        bound = skellam.rdp(noise)
        for order in orders:
            true = np.log(np.sum(np.exp(order * log_p + (1 - order) * log_q))) / (order - 1)
            assert 0.9 * bound[order - 2] < true <= bound[order - 2] * (1 + 1e-9)


def test_epsilon_is_near_that_of_gaussian_noise_and_never_below() -> None:
    for noise, steps in ((1.0, 1), (4.0, 50)):
        ours = epsilon_of([Release(1.0, noise, steps, kind="skellam")], 1e-5)
        gaussian = epsilon_of([Release(1.0, noise, steps)], 1e-5, "rdp")
        assert 0.999 * gaussian < ours < 1.1 * gaussian
    solved = calibrate_skellam(50, 8.0, 1e-3)
    assert 7.99 < epsilon_of([Release(1.0, solved, 50, kind="skellam")], 1e-3) <= 8.0


def encoded(part: DistributedDP, update: Update, seed: int = 0) -> dict[str, torch.Tensor]:
    ctx = replace(context(PARAMS, client="c"), secret=Secret.simulated(Key.root(seed)))
    return dict(part.encode(update, {}, ctx)[0].payload)


def test_without_noise_it_is_the_clip_rounded_without_bias_to_a_grid() -> None:
    part = DistributedDP(clip=0.5, delta=1e-5, noise_multiplier=0.0)
    update = Update({name: 2 * leaf for name, leaf in like(PARAMS, 1).items()})
    short = ClipByNorm(0.5).encode(update, {}, context(PARAMS))[0].payload
    grid = grid_of(0.5, SIZE)
    assert math.log2(grid) == math.floor(math.log2(grid)) and 32 <= 0.5 / grid / math.sqrt(SIZE) <= 64
    sums = {name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()}
    for seed in range(400):
        payload = encoded(part, update, seed)
        for name, leaf in payload.items():
            assert torch.equal((leaf / grid).round() * grid, leaf) and float((leaf - short[name]).abs().max()) < grid
            sums[name] += leaf
    for name, total in sums.items():
        assert float((total / 400 - short[name]).abs().max()) < 5 * grid / 2 / math.sqrt(400)
    length = math.sqrt(sum(float(leaf.double().square().sum()) for leaf in encoded(part, update).values()))
    assert length <= 0.5 + grid * math.sqrt(SIZE), "no rounded update is longer than the sensitivity that is accounted for"


def test_each_share_has_its_part_of_the_variance() -> None:
    part = DistributedDP(clip=0.5, delta=1e-5, noise_multiplier=2.0, sharers=4)
    zero = Update({name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()})
    longest = 0.5 + grid_of(0.5, SIZE) * math.sqrt(SIZE)
    x = torch.cat([leaf.reshape(-1) for seed in range(100) for leaf in encoded(part, zero, seed).values()])
    assert float(x.std()) == pytest.approx(2.0 * longest / 2, rel=5 / math.sqrt(2 * len(x)))


@dataclass(frozen=True)
class Wide(Channel):
    """Stands for a channel of sums that cuts values."""

    reach: float = 1.0

    verbs = Masks.verbs

    def largest(self):
        return self.reach

    def traits(self):
        return Masks().traits()

    def collect(self, session, errand, clients, deadline, ctx):
        return Masks().collect(session, errand, clients, deadline, ctx)

    def seal(self, update, leaves, request, scratch):
        # What is withheld adds nothing.
        known = {leaf.name: 0.0 for leaf in leaves if leaf.is_number}
        known |= {name: 0.0 if math.isnan(value) else value for name, value in update.metrics.items()}
        return Masks().seal(replace(update, metrics=known), leaves, request, scratch)

    def answer(self, client, request, scratch):
        return Masks().answer(client, request, scratch)


def private(folder: Path, part: DistributedDP | None = None, **changes: object) -> Federation:
    part = part or DistributedDP(clip=0.5, delta=1e-3, epsilon=8.0)
    base = {
        "transforms": (part,),
        "aggregator": Mean(weights="uniform"),
        "sampler": All(),
        "rounds": 2,
        "min_clients": 3,
        "channel": Masks(),
    }
    return tiny.federation(folder, **{**base, **changes})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def findings(plan: Federation, level: str) -> str:
    return " ".join(f.text for f in check.check(plan.resolved(), 3) if f.level == level)


def test_the_plan_check(folder: Path) -> None:
    from fedfm.channels import Plain
    from fedfm.transforms import CastBF16

    plan = private(folder)
    promise = findings(plan, "promise")
    assert not findings(plan, "refusal")
    for word in (
        "epsilon 7.99",
        "(of at most 8)",
        "delta 0.001",
        "replaced by zeros",
        "each owner adds 1/3",
        "nothing is claimed for sampling",
        "3 or more honest",
    ):
        assert word in promise
    assert "Plain shows each answer by itself" in findings(replace(plan, channel=Plain()), "refusal")
    assert "must be the last" in findings(replace(plan, transforms=(*plan.transforms, CastBF16())), "refusal")
    assert "counts on the noise of 5" in findings(private(folder, DistributedDP(clip=0.5, delta=1e-3, epsilon=8.0, sharers=5)), "refusal")
    assert "cuts values to 1" in findings(replace(plan, channel=Wide()), "refusal")
    assert "cuts values" not in findings(replace(plan, channel=Wide(reach=50.0)), "refusal")
    assert "uniform-weights" in findings(replace(plan, aggregator=Mean()), "refusal")
    assert "epsilon is infinite" in findings(private(folder, DistributedDP(clip=0.5, delta=1e-3, noise_multiplier=0.0)), "warning")


def test_a_run_of_masked_sums_has_the_noise_and_spends_it_in_every_house(folder: Path) -> None:
    part = DistributedDP(clip=1e-6, delta=1e-3, noise_multiplier=3.0)
    states = [state for state, _ in run(private(folder, part, channel=Wide(), evaluate=Evaluate(every=0)), out=folder / "run")]
    moved = torch.cat([(states[1].params[name] - leaf).reshape(-1) for name, leaf in states[0].params.items()])
    size = len(moved)
    longest = 1e-6 + grid_of(1e-6, size) * math.sqrt(size)
    # The mean of three shares of a third each: the whole noise over three. The updates themselves are shorter by far.
    assert float(moved.double().std()) == pytest.approx(3.0 * longest / 3, rel=0.2)
    from fedfm.client.spent import SpentStore
    from fedfm.run.budget import PRIVACY, RunAccount

    spent = Release(1.0, 3.0, 2, kind="skellam")
    assert released(RunAccount(folder / "run" / PRIVACY)) == [spent]
    assert all(released(SpentStore(folder / "run").of(client)) == [spent] for client in "abc")


# --- with secure aggregation -------------------------------------------------------------------------------------------------


class Deaf(WrappedSession):
    """One client's answers to train are lost."""

    def receive(self) -> Answer | None:
        answer = self.inner.receive()
        while isinstance(answer, Reply) and (answer.client, answer.verb) == ("c", "train"):
            answer = self.inner.receive()
        return answer


SECRET = SecureAggregation(reach=16.0)


def secure(folder: Path, part: DistributedDP, **changes: object) -> Federation:
    return private(
        folder, part, owners="abcdef", rows=60, **{"channel": SECRET, "evaluate": Evaluate(every=0), "min_clients": 4, **changes}
    )


def on_grid(leaf: torch.Tensor, grid: float) -> bool:
    return torch.equal((leaf / grid).round() * grid, leaf)


def test_a_secure_sum_is_the_exact_sum_of_what_the_survivors_sent() -> None:
    pytest.importorskip("cryptography", reason="the extra 'privacy' is not installed")
    part = DistributedDP(clip=0.5, delta=1e-3, noise_multiplier=3.0, sharers=3)
    leaves = part.leaves((*deltas(Spec.of(PARAMS)), number("weight")))
    own = {
        name: Update(encoded(part, Update(like(PARAMS, name)), seed), 1.0, client=name, metrics={"weight": 1.0})
        for seed, name in enumerate("abcdef")
    }
    errand = Errand(Body("train", 1, PARAMS), leaves, params=PARAMS, sums=True, uniform=True)
    session = halves(SECRET, own, leaves, lambda verb, answers: [a for a in answers if verb != "train" or a.client != "c"])
    failure, total = SECRET.collect(session, errand, list(own), None, context(PARAMS))
    assert isinstance(failure, Failure) and failure.client == "c"
    assert isinstance(total, Partial) and total.clients == list("abdef")
    for name, leaf in total.totals().items():
        if name in PARAMS:
            assert torch.equal(leaf, sum(own[client].payload[name].double() for client in "abdef")) and on_grid(leaf, grid_of(0.5, SIZE))


def test_a_round_in_secret_opens_the_noise_of_the_survivors_on_the_grid(folder: Path) -> None:
    pytest.importorskip("cryptography", reason="the extra 'privacy' is not installed")
    base = secure(folder, DistributedDP(clip=0.01, delta=1e-3, noise_multiplier=40.0))
    simulation = Simulation.build(base)
    plan, state = simulation.federation, start(simulation.federation, simulation.house.start)
    (part,) = plan.transforms
    assert isinstance(part, DistributedDP) and part.sharers == 3
    assert not [f for f in check.check(plan, 6, params=state.params) if f.level == "refusal"]
    ctx = RoundContext(1, simulation.key, state.params, 6)
    errand = plan.work(state, simulation.clients, ctx)
    with simulation.open() as session:
        ctx = replace(ctx, params=errand.params, leaves=errand.leaves)
        failure, total = plan.channel.collect(Deaf(session), errand, simulation.clients, None, ctx)
    assert isinstance(failure, Failure) and failure.client == "c" and isinstance(total, Partial)
    opened = torch.cat([leaf.reshape(-1) for name, leaf in total.totals().items() if name in state.params])
    grid = grid_of(0.01, len(opened))
    longest = 0.01 + grid * math.sqrt(len(opened))
    assert on_grid(opened, grid)
    # Five shares of a third each; what was learned is shorter by far.
    assert float(opened.std()) == pytest.approx(40.0 * longest * math.sqrt(5 / 3), rel=5 / math.sqrt(2 * len(opened)))
    again = Simulation.build(base)
    with again.open() as session:
        _, record = play(plan, state, Deaf(session), again.clients, again.key)
    assert record.metrics["num_clients"] == 5
    assert not record.metrics.keys() & {"train_loss", *WORK}, "what is withheld is no zero"


def test_a_secure_sum_that_would_round_or_cut_is_refused_with_the_remedy(folder: Path) -> None:
    pytest.importorskip("cryptography", reason="the extra 'privacy' is not installed")
    part = DistributedDP(clip=0.5, delta=1e-3, noise_multiplier=3.0)

    def refusals(plan: Federation, num_clients: int = 6, size: int | None = None) -> str:
        params = None if size is None else {"w": torch.zeros(size)}
        return " ".join(f.text for f in check.check(plan.resolved(), num_clients, params=params) if f.level == "refusal")

    plan = secure(folder, part)
    assert not refusals(plan) and not refusals(plan, size=10_000)
    assert "cuts values to 1. Set its reach to 9.9 or more" in refusals(secure(folder, part, channel=SecureAggregation()))
    assert not refusals(secure(folder, part, channel=SecureAggregation(reach=9.9)))
    # With one value the grid is coarse; with as many as the model has, it is finer than what a ring of so large values holds.
    far = secure(folder, part, channel=SecureAggregation(reach=1e5))
    assert not refusals(far) and "rounded to multiples of 2^-11. Lower reach to 4.33e+04 or less" in refusals(far, size=10_000)
    assert not refusals(secure(folder, part, channel=SecureAggregation(reach=4.33e4)), size=10_000)
    assert "coarser grid (a larger clip)" in refusals(secure(folder, replace(part, clip=1e-7)))
    assert "Let all clients count alike" in refusals(secure(folder, part, aggregator=Mean()))


def test_no_more_noise_is_counted_on_than_the_worst_sum_holds(folder: Path) -> None:
    """Of 13 owners 5 may collude, and a sum of 10 is opened: of these 5 are honest, and not the 6 of a cohort of 10."""
    pytest.importorskip("cryptography", reason="the extra 'privacy' is not installed")
    channel = SecureAggregation(min_clients=10, corrupt=0.4, reach=16.0)
    plan = secure(folder, DistributedDP(clip=0.5, delta=1e-3, noise_multiplier=3.0), channel=channel, min_clients=10)

    def refusals(plan: Federation, num_clients: int) -> str:
        return " ".join(f.text for f in check.check(plan.resolved(), num_clients) if f.level == "refusal")

    assert not refusals(plan, 10) and "as few as 5 honest ones. Set sharers to 5 or less" in refusals(plan, 13)
    (part,) = plan.transforms
    assert not refusals(replace(plan, transforms=(replace(part, sharers=5),)), 13)


def test_outside_of_a_round_or_beyond_float32_nothing_leaves() -> None:
    part = DistributedDP(clip=0.5, delta=1e-5, noise_multiplier=1.0)
    with pytest.raises(RunError, match="outside of a round"):
        part.encode(Update(like(PARAMS, 1)), {}, RoundContext(1, Key.root(0), PARAMS, 3))
    with pytest.raises(RunError, match="more than float32 holds"):
        encoded(replace(part, noise_multiplier=1e5), Update(like(PARAMS, 1)))


def test_noise_is_drawn_fast_enough_to_be_no_bottleneck() -> None:
    draws(1e4, 1000)
    began = time.perf_counter()
    draws(1e4, 1_000_000)
    assert time.perf_counter() - began < 2.0

"""Differential privacy of owners: the clip, the noise, who is in a cohort, and what a run has spent."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedfm.aggregators import CoordinateMedian, Mean
from fedfm.core import check
from fedfm.core.errors import PlanError, RunError
from fedfm.core.keys import Key
from fedfm.core.parts import RoundContext, Update
from fedfm.core.privacy import Release
from fedfm.core.secret import Secret
from fedfm.federation import Federation
from fedfm.local import SGD, ExampleDP
from fedfm.methods import Scaffold
from fedfm.observers import Evaluate
from fedfm.privacy import epsilon_of
from fedfm.run.budget import PRIVACY, RunAccount
from fedfm.run.loop import resume, run
from fedfm.samplers import All, Poisson, Uniform, Weighted
from fedfm.simulation import Simulation
from fedfm.testing import tiny
from fedfm.testing.parts import context, like, parameters
from fedfm.transforms import CentralDP, ClipByNorm, Int8, TopK
from fedfm.transforms.central_dp import BELOW, CLIP
from fedfm.tuning import Full

pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
PARAMS = parameters()
OWNERS = tuple("abcdef")
ROOT = Path(__file__).parent.parent


def round_of(
    part: CentralDP, updates: list[Update], rate: float = 1.0, num_clients: int | None = None, state=None, secret: Secret | None = None
):
    """What becomes of clients' updates: encoded, decoded, averaged, finished."""
    state = part.init(PARAMS) if state is None else state
    account = RunAccount(None)
    ctx = replace(
        context(PARAMS, num_clients=num_clients or len(updates)),
        rate=rate,
        secret=secret or Secret.system(),
        received=part.broadcast(state),
        spent=account,
    )
    arrived = [part.decode(part.encode(update, {}, ctx)[0], ctx) for update in updates]
    payload = {name: torch.stack([update.payload[name] for update in arrived]).mean(0) for name in PARAMS}
    below = {BELOW: sum(update.metrics[BELOW] for update in arrived)} if part.quantile is not None else {}
    aggregate = Update(payload, weight=float(len(arrived)), num_clients=len(arrived), metrics=below)
    return *part.finish(aggregate, state, ctx), account


def norm(tree) -> float:
    return math.sqrt(sum(float(leaf.double().square().sum()) for leaf in tree.values()))


def test_without_noise_it_is_the_clipped_sum_over_the_expected_number() -> None:
    updates = [Update({name: 3.0 * leaf for name, leaf in like(PARAMS, i).items()}) for i in range(3)]
    part = CentralDP(clip=0.5, delta=1e-5, noise_multiplier=0.0)
    aggregate, state, _ = round_of(part, updates, rate=0.25, num_clients=20)
    clip = ClipByNorm(0.5)
    clipped = [clip.encode(update, {}, context(PARAMS))[0].payload for update in updates]
    expected = {name: sum(one[name] for one in clipped) / 5 for name in PARAMS}
    assert all(torch.allclose(aggregate.payload[name], expected[name], atol=1e-6) for name in PARAMS) and state == {}


def test_one_owner_moves_the_sum_by_at_most_the_bound_whatever_it_sends() -> None:
    part = CentralDP(clip=0.5, delta=1e-5, noise_multiplier=0.0)
    honest = [Update(like(PARAMS, i)) for i in range(4)]
    liar = Update({name: torch.full_like(leaf, 1e6) for name, leaf in PARAMS.items()})
    ctx = replace(context(PARAMS, num_clients=5), rate=1.0)
    # A liar does not encode; the server shortens what arrives.
    assert norm(part.decode(liar, ctx).payload) <= 0.5
    without, _, _ = round_of(part, honest, num_clients=5)
    with_it, _, _ = round_of(part, [*honest, liar], num_clients=5)
    moved = {name: 5 * (with_it.payload[name] - without.payload[name]) for name in PARAMS}
    assert norm(moved) <= 0.5 + 1e-5


def test_the_noise_has_the_size_of_the_bound_and_not_of_the_cohort() -> None:
    part = CentralDP(clip=0.4, delta=1e-5, noise_multiplier=2.0)
    zero = {name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()}
    for count in (0, 1, 7):
        drawn = []
        for i in range(60):
            aggregate = Update(zero, num_clients=count)
            ctx = replace(context(PARAMS, num_clients=40), rate=0.1, secret=Secret.simulated(Key.root(i)))
            finished, _ = part.finish(aggregate, {}, ctx)
            drawn.append(torch.cat([leaf.reshape(-1) for leaf in finished.payload.values()]))
        x = torch.cat(drawn)
        assert float(x.std()) == pytest.approx(2.0 * 0.4 / 4, rel=5 / (2 * len(x)) ** 0.5)
        assert float(x.mean()) == pytest.approx(0.0, abs=5 * 0.2 / len(x) ** 0.5)


def test_what_is_spent_is_written_before_the_noise_is_drawn() -> None:
    class NoRoom(RunAccount):
        def add(self, what: str, amount: float) -> None:
            raise RunError("the disk is full")

    part = CentralDP(clip=0.5, delta=1e-5, noise_multiplier=1.0)
    secret = Secret.system()
    ctx = replace(context(PARAMS), rate=0.5, secret=secret, spent=NoRoom(None))
    with pytest.raises(RunError, match="disk is full"):
        part.finish(Update(like(PARAMS, 1), num_clients=2), {}, ctx)
    secret.stream("noise")  # it was not given out before
    _, _, account = round_of(part, [Update(like(PARAMS, 1))], rate=0.5)
    assert account.entries() == [(Release(0.5, 1.0).name, 1.0)]


def test_a_bound_adapts_to_the_quantile_and_costs_no_more_than_the_noise_multiplier() -> None:
    part = CentralDP(clip=10.0, delta=1e-5, noise_multiplier=0.5, quantile=0.5, clip_lr=0.5)
    lengths = [0.2 * (i + 1) for i in range(60)]
    updates = [Update({name: leaf * (length / norm(PARAMS)) for name, leaf in PARAMS.items()}) for length in lengths]
    state = part.init(PARAMS)
    for i in range(30):
        _, state, _ = round_of(part, updates, state=state, secret=Secret.simulated(Key.root(i)))
    assert float(state[CLIP]) == pytest.approx(6.0, rel=0.15)
    # Noise of the sum and of the count together: one vector of length sqrt(C^2/C^2 s^-2 + (1/2)^2/s_b^2) is released with multiplier z.
    zero = Update({name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()}, num_clients=0, metrics={BELOW: 0.0})
    drawn = []
    for i in range(60):
        ctx = replace(
            context(PARAMS, num_clients=4),
            rate=1.0,
            secret=Secret.simulated(Key.root(i)),
            received={CLIP: torch.tensor(1.0, dtype=torch.float64)},
        )
        finished, _ = part.finish(zero, {CLIP: torch.tensor(1.0, dtype=torch.float64)}, ctx)
        drawn.append(torch.cat([leaf.reshape(-1) for leaf in finished.payload.values()]) * 4)
    x, count_noise = torch.cat(drawn), 0.5
    assert float(x.std()) == pytest.approx((0.5**-2 - (2 * count_noise) ** -2) ** -0.5, rel=0.06) and float(x.std()) > 0.53


def test_a_bound_that_is_none_is_refused() -> None:
    from fedfm.core.errors import MessageError

    part = CentralDP(clip=1.0, delta=1e-5, noise_multiplier=1.0, quantile=0.5)
    for sent in (
        {},
        {CLIP: torch.tensor(math.nan, dtype=torch.float64)},
        {CLIP: torch.tensor(-1.0, dtype=torch.float64)},
        {CLIP: torch.ones(2)},
    ):
        with pytest.raises(MessageError):
            part.encode(Update(like(PARAMS, 1)), {}, replace(context(PARAMS), received=sent))


# --- the plan


def private(folder: Path, part: CentralDP | None = None, **changes: object) -> Federation:
    part = part or CentralDP(clip=0.5, delta=1e-3, epsilon=4.0)
    base = {"transforms": (part,), "aggregator": Mean(weights="uniform"), "sampler": Poisson(rate=0.5), "rounds": 3}
    return tiny.federation(folder, owners=OWNERS, rows=36, **{**base, **changes})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def findings(plan: Federation, level: str, num_clients: int | None = 200) -> str:
    return " ".join(f.text for f in check.check(plan.resolved(), num_clients) if f.level == level)


def test_epsilon_is_solved_for_the_noise_and_printed_with_all_that_it_means(folder: Path) -> None:
    plan = private(folder).resolved()
    (part,) = plan.transforms
    assert isinstance(part, CentralDP) and part.noise_multiplier is not None
    assert epsilon_of([Release(0.5, part.noise_multiplier, 3)], 1e-3) == pytest.approx(4.0, rel=1e-3)
    told = findings(private(folder), "promise")
    for word in (
        "epsilon 4",
        "(of at most 4)",
        "delta 0.001",
        "one owner",
        "added or removed",
        "Poisson",
        "rate 0.5",
        "the server adds",
        "PLD",
        "honest server",
    ):
        assert word in told
    assert not findings(private(folder), "refusal") and plan.resolved() == plan


@pytest.mark.parametrize("sampler", [Uniform(fraction=0.5), Uniform(clients=3), Weighted(clients=3)], ids=repr)
def test_sampling_that_has_no_accountant_is_refused(folder: Path, sampler) -> None:
    assert "has no accountant" in findings(private(folder, sampler=sampler), "refusal")


def test_all_owners_in_each_round_is_a_rate_of_one(folder: Path) -> None:
    plan = private(folder, sampler=All()).resolved()
    noise = plan.transforms[0].noise_multiplier  # type: ignore[union-attr]
    assert epsilon_of([Release(1.0, noise, 3)], 1e-3) == pytest.approx(4.0, rel=1e-3) and "all owners in each round" in findings(
        plan, "promise"
    )


def test_the_plan_check_refuses_what_a_noisy_sum_cannot_be(folder: Path) -> None:
    plan = private(folder)
    assert "weighted-sum, which CoordinateMedian" in findings(replace(plan, aggregator=CoordinateMedian()), "refusal")
    assert "uniform-weights, which Mean" in findings(replace(plan, aggregator=Mean()), "refusal")
    assert "before CentralDP" in findings(replace(plan, transforms=(Int8(), *plan.transforms)), "refusal").replace(
        "Put CentralDP before Int8", "before CentralDP"
    )
    assert not findings(replace(plan, transforms=(TopK(fraction=0.5), *plan.transforms, Int8())), "refusal")
    second = replace(plan, transforms=(*plan.transforms, CentralDP(clip=1.0, delta=1e-5, noise_multiplier=1.0)))
    assert "changes the aggregate before the noise is added" in findings(second, "refusal")
    assert "control" in findings(replace(plan, method=Scaffold(), server=plan.server), "refusal")
    assert "epsilon is infinite" in findings(private(folder, CentralDP(clip=1.0, delta=1e-5, noise_multiplier=0.0)), "warning")


def test_few_owners_are_warned_with_numbers(folder: Path) -> None:
    few = findings(private(folder), "warning", num_clients=20)
    assert "there are 20, of whom 10 are expected" in few and "ExampleDP" in few
    assert "hides whole owners" not in findings(private(folder), "warning", num_clients=4000)


def test_a_delta_that_allows_to_publish_an_owner_is_warned_of(folder: Path) -> None:
    assert "Set delta well below 0.0005" in findings(private(folder), "warning", num_clients=2000)
    assert "Set delta" not in findings(private(folder), "warning", num_clients=900)


def test_what_an_evaluation_tells_is_not_covered_and_said(folder: Path) -> None:
    assert "which CentralDP does not cover" in findings(private(folder), "warning")
    assert "does not cover" not in findings(private(folder, evaluate=Evaluate(every=0)), "warning")
    assert "does not cover" not in findings(tiny.federation(folder), "warning")


def test_coins_are_simulated_in_all_parts_or_in_none(folder: Path) -> None:
    local = ExampleDP(SGD(steps=1, batch_size=2), max_norm=1.0, delta=1e-3, noise_multiplier=1.0, simulated=True)
    assert "set simulated alike" in findings(private(folder, local=local), "refusal")
    assert "each promise holds by itself" in findings(private(folder, local=replace(local, simulated=False)), "warning")
    assert not findings(private(folder, CentralDP(clip=1.0, delta=1e-3, epsilon=4.0, simulated=True), local=local), "refusal")


def test_trainable_embeddings_are_warned_of_unless_noise_is_in_them_before_they_leave(folder: Path) -> None:
    local = ExampleDP(SGD(steps=1, batch_size=2), max_norm=1.0, delta=1e-3, noise_multiplier=1.0)
    shown = "rows show which tokens"
    assert shown in findings(private(folder, tuning=Full()), "warning") and shown in findings(
        tiny.federation(folder, tuning=Full()), "warning"
    )
    assert shown not in findings(tiny.federation(folder, tuning=Full(), local=local, aggregator=Mean(weights="uniform")), "warning")


def test_the_chance_of_a_cohort_that_is_too_small_enters_delta(folder: Path) -> None:
    plan = private(folder, min_clients=3)
    assert "more than delta=0.001" in findings(plan, "refusal", num_clients=10)
    assert not findings(plan, "refusal", num_clients=200)
    whole = plan.resolved().transforms[0].guarantee(plan.resolved(), 200)
    some = plan.resolved().transforms[0].guarantee(plan.resolved(), 30)
    assert whole is not None and some is not None and some.epsilon > whole.epsilon and some.delta == 1e-3
    assert "once the number of owners is known" in findings(plan, "promise", num_clients=None)


def test_a_cohort_under_a_promise_is_drawn_from_the_system() -> None:
    clients = [f"c{i}" for i in range(400)]

    def cohort(secret: Secret | None) -> list[str]:
        return Poisson(rate=0.3).sample(clients, {}, replace(context({}, num_clients=400), secret=secret))[0]

    first, second = cohort(Secret.system()), cohort(Secret.system())
    assert first != second and cohort(None) == cohort(None)
    sizes = [len(cohort(Secret.simulated(Key.root(i)))) for i in range(200)]
    assert abs(sum(sizes) / 200 - 120) < 5 * (400 * 0.21 / 200) ** 0.5
    assert first == [client for client in clients if client in set(first)]


# --- a run


def ledger(out: Path) -> dict:
    return json.loads((out / "ledger.json").read_text())


def releases(out: Path) -> int:
    return len((out / PRIVACY).read_text().splitlines())


def test_a_run_prints_what_it_has_spent(folder: Path) -> None:
    list(run(private(folder), out=folder / "run"))
    (told,) = ledger(folder / "run")["privacy"]
    assert told["epsilon"] == pytest.approx(4.0, rel=1e-3) and told["delta"] == 1e-3 and not told["simulated"]
    assert releases(folder / "run") == 3
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("loss" not in own and own["weight"] == 1.0 for row in rows for own in row["clients"].values())


def test_a_run_stops_before_the_round_that_would_overspend_and_cannot_be_talked_on(folder: Path) -> None:
    part = CentralDP(clip=0.5, delta=1e-3, noise_multiplier=2.0, epsilon=epsilon_of([Release(0.5, 2.0, 2)], 1e-3) + 0.01)
    plan = private(folder, part, rounds=9)
    assert len(list(run(plan, out=folder / "run"))) == 3  # round 0 and two that fit
    assert releases(folder / "run") == 2 and (folder / "run" / "model").is_dir()
    assert not list(resume(folder / "run")) and not list(resume(folder / "run", rounds=20)) and releases(folder / "run") == 2


def test_a_rounds_noise_is_fresh_and_a_simulated_run_is_repeated(folder: Path) -> None:
    def last(name: str, **more: bool) -> torch.Tensor:
        part = CentralDP(clip=0.5, delta=1e-3, noise_multiplier=1.0, **more)
        state, _ = list(run(private(folder, part, rounds=2), out=folder / name))[-1]
        return torch.cat([leaf.reshape(-1) for leaf in state.params.values()])

    assert not torch.equal(last("one"), last("two"))
    assert torch.equal(last("three", simulated=True), last("four", simulated=True))
    (told,) = ledger(folder / "four")["privacy"]
    assert told["simulated"] and "simulated epsilon" in told["text"]


def test_an_account_that_was_changed_or_cut_ends_the_run(folder: Path) -> None:
    plan = private(folder, CentralDP(clip=0.5, delta=1e-3, noise_multiplier=1.0), rounds=2)
    list(run(plan, out=folder / "run"))
    path = folder / "run" / PRIVACY
    whole = path.read_text().splitlines(keepends=True)
    for broken, words in (
        ("".join(whole[:1]), "lacks releases"),
        ("", "lacks releases"),
        ("".join(whole).replace('"amount":1.0', '"amount":0.5', 1), "changed by something else"),
        ("".join(whole[::-1]), "changed by something else"),
    ):
        path.write_text(broken)
        with pytest.raises(RunError, match=words):
            list(resume(folder / "run", rounds=3))
    path.write_text("".join(whole))
    assert len(list(resume(folder / "run", rounds=3))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before state", "after the noise"])
def test_a_kill_after_noise_was_released_still_counts(folder: Path, where: str) -> None:
    """A process of its own is killed between the release of round 2 and its commit."""
    budget = epsilon_of([Release(0.5, 2.0, 3)], 1e-3) + 0.01
    part = CentralDP(clip=0.5, delta=1e-3, noise_multiplier=2.0, epsilon=budget)
    from fedfm.recipe import dump

    (folder / "recipe.yaml").write_text(dump(private(folder, part, rounds=3)))
    script = f"""
import os, signal, sys
from pathlib import Path
from fedfm.core import round as rounds
from fedfm.recipe import read
from fedfm.run import folder
from fedfm.run.loop import run
out, where = Path({str(folder / "run")!r}), {where!r}
def die():
    os.kill(os.getpid(), signal.SIGKILL)
commit, step = folder.RunFolder.commit, rounds.finish
def committed(self, state, record, ledger):
    return die() if state.round == 2 and where == "before state" else commit(self, state, record, ledger)
def finished(plan, aggregate, state, errand, ctx):
    done = step(plan, aggregate, state, errand, ctx)
    return die() if ctx.round == 2 and where == "after the noise" else done
folder.RunFolder.commit, rounds.finish = committed, finished
list(run(read(Path({str(folder / "recipe.yaml")!r})), out=out))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and releases(folder / "run") == 2, "round 2 was released and not committed"
    before = (folder / "run" / PRIVACY).read_text()
    assert len(list(resume(folder / "run"))) == 1, "one round is left of three, because the lost one counts"
    assert releases(folder / "run") == 3 and (folder / "run" / PRIVACY).read_text().startswith(before)
    (told,) = ledger(folder / "run")["privacy"]
    assert told["epsilon"] == pytest.approx(budget - 0.01, abs=1e-3)


def test_a_run_without_a_promise_says_nothing_of_privacy(folder: Path) -> None:
    list(run(tiny.federation(folder, rounds=1), out=folder / "run"))
    assert ledger(folder / "run")["privacy"] == [] and not (folder / "run" / PRIVACY).exists()


def test_a_server_that_has_no_coins_adds_no_noise() -> None:
    with pytest.raises(RunError, match="outside of a round"):
        CentralDP(clip=1.0, delta=1e-5, noise_multiplier=1.0).finish(Update(like(PARAMS, 1)), {}, RoundContext(1, Key.root(0), PARAMS, 3))


def test_a_plan_that_keeps_no_promise_does_not_run(folder: Path) -> None:
    with pytest.raises(PlanError, match="has no accountant"):
        next(iter(run(private(folder, sampler=Uniform(clients=2)), out=folder / "run")))
    assert Simulation.build(private(folder)).federation.transforms

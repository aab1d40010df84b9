"""What an audit proves, how often it is wrong, and which faults it notices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedfm.aggregators import Mean
from fedfm.core.errors import ConfigError, PrivacyError
from fedfm.core.privacy import Release
from fedfm.core.secret import Secret, Stream
from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.local import SGD, ExampleDP
from fedfm.models import Model
from fedfm.privacy.audit import (
    Curve,
    Observer,
    design,
    designed,
    evidence,
    fdp_bound,
    fdp_excess,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    one_run_bound,
    release_bound,
    seen,
)
from fedfm.privacy.canaries import Canaries
from fedfm.run.audit import AuditResult, Wanted, audit_plan
from fedfm.samplers import Poisson
from fedfm.testing import tiny
from fedfm.testing.faults import FAULTS, Fault, Faulty
from fedfm.transforms import CentralDP

pytest.importorskip("scipy", reason="the extra 'privacy' is not installed")
pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")

# Canaries, guesses, right guesses, delta; the lower bound at 95 %. Made with jax_privacy's auditing.py, unmodified.
ONE_RUN = [
    (1000, 100, 100, 1e-5, 3.46538),
    (1000, 100, 90, 1e-5, 1.62614),
    (1000, 200, 150, 1e-5, 0.81997),
    (1000, 1000, 600, 1e-5, 0.29723),
    (1000, 1000, 500, 1e-5, 0.0),
    (5000, 500, 480, 1e-6, 2.79382),
    (200, 40, 40, 0.0, 2.55401),
    (100, 20, 20, 1e-5, 1.81960),
]
BY_CURVES = [(1000, 100, 100, 5.54903), (1000, 200, 150, 1.29692), (1000, 1000, 600, 0.58354)]
DP = CentralDP(clip=1.0, delta=1e-5, noise_multiplier=2**0.5)


def plan(**parts: object) -> Federation:
    """Two rounds of everybody, epsilon 4.377."""
    federation = Federation(model=Model("none"), data=Data("none"), transforms=(DP,), aggregator=Mean("uniform"), rounds=2)
    return replace(federation, **parts).resolved()  # type: ignore[arg-type]


def audit_owners(federation: Federation, **wanted: object) -> AuditResult:
    return audit_plan(federation, Wanted(**wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize(("canaries", "guesses", "correct", "delta", "bound"), ONE_RUN)
def test_the_one_run_bound_is_that_of_the_oracle(canaries: int, guesses: int, correct: int, delta: float, bound: float) -> None:
    assert one_run_bound(canaries, guesses, correct, delta) == pytest.approx(bound, abs=1e-5)


@pytest.mark.parametrize(("canaries", "guesses", "correct", "bound"), BY_CURVES)
def test_the_bound_by_curves_is_that_of_the_oracle(canaries: int, guesses: int, correct: int, bound: float) -> None:
    assert fdp_bound(canaries, guesses, correct, 1e-5) == pytest.approx(bound, abs=1e-5)
    assert release_bound(canaries, guesses, correct, Release(1.0, 1.0), 1e-5) == fdp_bound(canaries, guesses, correct, 1e-5)


def test_more_right_guesses_prove_more_and_more_confidence_proves_less() -> None:
    for bound in (one_run_bound, fdp_bound):
        by_correct = [bound(500, 100, correct, 1e-5) for correct in (50, 70, 80, 90, 100)]
        assert by_correct == sorted(by_correct) and by_correct[0] == 0 and by_correct[-1] > 2
        assert bound(500, 100, 90, 1e-5, 0.005) < bound(500, 100, 90, 1e-5, 0.05)
        assert bound(500, 0, 0, 1e-5) == 0


def test_gaussian_numbers_belong_together() -> None:
    assert 1 / gaussian_mu(1.0, 1e-5) == pytest.approx(3.73063163, abs=1e-6)
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.37717810, abs=1e-6)
    assert gaussian_delta(0.0, 1.0) == 0 and gaussian_epsilon(0.0, 1e-5) == 0 and gaussian_epsilon(np.inf, 1e-5) == np.inf
    for epsilon in (0.1, 1.0, 8.0):
        assert gaussian_epsilon(gaussian_mu(epsilon, 1e-6), 1e-6) == pytest.approx(epsilon, rel=1e-6)


def test_a_curve_made_of_lines_lies_below_the_curve_and_close_to_it() -> None:
    mu, epsilons = 0.8, np.geomspace(0.02, 40, 64)
    lines = Curve(None, tuple((float(e), gaussian_delta(mu, float(e))) for e in [0.0, *epsilons]))
    for right in (1e-4, 0.01, 0.2, 0.5, 0.9):
        exact = Curve(mu).least(right)
        assert exact - 2e-3 <= lines.least(right) <= exact + 1e-12
    for correct in (70, 80, 95):
        excess = [fdp_excess(500, 100, correct, curve, 0.05) for curve in (lines, Curve(mu))]
        assert excess[0] <= excess[1] + 1e-12, "with less known of the curve, less is ruled out"


def test_sampling_is_part_of_the_curve() -> None:
    sampled, all_ = Release(0.1, 1.0, 20), Release(1.0, 1.0, 20)
    by_sampled, by_all = Curve.of(sampled), Curve.of(all_)
    assert by_all == Curve(20**0.5)
    assert by_sampled.least(0.5) > 0.25 > by_all.least(0.5), (by_sampled.least(0.5), by_all.least(0.5))
    low, high = release_bound(400, 100, 80, sampled, 1e-5), release_bound(400, 100, 95, sampled, 1e-5)
    claimed = 3.59
    assert 0 < low < claimed < high
    assert fdp_excess(400, 100, 95, by_sampled, 0.05) > 0 > fdp_excess(400, 100, 80, by_sampled, 0.05), "as the bounds say"


def test_power_grows_with_canaries_and_is_what_was_asked_for() -> None:
    secret, claim = Secret.system(), Release(1.0, 1.0)
    observer = Observer.of(claim, 1, 0.5, secret.stream("normal").normal, secret.stream("uniform").uniform)
    assert (
        design(100, Curve.of(claim), observer).power
        < design(300, Curve.of(claim), observer).power
        < design(900, Curve.of(claim), observer).power
    )
    chosen = designed(Curve.of(claim), observer, 0.95)
    assert chosen.power >= 0.95 and 300 < chosen.num_canaries < 700, chosen
    assert fdp_excess(chosen.num_canaries, chosen.num_guesses, chosen.num_needed, Curve(1.0), 0.05) > 0
    assert fdp_excess(chosen.num_canaries, chosen.num_guesses, chosen.num_needed - 1, Curve(1.0), 0.05) <= 0


def test_power_is_how_often_the_fault_is_noticed() -> None:
    coins, claim = Secret.system(), Release(1.0, 1.0)
    noise = coins.stream("noise")
    observer = Observer.of(claim, 1, 0.5, coins.stream("normal").normal, coins.stream("uniform").uniform)
    chosen, noticed = design(200, Curve.of(claim), observer), 0
    for i in range(200):
        present_n = (coins.stream("coins", i).words(200) & np.uint64(1)).astype(bool)
        score_n = seen(present_n + 0.5 * noise.normal(200), claim)
        noticed += evidence(score_n, present_n, chosen.num_guesses, claim, 1e-5).ruled_out
    assert abs(noticed / 200 - chosen.power) < 0.15, (noticed, chosen)


def test_what_scores_show() -> None:
    present_n = np.arange(100) % 2 == 0
    all_right = evidence(np.where(present_n, 1.0, 0.0) + np.arange(100) / 1e3, present_n, 100, Release(1.0, 1.0), 1e-5)
    assert all_right.num_correct == 100 and all_right.true_positives == 1
    assert all_right.exposure == pytest.approx(all_right.most_exposure) == pytest.approx(np.log2(51))
    all_wrong = evidence(np.where(present_n, 0.0, 1.0), present_n, 100, Release(1.0, 1.0), 1e-5)
    assert all_wrong.num_correct == 0 and all_wrong.fdp == all_wrong.one_run == all_wrong.estimate == all_wrong.true_positives == 0
    with pytest.raises(PrivacyError, match="1 of 100 canaries"):
        evidence(np.where(np.arange(100) == 3, np.nan, 0.0), present_n, 100, Release(1.0, 1.0), 1e-5)


def test_canaries_do_not_disturb_each_other_and_touch_every_number() -> None:
    canaries = Canaries.drawn(30, 100, Secret.system())
    update_nd = np.stack([canaries.update(i, 1, 5.0) for i in range(30)])
    assert np.allclose(update_nd @ update_nd.T, 25 * np.eye(30)) and (np.abs(update_nd).sum(0) > 0).all()
    assert np.allclose(canaries.seen(update_nd[canaries.present_n].sum(0), 1), 5.0 * canaries.present_n)
    assert np.array_equal(canaries.update(3, 2, 5.0), -canaries.update(3, 1, 5.0))
    assert not np.array_equal(canaries.sign_d, Canaries.drawn(30, 100, Secret.system()).sign_d)
    with pytest.raises(ConfigError, match="there are 29"):
        Canaries.drawn(30, 29, Secret.system())


@pytest.mark.slow
def test_sound_runs_raise_at_most_16_false_alarms_in_200() -> None:
    federation = plan(rounds=1)
    results = [audit_owners(federation, num_canaries=100) for _ in range(200)]
    assert sum(result.refuted for result in results) <= 16
    assert all(result.claim.epsilon == pytest.approx(gaussian_epsilon(0.5**0.5, 1e-5), abs=0.01) for result in results)


# Half the noise needs 1,000 canaries for a power of 0.999; any other fault shows all of them.
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: Fault) -> None:
    federation = plan(transforms=(Faulty(DP, fault),))
    num, tries = (1000, 20) if fault == "half-noise" else (240, 20)
    results = [audit_owners(federation, num_canaries=num) for _ in range(tries)]
    assert sum(result.refuted for result in results) >= 0.95 * tries, [result.bound for result in results]


def test_a_fixed_seed_shows_across_two_runs_and_in_no_single_one() -> None:
    federation = plan(transforms=(Faulty(DP, "fixed-seed"),))
    twice = audit_owners(federation, num_canaries=240)
    assert twice.more["runs"].ruled_out and "fixed seed" in twice.verdict()
    assert twice.more["runs"].num_correct == twice.more["runs"].num_guesses
    alone = [audit_owners(federation, num_canaries=120, twice=False) for _ in range(4)]
    assert not all(result.refuted for result in alone)
    assert any("could not have noticed noise from a fixed seed" in result.verdict() for result in alone)
    few = audit_owners(federation, num_canaries=60)
    assert few.blind == ("runs",) and not few.more["runs"].ruled_out
    enough = audit_owners(plan(transforms=(replace(DP, noise_multiplier=0.8),)), power=0.5)
    assert not enough.blind and enough.claim.epsilon > 8


def test_with_sampling_noise_that_repeats_shows_when_rounds_are_added_up() -> None:
    sampled = CentralDP(clip=1.0, delta=1e-5, noise_multiplier=2.0)
    federation = plan(transforms=(Faulty(sampled, "same-noise"),), sampler=Poisson(0.5), rounds=4, min_clients=1)
    result = audit_owners(federation, num_canaries=300)
    assert result.more["rounds"].ruled_out, result
    sound = audit_owners(plan(transforms=(sampled,), sampler=Poisson(0.5), rounds=4), num_canaries=300)
    assert not sound.refuted and sound.bound < sound.claim.epsilon


def test_an_adapting_clip_is_audited_with_the_bound_of_each_round() -> None:
    adapting = replace(DP, quantile=0.5, clip_lr=0.5)
    result = audit_owners(plan(transforms=(adapting,), rounds=3), num_canaries=240)
    assert not result.refuted and result.evidence.estimate > 1
    assert audit_owners(plan(transforms=(replace(adapting, noise_multiplier=1e-3),), rounds=3), num_canaries=240).evidence.num_correct > 100


@pytest.mark.parametrize(
    ("parts", "asked", "words"),
    [
        ({"transforms": ()}, {}, "no claim to audit"),
        ({"transforms": (replace(DP, noise_multiplier=0.0),)}, {}, "epsilon is infinite"),
        ({"rounds": 0}, {}, "no rounds"),
        ({}, {"num_canaries": 10}, "10 canaries are too few"),
        ({}, {"power": 1.0}, "power is 1"),
        ({}, {"fault": 1.0}, "The fault is 1"),
        ({"transforms": (replace(DP, noise_multiplier=1e4),)}, {"fault": 2.0}, "too little be seen"),
    ],
)
def test_an_audit_that_would_say_nothing_is_refused(parts: dict[str, object], asked: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        audit_owners(plan(**parts), **asked)  # type: ignore[arg-type]


def test_an_audit_says_what_is_claimed_and_what_is_proven() -> None:
    result = audit_owners(plan(), num_canaries=200)
    text = dict(result.lines())
    assert "4.377 at delta 1e-05" in text["claimed"] and "does not contradict" in text["verdict"]
    assert f"{result.evidence.num_guesses} guesses" in text["canaries"] and "2 times too small" in text["power"]
    words = json.loads(json.dumps(result.to_json()))
    assert words["bound"] == result.bound < words["claim"]["epsilon"] and not words["refuted"]
    wrong = audit_owners(plan(transforms=(Faulty(DP, "no-clip"),)), num_canaries=240)
    assert "The claim is wrong" in wrong.verdict() and wrong.bound > wrong.claim.epsilon


def test_the_report_shows_the_audit_beside_the_claim(tmp_path: Path) -> None:
    from fedfm.cli.audit import audit
    from fedfm.reports import html
    from fedfm.run.loop import run

    federation = replace(tiny.federation(tmp_path), transforms=(replace(DP, simulated=True),), aggregator=Mean("uniform"), rounds=1)
    for _ in run(federation, out=tmp_path / "run"):
        pass
    assert "Audited" not in html(tmp_path / "run")
    audit(tmp_path / "run", [], Wanted(100, 0.95, 2.0, True), quiet=True, as_json=True)
    page = html(tmp_path / "run")
    assert "Audited" in page and "does not contradict the claim" in page and "epsilon at least" in page
    with pytest.raises(ConfigError, match="is a run"):
        audit(tmp_path / "run", ["rounds=2"], Wanted(100, 0.95, 2.0, True), quiet=True, as_json=True)


def rows(**local: object) -> Federation:
    """Three rounds of two steps in which an owner's rows are hidden."""
    usual = {"inner": SGD(lr=0.5, steps=2, batch_size=32), "max_norm": 0.5, "delta": 1e-5, "epsilon": 8.0}
    hidden = ExampleDP(**{**usual, **local})  # type: ignore[arg-type]
    return plan(transforms=(), local=hidden, rounds=3)


def test_a_promise_to_rows_is_audited_and_kept() -> None:
    result = audit_plan(rows(), Wanted(num_canaries=200), num_rows=200)
    assert result.level == "rows" and not result.refuted and result.claim.unit.startswith("one row")
    assert result.claim.epsilon == pytest.approx(8.0, rel=0.02) and result.bound < result.claim.epsilon
    shown = audit_plan(rows(), Wanted(num_canaries=200), num_rows=200).evidence
    assert shown.estimate > 0.5 and shown.num_correct > shown.num_guesses / 2, "the canaries are seen, if not well enough to refute"


@pytest.mark.parametrize("fault", ["no-clip", "half-noise", "fixed-seed"])
def test_a_broken_promise_to_rows_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedfm.client import bank, objective

    noisy = objective.StepObjective.noisy
    if fault == "no-clip":
        clipped_sum = objective.StepObjective.clipped_sum
        monkeypatch.setattr(objective.StepObjective, "clipped_sum", lambda self, theta_kd, max_norm: clipped_sum(self, theta_kd, 1e9))
    elif fault == "half-noise":
        monkeypatch.setattr(objective.StepObjective, "noisy", lambda self, sum_kd, std_k: noisy(self, sum_kd, [std / 2 for std in std_k]))
    else:

        class Fixed(Secret):
            def stream(self, *names: str | int) -> Stream:
                return Secret(bytes(32)).stream(*names)

        train = bank.Bank.train
        monkeypatch.setattr(
            bank.Bank,
            "train",
            lambda self, start, jobs, round: train(self, start, [replace(job, secret=Fixed(bytes(32))) for job in jobs], round),
        )
    everything = SGD(lr=0.5, steps=1, batch_size=None)
    federation = rows(inner=everything, epsilon=None, noise_multiplier=3**0.5)
    result = audit_plan(federation, Wanted(num_canaries=1000), num_rows=1000)
    assert result.refuted, result


def test_a_run_can_be_audited_in_one_go(tmp_path: Path) -> None:
    from fedfm.cli.main import app
    from fedfm.recipe import dump

    runner, recipe = CliRunner(), tmp_path / "recipe.yaml"
    base = replace(tiny.federation(tmp_path), aggregator=Mean("uniform"), rounds=1)
    recipe.write_text(dump(base))
    refused = runner.invoke(app, ["run", str(recipe), "--audit", "--out", str(tmp_path / "none")])
    assert isinstance(refused.exception, ConfigError) and "no claim to audit" in str(refused.exception)
    assert not (tmp_path / "none").exists(), "refused before anything is played"
    recipe.write_text(dump(replace(base, transforms=(replace(DP, simulated=True),))))
    done = runner.invoke(app, ["run", str(recipe), "--audit", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0 and "does not contradict the claim" in done.output, done.output
    kept = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert kept["design"]["power"] >= 0.95 and kept["claim"]["simulated"] and kept["level"] == "owners"
    asked = runner.invoke(app, ["audit", str(recipe), "--canaries", "100", "--once", "--json"])
    words = json.loads(asked.stdout)
    assert asked.exit_code == 0 and words["design"]["num_canaries"] == 100 and not words["more"]


@pytest.mark.parametrize("release", [Release(0.25, 1.0, 1), Release(0.1, 0.8, 5)])
def test_sound_sampling_raises_few_false_alarms(release: Release) -> None:
    secret, rounds, num = Secret.system(), 4, 300
    all_ = replace(release, steps=rounds * release.steps)
    observer = Observer.of(release, rounds, release.noise / 4, secret.stream("normal").normal, secret.stream("uniform").uniform)
    chosen, alarms = design(num, Curve.of(all_), observer), 0
    coin, noise = secret.stream("coins"), secret.stream("noise")
    for _ in range(200):
        present_n = coin.uniform(num) < 0.5
        score_n = np.zeros(num)
        for _ in range(rounds):
            times_n = (coin.uniform(num * release.steps).reshape(num, -1) < release.rate).sum(1)
            score_n += seen(present_n * times_n + release.noise * release.steps**0.5 * noise.normal(num), release)
        alarms += evidence(score_n, present_n, chosen.num_guesses, all_, 1e-5, both=chosen.both).ruled_out
    assert alarms <= 16


def test_with_sampled_rows_a_fixed_seed_shows_in_those_that_were_drawn() -> None:
    from fedfm.run.audit import _blind, _sure

    released = Release(0.01, 0.8, 40, "row")
    guesses, both = _sure(2000, released)
    assert not both and guesses < 0.4 * 2000 * (1 - 0.99**40)
    assert _sure(1001, Release(1.0, 1.0)) == (750, True)
    assert _blind(60, released, {"best": 0.045, "runs": 0.0025}) == ("runs",) and not _blind(
        4000, released, {"best": 0.045, "runs": 0.0025}
    )


def test_where_nothing_can_be_noticed_the_power_says_so() -> None:
    result = audit_owners(plan(transforms=(replace(DP, noise_multiplier=1e4),), rounds=1), twice=False)
    assert result.design.num_canaries == 1000 and result.design.power < 0.2 and not result.refuted
    assert "means little" in result.verdict() and f"probability {result.design.power:.2f} alone" in result.verdict()

"""Counts with noise that is added at home, once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedfm.aggregators import Mean
from fedfm.client.policy import Policy
from fedfm.core import check
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.roster import Roster
from fedfm.core.secret import Secret
from fedfm.run.loop import run
from fedfm.simulation import Simulation
from fedfm.tasks import Classification
from fedfm.testing import tiny
from fedfm.transforms import LocalDP
from fedfm.transforms.local_dp import geometric
from fedfm.verbs import Describe


def test_noise_is_two_sided_geometric() -> None:
    from scipy import stats

    for rate in (0.1, 0.7, 2.0):
        x = geometric(rate, 100_000, Secret.simulated(Key.root(1)).stream("counts"))
        p = 1 - math.exp(-rate)
        edges = np.arange(-6, 7) * max(1, round(0.5 / rate))
        observed = np.histogram(x, [-np.inf, *(edges + 0.5), np.inf])[0]
        whole = np.arange(-2000, 2001)
        pmf = np.exp(-rate * np.abs(whole)) * p / (2 - p)
        chances = np.histogram(whole, [-np.inf, *(edges + 0.5), np.inf], weights=pmf)[0]
        assert stats.chisquare(observed, chances / chances.sum() * len(x)).pvalue > 1e-3


def test_one_row_changes_no_chance_by_more_than_its_epsilon() -> None:
    part, epsilon = LocalDP(epsilon=1.5), 0.5
    draws = [
        np.array([part.told_counts([count], 1.0, Secret.simulated(Key.root(i)).stream("counts"))[0] for i in range(4000)])
        for count in (20, 21)
    ]
    for value in range(17, 25):
        first, second = ((own == value).mean() for own in draws)
        assert abs(math.log(first / second)) < epsilon + 5 * math.sqrt(2 / (4000 * min(first, second)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def asked(simulation: Simulation) -> Roster:
    house = simulation.house
    with simulation.open() as session:
        return Describe().roster(simulation.federation.channel, session, house.clients, house.labels, house.key)


def test_an_owner_tells_noisy_counts_once(folder: Path) -> None:
    plan = tiny.federation(
        folder,
        model=tiny.spec("Bert", num_hidden_layers=1),
        task=Classification(max_length=16),
        aggregator=Mean(weights="uniform"),
        transforms=(LocalDP(epsilon=0.9),),
    )
    simulation = Simulation.build(plan, folder=folder / "run")
    exact = {client: simulation.house.shard(client) for client in simulation.clients}
    first = asked(simulation)
    told = [(holding.train, holding.test, holding.tokens) for holding in first.holdings.values()]
    assert told != [(len(own.train), len(own.test), own.tokens) for own in exact.values()]
    assert all(value is not None and value >= 0 for own in told for value in own)
    assert [holding.labels for holding in first.holdings.values()] != [own.histogram() for own in exact.values()]
    again = asked(Simulation.build(plan, folder=folder / "run"))
    assert set(again.withholds("counts")) == set(simulation.clients), "noise that is drawn twice can be averaged away"
    other = asked(Simulation.build(replace(plan, name="another"), folder=folder / "run"))
    assert [own.train for own in other.holdings.values()] != [
        own.train for own in first.holdings.values()
    ] or other.holdings != first.holdings


def test_a_policy_that_withholds_counts_still_does(folder: Path) -> None:
    plan = tiny.federation(folder, aggregator=Mean(weights="uniform"), transforms=(LocalDP(epsilon=1.0),))
    roster = asked(Simulation.build(plan, policies={"a": Policy.open(may_leave=("losses",))}))
    assert roster.withholds("counts") == ["a"]


def test_the_plan_check_and_the_ledger_tell_of_it(folder: Path) -> None:
    plan = tiny.federation(folder, aggregator=Mean(weights="uniform"), transforms=(LocalDP(epsilon=1.0),), rounds=1)
    (promise,) = [f.text for f in check.check(plan.resolved(), 3) if f.level == "promise"]
    assert all(
        word in promise for word in ("epsilon 1", "delta 0", "one row", "geometric noise", "updates and evaluations are not covered")
    )
    assert any("counts, which LocalDP" in f.text for f in check.check(replace(plan, aggregator=Mean()), 3) if f.level == "refusal")
    list(run(plan, out=folder / "run"))
    (told,) = json.loads((folder / "run" / "ledger.json").read_text())["privacy"]
    assert told["epsilon"] == 1.0
    with pytest.raises(ConfigError, match="epsilon is 0"):
        LocalDP(epsilon=0)

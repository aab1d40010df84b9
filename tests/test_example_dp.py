"""DP-SGD in each owner's house: exact against one example at a time, bounded, and accounted for in the owner's own account."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfm.aggregators import Mean
from fedfm.client.bank import Bank, Course, Job
from fedfm.client.objective import StepObjective, Tally
from fedfm.client.policy import Policy
from fedfm.core import check
from fedfm.core.errors import PlanError, PrivacyError
from fedfm.core.keys import Key
from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.parts import GradientTrainer, RoundContext, Work
from fedfm.core.privacy import Release, released
from fedfm.core.round import start
from fedfm.core.secret import Secret
from fedfm.data import poisson
from fedfm.engines import Embedded, Process
from fedfm.local import SGD, AdamW, ExampleDP, FedProx
from fedfm.methods import Scaffold
from fedfm.privacy import epsilon_of
from fedfm.run.loop import run
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing import tiny
from fedfm.tuning import Full, LoRA
from fedfm.tuning.base import Tuned, Tuning
from fedfm.verbs import Describe, Evaluation

pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
KEY = Key.root(0)


def bank_of(local: GradientTrainer | ExampleDP, tuning: Tuning | None = None) -> tuple[Bank, dict[str, torch.Tensor]]:
    foundation = tiny.foundation("Llama")
    tuned: Tuned = (tuning or LoRA(r=2)).attach(foundation)
    bank = Bank(tuned, CausalLM(max_length=32, packed=False), local, foundation.tokenizer.pad_token_id, torch.device("cpu"), KEY)
    return bank, tiny.disturbed(dict(tuned.init(KEY.fold("init"))), scale=0.02 if isinstance(tuning, Full) else 0.2)


def jobs_of(counts: list[int], shortest: int = 5, secret: str = "s") -> list[Job]:
    return [
        Job(f"c{i}", tiny.examples(i, count, shortest, 9), secret=Secret.simulated(KEY.fold(secret, i))) for i, count in enumerate(counts)
    ]


def gradient_of(bank: Bank, theta_d: torch.Tensor, job: Job, i: int) -> torch.Tensor:
    """The gradient of one example's mean loss, computed by itself."""
    theta_1d = theta_d.clone().unsqueeze(0).requires_grad_(True)
    batch = bank.learner.batch([bank.task.rows(job.examples, np.array([i]), KEY.numpy())])
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(bank.learner.losses(theta_1d, batch).mean(), theta_1d)
    return grad[0]


@pytest.mark.parametrize("tuning", [LoRA(r=2), Full()], ids=["banked", "one by one"])
def test_a_round_is_dp_sgd_one_example_at_a_time(tuning: Tuning) -> None:
    trainer = ExampleDP(SGD(lr=0.3, steps=3, batch_size=2, accumulate=2), max_norm=0.2, delta=1e-3, noise_multiplier=0.7)
    bank, params = bank_of(trainer, tuning)
    jobs, again = jobs_of([11, 7, 3]), jobs_of([11, 7, 3])
    trained = bank.train(params, jobs, 1)
    clipped = 0
    for own, job in zip(trained, again, strict=True):
        assert job.secret is not None
        n = len(job.examples)
        theta_d = bank.tuned.spec.flatten(params)
        batches = job.secret.stream("batches")
        for step in range(3):
            index = np.arange(n) if n <= 4 else np.flatnonzero(batches.uniform(n) < 4 / n)
            total_d = torch.zeros_like(theta_d)
            for i in index.tolist():
                grad_d = gradient_of(bank, theta_d, job, i)
                clipped += float(grad_d.norm()) > 0.2
                total_d += grad_d * min(1.0, 0.2 / float(grad_d.norm()))
            noise_d = torch.from_numpy(job.secret.stream("noise", step).normal(len(theta_d)))
            theta_d = theta_d - 0.3 * ((total_d.double() + 0.7 * 0.2 * noise_d) / min(4, n)).float()
        moved = (own.params_d - bank.tuned.spec.flatten(params)).norm()
        assert (own.params_d - theta_d).norm() < 1e-4 * moved
    assert clipped > 5, "the bound was never reached"


def test_without_noise_or_bound_it_is_the_inner_trainer() -> None:
    inner = AdamW(lr=0.05, steps=3, batch_size=None, max_grad_norm=None)
    private = ExampleDP(inner, max_norm=1e9, delta=1e-3, noise_multiplier=0.0)
    results = []
    for trainer in (inner, private):
        bank, params = bank_of(trainer)
        results.append(bank.train(params, jobs_of([6, 4], shortest=9), 1))
    for plain, own in zip(*results, strict=True):
        assert torch.allclose(plain.params_d, own.params_d, atol=1e-4) and own.metrics["loss"] == pytest.approx(plain.metrics["loss"])


def objective_of(bank: Bank, jobs: list[Job], work: Work, shares: bool = True) -> tuple[StepObjective, torch.Tensor]:
    course = Course.of(jobs, work, 1, bank.key)
    theta_kd = bank.tuned.spec.flatten(tiny.disturbed(dict(bank.tuned.init(KEY)))).expand(len(jobs), -1).clone()
    return StepObjective(bank.learner, course.step(0), Tally.zeros(len(jobs), bank.learner), lambda: shares), theta_kd


def test_no_example_moves_the_sum_by_more_than_the_bound_whatever_it_is() -> None:
    bank, _ = bank_of(SGD())
    work = Work(2, 1, None, 2)
    job = jobs_of([4])
    objective, theta_kd = objective_of(bank, job, work)
    whole_kd = objective.clipped_sum(theta_kd, 0.01)
    grad_nd, _ = objective.per_example(theta_kd)
    assert (grad_nd.norm(dim=1) > 0.01).all() and whole_kd.norm() <= 4 * 0.01
    one, _ = objective_of(bank, [replace(job[0], examples=tiny.Memory([job[0].examples.ids(0)]))], work)
    assert one.clipped_sum(theta_kd, 0.01).norm() <= 0.01
    apart, _ = objective_of(bank, job, work, shares=False)
    assert torch.allclose(apart.clipped_sum(theta_kd, 0.01), whole_kd, atol=1e-6)


def test_an_example_without_a_finite_gradient_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _ = bank_of(SGD())
    objective, theta_kd = objective_of(bank, jobs_of([4]), Work(2, 1, None, 2))
    clean_nd, _ = objective.per_example(theta_kd)
    whole = objective._slices

    def broken(theta_kd, batch, owners, keys):
        own = whole(theta_kd, batch, owners, keys)
        own.grad_nd[0] = torch.tensor([math.nan, math.inf]).repeat(own.grad_nd.shape[1])[: own.grad_nd.shape[1]]
        own.losses.loss_q[0] = math.nan
        return own

    monkeypatch.setattr(objective, "_slices", broken)
    objective.reported = False
    sum_kd = objective.clipped_sum(theta_kd, 1e9)
    assert torch.allclose(sum_kd[0], clean_nd[1] + clean_nd[3], atol=1e-5) and objective.tally.loss_k.isfinite().all()


def test_batches_are_drawn_by_poisson_sampling() -> None:
    work, n = Work(3, 4000, None, 2, poisson=True), 24
    steps = poisson(n, work, Secret.simulated(KEY).stream("batches"))
    sizes = np.array([len(step) for step in steps])
    assert len(steps) == 4000 and sizes.min() < 2 and abs(sizes.mean() - 6) < 5 * (6 * 0.75 / 4000) ** 0.5
    assert abs(sizes.var() - 6 * 0.75) < 0.5, "a fixed or shuffled size has another variance"
    hits = np.bincount(np.concatenate(steps), minlength=n)
    assert abs(hits / 4000 - 0.25).max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert [step.tolist() for step in poisson(3, replace(work, steps=2), Secret.system().stream("batches"))] == [[0, 1, 2]] * 2
    assert poisson(0, work, Secret.system().stream("batches")) == []
    assert len(poisson(10, Work(4, None, 2, poisson=True), Secret.system().stream("batches"))) == 6


def test_a_step_whose_batch_is_empty_is_noise_alone() -> None:
    trainer = ExampleDP(SGD(lr=1.0, steps=6, batch_size=1), max_norm=0.5, delta=1e-3, noise_multiplier=1.0)
    bank, params = bank_of(trainer)
    trained = bank.train(params, jobs_of([8, 8], secret="empty"), 1)
    sizes = [len(step) for i in (0, 1) for step in poisson(8, trainer.work, Secret.simulated(KEY.fold("empty", i)).stream("batches"))]
    assert 0 in sizes and max(sizes) > 1 and all(own.finite for own in trained)
    moved = [float((own.params_d - bank.tuned.spec.flatten(params)).square().mean()) for own in trained]
    assert all(0.7 * 6 * 0.25 < square < 1.5 * 6 * 0.25 for square in moved)


def test_the_noise_is_as_large_as_it_is_said() -> None:
    trainer = ExampleDP(SGD(lr=1.0, steps=1, batch_size=2), max_norm=0.5, delta=1e-3, noise_multiplier=3.0)
    bank, params = bank_of(trainer)
    start_d = bank.tuned.spec.flatten(params)
    moved = torch.cat([own.params_d - start_d for own in bank.train(params, jobs_of([40] * 6), 1)])
    # The clipped sum is at most a few bounds long in all; the noise is 1.5 on each value; both are divided by the expected batch.
    assert float(moved.std()) == pytest.approx(1.5 / 2, rel=0.03)


# --- in a federation


def private(folder: Path, **changes: object) -> object:
    trainer = changes.pop("trainer", None) or ExampleDP(SGD(lr=0.1, steps=2, batch_size=4), max_norm=1.0, delta=1e-3, epsilon=6.0)
    return tiny.federation(folder, local=trainer, aggregator=Mean(weights="uniform"), rounds=3, **changes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def work(simulation: Simulation, round: int = 1) -> dict[str, Request]:
    plan, house = simulation.federation, simulation.house
    state = replace(start(plan, house.start), round=round - 1)
    errand = plan.work(state, house.clients, RoundContext(round, house.key, state.params, len(house.clients)))
    return {client: errand.request(client) for client in house.clients}


def test_each_owner_spends_its_own_and_is_refused_when_its_budget_is_spent(folder: Path) -> None:
    simulation = Simulation.build(private(folder, owners=("a", "a", "b")), folder=folder / "run")
    house, trainer = simulation.house, simulation.federation.local
    assert isinstance(trainer, ExampleDP) and trainer.rounds == 3
    with simulation.open() as session:
        for round in (1, 2, 3):
            # A fresh ticket each time; what was spent before stays spent, whoever asks again.
            answers = list(session.exchange(work(simulation, round)))
            assert all(isinstance(answer, Reply) for answer in answers), answers
        refused = list(session.exchange(work(simulation, 4)))
    sizes = {client: len(house.shard(client).train) for client in house.clients}
    assert sizes["a"] > sizes["b"]
    for client, n in sizes.items():
        spent = released(house.spent.of(client))
        assert spent == [Release(4 / n, trainer.noise_of(n), 6, "row")]
        assert 5.9 < epsilon_of(spent, 1e-3, fine=False) <= 6.0
    assert trainer.noise_of(sizes["a"]) < trainer.noise_of(sizes["b"]), "who has more rows needs less noise"
    assert all(isinstance(answer, Failure) and "privacy budget is epsilon 6 at delta 0.001" in answer.reason for answer in refused)
    # A house that is opened again knows what it has spent.
    again = Simulation.build(simulation.federation, folder=folder / "run")
    with again.open() as session:
        assert all(isinstance(answer, Failure) for answer in session.exchange(work(again, 4)))


def test_noise_differs_each_time_and_a_simulated_run_is_repeated(folder: Path) -> None:
    def moved(**more: bool) -> list[torch.Tensor]:
        trainer = ExampleDP(SGD(lr=0.1, steps=1, batch_size=4), max_norm=1.0, delta=1e-3, noise_multiplier=1.0, **more)
        simulation = Simulation.build(private(folder, trainer=trainer))
        with simulation.open() as session:
            answers = sorted((a for a in session.exchange(work(simulation)) if isinstance(a, Reply)), key=lambda a: a.client)
        return [torch.cat([leaf.reshape(-1) for leaf in answer.tensors.values()]) for answer in answers]

    assert not any(torch.equal(x, y) for x, y in zip(moved(), moved(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(moved(simulated=True), moved(simulated=True), strict=True))


def test_numbers_of_the_work_and_counts_stay_at_home(folder: Path) -> None:
    simulation = Simulation.build(private(folder))
    house = simulation.house
    with simulation.open() as session:
        for answer in session.exchange(work(simulation)):
            assert isinstance(answer, Reply)
            assert dict(answer.meta) == {"weight": 1.0, "steps": 0.0, "examples": 0.0, "tokens": 0.0, "padding": 0.0}
        roster = Describe().roster(simulation.federation.channel, session, house.clients, house.labels, house.key)
        assert set(roster.withholds("counts")) == set(house.clients)
        state = start(simulation.federation, house.start)
        errand = Evaluation().errand(simulation.federation, state, house.clients, 2, split="train")
        answers = list(session.exchange({client: errand.request(client) for client in house.clients}))
    assert all(isinstance(answer, Failure) and "training rows" in answer.reason for answer in answers)


def refusals(plan) -> str:
    return " ".join(f.text for f in check.check(plan.resolved(), 3) if f.level == "refusal")


def test_the_plan_check_refuses_what_hides_no_row(folder: Path) -> None:
    plan = private(folder)
    assert not refusals(plan)
    promise = [f.text for f in check.check(plan.resolved(), 3) if f.level == "promise"]
    assert len(promise) == 1 and all(
        word in promise[0] for word in ("epsilon 6", "delta 0.001", "one row", "a row added or removed", "Poisson", "PLD")
    )
    assert "packed: false" in refusals(replace(plan, task=CausalLM(packed=True)))
    assert "Mean needs counts" in refusals(replace(plan, aggregator=Mean()))
    with pytest.raises(PlanError, match="takes none"):
        replace(plan, method=Scaffold()).resolved()
    simulated = replace(plan, local=replace(plan.local, simulated=True))
    assert any("simulated epsilon 6" in f.text for f in check.check(simulated.resolved(), 3) if f.level == "promise")
    unbounded = replace(plan, local=replace(plan.local, noise_multiplier=0.0, epsilon=None))
    assert any("epsilon is infinite" in f.text for f in check.check(unbounded.resolved(), 3) if f.level == "warning")


def test_inside_a_trainer_that_would_go_round_it_it_is_refused(folder: Path) -> None:
    plan = private(folder, trainer=FedProx(ExampleDP(SGD(steps=1), max_norm=1.0, delta=1e-3, epsilon=1.0)))  # type: ignore[arg-type]
    assert "inside FedProx" in refusals(plan)


def test_an_owner_that_demands_privacy_gets_it(folder: Path) -> None:
    demand = {"a": Policy.open(demand=("private",))}
    simulation = Simulation.build(private(folder), policies=demand)
    with simulation.open() as session:
        assert all(isinstance(answer, Reply) for answer in session.exchange(work(simulation)))
    plain = Simulation.build(tiny.federation(folder), policies=demand)
    with plain.open() as session:
        failed = [answer.client for answer in session.exchange(work(plain)) if isinstance(answer, Failure)]
    assert failed == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [Embedded(bank=1, device="cpu"), Process(device="cpu", threads=1)], ids=["embedded", "process"])
def test_a_run_tells_what_its_worst_owner_has_spent(folder: Path, engine: Embedded | Process) -> None:
    trainer = ExampleDP(SGD(lr=0.1, steps=2, batch_size=4), max_norm=1.0, delta=1e-3, noise_multiplier=1.5)
    list(run(private(folder, trainer=trainer, owners=("a", "a", "b"), engine=engine), out=folder / "run"))
    (told,) = json.loads((folder / "run" / "ledger.json").read_text())["privacy"]
    few = len(Simulation.build(private(folder, trainer=trainer, owners=("a", "a", "b"))).house.shard("b").train)
    assert told["epsilon"] == pytest.approx(epsilon_of([Release(4 / few, 1.5, 6, "row")], 1e-3, fine=False))
    assert "the owner that has spent most" in told["sampling"] and told["unit"].startswith("one row")


def test_no_noise_is_enough_is_said() -> None:
    trainer = ExampleDP(SGD(steps=10**9, batch_size=None), max_norm=1.0, delta=1e-9, epsilon=1e-4, rounds=10**3)
    with pytest.raises(PrivacyError, match="No noise keeps"):
        trainer.noise_of(10)

"""Papers made of several parts. SCAFFOLD: its algorithm, its limits, its invariant, and the optimum that FedAvg misses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfm.aggregators import CoordinateMedian, Mean
from fedfm.core import tree
from fedfm.core.check import check
from fedfm.core.errors import ConfigError, PlanError
from fedfm.core.parts import Cohort, GradientTrainer, LocalTrainer, ServerOptimizer, Transform, Update
from fedfm.core.round import play, start
from fedfm.data import Data
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.local import SGD, AdamW, FedProx
from fedfm.methods import Scaffold
from fedfm.methods.scaffold import CONTROL, ScaffoldLocal, ScaffoldServer
from fedfm.models import Model
from fedfm.server import FedAdam, FedAvg
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing import check_part, check_server, examples, tiny
from fedfm.testing.parts import context, parameters
from fedfm.transforms import CastBF16, ClipByNorm, Int4, Int8, TopK

BASE = Federation(Model(source="nowhere"), Data(source="stdlib"), local=SGD(lr=0.1, batch_size=None))


@pytest.mark.parametrize("method", examples("methods", {"Scaffold": [Scaffold(), Scaffold(lr=0.5)]}), ids=repr)
def test_conformance(method) -> None:
    check_part(method)
    resolved = replace(BASE, method=method).resolved()
    assert resolved.method is None
    assert not [finding for finding in check(resolved, 5) if finding.level == "refusal"]
    for part in resolved.parts().values():
        check_part(part)


def test_server_conformance() -> None:
    size = sum(leaf.numel() for leaf in parameters().values())
    check_server(ScaffoldServer(lr=0.5), extra={CONTROL: torch.linspace(-1, 1, size)})


# Drifting quadratics: client k minimises (x - x_k)' H_k (x - x_k) / 2, and their optima differ.

CLIENTS, DIM, STEPS, LR = 4, 3, 10, 0.1
RNG = np.random.default_rng(0)
Q = [np.linalg.qr(RNG.normal(size=(DIM, DIM)))[0] for _ in range(CLIENTS)]
H = np.stack([q @ np.diag(RNG.uniform(0.3, 3.0, DIM)) @ q.T for q in Q])
X = RNG.normal(size=(CLIENTS, DIM))
OPTIMUM = np.linalg.solve(H.sum(0), np.einsum("kij,kj->i", H, X))
# K steps of gradient descent contract client k towards x_k by (I - lr H_k)^K; FedAvg stops where these pulls cancel.
PULL = np.stack([np.eye(DIM) - np.linalg.matrix_power(np.eye(DIM) - LR * h, STEPS) for h in H])
BIASED = np.linalg.solve(PULL.sum(0), np.einsum("kij,kj->i", PULL, X))


def simulate(local: GradientTrainer, server: ServerOptimizer, rounds: int, steps: int = STEPS, take=lambda round: range(CLIENTS)):
    """Parameters, the server's state and the clients' memories after some rounds, from parts alone."""
    h, x = torch.tensor(H, dtype=torch.float32), torch.tensor(X, dtype=torch.float32)
    params = {"x": torch.zeros(DIM)}
    state, memories = server.init(params), {k: {} for k in range(CLIENTS)}
    for round in range(1, rounds + 1):
        chosen = list(take(round))
        known = {name for k in chosen for name in memories[k]}
        memory = {name: torch.stack([memories[k].get(name, torch.zeros(DIM)) for k in chosen]) for name in known}
        cohort = Cohort(params["x"].repeat(len(chosen), 1), params["x"].expand(len(chosen), -1), server.broadcast(params, state), memory)
        local.init(cohort)
        rates = [local.lr_at(step, steps, round) for step in range(steps)]
        for step, rate in enumerate(rates):
            grad_kd = torch.einsum("kij,kj->ki", h[chosen], cohort.theta_kd - x[chosen])
            local.step(cohort, grad_kd, torch.full((len(chosen), 1), rate), step)
        extra = local.finish(cohort, torch.full((len(chosen),), sum(rates)), torch.full((len(chosen),), steps))
        updates = [
            Update({"x": cohort.theta_kd[row] - params["x"], **{name: leaf[row] for name, leaf in extra.items()}})
            for row in range(len(chosen))
        ]
        for row, k in enumerate(chosen):
            memories[k] = {name: leaf[row].clone() for name, leaf in cohort.memory.items()}
        ctx = context(params, round, num_clients=CLIENTS)
        params, state = server.step(params, Mean(weights="uniform")(updates, ctx), state, ctx)
    return params["x"].double().numpy(), state, memories


def test_fedavg_stops_at_the_analytic_biased_point_and_scaffold_at_the_optimum() -> None:
    sgd = SGD(lr=LR, steps=STEPS, batch_size=None)
    drifted, _, _ = simulate(sgd, FedAvg(), 200)
    assert np.abs(drifted - BIASED).max() < 1e-6
    assert np.linalg.norm(BIASED - OPTIMUM) > 0.05
    params, _, _ = simulate(ScaffoldLocal(sgd), ScaffoldServer(), 200)
    assert np.abs(params - OPTIMUM).max() < 1e-6


def test_scaffold_reaches_the_optimum_with_half_of_the_clients_and_with_a_schedule() -> None:
    halves = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)]
    params, _, _ = simulate(
        ScaffoldLocal(SGD(lr=LR, steps=STEPS, batch_size=None)), ScaffoldServer(), 400, take=lambda round: halves[round % 6]
    )
    assert np.abs(params - OPTIMUM).max() < 1e-5
    cosine = SGD(lr=LR, steps=STEPS, batch_size=None, schedule="cosine", warmup=2)
    params, _, _ = simulate(ScaffoldLocal(cosine), ScaffoldServer(), 300)
    assert np.abs(params - OPTIMUM).max() < 1e-6


def test_scaffold_is_the_papers_algorithm_1() -> None:
    lr_server, chosen = 0.7, [(0, 2, 3), (1, 2, 3), (0, 1, 2)]
    x, c, ck = np.zeros(DIM), np.zeros(DIM), np.zeros((CLIENTS, DIM))
    for cohort in chosen:
        dy, dc = [], []
        for k in cohort:
            y = x.copy()
            for _ in range(STEPS):
                y -= LR * (H[k] @ (y - X[k]) - ck[k] + c)
            new = ck[k] - c + (x - y) / (STEPS * LR)
            dy.append(y - x)
            dc.append(new - ck[k])
            ck[k] = new
        x, c = x + lr_server * np.mean(dy, 0), c + len(cohort) / CLIENTS * np.mean(dc, 0)
    sgd = SGD(lr=LR, steps=STEPS, batch_size=None)
    ours, state, memories = simulate(ScaffoldLocal(sgd), ScaffoldServer(lr_server), 3, take=lambda round: chosen[round - 1])
    assert np.allclose(ours, x, atol=1e-6) and np.allclose(state[CONTROL].numpy(), c, atol=1e-5)
    assert np.allclose(np.stack([memories[k][CONTROL].numpy() for k in range(CLIENTS)]), ck, atol=1e-5)


def test_the_servers_control_variate_is_the_mean_of_the_clients() -> None:
    for rounds in (1, 5):
        _, state, memories = simulate(ScaffoldLocal(SGD(lr=LR, batch_size=None)), ScaffoldServer(), rounds)
        assert torch.allclose(state[CONTROL], torch.stack([memories[k][CONTROL] for k in range(CLIENTS)]).mean(0), atol=1e-5)


@pytest.mark.parametrize("transform", [ClipByNorm(0.01), CastBF16(), Int8(), Int4(block=4), TopK(k=1)], ids=repr)
def test_a_transform_that_loses_something_leaves_the_control_variates_alone(transform: Transform) -> None:
    params = {"x": torch.zeros(DIM)}
    ctx = context(params, num_clients=CLIENTS, client="client-1")
    payload = {"x": torch.linspace(-0.31, 0.97, DIM) ** 3, CONTROL: torch.linspace(-300, 700, DIM) / 3}
    sent, _ = transform.encode(Update(payload), {}, ctx)
    arrived = transform.decode(sent, ctx).payload
    assert torch.equal(arrived[CONTROL], payload[CONTROL]) and not torch.equal(arrived["x"], payload["x"])


def test_with_one_step_and_everyone_scaffold_is_fedavg() -> None:
    sgd = SGD(lr=LR, steps=1, batch_size=None)
    scaffold, _, _ = simulate(ScaffoldLocal(sgd), ScaffoldServer(), 30, steps=1)
    fedavg, _, _ = simulate(sgd, FedAvg(), 30, steps=1)
    assert np.allclose(scaffold, fedavg, atol=1e-6)


def test_a_client_without_steps_keeps_its_control_variate() -> None:
    local = ScaffoldLocal(SGD(lr=LR))
    cohort = Cohort(torch.zeros(2, 3), torch.zeros(3), {CONTROL: torch.ones(3)}, {CONTROL: torch.full((2, 3), 5.0)})
    local.init(cohort)
    cohort.theta_kd[0] = 1.0
    leaves = local.finish(cohort, torch.tensor([0.5, 0.0]), torch.tensor([5, 0]))
    assert leaves[CONTROL].tolist() == [[-3.0] * 3, [0.0] * 3]
    assert cohort.memory[CONTROL].tolist() == [[2.0] * 3, [5.0] * 3]


def test_a_round_without_clients_changes_nothing() -> None:
    params = {"x": torch.ones(3)}
    server = ScaffoldServer()
    empty = Mean(weights="uniform")([], context(params))
    after, state = server.step(params, empty, server.init(params), context(params))
    assert torch.equal(after["x"], params["x"]) and not state[CONTROL].any()


def test_the_norm_of_a_round_is_that_of_its_deltas(tmp_path: Path) -> None:
    rows = [{"owner": owner, "text": text} for owner in "ab" for text in tiny.TEXT[:4]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = Federation(
        model=tiny.spec("Llama"),
        data=Data(str(tmp_path / "rows.jsonl"), by="owner", test_fraction=0.0),
        task=CausalLM(max_length=16),
        local=SGD(lr=0.1, steps=2, batch_size=2),
        method=Scaffold(),
        engine=Embedded(bank=1, device="cpu"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
        simulation = Simulation.build(plan)
    state = start(simulation.federation, simulation.house.start)
    with simulation.open() as session:
        after, record = play(simulation.federation, state, session, simulation.clients, simulation.key)
    assert record.metrics["update_norm"] == pytest.approx(tree.norm(tree.sub(after.params, state.params)), rel=1e-5)


# Refusals


def refusals(**parts) -> str:
    return "\n".join(finding.text for finding in check(replace(BASE, **parts), 5) if finding.level == "refusal")


@pytest.mark.parametrize("local", [AdamW(), SGD(momentum=0.9), FedProx(inner=SGD(), mu=0.1)], ids=repr)
def test_only_plain_sgd_can_be_corrected(local: LocalTrainer) -> None:
    resolved = replace(BASE, method=Scaffold(), local=local).resolved()
    texts = [finding.text for finding in check(resolved, 5) if finding.level == "refusal"]
    assert len(texts) == 1 and type(local).__name__ in texts[0] and "momentum" in texts[0]


def test_one_half_needs_the_other() -> None:
    assert "needs ScaffoldServer" in refusals(local=ScaffoldLocal(SGD()))
    assert "needs ScaffoldLocal" in refusals(server=ScaffoldServer(), aggregator=Mean(weights="uniform"))


def test_the_control_variate_needs_a_uniform_mean() -> None:
    halves = {"local": ScaffoldLocal(SGD()), "server": ScaffoldServer()}
    assert "uniform-weights" in refusals(**halves, aggregator=Mean())
    assert "weighted-sum" in refusals(**halves, aggregator=CoordinateMedian())
    assert not refusals(**halves, aggregator=Mean(weights="uniform"))


def test_the_method_does_not_replace_what_was_asked_for() -> None:
    with pytest.raises(PlanError, match="FedAdam"):
        replace(BASE, method=Scaffold(), server=FedAdam(lr=0.1)).resolved()
    with pytest.raises(PlanError, match="CoordinateMedian"):
        replace(BASE, method=Scaffold(), aggregator=CoordinateMedian()).resolved()
    with pytest.raises(ConfigError, match="lr is 0"):
        Scaffold(lr=0)

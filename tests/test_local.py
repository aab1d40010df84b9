"""How a client works: the laws of every trainer, and the papers' steps written out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from fedfm.core.errors import ConfigError
from fedfm.core.leaves import Leaf
from fedfm.core.parts import Cohort, GradientTrainer, LocalTrainer
from fedfm.core.tree import Spec
from fedfm.local import SGD, AdamW, ExampleDP, FedProx
from fedfm.methods.scaffold import ScaffoldLocal, ScaffoldServer
from fedfm.testing import check_local, examples

EXAMPLES: dict[str, list[LocalTrainer]] = {
    "SGD": [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9, weight_decay=0.01, epochs=1)],
    "AdamW": [AdamW(), AdamW(lr=0.1, weight_decay=0.01, schedule="cosine", warmup=2, decay=0.9)],
    "ExampleDP": [
        ExampleDP(SGD(lr=0.1), max_norm=1e9, delta=1e-5, noise_multiplier=0.0),
        ExampleDP(AdamW(lr=0.1), max_norm=0.5, delta=1e-5, noise_multiplier=0.1),
        ExampleDP(FedProx(SGD(lr=0.1)), max_norm=1.0, delta=1e-3, epsilon=50.0, rounds=2),
    ],
    "FedProx": [FedProx(SGD(lr=0.1), mu=0.0), FedProx(AdamW(lr=0.1), mu=0.5)],
}


@pytest.mark.parametrize("trainer", examples("local", EXAMPLES), ids=repr)
def test_conformance(trainer: LocalTrainer) -> None:
    check_local(trainer)


def test_conformance_with_a_server_that_sends() -> None:
    check_local(ScaffoldLocal(SGD(lr=0.1)), ScaffoldServer())


def steps(trainer: GradientTrainer, theta_d: torch.Tensor, grads_sd: torch.Tensor) -> torch.Tensor:
    cohort = Cohort(theta_d.unsqueeze(0).clone(), theta_d)
    trainer.init(cohort)
    for step, grad_d in enumerate(grads_sd):
        lr_k = torch.tensor([[trainer.lr_at(step, len(grads_sd), 1)]])
        trainer.step(cohort, grad_d.unsqueeze(0).clone(), lr_k, step)
    return cohort.theta_kd[0]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_its_papers_algorithm_and_torchs(weight_decay: float) -> None:
    torch.manual_seed(0)
    theta_d, grads_sd = torch.randn(9), torch.randn(7, 9)
    ours = steps(AdamW(lr=0.05, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=weight_decay), theta_d, grads_sd)
    # Loshchilov and Hutter, Algorithm 2, with eta_t = lr and lambda = weight_decay * lr, in float64.
    x, m, v = theta_d.double(), 0.0, 0.0
    for t, g in enumerate(grads_sd.double(), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        x = x - 0.05 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6) - 0.05 * weight_decay * x
    torch.testing.assert_close(ours.double(), x, rtol=1e-5, atol=1e-6)
    theirs = torch.nn.Parameter(theta_d.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    for grad_d in grads_sd:
        theirs.grad = grad_d.clone()
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_rate_of_zero_moves_nothing() -> None:
    for trainer in (SGD(lr=0.0, momentum=0.9), AdamW(lr=0.0, weight_decay=0.1)):
        theta_d = torch.arange(4.0)
        assert torch.equal(steps(trainer, theta_d, torch.tensor([[0.0, 1.0, -1.0, 0.0]] * 3)), theta_d)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    torch.manual_seed(0)
    theta_d, grads_sd = torch.randn(9), torch.randn(7, 9)
    ours = steps(SGD(lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=0.1), theta_d, grads_sd)
    theirs = torch.nn.Parameter(theta_d.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    for grad_d in grads_sd:
        theirs.grad = grad_d.clone()
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_fedprox_ends_between_the_global_model_and_the_clients_optimum() -> None:
    """On |w - a|^2 / 2 the minimum of the proximal problem is (a + mu w_t) / (1 + mu)."""
    start_d, a_d, mu = torch.tensor([1.0, -2.0]), torch.tensor([5.0, 4.0]), 0.5
    trainer = FedProx(SGD(lr=0.1), mu=mu)
    cohort = Cohort(start_d.unsqueeze(0).clone(), start_d.unsqueeze(0))
    trainer.init(cohort)
    for step in range(300):
        trainer.step(cohort, cohort.theta_kd - a_d, torch.full((1, 1), 0.1), step)
    torch.testing.assert_close(cohort.theta_kd[0], (a_d + mu * start_d) / (1 + mu), rtol=1e-5, atol=1e-5)


def test_schedules() -> None:
    rates = [AdamW(lr=1.0, schedule="cosine", warmup=2).lr_at(step, 10, 1) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0
    linear = [SGD(lr=1.0, schedule="linear").lr_at(step, 4, 1) for step in range(4)]
    assert linear == sorted(linear, reverse=True) and linear[0] == 1.0
    assert SGD(lr=1.0, decay=0.5).lr_at(0, 4, 3) == 0.25
    assert math.isclose(SGD(lr=0.3).lr_at(3, 4, 9), 0.3)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: FedProx(SGD(), mu=-1.0), "FedProx.mu is -1.0"),
        (lambda: AdamW(beta1=1.0), "AdamW.beta1 is 1.0"),
        (lambda: AdamW(eps=0.0), "AdamW.eps is 0.0"),
        (lambda: SGD(steps=3, epochs=1), "steps"),
        (lambda: SGD(lr=-0.1), "lr"),
    ],
)
def test_hyperparameters_out_of_range(build, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


@dataclass(frozen=True)
class Telling(GradientTrainer):
    """SGD that sends how far it went, and remembers it."""

    work = SGD(lr=0.1).work

    def lr_at(self, step: int, num_steps: int, round: int) -> float:
        return 0.1

    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:
        cohort.theta_kd.sub_(lr_k * grad_kd)

    def leaves(self, trained: Spec, travelling: Spec) -> tuple[Leaf, ...]:
        return (*super().leaves(trained, travelling), Leaf("gone", (trained.size,), group="told"))

    def finish(self, cohort: Cohort, lr_sum_k: torch.Tensor, steps_k: torch.Tensor) -> dict[str, torch.Tensor]:
        gone_kd = cohort.theta_kd - cohort.start_kd
        cohort.memory["gone"] = gone_kd.clone()
        return {"gone": gone_kd}


def test_a_wrapper_sends_and_remembers_what_its_inner_trainer_does() -> None:
    check_local(Telling())
    check_local(FedProx(Telling(), mu=0.1))
    spec = Spec(("w",), ((3,),), (torch.float32,))
    assert [leaf.name for leaf in FedProx(Telling()).leaves(spec, spec)] == ["w", "gone"]

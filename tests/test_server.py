"""The global step: laws of every optimizer, their papers' pseudo-code, and the limits in which they are FedAvg."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedfm.core.errors import ConfigError
from fedfm.core.parts import ServerOptimizer, Update
from fedfm.server import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from fedfm.testing import check_server, examples
from fedfm.testing.parts import context, like, parameters

EXAMPLES = {
    "FedAvg": [FedAvg(), FedAvg(lr=0.3)],
    "FedAdagrad": [FedAdagrad(lr=0.1)],
    "FedAdam": [FedAdam(lr=0.1)],
    "FedYogi": [FedYogi(lr=0.1)],
}
ROUNDS = 12


def trajectory(server: ServerOptimizer, scale: float = 1.0):
    """Parameters after each round of deltas that are drawn once for all optimizers."""
    params = parameters()
    state = server.init(params)
    history = []
    for round in range(1, ROUNDS + 1):
        delta = {name: leaf * scale for name, leaf in like(params, "server", round).items()}
        params, state = server.step(params, Update(delta), state, context(params, round))
        history.append(params)
    return history


def flat(params) -> np.ndarray:
    return np.concatenate([leaf.double().numpy().ravel() for leaf in params.values()])


def close(xs, ys, rtol: float = 1e-5) -> bool:
    return all(np.allclose(flat(x), flat(y), rtol=rtol, atol=rtol) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("server", examples("server", EXAMPLES), ids=repr)
def test_conformance(server: ServerOptimizer) -> None:
    check_server(server)


@pytest.mark.parametrize("server", [FedAdagrad(0.1, beta1=0.5), FedAdam(0.1), FedYogi(0.1, tau=0.1)], ids=repr)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_fedopt_is_the_papers_algorithm_2(server, scale: float) -> None:
    params = parameters()
    x, m, v = flat(params), 0.0, server.tau**2
    for round, params in enumerate(trajectory(server, scale), start=1):
        delta = flat(like(params, "server", round)) * scale
        m = server.beta1 * m + (1 - server.beta1) * delta
        if isinstance(server, FedAdagrad):
            v = v + delta**2
        elif isinstance(server, FedAdam):
            v = server.beta2 * v + (1 - server.beta2) * delta**2
        else:
            v = v - (1 - server.beta2) * delta**2 * np.sign(v - delta**2)
        x = x + server.lr * m / (np.sqrt(v) + server.tau)
        assert np.allclose(flat(params), x, rtol=1e-5, atol=1e-6)


def test_fedavgm_is_its_papers_rule() -> None:
    x, v = flat(parameters()), 0.0
    for round, params in enumerate(trajectory(FedAvgM(lr=0.5, momentum=0.8)), start=1):
        v = 0.8 * v + flat(like(params, "server", round))
        x = x + 0.5 * v
        assert np.allclose(flat(params), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "server",
    [
        FedAvgM(momentum=0.0),
        FedAdagrad(lr=2e5, tau=1e5),
        FedAdam(lr=0.2, beta1=0.0, beta2=1.0, tau=0.1),
        FedYogi(lr=0.2, beta1=0.0, beta2=1.0, tau=0.1),
        FedYogi(lr=2e5, beta1=0.0, tau=1e5),
    ],
    ids=repr,
)
def test_limit_is_fedavg(server: ServerOptimizer) -> None:
    assert close(trajectory(server), trajectory(FedAvg()))


def test_with_lr_1_the_server_takes_the_clients_mean() -> None:
    params = parameters()
    clients = like(params, "clients")
    delta = {name: clients[name] - params[name] for name in params}
    new, state = FedAvg().step(params, Update(delta), {}, context(params))
    assert all(torch.allclose(new[name], clients[name], atol=1e-6) for name in params) and not state


def test_yogi_moves_its_second_moment_by_at_most_a_part_of_the_square() -> None:
    params = parameters()
    server = FedYogi(lr=0.1, beta2=0.9)
    state = server.init(params)
    for round in range(1, ROUNDS):
        delta = like(params, round)
        _, new = server.step(params, Update(delta), state, context(params, round))
        for name in params:
            assert ((new[f"v/{name}"] - state[f"v/{name}"]).abs() <= 0.1 * delta[name].square() + 1e-6).all()
        state = new


@pytest.mark.parametrize("server", [FedAdagrad(0.1), FedAdam(0.1), FedYogi(0.1)], ids=repr)
def test_far_above_tau_steps_do_not_depend_on_the_scale_of_the_deltas(server: ServerOptimizer) -> None:
    assert close(trajectory(server, 1e4), trajectory(server, 1e6), rtol=1e-2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedAvg(lr=0.0), "FedAvg.lr is 0.0"),
        (lambda: FedAvg(lr=math.inf), "inf"),
        (lambda: FedAvgM(momentum=1.0), "1.0"),
        (lambda: FedAvgM(lr=-1.0), "-1.0"),
        (lambda: FedAdam(lr=0.1, beta1=1.0), "beta1 is 1.0"),
        (lambda: FedAdam(lr=0.1, beta2=1.5), "beta2 is 1.5"),
        (lambda: FedYogi(lr=math.nan), "nan"),
        (lambda: FedAdagrad(lr=0.1, tau=0.0), "tau is 0.0"),
    ],
)
def test_refusals(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()

"""Adaptive steps on the server: FedAdagrad, FedAdam and FedYogi are one algorithm with three second moments.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, `Adaptive Federated Optimization
<https://arxiv.org/abs/2003.00295>`_, 2020, Algorithm 2: ``v`` starts at ``tau^2``, and there is no bias correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.parts import RoundContext, ServerOptimizer, Traits, Tree, Update, traits

Moment = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FedAdagrad(ServerOptimizer):
    """``m = beta1 m + (1 - beta1) delta;  v += delta^2;  w += lr m / (sqrt(v) + tau)``.

    With ``beta1=0``, ``lr = 2 tau`` and ``tau`` without bound it is ``FedAvg`` (twice ``tau``, because ``v`` starts at ``tau^2``).

    Args:
        lr: Server learning rate.
        beta1: Memory of the first moment, in ``[0, 1)``.
        tau: Adaptivity: deltas well below it are scaled alike.

    Raises:
        ConfigError: if one is out of range.
    """

    lr: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _require(self, self.lr, self.beta1, self.tau)

    def traits(self) -> Traits:
        """Needs a delta of each parameter."""
        return traits(needs=["deltas"])

    def init(self, params: Tree) -> Tree:
        """``m = 0, v = tau^2``."""
        return _init(params, self.tau)

    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """One adaptive step."""
        return _step(params, update, state, self.lr, self.beta1, self.tau, lambda v, square: v + square)


@dataclass(frozen=True)
class FedAdam(ServerOptimizer):
    """``m = beta1 m + (1 - beta1) delta;  v = beta2 v + (1 - beta2) delta^2;  w += lr m / (sqrt(v) + tau)``.

    With ``beta1=0``, ``beta2=1`` and ``lr = 2 tau`` it is ``FedAvg``.

    Args:
        lr: Server learning rate.
        beta1: Memory of the first moment, in ``[0, 1)``.
        beta2: Memory of the second moment, in ``[0, 1]``.
        tau: Adaptivity: deltas well below it are scaled alike.

    Raises:
        ConfigError: if one is out of range.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _require(self, self.lr, self.beta1, self.tau, self.beta2)

    def traits(self) -> Traits:
        """Needs a delta of each parameter."""
        return traits(needs=["deltas"])

    def init(self, params: Tree) -> Tree:
        """``m = 0, v = tau^2``."""
        return _init(params, self.tau)

    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """One adaptive step."""

        def moment(v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
            return self.beta2 * v + (1 - self.beta2) * square

        return _step(params, update, state, self.lr, self.beta1, self.tau, moment)


@dataclass(frozen=True)
class FedYogi(ServerOptimizer):
    """``FedAdam`` with ``v -= (1 - beta2) delta^2 sign(v - delta^2)``: ``v`` moves by at most ``(1 - beta2) delta^2``.

    With ``beta1=0``, ``beta2=1`` and ``lr = 2 tau`` it is ``FedAvg``.

    Args:
        lr: Server learning rate.
        beta1: Memory of the first moment, in ``[0, 1)``.
        beta2: Memory of the second moment, in ``[0, 1]``.
        tau: Adaptivity: deltas well below it are scaled alike.

    Raises:
        ConfigError: if one is out of range.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _require(self, self.lr, self.beta1, self.tau, self.beta2)

    def traits(self) -> Traits:
        """Needs a delta of each parameter."""
        return traits(needs=["deltas"])

    def init(self, params: Tree) -> Tree:
        """``m = 0, v = tau^2``."""
        return _init(params, self.tau)

    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """One adaptive step."""

        def moment(v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
            return v - (1 - self.beta2) * square * torch.sign(v - square)

        return _step(params, update, state, self.lr, self.beta1, self.tau, moment)


def _require(part: ServerOptimizer, lr: float, beta1: float, tau: float, beta2: float = 0.0) -> None:
    name = type(part).__name__
    for field, value in (("lr", lr), ("tau", tau)):
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}.{field} is {value}; it must be a finite number above 0.")
    if not 0 <= beta1 < 1:
        raise ConfigError(f"{name}.beta1 is {beta1}; it must be at least 0 and less than 1.")
    if not 0 <= beta2 <= 1:
        raise ConfigError(f"{name}.beta2 is {beta2}; it must be at least 0 and at most 1.")


def _init(params: Tree, tau: float) -> Tree:
    m = {f"m/{name}": torch.zeros_like(w, dtype=torch.float32) for name, w in params.items()}
    v = {f"v/{name}": torch.full_like(w, tau**2, dtype=torch.float32) for name, w in params.items()}
    return {**m, **v}


def _step(
    params: Tree, update: Update, state: Tree, lr: float, beta1: float, tau: float, moment: Moment
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    new_params, m, v = {}, {}, {}
    for name, w in params.items():
        delta = update.payload[name].float()
        m[f"m/{name}"] = beta1 * state[f"m/{name}"] + (1 - beta1) * delta
        v[f"v/{name}"] = moment(state[f"v/{name}"], delta.square())
        new_params[name] = (w + lr * m[f"m/{name}"] / (v[f"v/{name}"].sqrt() + tau)).to(w.dtype)
    return new_params, {**m, **v}

"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.parts import Cohort, GradientTrainer, Traits, Work, traits
from fedfm.local.schedule import Schedule, rate, require


@dataclass(frozen=True)
class SGD(GradientTrainer):
    """``m = mu m + g + wd w;  w -= lr m`` (``w -= lr (g + mu m)`` with Nesterov). With one full-batch step it is gradient descent.

    Momentum starts at zero in every round: clients are stateless.

    Args:
        lr: Learning rate.
        steps: Local steps per round; 10 where neither ``steps`` nor ``epochs`` is given.
        epochs: Passes over the owner's examples, instead of ``steps``.
        batch_size: Examples per step and client; ``None`` takes all of them.
        momentum: ``mu``.
        nesterov: Look ahead by one step of momentum.
        weight_decay: ``wd``.
        accumulate: Micro-batches per step.
        max_grad_norm: Bound on each client's gradient norm.
        schedule: ``constant``, ``linear`` or ``cosine`` over the round's steps.
        warmup: Steps of linear rise.
        decay: Factor on the rate per round.
    """

    lr: float = 0.1
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = 8
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    accumulate: int = 1
    max_grad_norm: float | None = None
    schedule: Schedule = "constant"
    warmup: int = 0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", 10)
        require("SGD", self.lr, self.work, self.schedule, self.warmup, self.decay)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"SGD.momentum is {self.momentum}; it is at least 0 and less than 1.")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("SGD.nesterov needs momentum; it is 0.")

    def traits(self) -> Traits:
        """Without momentum a client moves by its gradients and nothing else."""
        return traits(is_=[] if self.momentum else ["gradient-steps"])

    @property
    def work(self) -> Work:
        """How much a client does in a round."""
        return Work(self.batch_size, self.steps, self.epochs, self.accumulate, self.max_grad_norm)

    def lr_at(self, step: int, num_steps: int, round: int) -> float:
        """The rate of one step."""
        return rate(self.schedule, self.lr, self.warmup, step, num_steps, self.decay, round)

    def init(self, cohort: Cohort) -> None:
        """``m = 0``."""
        if self.momentum:
            cohort.slots["momentum"] = torch.zeros_like(cohort.theta_kd)

    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:
        """One step of every client, in place."""
        if self.weight_decay:
            grad_kd.add_(cohort.theta_kd, alpha=self.weight_decay)
        if self.momentum:
            m_kd = cohort.slots["momentum"].mul_(self.momentum).add_(grad_kd)
            grad_kd = grad_kd.add_(m_kd, alpha=self.momentum) if self.nesterov else m_kd
        cohort.theta_kd.addcmul_(grad_kd, lr_k, value=-1)

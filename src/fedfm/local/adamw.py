"""AdamW.

Loshchilov, Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from fedfm.core.errors import ConfigError
from fedfm.core.parts import Cohort, GradientTrainer, Work
from fedfm.local.schedule import Schedule, rate, require


@dataclass(frozen=True)
class AdamW(GradientTrainer):
    """``w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + lr wd w``, moments starting at zero in every round.

    Args:
        lr: Learning rate.
        steps: Local steps per round; 10 where neither ``steps`` nor ``epochs`` is given.
        epochs: Passes over the owner's examples, instead of ``steps``.
        batch_size: Examples per step and client; ``None`` takes all of them.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: ``wd``, decoupled.
        accumulate: Micro-batches per step.
        max_grad_norm: Bound on each client's gradient norm.
        schedule: ``constant``, ``linear`` or ``cosine`` over the round's steps.
        warmup: Steps of linear rise.
        decay: Factor on the rate per round.
    """

    lr: float = 1e-3
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = 4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    schedule: Schedule = "constant"
    warmup: int = 0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", 10)
        require("AdamW", self.lr, self.work, self.schedule, self.warmup, self.decay)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ConfigError(f"AdamW.{name} is {beta}; it is at least 0 and less than 1.")
        if not self.eps > 0:
            raise ConfigError(f"AdamW.eps is {self.eps}; it must be more than 0.")

    @property
    def work(self) -> Work:
        """How much a client does in a round."""
        return Work(self.batch_size, self.steps, self.epochs, self.accumulate, self.max_grad_norm)

    def lr_at(self, step: int, num_steps: int, round: int) -> float:
        """The rate of one step."""
        return rate(self.schedule, self.lr, self.warmup, step, num_steps, self.decay, round)

    def init(self, cohort: Cohort) -> None:
        """``m = v = 0``."""
        cohort.slots["m"], cohort.slots["v"] = torch.zeros_like(cohort.theta_kd), torch.zeros_like(cohort.theta_kd)

    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:
        """One step of every client, in place."""
        m_kd, v_kd = cohort.slots["m"], cohort.slots["v"]
        # To read a rate off an accelerator is to wait for it.
        rates = set(lr_k.flatten().tolist()) if lr_k.device.type == "cpu" else set()
        if len(rates) == 1:
            self._fused(cohort.theta_kd, grad_kd, m_kd, v_kd, rates.pop(), step)
            return
        if self.weight_decay:
            cohort.theta_kd.mul_(1 - lr_k * self.weight_decay)
        m_kd.lerp_(grad_kd, 1 - self.beta1)
        v_kd.mul_(self.beta2).addcmul_(grad_kd, grad_kd, value=1 - self.beta2)
        c1, c2 = 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)
        # A rate of 0 divides by infinity.
        cohort.theta_kd.addcdiv_(m_kd, torch.sqrt(v_kd).div_(math.sqrt(c2)).add_(self.eps).div_(lr_k / -c1))

    def _fused(self, theta_kd: torch.Tensor, grad_kd: torch.Tensor, m_kd: torch.Tensor, v_kd: torch.Tensor, lr: float, step: int) -> None:
        """The same with one rate for all, by torch's own kernel: one pass over the memory, where the operations above make eight."""
        adamw(
            [theta_kd], [grad_kd], [m_kd], [v_kd], [], [torch.tensor(float(step))],
            fused=True, amsgrad=False, beta1=self.beta1, beta2=self.beta2, lr=lr, weight_decay=self.weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip

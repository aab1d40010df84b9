"""FedProx: a pull towards the global model.

Li et al., `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.parts import Cohort, Finding, GradientTrainer, Plan, WrappedTrainer, warn


@dataclass(frozen=True)
class FedProx(WrappedTrainer):
    """Minimises ``f_k(w) + mu/2 ||w - w_t||^2``: adds ``mu (w - w_t)`` to the gradient of ``inner``. With ``mu=0`` it is ``inner``.

    The term is added after the gradient's clipping, as it is no part of the data's gradient.

    Args:
        inner: The trainer that takes the steps.
        mu: Strength of the pull.

    Raises:
        ConfigError: if ``mu`` is negative.
    """

    concerns = ("heterogeneity",)

    inner: GradientTrainer
    mu: float = 0.01

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ConfigError(f"FedProx.mu is {self.mu}; it must be 0 or more.")

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Warns of one local step: it starts at the global model, where the pull is zero."""
        if self.work.steps == 1:
            yield warn("local", "FedProx has no effect with one local step: the pull is zero at the global model.")

    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:
        """One step of every client, in place."""
        if self.mu:
            grad_kd.add_(cohort.theta_kd - cohort.start_kd, alpha=self.mu)
        self.inner.step(cohort, grad_kd, lr_k, step)

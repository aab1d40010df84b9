"""SCAFFOLD: control variates against client drift.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, `SCAFFOLD: Stochastic Controlled Averaging for Federated Learning
<https://arxiv.org/abs/1910.06378>`_, 2019, Algorithm 1 with option II::

    client   y <- y - eta (g - c_k + c)        at each local step
             c_k+ = c_k - c + (x - y) / sum(eta)
    server   x <- x + lr mean(y - x)
             c <- c + |S| / N mean(c_k+ - c_k)

Where the paper has ``K eta`` for K equal steps we have the sum of the rates, which covers schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedfm.aggregators import Mean
from fedfm.core.errors import ConfigError, PlanError
from fedfm.core.parts import (
    Cohort,
    Finding,
    GradientTrainer,
    Leaf,
    Method,
    P,
    Plan,
    RoundContext,
    ServerOptimizer,
    Spec,
    Traits,
    Tree,
    Update,
    WrappedTrainer,
    refuse,
    traits,
)  # fmt: skip
from fedfm.server import FedAvg

CONTROL = "scaffold.control"
_HALF = "scaffold"


@dataclass(frozen=True)
class Scaffold(Method):
    """Puts :class:`ScaffoldLocal` around the local SGD, and sets :class:`ScaffoldServer` and a uniform mean.

    With one local step per round and all clients present it is ``FedAvg``.

    Args:
        lr: Server learning rate.

    Raises:
        ConfigError: if ``lr`` is not a finite number above 0.
    """

    concerns = ("heterogeneity",)

    lr: float = 1.0

    def __post_init__(self) -> None:
        ScaffoldServer(self.lr)

    def apply(self, plan: P) -> P:
        """The plan with SCAFFOLD's two halves.

        Raises:
            PlanError: if the recipe asks for another server step or a robust aggregator, which SCAFFOLD would replace.
        """
        if "plain-step" not in plan.server.traits().is_:
            raise PlanError(
                f"Scaffold brings its own server step, but the recipe asks for {plan.server}. Leave out server; set Scaffold.lr."
            )
        if not plan.aggregator.takes_sums():
            raise PlanError(
                f"Scaffold averages its updates uniformly, but the recipe asks for {plan.aggregator}. Leave out aggregator, or method."
            )
        if not isinstance(plan.local, GradientTrainer):
            raise PlanError(
                f"Scaffold corrects the gradients of a trainer, and {plan.local} takes none. Use local: {{SGD: {{momentum: 0}}}}."
            )
        return plan.with_parts(local=ScaffoldLocal(plan.local), server=ScaffoldServer(self.lr), aggregator=Mean(weights="uniform"))


@dataclass(frozen=True)
class ScaffoldLocal(WrappedTrainer):
    """The client's half: corrects each gradient by ``c - c_k``. While both are zero it is ``inner``.

    Args:
        inner: Plain SGD, without momentum; its steps are the gradients that ``c_k`` averages.
    """

    concerns = ("heterogeneity",)

    inner: GradientTrainer

    def traits(self) -> Traits:
        """Needs the client's memory, which holds ``c_k``."""
        return traits(needs=["stateful-clients", "all-parameters"], is_=[_HALF])

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Refuses an inner trainer whose steps are not gradients, and a plan without the server's half."""
        if "gradient-steps" not in self.inner.traits().is_:
            yield refuse(
                "local",
                f"SCAFFOLD reads a client's mean gradient from how far it moved, which holds for SGD without momentum, not for {self.inner}. "
                "Use local: {SGD: {momentum: 0}}.",
            )
        if _HALF not in plan.server.traits().is_:
            yield refuse("local", "ScaffoldLocal needs ScaffoldServer, which sends the mean control variate. Use method: {Scaffold: {}}.")

    def init(self, cohort: Cohort) -> None:
        """``c_k = 0`` for clients that remember none.

        Raises:
            MessageError: if the server did not send its own.
        """
        sent = {name: leaf for name, leaf in cohort.received.items() if name == CONTROL}
        Spec((CONTROL,), ((cohort.theta_kd.shape[1],),), (torch.float32,)).require(sent, "what the server sent for Scaffold")
        cohort.memory.setdefault(CONTROL, torch.zeros_like(cohort.theta_kd, dtype=torch.float32))
        self.inner.init(cohort)

    def step(self, cohort: Cohort, grad_kd: torch.Tensor, lr_k: torch.Tensor, step: int) -> None:
        """One corrected step of every client, in place."""
        grad_kd.add_(cohort.received[CONTROL]).sub_(cohort.memory[CONTROL])
        self.inner.step(cohort, grad_kd, lr_k, step)

    def leaves(self, trained: Spec, travelling: Spec) -> tuple[Leaf, ...]:
        """The control variate's change, beside what the inner trainer sends."""
        return (*self.inner.leaves(trained, travelling), Leaf(CONTROL, (trained.size,), group="control"))

    def finish(self, cohort: Cohort, lr_sum_k: torch.Tensor, steps_k: torch.Tensor) -> dict[str, torch.Tensor]:
        """``c_k+ - c_k``, which is remembered as ``c_k+``. A client that took no step keeps its ``c_k``."""
        lr_sum_k1 = lr_sum_k.reshape(-1, 1).to(torch.float32)
        moved_kd = (cohort.start_kd - cohort.theta_kd) / lr_sum_k1.where(lr_sum_k1 > 0, 1.0)
        change_kd = (moved_kd - cohort.received[CONTROL]).where(lr_sum_k1 > 0, 0.0)
        cohort.memory[CONTROL].add_(change_kd)
        return {**self.inner.finish(cohort, lr_sum_k, steps_k), CONTROL: change_kd}


@dataclass(frozen=True)
class ScaffoldServer(ServerOptimizer):
    """The server's half: ``x += lr delta`` and the mean control variate ``c``. Of the parameters alone it is ``FedAvg``.

    Args:
        lr: Server learning rate.

    Raises:
        ConfigError: if ``lr`` is not a finite number above 0.
    """

    concerns = ("heterogeneity",)

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"Scaffold.lr is {self.lr}; it must be a finite number above 0.")

    def traits(self) -> Traits:
        """``c`` stays the mean of all ``c_k`` only under a uniform mean."""
        return traits(needs=["uniform-weights", "weighted-sum"], is_=[_HALF])

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Refuses a plan without the client's half."""
        if _HALF not in plan.local.traits().is_:
            yield refuse(
                "server", "ScaffoldServer needs ScaffoldLocal, which sends the control variates' changes. Use method: {Scaffold: {}}."
            )

    def init(self, params: Tree) -> Tree:
        """``c = 0``."""
        return {CONTROL: torch.zeros(Spec.of(params).size)}

    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """The global step, and ``c += |S| / N mean(dc)``."""
        params, _ = FedAvg(self.lr).step(params, update, {}, ctx)
        if update.num_clients == 0:
            return params, state
        return params, {CONTROL: state[CONTROL] + update.num_clients / ctx.num_clients * update.payload[CONTROL]}

    def broadcast(self, params: Tree, state: Tree) -> Tree:
        """``c``."""
        return state

"""DP-SGD in each owner's house: a row of its data is hidden from everybody who sees its updates.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016::

    batch    each example joins with probability q = b / n, on its own
    g        = (sum over the batch of g_i min(1, C / |g_i|) + C z N(0, I)) / b
    step     = inner's, with g for its gradient

Covered here: whoever sees the owner's updates, the server and the final model among them, learns little more than without any one row. Numbers of
the work (losses, counts) do not leave. Not covered: what many rows of one person tell together; rows that stand twice; how many rows an owner has,
which the guarantee takes for known; evaluations, which are made on rows that are not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fedfm.core.errors import ConfigError, PrivacyError
from fedfm.core.leaves import Leaf
from fedfm.core.parts import Cohort, Finding, GradientTrainer, LocalTrainer, Objective, Plan, Traits, Work, refuse, traits, warn
from fedfm.core.privacy import Accountant, Guarantee, Release
from fedfm.core.task import Task
from fedfm.core.tree import Spec
from fedfm.privacy import calibrate, epsilon_of, require_numbers

# A round that an owner's budget was solved for must not be refused because of the last digit.
_SLACK = 1 + 1e-3


@dataclass(frozen=True)
class ExampleDP(LocalTrainer):
    """DP-SGD: batches by Poisson sampling, each example's gradient shortened to ``max_norm``, summed, and noise added before ``inner`` takes its step.

    Without noise, with a bound above every gradient and with all examples in each batch it is ``inner``, where examples have as many targets each. Each owner
    has a sampling rate, a noise and an epsilon of its own; its account is in its own house and ends its work when the budget is spent. No
    amplification by the sampling of owners is claimed. ``inner``'s own bound on gradients is not used.

    Args:
        inner: The trainer that takes the steps; its ``batch_size`` times ``accumulate`` is the expected batch.
        max_norm: Largest Euclidean norm of one example's gradient.
        delta: The chance that the guarantee fails, well below one over an owner's number of rows.
        epsilon: What each owner spends at most in all rounds. The noise is solved for it where none is given.
        noise_multiplier: Standard deviation of the noise in units of ``max_norm``, for all owners.
        accountant: ``pld``, or ``rdp``, which is faster and looser.
        simulated: Whether batches and noise come from the run's key: a run that can be repeated, and that protects nobody.
        rounds: How many rounds an owner's budget must last; ``None`` for those of the recipe.

    Raises:
        ConfigError: if a number is out of range, or neither ``epsilon`` nor ``noise_multiplier`` is given.
    """

    concerns = ("privacy",)

    inner: GradientTrainer
    max_norm: float
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    accountant: Accountant = "pld"
    simulated: bool = False
    rounds: int | None = None

    def __post_init__(self) -> None:
        require_numbers("ExampleDP", "max_norm", self.max_norm, self.delta, self.epsilon, self.noise_multiplier, self.accountant)
        if self.rounds is not None and self.rounds < 1:
            raise ConfigError(f"ExampleDP.rounds is {self.rounds}; it must be 1 or more.")

    def traits(self) -> Traits:
        """Promises privacy before anything leaves; the numbers of its work stay at home."""
        return traits(hides=["counts", "labels", "losses"], is_=["private", "silent", *(["simulated"] if self.simulated else [])])

    def solved(self, plan: Plan) -> LocalTrainer:
        """Knows how many rounds its budget must last."""
        return replace(self, rounds=self.rounds or max(plan.rounds, 1))

    def check(self, plan: Plan) -> Iterator[Finding]:
        """An example must be a row, and nothing may go round the noise."""
        task = plan.task
        if plan.local is not self:
            name = type(plan.local).__name__
            yield refuse(
                "local",
                f"ExampleDP stands inside {name}, which would ask for gradients that are neither clipped nor noisy. Put {name} inside ExampleDP.",
            )
        if isinstance(task, Task) and not task.example_is_row:
            yield refuse(
                "local",
                f"ExampleDP hides an example, and an example of {task!r} is a block of joined texts: one row may stand in several blocks, and a block in "
                "several rows, so hiding a block hides no row. Use CausalLM: {packed: false}.",
            )
        if self.noise_multiplier == 0:
            yield warn("local", "ExampleDP has noise_multiplier 0: gradients are clipped and nothing is promised; epsilon is infinite.")

    def guarantee(self, plan: Plan, num_clients: int | None = None, spent: Sequence[Release] | None = None) -> Guarantee:
        """The budget of each owner. Without one, what an owner spends depends on its number of rows, and its own account says it.

        Args:
            spent: What one owner has released.
        """
        if spent is not None:
            rates = sorted({release.rate for release in spent})
            rows = f"Poisson sampling of rows (of the owner that has spent most: rate {', '.join(f'{rate:.3g}' for rate in rates)}, {sum(release.steps for release in spent)} steps)"
            return self._named(epsilon_of(spent, self.delta, self.accountant, fine=False), rows)
        if self.epsilon is None and self.noise_multiplier is not None:
            # Nobody has a higher sampling rate than 1.
            steps = None if self.work.steps is None else self.work.steps * plan.rounds
            worst = (
                math.inf if steps is None else epsilon_of([Release(1.0, self.noise_multiplier, steps, "row")], self.delta, self.accountant)
            )
            return self._named(worst, "each row in a batch with a probability of its owner's own, at most 1")
        assert self.epsilon is not None
        size = (
            "all rows of an owner" if self.work.batch_size is None else f"{self.work.batch_size * self.work.accumulate} rows are expected"
        )
        return self._named(self.epsilon, f"Poisson sampling of rows in each owner's house ({size} in a batch)")

    def _named(self, epsilon: float, sampling: str) -> Guarantee:
        return Guarantee(
            epsilon=epsilon,
            delta=self.delta,
            unit="one row of an owner's training data",
            adjacency="a row added or removed",
            sampling=sampling,
            noise_by="each owner adds Gaussian noise to the sum of each step, at home, before anything leaves",
            accountant=self.accountant.upper(),
            simulated=self.simulated,
            assumes=(
                "owners' machines run this code",
                "how many rows an owner has is known to all",
                "no row stands twice",
                "evaluations and counts of test rows are not covered",
            ),
            budget=self.epsilon,
        )

    @property
    def work(self) -> Work:
        """``inner``'s, in Poisson batches."""
        return replace(self.inner.work, max_grad_norm=None, poisson=True)

    def lr_at(self, step: int, num_steps: int, round: int) -> float:
        """``inner``'s rate."""
        return self.inner.lr_at(step, num_steps, round)

    def init(self, cohort: Cohort) -> None:
        """``inner``'s slots."""
        self.inner.init(cohort)

    def descend(self, cohort: Cohort, objective: Objective, lr_k: torch.Tensor, step: int) -> None:
        """The clipped sum, noise, and ``inner``'s step."""
        work, std_k = self.work, [self.max_norm * self.noise_of(size) for size in objective.sizes]
        sum_kd = objective.noisy(objective.clipped_sum(cohort.theta_kd, self.max_norm), std_k)
        expected_k1 = torch.tensor([[max(work.size(size), 1)] for size in objective.sizes], device=sum_kd.device)
        self.inner.step(cohort, sum_kd.div_(expected_k1), lr_k, step)

    def leaves(self, trained: Spec, travelling: Spec) -> tuple[Leaf, ...]:
        """``inner``'s."""
        return self.inner.leaves(trained, travelling)

    def finish(self, cohort: Cohort, lr_sum_k: torch.Tensor, steps_k: torch.Tensor) -> dict[str, torch.Tensor]:
        """``inner``'s."""
        return self.inner.finish(cohort, lr_sum_k, steps_k)

    def noise_of(self, num_examples: int) -> float:
        """The noise multiplier of an owner with so many rows.

        Raises:
            PrivacyError: if no noise is enough for the budget.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        work = self.work
        if num_examples == 0:
            return 0.0
        assert self.epsilon is not None
        rate, steps = work.size(num_examples) / num_examples, work.num_steps(num_examples) * (self.rounds or 1)
        noise = calibrate(rate, steps, self.epsilon, self.delta, self.accountant, fine=False)
        if not math.isfinite(noise):
            raise PrivacyError(
                f"No noise keeps {steps} steps with {num_examples} rows within epsilon {self.epsilon} at delta {self.delta}."
            )
        return noise

    def release(self, num_examples: int) -> Release | None:
        """What a round's work of an owner with so many rows spends."""
        if num_examples == 0:
            return None
        work = self.work
        return Release(work.size(num_examples) / num_examples, self.noise_of(num_examples), work.num_steps(num_examples), "row")

    def require_affordable(self, spent: Sequence[Release], num_examples: int) -> None:
        """Refuses a round that would spend more than ``epsilon``."""
        release = self.release(num_examples)
        if self.epsilon is None or release is None:
            return
        alike = {(one.rate, one.noise) for one in spent} <= {(release.rate, release.noise)}
        steps = sum(one.steps for one in spent) + release.steps
        if alike and self.noise_multiplier is None and steps <= release.steps * (self.rounds or 1):
            return  # what the noise was solved for
        after = epsilon_of([*spent, release], self.delta, self.accountant, fine=False)
        if after > self.epsilon * _SLACK:
            before = epsilon_of(spent, self.delta, self.accountant, fine=False)
            raise PrivacyError(
                f"its privacy budget is epsilon {self.epsilon:g} at delta {self.delta:g}; {before:.4g} is spent, and this round would make it {after:.4g}"
            )

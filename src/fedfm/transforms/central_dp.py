"""Differential privacy of owners, with a server that is trusted: clip and noise in one part.

McMahan, Ramage, Talwar, Zhang, `Learning Differentially Private Recurrent Language Models <https://arxiv.org/abs/1710.06963>`_, 2017, with a fixed
denominator; Andrew, Thakkar, McMahan, Ramaswamy, `Differentially Private Learning with Adaptive Clipping <https://arxiv.org/abs/1905.03871>`_, 2019::

    client   x_k <- x_k min(1, C / |x_k|),  b_k = 1 if |x_k| <= C
    server   x   <- (sum_k x_k + C z' N(0, I)) / (q N)
             C   <- C exp(-clip_lr (b - quantile)),  b = 1/2 + (sum_k (b_k - 1/2) + s N(0, 1)) / (q N)

``z' = z`` with a fixed bound. With an adaptive one the count of short updates is released too, with ``s = max(q N / 20, z)``, and
``z'^-2 = z^-2 - (2 s)^-2`` keeps both together at the noise multiplier ``z``.

Covered here: whoever sees the model after each round learns little more than without any one owner. Not covered: the server, which sees each update;
the run's folder, which says who took part; evaluations and what owners tell of their counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fedfm.core import leaves as declare
from fedfm.core import tree
from fedfm.core.errors import ConfigError, MessageError, PrivacyError, RunError
from fedfm.core.leaves import Leaf
from fedfm.core.parts import Finding, Plan, RoundContext, Traits, Transform, Tree, Update, refuse, traits, warn
from fedfm.core.privacy import Accountant, Guarantee, Release
from fedfm.core.tree import Spec
from fedfm.privacy import calibrate, epsilon_of, require_numbers
from fedfm.transforms.clip import ClipByNorm

CLIP, BELOW = "clip", "dp.below"
_FEW = 100


@dataclass(frozen=True)
class CentralDP(Transform):
    """Shortens each owner's update, and adds noise to their sum on the server. Without noise it is a clip and a sum over a fixed number of owners.

    Needs Poisson sampling (or all owners in each round) and a uniform mean, of which it makes the sum over the number of owners that is expected. The
    clip is made on the client and again on the server, which sees each update. Numbers of the owners' work (losses, counts) do not leave.

    Args:
        clip: ``C``, the largest Euclidean norm of an update; with ``quantile`` that of the first round.
        delta: The chance that the guarantee fails, well below one over the number of owners.
        epsilon: What all rounds together may spend. The noise is solved for it where none is given.
        noise_multiplier: ``z``, standard deviation of the noise in units of ``C``.
        quantile: Share of updates that should be shorter than ``C``, which then adapts; ``None`` for a fixed ``C``.
        clip_lr: Rate of the logarithm of ``C``.
        accountant: ``pld``, or ``rdp``, which is faster and looser.
        simulated: Whether cohorts and noise come from the run's key: a run that can be repeated, and that protects nobody.

    Raises:
        ConfigError: if a number is out of range, or neither ``epsilon`` nor ``noise_multiplier`` is given.
    """

    concerns = ("privacy",)
    covers = frozenset({"delta", "told"})

    clip: float
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    quantile: float | None = None
    clip_lr: float = 0.2
    accountant: Accountant = "pld"
    simulated: bool = False

    def __post_init__(self) -> None:
        require_numbers("CentralDP", "clip", self.clip, self.delta, self.epsilon, self.noise_multiplier, self.accountant)
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ConfigError(f"CentralDP.quantile is {self.quantile}; it is a share between 0 and 1, such as 0.5.")
        if not (self.clip_lr > 0 and math.isfinite(self.clip_lr)):
            raise ConfigError(f"CentralDP.clip_lr is {self.clip_lr}; it must be a finite number above 0.")

    def traits(self) -> Traits:
        """Computes with the values; what an honest client sends needs no decoding. The numbers of a client's work stay at home."""
        is_ = ["linear", "bounds", "private", "server-noise", "silent", *(["simulated"] if self.simulated else [])]
        return traits(needs=["float-leaves", "uniform-weights", "weighted-sum"], hides=["counts", "labels", "losses"], is_=is_)

    def solved(self, plan: Plan) -> Transform:
        """With the noise that the budget asks for, where it can be named."""
        rate = plan.sampler.poisson_rate()
        if self.noise_multiplier is not None or self.epsilon is None or rate is None:
            return self
        return replace(self, noise_multiplier=calibrate(rate, max(plan.rounds, 1), self.epsilon, self.delta, self.accountant))

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Refuses what would make the sum longer than its bound, or its noise shorter."""
        place = next(name for name, part in plan.parts().items() if part is self)
        for i, other in enumerate(plan.transforms):
            if other is not self and f"transforms.{i}" > place and type(other).finish is not Transform.finish:
                yield refuse(
                    place,
                    f"{type(other).__name__} stands to the right of CentralDP and changes the aggregate before the noise is added, which is then too "
                    f"little. Put {type(other).__name__} before CentralDP.",
                )
        if "private" in plan.local.traits().is_:
            yield warn(
                place, "CentralDP hides owners and the trainer hides rows: each promise holds by itself, and the noise of both is paid."
            )
        if self.noise_multiplier == 0:
            yield warn(place, "CentralDP has noise_multiplier 0: updates are clipped and nothing is promised; epsilon is infinite.")

    def release(self, plan: Plan) -> Release | None:
        """One noisy sum."""
        rate = plan.sampler.poisson_rate()
        return None if rate is None or self.noise_multiplier is None else Release(rate, self.noise_multiplier)

    def caution(self, rate: float, num_clients: int | None) -> str:
        """What a small federation must know of its noise, or of its delta; nothing where both are fine."""
        if num_clients is None or not self.noise_multiplier:
            return ""
        if self.delta * num_clients >= 1:
            return (
                f"CentralDP has delta {self.delta:g}, and there are {num_clients} owners: to publish one of them, drawn by chance, would keep such a promise. "
                f"Set delta well below {1 / num_clients:.2g}."
            )
        if rate * num_clients >= _FEW:
            return ""
        expected = rate * num_clients
        share = self.noise_multiplier / expected
        return (
            f"CentralDP hides whole owners, and there are {num_clients}, of whom {expected:.3g} are expected in a round: the noise on each value of the mean is "
            f"{share:.2g} times the longest update of one owner. For few owners hide rows instead (local: ExampleDP)."
        )

    def guarantee(self, plan: Plan, num_clients: int | None = None, spent: Sequence[Release] | None = None) -> Guarantee:
        """What all rounds of the plan spend together.

        Raises:
            PrivacyError: if the sampling has no accountant, or the chance of a cohort that is too small is more than delta.
        """
        rate = plan.sampler.poisson_rate()
        if rate is None:
            raise PrivacyError(
                f"CentralDP needs to know that each owner joins a round on its own with one probability, and {plan.sampler!r} does not sample like that: what "
                "it would gain from sampling has no accountant here. Use sampler: {Poisson: {rate: 0.1}}, or All."
            )
        assert self.noise_multiplier is not None
        if not math.isfinite(self.noise_multiplier):
            raise PrivacyError(f"No noise keeps {plan.rounds} rounds within epsilon {self.epsilon} at delta {self.delta:g}.")
        chance = failing(plan, rate, num_clients)
        delta = self.delta - chance
        if delta <= 0:
            raise PrivacyError(
                f"A cohort has fewer than min_clients={plan.min_clients} owners with a chance of {chance:.2g} over {plan.rounds} rounds, and a round that fails tells "
                f"how many took part. That is more than delta={self.delta:g}. Lower min_clients, or raise the sampler's rate or delta."
            )
        releases = [Release(rate, self.noise_multiplier, plan.rounds)] if spent is None else spent
        return self._named(epsilon_of(releases, delta, self.accountant), rate, plan, num_clients)

    def _named(self, epsilon: float, rate: float, plan: Plan, num_clients: int | None) -> Guarantee:
        sampling = "all owners in each round" if rate == 1 else f"Poisson sampling of owners (rate {rate:g})"
        unsure = num_clients is None and plan.min_clients > 1 and rate != 1
        return Guarantee(
            epsilon=epsilon,
            delta=self.delta,
            unit="one owner with all its rows",
            adjacency="an owner added or removed",
            sampling=sampling,
            noise_by=f"the server adds Gaussian noise of {self.noise_multiplier:.4g} times the bound to the sum of each round",
            accountant=self.accountant.upper(),
            simulated=self.simulated,
            assumes=(
                "an honest server, which sees each update",
                "the run's folder stays with it, because it says who took part",
                "evaluations and what owners tell of their counts are not covered",
                *(["the chance of a cohort below min_clients is in delta once the number of owners is known"] if unsure else []),
            ),
            budget=self.epsilon,
            caution=self.caution(rate, num_clients),
        )

    def init(self, params: Tree) -> Tree:
        """The first bound, where it adapts."""
        return {} if self.quantile is None else {CLIP: torch.tensor(self.clip, dtype=torch.float64)}

    def broadcast(self, state: Tree) -> Tree:
        """The bound, where it adapts."""
        return state

    def leaves(self, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        """Whether the update was short, where the bound adapts."""
        return leaves if self.quantile is None else (*leaves, declare.number(BELOW, bound=1.0, kinds=()))

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Shortens the update where it is too long."""
        bound = self._bound(ctx)
        metrics = dict(update.metrics)
        if self.quantile is not None:
            deltas = {name: leaf for name, leaf in update.payload.items() if not tree.added(name, ctx.params)}
            metrics[BELOW] = float(tree.norm(deltas) <= bound)
        return replace(_shortened(update, bound, ctx), metrics=metrics), memory

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """Shortens it again on the server, whoever sent it."""
        return _shortened(update, self._bound(ctx), ctx)

    def finish(self, aggregate: Update, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The noisy sum over the number of owners that is expected. What it spends is written down before the noise is drawn."""
        if ctx.secret is None or ctx.rate is None or self.noise_multiplier is None:
            raise RunError("CentralDP was asked for noise outside of a round that has coins, a sampling rate and a noise multiplier.")
        if ctx.spent is not None:
            ctx.spent.add(Release(ctx.rate, self.noise_multiplier).name, 1)
        expected, bound = ctx.rate * ctx.num_clients, self._bound(ctx)
        count_noise = max(expected / 20, self.noise_multiplier)
        noise = self.noise_multiplier
        if self.quantile is not None and noise:
            noise = (noise**-2 - (2 * count_noise) ** -2) ** -0.5
        stream = ctx.secret.stream("noise")

        def noisy(leaf: torch.Tensor) -> torch.Tensor:
            total = leaf.double() * aggregate.num_clients
            return (stream.noisy(total, noise * bound) / expected).to(leaf.dtype)

        payload = {name: leaf if tree.added(name, ctx.params) else noisy(leaf) for name, leaf in aggregate.payload.items()}
        if self.quantile is None:
            return aggregate.with_payload(payload), state
        below = aggregate.metrics.get(BELOW, 0.0) - aggregate.num_clients / 2
        share = 0.5 + float(stream.noisy(torch.tensor(below), count_noise if noise else 0.0)) / expected
        after = bound * math.exp(-self.clip_lr * (min(max(share, 0.0), 1.0) - self.quantile))
        metrics = {name: value for name, value in aggregate.metrics.items() if name != BELOW}
        return replace(aggregate, payload=payload, metrics=metrics), {CLIP: torch.tensor(after, dtype=torch.float64)}

    def _bound(self, ctx: RoundContext) -> float:
        """``C`` of this round, as the server sent it.

        Raises:
            MessageError: if it sent none, or none that bounds.
        """
        if self.quantile is None:
            return self.clip
        Spec((CLIP,), ((),), (torch.float64,)).require(ctx.received, "what the server sent for CentralDP")
        bound = float(ctx.received[CLIP])
        if not bound > 0:
            raise MessageError(f"the server sent the bound {bound} for CentralDP; it is above 0.")
        return bound


def _shortened(update: Update, bound: float, ctx: RoundContext) -> Update:
    return ClipByNorm(bound).encode(update, {}, ctx)[0]


def failing(plan: Plan, rate: float, num_clients: int | None) -> float:
    """The chance that a round of the plan has fewer owners than it needs, over all rounds; 0 where nothing is needed, or nobody knows how many there are."""
    needed = max(plan.min_clients, plan.aggregator.min_updates())
    if num_clients is None or needed <= 1 or rate == 1:
        return 0.0

    def fewer(n: int) -> float:
        return math.fsum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(min(needed, n + 1)))

    # With one owner less, which is the neighbour, the chance is higher.
    return min(1.0, plan.rounds * fewer(max(num_clients - 1, 0)))

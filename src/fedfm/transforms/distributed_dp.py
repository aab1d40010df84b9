"""Differential privacy of owners without a trusted server: each client adds its share of the noise, and the server sees the secure sum alone.

Agarwal, Kairouz, Liu, `The Skellam Mechanism for Differentially Private Federated Learning <https://arxiv.org/abs/2110.04995>`_, 2021::

    client   x_k <- x_k min(1, C / |x_k|);  n_k = floor(x_k / g + u) + Skellam((z D)^2 / m);  sends g n_k

with ``g`` a power of two, ``D = C / g + sqrt(d)`` the longest that a rounded update can be, and ``m`` the honest clients whose noise is counted on. Skellam noise
adds up: ``m`` survivors or more have noise of at least ``z D``, whoever dropped out.

What is sent is declared to lie on the grid of ``g``. A channel of secure sums carries it exactly where its own unit, a power of two too, is as fine, where clients
count alike, and where its reach holds an update with its noise. Otherwise the plan is refused, and each client refuses.

Covered here: the server that sees the sum, and whoever sees the model. Not covered: what fewer than ``m`` honest survivors would show, which is why no such sum may be
opened; who took part, which is known to all; evaluations and what owners tell of their counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fedfm.core import tree
from fedfm.core.errors import ConfigError, PrivacyError, RunError
from fedfm.core.leaves import Leaf
from fedfm.core.parts import Finding, Plan, RoundContext, Traits, Transform, Tree, Update, refuse, traits, warn
from fedfm.core.privacy import Guarantee, Release
from fedfm.privacy import calibrate_skellam, epsilon_of, require_numbers
from fedfm.privacy.skellam import SCALE, draw
from fedfm.transforms.clip import ClipByNorm

# Standard deviations of noise that a channel must hold beside an update.
_TAIL = 10
# Integers that float32 holds exactly.
_EXACT = 2.0**24


@dataclass(frozen=True)
class DistributedDP(Transform):
    """Shortens each owner's update, puts it on a grid and adds its share of Skellam noise at home, for a channel that shows sums alone.

    The noise of ``min_clients`` survivors, without those that the channel takes for corrupt, is enough. Nothing is claimed for sampling. With
    ``noise_multiplier: 0`` it is a clip and an unbiased rounding.

    Args:
        clip: ``C``, the largest Euclidean norm of an update.
        delta: The chance that the guarantee fails, well below one over the number of owners.
        epsilon: What all rounds together may spend. The noise is solved for it where none is given.
        noise_multiplier: ``z``, standard deviation of the noise of the sum in units of the longest update.
        sharers: ``m``; ``None`` takes the recipe's ``min_clients`` without the corrupt ones.
        simulated: Whether noise comes from the run's key: a run that can be repeated, and that protects nobody.

    Raises:
        ConfigError: if a number is out of range, or neither ``epsilon`` nor ``noise_multiplier`` is given.
    """

    concerns = ("privacy",)
    covers = frozenset({"delta", "told"})

    clip: float
    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    sharers: int | None = None
    simulated: bool = False

    def __post_init__(self) -> None:
        require_numbers("DistributedDP", "clip", self.clip, self.delta, self.epsilon, self.noise_multiplier, "rdp")
        if self.sharers is not None and self.sharers < 1:
            raise ConfigError(f"DistributedDP.sharers is {self.sharers}; it must be 1 or more.")

    def traits(self) -> Traits:
        """Computes with the values; decodes nothing. A single answer holds a share of the noise only, so the promise is that of the sum."""
        is_ = ["linear", "private", "server-noise", "silent", *(["simulated"] if self.simulated else [])]
        return traits(needs=["float-leaves", "uniform-weights", "weighted-sum"], hides=["counts", "labels", "losses"], is_=is_)

    def solved(self, plan: Plan) -> Transform:
        """With the noise that the budget asks for, and the clients whose noise is counted on."""
        noise = self.noise_multiplier
        if noise is None and self.epsilon is not None:
            noise = calibrate_skellam(max(plan.rounds, 1), self.epsilon, self.delta)
        return replace(self, noise_multiplier=noise, sharers=self.sharers or honest(plan))

    def check(self, plan: Plan) -> Iterator[Finding]:
        """The sum alone is covered, on its grid."""
        place = next(name for name, part in plan.parts().items() if part is self)
        channel, known = plan.channel, honest(plan)
        sharers = self.sharers or known
        if plan.transforms[-1] is not self:
            yield refuse(
                place,
                "DistributedDP must be the last transform: what another does to a share of the noise leaves no share of it. Put it at the end.",
            )
        if "single-updates" not in channel.traits().hides and sharers > 1:
            yield refuse(
                place,
                f"DistributedDP adds 1/{sharers} of the noise to each answer, and {type(channel).__name__} shows each answer by itself. "
                "Use channel: SecureAggregation, or CentralDP where the server is trusted.",
            )
        if sharers > known:
            yield refuse(
                place,
                f"DistributedDP counts on the noise of {sharers} clients; a round counts with {plan.min_clients}, of whom {known} are taken for honest. "
                "Raise min_clients, or lower sharers.",
            )
        needed = self.clip * (1 + 1 / SCALE) * (1 + _TAIL * (self.noise_multiplier or 0.0) / math.sqrt(sharers))
        if channel.largest() < needed:
            yield refuse(
                place,
                f"an update with its noise reaches {needed:.3g}, and {type(channel).__name__} cuts values to {channel.largest():g}. "
                # Two digits of this are not below what is needed.
                f"Set its reach to {1.05 * needed:.2g} or more.",
            )
        if self.noise_multiplier == 0:
            yield warn(place, "DistributedDP has noise_multiplier 0: nothing is promised; epsilon is infinite.")

    def leaves(self, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        """The same, of which each delta lies on the grid."""
        sizes = {leaf.name: leaf.size for leaf in leaves if leaf.group == "delta" and leaf.dtype.is_floating_point}
        grid = grid_of(self.clip, sum(sizes.values()))
        return tuple(replace(leaf, grid=grid) if leaf.name in sizes else leaf for leaf in leaves)

    def release(self, plan: Plan) -> Release | None:
        """One noisy sum, with the noise of the fewest survivors."""
        return None if self.noise_multiplier is None else self._release()

    def _release(self) -> Release:
        assert self.noise_multiplier is not None
        return Release(1.0, self.noise_multiplier, kind="skellam")

    def guarantee(self, plan: Plan, num_clients: int | None = None, spent: Sequence[Release] | None = None) -> Guarantee:
        """What all rounds of the plan spend together.

        Raises:
            PrivacyError: if no noise is enough, or sums may hold fewer honest owners than are counted on.
        """
        noise = self.noise_multiplier
        if noise is None or not math.isfinite(noise):
            raise PrivacyError(f"No noise keeps {plan.rounds} rounds within epsilon {self.epsilon} at delta {self.delta:g}.")
        if num_clients is not None:
            self._require_honest(plan, plan.sampler.largest_cohort(num_clients))
        releases = [replace(self._release(), steps=plan.rounds)] if spent is None else spent
        return Guarantee(
            epsilon=epsilon_of(releases, self.delta),
            delta=self.delta,
            unit="one owner with all its rows",
            adjacency="an owner's updates replaced by zeros",
            sampling="nothing is claimed for sampling",
            noise_by=f"each owner adds 1/{self.sharers} of the Skellam noise of {noise:.4g} times the longest update, and the server sees their sum",
            accountant="RDP",
            simulated=self.simulated,
            assumes=(
                f"{self.sharers} or more honest owners are in each sum",
                "who takes part is known to all",
                "evaluations and what owners tell of their counts are not covered",
            ),
            budget=self.epsilon,
        )

    def _require_honest(self, plan: Plan, cohort: int) -> None:
        known = plan.channel.fewest_honest(plan.min_clients, cohort)
        if (self.sharers or 1) > known:
            raise PrivacyError(
                f"DistributedDP counts on the noise of {self.sharers} owners, and a sum of up to {cohort} may hold as few as {known} honest ones. "
                + (f"Set sharers to {known} or less." if known > 0 else "Raise min_clients, or let the channel take fewer for corrupt.")
            )

    def begin(self, ctx: RoundContext) -> None:
        """Writes down what the answers of this round will have spent."""
        if ctx.spent is not None:
            ctx.spent.add(self._release().name, 1)

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The update on its grid, with its share of the noise; what it spends is in the client's own account first."""
        if ctx.secret is None or self.noise_multiplier is None:
            raise RunError("DistributedDP was asked for noise outside of a round that has coins and a noise multiplier.")
        short = ClipByNorm(self.clip).encode(update, {}, ctx)[0].payload
        names = [name for name, leaf in short.items() if not tree.added(name, ctx.params) and leaf.is_floating_point()]
        size = sum(short[name].numel() for name in names)
        grid = grid_of(self.clip, size)
        longest = self.clip / grid + math.sqrt(size)
        variance = (self.noise_multiplier * longest) ** 2 / (self.sharers or 1)
        largest = longest + _TAIL * math.sqrt(variance)
        if largest >= _EXACT:
            raise RunError(f"DistributedDP needs integers up to {largest:.3g}, more than float32 holds exactly. Lower the noise.")
        if ctx.spent is not None:
            ctx.spent.add(self._release().name, 1)
        rounding, noise = ctx.secret.stream("rounding"), ctx.secret.stream("noise")
        payload = dict(short)
        for name in names:
            up = torch.from_numpy(rounding.uniform(short[name].numel())).view(short[name].shape)
            whole = (short[name].detach().cpu().double() / grid + up).floor()
            if variance:
                whole += torch.from_numpy(draw(noise, whole.numel(), variance)).view(whole.shape)
            payload[name] = (whole * grid).to(short[name].dtype)
        return update.with_payload(payload), memory


def grid_of(clip: float, size: int) -> float:
    """``g``: a power of two that divides the bound into ``SCALE sqrt(size)`` to twice as many integers."""
    return 2.0 ** math.floor(math.log2(clip / (SCALE * math.sqrt(max(size, 1)))))


def honest(plan: Plan) -> int:
    """The fewest honest clients in a round that counts: ``min_clients`` without those that the channel takes for corrupt."""
    return max(1, plan.channel.fewest_honest(plan.min_clients))

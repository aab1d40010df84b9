"""Bounds on the norm and the weight of each update: fixed numbers at first, then multiples of the median of earlier rounds.

With the median of a round the lower one of the middle two, and ``median_r`` over the rounds that are remembered::

    norm_k   <= min(norm, norm_factor * median_r(median_k(norm_k)))
    weight_k <= min(weight, weight_factor * median_r(median_k(weight_k)))

All of it is known before a round begins, so an update is judged by itself and sums still stream. With both factors ``None`` the bounds stay fixed.

An update over a bound is refused, and neither shortened nor counted with less. A liar that is shortened still points where it wants, and does so in every
round, unseen; a failure is in the record, with its numbers.

Covered here: one update that decides a round by its length or by its weight, while fewer than half of the clients of each round lie. Not covered: lies
within the bounds; a first round whose liars stay within the fixed numbers; channels that show sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median_low

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.limits import Limit, Limits, Size
from fedfm.core.parts import Bounds, Finding, Plan, note, promise, refuse
from fedfm.core.tree import Tree

_NORM, _WEIGHT = "norm.", "weight"


@dataclass(frozen=True)
class MedianBounds(Bounds):
    """The server counts no update whose norm or weight is many times the median of earlier rounds. The default with the engine ``Nats``.

    Args:
        norm: Largest Euclidean norm of an update's deltas, and of what else it holds by group; it alone holds until a round was counted.
        weight: Largest weight, in training examples. Not looked at where all clients count alike.
        norm_factor: Largest norm as a multiple of the median of earlier rounds; ``None`` for no such bound.
        weight_factor: Largest weight as a multiple of the median of earlier rounds, and before the first round of what owners say they have; ``None``
            for no such bound. Raise it where one owner honestly has so many times more examples than another.
        memory: How many earlier rounds are remembered.

    Raises:
        ConfigError: if a number is out of range.
    """

    concerns = ("robustness",)

    norm: float = 1000.0
    weight: float = 10_000_000.0
    norm_factor: float | None = 10.0
    weight_factor: float | None = 100.0
    memory: int = 16

    def __post_init__(self) -> None:
        for name in ("norm", "weight"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"MedianBounds.{name} is {value}; it must be a finite number above 0.")
        for name in ("norm_factor", "weight_factor"):
            factor = getattr(self, name)
            if factor is not None and not (factor > 1 and math.isfinite(factor)):
                raise ConfigError(f"MedianBounds.{name} is {factor}; it must be a finite number above 1, or null for no such bound.")
        if not 1 <= self.memory <= 1000:
            raise ConfigError(f"MedianBounds.memory is {self.memory} rounds; it must be from 1 to 1000.")

    def init(self, sizes: Iterable[int] = ()) -> Tree:
        """The median of what owners say they have, as an earlier round's weights."""
        return self._remembered({}, _WEIGHT, [float(size) for size in sizes])

    def limits(self, state: Tree, uniform: bool) -> Limits:
        """The bounds of a round, from the medians of those before it."""
        groups = {
            name.removeprefix(_NORM): _limit("norm", self.norm, self.norm_factor, medians)
            for name, medians in state.items()
            if name.startswith(_NORM)
        }
        weight = _limit("weight", self.weight, self.weight_factor, state.get(_WEIGHT))
        return Limits(_limit("norm", self.norm, None, None), groups, None if uniform else weight)

    def learn(self, state: Tree, sizes: Iterable[Size]) -> Tree:
        """The state with the medians of one more round."""
        values: dict[str, list[float]] = {}
        for size in sizes:
            for group, norm in size.norms.items():
                values.setdefault(_NORM + group, []).append(norm)
            if size.weight is not None:
                values.setdefault(_WEIGHT, []).append(size.weight)
        for name in sorted(values):
            state = self._remembered(state, name, values[name])
        return state

    def check(self, plan: Plan) -> Iterator[Finding]:
        """What the bounds guarantee, and where they cannot act."""
        if "single-updates" in plan.channel.traits().hides:
            yield note(
                "bounds",
                f"{type(plan.channel).__name__} shows sums alone, so the server can measure no single update: the ring of the sum bounds each value, and "
                "the norm and the weight of an update are its client's word.",
            )
            return
        noisy = [type(part).__name__ for part in plan.transforms if "server-noise" in part.traits().is_]
        if noisy and (self.norm_factor is not None or self.weight_factor is not None):
            yield refuse(
                "bounds",
                f"the medians of earlier rounds decide here which updates count, and the noise of {noisy[0]} does not cover what they tell of an owner. "
                "Set bounds.norm_factor and bounds.weight_factor to null: fixed bounds look at one update alone.",
            )
            return
        norm = f"a norm above {self.norm:g}" + (
            "" if self.norm_factor is None else f" or {self.norm_factor:g} times the median of earlier rounds"
        )
        weight = f"a weight above {self.weight:g}" + (
            "" if self.weight_factor is None else f" or {self.weight_factor:g} times the median of earlier rounds"
        )
        what = norm if plan.aggregator.uniform() else f"{norm}, or with {weight},"
        yield promise(
            "bounds",
            f"the server itself refuses an update with {what} and names its client, while fewer than half of the clients of each round lie. "
            "Lies within the bounds count.",
        )

    def _remembered(self, state: Tree, name: str, values: list[float]) -> Tree:
        """The state with the median of some values. A round in which most stood still is no measure of the next."""
        middle = median_low(values) if values else 0.0
        if not middle > 0:
            return state
        # float32 holds a median to seven digits, which leaves no room for the last bit of a sum that was added up in other pieces.
        before = state.get(name, torch.zeros(0))
        return {**state, name: torch.cat([before, torch.tensor([middle], dtype=torch.float32)])[-self.memory :]}


def _limit(name: str, fixed: float, factor: float | None, medians_r: torch.Tensor | None) -> Limit:
    if factor is not None and medians_r is not None:
        middle, rounds = median_low(medians_r.tolist()), len(medians_r)
        if factor * middle < fixed:
            return Limit(
                factor * middle,
                f"bounds.{name}_factor: {factor:g} times {middle:.6g}, the median of {rounds} round{'' if rounds == 1 else 's'}",
            )
    return Limit(fixed, f"bounds.{name}")

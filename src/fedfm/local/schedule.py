"""The schedule of the learning rate and the checks of numbers that local trainers share."""

from __future__ import annotations

import math
from typing import Literal

from fedfm.core.errors import ConfigError
from fedfm.core.parts import Work

Schedule = Literal["constant", "linear", "cosine"]


def rate(schedule: Schedule, lr: float, warmup: int, step: int, num_steps: int, decay: float, round: int) -> float:
    """The learning rate of a local step.

    ``constant``: ``lr``. ``linear``: falls to 0 over the round's steps. ``cosine``: half a cosine to 0.
    ``warmup`` steps rise linearly first. ``decay ** (round - 1)`` multiplies all of it.
    """
    lr *= decay ** max(round - 1, 0)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    left = (num_steps - step) / max(num_steps - warmup, 1)
    if schedule == "linear":
        return lr * left
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return lr


def require(name: str, lr: float, work: Work, schedule: str, warmup: int, decay: float) -> None:
    """Checks the numbers that every trainer has.

    Raises:
        ConfigError: naming the one that is out of range.
    """
    if not (lr >= 0 and math.isfinite(lr)):
        raise ConfigError(f"{name}.lr is {lr}; a learning rate is 0 or more.")
    if (work.steps is None) == (work.epochs is None):
        raise ConfigError(f"{name} needs steps or epochs, one of the two; got steps={work.steps}, epochs={work.epochs}.")
    for field, value in (("steps", work.steps), ("epochs", work.epochs), ("batch_size", work.batch_size), ("accumulate", work.accumulate)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}.{field} is {value}; it must be 1 or more.")
    if work.batch_size is None and work.accumulate != 1:
        raise ConfigError(
            f"{name}.accumulate is {work.accumulate}, but batch_size null takes all examples at once; there is nothing to accumulate."
        )
    if work.max_grad_norm is not None and not work.max_grad_norm > 0:
        raise ConfigError(f"{name}.max_grad_norm is {work.max_grad_norm}; a bound is more than 0, or null for none.")
    if schedule not in ("constant", "linear", "cosine"):
        raise ConfigError(f"{name}.schedule is {schedule!r}; it must be constant, linear or cosine.")
    if warmup < 0:
        raise ConfigError(f"{name}.warmup is {warmup}; it must be 0 or more steps.")
    if not 0 < decay <= 1:
        raise ConfigError(f"{name}.decay is {decay}; a factor per round is more than 0 and at most 1.")

"""Epsilon of releases, and the noise that an epsilon asks for.

The default accountant adds up privacy loss distributions (PLD):
Koskela, Jälkö, Honkela, `Computing Tight Differential Privacy Guarantees Using FFT <https://arxiv.org/abs/1906.03049>`_, 2020;
Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, `Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions
<https://arxiv.org/abs/2207.04380>`_, 2022. Its grid is 1e-4 wide and rounds towards more loss, so the epsilon is an upper bound. ``rdp`` adds up Renyi divergences,
which is looser: Mironov, Talwar, Zhang, `Renyi Differential Privacy of the Sampled Gaussian Mechanism <https://arxiv.org/abs/1908.10530>`_, 2019.

Neighbours differ in one unit that is added or removed. What cannot be named is refused: releases of different units, kinds of noise that no accountant
here composes, rates and deltas that are none.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from fedfm.core.errors import ConfigError, MissingExtra, PrivacyError
from fedfm.core.privacy import Accountant, Release
from fedfm.privacy import skellam

_FINE, _COARSE = 1e-4, 1e-3  # of privacy losses
_TOLERANCE = 1e-4  # of the logarithms of noise and epsilon
_TRIES = 20
_MOST, _LEAST = 1e6, 0.05  # noise multipliers that are looked at


def epsilon_of(releases: Sequence[Release], delta: float, accountant: Accountant = "pld", fine: bool = True) -> float:
    """Epsilon of all releases together; 0 where there is none, infinity without noise.

    Args:
        delta: Between 0 and 1.
        accountant: ``pld``, or ``rdp``, which is faster and looser.
        fine: ``False`` takes a tenth of the time on a coarser grid, whose epsilon is a bound too, up to 4 % higher where it is small.

    Raises:
        PrivacyError: if no such epsilon can be named.
        MissingExtra: if ``dp-accounting`` is not installed.

    Example:
        >>> round(epsilon_of([Release(rate=1.0, noise=1.0)], delta=1e-5), 3)
        4.377
    """
    require_delta(delta)
    counted: Counter[Release] = Counter()
    for release in releases:
        _require(release)
        counted[Release(release.rate, release.noise, 1, release.unit, release.kind)] += release.steps
    units, kinds = {one.unit for one in counted}, {one.kind for one in counted}
    if len(units) > 1:
        raise PrivacyError(
            "One release hides an owner and another hides a row. Their epsilons speak of different things and have no sum; account for each by itself."
        )
    if len(kinds) > 1:
        raise PrivacyError(
            "Some releases have Gaussian noise and others discrete noise. No accountant here composes the two; account for each by itself."
        )
    steps = {one: number for one, number in counted.items() if number}
    if not steps:
        return 0.0
    if any(one.noise == 0 for one in steps):
        return math.inf
    if "skellam" in kinds:
        if any(one.rate != 1 for one in steps):
            raise PrivacyError("What Skellam noise gains from sampling has no accountant here. Account for it at a rate of 1.")
        return skellam.epsilon_of_rdp([(one.noise, number) for one, number in steps.items()], delta)
    return _epsilon(
        tuple(sorted((one.rate, one.noise, number) for one, number in steps.items())), delta, accountant, _FINE if fine else _COARSE
    )


def deltas_of(release: Release, epsilons: Sequence[float]) -> list[float]:
    """The delta of each epsilon, of Gaussian releases; an upper bound by PLD.

    Raises:
        PrivacyError: if a number is out of range.
        MissingExtra: if ``dp-accounting`` is not installed.
    """
    _require(release)
    dp, pld, _ = _library()
    how = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=_COARSE)
    event = dp.GaussianDpEvent(release.noise)
    how.compose(dp.SelfComposedDpEvent(event if release.rate == 1 else dp.PoissonSampledDpEvent(release.rate, event), release.steps))
    return [float(how.get_delta(epsilon)) for epsilon in epsilons]


def calibrate(rate: float, steps: int, epsilon: float, delta: float, accountant: Accountant = "pld", fine: bool = True) -> float:
    """The smallest Gaussian noise multiplier whose releases stay within epsilon, to four digits; infinity where none is enough.

    Args:
        rate: Of Poisson sampling.
        steps: How many releases.
        fine: As for :func:`epsilon_of`.

    Raises:
        PrivacyError: if a number is out of range.
        MissingExtra: if ``dp-accounting`` is not installed.

    Example:
        >>> round(calibrate(rate=1.0, steps=1, epsilon=1.0, delta=1e-5), 2)
        3.73
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise PrivacyError(f"epsilon is {epsilon}; it must be a finite number above 0.")
    require_delta(delta)
    _require(Release(rate, 1.0, steps))
    return 0.0 if steps == 0 else _calibrate(rate, steps, epsilon, delta, accountant, fine)


def calibrate_skellam(steps: int, epsilon: float, delta: float) -> float:
    """The smallest multiplier of Skellam noise whose releases stay within epsilon; infinity where none is enough.

    Raises:
        PrivacyError: if a number is out of range.
        MissingExtra: if ``dp-accounting`` is not installed.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise PrivacyError(f"epsilon is {epsilon}; it must be a finite number above 0.")
    require_delta(delta)
    return _bisected(lambda noise: skellam.epsilon_of_rdp([(noise, steps)], delta) <= epsilon, _TOLERANCE)


def require_delta(delta: float) -> None:
    """Refuses a delta that is no probability of failure.

    Raises:
        PrivacyError: with the value.
    """
    if not 0 < delta < 1:
        raise PrivacyError(
            f"delta is {delta}; it is the chance that the guarantee fails, above 0 and below 1, and well below one over the number of units."
        )


def require_numbers(
    name: str, bound_name: str, bound: float, delta: float, epsilon: float | None, noise: float | None, accountant: str
) -> None:
    """Refuses numbers with which a promise cannot be kept.

    Raises:
        ConfigError: naming the field.
    """
    if not (bound > 0 and math.isfinite(bound)):
        raise ConfigError(f"{name}.{bound_name} is {bound}; it must be a finite number above 0.")
    require_delta(delta)
    if epsilon is None and noise is None:
        raise ConfigError(f"{name} needs epsilon, for which the noise is solved, or noise_multiplier. Give one of the two.")
    if epsilon is not None and not (epsilon > 0 and math.isfinite(epsilon)):
        raise ConfigError(f"{name}.epsilon is {epsilon}; it must be a finite number above 0.")
    if noise is not None and not (noise >= 0 and math.isfinite(noise)):
        raise ConfigError(f"{name}.noise_multiplier is {noise}; it must be a finite number of 0 or more.")
    if accountant not in ("pld", "rdp"):
        raise ConfigError(f"{name}.accountant is {accountant!r}; it must be pld or rdp.")


def _require(release: Release) -> None:
    if not 0 < release.rate <= 1:
        raise PrivacyError(f"The sampling rate is {release.rate}; it is a probability above 0 and at most 1.")
    if not (release.noise >= 0 and math.isfinite(release.noise)):
        raise PrivacyError(f"The noise multiplier is {release.noise}; it must be a finite number of 0 or more.")
    if release.steps < 0:
        raise PrivacyError(f"{release.steps} releases cannot be; their number is 0 or more.")


@lru_cache(maxsize=4096)
def _calibrate(rate: float, steps: int, epsilon: float, delta: float, accountant: Accountant, fine: bool) -> float:
    """The secant method from the answer of the fast accountant, first on a coarse grid; both are upper bounds, so each answer is enough."""
    noise = _bisected(
        lambda noise: _epsilon(((rate, noise, steps),), delta, "rdp", _FINE) <= epsilon, _TOLERANCE if accountant == "rdp" else 0.02
    )
    if accountant == "rdp" or not math.isfinite(noise):
        return noise
    for grid in (_COARSE, _FINE) if fine else (_COARSE,):
        noise = _secant(lambda x, grid=grid: math.log(max(_epsilon(((rate, x, steps),), delta, "pld", grid), 1e-12) / epsilon), noise)  # type: ignore[misc]
    return noise


def _secant(excess_of: Callable[[float], float], noise: float) -> float:
    """The noise of which the excess is 0 or just below.

    Args:
        excess_of: Logarithm of epsilon over what it may be.
        noise: Where to begin.
    """
    enough, before = math.inf, (math.log(noise) + 0.01, excess_of(noise * math.exp(0.01)))
    for _ in range(_TRIES):
        excess = excess_of(noise)
        if excess <= 0:
            enough = min(enough, noise)
            if excess > -_TOLERANCE:
                break
        now = math.log(noise), excess
        slope = (now[1] - before[1]) / (now[0] - before[0])
        # A little more noise than the root, so that the answer is on the safe side.
        step = -(now[1] + 0.3 * _TOLERANCE) / slope if slope < 0 else 0.1 * math.copysign(1, excess)
        before, noise = now, math.exp(now[0] + max(-0.7, min(0.7, step)))
    return enough


def _bisected(enough: Callable[[float], bool], tolerance: float) -> float:
    """The smallest noise that is enough, from above; infinity where none is."""
    low, high = _LEAST, 1.0
    while not enough(high):
        low, high = high, 2 * high
        if high > _MOST:
            return math.inf
    while math.log(high / low) > tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _epsilon(steps: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant, grid: float) -> float:
    dp, pld, rdp = _library()
    if accountant == "pld" and all(rate == 1 for rate, _, _ in steps):
        # Gaussian releases of everybody are one such release with the sum of their precisions, whose epsilon has a closed form.
        return float(dp.get_epsilon_gaussian(math.fsum(number / noise**2 for _, noise, number in steps) ** -0.5, delta))
    adjacency = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    how = pld.PLDAccountant(adjacency, value_discretization_interval=grid) if accountant == "pld" else rdp.RdpAccountant()
    with _hushed():
        for rate, noise, number in steps:
            event = dp.GaussianDpEvent(noise)
            how.compose(dp.SelfComposedDpEvent(event if rate == 1 else dp.PoissonSampledDpEvent(rate, event), number))
        return float(how.get_epsilon(delta))


@contextmanager
def _hushed() -> Iterator[None]:
    """Orders of a divergence that do not converge are left out, which makes the bound looser and no less a bound; nobody need read of each."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _library() -> tuple[Any, Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise MissingExtra("dp-accounting", "privacy", "To compute an epsilon") from error
    return dp_accounting, pld, rdp

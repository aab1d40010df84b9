"""What guesses about canaries prove of an epsilon, with one run.

Each canary is in the run or not by a fair coin that the mechanism does not see. Afterwards somebody guesses the coins. Too many right guesses are
improbable under a small epsilon, so they prove a larger one.

``one_run_bound``: Steinke, Nasr, Jagielski, `Privacy Auditing with One (1) Training Run <https://arxiv.org/abs/2305.08846>`_, 2023. It holds for every mechanism::

    P[correct >= c] <= P[Bin(r, e^eps / (1 + e^eps)) >= c] + 2 m delta max_i (P[Bin(r, .) >= c - i] - P[Bin(r, .) >= c]) / i

``fdp_bound``: Mahloujifar, Melis, Chaudhuri, `Auditing f-Differential Privacy in One Run <https://arxiv.org/abs/2410.22235>`_, 2024, algorithm 3, with the trade-off curve of
the Gaussian mechanism that has this epsilon at this delta; ``release_bound`` is the same with the curve of the releases that are audited, sampling included. They prove
more, because they know more than one pair of epsilon and delta of the mechanism.

All are lower bounds that hold with probability ``1 - significance``. With no guess they are 0. The number of guesses must be chosen before the scores are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fedfm.core.errors import ConfigError, MissingExtra, PrivacyError
from fedfm.core.privacy import Release
from fedfm.privacy.accounting import deltas_of, epsilon_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGEST = 200.0  # epsilons that are looked for; e^200 times more likely is as good as certain
_PRECISION = 1e-7
_LINES = 64  # of a trade-off curve
_STEP, _FAR = 1.5, 8.0  # noises that are looked at, in units of what is claimed
_SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03)  # guesses among all canaries that are tried
MOST = 5000  # canaries that are tried
_FEWEST, _GROWTH = 40, 1.15
_SAMPLES = 10_000  # scores of each kind that a power is computed from


def one_run_p_value(num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """The largest probability with which a mechanism with this guarantee lets so many guesses be right."""
    stats, special = _scipy("stats"), _scipy("special")
    _require_counts(num_canaries, num_guesses, num_correct)
    right = float(special.expit(epsilon))
    tail = float(stats.binom.sf(num_correct - 1, num_guesses, right))
    if delta == 0 or num_correct == 0:
        return tail
    i_n = np.arange(1, num_correct + 1)
    gained = (stats.binom.sf(num_correct - i_n - 1, num_guesses, right) - tail) / i_n
    return min(1.0, tail + 2 * num_canaries * delta * max(0.0, float(gained.max())))


def one_run_bound(num_canaries: int, num_guesses: int, num_correct: int, delta: float, significance: float = 0.05) -> float:
    """The largest epsilon that the guesses rule out, for every mechanism; 0 where they rule out none.

    Args:
        num_canaries: ``m``, those that were in and those that were not.
        num_guesses: How many coins were guessed.
        num_correct: How many of the guesses were right.
        significance: Chance that the bound is too high.

    Raises:
        PrivacyError: if the counts do not fit each other.
        MissingExtra: if ``scipy`` is not installed.

    Example:
        >>> round(one_run_bound(1000, 100, 100, delta=1e-5), 4)
        3.4654
    """
    return _largest(lambda epsilon: significance - one_run_p_value(num_canaries, num_guesses, num_correct, epsilon, delta))


def fdp_bound(num_canaries: int, num_guesses: int, num_correct: int, delta: float, significance: float = 0.05) -> float:
    """The largest epsilon whose Gaussian mechanism the guesses rule out; 0 where they rule out none.

    Args:
        num_canaries: ``m``, those that were in and those that were not.
        num_guesses: How many coins were guessed.
        num_correct: How many of the guesses were right.
        delta: Above 0.
        significance: Chance that the bound is too high.

    Raises:
        PrivacyError: if the counts do not fit each other, or ``delta`` is not above 0.
        MissingExtra: if ``scipy`` is not installed.

    Example:
        >>> round(fdp_bound(1000, 100, 100, delta=1e-5), 4)
        5.549
    """
    _require_counts(num_canaries, num_guesses, num_correct)
    return _largest(lambda epsilon: fdp_excess(num_canaries, num_guesses, num_correct, Curve(gaussian_mu(epsilon, delta)), significance))


def fdp_excess(num_canaries: int, num_guesses: int, num_correct: int, curve: Curve, significance: float) -> float:
    """Above 0 where the guesses rule out the trade-off curve at this significance."""
    wrong = significance * (num_guesses - num_correct) / num_canaries
    right = significance * num_correct / num_canaries
    for i in range(num_correct - 1, -1, -1):
        after = max(wrong, curve.least(right))
        if after == wrong:
            break  # nothing changes any more
        right = min(1.0, right + i / (num_guesses - i) * (after - wrong))
        wrong = after
    return right + wrong - num_guesses / num_canaries


def gaussian_delta(mu: float, epsilon: float) -> float:
    """``delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)``, of one Gaussian release with noise ``1 / mu`` times its bound.

    Balle, Wang, `Improving the Gaussian Mechanism for Differential Privacy <https://arxiv.org/abs/1805.06530>`_, 2018.
    """
    if mu == 0:
        return 0.0
    log_ndtr = _scipy("special").log_ndtr
    first, second = float(log_ndtr(mu / 2 - epsilon / mu)), float(log_ndtr(-mu / 2 - epsilon / mu))
    return math.exp(first) - math.exp(min(epsilon + second, 0.0))


@lru_cache(maxsize=4096)
def gaussian_mu(epsilon: float, delta: float) -> float:
    """The inverse noise multiplier of the Gaussian release that has this epsilon at this delta.

    Raises:
        PrivacyError: if ``delta`` is not between 0 and 1: no normal noise has such a guarantee.

    Example:
        >>> round(1 / gaussian_mu(1.0, 1e-5), 5)
        3.73063
    """
    if not 0 < delta < 1:
        raise PrivacyError(
            f"delta is {delta}; the audit by trade-off curves needs one between 0 and 1. The other bound (one-run) does without."
        )
    high = 1.0
    while gaussian_delta(high, epsilon) < delta and high < _LARGEST:
        high *= 2
    if gaussian_delta(high, epsilon) < delta:
        return math.inf
    return float(_scipy("optimize").brentq(lambda mu: gaussian_delta(mu, epsilon) - delta, 0.0, high, xtol=1e-12))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Undoes :func:`gaussian_mu`: epsilon at ``delta`` of a Gaussian release with noise ``1 / mu`` times its bound; infinity without noise."""
    if not math.isfinite(mu):
        return math.inf
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    return float(_scipy("optimize").brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, high, xtol=1e-9))


@dataclass(frozen=True)
class Curve:
    """A trade-off curve: how seldom a guess can be wrong in one way, where it is seldom wrong in the other.

    Args:
        mu: Of the Gaussian curve ``f(x) = Phi(Phi^-1(1 - x) - mu)``; ``None`` where ``lines`` give it.
        lines: Pairs ``(epsilon, delta)``, each of which the mechanism has: ``f(x) = max(0, 1 - delta - e^eps x, e^-eps (1 - delta - x))``.
    """

    mu: float | None = None
    lines: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def of(release: Release) -> Curve:
        """The curve of releases, or one below it.

        Raises:
            PrivacyError: if the noise is not normal.
            MissingExtra: if ``dp-accounting`` is not installed.
        """
        if release.kind != "gaussian":
            raise PrivacyError(f"The trade-off curve of {release.kind} noise is not known here, so its audit would prove nothing.")
        if release.rate == 1:
            return Curve(math.sqrt(release.steps) / release.noise)
        return Curve(None, _lines(release))

    def least(self, right: float) -> float:
        """``f(1 - right)``."""
        if self.mu is not None:
            special = _scipy("special")
            return float(special.ndtr(special.ndtri(right) - self.mu))
        epsilon_e, delta_e = self._arrays
        x = 1 - right
        return max(0.0, float((1 - delta_e - np.exp(epsilon_e) * x).max()), float((np.exp(-epsilon_e) * (1 - delta_e - x)).max()))

    @property
    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return _arrays(self.lines)


@lru_cache(maxsize=256)
def _lines(release: Release) -> tuple[tuple[float, float], ...]:
    epsilons = [0.0, *np.geomspace(0.02, 40.0, _LINES).tolist()]
    return tuple(zip(epsilons, deltas_of(release, epsilons), strict=True))


@lru_cache(maxsize=256)
def _arrays(lines: tuple[tuple[float, float], ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    epsilon_e, delta_e = np.asarray(lines).T
    return epsilon_e, delta_e


def release_bound(
    num_canaries: int, num_guesses: int, num_correct: int, release: Release, delta: float, significance: float = 0.05
) -> float:
    """As :func:`fdp_bound`, with the curves of releases that differ from ``release`` in their noise alone: epsilon at the largest noise that is ruled out.

    With everybody in each sum these are the Gaussian curves.

    Raises:
        PrivacyError: if the counts do not fit each other, or no epsilon can be named.
        MissingExtra: if ``scipy`` or ``dp-accounting`` is not installed.
    """
    _require_counts(num_canaries, num_guesses, num_correct)
    if release.rate == 1:
        return fdp_bound(num_canaries, num_guesses, num_correct, delta, significance)

    def ruled_out(factor: float) -> bool:
        return fdp_excess(num_canaries, num_guesses, num_correct, Curve.of(_with_noise(release, factor)), significance) > 0

    # The more noise is claimed, the sooner it is ruled out.
    out = 1.0
    if ruled_out(out):
        while out > 1 / _FAR and ruled_out(out / _STEP):
            out /= _STEP
    else:
        while not ruled_out(out):
            out *= _STEP
            if out > _FAR:
                return 0.0
    kept = out / _STEP
    while out / kept > 1.01:
        middle = math.sqrt(kept * out)
        kept, out = (kept, middle) if ruled_out(middle) else (middle, out)
    return epsilon_of([_with_noise(release, out)], delta)


def _with_noise(release: Release, factor: float) -> Release:
    return replace(release, noise=release.noise * factor)


@dataclass(frozen=True)
class Observer:
    """What scores look like to somebody who guesses: drawn samples, each sorted.

    Args:
        present_n: Scores of canaries that were in.
        absent_n: Scores of canaries that were not.
    """

    present_n: NDArray[np.float64]
    absent_n: NDArray[np.float64]

    @staticmethod
    def of(
        release: Release,
        rounds: int,
        noise: float,
        normal: Callable[[int], NDArray[np.float64]],
        uniform: Callable[[int], NDArray[np.float64]],
    ) -> Observer:
        """Scores of rounds whose noise is ``noise``, read as if it were as much as ``release`` claims.

        Args:
            release: Of one round.
            normal: Draws standard normal numbers.
            uniform: Draws numbers uniform in (0, 1).
        """
        binom, scores = _scipy("stats").binom, []
        for present in (1.0, 0.0):
            score_n = np.zeros(_SAMPLES)
            for _ in range(rounds):
                here_n = present * binom.ppf(uniform(_SAMPLES), release.steps, release.rate)
                score_n += seen(here_n + noise * math.sqrt(release.steps) * normal(_SAMPLES), release)
            scores.append(np.sort(score_n))
        return Observer(*scores)

    def right(self, share: float, both: bool = True) -> float:
        """The probability that a guess is right, where the highest scores are guessed to be in, and the lowest not to be, ``share`` of all together.

        Args:
            both: Whether the lowest are guessed at all. With sampling they say little: a canary that was never drawn looks like one that was not in.
        """
        together = np.sort(np.concatenate([self.present_n, self.absent_n]))
        num_high = max(1, round(share * len(together) / (2 if both else 1)))
        correct = len(self.present_n) - np.searchsorted(self.present_n, together[-num_high], side="left")
        if both:
            correct += np.searchsorted(self.absent_n, together[num_high - 1], side="right")
        return min(1.0, float(correct) / (2 * num_high if both else num_high))


def seen(part_n: NDArray[np.float64], release: Release) -> NDArray[np.float64]:
    """How much more likely each part of a round's sum is of a canary that is in the run: the logarithm of the ratio.

    Args:
        part_n: ``(n,)``, a canary's part in units of the bound, the sum over the round's steps; about 1 for each step it was in.
        release: Noise, rate and steps of the round.
    """
    if release.rate == 1:
        return (part_n - 0.5 * release.steps) / release.noise**2
    # The canary was in k of the steps; terms of k that hardly ever happen are left out.
    most = min(release.steps, int(release.rate * release.steps + 8 * math.sqrt(release.rate * release.steps) + 8))
    k_1k = np.arange(most + 1)[None, :]
    log_k = _scipy("stats").binom.logpmf(k_1k, release.steps, release.rate)
    log_nk = log_k + (k_1k * part_n[:, None] - k_1k**2 / 2) / (release.steps * release.noise**2)
    log_n: NDArray[np.float64] = _scipy("special").logsumexp(log_nk, axis=1)
    return log_n


@dataclass(frozen=True)
class Design:
    """How many canaries an audit has, how many of them it guesses, and how likely it then notices what it is meant to notice.

    Args:
        num_needed: Right guesses that rule the claim out.
        power: Probability of so many, if scores show as much as the fault lets them show.
        both: Whether the lowest scores are guessed too, and not only the highest.
    """

    num_canaries: int
    num_guesses: int
    num_needed: int
    power: float
    both: bool = True


def design(num_canaries: int, claim: Curve, fault: Observer, significance: float = 0.05) -> Design:
    """The number of guesses with which the f-DP test most likely rules out a claim that a fault has made wrong.

    Args:
        fault: What scores show under the fault that is to be noticed.

    Raises:
        ConfigError: if there are too few canaries to guess any.
    """
    if num_canaries < _FEWEST:
        raise ConfigError(f"{num_canaries} canaries are too few to prove anything; take {_FEWEST} or more.")
    designs: list[tuple[float, float, Design]] = []
    for share in _SHARES:
        guesses = 2 * int(share * num_canaries / 2)
        if guesses < 4:
            continue
        needed = _needed(num_canaries, guesses, claim, significance)
        for both in (True, False):
            right = fault.right(guesses / num_canaries, both)
            power = float(_scipy("stats").binom.sf(needed - 1, guesses, right))
            designs.append((round(power, 6), right - needed / guesses, Design(num_canaries, guesses, needed, power, both)))
    return max(designs, key=lambda one: one[:2])[2]


def designed(claim: Curve, fault: Observer, power: float, significance: float = 0.05) -> Design:
    """The fewest canaries with which a fault is noticed with this probability, within a seventh of their number.

    Raises:
        ConfigError: if ``power`` is out of range, or more canaries would be needed than can be run.
    """
    if not 0 < power < 1:
        raise ConfigError(f"The power is {power}; it is the probability of noticing a fault, between 0 and 1.")
    low, high = _FEWEST, _FEWEST
    while (best := design(high, claim, fault, significance)).power < power:
        low, high = high, 2 * high
        if high > MOST:
            raise ConfigError(
                f"Even {MOST} canaries would not notice this fault with probability {power:g}: it lets too little be seen. "
                "Ask for less power, or for a larger fault."
            )
    while high / low > _GROWTH:
        middle = round(math.sqrt(low * high))
        tried = design(middle, claim, fault, significance)
        low, high, best = (low, middle, tried) if tried.power >= power else (middle, high, best)
    return best


@dataclass(frozen=True)
class Evidence:
    """What the scores of canaries say.

    Args:
        num_correct: Of the guesses.
        ruled_out: Whether they rule out the claim.
        fdp: Lower bound on epsilon by trade-off curves.
        one_run: Lower bound on epsilon for every mechanism.
        estimate: Epsilon of the Gaussian release that would give such scores. An estimate, which may be too high or too low.
        exposure: Mean over present canaries, in bits: how far up a canary's score stands among those of absent ones. By chance it is about 1.44.
        most_exposure: As high as it can be with so many absent canaries.
        true_positives: Share of present canaries above all but one in a thousand of the absent ones (above all of them where they are fewer).
    """

    num_canaries: int
    num_present: int
    num_guesses: int
    num_correct: int
    ruled_out: bool
    fdp: float
    one_run: float
    estimate: float
    exposure: float
    most_exposure: float
    true_positives: float


def evidence(
    score_n: NDArray[np.float64],
    present_n: NDArray[np.bool_],
    num_guesses: int,
    release: Release,
    delta: float,
    significance: float = 0.05,
    both: bool = True,
) -> Evidence:
    """Guesses the coins of the canaries with the highest and the lowest scores, and says what the right guesses prove.

    Args:
        score_n: ``(n,)``, higher where a canary seems to have been in.
        present_n: ``(n,)``, whether it was.
        num_guesses: Chosen before the scores were seen.
        release: What is claimed of all that was scored.
        delta: At which epsilons are named; above 0.
        both: Whether the lowest scores are guessed too, and not only the highest.

    Raises:
        PrivacyError: if a score is not a number, or the counts do not fit each other.
    """
    if not np.isfinite(score_n).all():
        raise PrivacyError(f"{int((~np.isfinite(score_n)).sum())} of {len(score_n)} canaries have a score that is not a finite number.")
    # Equal scores say nothing, so their order must not either; coins are independent of places.
    order, m = np.argsort(score_n, kind="stable"), len(score_n)
    num_low = num_guesses // 2 if both else 0
    guesses = 2 * num_low if both else num_guesses
    correct = int(present_n[order[m - (guesses - num_low) :]].sum() + (~present_n[order[:num_low]]).sum())
    inside, outside = score_n[present_n], score_n[~present_n]
    return Evidence(
        num_canaries=m,
        num_present=int(present_n.sum()),
        num_guesses=guesses,
        num_correct=correct,
        ruled_out=fdp_excess(m, guesses, correct, Curve.of(release), significance) > 0,
        fdp=release_bound(m, guesses, correct, release, delta, significance),
        one_run=one_run_bound(m, guesses, correct, delta, significance),
        estimate=_estimate(inside, outside, delta),
        exposure=float(_exposures(inside, outside).mean()) if len(inside) else 0.0,
        most_exposure=math.log2(len(outside) + 1),
        true_positives=_true_positives(inside, outside, 1e-3),
    )


def _estimate(inside: NDArray[np.float64], outside: NDArray[np.float64], delta: float) -> float:
    """A normal curve laid through the scores of both kinds."""
    if len(inside) < 2 or len(outside) < 2 or not delta:
        return math.nan
    spread = math.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2)
    apart = max(0.0, float(inside.mean() - outside.mean()))
    return gaussian_epsilon(apart / spread if spread else (math.inf if apart else 0.0), delta)


def _exposures(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> NDArray[np.float64]:
    """``log2 |R| - log2 rank`` of each present canary among itself and the absent ones (Carlini et al., https://arxiv.org/abs/1802.08232, 2019)."""
    rank_n = 1 + len(outside) - np.searchsorted(np.sort(outside), inside, side="left")
    exposure_n: NDArray[np.float64] = math.log2(len(outside) + 1) - np.log2(rank_n)
    return exposure_n


def _true_positives(inside: NDArray[np.float64], outside: NDArray[np.float64], false_positives: float) -> float:
    if not len(inside) or not len(outside):
        return math.nan
    allowed = int(false_positives * len(outside))
    return float((inside > np.sort(outside)[len(outside) - 1 - allowed]).mean())


@lru_cache(maxsize=4096)
def _needed(num_canaries: int, num_guesses: int, claim: Curve, significance: float) -> int:
    """The fewest right guesses that rule out the claim; one more than all guesses where nothing does."""
    low, high = num_guesses // 2, num_guesses + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fdp_excess(num_canaries, num_guesses, middle, claim, significance) > 0 else (middle, high)
    return high


def _largest(excess_of: Callable[[float], float]) -> float:
    """The largest epsilon whose excess is above 0, which is so of all smaller ones."""
    if excess_of(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while excess_of(high) > 0:
        low, high = high, 2 * high
        if low > _LARGEST:
            return low
    return _bisected(lambda epsilon: excess_of(epsilon), low, high)


def _bisected(excess_of: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0, from the side on which it is still above."""
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if excess_of(middle) > 0 else (low, middle)
    return low


def _require_counts(num_canaries: int, num_guesses: int, num_correct: int) -> None:
    if not 0 <= num_correct <= num_guesses <= num_canaries:
        raise PrivacyError(
            f"{num_correct} right guesses of {num_guesses} about {num_canaries} canaries cannot be: of m canaries at most m are guessed, and at most all guesses are right."
        )


def _scipy(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError as error:
        raise MissingExtra("scipy", "privacy", "An audit") from error

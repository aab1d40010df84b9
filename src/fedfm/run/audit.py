"""An audit of a plan's promise: its own rounds, played with canary owners, and what their traces prove. For rows see :mod:`fedfm.run.audit_rows`.

Everything that keeps the promise is the plan's own: sampler, transforms with clip and noise, pacing, aggregator, and the loop of rounds. Three things are not:
the owners (canaries alone, which the promise must hide like any others), the model (as many numbers as the canaries need), and what
does nothing for the promise (training, the channel, the server's optimizer, which works on what is released already).

The rounds are played a second time with all canaries in. Noise that is new differs, and noise that comes from a fixed seed takes itself away.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedfm.channels import Plain
from fedfm.core import leaves
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.messages import ClientId, Reply, Request
from fedfm.core.parts import Guarantee, Release, RoundContext, Sampler, Scratch, ServerState, Transform, Tree, Update, transform_place
from fedfm.core.round import play, start
from fedfm.core.secret import Secret, coins
from fedfm.core.session import Answer, Session
from fedfm.core.tree import Spec
from fedfm.federation import Federation
from fedfm.local import ExampleDP
from fedfm.privacy.audit import MOST, Curve, Design, Evidence, Observer, design, designed, evidence, fdp_excess, seen
from fedfm.privacy.canaries import LONG, Canaries
from fedfm.run.audit_rows import ROWS, RowPlay, promise_to_rows
from fedfm.run.budget import RunAccount
from fedfm.server import FedAvg
from fedfm.tuning import Full
from fedfm.verbs.train import declared

AUDIT = "audit.json"
SIGNIFICANCE = 0.05
# Shares of it for scores in which noise that repeats shows without any doubt.
_STEADY, _TWICE = 0.05, 0.05
_SURE = 0.75
_WITHOUT_POWER = 1000  # canaries where no number of them has the power
_MEANS_LITTLE = 0.5  # of power
_FAULTS = (2.0, 4.0, 8.0, 16.0)
_NUMBERS = 2  # of the model, for each canary
_CLIP = "clip"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AuditResult:
    """What an audit says.

    Args:
        claim: The guarantee as the plan prints it.
        level: ``owners`` or ``rows``.
        design: Canaries and guesses, and the power that they have.
        fault: What the power is for, in words.
        evidence: From the scores that show most where the noise is what is claimed.
        more: From scores that show what repeats, by what that is: ``rounds`` (the same noise in each) and ``runs`` (a fixed seed).
        blind: Those of ``more`` that could not have shown anything with so few canaries.
    """

    claim: Guarantee
    level: str
    rounds: int
    design: Design
    fault: str
    evidence: Evidence
    more: Mapping[str, Evidence]
    blind: tuple[str, ...]
    seconds: float

    @property
    def bound(self) -> float:
        """The lower bound on epsilon at 95 %; all scores share the 5 %."""
        return max(one.fdp for one in (self.evidence, *self.more.values()))

    @property
    def one_run(self) -> float:
        """The same by the bound that holds for every mechanism."""
        return max(one.one_run for one in (self.evidence, *self.more.values()))

    @property
    def refuted(self) -> bool:
        """Whether the claim is wrong."""
        return any(one.ruled_out for one in (self.evidence, *self.more.values()))

    def verdict(self) -> str:
        """The result in a few sentences."""
        claimed = f"epsilon {self.claim.epsilon:.3g} is claimed, and"
        if not self.refuted:
            noticed = f"It would have noticed {self.fault} with probability {self.design.power:.2f}; a smaller fault may have passed."
            if self.design.power < _MEANS_LITTLE:
                noticed = (
                    f"But it means little: it would have noticed even {self.fault} with probability {self.design.power:.2f} alone, because with so much "
                    "noise, or rows drawn so seldom, one run shows too little."
                )
            return f"The audit does not contradict the claim: {claimed} at least {self.bound:.3g} is proven with 95 % confidence. {noticed}{self._missed()}"
        first = f"The claim is wrong: {claimed} the canaries prove at least {self.bound:.3g} with 95 % confidence."
        remedy = "Do not release this model."
        if self.evidence.ruled_out:
            return f"{first} {self.level.capitalize()} are hidden less than promised: look at clip, noise and sampling. {remedy}"
        if "rounds" in self.more and self.more["rounds"].ruled_out:
            return f"{first} It shows when rounds are added up: their noise is not drawn anew. {remedy}"
        return f"{first} It shows when two runs are compared: their noise is the same, so it comes from a fixed seed. {remedy}"

    def _missed(self) -> str:
        """What could not have been noticed at all."""
        kinds = {"rounds": "noise that is the same in each round", "runs": "noise from a fixed seed"}
        missed = [text for name, text in kinds.items() if name in self.blind or (name == "runs" and name not in self.more)]
        return f" It could not have noticed {' or '.join(missed)}: play twice, with more canaries." if missed else ""

    def lines(self) -> list[tuple[str, str]]:
        """The result as rows of a table: a name, and what it says."""
        claim, best = self.claim, self.evidence
        return [
            (
                "claimed",
                f"epsilon {claim.epsilon:.4g} at delta {claim.delta:.3g}, {claim.adjacency}{' (simulated)' if claim.simulated else ''}",
            ),
            ("proven", f"epsilon at least {self.bound:.4g} with 95 % confidence, by trade-off curves (f-DP)"),
            ("", f"at least {self.one_run:.4g} by the one-run bound, which holds for every mechanism"),
            ("estimate", f"epsilon {best.estimate:.4g}, a point estimate and no bound"),
            ("canaries", f"{best.num_canaries}, of which {best.num_present} were in; {best.num_guesses} guesses, {best.num_correct} right"),
            ("power", f"{self.design.power:.3f} for {self.fault}"),
            ("exposure", f"{best.exposure:.3g} bits on average, of {best.most_exposure:.3g}; 1.44 by chance"),
            ("caught", f"{100 * best.true_positives:.3g} % of present canaries at 0.1 % false positives"),
            ("time", f"{self.rounds} rounds{' twice' if 'runs' in self.more else ''}, {self.seconds:.1f} s"),
            ("verdict", self.verdict()),
        ]

    def to_json(self) -> dict[str, Any]:
        """As ``audit.json`` holds it."""
        return {
            "claim": self.claim.to_json(),
            "level": self.level,
            "rounds": self.rounds,
            "bound": self.bound,
            "one_run_bound": self.one_run,
            "refuted": self.refuted,
            "verdict": self.verdict(),
            "lines": self.lines(),
            "fault": self.fault,
            "blind": list(self.blind),
            "design": asdict(self.design),
            "evidence": asdict(self.evidence),
            "more": {name: asdict(one) for name, one in self.more.items()},
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Wanted:
    """What is asked of an audit.

    Args:
        num_canaries: ``None`` takes as many as the power needs.
        power: The probability of noticing the fault.
        fault: How many times too small the noise is, where that is to be noticed; ``None`` takes 2, or more where no number of canaries would notice it.
        twice: Whether to play a second time, which alone shows a fixed seed.
        progress: Told which run is played, the round, and how many there are.

    Raises:
        ConfigError: if a number is out of range.
    """

    num_canaries: int | None = None
    power: float = 0.95
    fault: float | None = None
    twice: bool = True
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.fault is not None and not (self.fault > 1 and math.isfinite(self.fault)):
            raise ConfigError(f"The fault is {self.fault:g}; it says how many times too small the noise is, above 1.")

    def design(self, release: Release, rounds: int, level: Mapping[str, float]) -> tuple[Design, float]:
        """The canaries and guesses for rounds that each release this, and the fault for which they have their power.

        Raises:
            ConfigError: if no number of canaries has the power for the fault that is asked for.
        """
        released = replace(release, steps=rounds * release.steps)
        curve = Curve.of(released)
        faults = _FAULTS if self.fault is None else (self.fault,)
        for fault in faults:
            secret = Secret.system()
            normal, uniform = secret.stream("normal").normal, secret.stream("uniform").uniform
            observer = Observer.of(release, rounds, release.noise / fault, normal, uniform)
            if self.num_canaries is not None:
                return design(self.num_canaries, curve, observer, level["best"]), fault
            try:
                chosen = designed(curve, observer, self.power, level["best"])
            except ConfigError:
                if self.fault is not None or not 0 < self.power < 1:
                    raise
                continue
            while _blind(chosen.num_canaries, released, level) and chosen.num_canaries < MOST:
                chosen = design(round(1.2 * chosen.num_canaries), curve, observer, level["best"])
            return chosen, fault
        # Where canaries are seldom drawn, a sound run shows those that were as clearly as a faulty one does. The power says so.
        return design(_WITHOUT_POWER, curve, observer, level["best"]), fault


def audit_plan(plan: Federation, wanted: Wanted | None = None, num_rows: int = ROWS) -> AuditResult:
    """Audits the promise of a plan: to its owners where it makes one, else to their rows.

    Args:
        plan: Resolved.
        num_rows: Rows of the owner that is played, where rows are what is hidden.

    Raises:
        ConfigError: if the plan promises nothing, or a number is out of range.
        PrivacyError: if what it promises has no curve here.
    """
    wanted = wanted or Wanted()
    if plan.rounds < 1:
        raise ConfigError("The plan has no rounds, so nothing is released and there is nothing to audit. Set rounds to 1 or more.")
    local = require_promise(plan)
    return _audit_owners(plan, wanted) if local is None else _audit_rows(plan, wanted, num_rows, local)


def require_promise(plan: Federation) -> ExampleDP | None:
    """The trainer that hides rows, where that is the promise; ``None`` where owners are hidden.

    Raises:
        ConfigError: if the plan promises nothing, or nothing that could be wrong.
    """
    owners = any(transform.release(plan) is not None for transform in plan.transforms)
    local = None if owners else promise_to_rows(plan)
    if local is None:
        promise_to_owners(plan)
    return local


def _audit_owners(plan: Federation, wanted: Wanted) -> AuditResult:
    began = time.monotonic()
    place, transform, claim = promise_to_owners(plan)
    release = transform.release(plan)
    assert release is not None
    level = _levels(wanted.twice, release, plan.rounds)
    chosen, fault = wanted.design(release, plan.rounds, level)
    canaries = Canaries.drawn(chosen.num_canaries, _NUMBERS * chosen.num_canaries, Secret.system())
    first = Play(plan, place, release, canaries, wanted.progress, "first run").observed(canaries.present_n)
    scores = {"best": first.best_n, "rounds": first.steady_n}
    if wanted.twice:
        everybody = np.ones(len(canaries), dtype=bool)
        second = Play(plan, place, release, canaries, wanted.progress, "second run").observed(everybody)
        # Who was in the second run is known, so it is taken out; what is left of both is the first run's secret, and twice the noise or none.
        scores["runs"] = first.steady_n - (second.steady_n - second.times_n)
    return _result(Claim(claim, "owners", plan.rounds, release), (chosen, fault), canaries, scores, level, began)


def _audit_rows(plan: Federation, wanted: Wanted, num_rows: int, local: ExampleDP) -> AuditResult:
    began = time.monotonic()
    release = _release_of(local, num_rows)
    level = _levels(wanted.twice, release, plan.rounds)
    chosen, fault = wanted.design(release, plan.rounds, level)
    while chosen.num_canaries > num_rows:
        # An owner with more rows draws each less often, and is promised the same.
        num_rows = round(1.2 * chosen.num_canaries)
        release = _release_of(local, num_rows)
        chosen, fault = wanted.design(release, plan.rounds, level)
    canaries = Canaries.drawn(chosen.num_canaries, _NUMBERS * chosen.num_canaries, Secret.system())
    best_n, steady_n = RowPlay(plan, num_rows, release, canaries, wanted.progress, "first run").observed(canaries.present_n)
    scores = {"best": best_n, "rounds": steady_n}
    if wanted.twice:
        # Nobody is in the second run, so that its noise is all that is left of it.
        nobody = np.zeros(len(canaries), dtype=bool)
        _, noise_n = RowPlay(plan, num_rows, release, canaries, wanted.progress, "second run").observed(nobody)
        scores["runs"] = steady_n - noise_n
    claim = local.guarantee(plan, spent=[replace(release, steps=release.steps * plan.rounds)])
    return _result(Claim(claim, "rows", plan.rounds, release), (chosen, fault), canaries, scores, level, began)


def _release_of(local: ExampleDP, num_rows: int) -> Release:
    release = local.release(num_rows)
    assert release is not None
    return release


@dataclass(frozen=True)
class Claim:
    """What is claimed, and of what.

    Args:
        level: ``owners`` or ``rows``.
        release: What a round releases.
    """

    guarantee: Guarantee
    level: str
    rounds: int
    release: Release

    @property
    def released(self) -> Release:
        """What all rounds release."""
        return replace(self.release, steps=self.rounds * self.release.steps)


def _result(
    claim: Claim,
    plan_of: tuple[Design, float],
    canaries: Canaries,
    scores: Mapping[str, NDArray[np.float64]],
    level: Mapping[str, float],
    began: float,
) -> AuditResult:
    """What the scores of all kinds say together."""
    chosen, fault = plan_of
    delta, present_n, said = claim.guarantee.delta, canaries.present_n, dict[str, Evidence]()
    for name, share in level.items():
        guesses, both = (chosen.num_guesses, chosen.both) if name == "best" else _sure(len(canaries), claim.released)
        said[name] = evidence(scores[name], present_n, guesses, claim.released, delta, share, both)
    text, blind = f"noise that is {fault:g} times too small", _blind(len(canaries), claim.released, level)
    best = said.pop("best")
    return AuditResult(claim.guarantee, claim.level, claim.rounds, chosen, text, best, said, blind, time.monotonic() - began)


def _sure(num_canaries: int, released: Release) -> tuple[int, bool]:
    """How many guesses are made where noise that repeats would show every canary, and whether some are that a canary was not in.

    Not quite all are guessed, because coins seldom fall half and half. With sampling a canary may be in and never drawn, so only those that show are guessed.
    """
    if released.rate == 1:
        return 2 * int(_SURE * num_canaries / 2), True
    drawn = 1 - (1 - released.rate) ** released.steps
    return int(_SURE * num_canaries / 2 * drawn), False


def _blind(num_canaries: int, released: Release, level: Mapping[str, float]) -> tuple[str, ...]:
    """The kinds of score in which so many canaries rule out nothing, even if every guess is right."""
    curve, (guesses, _) = Curve.of(released), _sure(num_canaries, released)
    return tuple(name for name, share in level.items() if name != "best" and fdp_excess(num_canaries, guesses, guesses, curve, share) <= 0)


def _levels(twice: bool, release: Release, rounds: int) -> dict[str, float]:
    """The significance of each kind of score, which add up to 5 %."""
    # With everybody in each round the best score is the sum over rounds already, and one round repeats nothing.
    steady = {} if release.rate == 1 or rounds == 1 else {"rounds": _STEADY}
    shares = steady | ({"runs": _TWICE} if twice else {})
    return {name: SIGNIFICANCE * share for name, share in {"best": 1 - sum(shares.values()), **shares}.items()}


def promise_to_owners(plan: Federation) -> tuple[str, Transform, Guarantee]:
    """The part that hides owners with noise on the server, its place, and what it promises.

    Raises:
        ConfigError: if there is none, or it promises nothing that could be wrong.
    """
    for i, transform in enumerate(plan.transforms):
        release, claim = transform.release(plan), transform.guarantee(plan)
        if release is None or release.unit != "owner" or claim is None:
            continue
        if not math.isfinite(claim.epsilon):
            raise ConfigError(
                f"{type(transform).__name__} has no noise: epsilon is infinite, and no audit can contradict it. Set epsilon or noise_multiplier."
            )
        return transform_place(i), transform, claim
    raise ConfigError(
        "No part of this plan hides owners with noise (CentralDP does) or rows (ExampleDP does), so there is no claim to audit."
    )


@dataclass(frozen=True)
class Observed:
    """What somebody who sees the model after every round knows of the canaries.

    Args:
        best_n: ``(n,)``, how much more likely it all is with the canary in, where the noise is what is claimed.
        steady_n: ``(n,)``, the sum over rounds of the canary's part, in units of the bound.
        times_n: ``(n,)``, how many rounds it was in.
    """

    best_n: NDArray[np.float64]
    steady_n: NDArray[np.float64]
    times_n: NDArray[np.float64]


@dataclass
class Play:
    """A plan's rounds with canary owners.

    Args:
        place: Of the transform that keeps the promise.
        release: What a round of it releases.
        name: Of this run, for ``progress``.
    """

    plan: Federation
    place: str
    release: Release
    canaries: Canaries
    progress: Progress | None = None
    name: str = "run"

    def observed(self, present_n: NDArray[np.bool_]) -> Observed:
        """Plays all rounds with those who are present.

        Raises:
            RoundError: if a round of the plan fails.
        """
        canaries, ids = self.canaries, [f"canary-{i:06d}" for i in range(len(self.canaries))]
        here = frozenset(client for client, present in zip(ids, present_n.tolist(), strict=True) if present)
        plan = replace(self.plan, sampler=_Present(self.plan.sampler, here), channel=Plain(), server=FedAvg(), tuning=Full())
        state, key = start(plan, _model(len(canaries.owner_d))), Key.root(int.from_bytes(_seed(), "big"))
        rate = plan.sampler.poisson_rate()
        assert rate is not None
        session = CanarySession(plan, ids, canaries, key, lambda: _bound_of(plan, self.place, state))
        account, best_n, steady_n, times_n = RunAccount(None), np.zeros(len(ids)), np.zeros(len(ids)), np.zeros(len(ids))
        spec = Spec.of(state.params)
        place_of = {client: i for i, client in enumerate(ids)}
        for _ in range(plan.rounds):
            bound, before = _bound_of(plan, self.place, state), spec.flatten(state.params, torch.float64)
            state, record = play(plan, state, session, ids, key, spent=account)
            sum_d = (spec.flatten(state.params, torch.float64) - before).numpy() * rate * len(ids) / bound
            part_n = canaries.seen(sum_d, state.round)
            best_n += seen(part_n, self.release)
            steady_n += part_n
            times_n[[place_of[client] for client in record.cohort]] += 1
            if self.progress is not None:
                self.progress(self.name, state.round, plan.rounds)
        return Observed(best_n, steady_n, times_n)


@dataclass(frozen=True)
class _Present(Sampler):
    """The plan's own draw among all, from which those who are absent are taken out: the number of owners that a mean is divided by does not tell who is there."""

    inner: Sampler
    here: frozenset[ClientId]

    def init(self) -> Tree:
        return self.inner.init()

    def sample(self, clients: Sequence[ClientId], state: Tree, ctx: RoundContext) -> tuple[list[ClientId], Tree]:
        drawn, after = self.inner.sample(clients, state, ctx)
        return [client for client in drawn if client in self.here], after

    def poisson_rate(self) -> float | None:
        return self.inner.poisson_rate()

    def cohort_size(self, num_clients: int) -> int:
        return self.inner.cohort_size(num_clients)


class CanarySession(Session):
    """Answers for canary owners: each sends its own numbers, far longer than the bound, through the client's half of the plan's transforms.

    Args:
        ids: The canaries' names.
        bound_of: The bound of the current round.
    """

    def __init__(self, plan: Federation, ids: Sequence[ClientId], canaries: Canaries, key: Key, bound_of: Callable[[], float]) -> None:
        self.plan, self.ids, self.canaries, self.key, self.bound_of = plan, ids, canaries, key, bound_of
        self._number = {client: i for i, client in enumerate(ids)}
        self._waiting: deque[tuple[ClientId, Request]] = deque()
        self._memory: dict[ClientId, dict[str, Tree]] = {}
        self._spent: dict[ClientId, RunAccount] = {}

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        """Notes who owes an answer."""
        self._waiting.extend(requests.items())

    def receive(self) -> Answer | None:
        """The answer of the next canary."""
        return self._answer(*self._waiting.popleft()) if self._waiting else None

    def abandon(self) -> None:
        """Forgets who owes an answer."""
        self._waiting.clear()

    def close(self) -> None:
        """The same; nothing runs."""
        self.abandon()

    def _answer(self, client: ClientId, request: Request) -> Reply:
        plan, params = self.plan, _model(len(self.canaries.owner_d))
        spec = Spec.of(params)
        sent = plan.local.leaves(spec, spec)
        moved_d = self.canaries.update(self._number[client], request.round, LONG * self.bound_of())
        moved = spec.unflatten(torch.from_numpy(moved_d))
        payload = {leaf.name: moved.get(leaf.name, torch.zeros(leaf.shape, dtype=leaf.dtype)) for leaf in leaves.payload(sent)}
        told = {leaf.name: leaf.silent for leaf in leaves.numbers(declared(plan.local, (), spec, spec)) if not leaf.optional}
        update = Update(payload, 1.0, 1, client, {name: value for name, value in told.items() if name != "weight"})
        secret = coins((plan.local, *plan.transforms), self.key.fold("client", request.round, client))
        spent = self._spent.setdefault(client, RunAccount(None))
        ctx = RoundContext(request.round, self.key, params, len(self.ids), client, spent=spent, secret=secret)
        memory = self._memory.setdefault(client, {})
        for i, transform in enumerate(plan.transforms):
            place = transform_place(i)
            received = {name.removeprefix(f"{place}/"): leaf for name, leaf in request.tensors.items() if name.startswith(f"{place}/")}
            update, memory[place] = transform.encode(update, memory.get(place, {}), replace(ctx, received=received))
        contribution = replace(update, metrics={"weight": update.weight, **update.metrics})
        sealed = plan.channel.seal(contribution, sent, request, Scratch())
        return Reply(client, request.verb, request.round, sealed.tensors, sealed.meta)


def _bound_of(plan: Federation, place: str, state: ServerState) -> float:
    """The clip of the round that comes next, which may adapt."""
    adapted = state.of(place).get(_CLIP)
    return float(adapted) if adapted is not None else float(plan.parts()[place].clip)  # type: ignore[attr-defined]


def _model(size: int) -> dict[str, torch.Tensor]:
    """Parameters for canaries: a matrix and a vector, so that noise on leaves of one kind alone shows."""
    return {"canaries.matrix": torch.zeros(size // 4, 2), "canaries.vector": torch.zeros(size - size // 4 * 2)}


def _seed() -> bytes:
    return Secret.system().stream("seed of an audit").bytes(8)

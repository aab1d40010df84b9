"""What a server could read from one owner's update, before anything leaves: attacks on updates made here, from the owner's own data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fedfm.attacks.base import Attack, Outcome, Secret, Seen, TokenAttack
from fedfm.core import registry
from fedfm.core.errors import ConfigError, DataError, FedfmError
from fedfm.core.keys import Key
from fedfm.core.parts import Tree
from fedfm.core.stage import Stage, unseen
from fedfm.core.tree import norm
from fedfm.data import Data, prepare
from fedfm.federation import Federation
from fedfm.models import load_tokenizer, unchanged
from fedfm.models.foundation import classes_of, configured, max_context
from fedfm.run.base import require_base
from fedfm.run.folder import read_journal, state_after
from fedfm.run.gaussian import noise_multiplier, noisy
from fedfm.run.leak_cases import RATE, Bench, Owner, Trial, mean_of, secret_of
from fedfm.simulation import Simulation
from fedfm.tuning import Full, LoRA
from fedfm.tuning.base import Tuning

_DRAWS = 4  # of the noise in each trial
_FROM_NOISE = 2  # updates of noise alone in each trial
_UPDATES = _DRAWS + 4  # that are read in each trial
NEAR = 0.05
"""How far above chance still counts as near chance."""
_WORDS = 60  # tokens of the text that is shown


@dataclass(frozen=True)
class Question:
    """What is looked at.

    Args:
        owner: Whose update; ``None`` for the first owner.
        num_texts: Examples in one update.
        trials: Updates that are made, each from other examples.
        group: Owners in a sum; ``None`` for all, at most ten.
        epsilon: Of the noise that is compared with.
        delta: The chance that its guarantee fails.

    Raises:
        ConfigError: if a number is out of range.
    """

    owner: str | None = None
    num_texts: int = 1
    trials: int = 5
    group: int | None = None
    epsilon: float = 8.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        for name, value, least in (("examples", self.num_texts, 1), ("trials", self.trials, 1), ("group", self.group, 2)):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be {least} or more.")
        noise_multiplier(self.epsilon, self.delta)


@dataclass(frozen=True)
class Finding:
    """What one attack read in one case, on average over the trials.

    Args:
        right: Share of what was asked; ``None`` where the update holds nothing of this kind.
        chance: What a guess without the update gets right; for words what the same attack gets from noise alone, where that is more.
        in_group: Share of the owner's tokens that show in a sum, whosever they are.
    """

    right: float | None
    chance: float | None
    in_group: float | None = None

    @property
    def word(self) -> str:
        """``nothing``, ``near chance``, ``part`` or ``all``."""
        if self.right is None or self.chance is None:
            return "nothing"
        if self.right <= self.chance + NEAR:
            return "near chance"
        return "all" if self.right >= 0.995 else "part"


@dataclass
class Case:
    """A way in which the update could leave.

    Args:
        name: ``raw``, ``lora``, ``group``, ``noise``, ``plan``, ``released``.
        title: The same for a person.
        what: What the server has in it.
        findings: By the attack's name.
        why_not: Why there is no such case here; empty where there is one.
        marks: Of the text that is shown, which tokens were read.
    """

    name: str
    title: str
    what: str
    findings: dict[str, Finding] = field(default_factory=dict)
    why_not: str = ""
    marks: list[bool] = field(default_factory=list)
    outcomes: dict[str, list[Outcome | None]] = field(default_factory=dict, repr=False)
    from_noise: dict[str, list[float]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Leak:
    """What could be read.

    Args:
        source: The recipe or the run.
        noise: Noise multiplier of the epsilon that is compared with.
        num_texts: Examples in one update.
        trials: Updates that were made.
        group: Owners in a sum.
        words: The tokens of the text that is shown.
    """

    source: str
    owner: str
    tuning: str
    epsilon: float
    delta: float
    noise: float
    num_texts: int
    trials: int
    group: int
    cases: Sequence[Case]
    words: Sequence[str]

    def case(self, name: str) -> Case:
        """The case of that name."""
        return next(case for case in self.cases if case.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain values: for ``--json``, and for the page."""
        head = {
            name: getattr(self, name) for name in ("source", "owner", "tuning", "epsilon", "delta", "noise", "num_texts", "trials", "group")
        }
        attacks = {name: _attack(name) for name in registry.entries("attacks")}
        tokens = [name for name, attack in attacks.items() if isinstance(attack, TokenAttack)]
        questions = {name: attacks[name].question for name in (*tokens, *(name for name in attacks if name not in tokens))}
        cases = [
            {
                "name": case.name,
                "title": case.title,
                "what": case.what,
                "why_not": case.why_not,
                "marks": case.marks,
                "attacks": {
                    name: {"right": one.right, "chance": one.chance, "in_group": one.in_group, "word": one.word}
                    for name, one in case.findings.items()
                },
            }
            for case in self.cases
        ]
        return {**head, "near": NEAR, "questions": questions, "tokens": tokens, "cases": cases, "words": list(self.words)}


def site_of(plan: Federation, data: str | None = None) -> Simulation:
    """The federation with its data; or with the rows of one owner alone, as on a member's own machine.

    Args:
        data: A file with these rows.
    """
    if data is None:
        return Simulation.build(plan, policies={})
    plan = plan.resolved()
    tokenizer = load_tokenizer(plan.model.tokenizer or plan.model.source or "")
    config = configured(plan.model, plan.task.head, tokenizer)
    rules: dict[str, Any] = plan.data.rules()
    with unchanged(tokenizer):
        owners = prepare(
            Data(source=data, delimiter=plan.data.delimiter, encoding=plan.data.encoding, **rules),
            plan.task,
            tokenizer,
            key=Key.root(plan.seed).fold("data"),
            max_context=max_context(config),
            classes=classes_of(config),
            sole="me",
        )
    return Simulation.build(plan, owners=owners, policies={})


def leak(site: Simulation, question: Question, source: str = "", run: Path | None = None, stage: Stage = unseen) -> Leak:
    """Makes updates from one owner's data in each case, and runs every attack on them. Nothing leaves and nothing is written.

    Args:
        source: The recipe's or the run's name, for the answer.
        run: A run's folder, from whose last round the plan's own tuning goes on; ``None`` for the start.

    Raises:
        ConfigError: if there is no such owner.
        DataError: if it has too few examples.
        RunError: if the run has completed no round, or its base has changed since.
    """
    name = _known(site, question.owner)
    size = min(question.group or 10, len(site.clients))
    owner = Owner(site, name, size, None if run is None else state_after(run).params)
    if len(owner.train) < question.num_texts:
        raise DataError(f"{name} has {len(owner.train)} training example(s), fewer than the {question.num_texts} of --examples.")
    if run is not None:
        require_base(read_journal(run).first.get("base"), owner.full.house.foundation, run)
    work = _Work(owner, question, size)
    trials = list(owner.trials(question.num_texts, question.trials))
    said, total = f"Reading what updates of {name} give away", len(trials) * _UPDATES
    for done, trial in enumerate(trials):
        stage(said, done * _UPDATES, total)
        for number, _ in enumerate(work.look(trial), 1):
            stage(said, min(done * _UPDATES + number, total), total)
    stage(said, total, total)
    for case in work.cases:
        case.findings = {attack: _mean(outcomes, case.from_noise.get(attack, ())) for attack, outcomes in case.outcomes.items()}
    return Leak(
        source=source or site.federation.name,
        owner=name,
        tuning=type(site.federation.tuning).__name__,
        epsilon=question.epsilon,
        delta=question.delta,
        noise=work.noise,
        num_texts=question.num_texts,
        trials=len(trials),
        group=size,
        cases=work.cases,
        words=work.words,
    )


def _known(site: Simulation, owner: str | None) -> str:
    if owner is None:
        return site.clients[0]
    if owner not in site.clients:
        raise ConfigError(
            f"There is no owner {owner!r} with usable data.{registry.suggest(owner, site.clients)} Owners: {', '.join(site.clients[:8])}"
            f"{', ...' if len(site.clients) > 8 else ''}."
        )
    return owner


def _attack(name: str) -> Attack:
    attack = registry.entries("attacks")[name].load()()
    assert isinstance(attack, Attack)
    return attack


def _mean(outcomes: Sequence[Outcome | None], from_noise: Sequence[float]) -> Finding:
    read = [outcome for outcome in outcomes if outcome is not None]
    if not read:
        return Finding(None, None)
    in_group = [outcome.in_group for outcome in read if outcome.in_group is not None]
    chance = max([fmean(one.chance for one in read), *([fmean(from_noise)] if from_noise else [])])
    return Finding(fmean(one.right for one in read), chance, fmean(in_group) if in_group else None)


class _Work:
    """The cases, filled trial by trial."""

    def __init__(self, owner: Owner, question: Question, group: int) -> None:
        self.owner, self.question, self.group = owner, question, group
        self.noise = noise_multiplier(question.epsilon, question.delta)
        self.attacks = {name: _attack(name) for name in registry.entries("attacks")}
        self.words: list[str] = []
        self.from_noise: dict[tuple[str, int, int], list[float]] = {}
        self.benches: dict[Tuning, Bench | None] = {}
        alone = f"all parameters of the model train, and the server sees the update that one step on {_texts(question.num_texts)} makes"
        one = "the server sees one sum and no single update"
        self.by_name = {
            "raw": Case("raw", "Everything trains, sent as it is", alone),
            "lora": Case("lora", "Only a small adapter trains (LoRA)", "the base stays as it is, and the server sees the change of the adapter"),
            "group": Case("group", f"In a sum of {group} owners", f"as above, and the updates of {group} owners are added before the server sees them: {one}"),
            "noise": Case(
                "noise",
                f"With noise for epsilon {question.epsilon:g}",
                f"as in the first line, with noise added before it leaves (epsilon {question.epsilon:g}, delta {question.delta:g}, one release)",
            ),
            "plan": Case("plan", "As this plan sends it", "the plan's own tuning, trainer, transforms and channel, for one round"),
            "released": Case("released", "What the next model shows", "the sum after the server has added its noise, which everybody sees in the next model"),
        }  # fmt: skip

    @property
    def cases(self) -> list[Case]:
        """Those that exist or say why they do not."""
        return [case for case in self.by_name.values() if case.outcomes or case.why_not]

    def look(self, trial: Trial) -> Iterator[None]:
        """Runs every attack on every case of a trial, and yields after each."""
        owner = self.owner
        for case, seen, in_sum in self._updates(trial):
            self._attack(case, seen, secret_of(trial, owner.train, len(owner.site.house.labels), in_sum), trial)
            yield

    def _updates(self, trial: Trial) -> Iterator[tuple[Case, Seen, bool]]:
        """What the server has in each case, and whether it is a sum."""
        owner, full = self.owner, self.owner.full
        raw, told = full.update(owner.owner, trial.texts)
        yield self.by_name["raw"], self._seen(full, trial, raw, told, RATE), False
        adapter = self._bench("lora", owner.plan.tuning if isinstance(owner.plan.tuning, LoRA) else LoRA())
        if adapter is not None:
            delta, numbers = adapter.update(owner.owner, trial.texts)
            yield self.by_name["lora"], self._seen(adapter, trial, delta, numbers, RATE), False
        if trial.others:
            together = chain([raw], (full.update(client, examples)[0] for client, examples in trial.others.items()))
            yield self.by_name["group"], self._seen(full, trial, mean_of(together), {}, RATE), True
        else:
            self.by_name["group"].why_not = "there is one owner here, so there is no sum to hide in"
        key = owner.key.fold("noise", trial.number)
        for draw in range(_DRAWS):
            released = noisy(raw, norm(raw), self.noise, key.fold(draw))
            yield self.by_name["noise"], self._seen(full, trial, released, {}, RATE), False
        yield from self._plan(trial)

    def _seen(self, bench: Bench, trial: Trial, delta: Tree, told: Mapping[str, float], rate: float | None = None) -> Seen:
        return bench.seen(self.owner.base, self.owner.owner, trial, delta, told, rate)

    def _plan(self, trial: Trial) -> Iterator[tuple[Case, Seen, bool]]:
        case, bench = self.by_name["plan"], self._bench("plan", self.owner.plan.tuning)
        if bench is None or case.why_not:
            return
        try:
            played = self.owner.round(trial)
        except FedfmError as error:
            case.why_not = str(error)
            return
        yield case, self._seen(bench, trial, played.delta, played.told, played.rate), played.hidden
        if played.released is not None:
            yield self.by_name["released"], self._seen(bench, trial, played.released, {}), True

    def _bench(self, name: str, tuning: Tuning) -> Bench | None:
        """The base under a tuning, loaded once; ``None`` where it does not fit."""
        if tuning == Full():
            return self.owner.full
        if tuning not in self.benches:
            try:
                self.benches[tuning] = self.owner.bench(tuning)
            except FedfmError as error:
                self.by_name[name].why_not, self.benches[tuning] = str(error), None
        elif self.benches[tuning] is None:
            self.by_name[name].why_not = f"{type(tuning).__name__} does not fit this model"
        return self.benches[tuning]

    def _attack(self, case: Case, seen: Seen, secret: Secret, trial: Trial) -> None:
        best: Outcome | None = None
        for name, attack in self.attacks.items():
            guess = attack.guess(seen)
            outcome = None if guess is None else attack.score(guess, seen, secret)
            case.outcomes.setdefault(name, []).append(outcome)
            if outcome is not None and isinstance(attack, TokenAttack):
                case.from_noise.setdefault(name, []).extend(self._from_noise(name, seen, secret, trial))
            if outcome is not None and outcome.tokens and (best is None or outcome.right > best.right):
                best = outcome
        if trial.number == 0 and not case.marks:
            special, read = set(seen.base.special), set(best.tokens if best is not None else ())
            ids = [int(token) for token in trial.texts.ids(0) if token not in special][:_WORDS]
            self.words = self.words or _pieces(self.owner.full.house.foundation.tokenizer, ids)
            case.marks = [token in read for token in ids]

    def _from_noise(self, name: str, seen: Seen, secret: Secret, trial: Trial) -> list[float]:
        """What an attack on words gets from noise alone: some tokens fit any update, and texts have some tokens more often."""
        known = self.from_noise.setdefault((name, trial.number, id(seen.params)), [])
        if not known:
            zeros = {key: torch.zeros_like(leaf) for key, leaf in seen.delta.items()}
            for draw in range(_FROM_NOISE):
                noise = noisy(zeros, 1.0, 1.0, self.owner.key.fold("alone", trial.number, draw))
                guess = self.attacks[name].guess(replace(seen, delta=noise, told={}))
                outcome = None if guess is None else self.attacks[name].score(guess, seen, secret)
                known += [] if outcome is None else [outcome.right]
        return known


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with the spaces that it has among the others."""
    pieces, before = [], ""
    for i, token in enumerate(ids):
        now = tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False)
        # A token that is half a character changes what stands before it.
        pieces.append(now[len(before) :] if now.startswith(before) else tokenizer.decode([token]))
        before = now
    return pieces


def _texts(num: int) -> str:
    return "one text" if num == 1 else f"{num} texts"

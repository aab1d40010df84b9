"""The loop: evaluate, play a round, commit it, tell who looks on; and the same again after a crash."""

from __future__ import annotations

import difflib
import hashlib
import logging
import platform
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedfm.client.house import House
from fedfm.client.requests import stays_home
from fedfm.coordination import Coordination
from fedfm.core import check
from fedfm.core.errors import RunError
from fedfm.core.journal import Journal
from fedfm.core.messages import Failure, Reply
from fedfm.core.parts import ServerState, Session
from fedfm.core.roster import Roster
from fedfm.core.round import Meter, RoundRecord, play, start
from fedfm.core.score import EARLY, SCORE, Score, has_ended_early, waited
from fedfm.core.version import VERSION
from fedfm.core.words import Metric, clean
from fedfm.federation import Federation
from fedfm.models.foundation import device_of, flops_per_token
from fedfm.observers.base import RunInfo, Watcher
from fedfm.recipe import dump, load, located, read
from fedfm.run.base import digests, require_base
from fedfm.run.budget import Budget
from fedfm.run.folder import COMPARE, MODEL, RECIPE, SPLIT, RunFolder
from fedfm.run.ledger import Ledger
from fedfm.run.log import logged
from fedfm.simulation import Simulation
from fedfm.site import Site
from fedfm.verbs import Describe, Evaluation

log = logging.getLogger(__name__)


def run(
    federation: Federation, rounds: int | None = None, *, out: Path | str | None = None, watchers: Sequence[Watcher] = ()
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Runs a federation; yields the state and the record of each round once it is committed. Round 0 is the evaluation before training.

    Args:
        rounds: Instead of the federation's own number.
        out: The run's folder, which must not hold a run yet; ``None`` leaves nothing on disk.
        watchers: Look on beside the federation's observers.

    Raises:
        PlanError: if the plan cannot mean what it says.
        RunError: if the folder holds a run already or cannot be written.
        RoundError: if a round fails under the recipe's rule; what was committed before stays, and ``resume`` goes on from it.
    """
    federation = located(federation if rounds is None else replace(federation, rounds=rounds))
    check.require(federation.resolved())
    if out is None:
        yield from _go(federation, None, watchers)
        return
    with RunFolder.create(Path(out), dump(federation)) as folder:
        try:
            with logged(folder.path) as notes:
                notes.begin()
                _note_start(folder, federation)
                yield from _go(federation, folder, watchers)
        except Exception:
            # A run that did not get as far as its first evaluation leaves nothing worth going on with.
            if not folder.journal.rounds:
                folder.discard()
            raise


def resume(
    path: Path | str, rounds: int | None = None, *, federation: Federation | None = None, watchers: Sequence[Watcher] = ()
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Goes on with the run in ``path`` from its last committed round, and ends bit-identical to a run that was never interrupted.

    Args:
        rounds: A new number of rounds in all.
        federation: A changed recipe; only ``rounds``, ``observers``, ``evaluate.patience`` and ``evaluate.min_delta`` may differ from what ran.

    A run that ended early goes on where more rounds, a larger patience or a smaller ``min_delta`` is asked for.

    Raises:
        RunError: if there is no run, its recipe has changed, or more rounds are done than are asked for.
    """
    path = Path(path)
    with RunFolder.open(path) as folder, logged(path) as notes:
        federation = read(path / RECIPE) if federation is None else located(federation)
        federation = federation if rounds is None else replace(federation, rounds=rounds)
        began, ran = folder.first("start"), folder.first("recipe")
        if ran is not None:
            _require_same(load(ran["text"]), federation, path)
        if began is not None:
            changed = [
                f"{name} {began.get(name)} -> {now}"
                for name, now in envelope(federation).items()
                if name != "time" and began.get(name) != now
            ]
            if changed:
                log.warning(
                    "This is not where the run began (%s): it goes on, but may differ from an unbroken one by float rounding.",
                    ", ".join(changed),
                )
        check.require(federation.resolved())
        done = max(len(folder.journal.rounds) - 1, 0)
        if done > federation.rounds:
            raise RunError(
                f"{path} has completed {done} rounds, more than the {federation.rounds} asked for. Ask for rounds={done} or more."
            )
        notes.begin()
        restored = folder.restore()
        if restored is None or (
            restored[0].round < federation.rounds and not _is_over(federation, folder.journal.scores[: restored[0].round + 1])
        ):
            (path / COMPARE).unlink(missing_ok=True)  # it compares a model that is about to change
        folder.write_text(RECIPE, dump(federation))
        if ran is None:
            _note_start(folder, federation)
        else:
            folder.note("resume", **envelope(federation), round=restored[0].round if restored else 0, rounds=federation.rounds)
        yield from _go(federation, folder, watchers, restored)


def envelope(federation: Federation) -> dict[str, Any]:
    """Where numbers come from, to the last bit: versions, device, threads, instruction set."""
    device = device_of(federation.engine.device)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "fedfm": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _note_start(folder: RunFolder, federation: Federation) -> None:
    text = dump(federation)
    folder.note("start", **envelope(federation), recipe=hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
    folder.note("recipe", text=text)


def _require_same(ran: Federation, asked: Federation, path: Path) -> None:
    before, after = (dump(_unchanging(f)).splitlines() for f in (ran, asked))
    if before != after:
        lines = [line for line in difflib.unified_diff(before, after, n=0, lineterm="") if not line.startswith(("---", "+++", "@@"))]
        raise RunError(
            f"The recipe of {path} has changed since its rounds were played; what follows would belong to neither. "
            "Only rounds and observers may change, and evaluate's patience and min_delta. Undo this, or start a new run:\n"
            + "\n".join(f"  {line}" for line in lines)
        )


def _unchanging(federation: Federation) -> Federation:
    """What must stay as it is while a run goes on."""
    return replace(federation, rounds=0, observers=(), evaluate=replace(federation.evaluate, patience=None, min_delta=0.0))


def _is_over(federation: Federation, scores: Sequence[Score]) -> bool:
    """Whether the run has ended before its last round."""
    return has_ended_early(scores, federation.rounds, federation.evaluate.patience, federation.evaluate.min_delta)


@dataclass
class _Watchers:
    """All who look on, as one."""

    all: Sequence[Watcher]
    closed: bool = False
    last_stage: str = ""

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None:
        if text != self.last_stage:
            log.info("%s", text)
        self.last_stage = text
        for watcher in self.all:
            watcher.stage(text, done, total)

    def start(self, info: RunInfo) -> None:
        since = "" if info.resumed_from is None else f", resumed after round {info.resumed_from}"
        log.info(
            "fedfm %s: %s, %d rounds of %d of %d clients, %s with %d parameters, %d trainable, on %s%s",
            VERSION, info.name, info.rounds, info.cohort_size, info.num_clients, info.model, info.num_params, info.num_trainable, info.device, since,
        )  # fmt: skip
        for watcher in self.all:
            watcher.start(info)

    def answer(self, round: int, answer: Reply | Failure) -> None:
        for watcher in self.all:
            watcher.answer(round, answer)

    def round(self, record: RoundRecord) -> None:
        pooled = record.metrics.get("eval", {}).get("pooled", {})
        numbers = {"train_loss": record.metrics.get("train_loss"), **pooled, "seconds": sum(record.seconds.values())}
        known = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
        log.info("round %d: %d asked, %d failed, %s", record.round, len(record.cohort), len(record.failures), known)
        for failure in record.failures:
            log.info("round %d: %s failed in %s: %s", record.round, failure.client, failure.stage, failure.reason)
        for watcher in self.all:
            watcher.round(record)

    def close(self, ledger: Ledger | None) -> None:
        if not self.closed:
            self.closed = True
            for watcher in self.all:
                watcher.close(None if ledger is None else ledger.to_json())


def _go(
    federation: Federation, folder: RunFolder | None, watchers: Sequence[Watcher], restored: tuple[ServerState, Ledger] | None = None
) -> Iterator[tuple[ServerState, RoundRecord]]:
    path = None if folder is None else folder.path
    with ExitStack() as stack:
        watch = _Watchers([*watchers, *(observer.open(path) for observer in federation.observers)])
        stack.callback(watch.close, None)
        site = _site(federation, folder, watch)
        if isinstance(site, Coordination):
            site = _named(site, folder, watch)
        plan, house = site.federation, site.house
        watch.stage("Loading the model")
        if folder is not None:
            house.choices.update(folder.choices())
            _note_data(folder, site)
            require_base(folder.first("base"), house.foundation, folder.path)
            if folder.first("base") is None:
                folder.note("base", **digests(house.foundation))
        check.require(plan, len(site.clients), params=house.start)
        watch.stage("Starting the engine")
        session = stack.enter_context(site.open())
        roster = _roster(folder, site, session)
        for finding in check.require(plan, len(site.clients), roster, house.start):
            if finding.level == "warning":
                log.warning("%s: %s", finding.where, finding.text)
        state, ledger = restored or (start(plan, house.start, roster.sizes()), Ledger())
        if state.round < plan.rounds and not (folder is not None and _is_over(plan, folder.journal.scores)):
            watch.stage("Trying the model with a few tokens")
            session.settle()
        if folder is not None:
            _note_choices(folder, house)
        budget = Budget.open(plan, house, path, ledger.privacy_head)
        game = _Game(site, session, roster, folder, watch, [] if folder is None else folder.journal.scores, budget)
        watch.start(game.info(None if restored is None else state.round))

        if restored is None:
            if plan.evaluate.due(0, plan.rounds):
                watch.stage(f"Evaluating before training, on {_tests(plan.evaluate.most(0, plan.rounds))}")
            record = game.evaluated(state, RoundRecord(0, (), (), {}, {}, 0, 0))
            ledger = game.commit(state, record, ledger)
            yield state, record
        if game.goes_on(state):
            watch.stage(f"Training round {state.round + 1}; the first round takes longer, because the data is read and memory is reserved")
        while game.goes_on(state):
            state, record = play(plan, state, session, site.clients, site.key, partial(watch.answer, state.round + 1), budget.account)
            if state.round == plan.rounds and plan.evaluate.due(state.round, plan.rounds):
                watch.stage(f"Evaluating after the last round, on {_tests(plan.evaluate.most(state.round, plan.rounds))}")
            record = game.evaluated(state, record)
            ledger = game.commit(state, record, ledger)
            yield state, record
        if folder is not None:
            watch.stage("Writing the model and the report")
            _finish(house, folder, state, ledger)
        watch.close(ledger)


def _site(federation: Federation, folder: RunFolder | None, watch: _Watchers) -> Site:
    """What this run is played from: the data on this machine, or the members that a consortium had when the run began."""
    path, members = None if folder is None else folder.path, federation.engine.members()
    began = None if folder is None else folder.first("roster")
    if members is not None and began is not None:
        members = Roster.from_note(began).ids
    return Simulation.build(federation, path, progress=watch.stage) if members is None else Coordination.build(federation, members, path)


def _named(site: Coordination, folder: RunFolder | None, watch: _Watchers) -> Coordination:
    """The site with the classes that the run began with: the recipe's, the base's, or those that the members tell when it begins."""
    known = None if folder is None else folder.first("labels")
    if known is not None:
        return site.with_classes(known["labels"])
    if site.house.lacks_classes:
        watch.stage("Asking the members which classes their rows have")
        site = site.with_classes(site.ask_classes())
        log.info("the members' rows have the classes %s", ", ".join(clean(label, 80) for label in site.house.labels[:40]))
    if folder is not None and site.house.labels:
        folder.note("labels", labels=list(site.house.labels))
    return site


def _tests(most: int | None) -> str:
    """What an evaluation is made on, in words."""
    return "all test data" if most is None else f"at most {most} test examples of each owner"


@dataclass(frozen=True)
class _Earlier:
    """The records of the rounds up to one, read from the journal each time they are asked for."""

    journal: Journal
    last: int

    def __iter__(self) -> Iterator[RoundRecord]:
        for record in self.journal.records(self.last):
            failures = tuple(Failure(failure["client"], failure["stage"], failure["reason"]) for failure in record["failures"])
            yield RoundRecord(**{**record, "cohort": tuple(record["cohort"]), "failures": failures})


def _note_data(folder: RunFolder, site: Site) -> None:
    """Which data the run began with; the same must be there when it goes on. What is elsewhere is not known here."""
    if not isinstance(site, Simulation):
        return
    owners = site.owners
    before = folder.first("data")
    if before is None:
        known = {"left_out": owners.left_out, "dropped": owners.dropped, "bad_rows": owners.bad_rows.to_json(), "labels": owners.labels}
        folder.note("data", fingerprint=owners.fingerprint, **known)
    elif before["fingerprint"] != owners.fingerprint:
        log.warning("The data is not what it was when %s began: it goes on, but not as an unbroken run would have.", folder.path)


def _note_choices(folder: RunFolder, house: House) -> None:
    """What was chosen for the whole run, before anything that was made with it counts."""
    if house.choices != folder.choices():
        folder.note("plan", **house.choices)


def _roster(folder: RunFolder | None, site: Site, session: Session) -> Roster:
    """What the owners tell of themselves: asked when a run begins, kept when it goes on."""
    known = None if folder is None else folder.first("roster")
    if known is not None:
        roster = Roster.from_note(known)
    else:
        plan, labels = site.federation, site.house.labels
        roster = Describe().roster(plan.channel, session, site.clients, labels, site.key)
    if folder is not None:
        if known is None:
            folder.note("roster", **roster.note())
        folder.write_rows(SPLIT, roster.picture())
    return roster


@dataclass
class _Game:
    """A run that is being played."""

    site: Site
    session: Session
    roster: Roster
    folder: RunFolder | None
    watch: _Watchers
    scores: list[Score]
    budget: Budget

    def goes_on(self, state: ServerState) -> bool:
        """Whether another round follows."""
        plan = self.site.federation
        if state.round >= plan.rounds or _is_over(plan, self.scores):
            return False
        refusal = self.budget.refusal()
        if refusal is not None:
            log.warning("The run ends after round %d of %d, because its privacy budget is spent: %s.", state.round, plan.rounds, refusal)
        return refusal is None

    def info(self, resumed_from: int | None) -> RunInfo:
        """What is known before the first round."""
        plan, house = self.site.federation, self.site.house
        spec = house.foundation.spec
        return RunInfo(
            name=plan.name,
            rounds=plan.rounds,
            num_clients=len(house.clients),
            cohort_size=plan.sampler.cohort_size(len(house.clients)),
            model=(spec.source or spec.architecture or "").rstrip("/").rpartition("/")[2],
            num_params=house.foundation.num_params,
            num_trainable=house.tuned.spec.size,
            device=str(house.foundation.device),
            threads=torch.get_num_threads(),
            choices=dict(house.choices),
            resumed_from=resumed_from,
            earlier=() if resumed_from is None or self.folder is None else _Earlier(self.folder.journal, resumed_from),
            metric=plan.task.metric,
        )

    def evaluated(self, state: ServerState, record: RoundRecord) -> RoundRecord:
        """The record with ``eval`` and the score among its metrics, where an evaluation is due; and with the reason, where the run ends early."""
        plan = self.site.federation
        if not plan.evaluate.due(record.round, plan.rounds):
            return record
        meter = Meter(self.session)
        began = meter.clock.now()
        sample = replace(plan, evaluate=replace(plan.evaluate, ends=plan.evaluate.max_examples))
        report = sampled = self._report(sample, state, meter)
        metrics = {**record.metrics, **_score(sampled)}
        early = self._ends_early(Score.of(record.round, {**metrics, "eval": sampled}))
        if early:
            metrics[EARLY] = early
            waiting = early["patience"]
            self.watch.stage(
                f"Ending early after round {record.round}: {waiting} evaluation{'' if waiting == 1 else 's'} without a better score"
            )
        if (early or record.round in (0, plan.rounds)) and not plan.evaluate.takes_the_sample(self._test_sizes()):
            # What the run ends with is evaluated on as much as its last round would have been.
            report = self._report(replace(plan, rounds=record.round), state, meter)
        for client, reason in report.get("failed", {}).items():
            log.warning("round %d: %s could not be evaluated: %s", record.round, client, reason)
        metrics |= {"eval": report, "bytes_evaluate": meter.bytes_up + meter.bytes_down}
        return replace(record, metrics=metrics, seconds={**record.seconds, "evaluate": meter.clock.now() - began})

    def _test_sizes(self) -> list[int | None]:
        known = [self.roster.holdings.get(client) for client in self.roster.ids]
        return [None if holding is None else holding.test for holding in known]

    def _report(self, plan: Federation, state: ServerState, meter: Meter) -> dict[str, Any]:
        house = self.site.house
        return Evaluation().report(plan, state, meter, house.clients, house.key, max(len(house.labels), 2))

    def _ends_early(self, score: Score) -> dict[str, Any]:
        """Why the run ends after this round; nothing where it goes on, or would have ended anyway."""
        plan = self.site.federation
        patience, min_delta = plan.evaluate.patience, plan.evaluate.min_delta
        if patience is None or score.round >= plan.rounds or waited([*self.scores, score], patience, min_delta) < patience:
            return {}
        return {"rounds": plan.rounds, "patience": patience, "min_delta": min_delta}

    def commit(self, state: ServerState, record: RoundRecord, ledger: Ledger) -> Ledger:
        """Makes a round last; the ledger after it."""
        house, folder = self.site.house, self.folder
        ledger = ledger.add(record, flops_per_token(house.foundation.num_params, house.tuned.spec.size))
        ledger = replace(ledger, privacy=tuple(self.budget.to_json()), privacy_head=self.budget.account.head)
        if folder is not None:
            with _uninterrupted():
                _note_choices(folder, house)
                folder.commit(state, record, ledger)
        self.scores.append(Score.of(record.round, record.metrics))
        self.watch.round(record)
        return ledger


def _score(report: Mapping[str, Any]) -> dict[str, Any]:
    """The headline of an evaluation on the sample; nothing where nobody has test data."""
    name = Metric.from_json(report.get("headline")).name
    return {SCORE: report["pooled"][name]} if name in report["pooled"] else {}


def _finish(house: House, folder: RunFolder, state: ServerState, ledger: Ledger) -> None:
    from fedfm.reports import render

    def write(to: Path) -> None:
        house.plan.tuning.save(house.foundation, state.params, to)
        house.foundation.tokenizer.save_pretrained(to)

    if stays_home(house):
        log.warning("model/ holds the parameters that stay at home as they were at the start; each owner's own are in its memory.")
    folder.remove_old_states()  # a crash may have left some
    folder.rewrite_folder(MODEL, write)
    folder.note("end", round=state.round, ledger=ledger.to_json())
    render(folder.path)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: held.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if held:
        signal.raise_signal(held[0])

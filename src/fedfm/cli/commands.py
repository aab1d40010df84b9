"""The commands that need a federation."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from fedfm.cli.completion import LEVELS
from fedfm.cli.parts import chosen_round, show_json
from fedfm.core import check as plans
from fedfm.core import words
from fedfm.core.bad_rows import BadRows
from fedfm.core.errors import ConfigError
from fedfm.core.parts import Finding, warn
from fedfm.core.roster import Roster
from fedfm.core.stage import unseen
from fedfm.core.tree import Tree
from fedfm.federation import Federation
from fedfm.observers.base import Watcher
from fedfm.observers.progress import Progress
from fedfm.recipe import dump, located, read
from fedfm.run.folder import LEDGER, METRICS, RECIPE, read_lines


def run(recipe: Path, overrides: Sequence[str], out: Path | None, dry_run: bool, telling: Telling, audited: bool = False) -> None:
    """``fedfm run``."""
    from fedfm.run.loop import run

    federation = located(read(recipe, overrides))
    if audited:
        from fedfm.run.audit import require_promise

        require_promise(federation.resolved())
    if dry_run:
        plans.require(federation.resolved())
        if telling.as_json:
            show_json({"recipe": dump(federation)})
        else:
            print(dump(federation), end="")
        return
    out = out or Path("runs") / federation.name
    _play(run(federation, out=out, watchers=telling.watchers()), out, telling)
    if audited:
        from fedfm.cli import audit

        audit.after_run(out, telling.quiet or telling.as_json)


def resume(path: Path, overrides: Sequence[str], telling: Telling) -> None:
    """``fedfm resume``."""
    from fedfm.run.loop import resume

    federation = read(path / RECIPE, overrides) if overrides and (path / RECIPE).is_file() else None
    _play(resume(path, federation=federation, watchers=telling.watchers()), path, telling)


def _play(rounds: Iterable[object], out: Path, telling: Telling) -> None:
    with stoppable(f"what was completed is kept. Go on with: {shlex.join(['fedfm', 'resume', str(out)])}"):
        for _ in rounds:
            pass
    model, report = str(out / "model"), str(out / "report.html")
    if telling.as_json:
        last = read_lines(out / METRICS)[-1:]
        ledger = json.loads((out / LEDGER).read_text(encoding="utf-8"))
        show_json({"run": str(out), "model": model, "report": report, "last_round": last[0] if last else None, "ledger": ledger})
    elif not telling.quiet:
        for told in json.loads((out / LEDGER).read_text(encoding="utf-8")).get("privacy", ()):
            print(f"privacy {words.clean(told['text'], 2000)}")
        print(f"model   {model}\nreport  {report}")


def compare(recipe: Path, overrides: Sequence[str], out: Path | None, telling: Telling) -> None:
    """``fedfm compare``."""
    from fedfm.reports import show_comparison
    from fedfm.run.compare import compare

    if recipe.is_dir():
        recipe, out = recipe / RECIPE, out or recipe
    federation = located(read(recipe, overrides))
    out = out or Path("runs") / federation.name
    watchers = telling.watchers()
    stage = Progress(file=telling.stream, live=False).stage if watchers else unseen
    with stoppable(f"what was completed is kept. Go on with: {shlex.join(['fedfm', 'compare', str(out)])}"):
        table = compare(federation, out, watchers=watchers, stage=stage).to_json()
    if telling.as_json:
        show_json(table)
        return
    if not telling.quiet:
        print()
    show_comparison(table)
    print(f"\nreport  {out / 'report.html'}")


def check(recipe: Path, overrides: Sequence[str], data: bool, as_json: bool) -> None:
    """``fedfm check``."""
    plan = located(read(recipe, overrides)).resolved()
    opened = _open(plan) if data else None
    findings = plans.check(plan, *((None, None, None) if opened is None else (len(opened.roster.ids), opened.roster, opened.params)))
    findings = [*findings, *([] if opened is None else opened.findings)]
    refused = any(finding.level == "refusal" for finding in findings)
    if as_json:
        known = {} if opened is None else opened.to_json()
        show_json({"recipe": str(recipe), "can_run": not refused, "findings": [asdict(finding) for finding in findings], **known})
    else:
        if opened is not None:
            opened.show()
        for finding in findings:
            print(f"{finding.level:<9} {finding.where}: {finding.text}")
    if refused:
        raise ConfigError(f"{recipe} is refused, for the reasons above.")
    if not as_json:
        print(f"{recipe} can run." if data else f"{recipe}: the plan is sound. Its model and data were not opened; --data does.")


@dataclass(frozen=True)
class _Opened:
    """What a recipe's model and data turned out to be.

    Args:
        params: The parameters that train.
        left_out: Owners without usable data, and why.
        bad_rows: Rows that cannot be used.
        read_as: How the files were read, where that was looked for.
        findings: What the plan alone does not show.
    """

    num_params: int
    num_trainable: int
    params: Tree
    roster: Roster
    left_out: Mapping[str, str]
    bad_rows: BadRows
    read_as: Mapping[str, str]
    findings: Sequence[Finding]

    def show(self) -> None:
        """Prints the sizes and a line for each owner."""
        print(f"{words.count(self.num_params)} parameters, {words.count(self.num_trainable)} trainable")
        for name, how in self.read_as.items():
            print(f"data.{name} is read with {words.clean(how)}")
        for row in self.roster.picture():
            bad = self.bad_rows.of(row["owner"])
            print(
                f"{words.clean(row['owner'], 32):<34}{words.count(row['train']):>8} train {words.count(row['test']):>7} test "
                f"{words.count(row['tokens']):>9} tokens"
                f"{f'   left out: {bad}' if bad else ''}"
            )
        for owner, why in self.left_out.items():
            print(f"left out  {words.clean(owner)}: {words.clean(why)}")
        if self.bad_rows.counts:
            print(words.clean(self.bad_rows.sentence()))

    def to_json(self) -> dict[str, object]:
        """The same in plain values."""
        sizes = {"parameters": self.num_params, "trainable": self.num_trainable}
        data = {"left_out": dict(self.left_out), "bad_rows": self.bad_rows.to_json(), "read_as": dict(self.read_as)}
        return {**sizes, "owners": self.roster.picture(), **data}


def _open(plan: Federation) -> _Opened:
    from fedfm.data.overlap import shared_rows
    from fedfm.simulation import Simulation
    from fedfm.verbs import Describe

    simulation = Simulation.build(plan)
    house = simulation.house
    with simulation.open() as session:
        roster = Describe().roster(plan.channel, session, house.clients, house.labels, house.key)
    findings = []
    shared, num_rows = shared_rows(plan.data, plan.task.columns)
    if shared:
        findings.append(
            warn("data", f"{shared} of {num_rows} test rows also stand in the training data, where they are learned by heart. Remove them.")
        )
    owners = simulation.owners
    sizes = house.foundation.num_params, house.tuned.spec.size
    return _Opened(*sizes, house.start, roster, owners.left_out, owners.bad_rows, owners.read_as, findings)


def export(run: Path, to: Path, merge: bool, round: str) -> None:
    """``fedfm export``."""
    from fedfm.run.result import Result

    result = Result.open(run, chosen_round(round))
    result.export(to, merge)
    print(to if round == "last" else f"{to} (round {result.state.round})")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@contextmanager
def stoppable(remains: str) -> Iterator[None]:
    """Ends the process on Ctrl-C and on SIGTERM with a word on what remains.

    Args:
        remains: What was done with the work, and how to go on.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"\nStopped; {remains}", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass(frozen=True)
class Telling:
    """What a command that runs says while it does.

    Args:
        quiet: No progress; warnings and errors alone.
        as_json: One JSON object at the end on stdout, and everything else on stderr.
        log_level: From which level on messages of the log are shown.
    """

    quiet: bool = False
    as_json: bool = False
    log_level: str = "warning"

    @property
    def stream(self) -> TextIO:
        """Where progress goes."""
        return sys.stderr if self.as_json else sys.stdout

    def watchers(self) -> list[Watcher]:
        """The progress, if it is wanted; what goes wrong on the way (a client that fails, an owner left out) is told as it happens.

        Raises:
            ConfigError: if there is no such level.
        """
        level = logging.getLevelNamesMapping().get(self.log_level.upper())
        if self.log_level.lower() not in LEVELS or level is None:
            raise ConfigError(f"--log-level is {words.clean(self.log_level, 40)}; it must be {', '.join(LEVELS)}.")
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Stderr()])
        # Ours alone: below a warning, what the libraries log is for their authors.
        logging.getLogger("fedfm").setLevel(level)
        return [] if self.quiet else [Progress(file=self.stream)]


class _Stderr(logging.Handler):
    """To what stderr is when a record arrives: a live display puts its own in place, above which lines scroll.

    Owners' names and clients' words are in these lines, and must neither steer a terminal nor make a line of their own.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        print(text if record.exc_info else words.clean(text, 4000), file=sys.stderr)

"""The commands that need a federation."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedfm.core import check as plans
from fedfm.core import words
from fedfm.core.errors import ConfigError
from fedfm.observers.progress import Progress
from fedfm.recipe import dump, located, read
from fedfm.run.folder import RECIPE


def run(recipe: Path, overrides: Sequence[str], out: Path | None, dry_run: bool) -> None:
    """``fedfm run``."""
    from fedfm.run.loop import run

    federation = located(read(recipe, overrides))
    if dry_run:
        plans.require(federation.resolved())
        print(dump(federation), end="")
        return
    out = out or Path("runs") / federation.name
    _play(run(federation, out=out, watchers=[_progress()]), out)


def resume(path: Path, overrides: Sequence[str]) -> None:
    """``fedfm resume``."""
    from fedfm.run.loop import resume

    federation = read(path / RECIPE, overrides) if overrides and (path / RECIPE).is_file() else None
    _play(resume(path, federation=federation, watchers=[_progress()]), path)


def _play(rounds: Iterable[object], out: Path) -> None:
    with _stoppable(f"fedfm resume {out}"):
        for _ in rounds:
            pass
    print(f"model   {out / 'model'}\nreport  {out / 'report.html'}")


def compare(recipe: Path, overrides: Sequence[str], out: Path | None) -> None:
    """``fedfm compare``."""
    from fedfm.reports import show_comparison
    from fedfm.run.compare import compare

    if recipe.is_dir():
        recipe, out = recipe / RECIPE, out or recipe
    federation = located(read(recipe, overrides))
    out = out or Path("runs") / federation.name
    progress = _progress()
    with _stoppable(f"fedfm compare {out}"):
        table = compare(federation, out, watchers=[progress], stage=Progress(live=False).stage).to_json()
    print()
    show_comparison(table)
    print(f"\nreport  {out / 'report.html'}")


def check(recipe: Path, overrides: Sequence[str], data: bool) -> None:
    """``fedfm check``."""
    plan = located(read(recipe, overrides)).resolved()
    num_clients, roster = None, None
    if data:
        from fedfm.simulation import Simulation
        from fedfm.verbs import Describe

        simulation = Simulation.build(plan)
        house = simulation.house
        print(f"{words.count(house.foundation.num_params)} parameters, {words.count(house.tuned.spec.size)} trainable")
        num_clients = len(house.clients)
        with simulation.open() as session:
            roster = Describe().roster(plan.channel, session, house.clients, house.labels, house.key)
        for row in roster.picture():
            print(
                f"{words.clean(row['owner'], 32):<34}{words.count(row['train']):>8} train {words.count(row['test']):>7} test "
                f"{words.count(row['tokens']):>9} tokens"
            )
        for owner, why in simulation.owners.left_out.items():
            print(f"left out  {words.clean(owner)}: {words.clean(why)}")
    findings = plans.check(plan, num_clients, roster)
    for finding in findings:
        print(f"{finding.level:<9} {finding.where}: {finding.text}")
    if any(finding.level == "refusal" for finding in findings):
        raise ConfigError(f"{recipe} is refused, for the reasons above.")
    print(f"{recipe} can run." if data else f"{recipe}: the plan is sound. Its model and data were not opened; --data does.")


def export(run: Path, to: Path, merge: bool) -> None:
    """``fedfm export``."""
    from fedfm.run.result import Result

    Result.open(run).export(to, merge)
    print(to)


def generate(run: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """``fedfm generate``."""
    from fedfm.run.result import Result

    print(Result.open(run).generate(prompt, max_new_tokens, temperature, seed))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@contextmanager
def _stoppable(command: str) -> Iterator[None]:
    """Ends the process on Ctrl-C and on SIGTERM with a word on how to go on.

    Args:
        command: What goes on with the work.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"\nStopped; what was completed is kept. Go on with: {command}", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _progress() -> Progress:
    # What goes wrong on the way (a client that fails, an owner left out) is told as it happens.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Stderr()])
    return Progress()


class _Stderr(logging.Handler):
    """To what stderr is when something is told: a live display puts its own in place, above which lines scroll."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)

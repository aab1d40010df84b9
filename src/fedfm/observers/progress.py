"""Progress worth watching: a live display on a terminal, one plain line per round anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from fedfm.core.words import change, clean, count, duration, loss, number, size, sparkline
from fedfm.observers.base import RunInfo, Watcher

if TYPE_CHECKING:
    from fedfm.core.messages import Failure, Reply
    from fedfm.core.round import RoundRecord


class Progress(Watcher):
    """Shows a run while it goes.

    Args:
        file: Where to; standard output by default.
        live: Whether to redraw in place; by default, where ``file`` is a terminal.
        owners: Owners shown at most in the live table: the largest ones, and always the worst.
        clock: Seconds, for the time left.
    """

    def __init__(
        self, file: TextIO | None = None, live: bool | None = None, owners: int = 10, clock: Callable[[], float] = time.monotonic
    ) -> None:
        file = file or sys.stdout
        story = Story(clock)
        self.painter: Watcher = _Live(file, story, owners) if (file.isatty() if live is None else live) else _Lines(file, story)
        self.story = story

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Shows what is being prepared."""
        self.painter.stage(text, done, total)

    def start(self, info: RunInfo) -> None:
        """Shows what is about to run."""
        self.story.start(info)
        self.painter.start(info)

    def answer(self, round: int, answer: Reply | Failure) -> None:
        """Counts the answers of the round in flight."""
        self.story.answer(answer)
        self.painter.answer(round, answer)

    def round(self, record: RoundRecord) -> None:
        """Shows the round."""
        self.story.round(record)
        self.painter.round(record)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Leaves the last state on the screen and one closing line."""
        self.painter.close(summary)


class Story:
    """What the rounds so far add up to.

    Attributes:
        history: Held-out loss of each owner at each evaluation; training loss where nothing is evaluated.
        sizes: What each owner's update weighs (its examples).
        rate: Tokens per second of the last round that trained.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.started, self.info = False, RunInfo("run", 0, 0, 0, "", 0, 0)
        self.began = self.last = clock()
        self.laps: deque[float] = deque(maxlen=8)
        self.done = 0
        self.answered: set[str] = set()
        self.pooled: list[float | None] = []
        self.train: float | None = None
        self.worst: tuple[str, float] | None = None
        self.history: dict[str, list[float | None]] = {}
        self.evaluated = False
        self.sizes: dict[str, float] = {}
        self.rate: float | None = None
        self.bytes_up = self.bytes_down = 0
        self.failures: list[tuple[int, Failure]] = []

    def start(self, info: RunInfo) -> None:
        """Time runs from here."""
        self.started, self.info, self.done = True, info, info.resumed_from or 0
        self.began = self.last = self.clock()

    def answer(self, answer: Reply | Failure) -> None:
        """One more of the cohort has answered."""
        self.answered.add(answer.client)

    def round(self, record: RoundRecord) -> None:
        """Adds a round."""
        now = self.clock()
        if record.round > 0:
            self.laps.append(now - self.last)
        self.last, self.done = now, record.round
        self.answered.clear()
        self.bytes_up += record.bytes_up
        self.bytes_down += record.bytes_down
        self.failures.extend((record.round, failure) for failure in failures(record))
        self.train = number(record.metrics.get("train_loss"))
        for client, told in record.clients.items():
            self.sizes[client] = max(self.sizes.get(client, 0.0), number(told.get("weight")) or 0.0)
        self.rate = tokens_per_second(record) or self.rate
        report = record.metrics.get("eval")
        if report:
            if not self.evaluated:
                self.history.clear()
            self.evaluated = True
            self.pooled.append(number(report.get("pooled", {}).get("loss")))
            seen = {owner: number(told.get("loss")) for owner, told in report.get("owners", {}).items()}
        elif not self.evaluated:
            seen = {client: number(told.get("loss")) for client, told in record.clients.items()}
        else:
            return
        for owner, value in seen.items():
            self.history.setdefault(owner, []).append(value)
        self.worst = max(
            ((owner, value) for owner, value in seen.items() if value is not None), key=lambda item: item[1], default=self.worst
        )

    @property
    def loss(self) -> float | None:
        """The pooled held-out loss of the last evaluation."""
        return self.pooled[-1] if self.pooled else None

    @property
    def left(self) -> float | None:
        """Seconds until the last round, at the pace of the last few."""
        return sum(self.laps) / len(self.laps) * (self.info.rounds - self.done) if self.laps else None

    def largest(self, limit: int) -> list[str]:
        """At most ``limit`` owners by size, the worst among them."""
        owners = sorted(self.history, key=lambda owner: (-self.sizes.get(owner, 0.0), owner))
        shown = owners[:limit]
        if self.worst and self.worst[0] not in shown:
            shown[-1:] = [self.worst[0]]
        return shown

    def title(self) -> str:
        """The run in a line."""
        info = self.info
        share = f" ({100 * info.num_trainable / info.num_params:.3g} %)" if info.num_params else ""
        choices = [f"{clean(name)} {clean(value)}" for name, value in info.choices.items() if value]
        parts = [
            f"{clean(info.name)}: {clean(info.model)}, {count(info.num_params)} parameters, {count(info.num_trainable)} trainable{share}",
            f"{info.num_clients} owners, {info.cohort_size} a round",
            *choices,
            f"{info.device} x {info.threads}" if info.device == "cpu" else info.device,
        ]
        if info.resumed_from is not None:
            parts.append(f"resumed after round {info.resumed_from}")
        return " | ".join(parts)

    def ending(self, finished: bool) -> str:
        """The run's closing line."""
        text = f"{'done' if finished else 'stopped'} after round {self.done}/{self.info.rounds} in {duration(self.clock() - self.began)}"
        if self.loss is not None and len(self.pooled) > 1:
            text += f": loss {loss(self.pooled[0])} -> {loss(self.loss)} ({change(self.pooled[0], self.loss)})"
        text += f", {size(self.bytes_up)} up, {size(self.bytes_down)} down"
        return text + (f", {len(self.failures)} failed {'answer' if len(self.failures) == 1 else 'answers'}" if self.failures else "")


def tokens_per_second(record: RoundRecord) -> float | None:
    """Training tokens of a round over the seconds it trained."""
    seconds = number(record.seconds.get("train"))
    tokens = sum(number(told.get("tokens")) or 0.0 for told in record.clients.values())
    return tokens / seconds if tokens and seconds else None


def failures(record: RoundRecord) -> list[Failure]:
    """Who failed in training and in evaluation."""
    from fedfm.core.messages import Failure

    report = record.metrics.get("eval") or {}
    return [*record.failures, *(Failure(client, "evaluate", reason) for client, reason in report.get("failed", {}).items())]


class _Lines(Watcher):
    """One aligned line per round, for logs and pipes."""

    def __init__(self, file: TextIO, story: Story) -> None:
        self.file, self.story = file, story
        self.said: tuple[str, float] = ("", 0.0)

    def print(self, text: str) -> None:
        # An owner's name that the log's encoding lacks must not end a run.
        encoding = self.file.encoding or "utf-8"
        self.file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self.file.flush()

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None:
        now = self.story.clock()
        # A line when something begins and ends, and every five seconds in between: a log is read later.
        if text == self.said[0] and done != total and now - self.said[1] < 5:
            return
        self.said = (text, now)
        self.print(f"- {clean(text)}" + ("" if done is None else f" {done}" + ("" if total is None else f"/{total}")))

    def start(self, info: RunInfo) -> None:
        self.print(self.story.title())
        cells = ("round", "loss", "change", "train", "worst owner", "tokens/s", "up", "down", "time", "left")
        self.print(self.row(*cells))

    @staticmethod
    def row(round: str, loss: str, change: str, train: str, worst: str, rate: str, up: str, down: str, time: str, left: str) -> str:
        return f"{round:>9} {loss:>8} {change:>9} {train:>8}  {worst:<30} {rate:>8} {up:>8} {down:>8} {time:>8} {left:>8}".rstrip()

    def round(self, record: RoundRecord) -> None:
        story = self.story
        evaluated = bool(record.metrics.get("eval"))
        worst = f"{clean(story.worst[0], 22)} {loss(story.worst[1])}" if story.worst else "-"
        self.print(
            self.row(
                f"{record.round}/{story.info.rounds}",
                loss(story.loss) if evaluated else "-",
                change(story.pooled[0], story.loss) if evaluated and len(story.pooled) > 1 else "-",
                loss(story.train),
                worst,
                count(tokens_per_second(record)),
                size(record.bytes_up),
                size(record.bytes_down),
                duration(story.last - story.began),
                duration(story.left),
            )
        )
        for failure in failures(record):
            self.print(f"{'':>9} {clean(failure.client)} failed in {clean(failure.stage)}: {clean(failure.reason)}")

    def close(self, summary: Mapping[str, Any] | None) -> None:
        # A run that never began ends in its error alone.
        if self.story.started:
            self.print(self.story.ending(summary is not None))


class _Live(Watcher):
    """A display redrawn in place."""

    def __init__(self, file: TextIO, story: Story, owners: int) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.story, self.owners = story, owners
        self.bars = Bars(
            SpinnerColumn(finished_text="✓"), TextColumn("{task.description}", markup=False), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn(),
        )  # fmt: skip
        self.stages: dict[str, Any] = {}
        self.rounds: Any = None
        self.console = Console(file=file, force_terminal=True)
        self.live = Live(self.bars, console=self.console, refresh_per_second=5)

    def begin(self) -> None:
        """Takes the screen; not before there is something to show, for a run that is refused leaves it as it was."""
        if not self.live.is_started:
            self.live.start()

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None:
        self.begin()
        for name, task in self.stages.items():
            if name != text:
                self.bars.update(task, visible=False)
        if text not in self.stages:
            self.stages[text] = self.bars.add_task(clean(text), total=total)
        self.bars.update(self.stages[text], completed=done or 0, total=total, visible=True)

    def start(self, info: RunInfo) -> None:
        self.begin()
        self.hide_stages()
        self.rounds = self.bars.add_task("rounds", total=info.rounds, completed=info.resumed_from or 0)
        self.draw()

    def hide_stages(self) -> None:
        for task in self.stages.values():
            self.bars.remove_task(task)
        self.stages.clear()

    def answer(self, round: int, answer: Reply | Failure) -> None:
        n, cohort = len(self.story.answered), self.story.info.cohort_size
        # A cohort's answers move the bar within the round.
        self.bars.update(self.rounds, completed=round - 1 + min(n / max(cohort, 1), 1) * 0.999)
        self.bars.update(self.rounds, description=f"round {round}, {n} of {cohort} answered")

    def round(self, record: RoundRecord) -> None:
        self.hide_stages()
        self.bars.update(self.rounds, completed=record.round, description=f"round {record.round}")
        self.draw()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if not self.live.is_started:
            return
        self.hide_stages()
        if self.story.started:
            self.draw(self.story.ending(summary is not None))
        self.live.stop()

    def draw(self, last: str | None = None) -> None:
        """Swaps in a new picture; only the bars change between two calls."""
        from rich.console import Group
        from rich.text import Text

        story = self.story
        parts: list[Any] = [Text(story.title(), style="bold", overflow="fold"), self.bars]
        numbers = Text()
        if story.loss is not None:
            numbers.append(f"loss {loss(story.loss)} ", "bold")
            numbers.append(
                f"({change(story.pooled[0], story.loss)})  ", "green" if story.loss <= (story.pooled[0] or story.loss) else "red"
            )
            numbers.append(sparkline(story.pooled, 24) + "  ", "cyan")
        if story.train is not None:
            numbers.append(f"train {loss(story.train)}  ")
        numbers.append(f"{count(story.rate)} tokens/s  ↑ {size(story.bytes_up)}  ↓ {size(story.bytes_down)}  ")
        if last is None:
            numbers.append(f"{duration(story.left)} left", "dim")
        parts.append(numbers)
        if story.history:
            parts.append(self.table())
        for round, failure in story.failures[-3:]:
            parts.append(Text(f"✗ round {round}: {clean(failure.client)} failed in {clean(failure.stage)}: {clean(failure.reason)}", "red"))
        if len(story.failures) > 3:
            parts.append(Text(f"  and {len(story.failures) - 3} earlier failures", "red"))
        if last is not None:
            parts.append(Text(last, "bold"))
        self.live.update(Group(*parts), refresh=True)

    def table(self) -> Any:
        """Loss per owner with its trend."""
        from rich.table import Table
        from rich.text import Text

        story = self.story
        shown = story.largest(max(1, min(self.owners, self.console.height - 10)))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("owner", max_width=32, no_wrap=True)
        for name in ("examples", "loss" if story.evaluated else "training loss", "change"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("trend", min_width=16, no_wrap=True)
        for owner in shown:
            values = story.history[owner]
            first, now = number(values[0]), number(values[-1])
            worst = story.worst is not None and owner == story.worst[0]
            better = first is not None and now is not None and now <= first
            table.add_row(
                Text(clean(owner, 32)),
                Text(count(story.sizes[owner]) if owner in story.sizes else "-"),
                Text(loss(now)),
                Text(change(first, now), "green" if better else "red"),
                Text.assemble((sparkline(values), "cyan"), ("  worst" if worst else "", "bold red")),
            )
        rest = len(story.history) - len(shown)
        if rest:
            table.add_row(Text(f"and {rest} smaller owners", "dim"))
        return table

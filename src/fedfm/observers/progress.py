"""Progress worth watching: a live display on a terminal, one plain line per round anywhere else."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from fedfm.core.score import Score, best
from fedfm.core.words import Metric, clean, count, duration, loss, number, size, sparkline
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
    """What all rounds of the run add up to, those of earlier sessions included.

    Attributes:
        pooled: The headline metric on everybody's held-out data, at each evaluation.
        error: Its standard error at the last evaluation, where that was on a sample.
        history: The headline metric of each owner at each evaluation; training loss where nothing is evaluated.
        scores: Of each round, on the test examples that all rounds are compared on.
        sizes: What each owner's update weighs (its examples).
        rate: Tokens per second of the last round that trained.
        earlier: Seconds and bytes of earlier sessions.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.started, self.info = False, RunInfo("run", 0, 0, 0, "", 0, 0)
        self.began = self.last = clock()
        self.laps: deque[float] = deque(maxlen=8)
        self.done = 0
        self.answered: set[str] = set()
        self.pooled: list[float | None] = []
        self.error: float | None = None
        self.train: float | None = None
        self.worst: tuple[str, float] | None = None
        self.history: dict[str, list[float | None]] = {}
        self.scores: list[Score] = []
        self.evaluated = False
        self.sizes: dict[str, float] = {}
        self.rate: float | None = None
        self.bytes_up = self.bytes_down = 0
        self.failures: list[tuple[int, Failure]] = []
        self.earlier = Earlier()

    @property
    def metric(self) -> Metric:
        """What ``pooled`` and ``history`` hold."""
        return self.info.metric

    def start(self, info: RunInfo) -> None:
        """Time runs from here. What an earlier session did is counted first."""
        self.started, self.info, self.done = True, info, info.resumed_from or 0
        seconds = 0.0
        for record in info.earlier:
            self.add(record)
            seconds += sum(number(value) or 0.0 for value in record.seconds.values())
        self.earlier = Earlier(seconds, self.bytes_up, self.bytes_down)
        self.began = self.last = self.clock()

    def answer(self, answer: Reply | Failure) -> None:
        """One more of the cohort has answered."""
        self.answered.add(answer.client)

    def round(self, record: RoundRecord) -> None:
        """Adds a round that was played now."""
        now = self.clock()
        if record.round > 0:
            self.laps.append(now - self.last)
        self.last = now
        self.answered.clear()
        self.add(record)

    def add(self, record: RoundRecord) -> None:
        """Adds what a round's record says."""
        self.done = record.round
        self.scores.append(Score.of(record.round, record.metrics))
        self.bytes_up += record.bytes_up
        self.bytes_down += record.bytes_down
        self.failures.extend((record.round, failure) for failure in failures(record))
        self.train = number(record.metrics.get("train_loss"))
        for client, numbers in record.clients.items():
            self.sizes[client] = max(self.sizes.get(client, 0.0), number(numbers.get("weight")) or 0.0)
        self.rate = tokens_per_second(record) or self.rate
        report, metric = record.metrics.get("eval"), self.metric
        if report:
            if not self.evaluated:
                self.history.clear()
            self.evaluated = True
            self.pooled.append(number(report.get("pooled", {}).get(metric.name)))
            self.error = number(report.get("error"))
            values = {owner: number(metrics.get(metric.name)) for owner, metrics in report.get("owners", {}).items()}
        elif not self.evaluated:
            metric = Metric()
            values = {client: number(numbers.get("loss")) for client, numbers in record.clients.items()}
        else:
            return
        for owner, value in values.items():
            self.history.setdefault(owner, []).append(value)
        known = [(owner, value) for owner, value in values.items() if value is not None]
        self.worst = max(known, key=lambda item: metric.cost(item[1]), default=self.worst)

    @property
    def shown(self) -> Metric:
        """What ``history`` and ``worst`` hold: the headline, or the training loss where nothing is evaluated."""
        return self.metric if self.evaluated else Metric()

    @property
    def value(self) -> float | None:
        """The pooled headline of the last evaluation."""
        return self.pooled[-1] if self.pooled else None

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.earlier.seconds + self.last - self.began

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
        session = self.clock() - self.began
        text = f"{'done' if finished else 'stopped'} after round {self.done}/{self.info.rounds}"
        early = self.scores[-1].early if self.scores else None
        if early is not None:
            text += f" (ended early: no better score in {early['patience']} evaluations)"
        text += f" in {duration(self.earlier.seconds + session)}"
        first, last, show = self.pooled[0] if self.pooled else None, self.value, self.metric.show
        if last is not None and len(self.pooled) > 1:
            text += f": {self.metric.title} {show(first)} -> {show(last)} ({self.metric.change(first, last)})"
        text += self.best_round()
        text += f", {size(self.bytes_up)} up, {size(self.bytes_down)} down"
        if self.info.resumed_from is not None:
            up, down = self.bytes_up - self.earlier.bytes_up, self.bytes_down - self.earlier.bytes_down
            text += f" in the whole run ({duration(session)}, {size(up)} up and {size(down)} down in this session)"
        return text + (f", {len(self.failures)} failed {'answer' if len(self.failures) == 1 else 'answers'}" if self.failures else "")

    def best_round(self) -> str:
        """The best round where it is not the last; nothing otherwise."""
        scores = {score.round: score.cost for score in self.scores}
        chosen = best(self.scores)
        if chosen is None or chosen == self.done:
            return ""
        value = self.metric.cost(scores[chosen] or 0.0)
        return f", best round {chosen} with {self.metric.title} {self.metric.show(value)} on the sample of test data that chose it (optimistic)"


@dataclass(frozen=True)
class Earlier:
    """What the sessions before this one took."""

    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


def tokens_per_second(record: RoundRecord) -> float | None:
    """Training tokens of a round over the seconds it trained."""
    seconds = number(record.seconds.get("train"))
    tokens = sum(number(numbers.get("tokens")) or 0.0 for numbers in record.clients.values() or [record.metrics])
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
        self.last_stage: tuple[str, float] = ("", 0.0)

    def print(self, text: str) -> None:
        # An owner's name that the log's encoding lacks must not end a run.
        encoding = self.file.encoding or "utf-8"
        self.file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self.file.flush()

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None:
        now = self.story.clock()
        # A line when something begins and ends, and every five seconds in between: a log is read later.
        if text == self.last_stage[0] and done != total and now - self.last_stage[1] < 5:
            return
        self.last_stage = (text, now)
        self.print(f"- {clean(text)}" + ("" if done is None else f" {done}" + ("" if total is None else f"/{total}")))

    def start(self, info: RunInfo) -> None:
        self.print(self.story.title())
        self.print(
            self.row(
                ("round", info.metric.title, "+-", "change", "train loss"),
                "worst owner",
                ("tokens/s", "up", "down", "train", "evaluate", "aggregate", "time", "left"),
            )
        )

    @staticmethod
    def row(results: Sequence[str], worst: str, costs: Sequence[str]) -> str:
        left = " ".join(f"{cell:>{width}}" for cell, width in zip(results, (9, 8, 7, 12, 10), strict=True))
        return f"{left}  {worst:<30} {' '.join(f'{cell:>9}' for cell in costs)}".rstrip()

    def round(self, record: RoundRecord) -> None:
        story, metric = self.story, self.story.metric
        evaluated = bool(record.metrics.get("eval"))
        worst = f"{clean(story.worst[0], 20)} {story.shown.show(story.worst[1])}" if story.worst else "-"
        seconds = [duration(record.seconds.get(name)) for name in ("train", "evaluate", "aggregate")]
        results = (
            f"{record.round}/{story.info.rounds}",
            metric.show(story.value) if evaluated else "-",
            metric.show(story.error) if evaluated else "-",
            metric.change(story.pooled[0], story.value) if evaluated and len(story.pooled) > 1 else "-",
            loss(story.train),
        )
        traffic = (count(tokens_per_second(record)), size(record.bytes_up), size(record.bytes_down))
        self.print(self.row(results, worst, (*traffic, *seconds, duration(story.seconds), duration(story.left))))
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
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in record.seconds.items())
        self.bars.update(self.rounds, completed=record.round, description=f"round {record.round}" + (f" ({spent})" if spent else ""))
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
        metric, first = story.metric, story.pooled[0] if story.pooled else None
        if story.value is not None:
            error = "" if story.error is None else f"± {metric.show(story.error)} "
            numbers.append(f"{metric.title} {metric.show(story.value)} {error}", "bold")
            numbers.append(f"({metric.change(first, story.value)})  ", "red" if metric.is_better(first, story.value) else "green")
            numbers.append(sparkline(story.pooled, 24) + "  ", "cyan")
        if story.train is not None:
            numbers.append(f"train loss {loss(story.train)}  ")
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
        """The headline of each owner with its trend."""
        from rich.table import Table
        from rich.text import Text

        story, metric = self.story, self.story.shown
        shown = story.largest(max(1, min(self.owners, self.console.height - 10)))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("owner", max_width=32, no_wrap=True)
        for name in ("examples", metric.title if story.evaluated else "training loss", "change"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("trend", min_width=16, no_wrap=True)
        for owner in shown:
            values = story.history[owner]
            first, now = number(values[0]), number(values[-1])
            worst = story.worst is not None and owner == story.worst[0]
            better = first is not None and now is not None and not metric.is_better(first, now)
            table.add_row(
                Text(clean(owner, 32)),
                Text(count(story.sizes[owner]) if owner in story.sizes else "-"),
                Text(metric.show(now)),
                Text(metric.change(first, now), "green" if better else "red"),
                Text.assemble((sparkline(values), "cyan"), ("  worst" if worst else "", "bold red")),
            )
        rest = len(story.history) - len(shown)
        if rest:
            table.add_row(Text(f"and {rest} smaller owners", "dim"))
        return table

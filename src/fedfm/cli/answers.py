"""The commands that ask a run's model: evaluate, predict, generate."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm.cli.parts import chosen_round, show_json
from fedfm.core import words
from fedfm.core.errors import ConfigError, DataError
from fedfm.core.stage import Stage, unseen
from fedfm.core.words import Metric

if TYPE_CHECKING:
    from fedfm.observers.progress import Progress
    from fedfm.run.result import Result

_SHOWN = 40  # owners in the table; --json has all


@dataclass(frozen=True)
class Model:
    """Which model is asked.

    Args:
        round: ``last``, ``best``, or a round's number.
    """

    run: Path
    round: str = "last"
    device: str = "auto"

    def open(self) -> Result:
        """The run's base with the tuning of that round.

        Raises:
            ConfigError: if that is no round.
        """
        from fedfm.run.result import Result

        return Result.open(self.run, chosen_round(self.round), self.device)


@dataclass(frozen=True)
class Asked:
    """What the two commands about a file share.

    Args:
        columns: ``NAME=COLUMN`` each.
        delimiter: What stands between the values of a csv file, where that is not as in the recipe.
        encoding: How its characters are written, likewise.
        quiet: No progress.
    """

    model: Model
    file: str
    columns: Sequence[str] = ()
    delimiter: str | None = None
    encoding: str | None = None
    quiet: bool = False
    as_json: bool = False

    def renamed(self) -> dict[str, str]:
        """The file's columns by the task's names for them.

        Raises:
            ConfigError: if one is not ``NAME=COLUMN``.
        """
        pairs = [text.partition("=") for text in self.columns]
        for text, (name, _, column) in zip(self.columns, pairs, strict=True):
            if not name or not column:
                raise ConfigError(f"--column is {words.clean(text, 80)}; it is NAME=COLUMN, such as text=review.")
        return {name: column for name, _, column in pairs}

    def stage(self) -> Stage | None:
        """Progress on stderr, for stdout may be read by a program."""
        return None if self.quiet else _progress().stage


def evaluate(asked: Asked, by: str | None) -> None:
    """``fedfm evaluate``."""
    from fedfm.run import asking

    columns = asked.renamed()
    with _told():
        report = asking.evaluate(asked.model.open(), asked.file, by, columns, asked.stage(), asking.Form(asked.delimiter, asked.encoding))
    if asked.as_json:
        show_json({"run": str(asked.model.run), "file": asked.file, **report})
    else:
        print("\n".join(_report_lines(report)))


def predict(asked: Asked, to: Path, force: bool, probabilities: bool, prefix: str, drawing: Mapping[str, Any]) -> None:
    """``fedfm predict``."""
    from fedfm.run.asking import Answers, Form, Target
    from fedfm.run.asking import predict as write
    from fedfm.run.generation import Drawing

    target, columns = Target(to, force), asked.renamed()
    # Before the model is loaded, which takes long.
    target.require(asked.file)
    how = Drawing(**drawing)
    with _told():
        answers = Answers(asked.model.open(), columns, probabilities, prefix, how)
        write(answers, asked.file, target, asked.stage(), Form(asked.delimiter, asked.encoding))
    if answers.unreadable:
        print(f"{answers.unreadable} lines of {words.clean(asked.file, 200)} cannot be read and are left out.", file=sys.stderr)
    if answers.unanswered:
        print(
            f"{answers.unanswered} of {answers.rows} rows have no answer; their places are empty. "
            f"The first: {words.clean(answers.reason, 400)}",
            file=sys.stderr,
        )
    if asked.as_json:
        known = {
            "rows": answers.rows,
            "unanswered": answers.unanswered,
            "unreadable": answers.unreadable,
            "columns": list(answers.names.values()),
        }
        show_json({"run": str(asked.model.run), "file": asked.file, "to": str(to), **known})
    else:
        print(to)


def generate(model: Model, prompts: Sequence[str], file: Path | None, drawing: Mapping[str, Any], quiet: bool, as_json: bool) -> None:
    """``fedfm generate``."""
    from fedfm.run.generation import Drawing

    how = Drawing(**drawing)
    asked = [*_given(prompts), *([] if file is None else _lines(file))]
    if not asked:
        raise ConfigError("There is no prompt. Give some as arguments, a file of them (--file), or - for standard input.")
    stage = unseen if quiet or len(asked) == 1 else _progress().stage
    with _told():
        result = model.open()
        answers = result.generate(asked, how.max_new_tokens, how.temperature, how.seed, lambda done: stage("Generating", done, len(asked)))
    if as_json:
        show_json([{"prompt": prompt, "answer": answer} for prompt, answer in zip(asked, answers, strict=True)])
    elif len(asked) == 1:
        print(answers[0])
    else:
        print("\n\n".join(f"> {words.clean(prompt)}\n{answer}" for prompt, answer in zip(asked, answers, strict=True)))


def _given(prompts: Sequence[str]) -> Iterator[str]:
    """The prompts of the arguments; ``-`` stands for the lines of standard input."""
    for prompt in prompts:
        if prompt == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield prompt


def _lines(path: Path) -> list[str]:
    """The prompts of a file, one on each line."""
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _report_lines(report: Mapping[str, Any]) -> list[str]:
    metric = Metric.from_json(report["headline"])
    pooled = report["pooled"]
    width = max(len(Metric(name).title) for name in [metric.name, *pooled])
    error = report["error"]
    lines = [f"{metric.title:<{width}}  {metric.show(pooled.get(metric.name))}" + ("" if error is None else f" +- {metric.show(error)}")]
    lines += [f"{Metric(name).title:<{width}}  {Metric(name).show(value)}" for name, value in pooled.items() if name != metric.name]
    targets = f", {report['targets']:,} targets" if "targets" in report else ""
    lines.append(f"\n{report['examples']:,} examples{targets}" + ("; +- is the standard error." if error is not None else "."))
    if report["dropped"]:
        lines.append(f"{report['dropped']:,} rows gave nothing to evaluate.")
    return [*lines, *_owner_lines(report, metric)]


def _owner_lines(report: Mapping[str, Any], metric: Metric) -> list[str]:
    owners: Mapping[str, Mapping[str, Any]] = report.get("owners", {})
    if not owners:
        return []
    lines = [f"\n{'owner':<32} {'examples':>9} {metric.title:>12} {'+-':>10}"]
    for name, own in list(owners.items())[:_SHOWN]:
        shown, error = metric.show(own.get(metric.name)), own.get("error")
        lines.append(f"{words.clean(name, 32):<32} {own['examples']:>9,} {shown:>12} {'-' if error is None else metric.show(error):>10}")
    if len(owners) > _SHOWN:
        lines.append(f"and {len(owners) - _SHOWN} more owners; --json has all")
    if "worst" in report:
        worst = report["worst"]
        lines.append(
            f"\nmean of owners {metric.show(report['mean'])}, spread {metric.show(report['spread'])}, "
            f"worst {words.clean(worst['owner'], 32)} {metric.show(worst[metric.name])}"
        )
    lines += [f"left out  {words.clean(owner, 32)}: {words.clean(why)}" for owner, why in list(report["left_out"].items())[:_SHOWN]]
    return lines


def _progress() -> Progress:
    from fedfm.observers.progress import Progress

    return Progress(file=sys.stderr, live=False)


@contextmanager
def _told() -> Iterator[None]:
    """Shows warnings, and ends on Ctrl-C or SIGTERM with what was left as it was."""
    from fedfm.cli.commands import Telling, stoppable

    Telling(quiet=True).watchers()
    with stoppable("nothing was written, and what was there before is as it was."):
        yield

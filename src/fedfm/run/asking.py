"""A run's model on the rows of a file: metrics of all of them, or an answer for each."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedfm.core import disk
from fedfm.core.errors import ConfigError, DataError, RowError, RunError
from fedfm.core.plain import csv_line, finite
from fedfm.core.registry import suggest
from fedfm.core.stage import Stage, unseen
from fedfm.core.task import RawRow, Scorer, Task, Vocabulary, Writer
from fedfm.core.tree import Tree
from fedfm.data import IID, Data, Held, opened, prepare
from fedfm.data.records import Record, Refuse, value_in, where
from fedfm.data.sources import Source, open_source
from fedfm.models import unchanged
from fedfm.observers.evaluate import standard_error, summary
from fedfm.run.generation import Drawing
from fedfm.run.result import Result

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Sized)
_ROWS, _CHARACTERS = 256, 4_000_000  # rows that are answered together, and their characters
_REPORT = 10_000  # rows between two reports of a file that is only read


def renamed(task: Task, columns: Mapping[str, str]) -> Task:
    """The task with its columns under other names.

    Args:
        columns: For a field of the task (``text``) the column of the file.

    Raises:
        ConfigError: if the task has no such column.
    """
    own = {item.name: getattr(task, item.name) for item in fields(task)}  # type: ignore[arg-type]
    known = [name for name, value in own.items() if isinstance(value, str) and value in task.columns]
    for name in columns:
        if name not in known:
            raise ConfigError(f"{type(task).__name__} has no column {name!r}.{suggest(name, known)} Its columns: {', '.join(known)}.")
    return replace(task, **columns)  # type: ignore[type-var]


@dataclass(frozen=True)
class Form:
    """How a file of rows is written, where that is not as the run's recipe says.

    Args:
        delimiter: What stands between the values of a csv file.
        encoding: How its characters are written.
    """

    delimiter: str | None = None
    encoding: str | None = None

    def of(self, result: Result, source: str) -> Data:
        """How ``source`` is read: as the run read its own rows, bad ones too.

        Raises:
            ConfigError: if a value cannot be what it says.
        """
        data = result.federation.data
        return replace(data, source=source, delimiter=self.delimiter or data.delimiter, encoding=self.encoding or data.encoding)


def evaluate(
    result: Result,
    source: str,
    by: str | None = None,
    columns: Mapping[str, str] | None = None,
    stage: Stage | None = None,
    form: Form | None = None,
) -> dict[str, Any]:
    """Metrics of a run's model on all rows of a file, as the run's own evaluation makes them.

    Rows are tokenized into a temporary folder, which is deleted at the end, so that a file may be larger than memory.

    Args:
        source: Whatever :class:`fedfm.data.Data` reads.
        by: Column that names a row's owner; ``None`` takes all rows together.
        columns: For a field of the task (``text``) the column of the file, where it has another name than in the recipe.
        stage: Told what is being done and how far it is.
        form: How the file is written, where that is not as the recipe says.

    Returns:
        ``headline`` (name and direction), ``pooled`` (every metric), ``error`` (standard error of the headline, ``None`` where it is not known),
        ``examples``, ``targets``, ``dropped`` (rows that gave nothing to evaluate), ``round``; and with ``by`` also ``owners`` (metrics,
        ``examples`` and ``error`` of each), ``mean``, ``worst``, ``spread`` and ``left_out``.

    Raises:
        DataError: if a row cannot be read, lacks a column, has a class that the model does not know, or none can be used.
        ConfigError: if the task has no such column.
    """
    stage, foundation = stage or unseen, result.foundation
    task = renamed(result.federation.task, columns or {})
    # Classes keep the numbers that they had in training, whichever of them the file has.
    task = task.with_labels(foundation.labels)
    everybody = IID(clients=1) if by is None else None
    data = replace(
        (form or Form()).of(result, source), by=by, partition=everybody, test=None, limit=None, test_fraction=0.0, min_examples=1
    )
    result.warn_of_home()

    def read(text: str, done: int) -> None:
        stage(text, done, None)

    temporary = Path(tempfile.mkdtemp(prefix="fedfm-evaluate-"))
    try:
        with unchanged(foundation.tokenizer):
            owners = prepare(data, task, foundation.tokenizer, key=result.bank.key, cache=temporary, progress=read)
        sets = [opened(owners.shard(owner).train) for owner in owners.ids]
        num_examples = [len(own) for own in sets]
        total = sum(num_examples)
        stage("Evaluating", 0, total)
        sums = result.bank.evaluate(result.theta_1d, sets, watch=lambda done: stage("Evaluating", done, total))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    of_owner = {owner: {name: value[k].cpu() for name, value in sums.items()} for k, owner in enumerate(owners.ids)}
    report = _report(task, of_owner, dict(zip(owners.ids, num_examples, strict=True)))
    shared = {"round": result.state.round, "task": type(task).__name__, **report, "dropped": owners.dropped}
    if by is None:
        return {name: value for name, value in shared.items() if name not in ("owners", "mean", "worst", "spread")}
    return {**shared, "left_out": owners.left_out}


def _report(task: Task, sums: Mapping[str, Tree], num_examples: Mapping[str, int]) -> dict[str, Any]:
    """The report on the sums of each owner, with counts and standard errors."""
    report, total = summary(task, sums), sum(num_examples.values())
    pooled = {name: sum((own[name] for own in sums.values()), torch.zeros(())) for name in next(iter(sums.values()))}
    for owner, values in report["owners"].items():
        values |= {"examples": num_examples[owner], "error": standard_error(task, sums[owner], num_examples[owner])}
    known = {"headline": report["headline"], "pooled": report["pooled"], "error": standard_error(task, pooled, total), "examples": total}
    targets = {"targets": int(pooled["targets"])} if "targets" in pooled else {}
    return {**known, **targets, **{name: report[name] for name in ("mean", "worst", "spread", "owners") if name in report}}


@dataclass
class Answers:
    """A run's model asked for one answer after the other.

    Args:
        columns: For a field of the task (``text``) the column of the rows, where it has another name than in the recipe.
        probabilities: Whether an answer has a column for each class.
        prefix: What the names of the answers' columns begin with.
        watch: Called with the number of rows that are answered, from time to time.

    Attributes:
        rows: Rows so far.
        unanswered: Those of them without an answer.
        reason: Why the first of these has none.
        unreadable: Lines of the file that could not be read, and are left out.

    Raises:
        ConfigError: if the task has no such column, or no classes.
    """

    result: Result
    columns: Mapping[str, str] = field(default_factory=dict)
    probabilities: bool = False
    prefix: str = ""
    drawing: Drawing = field(default_factory=Drawing)
    watch: Callable[[int], None] = lambda done: None
    rows: int = 0
    unanswered: int = 0
    reason: str | None = None
    unreadable: int = 0

    def __post_init__(self) -> None:
        foundation, task = self.result.foundation, renamed(self.result.federation.task, self.columns)
        tokenizer = foundation.tokenizer
        self.vocabulary = Vocabulary(len(tokenizer), tuple(sorted(tokenizer.all_special_ids)), tokenizer.mask_token_id)
        predictor = task.predictor(tokenizer, foundation.labels)
        assert isinstance(predictor, Scorer | Writer)
        self.predictor: Scorer | Writer = predictor
        if self.probabilities and not self.predictor.details:
            raise ConfigError(f"This run's task is {type(task).__name__}, whose answers are no classes with probabilities.")
        known = [*self.predictor.answers, *(self.predictor.details if self.probabilities else ())]
        # Each answer's column and its name in the file.
        self.names = {name: self.prefix + name for name in known}

    def of(self, rows: Iterable[RawRow]) -> Iterator[dict[str, Any]]:
        """One answer for each row, in their order: a value for each of ``names``, ``None`` where there is no answer.

        Raises:
            ModelError: if the task is causal and the base looks ahead.
        """
        self.result.warn_of_home()
        for chunk in _chunks(rows):
            with unchanged(self.result.foundation.tokenizer):
                answers = (
                    self._written(self.predictor, chunk) if isinstance(self.predictor, Writer) else self._scored(self.predictor, chunk)
                )
            for answer in answers:
                yield {shown: _rounded(answer.get(name)) for name, shown in self.names.items()}

    def _scored(self, scorer: Scorer, rows: Sequence[RawRow]) -> list[dict[str, Any]]:
        sets, reasons = self._asked(scorer.examples, rows)
        # A row's number decides what is drawn for it, so rows that cannot be used keep their places.
        held = [Held(own or (), self.vocabulary) for own in sets]
        sums = self.result.bank.score(self.result.theta_1d, held, scorer, self.rows) if any(sets) else {}
        answers = [scorer.answer({name: value[i].cpu() for name, value in sums.items()}) if own else {} for i, own in enumerate(sets)]
        return self._counted(rows, answers, reasons)

    def _written(self, writer: Writer, rows: Sequence[RawRow]) -> list[dict[str, Any]]:
        context, new = self.result.foundation.max_context, self.drawing.max_new_tokens
        # A prompt may take three quarters of the context, and more where the answer needs less.
        room = None if context is None else max(context - new, context - context // 4, 1)
        prompts, reasons = self._asked(lambda row: writer.prompt(row, room), rows)
        asked = [i for i, prompt in enumerate(prompts) if prompt is not None and len(prompt)]
        texts = self.result.generator.answers(
            [prompt for prompt in prompts if prompt is not None and len(prompt)],
            self.drawing,
            [self.rows + i for i in asked],
            lambda done: self.watch(self.rows + done),
        )
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for i, text in zip(asked, texts, strict=True):
            answers[i] = writer.answer(text)
        return self._counted(rows, answers, reasons)

    def _asked(self, ask: Callable[[RawRow], T], rows: Sequence[RawRow]) -> tuple[list[T | None], list[str]]:
        """What each row gives, and why a row that gives nothing does so."""
        values: list[T | None] = []
        reasons: list[str] = []
        for row in rows:
            try:
                value = ask(row)
                values.append(value)
                missing = f"there is nothing to answer in {' and '.join(self.predictor.columns)}"
                reasons.append(f"{where(row)}: {'the model gives numbers that are not finite' if len(value) else missing}.")
            except DataError as error:
                values.append(None)
                reasons.append(str(error))
        return values, reasons

    def _counted(self, rows: Sequence[RawRow], answers: list[dict[str, Any]], reasons: Sequence[str]) -> list[dict[str, Any]]:
        self.rows += len(rows)
        self.watch(self.rows)
        for answer, reason in zip(answers, reasons, strict=True):
            if not answer:
                self.unanswered += 1
                self.reason = self.reason or reason
        return answers


@dataclass(frozen=True)
class Target:
    """The file that answers go to. ``.csv`` and ``.jsonl`` are known.

    Args:
        path: The file.
        force: Whether a file that is there is replaced.
    """

    path: Path
    force: bool = False

    def require(self, source: str) -> None:
        """Refuses a file that cannot be written or must not be.

        Args:
            source: The rows that are read.

        Raises:
            ConfigError: if its kind is not known, or it is the source.
            RunError: if it is there already.
        """
        path = self.path
        if path.suffix not in (".csv", ".jsonl"):
            raise ConfigError(f"{path} is of no kind that can be written; known are .csv and .jsonl.")
        if path.is_dir():
            raise RunError(f"{path} is a folder. Give a file.")
        if path.exists() and Path(source).expanduser().exists() and path.samefile(Path(source).expanduser()):
            raise ConfigError(f"{path} is the file that is read. Give another.")
        if path.exists() and not self.force:
            raise RunError(f"{path} is there already. Give another file, or --force to replace it.")

    def lines(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[str]:
        """The lines of the file.

        Args:
            columns: All that there are; a row may lack some.
        """
        if self.path.suffix == ".jsonl":
            yield from map(_json, rows)
            return
        yield _csv(columns)
        yield from (_csv([_cell(row.get(column)) for column in columns]) for row in rows)


def predict(answers: Answers, source: str, target: Target, stage: Stage | None = None, form: Form | None = None) -> None:
    """Writes the rows of a file with an answer beside each, in their order.

    The file is read twice: once for its columns and the number of its rows, and so that a row that cannot be read is known before the work
    begins. What is written appears whole or not at all.

    Args:
        source: Whatever :class:`fedfm.data.Data` reads.
        stage: Told what is being done and how far it is.
        form: How the file is written, where that is not as the recipe says.

    Raises:
        DataError: if the file cannot be read (lines that cannot be read are left out and counted where the recipe skips bad rows), or no row has a column that is needed.
        ConfigError: if it has a column of an answer's name, or ``target`` must not be written.
        RunError: if ``target`` is there already or cannot be written.
    """
    stage = stage or unseen
    target.require(source)
    data = (form or Form()).of(answers.result, source)
    opened_source = open_source(source, data.delimiter, data.encoding)
    refused = list[RowError]()
    columns, total, first = _surveyed(opened_source, stage, refused.append if data.bad_rows == "skip" else None)
    answers.unreadable = len(refused)
    for column in answers.predictor.columns:
        if column not in columns:
            value_in(first, column)
    taken = [name for name in answers.names.values() if name in columns]
    if taken:
        raise ConfigError(f"{source} has a column {taken[0]!r} already. Give a prefix for the answers' columns, such as --prefix new_.")

    def joined() -> Iterator[dict[str, Any]]:
        # Rows are held between the two only as many as are answered together.
        waiting: deque[Record] = deque()

        def noted() -> Iterator[Record]:
            for record in opened_source.rows(_unheard if data.bad_rows == "skip" else None):
                waiting.append(record)
                yield record

        for answer in answers.of(noted()):
            yield {**waiting.popleft(), **answer}

    stage("Predicting", 0, total)
    answers.watch = lambda done: stage("Predicting", done, total)
    disk.write_lines(target.path, target.lines(joined(), [*columns, *answers.names.values()]))


def _surveyed(source: Source, stage: Stage, refuse: Refuse | None) -> tuple[list[str], int, Record]:
    """All columns of a source in the order in which they appear, the number of its rows, and the first."""
    columns: dict[str, None] = {}
    first: Record | None = None
    count = 0
    for count, record in enumerate(source.rows(refuse), 1):
        first = first or record
        columns.update(dict.fromkeys(record))
        if count % _REPORT == 0:
            stage("Reading", count, None)
    if first is None:
        raise DataError(f"{source.location} has no row that can be read.")
    return list(columns), count, first


def _chunks(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    chunk: list[RawRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(chunk) == _ROWS or size > _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _rounded(value: Any) -> Any:
    """Six digits of a number: those after them depend on the rows that share a batch."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _json(row: Mapping[str, Any]) -> str:
    text = json.dumps(finite(row), ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        # One half of a character that takes two can only be written as an escape.
        return json.dumps(finite(row), default=str)
    return text


def _csv(values: Sequence[str]) -> str:
    return csv_line(values).encode("utf-8", "replace").decode()


def _cell(value: Any) -> str:
    """A value as a CSV file has it: nothing for null, text as it is, anything else as JSON."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return value if isinstance(value, str) else json.dumps(finite(value), ensure_ascii=False, default=str)


def _unheard(error: RowError) -> None:
    """A line that was counted before."""

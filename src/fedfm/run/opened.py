"""A run's folder opened in Python: its numbers as columns, its report, its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedfm.core import display, words
from fedfm.core.errors import RunError
from fedfm.core.paths import usable
from fedfm.core.task import RawRow
from fedfm.core.words import Metric
from fedfm.federation import Federation
from fedfm.recipe import read
from fedfm.reports import html
from fedfm.run.flat import columns, flat, flat_owners
from fedfm.run.folder import METRICS, RECIPE, is_finished, read_lines

if TYPE_CHECKING:
    from fedfm.run.result import Result


def open_run(path: Path | str, device: str = "cpu", round: int | Literal["last", "best"] = "last") -> Run:
    """The run in ``path``, finished or not. Reads its folder and changes nothing in it.

    Args:
        device: Where its model is loaded, once it is asked for: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        round: Whose model that is: ``last``, ``best``, or the number of a round whose state is kept.

    Raises:
        RunError: if there is no run.
        ConfigError: if ``path`` cannot be a path.
    """
    folder = usable(path, "The run")
    if not (folder / RECIPE).is_file():
        raise RunError(f"{folder} holds no run (there is no {RECIPE} in it). Give the folder named by --out.")
    return Run(folder, device, round)


@dataclass(frozen=True, repr=False)
class Run:
    """A run's folder. A property that is not a plain file's (``result``, ``model``) loads the model when it is first used.

    Example::

        run = fedfm.open_run("runs/x")
        pandas.DataFrame(run.rounds()).plot("round", "eval_pooled_loss")
    """

    path: Path
    device: str = "cpu"
    round: int | Literal["last", "best"] = "last"

    @cached_property
    def federation(self) -> Federation:
        """What ran."""
        return read(self.path / RECIPE)

    def rounds(self) -> dict[str, list[Any]]:
        """Columns of equal length, a row for each completed round; ``metrics.csv`` holds the same. ``None`` where a round has no value.

        The dictionary is what ``pandas.DataFrame``, ``polars.DataFrame`` and ``pyarrow.table`` take.
        """
        return columns(map(flat, self._records()))

    def owners(self) -> dict[str, list[Any]]:
        """Columns of equal length, a row for each completed round and owner: what it said of its work (``train_...``) and its evaluation (``eval_...``)."""
        return columns(row for record in self._records() for row in flat_owners(record))

    def _records(self) -> list[dict[str, Any]]:
        return read_lines(self.path / METRICS)

    def report(self) -> Report:
        """The report as it is now, which a notebook shows.

        Raises:
            RunError: if a file of the run is damaged.
        """
        return Report(self.path, html(self.path))

    @cached_property
    def result(self) -> Result:
        """The model of the run's last round, or of the one that was asked for, to export, ask and evaluate.

        Raises:
            RunError: if no round was completed, or the base has changed since.
        """
        from fedfm.run.result import Result

        return Result.open(self.path, self.round, self.device)

    @property
    def model(self) -> Any:
        """A plain ``transformers`` model with the tuning merged in.

        Raises:
            RunError: if no round was completed, or the base has changed since.
            ConfigError: if the tuning cannot be merged.
        """
        return self.result.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.result.foundation.tokenizer

    def evaluate(self, source: str, by: str | None = None, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Metrics on all rows of a file: see :func:`fedfm.run.asking.evaluate`."""
        from fedfm.run.asking import evaluate

        return evaluate(self.result, source, by, columns)

    def predict(
        self, rows: Iterable[RawRow], columns: Mapping[str, str] | None = None, probabilities: bool = False, **drawing: Any
    ) -> dict[str, list[Any]]:
        """An answer for each row, in their order, as columns; ``None`` where a row has none.

        Args:
            rows: Mappings of column to value. Rows of a file: ``fedfm.data.sources.open_source(FILE).rows()``.
            columns: For a field of the task (``text``) the rows' column, where it has another name than in the recipe.
            probabilities: Whether there is a column for each class.
            drawing: ``max_new_tokens``, ``temperature``, ``seed`` where the model writes.
        """
        from fedfm.run.asking import Answers
        from fedfm.run.generation import Drawing

        answers = Answers(self.result, columns or {}, probabilities, drawing=Drawing(**drawing))
        named: dict[str, list[Any]] = {name: [] for name in answers.names.values()}
        for answer in answers.of(rows):
            for name, value in answer.items():
                named[name].append(value)
        return named

    def __repr__(self) -> str:
        return f"Run({', '.join([str(self.path), *(text for _, text in self._said())])})"

    def _repr_html_(self) -> str:
        """How the run stands and its parts, as small tables for a notebook. ``report()`` shows all of it."""
        return display.table(f"Run {self.path}", self._said()) + self.federation._repr_html_()

    def _said(self) -> list[tuple[str, str]]:
        """How the run stands."""
        records = self._records()
        if not records:
            return [("rounds", f"no round of {self.federation.rounds} completed")]
        try:
            state = "finished" if is_finished(self.path) else "not finished"
        except RunError:
            state = "its journal is damaged"
        said = [("rounds", f"round {records[-1]['round']} of {self.federation.rounds}, {state}")]
        reports = [record["metrics"]["eval"] for record in records if "eval" in record["metrics"]]
        if reports:
            metric = Metric.from_json(reports[0].get("headline"))
            values = [report.get("pooled", {}).get(metric.name) for report in reports]
            curve = words.sparkline([words.number(value) for value in values])
            said.append((metric.title, f"{metric.title} {metric.show(values[0])} -> {metric.show(values[-1])} {curve}"))
        return said


@dataclass(frozen=True, repr=False)
class Report:
    """A run's page.

    Args:
        html: The page itself, which loads nothing from anywhere.
    """

    path: Path
    html: str

    def __repr__(self) -> str:
        return f"Report({self.path}, {words.size(len(self.html.encode('utf-8', 'replace')))}; a notebook shows it)"

    def _repr_html_(self) -> str:
        return display.frame(self.html)

"""What a run left in its folder, read without trusting that all of it is there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedfm.core.bad_rows import BadRows
from fedfm.core.errors import RunError
from fedfm.core.journal import Journal
from fedfm.core.score import Score, best
from fedfm.core.words import LOSS, Metric, number


@dataclass(frozen=True)
class Round:
    """One line of ``metrics.jsonl``.

    Args:
        failures: Of training and of evaluation.
        evaluated: Whether held-out metrics were asked for.
        pooled: Metrics on everyone's held-out data; empty where nobody had any to tell.
        owners: The headline metric of each owner.
        metric: The headline.
        error: Its standard error, where the evaluation was on a sample.
        tokens: Tokens trained on.
        score: The headline on the test examples that all rounds are compared on.
        told: What is told of the owners together, where the channel shows sums alone (:mod:`fedfm.observers.owners`).
    """

    round: int
    evaluated: bool = False
    pooled: Mapping[str, float | None] = field(default_factory=dict)
    owners: Mapping[str, float | None] = field(default_factory=dict)
    metric: Metric = LOSS
    error: float | None = None
    train: float | None = None
    tokens: float = 0.0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    cohort: Sequence[str] = ()
    failures: Sequence[Mapping[str, Any]] = ()
    score: Score = field(default_factory=partial(Score, 0))
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scored(self) -> float | None:
        """The score as the headline."""
        return None if self.score.cost is None else self.metric.cost(self.score.cost)

    @property
    def value(self) -> float | None:
        """The pooled headline."""
        return self.pooled.get(self.metric.name)

    @property
    def worst(self) -> tuple[str, float] | None:
        """The owner with the worst headline."""
        known = [(name, value) for name, value in self.owners.items() if value is not None]
        return max(known, key=lambda item: self.metric.cost(item[1]), default=None)

    def band(self) -> tuple[float, float] | None:
        """The range of the owners' headline; of the middle 80 % where there are more than ten."""
        values = sorted(value for value in self.owners.values() if value is not None)
        if len(values) < 2:
            return None
        cut = len(values) // 10 if len(values) > 10 else 0
        return values[cut], values[-1 - cut]


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Args:
        recipe: The text of ``recipe.yaml``.
        rounds: In order, each once.
        split: A row per owner: ``owner``, ``train``, ``test``, ``tokens``, ``labels``.
        compare: The comparison table, where ``fedfm compare`` has filled it.
        envelope: The journal's first line: versions, threads, platform.
        plan: What was chosen for the whole run.
        fields: The recipe as plain values.
        data: Fingerprint of its prepared data.
        base: Digests of its base model and tokenizer.
        ended: Whether it played all of its rounds, or ended early, and wrote its model.
        bad_rows: Rows that were left out when the data was prepared.
        audit: What an audit of its privacy promise says; empty where there was none.
    """

    name: str
    recipe: str
    rounds: Sequence[Round]
    ledger: Mapping[str, Any]
    split: Sequence[Mapping[str, Any]]
    compare: Mapping[str, Any] | None
    envelope: Mapping[str, Any]
    plan: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    base: str = ""
    ended: bool = False
    bad_rows: BadRows = field(default_factory=BadRows)
    audit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def evaluations(self) -> list[Round]:
        """Rounds in which held-out metrics were asked for."""
        return [round for round in self.rounds if round.evaluated]

    @property
    def best(self) -> Round | None:
        """The round with the best score."""
        chosen = best(round.score for round in self.rounds)
        return next((round for round in self.rounds if round.round == chosen), None)

    @property
    def metric(self) -> Metric:
        """The headline."""
        return next((round.metric for round in reversed(self.evaluations)), Metric())


def read(folder: Path) -> Run:
    """The run in ``folder``. A missing file is an empty section; an unfinished last line is dropped.

    Raises:
        RunError: if this is not a run's folder, or one of its files is not what a run writes.
    """
    if not (folder / "recipe.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise RunError(f"{folder} is not a run's folder: it has neither recipe.yaml nor metrics.jsonl. Give the folder named by --out.")
    recipe = _text(folder / "recipe.yaml")
    journal = Journal.read(folder / "journal.jsonl")
    rounds = {item.round: item for item in map(_round, _lines(folder / "metrics.jsonl"))}
    split = _json(folder / "split.json")
    compare = _json(folder / "compare.json")
    fields, base = _fields(recipe), journal.first.get("base", {})
    return Run(
        name=str(fields.get("name") or "") or folder.resolve().name,
        recipe=recipe,
        rounds=[rounds[k] for k in sorted(rounds)],
        ledger=_mapping(_json(folder / "ledger.json")),
        split=[row for row in split if isinstance(row, dict)] if isinstance(split, list) else [],
        compare=compare if isinstance(compare, dict) else None,
        envelope={name: value for name, value in journal.first.get("start", {}).items() if name != "event"},
        plan=journal.choices,
        fields=fields,
        data=str(journal.first.get("data", {}).get("fingerprint", "")),
        base=" ".join(str(base[name]) for name in ("weights", "tokenizer") if name in base),
        ended=journal.ended,
        bad_rows=BadRows.from_json(journal.first.get("data", {}).get("bad_rows")),
        audit=_mapping(_json(folder / "audit.json")),
    )


def _round(line: Mapping[str, Any]) -> Round:
    metrics = _mapping(line.get("metrics"))
    report = _mapping(metrics.get("eval"))
    metric = Metric.from_json(report.get("headline"))
    failed = _mapping(report.get("failed")).items()
    numbers_of_clients = [_mapping(item) for item in _mapping(line.get("clients")).values()]
    place = int(number(line.get("round")) or 0)
    return Round(
        round=place,
        score=Score.of(place, metrics),
        evaluated="eval" in metrics,
        pooled=numbers(report.get("pooled")),
        owners={owner: number(_mapping(item).get(metric.name)) for owner, item in _mapping(report.get("owners")).items()},
        metric=metric,
        error=number(report.get("error")),
        train=number(metrics.get("train_loss")),
        tokens=math.fsum(number(item.get("tokens")) or 0.0 for item in numbers_of_clients or [metrics]),
        told=report if "sums" in report else {},
        bytes_up=number(line.get("bytes_up")) or 0.0,
        bytes_down=number(line.get("bytes_down")) or 0.0,
        seconds={name: value for name, value in numbers(line.get("seconds")).items() if value is not None},
        cohort=[str(client) for client in _list(line.get("cohort"))],
        failures=[
            *(item for item in _list(line.get("failures")) if isinstance(item, dict)),
            *({"client": client, "stage": "evaluate", "reason": reason} for client, reason in failed),
        ],
    )


def numbers(value: Any) -> dict[str, float | None]:
    """The entries of a mapping as numbers, None where they are not; empty for anything else."""
    return {str(name): number(item) for name, item in _mapping(value).items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    return _parse(path, 1, text) if (text := _text(path)).strip() else None


def _lines(path: Path) -> list[Mapping[str, Any]]:
    lines = _text(path).split("\n")
    # What follows the last newline is a line that a crash left unfinished, or nothing.
    return [_mapping(_parse(path, i, line)) for i, line in enumerate(lines[:-1], 1) if line.strip()]


def _parse(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path}, line {line}, is not JSON: {error}. A run never writes this; restore the file or remove the line."
        ) from error


def _fields(recipe: str) -> Mapping[str, Any]:
    import yaml

    try:
        return _mapping(yaml.safe_load(recipe))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # the report shows a recipe that cannot be read as it is

"""What a source of rows seems to hold: which columns are text, label and owner, and so what can be learned from it. A guess, for a person to look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from fedfm.core.bad_rows import BadRows
from fedfm.core.errors import ConfigError, DataError, RowError
from fedfm.core.registry import suggest
from fedfm.core.task import Task
from fedfm.data.records import Record, Refuse, is_nothing
from fedfm.data.row_check import RowCheck
from fedfm.data.sources import Source

ROWS = 20_000
"""Rows that are looked at, the first ones."""
TASKS: Mapping[str, tuple[str, ...]] = {
    "Instruct": ("instruction", "input", "response"),
    "Classification": ("text", "label"),
    "CausalLM": ("text",),
}
"""Tasks that are guessed, and their fields that name a column."""
OPTIONAL = ("input",)
"""Fields that may be left out."""

# Words in the names of columns, the most telling first.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "instruction": ("instruction", "question", "prompt", "query", "frage", "anweisung", "problem", "request", "input", "user"),
    "response": ("response", "answer", "output", "completion", "reply", "solution", "antwort", "assistant"),
    "input": ("context", "input", "passage", "background", "evidence", "kontext"),
    "text": (
        "text", "sentence", "content", "body", "message", "document", "review", "utterance", "comment", "note", "report", "abstract",
        "description", "post", "tweet", "article", "story", "passage", "title", "satz", "inhalt", "nachricht", "bericht", "beschreibung",
    ),
    "label": (
        "label", "class", "category", "intent", "sentiment", "target", "topic", "tag", "rating", "stars", "diagnosis", "decision",
        "priority", "klasse", "kategorie", "stimmung", "type", "kind", "answer", "output",
    ),
    "owner": (
        "owner", "client", "silo", "site", "hospital", "clinic", "bank", "branch", "agency", "company", "firm", "institution",
        "organisation", "organization", "department", "school", "author", "user", "customer", "speaker", "account", "shop", "store",
        "center", "centre", "besitzer", "mandant", "kunde", "standort", "filiale", "klinik", "abteilung", "region", "country", "city",
        "device", "node", "source", "who",
    ),
}  # fmt: skip
_FEW = 50  # values of a label whose column's name says nothing
_MANY = 500  # values of a label
_SHORT = 60  # characters of a label


@dataclass
class Column:
    """What is in a column.

    Attributes:
        filled: Rows with something in it.
        texts: Rows with text in it that is no number.
        fractions: Rows with a number in it that is not whole.
        worded: Rows with several words in it, or with letters of a script that may not part its words.
        characters: Characters of all its values.
        values: Different values, each as a hash.
    """

    name: str
    filled: int = 0
    texts: int = 0
    fractions: int = 0
    worded: int = 0
    characters: int = 0
    values: dict[int, int] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """Looks at one more value."""
        if is_nothing(value):
            return
        text = str(value)
        self.filled += 1
        self.characters += len(text)
        self.texts += isinstance(value, str) and not re.fullmatch(r"\s*[-+]?\d+([.,]\d+)?\s*", text)
        # A table with gaps keeps its whole numbers as 1.0 and 2.0.
        whole = isinstance(value, float) and value.is_integer()
        self.fractions += not whole and bool(re.fullmatch(r"\s*[-+]?\d+[.,]\d+\s*", text))
        self.worded += isinstance(value, str) and (not text.isascii() or len(text.split(None, 1)) > 1)
        key = hash(text)
        self.values[key] = self.values.get(key, 0) + 1

    @property
    def length(self) -> float:
        """Mean number of characters."""
        return self.characters / max(self.filled, 1)

    @property
    def distinct(self) -> int:
        """Number of different values."""
        return len(self.values)

    @property
    def is_text(self) -> bool:
        """Whether most of its values are text."""
        return 2 * self.texts > self.filled > 0

    @property
    def is_prose(self) -> bool:
        """Whether most of its values are text, and most of the texts differ."""
        return self.is_text and self.distinct > 0.3 * self.filled

    @property
    def is_worded(self) -> bool:
        """Whether that holds, and most of its values have words: what is no name and no number of a row."""
        return self.is_prose and 2 * self.worded > self.filled

    @property
    def is_class(self) -> bool:
        """Whether it has few values for so many rows, none of them a fraction."""
        return 2 <= self.distinct <= min(_MANY, self.filled / 2) and not self.fractions and self.length <= _SHORT

    @property
    def is_surely_class(self) -> bool:
        """Whether that holds so clearly that its name need not say so."""
        return self.is_class and 5 * self.distinct <= self.filled and self.distinct <= (_FEW if self.is_text else 10)

    @property
    def is_owner(self) -> bool:
        """Whether its values can be owners: two or more rows for most."""
        return 2 <= self.distinct <= self.filled / 2 and not self.fractions


@dataclass(frozen=True)
class Look:
    """What the first rows of a source have.

    Args:
        columns: In the order in which they were met.
        num_rows: Rows that were looked at.
        is_whole: Whether there are no more.
        owner: The column with the owner that the source itself provides.
    """

    columns: Mapping[str, Column]
    num_rows: int
    is_whole: bool
    owner: str | None = None

    def column(self, name: str) -> Column:
        """The column of that name.

        Raises:
            ConfigError: if there is none.
        """
        if name not in self.columns:
            raise ConfigError(f"There is no column {name!r}.{suggest(name, self.columns)} Columns: {', '.join(self.columns)}.")
        return self.columns[name]


@dataclass(frozen=True)
class Guess:
    """What can be learned from the rows, and who owns them.

    Args:
        task: A key of :data:`TASKS`.
        columns: The column of each of the task's fields; an optional one may be missing.
        owner: The column that names a row's owner; ``None`` where none seems to, or the source says it itself.
    """

    task: str
    columns: Mapping[str, str]
    owner: str | None = None


def look(source: Source, most: int = ROWS) -> Look:
    """Looks at the first rows. Lines that cannot be read are passed over.

    Raises:
        DataError: if there is no row that can be read.
    """
    columns: dict[str, Column] = {}
    num_rows = 0
    rows = source.rows(_pass)
    for record in islice(rows, most):
        num_rows += 1
        for name, value in record.items():
            columns.setdefault(name, Column(name)).add(value)
    if not num_rows:
        raise DataError(f"{source.location} has no row that can be read.")
    return Look(columns, num_rows, next(rows, None) is None, source.owner)


def guess(seen: Look, task: str | None = None, given: Mapping[str, str] | None = None) -> Guess:
    """What the rows seem to be for.

    Args:
        task: Instead of guessing it.
        given: Columns that are known: a field of a task, or ``owner``.

    Raises:
        ConfigError: if a given column is not there.
        DataError: if there is no column for a field that the task needs.
    """
    given = dict(given or {})
    for name in given.values():
        seen.column(name)
    owner = given.get("owner") or (None if seen.owner is not None else _owner(seen, given))
    taken = {*filter(None, (owner, seen.owner)), *given.values()}
    if seen.owner is not None:
        taken.add("path")
    task = task or _task(seen, given, taken)
    columns = {name: column for name, column in given.items() if name in TASKS[task]}
    for name in TASKS[task]:
        column = columns.get(name) or _pick(seen, name, {*taken, *columns.values()}, task)
        if column is not None:
            columns[name] = column
        elif name not in OPTIONAL:
            raise DataError(
                f"No column seems to hold the {name} that {task} needs. Columns: {', '.join(seen.columns)}. Say which: --{name} COLUMN"
            )
    return Guess(task, {name: columns[name] for name in TASKS[task] if name in columns}, owner)


def unusable(source: Source, task: Task, owner: str | None, most: int = ROWS) -> BadRows:
    """The rows that this task could not use, among the first ones."""

    def first(refuse: Refuse) -> Iterator[Record]:
        return islice(source.read(refuse), most)

    bad = BadRows()
    for _ in RowCheck(task, owner or source.owner).rows(replace(source, read=first), bad):
        pass
    return bad


def _pass(error: RowError) -> None:
    """Who prepares the data will count it."""


def _task(seen: Look, given: Mapping[str, str], taken: Collection[str]) -> str:
    for task in TASKS:
        # A field that only this task has says which it is.
        if any(name in given for name in TASKS[task] if sum(name in fields for fields in TASKS.values()) == 1):
            return task
    response = _pick(seen, "response", taken, "Instruct")
    if response is not None and _pick(seen, "instruction", {*taken, response}, "Instruct") is not None:
        return "Instruct"
    text = given.get("text") or _pick(seen, "text", taken, "Classification")
    if text is not None and _pick(seen, "label", {*taken, text}, "Classification") is not None:
        return "Classification"
    return "CausalLM"


def _owner(seen: Look, given: Mapping[str, str]) -> str | None:
    return _named(seen, "owner", given.values(), lambda column: column.is_owner)


def _pick(seen: Look, name: str, taken: Collection[str], task: str) -> str | None:
    """The column for a field of a task, by its name and what is in it."""
    if name == "label":
        classes = [column for column in seen.columns.values() if column.name not in taken and column.is_surely_class]
        fewest = min(classes, key=lambda column: column.distinct, default=None)
        return _named(seen, name, taken, lambda column: column.is_class) or (fewest.name if fewest is not None else None)
    if name == "input":
        return _named(seen, name, taken, lambda column: column.is_text)
    if task == "Instruct":
        # An answer that is one of a few is a class.
        return _named(seen, name, taken, lambda column: column.is_prose and not column.is_surely_class)
    prose = [column for column in seen.columns.values() if column.name not in taken and column.is_worded]
    longest = max(prose, key=lambda column: column.length, default=None)
    by_name = _named(seen, name, taken, lambda column: column.is_prose)
    # A question to which the answer is one of a few is a text with its class.
    return by_name or (longest.name if longest is not None else None) or _named(seen, name, taken, lambda column: column.is_text)


def _named(seen: Look, name: str, taken: Collection[str], accept: Callable[[Column], bool]) -> str | None:
    """The column whose name says most clearly that it is this one, among those that can be."""
    columns = [(column.name, _words(column.name)) for column in seen.columns.values() if column.name not in taken and accept(column)]
    for word in _NAMES[name]:
        for whole in (True, False):
            for column, words in columns:
                if words in ([word], [f"{word}s"]) if whole else word in words:
                    return column
    return None


def _words(name: str) -> Sequence[str]:
    """``clientID`` as ``client``, ``id``."""
    return re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())

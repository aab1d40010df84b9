"""Who owns what."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedfm.core.errors import ConfigError
from fedfm.core.messages import Scalar
from fedfm.core.parts import Finding, Part, Plan, refuse, warn
from fedfm.data.partition import Partitioner


@dataclass(frozen=True)
class Data(Part):
    """Rows and their owners: from a column, from the source itself, or drawn by a partitioner.

    Sources: ``.jsonl``, ``.csv`` and ``.tsv`` (also ``.gz``), ``.parquet``, a folder of text files (an owner is a subfolder; a file beside them is an owner
    too, by its name), a data set that ``datasets`` saved, ``hf:name`` or ``hf:name:split`` from the Hugging Face hub, and ``stdlib``, the source of
    Python's standard library (an owner is a package). Files are streamed and may be larger than memory.

    Args:
        source: Where training rows come from.
        test: Where test rows come from; ``None`` holds out rows of each owner.
        by: Column that names a row's owner.
        partition: Divides rows among simulated clients; not together with ``by``.
        test_fraction: Share of an owner's rows held out where ``test`` is ``None``, at most 0.5; its first ``min_examples`` rows always train.
        min_examples: Fewest training examples of an owner; one with fewer is named and left out.
        limit: Most training rows of an owner, its first ones; ``None`` for all.
        bad_rows: What rows that cannot be used do: without an owner or a label, with a value of the wrong type, with a label that only the test has,
            or that cannot be read. ``stop`` prepares nothing and names them all, by kind, in one message; ``skip`` leaves them out, as if they were
            not in the file, and shows their numbers. Rows without text are left out and counted either way.
        delimiter: What stands between the values of a csv file, one character or ``tab``; ``None`` looks for comma, semicolon, tab or pipe.
        encoding: How the characters of a csv file are written, such as ``cp1252``; ``None`` looks for UTF-8, UTF-16 with its mark, or cp1252.

    Raises:
        ConfigError: if a number is out of range or both ``by`` and ``partition`` are given.
    """

    room = "data"

    source: str
    test: str | None = None
    by: str | None = None
    partition: Partitioner | None = None
    test_fraction: float = 0.1
    min_examples: int = 2
    limit: int | None = None
    bad_rows: Literal["stop", "skip"] = "stop"
    delimiter: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("data.source is empty; give a file, a folder, 'hf:name' or 'stdlib'.")
        if self.by == "":
            raise ConfigError("data.by is empty; it must be the column that names a row's owner, or null.")
        if self.by is not None and self.partition is not None:
            raise ConfigError(
                f"data has both by={self.by!r} and partition={self.partition!r}, but a row has one owner. "
                "Keep 'by' for owners that are in the data, 'partition' to simulate them."
            )
        if not 0 <= self.test_fraction <= 0.5:
            raise ConfigError(f"data.test_fraction is {self.test_fraction}; it must be from 0 to 0.5. For more, give a test file.")
        if self.min_examples < 1:
            raise ConfigError(
                f"data.min_examples is {self.min_examples}; it must be 1 or more, for an owner without examples cannot train."
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"data.limit is {self.limit}; it must be 1 or more, or null for all rows.")
        if self.bad_rows not in ("stop", "skip"):
            raise ConfigError(f"data.bad_rows is {self.bad_rows!r}; it must be stop or skip.")
        if self.delimiter in ("tab", "\\t"):
            object.__setattr__(self, "delimiter", "\t")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ConfigError(f"data.delimiter is {self.delimiter!r}; it must be one character that is no quote and no line break, or tab.")
        if self.encoding is not None:
            _require_encoding(self.encoding)

    def rules(self) -> dict[str, Scalar]:
        """How rows become examples, in a house that names its own files."""
        return {"test_fraction": self.test_fraction, "min_examples": self.min_examples, "limit": self.limit, "bad_rows": self.bad_rows}

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Test rows must not be training rows, and what is said of csv files must have one."""
        if self.test is not None and _same(self.source, self.test):
            yield refuse(
                "data",
                f"test is {self.test}, which is the training source too, so an evaluation would measure what was learned by heart. "
                "Give another file, or leave test out to hold out rows of each owner.",
            )
        given = [name for name in ("delimiter", "encoding") if getattr(self, name) is not None]
        if given and not any(map(_is_csv, filter(None, (self.source, self.test)))):
            yield warn("data", f"{' and '.join(given)} change nothing, because they are for csv files, and there is none.")


def _require_encoding(name: str) -> None:
    try:
        # What is no encoding of text (base64, for one) is refused here too.
        io.TextIOWrapper(io.BytesIO(), encoding=name)
    except (LookupError, ValueError) as error:
        raise ConfigError(
            f"data.encoding is {name!r}, which Python does not know. It is utf-8, utf-16, cp1252 (Western Europe), cp1250 (Central Europe), cp1251 "
            "(Cyrillic), shift_jis, gbk or another of its names."
        ) from error


def _is_csv(location: str) -> bool:
    return location.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def _same(source: str, test: str) -> bool:
    """Whether two sources are one, by another name or a link too."""
    if source.startswith("hf:") or test.startswith("hf:"):
        names = [name if name.count(":") > 1 else f"{name}:train" for name in (source, test)]
        return names[0] == names[1]
    try:
        return source == test or Path(source).expanduser().samefile(Path(test).expanduser())
    except (OSError, ValueError, RuntimeError):
        return False  # One of them is not there, as whoever opens it will say.

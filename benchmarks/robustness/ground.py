"""What the sections share: a small federation, and what is counted."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from fedfm.core.errors import FedfmError
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.testing import tiny

OWNERS = ("ann", "bob", "cid", "dan")
LIAR = OWNERS[0]


@dataclass
class Tally:
    """One row: what was done so many times, and what came of it.

    Attributes:
        outcomes: How often each came.
        wrong: The cases that should not have come out as they did.
        slowest: Seconds of the longest case.
    """

    section: str
    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def cases(self) -> int:
        """How many there were."""
        return sum(self.outcomes.values())

    def try_out(self, what: str, case: Callable[[], str]) -> None:
        """Counts the outcome that ``case`` tells. An error of the project's own tree is an outcome; any other error is wrong."""
        began = perf_counter()
        try:
            outcome = case()
        except FedfmError as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = type(error).__name__
            self.wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        self.slowest = max(self.slowest, perf_counter() - began)
        self.outcomes[outcome] += 1

    def require(self, condition: bool, what: str) -> None:
        """Notes a case that came out wrong."""
        if not condition:
            self.wrong.append(what)

    def to_row(self) -> dict[str, Any]:
        """As a row of the table."""
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in self.outcomes.most_common())
        return {
            "benchmark": "robustness",
            "section": self.section,
            "kind": self.kind,
            "cases": self.cases,
            "outcomes": outcomes,
            "slowest": self.slowest,
            "wrong": self.wrong,
        }


@contextmanager
def workshop() -> Iterator[Path]:
    """A folder with rows of four owners, in which prepared data is kept too; the project's own log is silent."""
    log, before, cache = logging.getLogger("fedfm"), logging.getLogger("fedfm").level, os.environ.get("FEDFM_CACHE")
    with TemporaryDirectory(prefix="fedfm-robustness-") as name:
        folder = Path(name)
        os.environ["FEDFM_CACHE"] = str(folder / "cache")
        log.setLevel(logging.CRITICAL + 1)
        try:
            yield folder
        finally:
            log.setLevel(before)
            os.environ.pop("FEDFM_CACHE")
            if cache is not None:
                os.environ["FEDFM_CACHE"] = cache


def small(folder: Path, **changes: Any) -> Federation:
    """A federation of four owners, a Llama of one layer and LoRA."""
    return tiny.federation(folder, OWNERS, 48, **{"name": "small", "engine": Embedded(device="cpu"), "rounds": 3, **changes})

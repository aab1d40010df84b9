"""The cohort benchmark before and after a change, in turn.

::

    python -m benchmarks.pairs --before ../before/src --after src

One long-lived process per source tree holds a federated run; they are asked for a round in turn, A B B A A B, and only one works at a time,
so that what drifts (clock, cache, neighbours) falls on both alike. A round is timed inside its process, as in :mod:`benchmarks.cohort`:
sampling, the bank, local steps, aggregation, the server's step, and what is written to disk. The bank is as large as the cohort.

The table shows the median of the pairwise ratios after / before and an interval that holds the true median with at least 95 %, from the sign
test, which assumes no distribution, only that pairs are alike. Both trees play the same rounds of the same run; the table also shows whether
they end with the same bits. With ``--job`` a small job from start to end, a fresh process each time, is timed in the same way.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row, say
from benchmarks.work import SHAPES, Shape, parse

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """What both trees do.

    Args:
        steps: Local steps of a client in a round.
        threads: CPU threads of the process that works.
        small: Whether the base is a tiny one.
    """

    shape: Shape
    steps: int
    threads: int
    small: bool

    def words(self) -> list[str]:
        """The arguments of ``benchmarks.rounds``."""
        shape = self.shape
        numbers = {"clients": shape.clients, "batch": shape.batch, "length": shape.length, "steps": self.steps, "threads": self.threads}
        return [*(f"--{name}={value}" for name, value in numbers.items()), *(["--small"] if self.small else [])]


def command(case: Case, *more: str) -> list[str]:
    """A process of ``benchmarks.rounds``; ``-P`` so that the working directory is not searched for fedfm."""
    return [sys.executable, "-P", "-m", "benchmarks.rounds", *case.words(), *more]


def environment(source: Path, threads: int) -> dict[str, str]:
    """``source`` first, then these benchmarks; threads sleep while they wait, as under the command line."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(source.resolve()), str(ROOT))),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
    }


class Child:
    """One tree's process.

    Args:
        source: The folder in which the package ``fedfm`` is.
    """

    def __init__(self, source: Path, case: Case) -> None:
        self.process = subprocess.Popen(
            command(case), env=environment(source, case.threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        came_from = self.answer()["source"]
        if Path(came_from) != source.resolve() / "fedfm":
            raise SystemExit(f"{source} was asked for, but its process imported fedfm from {came_from}.")

    def answer(self) -> dict[str, Any]:
        """The next line it writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A process ended with exit code {self.process.wait()}; what it said is above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, word: str) -> dict[str, Any]:
        """Sends a word and waits for the answer."""
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)
        return self.answer()


@contextmanager
def started(source: Path, case: Case) -> Iterator[Child]:
    """A process that is ready; it is ended at the end of the block."""
    child = Child(source, case)
    try:
        yield child
    finally:
        child.process.communicate()


def interval(ratios: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of the median: the order statistics between which it lies with at least ``confidence``, by the sign test.

    With fewer than six values there are none that narrow, and the bounds are the smallest and the largest.
    """
    ordered, n = sorted(ratios), len(ratios)
    outside, k = 0.0, 0
    # The median is below the k-th smallest with probability P(Binomial(n, 1/2) < k).
    while (outside := outside + 2 * math.comb(n, k) / 2**n) <= 1 - confidence:
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def timed(before: list[float], after: list[float]) -> Row:
    """Medians of both and of the pairwise ratio, and its interval."""
    ratios = [a / b for a, b in zip(after, before, strict=True)]
    low, high = interval(ratios)
    return {
        "ours_s": statistics.median(after),
        "theirs_s": statistics.median(before),
        "ratio": statistics.median(ratios),
        "ratio_min": low,
        "ratio_max": high,
        "repetitions": len(ratios),
    }


def rounds_of(before: Path, after: Path, case: Case, pairs: int, warmup: int) -> Row:
    """Rounds of both trees in turn."""
    with ExitStack() as stack:
        children = [stack.enter_context(started(source, case)) for source in (before, after)]
        seconds: tuple[list[float], list[float]] = ([], [])
        for i in range(warmup + pairs):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                taken = children[which].ask("round")["seconds"]
                if i >= warmup:
                    seconds[which].append(taken)
        digests = {child.ask("digest")["digest"] for child in children}
    return {"work": "a round", "same_bits": "yes" if len(digests) == 1 else "no", **timed(*seconds)}


def jobs_of(before: Path, after: Path, case: Case, pairs: int) -> Row:
    """Whole processes of both trees in turn: imports, three rounds, model and report."""
    seconds: tuple[list[float], list[float]] = ([], [])
    jobs = [partial(_job, source, case) for source in (before, after)]
    for i in range(1 + pairs):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            taken = common.seconds_of(jobs[which])
            if i > 0:
                seconds[which].append(taken)
    return {"work": "a job of 3 rounds", "same_bits": None, **timed(*seconds)}


def _job(source: Path, case: Case) -> None:
    subprocess.run(command(case, "--job=3"), env=environment(source, case.threads), stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    """Measures each row and prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--before", type=Path, required=True, metavar="SRC", help="the folder that holds fedfm as it was")
    options.add_argument("--after", type=Path, required=True, metavar="SRC", help="the folder that holds fedfm as it is now")
    options.add_argument("--shapes", help="such as 16x1x64,8x2x128: clients x batch x tokens")
    options.add_argument("--pairs", type=int, default=31, help="pairs timed for each shape (default %(default)s)")
    options.add_argument("--warmup", type=int, default=2, help="pairs played before (default %(default)s)")
    options.add_argument("--steps", type=int, default=10, help="local steps in a round (default %(default)s)")
    options.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    options.add_argument("--job", type=int, default=0, metavar="PAIRS", help="time a small job from start to end too, in so many pairs")
    given = options.parse_args()
    for source in (given.before, given.after):
        if not (source / "fedfm" / "__init__.py").is_file():
            options.error(f"{source} holds no package fedfm; give the folder above it, such as ../before/src")
    shapes = tuple(parse(options, text) for text in given.shapes.split(",")) if given.shapes else SHAPES
    if given.quick:
        shapes, given.steps, given.pairs = (Shape(4, 1, 16),), 2, min(given.pairs, 6)
    rows: list[Row] = []
    for shape in shapes:
        say(f"{shape}: {given.pairs} pairs")
        case = Case(shape, given.steps, given.threads, given.quick)
        row = rounds_of(given.before, given.after, case, given.pairs, given.warmup)
        rows.append({"benchmark": "pairs", **common.machine(), "threads": given.threads, "shape": str(shape), **row})
        common.save(rows, given.json)
    if given.job:
        case = Case(Shape(4, 1, 16), 2, given.threads, True)
        say(f"{case.shape}: {given.job} jobs")
        row = jobs_of(given.before, given.after, case, given.job)
        rows.append({"benchmark": "pairs", **common.machine(), "threads": given.threads, "shape": str(case.shape), **row})
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

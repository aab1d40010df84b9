"""Kills the coordinator, the broker and a member of a consortium at every durable step and at random instants; exit code 1 where anything came out wrong.

Every run must end with the weights of the run that nothing disturbed, bit for bit, each member counted once in each round, and every owner's log intact.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import common
from benchmarks.chaos import cases
from benchmarks.chaos.ground import Ground, Outcome, opened
from benchmarks.common import Row, say

SECTIONS = ("steps", "instants", "middle")


def sections(ground: Ground, points: int | None, instants: int, seed: int) -> Iterator[tuple[str, str, Iterator[Outcome]]]:
    """The section, the kind of what is done, and the runs.

    Args:
        points: Durable steps of each kind; ``None`` for all.
        instants: Runs with kills at random instants.
    """
    for kind in cases.KINDS:
        yield "steps", f"SIGKILL at a durable step: {kind}", cases.at_steps(ground, kind, points)
    yield "instants", "SIGKILL at random instants, 1 to 3 in a run, of any of the three", cases.at_instants(ground, instants, seed)
    yield "middle", "a member killed with its greeting", _each(lambda: cases.greeting(ground))
    yield "middle", "certificates renewed in the middle of a run", _each(lambda: cases.renewal(ground))
    yield "middle", "a member's folder moved to a new machine", _each(lambda: cases.new_machine(ground))
    yield "middle", "a member's folder restored from an older copy", _each(lambda: cases.older_copy(ground))
    yield (
        "middle",
        "killed in the middle of a long upload",
        chain(_each(lambda: cases.upload(ground, "broker")), _each(lambda: cases.upload(ground, "member"))),
    )
    yield "middle", "disk full at a durable step", chain(*(_full(ground, where, points) for where in ("coordinator", "member")))


def _each(case: Callable[[], Outcome]) -> Iterator[Outcome]:
    yield case()


def _full(ground: Ground, where: str, points: int | None) -> Iterator[Outcome]:
    last = len(ground.steps[cases.KINDS[where][0]]) - cases.UNCERTAIN
    for step in cases.spread(last, None if points is None else max(points // 3, 2)):
        yield cases.full_disk(ground, where, step)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| what | runs | kills | longest run | wrong |", "|---|---|---|---|---|"]
    lines += [f"| {row['kind']} | {row['runs']} | {row['kills']} | {row['slowest']:.1f} s | {len(row['wrong'])} |" for row in rows]
    runs, kills, wrong = (sum(row["runs"] for row in rows), sum(row["kills"] for row in rows), sum(len(row["wrong"]) for row in rows))
    return "\n".join([*lines, f"| **all** | **{runs}** | **{kills}** | | **{wrong}** |"])


def main() -> None:
    """The table."""
    options = common.parser(__doc__)
    options.add_argument("sections", nargs="*", metavar="SECTION", help=f"one or more of {', '.join(SECTIONS)}; all unless given")
    options.add_argument("--points", type=int, metavar="N", help="durable steps of each kind, evenly spread; all unless given")
    options.add_argument("--instants", type=int, default=200, metavar="N", help="runs with kills at random instants; default %(default)s")
    options.add_argument("--seed", type=int, default=0, help="of the random instants")
    given = options.parse_args()
    unknown = set(given.sections) - set(SECTIONS)
    if unknown:
        options.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    points, instants = (4, 6) if given.quick else (given.points, given.instants)
    rows: list[Row] = []
    with TemporaryDirectory(prefix="fedfm-chaos-") as folder, opened(Path(folder)) as ground:
        steps = {who: len(names) for who, names in ground.steps.items()}
        say(f"an undisturbed run takes {ground.seconds:.1f} s; durable steps: {steps}")
        for section, kind, outcomes in sections(ground, points, instants, given.seed):
            if given.sections and section not in given.sections:
                continue
            row: Row = {**common.machine(), "benchmark": "chaos", "kind": kind, "runs": 0, "kills": 0, "slowest": 0.0, "wrong": []}
            rows.append(row)
            for outcome in outcomes:
                row["runs"] += 1
                row["kills"] += outcome.kills
                row["slowest"] = max(row["slowest"], outcome.seconds)
                row["wrong"] += [f"{outcome.name}: {what}" for what in outcome.wrong]
                say(
                    f"{outcome.name}: {outcome.kills} kills, {outcome.seconds:.1f} s{''.join(f'; WRONG: {what}' for what in outcome.wrong)}"
                )
                common.save(rows, given.json)
    print(common.where(rows), table(rows), sep="\n")
    print(json.dumps({"runs": sum(row["runs"] for row in rows), "wrong": [what for row in rows for what in row["wrong"]], "steps": steps}))
    if any(row["wrong"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

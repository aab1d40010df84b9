"""What a run costs with 100 to 20,000 registered owners: seconds to prepare, to start, for a round, an evaluation and a resume, and peak memory.

Each row is a fresh process: a tiny Llama, four short rows for each owner, eight owners in a round, and in an evaluation 256 owners with one example
each. *prepare* is what a first run adds, tokenizing and writing; *start* is all else before round 0, with the question to every owner what it has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from time import perf_counter

from benchmarks import common
from benchmarks.common import Row, say
from benchmarks.memory import peak

REGISTERED, QUICK = (100, 1000, 5000, 20_000), (20, 60)
COHORT, EVALUATED, ROWS, LENGTH = 8, 256, 4, 16


def child(registered: int) -> None:
    """Plays one run and prints its memory and seconds."""
    import logging

    import fedfm
    from benchmarks.common import seconds_of
    from benchmarks.work import Shape, Size, federation, owners, workshop
    from fedfm.core.keys import Key
    from fedfm.data import prepare
    from fedfm.models import load_tokenizer
    from fedfm.observers import Evaluate
    from fedfm.run.loop import resume

    logging.getLogger("fedfm").setLevel(logging.ERROR)
    size = Size(32, 2, 64, 4, 512)
    with workshop(size) as folder:
        plan = federation(folder, size, Shape(COHORT, 1, LENGTH), registered=registered, steps=ROWS, rounds=4, bank=COHORT)
        data = replace(plan.data, source=str(owners(folder, registered, ROWS, LENGTH)), test_fraction=0.25)
        plan = replace(plan, data=data, evaluate=Evaluate(every=4, max_examples=1, ends=1, owners=EVALUATED))
        tokenizer, out = load_tokenizer(str(folder / "tokenizer")), folder / "run"
        next(
            iter(fedfm.run(replace(plan, data=replace(data, source=str(owners(folder, 8, ROWS, LENGTH))), rounds=0)))
        )  # what libraries import
        libraries = peak()
        seconds = {
            "prepare": seconds_of(lambda: prepare(data, plan.task, tokenizer, key=Key.root(plan.seed).fold("data"), max_context=128))
        }
        prepared, rounds = peak(), fedfm.run(plan, out=out)
        began = perf_counter()
        _, record = next(rounds)
        seconds["evaluate"] = record.seconds["evaluate"]
        seconds["start"] = perf_counter() - began - seconds["evaluate"]
        seconds["round"] = min(seconds_of(lambda: next(rounds)) for _ in range(2))
        rounds.close()  # type: ignore[attr-defined]
        again = resume(out)
        seconds["resume"] = seconds_of(lambda: next(again)) - seconds["round"]
        again.close()  # type: ignore[attr-defined]
    print(json.dumps({"libraries": libraries, "prepared": prepared, "peak": peak(), "per_stage": seconds}))


def main() -> None:
    """Measures each row and prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--child", type=int, help="internal: one row's process")
    options.add_argument("--registered", type=int, nargs="*", help="other numbers of owners")
    given = options.parse_args()
    if given.child:
        child(given.child)
        return
    rows: list[Row] = []
    for registered in given.registered or (QUICK if given.quick else REGISTERED):
        say(f"{registered} registered owners")
        command = [sys.executable, "-m", "benchmarks.owners", "--child", str(registered)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            {"benchmark": "owners", **common.machine(), "registered": registered, "evaluated": min(EVALUATED, registered), **measured}
        )
        common.save(rows, given.json)
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

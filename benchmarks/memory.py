"""Peak memory of a run with 10, 100 and 1,000 registered clients: it must not grow with their number.

Each row is a fresh process that prepares the data, builds the base (about 90 M parameters, so that it shows), opens a run and plays two rounds
of at most 100 clients with LoRA of rank 8, ten clients to a bank. *libraries* is the process after its imports; *base* the frozen parameters; *bank* ten
clients' parameters, gradients and two moments; *update* one client's delta. What the peak has beyond these is activations and buffers, which depend on the
tokens in a batch.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row, say

REGISTERED, COHORT, BANK, STEPS, LENGTH = (10, 100, 1000), 100, 10, 1, 8
SIZE, QUICK = (
    {"hidden": 768, "layers": 12, "intermediate": 2048, "heads": 12, "vocab": 8192},
    {"hidden": 64, "layers": 2, "intermediate": 128, "heads": 4},
)


def peak() -> int:
    """The most bytes that this process has held at once."""
    try:
        # On Linux a process inherits ru_maxrss from the one that started it; this file has its own maximum.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(registered: int, size: dict[str, Any]) -> None:
    """Plays one run and prints its memory and seconds."""
    import torch

    from benchmarks.common import seconds_of
    from benchmarks.work import Shape, Size, federation, workshop
    from fedfm.observers import Watcher
    from fedfm.observers.base import RunInfo
    from fedfm.run.loop import run

    class Noted(Watcher):
        info: RunInfo

        def start(self, info: RunInfo) -> None:
            self.info = info

    import peft  # noqa: F401  what the first round would import
    from transformers import LlamaForCausalLM  # noqa: F401

    libraries, watcher, cohort = peak(), Noted(), min(COHORT, registered)
    with workshop(Size(**size)) as folder:
        plan = federation(
            folder, Size(**size), Shape(cohort, 1, LENGTH), registered=registered, steps=STEPS, rounds=3, bank=min(BANK, cohort)
        )
        rounds = run(plan, out=folder / "run", watchers=[watcher])
        for _ in range(2):
            next(rounds)
        seconds = seconds_of(lambda: next(rounds))
        rounds.close()  # type: ignore[attr-defined]
    base, update = 4 * watcher.info.num_params, 4 * watcher.info.num_trainable
    measured = {"libraries": libraries, "base": base, "bank": 4 * BANK * update, "update": update, "peak": peak(), "ours_s": seconds}
    print(json.dumps({"cohort": cohort, "clients_per_bank": BANK, "threads": torch.get_num_threads(), **measured}))


def main() -> None:
    """Measures each row and prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--child", help="internal: one row's process")
    given = options.parse_args()
    if given.child:
        child(**json.loads(given.child))
        return
    rows: list[Row] = []
    for registered in REGISTERED[:2] if given.quick else REGISTERED:
        say(f"{registered} registered clients")
        what = json.dumps({"registered": registered, "size": QUICK if given.quick else SIZE})
        done = subprocess.run([sys.executable, "-m", "benchmarks.memory", "--child", what], stdout=subprocess.PIPE, text=True, check=True)
        row = {"benchmark": "memory", **common.machine(), "registered": registered, **json.loads(done.stdout.splitlines()[-1])}
        smallest = rows[0] if rows else row
        rows.append({**row, "theirs_s": smallest["ours_s"], "ratio": row["peak"] / smallest["peak"]})
        common.save(rows, given.json)
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

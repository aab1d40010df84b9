"""Does federating pay? The recipes on real owners' data, beside local-only and centralised training from the same start.

Loss and accuracy are on everybody's held-out data; *local-only* is the mean over the owners' own models. Stopped, it goes on where it was if
``--out`` is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import common
from benchmarks.common import Row, say
from fedfm.recipe import read
from fedfm.run.compare import Comparison, compare

RECIPES = Path(__file__).parents[1] / "recipes"
QUICK = ("rounds=1", "evaluate.max_examples=2", "evaluate.ends=2")


@dataclass(frozen=True)
class Case:
    """A recipe and what is changed in it."""

    name: str
    file: str
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command that gives the same table."""
        return " ".join(("fedfm compare", f"recipes/{self.file}", *self.overrides))


CASES = (
    Case("dolly-lora, by category", "dolly-lora.yaml"),
    Case("dolly-lora, by shepherd_client", "dolly-lora.yaml", ("data.by=shepherd_client",)),
    Case("novels, by author", "novels.yaml"),
    Case("banking77", "banking77.yaml"),
)
METRICS = ("loss", "accuracy", "macro_f1")


def rows_of(case: Case, comparison: Comparison, rounds: int) -> list[Row]:
    """A row for each metric."""
    federated, centralised = comparison.seconds["federated"], comparison.seconds["centralised"]
    common_part = {
        "benchmark": "truth",
        **common.machine(),
        "threads": torch.get_num_threads(),
        "recipe": case.name,
        "command": case.command,
        "rounds": rounds,
        "owners": len(comparison.owners),
        "travelled": comparison.travelled["bytes_up"] + comparison.travelled["bytes_down"],
        "travelled_if_full_model": comparison.travelled["bytes_if_full_model"],
        "ours_s": federated,
        "theirs_s": centralised,
        "ratio": federated / centralised,
    }
    return [
        {**common_part, "metric": metric, **{way: report.get(metric) for way, report in comparison.pooled.items()}}
        for metric in METRICS
        if metric in comparison.pooled["federated"]
    ]


def main() -> None:
    """Plays each case and prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--only", help="cases whose name contains this")
    options.add_argument("--out", type=Path, help="keep the runs there, each with its report")
    given = options.parse_args()
    rows: list[Row] = []
    with TemporaryDirectory(prefix="fedfm-truth-") as temporary:
        for case in CASES:
            if given.only and given.only not in case.name:
                continue
            federation = read(RECIPES / case.file, [*case.overrides, *(QUICK if given.quick else ())])
            say(f"{case.name}: {federation.rounds} rounds")
            out = (given.out or Path(temporary)) / case.name.replace(", ", "-").replace(" ", "-")
            rows += rows_of(case, compare(federation, out), federation.rounds)
            common.save(rows, given.json)
    if not rows:
        options.error(f"--only {given.only}: no case has this in its name; there are {'; '.join(case.name for case in CASES)}")
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

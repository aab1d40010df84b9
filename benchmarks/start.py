"""How long the command line takes to answer: ``fedfm --help`` in less than 0.3 s, ``fedfm list`` in less than 1 s, neither importing torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.common import Row, seconds_of

BOUNDS = {"--help": 0.3, "list": 1.0}


def command() -> list[str]:
    """The installed script, or the same function where only the source tree is there."""
    script = Path(sys.executable).with_name("fedfm")
    return [str(script)] if script.exists() else [sys.executable, "-c", "from fedfm.cli.main import main; main()"]


def row(argument: str, bound: float, repetitions: int) -> Row:
    """One command, a process each time; the first, which may compile bytecode, is not counted."""

    def once() -> None:
        subprocess.run([*command(), argument], stdout=subprocess.DEVNULL, check=True)

    once()
    seconds = [seconds_of(once) for _ in range(repetitions)]
    program = f"import sys; sys.argv = ['fedfm', {argument!r}]; from fedfm.cli.main import main; main()"
    imports = subprocess.run([sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=True).stderr
    return {
        "benchmark": "start",
        **common.machine(),
        "command": f"fedfm {argument}",
        "ours_s": median(seconds),
        "theirs_s": bound,
        "ratio": median(seconds) / bound,
        "ratio_min": min(seconds) / bound,
        "ratio_max": max(seconds) / bound,
        "repetitions": repetitions,
        "imports_torch": any(line.rpartition("|")[2].strip() == "torch" for line in imports.splitlines()),
    }


def main() -> None:
    """Measures each row and prints the table."""
    given = common.parser(__doc__).parse_args()
    common.finish([row(argument, bound, 2 if given.quick else 7) for argument, bound in BOUNDS.items()], given.json)


if __name__ == "__main__":
    main()

"""One run of a sweep, in a process of its own: ``python -m fedfm.run.job RECIPE OUT`` begins it, or goes on with it.

It ends when its standard input does: that is a pipe from the sweep, which the system closes however the sweep ends. What it has completed is kept.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

from fedfm.core.errors import FedfmError
from fedfm.observers.progress import Progress
from fedfm.recipe import read
from fedfm.run.folder import RECIPE
from fedfm.run.loop import resume, run


def main(recipe: Path, out: Path) -> int:
    """Plays the run to its end; the exit code is 2 after an error of ours, whose message is the last line on standard error."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("fedfm").setLevel(logging.INFO)
    watchers = [Progress(file=sys.stdout, live=False)]
    try:
        for _ in resume(out, watchers=watchers) if (out / RECIPE).is_file() else run(read(recipe), out=out, watchers=watchers):
            pass
    except FedfmError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _end_with_the_sweep() -> None:
    # Not sys.stdin, whose lock the interpreter wants when it ends.
    while os.read(0, 1):
        pass
    # Every durable step may be the last one, so nothing need be tidied up.
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

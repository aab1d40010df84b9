"""Runs killed with SIGKILL, resumed, and held against an unbroken one. The forks and kills are those of ``tests/test_resume.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.robustness.ground import Tally

ROOT = Path(__file__).parents[2]
SWEEPS = {
    ("every-step", "defaults"): "SIGKILL at each durable step; the defaults",
    ("random-instants", "defaults"): "SIGKILL at random instants, 1 to 4 in a run; the defaults",
    ("random-instants", "halved"): "the same, where a bank of two does not fit into memory",
}


def run(quick: bool) -> Iterator[Tally]:
    """The sweeps; ``quick`` plays the last alone."""
    for (sweep, engine), kind in list(SWEEPS.items())[-1 if quick else 0 :]:
        tally = Tally("kills", kind)
        with TemporaryDirectory(prefix="fedfm-kills-") as folder:
            path = f"{ROOT / 'src'}:{ROOT / 'tests'}"
            environment = {**os.environ, "PYTHONPATH": path, "FEDFM_CACHE": str(Path(folder) / "cache")}
            # Threads are what a user gets who says nothing.
            environment.pop("OMP_NUM_THREADS", None)
            began = perf_counter()
            command = [sys.executable, str(ROOT / "tests" / "test_resume.py"), folder, sweep, engine]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            tally.outcomes["failed"] += 1
            tally.wrong.append(f"the sweep failed: {done.stderr[-300:]}")
        else:
            report = json.loads(done.stdout.splitlines()[-1])
            tally.outcomes["kills"] = report["kills"]
            tally.kind += f" ({report['runs']} runs, bank {report['bank']}, {report['threads']} threads)"
            tally.wrong += report["differences"]
            tally.slowest = (perf_counter() - began) / max(report["runs"], 1)
        yield tally

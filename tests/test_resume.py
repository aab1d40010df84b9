"""Exact resume, with real processes: killed with SIGKILL at every durable step and at random instants, then resumed.

``python tests/test_resume.py FOLDER SWEEP ENGINE`` runs one sweep and tells what differed; the tests start it as a process of its own,
because it forks: everything is imported once, and each job is a fork that runs and is killed. ``ENGINE`` is ``defaults`` (the bank and the
threads that a recipe gets which says nothing of them) or ``halved`` (the same, and no bank of two clients fits into memory).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROUNDS = 2


@pytest.mark.slow
@pytest.mark.parametrize(("sweep", "engine"), [("every-step", "defaults"), ("random-instants", "halved")])
def test_a_killed_run_ends_as_one_that_was_not(sweep: str, engine: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
        "FEDFM_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), sweep, engine], capture_output=True, text=True, env=environment, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= report["wanted"] and report["differences"] == []


class Sweep:
    """Jobs in forks of this process, and what an unbroken run left.

    Args:
        crowded: Whether a bank of more than one client runs out of memory.
    """

    def __init__(self, folder: Path, crowded: bool = False) -> None:
        import torch
        from test_run import STATEFUL, small

        from fedfm.engines import Embedded
        from fedfm.run.loop import run

        # A fork cannot use the threads of its parent, so the parent never starts any.
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.folder, self.crowded, self.kills, self.runs, self.differences = folder, crowded, 0, 0, list[str]()
        self.federation = small(folder, rounds=ROUNDS, engine=Embedded(), **STATEFUL)
        # Imports what a job will need, once. No gradients here: autograd refuses to work in a fork of a process that used it.
        for _ in run(replace(self.federation, rounds=0), out=folder / "warm"):
            pass
        self.steps = folder / "steps"
        assert self.job(folder / "whole", count=True) == 0
        self.num_steps = len(self.steps.read_text().splitlines())
        self.whole = self.left(folder / "whole")

    def job(self, out: Path, kill_at: int | None = None, after: float | None = None, count: bool = False) -> int:
        """Runs or resumes ``out`` in a fork; the signal that ended it, 0 if it ended by itself."""
        child = os.fork()
        if child == 0:
            try:
                self.work(out, kill_at, count)
                os._exit(0)
            except BaseException as error:
                print(f"{out.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError(f"a job in {out.name} failed by itself")
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    def work(self, out: Path, kill_at: int | None, count: bool) -> None:
        import torch

        from fedfm.core import disk
        from fedfm.run.folder import RECIPE
        from fedfm.run.loop import resume, run

        torch.set_num_threads(self.threads)
        if self.crowded:
            crowd()
        if kill_at is not None:
            os.environ["FEDFM_KILL_AT"] = str(kill_at)
        if count:
            disk.on_step = lambda name: print(name, file=self.steps.open("a"), flush=True)
        for _ in resume(out) if (out / RECIPE).exists() else run(self.federation, out=out):
            pass

    def left(self, out: Path) -> dict[str, Any]:
        from test_opened import of_lines, table
        from test_run import counts, metrics, model_bytes

        rows = "as the lines say" if table(out) == of_lines(out) else table(out)
        return {"metrics": metrics(out), "counts": counts(out), "table": rows, **model_bytes(out)}

    def finish(self, out: Path, how: str) -> None:
        """Resumes without a kill and compares."""
        assert self.job(out) == 0
        left = self.left(out)
        self.runs += 1
        self.differences += [f"{how}: {name}" for name in self.whole.keys() | left.keys() if self.whole.get(name) != left.get(name)]

    def every_step(self) -> int:
        """One kill at each durable step."""
        for step in range(1, self.num_steps + 1):
            out = self.folder / f"step-{step}"
            self.kills += self.job(out, kill_at=step) == signal.SIGKILL
            self.finish(out, f"killed at step {step}")
        return self.num_steps

    def random_instants(self, runs: int = 12) -> int:
        """Several kills in each run, at any instant and at random steps of what follows."""
        rng, began = random.Random(0), time.perf_counter()
        self.job(self.folder / "timed")
        whole = time.perf_counter() - began
        for i in range(runs):
            out = self.folder / f"random-{i}"
            for _ in range(rng.randint(1, 4)):
                if rng.random() < 0.7:
                    self.kills += self.job(out, after=rng.uniform(0, whole)) == signal.SIGKILL
                else:
                    self.kills += self.job(out, kill_at=rng.randint(1, self.num_steps)) == signal.SIGKILL
            self.finish(out, f"random run {i}")
        return runs // 2


def crowd() -> None:
    """No bank of more than one client fits into memory."""
    import torch

    from fedfm.client.bank import Bank

    train = Bank.train

    def crowded(bank: Bank, start: Any, jobs: Any, *others: Any, **named: Any) -> Any:
        if len(jobs) > 1:
            raise torch.OutOfMemoryError("a bank of two does not fit")
        return train(bank, start, jobs, *others, **named)

    Bank.train = crowded  # type: ignore[method-assign]


if __name__ == "__main__":
    sweep = Sweep(Path(sys.argv[1]), crowded=sys.argv[3] == "halved")
    from fedfm.run.folder import read_journal

    wanted = sweep.every_step() if sys.argv[2] == "every-step" else sweep.random_instants()
    report = {"kills": sweep.kills, "wanted": wanted, "runs": sweep.runs, "differences": sweep.differences}
    report["bank"] = read_journal(sweep.folder / "whole").choices.get("bank")
    print(json.dumps({**report, "steps": sweep.num_steps, "threads": sweep.threads}))

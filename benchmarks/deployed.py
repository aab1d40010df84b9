"""A round across organisations with members that answer at once: what the engine itself costs, in seconds, bytes a second and memory.

A broker, a coordinator and the members are processes on this machine; all members share one. A member takes each request as a member does (signature,
seal, replays, the owner's own folder), and answers a training request with an update as large as the parameters that it was sent, so that nothing is trained and all of the round's time is the
engine's. *small* is a round over little; *large* one over about 100 MB of float32 down to each member and up from each. *MB/s* are the bytes of all members, down and up, by
the seconds of a round. *coordinator* and *broker* are the largest resident memory of each, beyond what it was before the first round. *killed* says what became of a run whose
server was killed with SIGKILL in the middle and started again, and after how many seconds its next round was complete.

Beside it Flower's deployment (SuperLink, SuperNodes) with an app that answers with what it was sent, without TLS and without signatures, which is in its favour; its
SuperLink is counted as the coordinator, with the processes that it starts.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks import common
from benchmarks.common import Row, say
from benchmarks.peers.run import FLOWER

# Float32 values of a payload of 100 MB: a square matrix that is all that trains.
LARGE, SMALL = 25_000_000, 1_000
NAMES = tuple(f"member-{k}" for k in range(8))
_TEXT = ["one two three four five six seven eight"] * 4


@dataclass
class Peaks:
    """The largest resident memory of groups of processes, looked at twenty times a second.

    Args:
        groups: The first process of each group; what it started counts as well.
    """

    groups: dict[str, Callable[[], int | None]]
    before: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def watched(self) -> Iterator[Peaks]:
        """Looks until the block ends."""
        stop = threading.Event()
        self.before = {name: _resident(of()) for name, of in self.groups.items()}

        def look() -> None:
            while not stop.wait(0.05):
                for name, of in self.groups.items():
                    self.most[name] = max(self.most.get(name, 0), _resident(of()))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()

    def grown(self, name: str) -> int:
        """Bytes beyond what a group held when watching began."""
        return max(self.most.get(name, 0) - self.before.get(name, 0), 0)


def _resident(pid: int | None) -> int:
    if pid is None:
        return 0
    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
    except psutil.Error:
        return 0


# --- ours -----------------------------------------------------------------------------------------------------------------


def members(folders: list[str]) -> None:
    """Answers for all of them, each in a thread of its own, until the process is killed."""
    import torch

    from fedfm.core.messages import Reply, Request
    from fedfm.core.tree import Tree
    from fedfm.service.member import Member
    from fedfm.silos.membership import Membership

    torch.set_num_threads(1)

    class Echo(Member):
        """A member that does no work: it answers with the same small update in each round."""

        update: Tree | None = None

        def _answer(self, header: object, request: Request, fetch: object) -> Reply:
            if request.verb == "describe":
                return Reply(self.name, request.verb, request.round, {}, {"train": 4.0, "test": 0.0, "tokens": 32.0})
            numbers = {"weight": 1.0, "loss": 1.0, "steps": 1.0, "examples": 1.0, "tokens": 8.0, "padding": 0.0}
            if self.update is None:
                self.update = {name: torch.full_like(leaf, 1e-4) for name, leaf in request.tensors.items()}
            return Reply(self.name, request.verb, request.round, self.update, numbers)

    threads = [threading.Thread(target=Echo(Membership.read(Path(folder)), "", device="cpu").serve) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def coordinator(given: dict[str, Any]) -> None:
    """Plays a run, or goes on with it, and prints a line when it is ready and for each round."""
    from fedfm.data import Data
    from fedfm.engines import Nats
    from fedfm.federation import Federation
    from fedfm.local import SGD
    from fedfm.observers import Evaluate
    from fedfm.run.loop import resume, run
    from fedfm.tasks import CausalLM
    from fedfm.testing import tiny
    from fedfm.tuning import Full

    out = Path(given["out"])
    if out.exists():
        rounds = resume(out)
    else:
        # All but a few of the values are those of three matrices in each of two layers.
        width = given["values"] // (2 * 3 * 32)
        model = tiny.spec("Llama", intermediate_size=width) if given["values"] > SMALL else tiny.spec("Llama")
        plan = Federation(
            model=model, data=Data("each member's own"), task=CausalLM(max_length=16), tuning=Full(), local=SGD(lr=0.1, steps=1),
            engine=Nats(given["consortium"], device="cpu"), evaluate=Evaluate(every=0), rounds=given["rounds"],
        )  # fmt: skip
        rounds = run(plan, out=out)
    for state, record in rounds:
        size = 4 * sum(leaf.numel() for leaf in state.params.values())
        told = {"round": record.round, "answered": int(record.metrics.get("num_clients", 0)), "at": time.time(), "bytes": size}
        print(json.dumps(told), flush=True)


def _child(what: str, given: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.deployed", what, json.dumps(given)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _rounds(process: subprocess.Popen[str], last: int) -> Iterator[dict[str, Any]]:
    """What a coordinator says of its rounds, to the round ``last``."""
    assert process.stdout is not None
    for line in process.stdout:
        told = json.loads(line)
        yield told
        if told["round"] >= last:
            return
    raise SystemExit(f"The coordinator ended with {process.wait()}.")


def ours(count: int, values: int, rounds: int, kill: bool) -> Row:
    """Rounds over the project's own engine."""
    from fedfm.testing.silos import Silos

    rows = [{"text": text} for text in _TEXT]
    with (
        TemporaryDirectory(prefix="fedfm-benchmark-") as name,
        Silos(Path(name) / "silos", dict.fromkeys(NAMES[:count], rows)) as silos,
    ):
        echo = _child("members", [str(silos.home(member)) for member in NAMES[:count]])
        total = rounds + 2
        given = {"consortium": str(silos.home("coordinator")), "out": str(Path(name) / "run"), "values": values, "rounds": total}
        process = _child("coordinator", given)
        try:
            first, *_ = list(_rounds(process, 0))
            broker = silos.broker.process()
            assert broker is not None
            peaks = Peaks({"coordinator": lambda: process.pid, "broker": lambda: broker.pid})
            with peaks.watched():
                told = list(_rounds(process, 2 if kill else total))
                outcome = _resumed(process, given, total) if kill else None
        finally:
            process.kill()
            echo.kill()
            process.wait()
            echo.wait()
    times = [one["at"] for one in told]
    return _row("fedfm", count, first["bytes"], [after - before for before, after in pairwise(times)], peaks, outcome)


def _resumed(process: subprocess.Popen[str], given: dict[str, Any], total: int) -> str:
    """Kills the coordinator in the middle of a round, starts it again, and says what became of the run."""
    time.sleep(0.05)
    process.kill()
    process.wait()
    began = time.time()
    again = _child("coordinator", given)
    try:
        told = [one for one in _rounds(again, total) if one["at"] > began]
    finally:
        again.kill()
        again.wait()
    rounds = [one["round"] for one in told if one["round"] > 0]
    return f"went on; its next round was complete after {told[1]['at'] - began:.1f} s, and round {rounds[-1]} of {total} was its last"


# --- Flower ---------------------------------------------------------------------------------------------------------------


def flower(count: int, values: int, rounds: int, kill: bool) -> Row:
    """The same in Flower's deployment; a row without numbers where it is not installed."""
    from benchmarks.peers.flower.deployment import Deployment, await_rounds, noted, seconds

    if not FLOWER.exists():
        return {**_row("Flower", count, 4 * values, [], Peaks({}), None), "note": "not installed: python -m benchmarks.peers install"}
    with TemporaryDirectory(prefix="fedfm-benchmark-") as name, Deployment(Path(name), count) as deployment:
        time.sleep(5.0)
        peaks = Peaks({"coordinator": deployment.pid})
        with peaks.watched():
            out = deployment.run(values, rounds + 2)
            told = await_rounds(out, 2 if kill else rounds + 2, 600.0)
            outcome = None
            if kill:
                before = len(noted(out))
                deployment.kill()
                deployment.serve()
                after = len(await_rounds(out, rounds + 2, 120.0))
                outcome = (
                    f"{after - before} more of {rounds + 2 - before} rounds within 120 s"
                    if after > before
                    else "ended: no further round within 120 s"
                )
    return _row("Flower", count, 4 * values, seconds(told, 2), peaks, outcome)


def _row(system: str, count: int, size: int, taken: list[float], peaks: Peaks, outcome: str | None) -> Row:
    middle = median(taken) if taken else None
    return {
        "benchmark": "deployed",
        **common.machine(),
        "system": system,
        "members": count,
        "payload": size,
        "round_s": middle,
        "round_max": max(taken, default=None),
        "rate": None if middle is None or size < 1_000_000 else 2 * count * size / middle,
        "coordinator": peaks.grown("coordinator"),
        "broker": peaks.grown("broker") if "broker" in peaks.groups else None,
        "killed": outcome,
        "repetitions": len(taken),
    }


def main() -> None:
    """Measures each row and prints the table."""
    options = common.parser(__doc__)
    options.add_argument("child", nargs="?", choices=["members", "coordinator"], help="internal: what a process of its own does")
    options.add_argument("given", nargs="?", help="internal")
    options.add_argument("--alone", action="store_true", help="without Flower")
    chosen = options.parse_args()
    if chosen.child:
        logging.basicConfig(level=logging.WARNING)
        (members if chosen.child == "members" else coordinator)(json.loads(chosen.given))
        return
    small = [(8, SMALL, 3 if chosen.quick else 20)]
    large = [] if chosen.quick else [(2, LARGE, 3), (4, LARGE, 3)]
    rows: list[Row] = []
    for system in (ours,) if chosen.alone or chosen.quick else (ours, flower):
        for count, values, rounds in [*small, *large]:
            say(f"{system.__name__}: {count} members, {values} values")
            rows.append(system(count, values, min(rounds, 4) if system is flower else rounds, False))
        say(f"{system.__name__}: its server is killed")
        rows.append(system(2, SMALL, 4, True))
    common.save(rows, chosen.json)
    common.finish(rows, chosen.json)


if __name__ == "__main__":
    main()

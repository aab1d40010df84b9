"""What secure aggregation costs: CPU time of one client and of the server, beside its own roofline and beside Flower's SecAgg+.

A row is one sum that is really made: every client's messages, masks and shares, with the protocol of :mod:`fedfm.secagg`. *client* is the median of one client's CPU time,
from the keys to the shares that it gives back: the digest of the model that binds its masks, quantisation, tags and signatures included. *keys* is the part of
it that comes once for a job. *masks* is the speed of AES-256-CTR keystream plus addition inside the round; *roofline* is that of the two operations
alone, measured in the same sitting, without anything around them. *server* is its CPU time from the first vector to the opened sum, with so many dropouts.
*bytes* are those of the masked vector with its tags for each value. *Flower* is the CPU time of ``secaggplus_mod``'s own client functions in an environment of
their own (``python -m benchmarks.peers install``) for the same values, clients and neighbours; without them it is not measured.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Row, say
from benchmarks.peers.run import FLOWER, ROOT
from fedfm.core import leaves as declare
from fedfm.core.leaves import Leaf
from fedfm.secagg import masks
from fedfm.secagg.agreement import Identity, Session
from fedfm.secagg.collector import Collector
from fedfm.secagg.member import BOX, SEALED, Member
from fedfm.secagg.quantise import Quantiser
from fedfm.secagg.terms import Rules

ERRAND = "train/1/0"


@dataclass(frozen=True)
class Case:
    """A sum.

    Args:
        n: Clients.
        size: Values of each client's update.
        dropped: Clients whose vectors never arrive.
        dropout: Share of the clients that the plan lets drop out.
        repetitions: Clients that are timed.
        flower: Whether Flower's functions are timed as well.
    """

    n: int
    size: int
    dropped: int = 0
    dropout: float = 0.1
    corrupt: float = 0.1
    repetitions: int = 5
    flower: bool = True


CASES = (
    Case(10, 1_000_000),
    Case(100, 1_000_000),
    Case(100, 1_000_000, dropped=30, dropout=0.3),
    Case(4, 100_000_000, dropped=1, repetitions=3, flower=False),
)
QUICK = (Case(4, 10_000, dropped=1, repetitions=2), Case(34, 10_000, repetitions=2, flower=False))


@dataclass
class Clocks:
    """CPU seconds of each client by stage."""

    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def time(self, name: str, stage: str, work: Callable[[], Any]) -> Any:
        began = process_time()
        result = work()
        stages = self.seconds.setdefault(name, {})
        stages[stage] = stages.get(stage, 0.0) + process_time() - began
        return result

    def median(self, names: list[str], stages: tuple[str, ...]) -> float:
        return median(sum(self.seconds[name].get(stage, 0.0) for stage in stages) for name in names)


def leaves(size: int) -> tuple[Leaf, ...]:
    return (Leaf("w", (size,)), declare.number("weight"))


class Sum:
    """One sum, and how long each did."""

    def __init__(self, case: Case) -> None:
        self.case, self.clocks = case, Clocks()
        self.rules = Rules(case.corrupt, case.dropout, 3, None, 1.0, 16384.0)
        self.names = [f"client-{i:04}" for i in range(case.n)]
        self.sessions = {name: Session(Identity()) for name in self.names}
        self.collector = Collector("job", ERRAND, self.rules)
        self.server = 0.0
        generator = torch.Generator().manual_seed(0)
        self.update = torch.randn(case.size, generator=generator) * 1e-3
        self.timed = self.names[case.dropped : case.dropped + case.repetitions]

    def play(self) -> None:
        """Two rounds of keys, so that the second finds them agreed; then one sum."""
        self.prepare(Collector("job", ERRAND, self.rules), "first ")
        members = self.prepare(self.collector, "")
        self.vectors(members)
        self.open(members)

    def prepare(self, collector: Collector, prefix: str) -> Mapping[str, Member]:
        """Keys and shares of everybody; a client whose vector is never sent deals all the same."""
        clock = self.clocks.time
        members = {
            name: Member(name, session, "job", ERRAND, self.rules, lambda name, public: True) for name, session in self.sessions.items()
        }
        for name, member in members.items():
            collector.hello(name, clock(name, f"{prefix}keys", member.hello))
        terms, roster = collector.begin("body", lambda n: Quantiser(leaves(self.case.size), n, 1.0, 16384.0))
        for name, member in members.items():
            collector.join(name, clock(name, f"{prefix}join", partial(member.join, terms, roster)))
        lots = collector.draw()
        for name, member in members.items():
            collector.pair(name, clock(name, f"{prefix}join", partial(member.pair, lots)))
        for name, member in members.items():
            keys = rows(collector.keys_for(name), SEALED)
            collector.deal(name, clock(name, f"{prefix}deal", partial(member.deal, *keys)))
        collector.close_shares()
        if prefix:
            # Every client opens what it was dealt, after which its neighbours need not seal it a key again.
            for name, member in members.items():
                senders, boxes = rows(collector.boxes_for(name), BOX)
                for sender, box in zip(senders, boxes, strict=True):
                    member._opened(int(sender), box.tobytes())
        return members

    def vectors(self, members: Mapping[str, Member]) -> None:
        """The masked vectors of all but those who drop out."""
        collector, clock, blob = self.collector, self.clocks.time, self.update.numpy().tobytes()
        for i, name in enumerate(self.names[self.case.dropped :]):
            if i % 10 == 0:
                say(f"  vector {i + 1} of {self.case.n - self.case.dropped}")
            clock(name, "digest", lambda: hashlib.blake2b(blob, digest_size=16).hexdigest())
            narrow, wide = clock(
                name, "quantise", lambda: collector.quantiser.encode({"w": self.update}, {"weight": 100.0}, 100.0, bytes(32))
            )
            told = (collector.shared, *rows(collector.boxes_for(name), BOX), narrow, wide)
            message = clock(name, "mask", partial(members[name].mask, *told))
            self.bytes = sum(array.nbytes for array in message.values())
            began = process_time()
            collector.add(name, message)
            self.server += process_time() - began
            del message, narrow, told

    def open(self, members: Mapping[str, Member]) -> None:
        """The sum; checked against the plain one."""
        collector, clock = self.collector, self.clocks.time
        sets = collector.close_vectors()
        alive = [collector.names[place] for place in sets[0]]
        for name in alive:
            collector.sign(name, clock(name, "sign", partial(members[name].sign, *sets)))
        signed = rows(collector.signatures(), 64)
        for name in alive:
            collector.reveal(name, clock(name, "reveal", partial(members[name].reveal, *sets, *signed)))
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = process_time()
        narrow, _ = collector.open()
        self.unmask = process_time() - began
        began = process_time()
        if not collector.is_tagged():
            raise AssertionError("the sum is not that of what was tagged")
        self.check = process_time() - began
        self.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) * 1024
        plain, _ = collector.quantiser.encode({"w": self.update}, {"weight": 100.0}, 100.0, bytes(32))
        if not np.array_equal(narrow, plain * np.uint32(len(alive))):
            raise AssertionError("the secure sum is not the plain sum")


def rows(pairs: tuple[list[int], list[bytes]], size: int) -> tuple[Any, Any]:
    places, data = pairs
    return np.array(places, dtype=np.int32), np.frombuffer(b"".join(data), dtype=np.uint8).reshape(len(data), size)


def roofline(size: int) -> float:
    """Values a second of AES-256-CTR plus an addition in place, with nothing around them; the best of several times and sizes of a block."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    best = 0.0
    for block in (1 << 14, 1 << 15, 1 << 16) * 4:
        cipher = Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor()
        zeros, buffer = bytes(4 * block), bytearray(4 * block)
        values, total = np.frombuffer(buffer, dtype="<u4"), np.zeros(block, dtype="<u4")
        times = max(1, size // block)
        began = process_time()
        for _ in range(times):
            cipher.update_into(zeros, buffer)
            np.add(total, values, out=total)
        best = max(best, times * block / (process_time() - began))
    return best


def masking(n: int, size: int) -> float:
    """Values a second of the masks of ``n`` neighbours over a whole vector, as a round adds them; the best of several."""
    vector, best = np.zeros(size, dtype="<u4"), 0.0
    for _ in range(5):
        seeds = [i.to_bytes(32, "big") for i in range(n)]
        began = process_time()
        masks.add_masks(np.zeros(36, dtype="<u8"), vector, seeds[: n // 2], seeds[n // 2 :])
        best = max(best, n * size / (process_time() - began))
    return best


def flower(case: Case, shares: int) -> float | None:
    """Seconds of CPU of one Flower client for the same; ``None`` where it is not installed."""
    if not (case.flower and FLOWER.exists()):
        return None
    say(f"Flower's client functions, {case.n} clients")
    options = {"n": case.n, "size": case.size, "shares": shares, "repetitions": case.repetitions}
    done = subprocess.run(
        [FLOWER, "-m", "benchmarks.peers.flower.secagg", json.dumps(options)],
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["cpu"])


def row(case: Case) -> Row:
    say(f"{case.n} clients, {case.size} values, {case.dropped} dropped")
    gc.collect()
    fastest = [roofline(min(case.size, 10_000_000))]
    one = Sum(case)
    one.play()
    fastest.append(roofline(min(case.size, 10_000_000)))
    numbers, clocks, timed = one.collector.graph, one.clocks, one.timed
    stages = ("keys", "join", "deal", "digest", "quantise", "mask", "sign", "reveal")
    theirs = flower(case, numbers.k + 1)
    ours = clocks.median(timed, stages)
    return {
        "benchmark": "secagg",
        **common.machine(),
        "clients": case.n,
        "values": case.size,
        "dropped": case.dropped,
        "k": numbers.k,
        "t": numbers.t,
        "ours_s": ours,
        "theirs_s": theirs,
        "ratio": None if theirs is None else theirs / ours,
        "per_stage": {stage: clocks.median(timed, (stage,)) for stage in stages},
        "keys_s": clocks.median(timed, ("first keys", "first join", "first deal")),
        "masks": masking(numbers.k + 1 if case.size < 10_000_000 else 4, case.size),
        "roofline": max(fastest),
        "bytes": one.bytes / case.size,
        "server_s": one.server,
        "unmask_s": one.unmask,
        "check_s": one.check,
        "grown": one.grown,
    }


def main() -> None:
    parser = common.parser(__doc__)
    options = parser.parse_args()
    table = []
    # Each in a process of its own, as a client is: what an earlier case left in memory slows a later one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for case in QUICK if options.quick else CASES:
            table.append(processes.submit(row, case).result())
            common.save(table, options.json)
    common.finish(table, options.json)


if __name__ == "__main__":
    main()

"""How fast a payload travels, sealed and signed: at least 100 MB/s up on two cores, sealing, hashing and TLS included.

*seal* and *open* are one thread of this process without a network. *up* is a member's whole work, from the payload to the broker's last
acknowledgement of the head; *down* is the receiver's, from the head to the last verified byte. The broker is a real nats-server on this machine with
mutual TLS, one key per user and JetStream on disk; *sync* is how long it may keep what it has acknowledged from the disk. *round trip* is a small sealed
message up and its acknowledgement. The broker's memory is its largest resident set so far. The processors' seconds of both sides do not depend on what else
runs: with two cores, the larger of the two (or half of their sum) bounds what a quiet machine can do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

from benchmarks import common
from benchmarks.common import Row, say, seconds_of
from fedfm.testing.broker import Broker
from fedfm.wire.envelope import Header, Opener, Sealed, seal
from fedfm.wire.identity import Identity
from fedfm.wire.nats import Connection
from fedfm.wire.stored import Stored
from fedfm.wire.subjects import Names
from fedfm.wire.transfer import Memory, receive, send

SIZE, QUICK, SMALL = 100_000_000, 3_000_000, 1000
NAMES = Names("bench")
COORDINATOR, MEMBER = Identity.create("c0"), Identity.create("member")


class Nowhere(Memory):
    """Takes chunks and keeps none."""

    def put(self, id: str, index: int, data: bytes) -> None:
        """Drops a chunk."""


def sealed(payload: bytes) -> Sealed:
    return seal(payload, MEMBER, [COORDINATOR.card], Header.now("bench", "run", 1, 1, "reply"))


def opener() -> Opener:
    return Opener(COORDINATOR, {"member": MEMBER.card}, "bench")


def drain(pieces: Iterator[bytes]) -> int:
    return sum(map(len, pieces))


def row(stage: str, size: int, work: Callable[[], object], repetitions: int, sync: str | None = None, broker: Broker | None = None) -> Row:
    """Times ``work``; the first time is not counted."""
    say(f"{stage}, {size} bytes" + (f", sync {sync}" if sync else ""))
    work()
    before = _cpu(os.getpid()), 0.0 if broker is None else _cpu(broker.pid)
    seconds = [seconds_of(work) for _ in range(repetitions)]
    after = _cpu(os.getpid()), 0.0 if broker is None else _cpu(broker.pid)
    peak = None if broker is None else _peak(broker.pid)
    rates = sorted(size / taken for taken in seconds)
    return {
        "benchmark": "wire",
        **common.machine(),
        "stage": stage,
        "payload": size,
        "sync": sync,
        "ours_s": median(seconds),
        "rate": median(rates),
        "rate_min": rates[0],
        "rate_max": rates[-1],
        "cpu_here": (after[0] - before[0]) / repetitions,
        "cpu_broker": None if broker is None else (after[1] - before[1]) / repetitions,
        "broker": peak,
        "repetitions": repetitions,
    }


def _cpu(pid: int) -> float:
    """Seconds of processors that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines() if Path(f"/proc/{pid}").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), psutil.Process(pid).memory_info().rss)


def alone(payload: bytes, repetitions: int) -> Iterator[Row]:
    """Without a network."""
    yield row("seal", len(payload), lambda: send(sealed(payload), Nowhere()), repetitions)
    store = Memory()
    head = send(sealed(payload), store)
    yield row("open", len(payload), lambda: drain(receive(opener().read(head), store)), repetitions)


def through(payload: bytes, repetitions: int, sync: str) -> Iterator[Row]:
    """Through a broker."""
    users = {COORDINATOR.nkey: NAMES.coordinator_rights("c0"), MEMBER.nkey: NAMES.member_rights("member")}
    up = NAMES.up("member")
    with TemporaryDirectory(prefix="fedfm-benchmark-") as folder, Broker(Path(folder), users, sync_interval=sync) as broker:
        people = ((COORDINATOR, "c0"), (MEMBER, "member"))
        coordinator, member = (Connection([broker.url], NAMES.inbox(name), person.nkey, broker.tls()) for person, name in people)
        with coordinator, member:
            coordinator.make_stream(up, 1 << 30)
            coordinator.make_consumer(up)
            there, here = Stored(member, up), Stored(coordinator, up)
            heads: list[bytes] = []

            def go_up() -> None:
                if heads:
                    here.drop(opener().read(heads.pop()).header.id)
                heads.append(send(sealed(payload), there))
                member.publish(up.message, heads[-1])

            yield row("up", len(payload), go_up, repetitions, sync, broker)
            yield row("down", len(payload), lambda: drain(receive(opener().read(heads[-1]), here)), repetitions, sync, broker)
            small = payload[:SMALL]
            yield row("round trip", len(small), lambda: member.publish(up.message, sealed(small).message()), 20 * repetitions, sync, broker)


def main() -> None:
    """Measures each row and prints the table."""
    given = common.parser(__doc__).parse_args()
    payload, repetitions = os.urandom(QUICK if given.quick else SIZE), 2 if given.quick else 7
    rows = list(alone(payload, repetitions))
    for sync in ("2m",) if given.quick else ("2m", "always"):
        rows += through(payload, repetitions, sync)
        common.save(rows, given.json)
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

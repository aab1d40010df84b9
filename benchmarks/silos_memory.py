"""How much a coordinator's memory grows while it plays rounds over a broker: at most 4 updates, the same with 2, 8 and 32 members.

Each row is a fresh coordinator and a real nats-server on this machine, with mutual TLS, one key per member and JetStream on disk. The coordinator has opened a
model of about 25 million parameters, all of which train, and its session; *idle* is what it holds then, with the model. Then it plays two rounds as a run
does, the first with two members, which leaves what every later round begins with, and the second with all: the parameters go out, each member answers with a float32 update of 100 MB, the mean is taken, the step is made, and the round is committed to disk. *peak* is the most it held at once, and
*growth* is the peak over idle in updates. The members are real in all but their work: each has its own keys, connection and subjects, opens and checks the body that
it is sent, and seals its own update to the coordinator; the update is drawn instead of trained. They share a process, and answer one after the other. The broker's
memory is its largest resident set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.common import Row, say
from benchmarks.memory import peak

if TYPE_CHECKING:
    from fedfm.core.messages import Reply, Request
    from fedfm.wire.link import Link

# The broker sets aside what each of 65 streams may hold, in gigabytes.
MEMBERS, STORAGE = (2, 8, 32), 0.25
SIZE = {"hidden_size": 512, "intermediate_size": 1600, "num_hidden_layers": 8, "num_attention_heads": 8}
QUICK = {"hidden_size": 256, "intermediate_size": 800, "num_hidden_layers": 2, "num_attention_heads": 8}
# Kilobytes of the process, by the name that Linux gives them.
_STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes that this process holds now."""
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmRSS"))


def forget_peak() -> None:
    """Lets :func:`peak` count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def coordinate(folder: str, names: Sequence[str], size: dict[str, int]) -> None:
    """Plays the rounds in this process and prints its memory."""
    import gc

    from fedfm.coordination import Coordination
    from fedfm.core.round import RoundRecord, play, start
    from fedfm.core.tree import num_bytes
    from fedfm.data import Data
    from fedfm.engines import Nats
    from fedfm.federation import Federation
    from fedfm.local import SGD
    from fedfm.recipe import dump
    from fedfm.run.folder import RunFolder
    from fedfm.run.ledger import Ledger
    from fedfm.run.loop import envelope
    from fedfm.tasks import CausalLM
    from fedfm.testing import tiny
    from fedfm.tuning import Full

    plan = Federation(
        model=tiny.spec("Llama", **size),
        data=Data("elsewhere.jsonl"),
        task=CausalLM(max_length=16),
        tuning=Full(),
        local=SGD(lr=0.1, steps=1, batch_size=1),
        engine=Nats(folder, device="cpu", storage=STORAGE),
        deadline=3600.0,
    )
    run = RunFolder.create(Path(folder) / "run", dump(plan))
    site = Coordination.build(plan, names, run.path)
    with run, site.open() as session:
        state, ledger = start(site.federation, site.house.start), Ledger()
        run.note("start", **envelope(plan), recipe="-")
        run.commit(state, RoundRecord(0, (), (), {}, {}, 0, 0), ledger)
        gc.collect()
        idle = resident()
        forget_peak()
        peaks, seconds = [], []
        for asked in (names[:2], names):
            state, record = play(site.federation, state, session, tuple(asked), site.key)
            assert not record.failures and record.metrics["num_clients"] == len(asked), record.failures
            ledger = ledger.add(record, 0)
            run.commit(state, record, ledger)
            peaks.append(peak())
            seconds.append(sum(record.seconds.values()))
    update = num_bytes(state.params)
    print(json.dumps({"update": update, "idle": idle, "peak": peaks[-1], "growth": (peaks[-1] - idle) / update, "ours_s": seconds[-1]}))


def answer_all(folders: Sequence[str]) -> None:
    """Answers for all members until it is ended: what each is asked, in turn."""
    from fedfm.silos.membership import Membership

    links = [Membership.read(Path(folder)).link() for folder in folders]
    connections = [link.connect(60.0) for link in links]
    inboxes = [connection.inbox([link.names.down(link.me.name)]) for link, connection in zip(links, connections, strict=True)]
    answered: set[str] = set()
    while True:
        for link, connection, inbox in zip(links, connections, inboxes, strict=True):
            delivery = inbox.next(0.02)
            if delivery is not None:
                answer(link, connection, delivery, answered)


def answer(link: Link, connection: Any, delivery: Any, answered: set[str]) -> None:
    """What a member does with one message, up to the work itself.

    Args:
        answered: Messages that were worked on. One that waited while another member worked is delivered again.
    """
    from fedfm.core.messages import pack_views, unpack, unpack_from
    from fedfm.engines.nats import BODY_ID, REPLY, REQUEST
    from fedfm.wire.envelope import Header, Opener, seal
    from fedfm.wire.stored import Stored
    from fedfm.wire.transfer import Spool, receive_all, send

    (coordinator,) = link.peers().values()
    opener, names = Opener(link.me, link.peers(), link.consortium), link.names
    envelope = opener.read(delivery.data, sender=coordinator.name)
    if envelope.header.kind == REQUEST and envelope.header.id not in answered:
        answered.add(envelope.header.id)
        own: Any = unpack(memoryview(receive_all(envelope, Stored(connection, names.down(link.me.name)))))
        data = connection.get(names.bodies, names.bodies.head(str(own.meta[BODY_ID])), 60.0)
        asked: Any = unpack_from(Spool(opener.read(data, sender=coordinator.name), Stored(connection, names.bodies)))
        header, up = envelope.header, names.up(link.me.name)
        reply = Header.now(link.consortium, header.job, header.round, header.sequence, REPLY)
        sealed = seal(pack_views(drawn(link.me.name, own, asked)), link.me, [coordinator], reply)
        connection.publish(up.message, send(sealed, Stored(connection, up)))
    delivery.acknowledge(60.0)


def drawn(name: str, own: Request, asked: Request) -> Reply:
    """An update of the size that was asked for."""
    import torch

    from fedfm.core.messages import Reply
    from fedfm.core.parts import TICKET
    from fedfm.core.tree import Spec

    spec, generator = Spec.of(asked.tensors), torch.Generator().manual_seed(asked.round)
    tensors = {leaf: torch.randn(shape, generator=generator).mul_(1e-3) for leaf, shape in zip(spec.names, spec.shapes, strict=True)}
    numbers = {"weight": 500.0, "loss": 1.0, "steps": 1.0, "examples": 500.0, "tokens": 8000.0, "padding": 0.0}
    return Reply(name, asked.verb, asked.round, tensors, {**numbers, TICKET: own.own[TICKET]})


def row(num_members: int, size: dict[str, int]) -> Row:
    """A consortium, and its coordinator's memory."""
    import psutil

    from fedfm.silos.consortium import COORDINATOR
    from fedfm.testing.silos import Silos

    say(f"{num_members} members")
    names = [f"member-{i:02d}" for i in range(num_members)]
    with TemporaryDirectory(prefix="fedfm-benchmark-") as folder, Silos(Path(folder), dict.fromkeys(names, ()), storage=STORAGE) as silos:
        members = child("--answer", json.dumps([str(silos.home(name)) for name in names]))
        try:
            what = json.dumps({"folder": str(silos.home(COORDINATOR)), "names": names, "size": size})
            coordinator = child("--coordinate", what, stdout=subprocess.PIPE)
            while coordinator.poll() is None and members.poll() is None:
                time.sleep(0.2)
            if coordinator.poll() != 0:
                coordinator.kill()
                raise SystemExit(f"{num_members} members: the coordinator or the members ended too soon")
            printed, _ = coordinator.communicate()
            process = silos.broker.process()
            assert process is not None
            broker = psutil.Process(process.pid)
            measured = {**json.loads(printed.splitlines()[-1]), "broker": _peak_of(broker.pid)}
        finally:
            members.kill()
            members.wait()
    return {"benchmark": "silos-memory", **common.machine(), "members": num_members, **measured}


def child(option: str, what: str, stdout: int | None = None) -> subprocess.Popen[str]:
    """Another process of this benchmark."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "benchmarks.silos_memory", option, what], stdout=stdout, text=True, env=environment)


def _peak_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Measures each row and prints the table."""
    options = common.parser(__doc__)
    options.add_argument("--members", type=int, nargs="+", metavar="N", help="how many members; one row each")
    options.add_argument("--coordinate", help="internal: a row's coordinator")
    options.add_argument("--answer", help="internal: a row's members")
    given = options.parse_args()
    if given.coordinate:
        coordinate(**json.loads(given.coordinate))
        return
    if given.answer:
        answer_all(json.loads(given.answer))
        return
    rows: list[Row] = []
    for num_members in given.members or (MEMBERS[:1] if given.quick else MEMBERS):
        rows.append(row(num_members, QUICK if given.quick else SIZE))
        common.save(rows, given.json)
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

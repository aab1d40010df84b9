"""A consortium on this machine for tests and benchmarks: a real broker, and members that are processes of their own with data of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedfm.client.policy import Policy, write_policy
from fedfm.engines.nats import STORAGE, make_streams
from fedfm.silos import certificates
from fedfm.silos.broker import Broker
from fedfm.silos.consortium import COORDINATOR, Consortium, Settings
from fedfm.silos.enrol import Desk, Entering
from fedfm.testing.broker import free_port
from fedfm.wire.identity import Identity
from fedfm.wire.nats import Connection

_MEMBER = """
import logging, sys
from pathlib import Path
import torch
from fedfm.client.policy import read_policy
from fedfm.service.member import Member
from fedfm.silos.membership import Membership
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(int(sys.argv[2]))
folder = Path(sys.argv[1])
Member(Membership.read(folder), str(folder / "rows.jsonl"), read_policy(folder / "policy.yaml"), device="cpu").serve()
"""


class Silos:
    """A broker, a coordinator's folder, and members that have entered.

    Args:
        folder: An empty folder for all of it.
        rows: Each member's own rows.
        policies: What members let happen; one that is not named allows everything.
        threads: CPU threads of each member.
        storage: Gigabytes that each stream at the broker may hold.

    Attributes:
        consortium: The coordinator's folder.
        processes: Members that were started, by name.
    """

    def __init__(
        self,
        folder: Path,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        policies: Mapping[str, Policy] | None = None,
        threads: int = 1,
        storage: float = STORAGE,
    ) -> None:
        self.folder, self.threads, self.storage = folder, threads, storage
        url = f"127.0.0.1:{free_port()}"
        self.consortium = Consortium.create(self.home(COORDINATOR), Settings("test", (f"tls://{url}",), url), certificates.now())
        self.names, self._links = self.consortium.names, {COORDINATOR: self.consortium.link()}
        for name, own in rows.items():
            self.add(name, own, (policies or {}).get(name, Policy.open()))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, name: str, rows: Sequence[Mapping[str, Any]], policy: Policy) -> None:
        """Lets a member enter, with keys of its own; it is not started."""
        now = certificates.now()
        entering = Entering.begin(self.consortium.invite(name, now), self.home(name))
        answer = Desk(self.consortium).answer(entering.ask(now))
        membership = None if answer is None else entering.accept(answer.data, certificates.now())
        assert membership is not None
        self._links[name] = membership.link()
        (self.home(name) / "rows.jsonl").write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
        (self.home(name) / "policy.yaml").write_text(write_policy(policy), encoding="utf-8")

    @property
    def broker(self) -> Broker:
        """It runs between ``with`` and its end."""
        return self.consortium.broker

    def home(self, name: str) -> Path:
        """The folder of somebody; the coordinator's is the consortium's."""
        return self.folder / name

    def identity(self, name: str) -> Identity:
        """The private keys of somebody."""
        return self._links[name].me

    def connect(self, name: str) -> Connection:
        """A connection of somebody's own."""
        return self._links[name].connect()

    def start(self, *names: str) -> None:
        """Starts members, all of them where none is named; returns at once."""
        for name in names or [name for name in self._links if name != COORDINATOR]:
            with (self.home(name) / "log.txt").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-P", "-c", _MEMBER, str(self.home(name)), str(self.threads)],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )

    def kill(self, name: str) -> None:
        """Ends a member with SIGKILL."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def log(self, name: str) -> str:
        """What a member's process wrote."""
        return (self.home(name) / "log.txt").read_text(encoding="utf-8", errors="replace")

    def kill_broker(self) -> None:
        """Ends the broker with SIGKILL."""
        process = self.broker.process()
        assert process is not None
        process.kill()
        process.wait()

    def __enter__(self) -> Silos:
        self.broker.start()
        with self.connect(COORDINATOR) as connection:
            make_streams(connection, self.names, self.consortium.cards(), self.storage)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        self.broker.stop()

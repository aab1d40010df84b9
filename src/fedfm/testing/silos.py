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
from fedfm.testing.broker import Broker
from fedfm.wire.identity import Card, Identity
from fedfm.wire.link import Link
from fedfm.wire.nats import Connection
from fedfm.wire.subjects import Names

_MEMBER = """
import logging, sys
from pathlib import Path
import torch
from fedfm.client.policy import read_policy
from fedfm.silos.member import Member
from fedfm.wire.link import Link
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(int(sys.argv[2]))
folder = Path(sys.argv[1])
Member(Link.read(folder / "link.json"), folder, str(folder / "rows.jsonl"), read_policy(folder / "policy.yaml"), device="cpu").serve()
"""


class Consortium:
    """A broker, a coordinator's link, and members.

    Args:
        folder: An empty folder for all of it.
        rows: Each member's own rows.
        policies: What members let happen; one that is not named allows everything.
        threads: CPU threads of each member.

    Attributes:
        broker: It runs between ``with`` and its end.
        link: The coordinator's link file.
    """

    def __init__(
        self, folder: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]], policies: Mapping[str, Policy] | None = None, threads: int = 1
    ) -> None:
        self.folder, self.threads, self.names = folder, threads, Names("test")
        self.identities = {name: Identity.create(name) for name in ("coordinator", *rows)}
        rights = {
            self.identities[name].nkey: self.names.coordinator_rights(name) if name == "coordinator" else self.names.member_rights(name)
            for name in self.identities
        }
        (folder / "broker").mkdir(parents=True)
        self.broker = Broker(folder / "broker", rights)
        cards = {name: identity.card for name, identity in self.identities.items()}
        coordinator = {"coordinator": cards.pop("coordinator")}
        self.link = self._write_link("coordinator", cards)
        for name, own in rows.items():
            self._write_link(name, coordinator)
            (self.home(name) / "rows.jsonl").write_text("".join(json.dumps(dict(row)) + "\n" for row in own), encoding="utf-8")
            policy = (policies or {}).get(name, Policy.open())
            (self.home(name) / "policy.yaml").write_text(write_policy(policy), encoding="utf-8")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def home(self, name: str) -> Path:
        """The folder of somebody."""
        return self.folder / name

    def connect(self, name: str) -> Connection:
        """A connection of somebody's own."""
        return Link.read(self.home(name) / "link.json").connect()

    def start(self, *names: str) -> None:
        """Starts members, all of them where none is named; returns at once."""
        for name in names or [name for name in self.identities if name != "coordinator"]:
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

    def __enter__(self) -> Consortium:
        self.broker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
        self.broker.stop()

    def _write_link(self, name: str, peers: Mapping[str, Card]) -> Path:
        home = self.home(name)
        home.mkdir()
        self.identities[name].save(home / "identity.json")
        authority, certificate, key = (self.broker.folder / file for file in ("ca.pem", "client.pem", "client.key"))
        Link("test", (self.broker.url,), home / "identity.json", authority, certificate, key, peers).write(home / "link.json")
        return home / "link.json"

"""How a process reaches the others of its consortium: where the broker is, who it is itself, and whose messages it takes.

A file of JSON, which holds no secret: the private keys lie in files of their own beside it. Paths are relative to the file's folder.

Covered here: a file that is missing, damaged or of another version. Not covered: who may write it. Whoever can change the cards in it chooses whose
messages are taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedfm.core import disk, words
from fedfm.core.errors import ConfigError, MessageError
from fedfm.wire.identity import Card, Identity
from fedfm.wire.nats import Connection, mutual_tls
from fedfm.wire.subjects import Names, require_name

KIND, VERSION = "fedfm link", 1
_MAX_FILE = 4 << 20
_PATHS = ("identity", "authority", "certificate", "key")


@dataclass(frozen=True)
class Link:
    """What it takes to talk to the others.

    Args:
        consortium: Its slug.
        servers: ``nats://host:4222``, one or more of the same broker.
        identity: File of the private keys of who we are.
        authority: Certificate of the consortium's authority, PEM.
        certificate: Our certificate, PEM.
        key: Its private key, PEM.
        peers: Whom we talk to, by name: the members at the coordinator, the coordinator alone at a member.
        has_nkey: Whether the broker asks for an nkey beside the certificate.
    """

    consortium: str
    servers: tuple[str, ...]
    identity: Path
    authority: Path
    certificate: Path
    key: Path
    peers: Mapping[str, Card] = field(default_factory=dict)
    has_nkey: bool = True

    @property
    def names(self) -> Names:
        """The consortium's subjects."""
        return Names(self.consortium)

    @cached_property
    def me(self) -> Identity:
        """Our private keys.

        Raises:
            ConfigError: if they are missing, damaged, or others on this machine can read them.
        """
        return Identity.load(self.identity)

    def connect(self, patience: float = 15.0) -> Connection:
        """A connection to the broker, over mutual TLS.

        Raises:
            ConfigError: if a key or certificate cannot be used.
            WireError: if the broker cannot be reached within ``patience`` seconds, or refuses us.
        """
        tls = mutual_tls(self.authority, self.certificate, self.key)
        nkey = self.me.nkey if self.has_nkey else None
        return Connection(self.servers, self.names.inbox(self.me.name), nkey, tls, self.me.name, patience)

    def write(self, path: Path) -> None:
        """Writes the file, durably.

        Raises:
            RunError: if it cannot be written.
        """
        values = {
            "kind": KIND,
            "version": VERSION,
            "consortium": self.consortium,
            "servers": list(self.servers),
            **{name: str(getattr(self, name)) for name in _PATHS},
            "peers": [card.to_json() for card in self.peers.values()],
            "has_nkey": self.has_nkey,
        }
        disk.write_atomic(path, json.dumps(values, indent=1).encode() + b"\n", private=True)

    @staticmethod
    def read(path: Path) -> Link:
        """Undoes :meth:`write`.

        Raises:
            ConfigError: if it is not there or is no such file.
        """
        shown = words.clean(path, 120)
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE + 1)
        except OSError as error:
            raise ConfigError(f"The link {shown} to a consortium cannot be read: {error.strerror}.") from error
        try:
            if len(data) > _MAX_FILE:
                raise ValueError(f"it is longer than {_MAX_FILE} bytes")
            return _parse(path.parent, json.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError, MessageError) as error:
            raise ConfigError(f"{shown} is no link to a consortium that fedfm wrote: {str(error)[:160]}.") from error


def _parse(folder: Path, values: Any) -> Link:
    if not isinstance(values, Mapping) or values.get("kind") != KIND or values.get("version") != VERSION:
        raise ValueError(f"it is not of kind {KIND!r}, version {VERSION}")
    texts = [*values["servers"], *(values[name] for name in _PATHS)]
    if not all(isinstance(text, str) for text in texts) or not values["servers"] or not isinstance(values["has_nkey"], bool):
        raise ValueError("a field is of the wrong kind")
    cards = [Card.from_json(card) for card in values["peers"]]
    paths = {name: folder / values[name] for name in _PATHS}
    return Link(
        require_name(values["consortium"]),
        tuple(values["servers"]),
        **paths,
        peers={card.name: card for card in cards},
        has_nkey=values["has_nkey"],
    )

"""A member's folder: its keys, its certificate, and which consortium it belongs to.

::

    nightingale/
      identity.json      the member's private keys; a copy of this file is all that it needs to come back on another machine
      client.pem         its certificate for the broker, with the private key
      membership.json    the consortium, the broker's addresses, the authority's certificate, the coordinator's public keys

Nothing secret in it is ever sent.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedfm.core import words
from fedfm.core.errors import ConfigError, MessageError
from fedfm.silos import certificates, private
from fedfm.wire.identity import Card, Identity
from fedfm.wire.link import Link
from fedfm.wire.subjects import Names, require_name

KIND, VERSION = "fedfm membership", 1
IDENTITY, CLIENT, MEMBERSHIP = "identity.json", "client.pem", "membership.json"


@dataclass(frozen=True)
class Membership:
    """What a member knows of its consortium.

    Args:
        folder: The member's folder.
        consortium: The consortium's slug.
        member: The member's name in it.
        urls: Where the broker is.
        authority: Certificate of the consortium's authority, as text.
        coordinator: The coordinator's public keys.
        invitation: Id of the invitation with which it entered last.
    """

    folder: Path
    consortium: str
    member: str
    urls: tuple[str, ...]
    authority: str
    coordinator: Card
    invitation: str

    @property
    def names(self) -> Names:
        """The consortium's subjects."""
        return Names(self.consortium)

    @cached_property
    def identity(self) -> Identity:
        """The member's private keys.

        Raises:
            ConfigError: if they are missing, damaged, or others can read them.
        """
        return Identity.load(self.folder / IDENTITY)

    def context(self) -> ssl.SSLContext:
        """How it connects to the broker.

        Raises:
            ConfigError: if its certificate is missing or damaged, or others can read its key.
        """
        return certificates.client_context(self.authority, self.folder / CLIENT)

    def link(self) -> Link:
        """How the member reaches the coordinator.

        Raises:
            ConfigError: if the member's keys are missing or damaged, or others can read them.
        """
        return Link(self.names, self.urls, self.identity, self.context, lambda: {self.coordinator.name: self.coordinator})

    def write(self) -> None:
        """Writes ``membership.json``, with which the folder is complete.

        Raises:
            RunError: if it cannot be written.
        """
        values = {
            "kind": KIND,
            "version": VERSION,
            "consortium": self.consortium,
            "member": self.member,
            "urls": list(self.urls),
            "authority": self.authority,
            "coordinator": self.coordinator.to_json(),
            "invitation": self.invitation,
        }
        private.write(self.folder / MEMBERSHIP, json.dumps(values, indent=1).encode() + b"\n")

    @staticmethod
    def read(folder: Path) -> Membership:
        """The membership in a folder.

        Raises:
            ConfigError: if there is none, it is damaged, or others can enter the folder.
        """
        shown = words.clean(folder, 120)
        private.require_folder(folder)
        if not (folder / MEMBERSHIP).is_file():
            raise ConfigError(f"{shown} holds no membership of a consortium yet. Enter one with an invitation: fedfm join INVITATION")
        try:
            return _parse(folder, json.loads(private.read(folder / MEMBERSHIP)))
        except (ValueError, KeyError, TypeError, RecursionError, MessageError) as error:
            raise ConfigError(
                f"{shown}/{MEMBERSHIP} is damaged ({str(error)[:120]}). Restore it from a backup, or ask for a new invitation."
            ) from error


def _parse(folder: Path, values: Any) -> Membership:
    if not isinstance(values, Mapping) or values.get("kind") != KIND or values.get("version") != VERSION:
        raise ValueError(f"it is no membership of version {VERSION}")
    urls, authority = values["urls"], values["authority"]
    if not isinstance(urls, list) or not urls or not all(isinstance(text, str) for text in [*urls, authority]):
        raise ValueError("a field is of the wrong kind")
    consortium, member, invitation = (require_name(values[name]) for name in ("consortium", "member", "invitation"))
    return Membership(folder, consortium, member, tuple(urls), authority, Card.from_json(values["coordinator"]), invitation)

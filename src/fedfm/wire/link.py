"""How a process reaches the others of its consortium: where the broker is, who it is itself, and whose messages it takes.

The coordinator's is made from its folder (:meth:`fedfm.silos.consortium.Consortium.link`), a member's from its own
(:meth:`fedfm.silos.membership.Membership.link`).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedfm.wire.identity import Card, Identity
from fedfm.wire.nats import Connection
from fedfm.wire.subjects import Names


@dataclass(frozen=True)
class Link:
    """What it takes to talk to the others.

    Args:
        names: The consortium's subjects.
        servers: ``tls://host:4222``, one or more of the same broker.
        me: Our private keys.
        tls: Makes the context of mutual TLS; it is called for each attempt, because our certificate may be renewed meanwhile.
        peers: Whom we talk to now, by name: the members at the coordinator, the coordinator alone at a member.
    """

    names: Names
    servers: tuple[str, ...]
    me: Identity
    tls: Callable[[], ssl.SSLContext]
    peers: Callable[[], Mapping[str, Card]]

    @property
    def consortium(self) -> str:
        """The consortium's slug."""
        return self.names.consortium

    def connect(self, patience: float = 15.0) -> Connection:
        """A connection to the broker, over mutual TLS. The certificate is the login.

        Raises:
            ConfigError: if a key or certificate cannot be used.
            WireError: if the broker cannot be reached within ``patience`` seconds, or refuses us.
        """
        self.tls()  # What cannot be used now is said at once.
        return Connection(self.servers, self.names.inbox(self.me.name), tls=self.tls, name=self.me.name, patience=patience)

"""Where a federation is played from: what the loop needs to know, wherever the owners' data is."""

from __future__ import annotations

from dataclasses import dataclass

from fedfm.client.house import House
from fedfm.core.clock import Clock
from fedfm.core.keys import Key
from fedfm.core.messages import ClientId
from fedfm.core.session import Session
from fedfm.federation import Federation


@dataclass
class Site:
    """A federation, and the house of this machine.

    Attributes:
        federation: The plan, its method applied.
        house: The plan of the clients, the server's copy of the model, and the clients that live here.
    """

    federation: Federation
    house: House

    @property
    def clients(self) -> tuple[ClientId, ...]:
        """Everyone who takes part, in a fixed order."""
        return self.house.clients

    @property
    def key(self) -> Key:
        """The run's root key."""
        return self.house.key

    def open(self, clock: Clock | None = None) -> Session:
        """A session with every client, on the federation's engine."""
        return self.federation.engine.open(self.house, clock)

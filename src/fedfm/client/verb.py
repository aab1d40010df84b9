"""A verb: what a server asks, and what a client answers. Both halves are one file in ``verbs/``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from typing import ClassVar

from fedfm.client.contribution import Contribution as Contribution
from fedfm.client.house import House
from fedfm.core import registry
from fedfm.core.leaves import Kind
from fedfm.core.messages import ClientId, Failure, Request
from fedfm.core.parts import Part


class Verb(Part, ABC):
    """What a client can be asked. The server's half makes an errand and reads what comes back, each verb in its own way.

    Attributes:
        name: Its name on the wire.
        banked: Whether its clients share a batch, so that an engine asks as many together as the bank holds.
    """

    room = "verbs"
    name: ClassVar[str]
    banked: ClassVar[bool] = False

    @abstractmethod
    def answer(self, requests: Mapping[ClientId, Request], house: House) -> Iterator[Contribution | Failure]:
        """The clients' half: one outcome for each request. All requests have one body."""

    def tells(self, request: Request, house: House) -> Mapping[Kind, str]:
        """What the answer tells of its owner and cannot leave out, each with the reason. An owner who withholds one of it refuses before any data is read."""
        return {}

    def shrink(self, house: House) -> bool:
        """Makes the next try need less memory. Returns whether it could. The runtime halves banks before it calls this."""
        return False


@cache
def verbs() -> dict[str, Verb]:
    """Every verb in the index, by its name on the wire."""
    parts = [entry.load()() for entry in registry.entries("verbs").values()]
    return {part.name: part for part in parts if isinstance(part, Verb)}

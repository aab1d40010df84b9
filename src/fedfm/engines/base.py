"""Where clients run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from fedfm.client.house import House
from fedfm.core.clock import Clock
from fedfm.core.errors import ConfigError
from fedfm.core.messages import ClientId
from fedfm.core.parts import Part
from fedfm.core.session import Session

# Every thread has a stack of its own, and a process that asks for more than the system has is ended without a word.
_MAX_THREADS = 1024


class Engine(Part, ABC):
    """Where the clients run: opens a session that sends them requests and receives their answers.

    Attributes:
        trusts_clients: Whether clients run our code on a machine of ours; else what they send is bounded unless the recipe says otherwise.
        device: Where the model runs.
        bank: Clients that share a batch, where the engine lets them.
    """

    room = "engines"
    trusts_clients: ClassVar[bool] = True
    device: str = "auto"
    bank: int | Literal["auto"] = "auto"

    def members(self) -> tuple[ClientId, ...] | None:
        """Who keeps its data on a machine of its own; ``None`` where all data is on this one.

        Raises:
            ConfigError: if that cannot be read.
        """
        return None

    @abstractmethod
    def open(self, house: House, clock: Clock | None = None) -> Session:
        """Starts what the engine needs.

        Args:
            house: The plan of the clients, and the data of those who are hosted on this machine.
            clock: Measures deadlines; default the machine's own clock.
        """


def require_threads(name: str, threads: int | None) -> None:
    """Checks a number of CPU threads.

    Raises:
        ConfigError: if it is out of range.
    """
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise ConfigError(f"{name}.threads is {threads}; it must be from 1 to {_MAX_THREADS}, or null.")

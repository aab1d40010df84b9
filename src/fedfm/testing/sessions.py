"""A session whose answers a test writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from fedfm.core.clock import Clock, Wall
from fedfm.core.messages import ClientId, Request
from fedfm.core.session import Answer, Session

Script = Callable[[Mapping[ClientId, Request]], Iterable[Answer]]


class Scripted(Session):
    """Answers requests as ``script`` says, in its order, and only when it is listened to.

    Args:
        script: Gives the answers to the requests of one ``send``.
    """

    def __init__(self, script: Script, clock: Clock | None = None) -> None:
        self.script, self.clock = script, clock or Wall()
        self._waiting: deque[Iterator[Answer]] = deque()

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        """Begins the script for these requests."""
        self._waiting.append(iter(self.script(requests)))

    def receive(self) -> Answer | None:
        """The next answer of the oldest script."""
        while self._waiting:
            answer = next(self._waiting[0], None)
            if answer is not None:
                return answer
            self._waiting.popleft()
        return None

    def abandon(self) -> None:
        """Drops the scripts that have answers left."""
        self._waiting.clear()

    def close(self) -> None:
        """Drops them too; nothing else runs."""
        self.abandon()

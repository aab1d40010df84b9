"""An engine that is running: requests go out, answers come in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping

from fedfm.core.clock import Clock, Wall
from fedfm.core.messages import ClientId, Failure, Reply, Request

Answer = Reply | Failure


class Session(ABC):
    """Sends requests and receives answers, in whatever order they come.

    Attributes:
        clock: Measures its deadlines.
    """

    clock: Clock = Wall()
    _current: Generator[Answer] | None = None

    @abstractmethod
    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        """Sends each client its request, beside what others still owe.

        Args:
            deadline: Seconds after which clients that have not answered have failed.
        """

    @abstractmethod
    def receive(self) -> Answer | None:
        """The next answer, waiting for it; ``None`` where nobody owes one."""

    @abstractmethod
    def abandon(self) -> None:
        """Waits no longer for those who still owe an answer."""

    def settle(self) -> None:  # noqa: B027
        """Makes the choices that hold for a whole run, before its first round; they are written down before they are used."""

    @abstractmethod
    def close(self) -> None:
        """Ends every client. Calling it twice is fine."""

    def exchange(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> Iterator[Answer]:
        """Sends, and yields the answers as they arrive, one for each request, until nobody owes one.

        Clients that still owe an answer when the caller stops listening, or exchanges anew, are waited for no longer.
        """
        if self._current is not None:
            self._current.close()
        self._current = self._exchange(requests, deadline)
        return self._current

    def _exchange(self, requests: Mapping[ClientId, Request], deadline: float | None) -> Generator[Answer]:
        try:
            self.send(requests, deadline)
            while (answer := self.receive()) is not None:
                yield answer
        finally:
            self.abandon()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class WrappedSession(Session):
    """A session around another: forwards everything. A session that counts, delays or changes messages derives from it.

    Args:
        inner: The session that does the work.
    """

    # A method that only forwards needs no docstring.

    def __init__(self, inner: Session) -> None:
        self.inner, self.clock = inner, inner.clock

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:  # noqa: D102
        self.inner.send(requests, deadline)

    def receive(self) -> Answer | None:  # noqa: D102
        return self.inner.receive()

    def abandon(self) -> None:  # noqa: D102
        self.inner.abandon()

    def settle(self) -> None:  # noqa: D102
        self.inner.settle()

    def close(self) -> None:  # noqa: D102
        self.inner.close()

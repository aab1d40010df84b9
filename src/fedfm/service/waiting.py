"""Says that the broker is away: at once, and then every minute, so that nobody looks for an hour at a member that is silent."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

from fedfm.core import words
from fedfm.core.errors import WireError
from fedfm.wire.link import Link
from fedfm.wire.nats import Connection, LoginRefused

log = logging.getLogger(__name__)
EVERY = 60.0
"""Seconds between two lines."""
# Seconds: of one attempt to connect, between two looks at a connection, and that a cut may last before it is worth a line.
_ATTEMPT, _LOOK, _SHORT = 3.0, 0.5, 2.0


class Waiting:
    """Lines about a broker that is away.

    Args:
        where: The broker's addresses.
        every: Seconds between two lines.
        now: Seconds that never go back.
    """

    def __init__(self, where: str, every: float = EVERY, now: Callable[[], float] = time.monotonic) -> None:
        self._where, self._every, self._now = where, every, now
        self._began, self._since, self._said = -1.0, "", -1.0

    def away(self, why: str) -> None:
        """The broker is not there."""
        now = self._now()
        if self._began < 0:
            self._began, self._since, self._said = now, f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}", -1.0
        if self._said < 0 or now >= self._said + self._every:
            self._said = now
            log.warning("waiting for the broker at %s since %s: %s", self._where, self._since, words.clean(why or "no connection", 200))

    def there(self) -> None:
        """The broker is there."""
        if self._began >= 0 and self._said >= 0:
            log.warning("the broker at %s is there again, after %s", self._where, words.duration(self._now() - self._began))
        self._began = self._said = -1.0


def connected(link: Link, stop: threading.Event, every: float = EVERY) -> Connection | None:
    """A connection, waiting for the broker as long as it takes; ``None`` if ``stop`` is set before.

    Raises:
        ConfigError: if a key or certificate cannot be used.
        WireError: if the broker refuses us.
    """
    waiting = Waiting(words.listed(link.servers), every)
    while not stop.is_set():
        try:
            connection = link.connect(_ATTEMPT)
        except LoginRefused:
            raise
        except WireError as error:
            waiting.away(str(error))
        else:
            waiting.there()
            return connection
    return None


class Watch:
    """Looks at a connection while it is used, in a thread of its own.

    Args:
        link: Whose it is.
        connection: The connection.
        every: Seconds between two lines.
    """

    def __init__(self, link: Link, connection: Connection, every: float = EVERY) -> None:
        self._connection, self._waiting = connection, Waiting(words.listed(link.servers), every)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedfm-waiting", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        lost: float | None = None
        while not self._stop.wait(_LOOK):
            if self._connection.is_connected:
                lost = None
                self._waiting.there()
                continue
            lost = time.monotonic() if lost is None else lost
            if time.monotonic() >= lost + _SHORT:
                self._waiting.away(self._connection.problem)

"""Time is injected, so that deadlines and delays can be replayed in a test.

Only differences mean anything: ``now`` counts seconds from an arbitrary start.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """Seconds that never go back."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since an arbitrary start."""


class Wall(Clock):
    """The machine's own monotonic clock."""

    def now(self) -> float:
        """``time.monotonic()``."""
        return time.monotonic()


class Virtual(Clock):
    """A clock that stands still until it is moved, for tests and simulated delays.

    Example:
        >>> clock = Virtual()
        >>> clock.advance(2.5)
        >>> clock.now()
        2.5
    """

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Seconds that the clock was moved in all."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Moves the clock forward.

        Raises:
            ValueError: if ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"A clock cannot go back by {-seconds} seconds.")
        self._now += seconds

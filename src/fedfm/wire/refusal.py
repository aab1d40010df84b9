"""Why a message was refused: one word for the counts, one sentence for the log."""

from __future__ import annotations

from typing import Literal, get_args

from fedfm.core.errors import MessageError

Why = Literal[
    "malformed",
    "version",
    "oversize",
    "consortium",
    "receiver",
    "sender",
    "signature",
    "expired",
    "future",
    "key",
    "chunk",
    "job",
    "late",
    "early",
    "replay",
    "duplicate",
    "flood",
]
"""``early``: a round that has not begun. ``future``: made after now, beyond what clocks differ. ``chunk``: a piece is missing or changed."""
REASONS: tuple[Why, ...] = get_args(Why)


class Refused(MessageError):
    """A message that is dropped, and counted under a word.

    Args:
        why: One of :data:`REASONS`.
        message: What was wrong, the value, and what to do.
    """

    def __init__(self, why: Why, message: str) -> None:
        super().__init__(message)
        self.why: Why = why


def reason(error: MessageError) -> Why:
    """The word under which an error is counted."""
    return error.why if isinstance(error, Refused) else "malformed"

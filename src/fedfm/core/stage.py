"""What long work tells of how far it is."""

from __future__ import annotations

from collections.abc import Callable

Stage = Callable[[str, int | None, int | None], None]
"""Called with what is being done, how much of it is done, and how much there is; ``None`` where that is not known."""


def unseen(text: str, done: int | None = None, total: int | None = None) -> None:
    """A :data:`Stage` for work that nobody watches."""

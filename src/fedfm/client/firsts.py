"""What each client scored before training: it stays at home, and a client says only whether it does better now."""

from __future__ import annotations

import json
from pathlib import Path

from fedfm.client.memory import home
from fedfm.core import disk
from fedfm.core.messages import ClientId
from fedfm.core.words import number


class Firsts:
    """Scores of clients before training, by what they were scored on.

    Args:
        folder: Under which each client has a folder; ``None`` keeps them in this process.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[ClientId, dict[str, float | None]] = {}

    def get(self, client: ClientId, what: str) -> float | None:
        """The score; ``None`` where there is none, or its file is damaged."""
        return self._of(client).get(what)

    def set(self, client: ClientId, what: str, score: float | None) -> None:
        """Keeps a score.

        Raises:
            RunError: if it cannot be written.
        """
        scores = self._of(client)
        if scores.get(what) == score:
            return
        scores[what] = score
        if self.folder is not None:
            disk.make_folder(self._path(client).parent)
            disk.write_atomic(self._path(client), json.dumps(scores).encode())

    def _path(self, client: ClientId) -> Path:
        assert self.folder is not None
        return home(self.folder, client) / "first.json"

    def _of(self, client: ClientId) -> dict[str, float | None]:
        if client not in self._known:
            scores: object = {}
            if self.folder is not None:
                try:
                    scores = json.loads(self._path(client).read_text(encoding="utf-8"))
                except (OSError, ValueError):
                    scores = {}
            self._known[client] = {str(name): number(value) for name, value in scores.items()} if isinstance(scores, dict) else {}
        return self._known[client]

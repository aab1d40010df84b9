"""The public keys by which a house knows other clients.

A key that comes with a name for the first time is kept, on the owner's own disk, and no other is taken for that name again. Who wants more certainty
writes the keys beforehand and forbids new ones (``strict``).

Covered here: a server that later gives somebody another key. Not covered: one that gave false keys from the first time on, unless ``strict``.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedfm.core import disk
from fedfm.core.errors import RunError
from fedfm.core.messages import ClientId


class Peers:
    """Clients and their public keys.

    Args:
        path: A JSON file, ``{name: 64 hexadecimal digits}``; ``None`` keeps them in this process.
        strict: Whether a name that is not in the file is nobody.

    Raises:
        RunError: if the file cannot be read.

    Example:
        >>> peers = Peers()
        >>> peers.known("bob", bytes(32)), peers.known("bob", bytes(31) + b"x")
        (True, False)
    """

    def __init__(self, path: Path | None = None, strict: bool = False) -> None:
        self.path, self.strict = path, strict
        self._keys: dict[ClientId, str] = {}
        if path is not None and path.exists():
            try:
                keys = json.loads(path.read_text(encoding="utf-8"))
                self._keys = {str(name): bytes.fromhex(key).hex() for name, key in keys.items()}
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise RunError(
                    f"{path} cannot be read ({error}). It holds the keys of the other members. Restore it from a copy, or delete it to meet them anew."
                ) from error

    def known(self, client: ClientId, public: bytes) -> bool:
        """Whether this is the client's key; one that is met for the first time is kept, unless ``strict``.

        Raises:
            RunError: if it cannot be written.
        """
        if client not in self._keys and not self.strict:
            self._keys[client] = public.hex()
            if self.path is not None:
                disk.write_atomic(self.path, json.dumps(self._keys, indent=1, sort_keys=True).encode() + b"\n")
        return self._keys.get(client) == public.hex()

"""The public keys by which a house knows other clients; with them it checks who takes part in a secure sum.

A key that comes with a name for the first time is kept, on the owner's own disk, and no other is taken for that name again. In ``peers.json`` in its folder an
owner sees them, its own too. Owners who want more certainty compare these files, over the telephone for one, and set ``strict`` in them: then a name that is not
in the file is nobody.

Covered here: a server that later gives somebody another key, or makes up a client for a house that is ``strict``. Not covered: one that gave false keys from the
first time on, as long as nobody has compared them.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedfm.core import disk
from fedfm.core.errors import RunError
from fedfm.core.messages import ClientId

PEERS = "peers.json"


class Peers:
    """Clients and their public keys.

    Args:
        path: A JSON file, ``{"strict": false, "keys": {name: 64 hexadecimal digits}}``; ``None`` keeps them in this process.

    Raises:
        RunError: if the file cannot be read.

    Example:
        >>> peers = Peers()
        >>> peers.known("bob", bytes(32)), peers.known("bob", bytes(31) + b"x")
        (True, False)
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.strict = path, False
        self._keys: dict[ClientId, str] = {}
        self._read()

    def _read(self) -> None:
        """Takes over what the file holds; another run of the same owner may have met somebody meanwhile."""
        if self.path is None or not self.path.exists():
            return
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            self.strict = values["strict"] is not False
            self._keys = {str(name): bytes.fromhex(key).hex() for name, key in values["keys"].items()}
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise RunError(
                f"{self.path} cannot be read ({error}). It holds the keys of the other members. Restore it from a copy, or delete it to meet them anew."
            ) from error

    def known(self, client: ClientId, public: bytes) -> bool:
        """Whether this is the client's key; one that is met for the first time is kept, unless ``strict``.

        Raises:
            RunError: if it cannot be written.
        """
        if client not in self._keys:
            self._read()
        if client not in self._keys and not self.strict:
            self._keys[client] = public.hex()
            if self.path is not None:
                values = {"strict": False, "keys": self._keys}
                disk.write_atomic(self.path, json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")
        return self._keys.get(client) == public.hex()

"""An invitation: a file with which one member can enter a consortium, once, until it expires.

It holds what a member needs to find the coordinator and to know it by its keys, a token that proves the invitation, and a certificate that opens
a connection for asking to enter, and for nothing else. It is a secret: who has it first can enter in the member's name. Send it over a channel that the member
and the coordinator trust, and compare the coordinator's fingerprint on the telephone.

Covered here: a file that was changed, cut short, expired or made by another version is refused with the reason. Not covered: who read it on its way.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedfm.core import paths, words
from fedfm.core.errors import DataError, MessageError
from fedfm.silos import private
from fedfm.wire.identity import Card
from fedfm.wire.subjects import require_name

KIND, VERSION = "fedfm invitation", 1
_MAX_FILE = 1 << 16
_FIELDS = ("consortium", "member", "id", "urls", "authority", "coordinator", "token", "certificate", "key", "expires", "card")


@dataclass(frozen=True)
class Invitation:
    """An invitation.

    Args:
        consortium: Slug of the consortium.
        member: Name under which its holder enters.
        id: 32 hexadecimal digits.
        urls: Where the broker is.
        authority: Certificate of the consortium's authority, as text.
        coordinator: The coordinator's public keys.
        token: 32 random bytes; secret.
        certificate: For the connection, as text.
        key: Its private key, as text; secret.
        expires: From then on the invitation is void.
        card: Fingerprint of the only keys that may use it; empty where any may.
    """

    consortium: str
    member: str
    id: str
    urls: tuple[str, ...]
    authority: str
    coordinator: Card
    token: bytes = field(repr=False)
    certificate: str = field(repr=False)
    key: str = field(repr=False)
    expires: datetime
    card: str = ""

    def write(self, path: Path) -> None:
        """Writes the file; its owner alone can read it.

        Raises:
            DataError: if something is there already.
            RunError: if it cannot be written.
        """
        require_free(path)
        values: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        values |= {
            "urls": list(self.urls),
            "coordinator": self.coordinator.to_json(),
            "token": base64.b64encode(self.token).decode(),
            "expires": self.expires.isoformat(),
        }
        private.write(path, json.dumps({"kind": KIND, "version": VERSION, **values}, indent=1).encode() + b"\n")

    @staticmethod
    def read(path: Path, now: datetime) -> Invitation:
        """Undoes :meth:`write`. Others may be able to read the file: it came by a way of its own.

        Raises:
            DataError: if it is not there, no invitation, of another version, or expired.
        """
        shown = words.clean(paths.usable(path, "The invitation"), 120)
        try:
            with path.expanduser().open("rb") as file:
                data = file.read(_MAX_FILE + 1)
        except OSError as error:
            raise DataError(f"The invitation {shown} cannot be read: {error.strerror}.") from error
        try:
            invitation = _parse(data)
        except (ValueError, KeyError, TypeError, RecursionError, binascii.Error, MessageError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:160].removesuffix(".")
            raise DataError(f"{shown} is no invitation, or was damaged on its way: {why}. Ask the coordinator for it again.") from error
        if now >= invitation.expires:
            raise DataError(
                f"The invitation {shown} expired on {invitation.expires:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC. "
                "Check this machine's clock, or ask the coordinator for a new one."
            )
        return invitation


def require_free(path: Path) -> None:
    """Refuses to overwrite something.

    Raises:
        DataError: if something is there.
    """
    if path.exists():
        raise DataError(
            f"{words.clean(path, 120)} is there already, and an invitation overwrites nothing. Give another --out, or delete it."
        )


def _parse(data: bytes) -> Invitation:
    if len(data) > _MAX_FILE:
        raise ValueError(f"it is longer than {_MAX_FILE} bytes")
    values: Any = json.loads(data)
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise ValueError(f"its kind is not {KIND!r}")
    if values.get("version") != VERSION:
        raise ValueError(f"its version is {values.get('version')!r:.20}, and this fedfm reads {VERSION}")
    texts = {name: values[name] for name in _FIELDS if name not in ("urls", "coordinator")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("a field is no text")
    urls = values["urls"]
    if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
        raise ValueError("its urls are no list of texts")
    for name in ("consortium", "member", "id"):
        require_name(texts[name])
    token, expires = base64.b64decode(texts["token"], validate=True), datetime.fromisoformat(texts["expires"])
    if len(token) != 32 or expires.tzinfo is None:
        raise ValueError("its token or its end is cut short")
    return Invitation(
        **{**texts, "urls": tuple(urls), "coordinator": Card.from_json(values["coordinator"]), "token": token, "expires": expires}
    )

"""Who a member is: private keys that never leave its machine, and the card that others know it by.

An identity has three keys for what it sends and receives, and a fourth for its login at the broker:

=========  ===========  ====================================================================
sign       Ed25519      signs what it sends
x25519     X25519       opens what it receives, together with the next
mlkem      ML-KEM-768   opens what it receives; holds against a quantum computer
nkey       Ed25519      answers the broker's challenge, and signs nothing else
=========  ===========  ====================================================================

Covered here: keys come from the operating system, are kept in one file that only its owner can read, and are never pickled or shown.
Not covered: a stolen machine, and signatures against a quantum computer (Ed25519 is not one that would hold).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from fedfm.core import disk, paths, words
from fedfm.core.errors import ConfigError, MessageError, MissingExtra
from fedfm.wire import subjects

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey

VERSION = 1
_IDENTITY, _CARD = "fedfm identity", "fedfm card"
# Bytes of the private and of the public keys, by name.
_PRIVATE = {"sign": 32, "x25519": 32, "mlkem": 64}
_PUBLIC = {"sign": 32, "x25519": 32, "mlkem": 1184}
_MAX_FILE = 1 << 16


def require_cryptography() -> None:
    """Refuses where the package ``cryptography`` is absent.

    Raises:
        MissingExtra: with the remedy.
    """
    try:
        import cryptography.hazmat.primitives.hpke  # noqa: F401
    except ImportError as error:
        raise MissingExtra("cryptography", "deploy", "A consortium") from error


@dataclass(frozen=True)
class Nkey:
    """The key with which somebody logs in at the broker.

    It is a key of its own: a broker chooses what it is to sign, so it must not sign messages.

    Args:
        seed: As NATS writes it, ``SU...``: secret.
    """

    seed: str

    def __post_init__(self) -> None:
        nkeys = _nkeys()
        try:
            prefix, raw = nkeys.decode_seed(self.seed.encode("ascii"))
            good = prefix == nkeys.PREFIX_BYTE_USER and nkeys.encode_seed(raw, prefix).decode() == self.seed
        except (nkeys.NkeysError, ValueError) as error:
            raise ConfigError("A broker key is not the seed of a user's nkey, which begins with SU.") from error
        if not good:
            raise ConfigError("A broker key is not the seed of a user's nkey, which begins with SU.")

    @staticmethod
    def create() -> Nkey:
        """A new key, from the operating system's generator."""
        nkeys = _nkeys()
        return Nkey(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())

    @cached_property
    def public(self) -> str:
        """The name of this key in the broker's configuration, ``U...``."""
        return str(_nkeys().from_seed(bytearray(self.seed.encode())).public_key.decode())

    def __repr__(self) -> str:
        return f"Nkey({self.public})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A key is not pickled.")


def _nkeys() -> ModuleType:
    try:
        import nkeys
    except ImportError as error:
        raise MissingExtra("nkeys", "deploy", "A consortium") from error
    return nkeys  # type: ignore[no-any-return, unused-ignore]


@dataclass(frozen=True)
class Card:
    """What others know of a member: its name and its public keys.

    Args:
        name: A slug, ``[a-z0-9-]{1,40}``.
        sign: Ed25519 public key, 32 bytes.
        x25519: X25519 public key, 32 bytes.
        mlkem: ML-KEM-768 public key, 1184 bytes.

    Raises:
        MessageError: if the name is no slug or a key is none.
    """

    name: str
    sign: bytes
    x25519: bytes
    mlkem: bytes

    def __post_init__(self) -> None:
        subjects.require_name(self.name)
        _require_lengths(self, "card", _PUBLIC)
        require_cryptography()
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

        try:
            # A key with which nothing can be sealed is refused where it enters.
            _ = self.verifier, self.lock
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(self.x25519))
        except ValueError as error:
            raise MessageError(f"The card of {self.name} has a public key that is none: {error}.") from error

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b of the public keys, 64 hexadecimal digits. The name is not in it: a coordinator gives the final name."""
        return hashlib.blake2b(self.sign + self.x25519 + self.mlkem, digest_size=32, person=b"fedfm card").hexdigest()

    @property
    def short(self) -> str:
        """The first half of the fingerprint in groups of four, for two people to compare on the telephone."""
        return " ".join(self.fingerprint[i : i + 4] for i in range(0, 32, 4))

    @cached_property
    def verifier(self) -> Ed25519PublicKey:
        """Checks its signatures."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        return Ed25519PublicKey.from_public_bytes(self.sign)

    @cached_property
    def lock(self) -> MLKEM768X25519PublicKey:
        """Seals keys that it alone can open."""
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey

        return MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(self.mlkem), X25519PublicKey.from_public_bytes(self.x25519))

    def to_json(self) -> dict[str, Any]:
        """As written in an invitation and in the roster."""
        return {"kind": _CARD, "version": VERSION, "name": self.name, **{key: _text(getattr(self, key)) for key in _PUBLIC}}

    @staticmethod
    def from_json(value: object) -> Card:
        """Undoes :meth:`to_json`.

        Raises:
            MessageError: if it is not a card.
        """
        return Card(**_fields(value, _CARD, _PUBLIC, ()))


@dataclass(frozen=True)
class Identity:
    """A member's private keys.

    Args:
        name: A slug, ``[a-z0-9-]{1,40}``.
        sign: Ed25519 private key, 32 bytes.
        x25519: X25519 private key, 32 bytes.
        mlkem: Seed of the ML-KEM-768 key, 64 bytes.
        nkey: Its login at the broker.

    Raises:
        MessageError: if the name is no slug or a key is none.
    """

    name: str
    sign: bytes
    x25519: bytes
    mlkem: bytes
    nkey: Nkey

    def __post_init__(self) -> None:
        subjects.require_name(self.name)
        _require_lengths(self, "identity", _PRIVATE)

    @staticmethod
    def create(name: str) -> Identity:
        """New keys, from the operating system's generator.

        Raises:
            MessageError: if the name is no slug.
            MissingExtra: if the packages of the extra ``deploy`` are not installed.
        """
        require_cryptography()
        return Identity(name, **{key: os.urandom(length) for key, length in _PRIVATE.items()}, nkey=Nkey.create())

    @cached_property
    def card(self) -> Card:
        """What others may know."""
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return Card(
            self.name,
            self.signer.public_key().public_bytes_raw(),
            X25519PrivateKey.from_private_bytes(self.x25519).public_key().public_bytes_raw(),
            MLKEM768PrivateKey.from_seed_bytes(self.mlkem).public_key().public_bytes_raw(),
        )

    @cached_property
    def signer(self) -> Ed25519PrivateKey:
        """Signs messages."""
        require_cryptography()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.sign)

    @cached_property
    def opener(self) -> MLKEM768X25519PrivateKey:
        """Opens keys that were sealed for it."""
        require_cryptography()
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

        return MLKEM768X25519PrivateKey(MLKEM768PrivateKey.from_seed_bytes(self.mlkem), X25519PrivateKey.from_private_bytes(self.x25519))

    def save(self, path: Path) -> None:
        """Writes the file, durably, readable by its owner alone.

        Raises:
            RunError: if it cannot be written.
        """
        fields = {"kind": _IDENTITY, "version": VERSION, "name": self.name, "nkey": self.nkey.seed}
        text = json.dumps({**fields, **{key: _text(getattr(self, key)) for key in _PRIVATE}}, indent=1)
        disk.write_atomic(path, text.encode() + b"\n", private=True)

    @staticmethod
    def load(path: Path) -> Identity:
        """Reads what :meth:`save` wrote.

        Raises:
            ConfigError: if it is not there, is not an identity, or others on this machine can read it.
        """
        shown = words.clean(path, 120)
        paths.usable(path, "The identity")
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                data = file.read(_MAX_FILE + 1)
        except OSError as error:
            raise ConfigError(f"The identity {shown} cannot be read: {error.strerror}.") from error
        if mode & 0o077:
            raise ConfigError(
                f"The identity {shown} can be read by others on this machine (mode {mode:03o}). If nobody has read it, run: chmod 600 {shown}"
            )
        try:
            if len(data) > _MAX_FILE:
                raise MessageError(f"it is longer than {_MAX_FILE} bytes")
            fields = _fields(_json(data), _IDENTITY, _PRIVATE, ("nkey",))
            return Identity(**{**fields, "nkey": Nkey(fields["nkey"])})
        except (MessageError, ConfigError) as error:
            raise ConfigError(f"{shown} is not an identity that fedfm wrote: {str(error).removesuffix('.')}.") from error

    def __repr__(self) -> str:
        return f"Identity({self.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("An identity is not pickled.")


def _require_lengths(owner: Card | Identity, what: str, keys: Mapping[str, int]) -> None:
    for key, length in keys.items():
        if len(getattr(owner, key)) != length:
            raise MessageError(f"The {what} of {owner.name} has a key {key!r} of {len(getattr(owner, key))} bytes; it has {length}.")


def _json(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"it is not JSON ({error})") from error


def _text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def _fields(value: object, kind: str, keys: Mapping[str, int], others: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a card or an identity, keys as bytes."""
    if not isinstance(value, Mapping) or value.get("kind") != kind:
        raise MessageError(f"A {kind[6:]} was expected; what is there is none.")
    if value.get("version") != VERSION:
        raise MessageError(f"This {kind[6:]} has version {value.get('version')!r:.20}; this side reads {VERSION}.")
    names = {"kind", "version", "name", *keys, *others}
    if value.keys() != names:
        raise MessageError(f"A {kind[6:]} has the fields {words.listed(sorted(names), 9)}; this one differs in {_differs(value, names)}.")
    fields: dict[str, Any] = {}
    for name in ("name", *keys, *others):
        if not isinstance(value[name], str) or len(value[name]) > 4096:
            raise MessageError(f"The field {name!r} of a {kind[6:]} is not a short text.")
        fields[name] = value[name]
    for key, length in keys.items():
        try:
            fields[key] = base64.b64decode(fields[key], validate=True)
        except (binascii.Error, ValueError) as error:
            raise MessageError(f"The field {key!r} of a {kind[6:]} is not base64.") from error
        if len(fields[key]) != length:
            raise MessageError(f"The field {key!r} of a {kind[6:]} has {len(fields[key])} bytes; it has {length}.")
    return fields


def _differs(value: Mapping[Any, Any], names: set[str]) -> str:
    return words.listed(sorted(map(str, value.keys() ^ names)))

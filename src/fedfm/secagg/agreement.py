"""Keys: of a session between two clients, and those that one sum derives from them.

Two clients agree on a key by HPKE (RFC 9180) with ``MLKEM768_X25519`` (ML-KEM-768 and X25519 together): the one that comes first in the order of the
keys seals 32 random bytes to the other's session key. This is ``cryptography``'s own HPKE, the same that seals messages on the wire
(:mod:`fedfm.wire.envelope`), and not the member's long-term keys: session keys are drawn for a job, live in memory alone and are never written, so that
whoever steals a house's disk later opens no mask. HPKE binds both secrets, both public keys and the ciphertext; the key is secret while either
X25519 or ML-KEM-768 holds. Keys for one sum are derived by HKDF-SHA256 from the pair's key and the sum's context.

Identities are Ed25519 keys. They sign session keys, sealed keys (anybody can seal to a public key), and the sets of clients that a sum is over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedfm.core.errors import MissingExtra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.hpke import Suite

KEY, SEALED, SIGNATURE, PUBLIC = 1216, 1168, 64, 32
"""Bytes: a session's public key, sealed 32 bytes, a signature, an identity's public key."""
_MLKEM = 1184
_INFO = b"fedfm secagg pair 1"


def require_cryptography() -> None:
    """Refuses where the package ``cryptography`` is absent.

    Raises:
        MissingExtra: with the remedy.
    """
    try:
        import cryptography.hazmat.primitives.hpke  # noqa: F401
    except ImportError as error:
        raise MissingExtra("cryptography", "privacy", "Secure aggregation") from error


class SessionKey:
    """A client's key of one job, from the operating system's generator. It is not written anywhere.

    Attributes:
        public: 1216 bytes: ML-KEM-768, then X25519.
    """

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

        mlkem, x25519 = MLKEM768PrivateKey.from_seed_bytes(os.urandom(64)), X25519PrivateKey.generate()
        self._private = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def open(self, sealed: bytes, sender: bytes) -> bytes:
        """The bytes that :func:`seal` sealed to this key.

        Args:
            sender: The sender's public key.

        Raises:
            ValueError: if it was sealed to another key, by another, or changed.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return _suite().decrypt(sealed, self._private, _INFO + sender + self.public)
        except InvalidTag as error:
            raise ValueError("a sealed key does not open") from error


def is_key(public: bytes) -> bool:
    """Whether something can be sealed to a session's public key."""
    try:
        seal(bytes(32), public, public)
    except ValueError:
        return False
    return True


def seal(secret: bytes, receiver: bytes, sender: bytes) -> bytes:
    """32 bytes, sealed to a session's public key.

    Raises:
        ValueError: if the receiver's key is none.
    """
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey

    key = MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(receiver[:_MLKEM]), X25519PublicKey.from_public_bytes(receiver[_MLKEM:])
    )
    return _suite().encrypt(secret, key, _INFO + sender + receiver)


def _suite() -> Suite:
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def derive(key: bytes, *what: bytes) -> bytes:
    """32 bytes that belong to this use of a key and no other: HKDF-SHA256 with the uses, each with its length, as info."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"".join(len(part).to_bytes(4, "big") + part for part in what)
    return HKDF(SHA256(), 32, None, info).derive(key)


def encrypt(key: bytes, data: bytes, about: bytes) -> bytes:
    """AES-256-GCM under a key that encrypts nothing else.

    Args:
        about: What the receiver must say as well.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key).encrypt(bytes(12), data, about)


def decrypt(key: bytes, data: bytes, about: bytes) -> bytes:
    """Undoes :func:`encrypt`.

    Raises:
        ValueError: if it was changed, or is about something else.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(bytes(12), data, about)
    except InvalidTag as error:
        raise ValueError("an encrypted message was changed, or belongs to something else") from error


class Identity:
    """An Ed25519 key.

    Args:
        private: 32 bytes; ``None`` draws a new one from the operating system's generator.

    Attributes:
        public: What others know it by, 32 bytes.
    """

    def __init__(self, private: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._private = Ed25519PrivateKey.from_private_bytes(os.urandom(32) if private is None else private)
        self.public = self._private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._private.sign(message)


def is_signed(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether an identity has signed a message."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass
class Pair:
    """What a client shares with one other.

    Args:
        key: 32 bytes that the two of them know.
        sealed: The key, sealed to the other, where this side drew it and the other is not known to have it.
    """

    key: bytes
    sealed: bytes | None = None


@dataclass
class Session:
    """A client's keys of one job. It lives in memory; after a restart there is a new one.

    Args:
        identity: Signs what it says.
        key: Its session key.
        pairs: What it shares with others, by their session's public key.
    """

    identity: Identity
    key: SessionKey = field(default_factory=SessionKey)
    pairs: dict[bytes, Pair] = field(default_factory=dict)

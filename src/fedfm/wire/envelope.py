"""Signed by its sender, sealed to its receivers: what a broker carries and can neither read nor forge.

A message has a head and chunks. The head::

    16+16 bytes     magic, protocol, sizes; the release of fedfm that wrote it
    H bytes         header: JSON, in the clear (who, for whom, which job and round, until when, how long)
    R x 1168 bytes  the content key, wrapped for each receiver by HPKE (RFC 9180) with X25519 + ML-KEM-768
    N x 32 bytes    BLAKE2b of each chunk as it is stored
    64 bytes        Ed25519 signature of all the above

A chunk is AES-256-GCM of a piece of the payload, with the nonce ``id | counter | last`` (the STREAM construction), so that chunks can be
opened one by one, and none can be left out, moved or added. The content is encrypted once, whatever the number of receivers. If one chunk is all,
it follows the head; otherwise each chunk travels by itself (:mod:`fedfm.wire.transfer`). Nothing is compressed, so nothing expands.

The header commits to the content key (BLAKE2b), so one signed head opens to the same payload for every receiver. It does not hold a digest of
the payload, with which a broker could test guesses.

Covered here: who sent it, for whom, unchanged, whole, for this consortium, not expired; a secret while either X25519 or ML-KEM-768 holds. Sizes,
version, times, sender and signature are checked, in this order, before anything is decrypted. Not covered: whether it is new
(:mod:`fedfm.wire.window`); who talks to whom, when and how much, which the broker sees; messages recorded today, if a receiver's keys are stolen later.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from fedfm.core import words
from fedfm.core.version import VERSION as RELEASE
from fedfm.wire.identity import Card, Identity, require_cryptography
from fedfm.wire.refusal import Refused
from fedfm.wire.subjects import require_id, require_name

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hpke import Suite

PROTOCOL = 1
CHUNK = 512_000
MAX_CHUNK, MAX_CHUNKS, MAX_RECEIVERS, MAX_HEADER = 8 << 20, 1 << 14, 256, 1 << 15
# Seconds by which clocks may differ, and for which a message may be meant to last.
SKEW, MAX_LIFETIME = 120.0, 14 * 86400.0
_MAGIC = b"fdfm"
_PREFIX = struct.Struct("<4sHHII16s")
_WRAP, _DIGEST, _SIGNATURE, TAG = 1168, 32, 64, 16
MAX_HEAD = _PREFIX.size + MAX_HEADER + MAX_RECEIVERS * _WRAP + MAX_CHUNKS * _DIGEST + _SIGNATURE
_JOB, _KIND, _COMMIT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}"), re.compile(r"[a-z][a-z-]{0,23}"), re.compile(r"[0-9a-f]{64}")
_MAX_COUNT = 1 << 53
Payload = bytes | bytearray | memoryview | Sequence[bytes | bytearray | memoryview]


@dataclass(frozen=True)
class Header:
    """What a message says of itself, in the clear and signed. :func:`seal` fills in the fields that have a default.

    Args:
        consortium: Slug of the consortium.
        job: Which run, ``[a-z0-9][a-z0-9._-]*``, at most 64 characters.
        round: Its round; 0 before the first.
        sequence: The errand of the job that it belongs to; an answer repeats that of its request.
        kind: ``request``, ``reply``, ``body``, ...
        created: Seconds since 1970.
        expires: Seconds since 1970; nobody takes it later.
        sender: Name of the sender.
        receivers: Names of those who can open it.
        id: Names the message, 32 hexadecimal digits.
        size: Bytes of the payload.
        chunk: Bytes of the payload in each chunk but the last.
        commit: Commitment to the content key, 64 hexadecimal digits.
    """

    consortium: str
    job: str
    round: int
    sequence: int
    kind: str
    created: float
    expires: float
    sender: str = ""
    receivers: tuple[str, ...] = ()
    id: str = ""
    size: int = 0
    chunk: int = CHUNK
    commit: str = ""

    @staticmethod
    def now(consortium: str, job: str, round: int, sequence: int, kind: str, lasting: float = 86400.0) -> Header:
        """A header that is made now and expires ``lasting`` seconds later."""
        created = time.time()
        return Header(consortium, job, round, sequence, kind, created, created + lasting)

    @property
    def num_chunks(self) -> int:
        """At least 1: an empty payload has one chunk, which is empty."""
        return max(1, -(-self.size // self.chunk))

    def stored(self, index: int) -> int:
        """Bytes of a chunk as it is stored."""
        return min(self.chunk, self.size - index * self.chunk) + TAG


def seal(payload: Payload, sender: Identity, receivers: Sequence[Card], header: Header, secret: bytes | None = None) -> Sealed:
    """The payload, ready to travel.

    Args:
        payload: Bytes, or pieces of them, which are not copied as a whole.
        receivers: Who can open it.
        secret: 32 random bytes that a sender has kept. The same secret and payload give the same id and chunks, so that after a restart it sends
            only what the store does not have. This reads the payload once more. Default: a new key.

    Raises:
        MessageError: if a field is out of range, the payload is too long for its chunks, or nobody or too many are to receive it.
    """
    require_cryptography()
    pieces = _Pieces(payload)
    if secret is None:
        key, id = os.urandom(32), os.urandom(16)
    else:
        # The key depends on every byte, so no nonce is ever used for two payloads.
        derived = pieces.digest(secret)
        key, id = derived[:32], derived[32:]
    full = replace(
        header,
        sender=sender.name,
        receivers=tuple(card.name for card in receivers),
        id=id.hex(),
        size=pieces.size,
        commit=_commitment(key),
    )
    require(full)
    return Sealed(full, pieces, key, sender, tuple(receivers))


class Sealed:
    """A payload that is encrypted chunk by chunk while it is sent.

    Attributes:
        header: Its header, complete.
    """

    def __init__(self, header: Header, pieces: _Pieces, key: bytes, sender: Identity, receivers: tuple[Card, ...]) -> None:
        self.header = header
        self._pieces, self._key, self._sender, self._receivers = pieces, key, sender, receivers
        self._cipher = _cipher(key)
        self._digests: dict[int, bytes] = {}

    @property
    def num_chunks(self) -> int:
        """How many there are."""
        return self.header.num_chunks

    def chunk(self, index: int) -> bytes:
        """A chunk as it is stored; the same bytes whenever it is asked for."""
        start = index * self.header.chunk
        piece = self._pieces[start : min(start + self.header.chunk, self.header.size)]
        data = self._cipher.encrypt(_nonce(self.header, index), piece, bytes.fromhex(self.header.id))
        self._digests[index] = _digest(data)
        return data

    def head(self) -> bytes:
        """The signed head. Chunks that nobody has asked for are encrypted now, for their digests."""
        for index in range(self.num_chunks):
            if index not in self._digests:
                self.chunk(index)
        header = _write(self.header)
        prefix = _PREFIX.pack(_MAGIC, PROTOCOL, len(self._receivers), len(header), self.num_chunks, RELEASE.encode()[:16])
        wrapped = [_suite().encrypt(self._key, card.lock, _context(self.header, self._sender.card, card)) for card in self._receivers]
        head = b"".join([prefix, header, *wrapped, *(self._digests[index] for index in range(self.num_chunks))])
        return head + self._sender.signer.sign(_signed(head))

    def message(self) -> bytes:
        """The head, and the chunk if there is but one."""
        chunk = self.chunk(0) if self.num_chunks == 1 else b""
        return self.head() + chunk


class Opener:
    """Opens what is addressed to an identity.

    Args:
        identity: Whose messages these are.
        senders: Cards of those who may send, by name. It may change while it is used.
        consortium: Messages of others are refused.
        max_bytes: The longest payload.
        skew: Seconds by which clocks may differ.
        now: Seconds since 1970.
    """

    def __init__(
        self,
        identity: Identity,
        senders: Mapping[str, Card],
        consortium: str,
        max_bytes: int = 1 << 32,
        skew: float = SKEW,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._identity, self._senders, self._consortium = identity, senders, require_name(consortium)
        self._max_bytes, self._skew, self._now = max_bytes, skew, now

    def read(self, data: bytes, sender: str | None = None, max_bytes: int | None = None) -> Envelope:
        """The message, checked and not yet decrypted.

        Args:
            sender: Who alone can have sent it: the member whose subject it came by.
            max_bytes: The longest payload here, where it is less than usual.

        Raises:
            Refused: if it is anything that such a sender could not honestly have sent to this identity, in this consortium, at this time.
        """
        head = _split(data)
        header = _read(head.header)
        self._require_fit(header, head, min(self._max_bytes, self._max_bytes if max_bytes is None else max_bytes))
        self._require_time(header)
        card = self._card(header, sender)
        from cryptography.exceptions import InvalidSignature

        try:
            card.verifier.verify(head.signature, _signed(head.signed))
        except InvalidSignature as error:
            raise Refused("signature", f"A message in the name of {header.sender} is not signed with its key.") from error
        return Envelope(header, head, self._identity, card)

    def open(self, data: bytes, sender: str | None = None, max_bytes: int | None = None) -> tuple[Header, bytes]:
        """Header and payload of a message of one chunk.

        Raises:
            Refused: as :meth:`read`, and if its chunks travel by themselves or do not open.
        """
        envelope = self.read(data, sender, max_bytes)
        if envelope.inline is None:
            raise Refused("chunk", f"A message of {envelope.num_chunks} chunks arrived where all of it was expected.")
        return envelope.header, envelope.decrypt(0, envelope.inline)

    def _require_fit(self, header: Header, head: _Head, max_bytes: int) -> None:
        if header.size > max_bytes:
            raise Refused("oversize", f"A message announces {header.size} bytes where at most {max_bytes} are allowed.")
        if head.num_chunks != header.num_chunks:
            raise Refused("malformed", f"A message of {header.size} bytes has {header.num_chunks} chunks; it claims {head.num_chunks}.")
        if head.num_receivers != len(header.receivers):
            raise Refused("malformed", f"A message for {len(header.receivers)} has {head.num_receivers} wrapped keys.")
        expected = header.stored(0) if header.num_chunks == 1 else 0
        if len(head.inline) != expected:
            raise Refused("malformed", f"{len(head.inline)} bytes follow the head of a message where {expected} are expected.")
        if header.consortium != self._consortium:
            raise Refused("consortium", f"A message of the consortium {header.consortium} arrived in {self._consortium}.")
        if self._identity.name not in header.receivers:
            raise Refused("receiver", f"A message for {words.listed(header.receivers)} arrived at {self._identity.name}.")

    def _require_time(self, header: Header) -> None:
        now = self._now()
        if header.created > now + self._skew:
            raise Refused(
                "future",
                f"A message was made {header.created - now:.0f} seconds after now, where clocks may differ by {self._skew:.0f}. Set both clocks.",
            )
        if now > header.expires + self._skew:
            raise Refused("expired", f"A message expired {now - header.expires:.0f} seconds ago.")

    def _card(self, header: Header, sender: str | None) -> Card:
        if sender is not None and header.sender != sender:
            raise Refused("sender", f"A message in the name of {header.sender} came by the subject of {words.clean(sender, 40)}.")
        card = self._senders.get(header.sender)
        if card is None:
            raise Refused("sender", f"{header.sender} is not a member, or is not one any more.")
        return card


class Envelope:
    """A message whose sender is known and whose chunks can be opened one by one.

    Attributes:
        header: What it says of itself.
        inline: Its only chunk, if it came with the head.
    """

    def __init__(self, header: Header, head: _Head, identity: Identity, sender: Card) -> None:
        self.header, self._head, self._identity, self._sender = header, head, identity, sender
        self.inline: bytes | None = bytes(head.inline) if header.num_chunks == 1 else None

    @property
    def num_chunks(self) -> int:
        """How many there are."""
        return self.header.num_chunks

    @cached_property
    def _cipher(self) -> AESGCM:
        from cryptography.exceptions import InvalidTag

        index = self.header.receivers.index(self._identity.name)
        wrapped = self._head.wrapped[index * _WRAP : (index + 1) * _WRAP]
        try:
            key = _suite().decrypt(wrapped, self._identity.opener, _context(self.header, self._sender, self._identity.card))
        except (InvalidTag, ValueError) as error:
            raise Refused(
                "key", f"A message of {self.header.sender} is sealed for other keys than those of {self._identity.name}."
            ) from error
        if len(key) != 32 or not hmac.compare_digest(_commitment(key), self.header.commit):
            raise Refused("key", f"A message of {self.header.sender} does not open with the key that it commits to.")
        return _cipher(key)

    def decrypt(self, index: int, data: bytes | memoryview | None) -> bytes:
        """The piece of the payload that is in chunk ``index``.

        Args:
            data: The chunk as it was stored; ``None`` where there is none.

        Raises:
            Refused: if it is not the chunk that the sender made.
        """
        where = self._where(index)
        if not 0 <= index < self.num_chunks:
            raise Refused("chunk", f"{where} was asked for; there are {self.num_chunks}.")
        if data is None:
            raise Refused("chunk", f"{where} is missing.")
        if len(data) != self.header.stored(index):
            raise Refused("chunk", f"{where} has {len(data)} bytes instead of {self.header.stored(index)}.")
        if not hmac.compare_digest(_digest(data), self._head.digests[index * _DIGEST : (index + 1) * _DIGEST]):
            raise Refused("chunk", f"{where} is not the one that was signed.")
        return self.decrypt_again(index, data)

    def decrypt_again(self, index: int, data: bytes | memoryview) -> bytes:
        """As :meth:`decrypt`, of a chunk that passed it before: its signature is not checked again, its seal is.

        Raises:
            Refused: if it does not open.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(_nonce(self.header, index), data, bytes.fromhex(self.header.id))
        except InvalidTag as error:
            raise Refused("chunk", f"{self._where(index)} does not open.") from error

    def _where(self, index: int) -> str:
        return f"Chunk {index} of a message of {self.header.sender}"


def require(header: Header) -> None:
    """Refuses a header with a field that is out of range.

    Raises:
        MessageError: naming the field.
    """
    require_name(header.consortium)
    require_name(header.sender)
    require_id(header.id)
    for name, pattern in (("job", _JOB), ("kind", _KIND), ("commit", _COMMIT)):
        value = getattr(header, name)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise _wrong(name, value)
    for name in ("round", "sequence", "size"):
        if not _is_count(getattr(header, name), 0, _MAX_COUNT):
            raise _wrong(name, getattr(header, name))
    if not _is_count(header.chunk, 1, MAX_CHUNK):
        raise _wrong("chunk", header.chunk)
    if header.num_chunks > MAX_CHUNKS:
        raise Refused("oversize", f"A message of {header.size} bytes in chunks of {header.chunk} has more than {MAX_CHUNKS} chunks.")
    if not 1 <= len(header.receivers) <= MAX_RECEIVERS or len(set(header.receivers)) != len(header.receivers):
        raise Refused("malformed", f"A message has {len(header.receivers)} receivers; it has 1 to {MAX_RECEIVERS} different ones.")
    for receiver in header.receivers:
        require_name(receiver)
    if not 0 <= header.expires - header.created <= MAX_LIFETIME:
        raise Refused(
            "malformed",
            f"A message is meant to last {header.expires - header.created:.0f} seconds; at most {MAX_LIFETIME:.0f} are allowed.",
        )


_FIELDS = tuple(Header.__dataclass_fields__)


def _write(header: Header) -> bytes:
    return json.dumps({name: getattr(header, name) for name in _FIELDS}, separators=(",", ":")).encode()


def _read(data: memoryview) -> Header:
    try:
        fields = json.loads(str(data, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused("malformed", f"A message's header is not JSON: {str(error)[:80]}.") from error
    if not isinstance(fields, dict) or fields.keys() != set(_FIELDS):
        shown = words.listed(sorted(map(str, set(_FIELDS) ^ set(fields)))) if isinstance(fields, dict) else "all of them"
        raise Refused("malformed", f"A message's header has other fields than it should: {shown}.")
    for name in ("created", "expires"):
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e12 <= value <= 1e12:
            raise _wrong(name, value)
        fields[name] = float(value)
    if not isinstance(fields["receivers"], list) or not all(isinstance(name, str) for name in fields["receivers"]):
        raise _wrong("receivers", fields["receivers"])
    header = Header(**{**fields, "receivers": tuple(fields["receivers"])})
    require(header)
    return header


def _wrong(name: str, value: object) -> Refused:
    # What is nested may be nested too deep to be shown.
    shown = words.clean(repr(value), 60) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return Refused("malformed", f"A message's {name} is {shown}, which no message has.")


def _is_count(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class _Head:
    """The parts of a head, by their sizes alone."""

    signed: memoryview
    header: memoryview
    wrapped: memoryview
    digests: memoryview
    signature: bytes
    inline: memoryview
    num_receivers: int
    num_chunks: int


def _split(data: bytes) -> _Head:
    view = memoryview(data)
    if len(view) > MAX_HEAD + MAX_CHUNK + TAG:
        raise Refused("oversize", f"A message of {len(view)} bytes arrived; none has more than {MAX_HEAD + MAX_CHUNK + TAG}.")
    if len(view) < 6 or bytes(view[:4]) != _MAGIC:
        raise Refused("malformed", f"{len(view)} bytes arrived that are no message of fedfm.")
    protocol = int.from_bytes(view[4:6], "little")
    if protocol != PROTOCOL:
        release = bytes(view[16:32]).rstrip(b"\0").decode("ascii", "replace")
        raise Refused(
            "version",
            f"A message of protocol {protocol} (fedfm {words.clean(release, 16) or 'unknown'}) arrived; this side speaks protocol {PROTOCOL} "
            f"(fedfm {RELEASE}). Install the same version on both sides.",
        )
    if len(view) < _PREFIX.size:
        raise Refused("malformed", f"A message ends after {len(view)} bytes.")
    _, _, num_receivers, length, num_chunks, _ = _PREFIX.unpack(view[: _PREFIX.size])
    if length > MAX_HEADER or num_receivers > MAX_RECEIVERS or num_chunks > MAX_CHUNKS:
        raise Refused(
            "oversize",
            f"A message claims a header of {length} bytes, {num_receivers} receivers and {num_chunks} chunks, which is too much.",
        )
    ends = list(accumulate([_PREFIX.size, length, num_receivers * _WRAP, num_chunks * _DIGEST, _SIGNATURE]))
    if len(view) < ends[-1]:
        raise Refused("malformed", f"A message's head ends after {len(view)} of {ends[-1]} bytes.")
    return _Head(
        signed=view[: ends[3]],
        header=view[ends[0] : ends[1]],
        wrapped=view[ends[1] : ends[2]],
        digests=view[ends[2] : ends[3]],
        signature=bytes(view[ends[3] : ends[4]]),
        inline=view[ends[4] :],
        num_receivers=num_receivers,
        num_chunks=num_chunks,
    )


class _Pieces:
    """Several buffers read as one."""

    def __init__(self, payload: Payload) -> None:
        pieces = [payload] if isinstance(payload, bytes | bytearray | memoryview) else payload
        self._views = [view for view in (memoryview(piece).cast("B") for piece in pieces) if len(view)]
        self._starts = [0, *accumulate(map(len, self._views))]
        self.size = self._starts[-1]

    def __getitem__(self, place: slice) -> bytes | memoryview:
        """A stretch; a copy only where it spans two buffers."""
        start, stop = place.start, place.stop
        if start >= stop:
            return b""
        first = bisect_right(self._starts, start) - 1
        parts = []
        for view, begin in zip(self._views[first:], self._starts[first:], strict=False):
            if begin >= stop:
                break
            parts.append(view[max(0, start - begin) : stop - begin])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def digest(self, secret: bytes) -> bytes:
        digest = hashlib.blake2b(key=secret, digest_size=48, person=b"fedfm key")
        for view in self._views:
            digest.update(view)
        return digest.digest()


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST, person=b"fedfm chunk").digest()


def _commitment(key: bytes) -> str:
    return hashlib.blake2b(key, digest_size=32, person=b"fedfm commit").hexdigest()


def _nonce(header: Header, index: int) -> bytes:
    return bytes.fromhex(header.id)[:7] + struct.pack(">IB", index, index == header.num_chunks - 1)


def _context(header: Header, sender: Card, receiver: Card) -> bytes:
    """What a wrapped key is bound to; it opens nowhere else."""
    return b"fedfm key 1" + bytes.fromhex(sender.fingerprint + receiver.fingerprint + header.id)


def _signed(head: bytes | memoryview) -> bytes:
    return b"fedfm envelope 1\0" + head


def _suite() -> Suite:
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)

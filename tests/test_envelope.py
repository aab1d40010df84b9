"""Sealing and opening: an identity for those addressed, closed for all others, and every flipped bit is noticed."""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfm.core.errors import MessageError

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedfm.wire import envelope
from fedfm.wire.envelope import Header, Opener, seal
from fedfm.wire.identity import Identity
from fedfm.wire.refusal import Refused

PEOPLE = [Identity.create(name) for name in ("alice", "bob", "carol", "dave")]
ALICE, BOB, CAROL, DAVE = PEOPLE
CARDS = {person.name: person.card for person in PEOPLE}
NOW = 1_800_000_000.0
HEADER = Header("c", "run-1", 3, 7, "reply", NOW, NOW + 60)


def opener(identity: Identity, **changes) -> Opener:
    return Opener(identity, CARDS, "c", now=lambda: NOW, **changes)


def opened(identity: Identity, data: bytes, chunks: dict[int, bytes]) -> bytes:
    read = opener(identity).read(data)
    return b"".join(read.decrypt(i, chunks.get(i, read.inline)) for i in range(read.num_chunks))


@given(
    st.lists(st.binary(max_size=300), max_size=5),
    st.lists(st.sampled_from(PEOPLE), min_size=1, max_size=4, unique_by=lambda person: person.name),
    st.sampled_from(PEOPLE),
    st.integers(1, 400),
)
@settings(max_examples=60)
def test_what_is_sealed_opens_to_itself_for_those_addressed_and_for_nobody_else(pieces, receivers, sender, chunk) -> None:
    sealed = seal(pieces, sender, [person.card for person in receivers], replace(HEADER, chunk=chunk))
    chunks = {i: sealed.chunk(i) for i in range(sealed.num_chunks)}
    data = sealed.message()
    for person in PEOPLE:
        if person in receivers:
            assert opened(person, data, chunks) == b"".join(pieces)
        else:
            with pytest.raises(Refused, match="arrived at"):
                opener(person).read(data)
    # Somebody who takes a receiver's name does not have its keys.
    thief = replace(Identity.create("thief"), name=receivers[0].name)
    with pytest.raises(Refused) as refused:
        opened(thief, data, chunks)
    assert refused.value.why == "key"
    joined = data + b"".join(chunks.values())
    assert all(len(piece) < 8 or piece not in joined for piece in pieces)


@given(st.binary(max_size=2000), st.integers(1, 600), st.integers(1, 600))
@settings(max_examples=60)
def test_the_size_of_a_chunk_does_not_matter_for_the_payload(payload: bytes, one: int, other: int) -> None:
    for size in (one, other):
        sealed = seal(payload, ALICE, [BOB.card], replace(HEADER, chunk=size))
        chunks = {i: sealed.chunk(i) for i in range(sealed.num_chunks)}
        assert [len(chunk) for chunk in chunks.values()] == [sealed.header.stored(i) for i in chunks]
        assert opened(BOB, sealed.message(), chunks) == payload


def test_every_flipped_bit_is_noticed() -> None:
    """In the prefix, the header, the wrapped keys, the digests, the signature and the chunk."""
    data = seal(b"the payload", ALICE, [BOB.card], HEADER).message()
    read = opener(BOB)
    assert read.open(data)[1] == b"the payload"
    flipped = bytearray(data)
    for place in range(8 * len(data)):
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(MessageError):
            read.open(bytes(flipped))
        flipped[place // 8] ^= 1 << place % 8
    assert bytes(flipped) == data


def test_every_flipped_bit_of_every_chunk_is_noticed() -> None:
    sealed = seal(b"0123456789", ALICE, [BOB.card], replace(HEADER, chunk=4))
    chunks = [sealed.chunk(i) for i in range(3)]
    read = opener(BOB).read(sealed.head())
    for i, chunk in enumerate(chunks):
        for place in range(8 * len(chunk)):
            flipped = bytearray(chunk)
            flipped[place // 8] ^= 1 << place % 8
            with pytest.raises(Refused):
                read.decrypt(i, bytes(flipped))
        assert read.decrypt(i, chunk) == b"0123456789"[4 * i : 4 * i + 4]


# --- the two halves of the key ------------------------------------------------------------------------------------------


def expand(secret: bytes, info: bytes, length: int) -> bytes:
    out, block = b"", b""
    for i in range(1, 1 + -(-length // 32)):
        block = hmac.digest(secret, block + info + bytes([i]), "sha256")
        out += block
    return out[:length]


def unwrapped(wrapped: bytes, mlkem_secret: bytes, x_secret: bytes, x_public: bytes, info: bytes) -> bytes:
    """X-Wing's combiner and the key schedule of RFC 9180 in base mode, by hand."""
    enc, sealed = wrapped[:1120], wrapped[1120:]
    shared = hashlib.sha3_256(mlkem_secret + x_secret + enc[1088:] + x_public + rb"\.//^" + b"\\").digest()
    suite = b"HPKE" + struct.pack(">HHH", 0x647A, 1, 2)

    def extract(salt: bytes, label: bytes, value: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + value, "sha256")

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    key, nonce = (
        expand(secret, struct.pack(">H", length) + b"HPKE-v1" + suite + label + context, length)
        for label, length in ((b"key", 32), (b"base_nonce", 12))
    )
    return AESGCM(key).decrypt(nonce, sealed, None)


def test_each_half_of_the_key_alone_keeps_the_secret() -> None:
    """Who knows one shared secret and replaces the other by a known value does not get the key; with both it does."""
    sealed = seal(b"secret", ALICE, [BOB.card], HEADER)
    read = opener(BOB).read(sealed.message())
    wrapped = bytes(read._head.wrapped)
    info = b"fedfm key 1" + bytes.fromhex(ALICE.card.fingerprint + BOB.card.fingerprint + sealed.header.id)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(BOB.mlkem).decapsulate(wrapped[:1088])
    x = X25519PrivateKey.from_private_bytes(BOB.x25519).exchange(X25519PublicKey.from_public_bytes(wrapped[1088:1120]))
    assert unwrapped(wrapped, mlkem, x, BOB.card.x25519, info) == sealed._key
    for halves in ((bytes(32), x), (mlkem, bytes(32)), (x, x), (mlkem, mlkem)):
        with pytest.raises(InvalidTag):
            unwrapped(wrapped, *halves, BOB.card.x25519, info)
    with pytest.raises(InvalidTag):
        unwrapped(wrapped, mlkem, x, BOB.card.x25519, info + b"x")


@pytest.mark.parametrize("half", ["x25519", "mlkem"])
def test_a_thief_of_one_private_key_opens_nothing(half: str) -> None:
    data = seal(b"secret", ALICE, [BOB.card], HEADER).message()
    other = {"x25519": "mlkem", "mlkem": "x25519"}[half]
    for thief in (replace(BOB), replace(BOB, **{other: getattr(CAROL, other)})):
        # It knows all that is public.
        thief.__dict__["card"] = BOB.card
        if getattr(thief, other) == getattr(BOB, other):
            assert opener(thief).open(data)[1] == b"secret"
        else:
            with pytest.raises(Refused, match="sealed for other keys"):
                opener(thief).open(data)


# --- what the parts promise ---------------------------------------------------------------------------------------------


def test_the_content_is_encrypted_once_whatever_the_number_of_receivers() -> None:
    payload = bytes(100_000)
    sizes = []
    for receivers in ([BOB.card], [BOB.card, CAROL.card], [BOB.card, CAROL.card, DAVE.card]):
        sealed = seal(payload, ALICE, receivers, replace(HEADER, chunk=10_000))
        sizes.append(len(sealed.head()) + sum(len(sealed.chunk(i)) for i in range(10)))
    assert all(1168 < after - before < 1200 for before, after in pairwise(sizes))
    assert sizes[0] < len(payload) + 2500


def test_no_two_messages_share_a_key_or_an_id() -> None:
    sealed = [seal(b"same", ALICE, [BOB.card], HEADER) for _ in range(50)]
    assert len({s.header.id for s in sealed}) == len({s._key for s in sealed}) == len({s.chunk(0) for s in sealed}) == 50


def test_a_secret_that_is_kept_gives_the_same_chunks_and_another_payload_gives_others() -> None:
    secret, payload = bytes(range(32)), b"0123456789"
    one, again = (seal(payload, ALICE, [BOB.card], replace(HEADER, chunk=4), secret) for _ in range(2))
    late = seal([payload[:3], payload[3:]], ALICE, [BOB.card, CAROL.card], replace(HEADER, chunk=4), secret)
    assert one.header.id == again.header.id == late.header.id
    assert [one.chunk(i) for i in range(3)] == [again.chunk(i) for i in range(3)] == [late.chunk(i) for i in range(3)]
    other, elsewhere = (seal(b"0123456780", ALICE, [BOB.card], HEADER, secret), seal(payload, ALICE, [BOB.card], HEADER, bytes(32)))
    assert len({s._key for s in (one, other, elsewhere)}) == len({s.header.id for s in (one, other, elsewhere)}) == 3


def test_a_head_opens_to_one_payload_for_all() -> None:
    """A sender who wraps another key for one receiver, to show it another payload, is refused: the header commits to one key."""
    sealed = seal(b"payload", ALICE, [BOB.card, CAROL.card], HEADER)
    sealed._key = bytes(32)
    with pytest.raises(Refused, match="commits to"):
        opener(CAROL).open(sealed.message())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"job": "../x"}, "job"),
        ({"round": -1}, "round"),
        ({"chunk": 0}, "chunk"),
        ({"chunk": 1}, "more than 16384 chunks"),
        ({"expires": NOW - 1}, "last -1"),
        ({"expires": NOW + 10**9}, "at most"),
        ({"kind": "Reply"}, "kind"),
        ({"consortium": "C"}, "no name"),
    ],
)
def test_what_the_receiver_would_refuse_is_not_sealed(changes, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        seal(bytes(20_000), ALICE, [BOB.card], replace(HEADER, **changes))
    for receivers in ([], [BOB.card, BOB.card], [BOB.card] * 300):
        with pytest.raises(MessageError, match="receivers"):
            seal(b"", ALICE, receivers, HEADER)


def test_nothing_is_decrypted_before_the_sender_is_known(monkeypatch) -> None:
    """Sizes, version, time, sender and signature are checked first, in this order."""
    data = seal(b"payload", ALICE, [BOB.card], HEADER).message()
    monkeypatch.setattr(envelope, "_suite", lambda: pytest.fail("a key was opened"))
    monkeypatch.setattr(envelope, "_cipher", lambda key: pytest.fail("a chunk was opened"))
    assert opener(BOB).read(data).header.sender == "alice"
    wrong = [
        ("version", data[:4] + b"\x09\0" + data[6:-90] + bytes(90), {}),
        ("oversize", data[:-90] + bytes(90), {"max_bytes": 3}),
        ("expired", data[:-90] + bytes(90), {"now": lambda: NOW + 1e6}),
        ("sender", data[:-90] + bytes(90), {"senders": {}}),
        ("signature", data[:-90] + bytes(90), {}),
    ]
    for why, changed, changes in wrong:
        settings = {"senders": CARDS, "consortium": "c", "now": lambda: NOW, **changes}
        with pytest.raises(Refused) as refused:
            Opener(BOB, **settings).read(changed)
        assert refused.value.why == why


def test_clocks_may_differ_a_little() -> None:
    data = seal(b"", ALICE, [BOB.card], HEADER).message()
    for now, why in ((NOW - 119, None), (NOW - 121, "future"), (NOW + 60 + 119, None), (NOW + 60 + 121, "expired")):
        read = Opener(BOB, CARDS, "c", now=lambda now=now: now)
        if why is None:
            assert read.open(data)[1] == b""
        else:
            with pytest.raises(Refused) as refused:
                read.open(data)
            assert refused.value.why == why

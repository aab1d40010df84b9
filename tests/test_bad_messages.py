"""What must never be aggregated: each bad message is refused with its typed error, on the whole way from the broker's bytes to the tensors."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save

from fedfm.core.errors import MessageError
from fedfm.core.leaves import Leaf, require
from fedfm.core.messages import Reply, Request, pack, unpack, unpack_from

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")

from fedfm.core.version import VERSION as RELEASE
from fedfm.wire import envelope as wire
from fedfm.wire.envelope import Header, Opener, Sealed, seal
from fedfm.wire.identity import Card, Identity
from fedfm.wire.refusal import Refused, reason
from fedfm.wire.transfer import Memory, Spool, receive_all, send
from fedfm.wire.window import Window

COORDINATOR, ALICE, BOB, STRANGER = (Identity.create(name) for name in ("c0", "alice", "bob", "stranger"))
OLD_ALICE = replace(Identity.create("old"), name="alice")
NOW = 1_800_000_000.0
HEADER = Header("c", "run-1", 3, 7, "reply", NOW, NOW + 60)
LEAVES = (Leaf("a", (3,)), Leaf("b", (2, 2), torch.int8, bound=100))
TENSORS = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.ones(2, 2, dtype=torch.int8)}


class Coordinator:
    """A coordinator in round 3 of run-1, with two members. It reads what arrives as a whole, or piece by piece."""

    def __init__(self, path: Path | None = None, now: float = NOW, in_pieces: bool = False, **changes: Any) -> None:
        self.in_pieces = in_pieces
        self.senders: dict[str, Card] = {person.name: person.card for person in (ALICE, BOB)}
        self.opener = Opener(COORDINATOR, self.senders, "c", max_bytes=1 << 20, now=lambda: now)
        self.window, self.store = Window(path, now=lambda: now, **changes), Memory()
        self.window.open("run-1", 3, 3)

    def accept(self, data: bytes, member: str = "alice") -> Reply:
        """Bytes that came by a member's subject: what would be aggregated."""
        try:
            envelope = self.opener.read(data, sender=member)
            self.window.check(envelope.header)
            limits = {"max_bytes": 1 << 20, "max_tensors": 8}
            if self.in_pieces:
                message = unpack_from(Spool(envelope, self.store), **limits)
            else:
                message = unpack(receive_all(envelope, self.store), **limits)
            assert isinstance(message, Reply)
            require(LEAVES, message.tensors, message.client)
        except MessageError as error:
            self.window.count(error)
            raise
        self.window.take(envelope.header)
        return message


def reply(tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    return pack(Reply("alice", "train", 3, TENSORS if tensors is None else tensors, {"weight": 4.0}))


def sealed(payload: bytes | None = None, sender: Identity = ALICE, receiver: Identity = COORDINATOR, **changes: Any) -> Sealed:
    return seal(reply() if payload is None else payload, sender, [receiver.card], replace(HEADER, **changes))


def message(payload: bytes | None = None, **changes: Any) -> bytes:
    return sealed(payload, **changes).message()


GOOD = message()


def rebuilt(
    header: Callable[[dict[str, Any]], object] | bytes | None = None,
    data: bytes = GOOD,
    signer: Identity = ALICE,
    prefix: dict[str, int] | None = None,
) -> bytes:
    """A message with another header or other sizes, which a member has signed: what a liar with good keys can send."""
    head = wire._split(data)
    text = bytes(head.header)
    if isinstance(header, bytes):
        text = header
    elif header is not None:
        fields = json.loads(text)
        changed = header(fields)
        text = json.dumps(fields if changed is None else changed).encode()
    sizes = {"receivers": head.num_receivers, "header": len(text), "chunks": head.num_chunks, **(prefix or {})}
    start = wire._PREFIX.pack(b"fdfm", 1, sizes["receivers"], sizes["header"], sizes["chunks"], b"0.1.0")
    signed = start + text + head.wrapped + head.digests
    return signed + signer.signer.sign(wire._signed(signed)) + head.inline


def fields(**changes: object) -> bytes:
    return rebuilt(lambda head: head.update(changes))


def flipped(place: int, data: bytes = GOOD) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


HEAD = wire._split(GOOD)
AT_WRAP = 32 + len(HEAD.header)
AT_DIGEST = AT_WRAP + 1168
AT_SIGNATURE = AT_DIGEST + 32
INDEX = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


def safetensors(index: object, data: bytes = b"") -> bytes:
    text, start = json.dumps(index).encode(), reply({})
    return start[: 4 + int.from_bytes(start[:4], "little")] + struct.pack("<Q", len(text)) + text + data


def torch_zip() -> bytes:
    file = io.BytesIO()
    torch.save(TENSORS, file)
    return file.getvalue()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


BOMB = gzip.compress(bytes(100_000_000))

# Name, bytes, the word under which it is counted, and words of the error.
CASES: list[tuple[str, bytes, str, str]] = [
    # Who sent it
    ("unsigned", GOOD[:AT_SIGNATURE] + bytes(64) + GOOD[AT_SIGNATURE + 64 :], "signature", "not signed with its key"),
    ("signed by another member", rebuilt(signer=BOB), "signature", "not signed"),
    ("signed by a stranger", rebuilt(signer=STRANGER), "signature", "not signed"),
    ("from a stranger", message(sender=STRANGER), "sender", "came by the subject"),
    ("in the name of another member", message(sender=BOB), "sender", "came by the subject of alice"),
    ("in the name of the coordinator", fields(sender="c0"), "sender", "c0 came by"),
    ("signed with the key of an earlier enrolment", message(sender=OLD_ALICE), "signature", "not signed"),
    ("signature flipped", flipped(AT_SIGNATURE), "signature", "not signed"),
    ("header changed after signing", GOOD.replace(b'"round":3', b'"round":4'), "signature", "not signed"),
    ("wrapped key changed", flipped(AT_WRAP), "signature", "not signed"),
    ("digest changed", flipped(AT_DIGEST), "signature", "not signed"),
    ("release changed", flipped(16), "signature", "not signed"),
    # When
    ("expired", message(created=NOW - 1000, expires=NOW - 130), "expired", "expired 130 seconds ago"),
    ("from the future", message(created=NOW + 130, expires=NOW + 200), "future", "130 seconds after now"),
    ("lasts for years", fields(expires=NOW + 1e9), "malformed", "at most"),
    ("expires before it was made", fields(expires=NOW - 1), "malformed", "last -1"),
    ("made at NaN", fields(created=float("nan")), "malformed", "created is nan"),
    ("made at infinity", fields(created=float("inf")), "malformed", "created is inf"),
    ("made at true", fields(created=True), "malformed", "created is True"),
    ("made at a text", fields(created="now"), "malformed", "created is 'now'"),
    ("made at a number of 4000 digits", fields(created=10**4000), "malformed", "created is 1000"),
    # For whom, for what
    ("of another consortium", message(consortium="d"), "consortium", "consortium d arrived in c"),
    ("for another member", message(receiver=BOB), "receiver", "for bob arrived at c0"),
    ("for other keys of the coordinator", message(receiver=replace(STRANGER, name="c0")), "key", "sealed for other keys"),
    ("of another job", message(job="run-2"), "job", "run-2, which is not running"),
    ("late", message(round=2), "late", "round 3 has begun"),
    ("of a round that has not begun", message(round=4), "early", "has not begun"),
    # What it is
    ("another protocol", GOOD[:4] + b"\x02\0" + GOOD[6:16] + b"9.9.9".ljust(16, b"\0") + GOOD[32:], "version", rf"protocol 2 \(fedfm 9.9.9\).*{RELEASE}"),
    ("protocol 0", GOOD[:4] + b"\0\0" + GOOD[6:], "version", "protocol 0"),
    ("another protocol, cut", GOOD[:4] + b"\x02\0", "version", "protocol 2"),
    ("no magic", b"FDFM" + GOOD[4:], "malformed", "no message of fedfm"),
    ("nothing", b"", "malformed", "0 bytes arrived"),
    ("a byte", b"f", "malformed", "1 bytes arrived"),
    ("a pickle", pickle.dumps(Evil()), "malformed", "no message of fedfm"),
    ("a torch file", torch_zip(), "malformed", "no message of fedfm"),
    ("a compressed bomb", BOMB, "malformed", "no message of fedfm"),
    ("JSON", b'{"kind":"reply"}' * 99, "malformed", "no message of fedfm"),
    ("bare tensors", save(TENSORS), "malformed", "no message of fedfm"),
    ("a packed message that is not sealed", reply(), "malformed", "no message of fedfm"),
    ("16 MB of zeros", bytes(16 << 20), "oversize", "none has more"),
    # Cut and lengthened
    ("cut in the sizes", GOOD[:20], "malformed", "ends after 20"),
    ("cut in the header", GOOD[:100], "malformed", "ends after 100"),
    ("cut in the wrapped keys", GOOD[: AT_WRAP + 9], "malformed", "head ends"),
    ("cut in the signature", GOOD[: AT_SIGNATURE + 9], "malformed", "head ends"),
    ("cut in the chunk", GOOD[:-1], "malformed", "follow the head"),
    ("without its chunk", GOOD[: AT_SIGNATURE + 64], "malformed", "0 bytes follow"),
    ("lengthened", GOOD + b"x", "malformed", "follow the head"),
    ("a header of 4 GB", rebuilt(prefix={"header": 2**32 - 1}), "oversize", "header of 4294967295"),
    ("65535 receivers", rebuilt(prefix={"receivers": 65535}), "oversize", "65535 receivers"),
    ("4 billion chunks", rebuilt(prefix={"chunks": 2**32 - 1}), "oversize", "chunks, which is too much"),
    ("more chunks than there are", rebuilt(prefix={"chunks": 2}), "malformed", "head ends|claims 2|not JSON|follow the head"),
    ("no chunk", rebuilt(prefix={"chunks": 0}), "malformed", "claims 0"),
    ("a million fields", rebuilt(json.dumps({f"x{i}": 1 for i in range(1_000_000)}).encode()), "oversize", "none has more"),
    ("2000 fields", rebuilt(json.dumps({f"x{i}": 1 for i in range(2000)}).encode()), "malformed", "other fields"),
    # Fields
    ("one field more", fields(extra=1), "malformed", "other fields than it should: extra"),
    ("one field less", rebuilt(lambda head: {k: v for k, v in head.items() if k != "job"}), "malformed", "other fields than it should: job"),
    ("a list", rebuilt(b"[]"), "malformed", "other fields"),
    ("deep", rebuilt(b"[" * 30_000), "malformed", "not JSON"),
    ("a deep field", rebuilt(lambda head: head.update(job=json.loads("[" * 400 + "]" * 400))), "malformed", "job is a list"),
    ("not UTF-8", rebuilt(b"\xff\xfe{}"), "malformed", "not JSON"),
    ("half a surrogate", fields(sender="\ud800"), "malformed", "no name"),
    ("a number of 5000 digits", rebuilt(b'{"round":' + b"9" * 5000 + b"}"), "malformed", "not JSON"),
    ("a path for a sender", fields(sender="../../alice"), "malformed", "no name"),
    ("a path for a job", fields(job="../../etc/passwd"), "malformed", "job is '../../etc"),
    ("a path for a kind", fields(kind="/reply"), "malformed", "kind is"),
    ("a path for an id", fields(id="../" + "0" * 29), "malformed", "no id"),
    ("a path for a receiver", fields(receivers=["../c0"]), "malformed", "no name"),
    ("a subject for a sender", fields(sender="alice.>"), "malformed", "no name"),
    ("a control character in a job", fields(job="a\x1b[2J"), "malformed", "job is"),
    ("round -1", fields(round=-1), "malformed", "round is -1"),
    ("round 2^60", fields(round=2**60), "malformed", "round is"),
    ("round true", fields(round=True), "malformed", "round is True"),
    ("round 1.5", fields(round=1.5), "malformed", "round is 1.5"),
    ("round null", fields(round=None), "malformed", "round is None"),
    ("no receivers", fields(receivers=[]), "malformed", "0 receivers"),
    ("receivers that are no list", fields(receivers="c0"), "malformed", "receivers is 'c0'"),
    ("a receiver twice", fields(receivers=["c0", "c0"]), "malformed", "2 receivers"),
    ("a receiver without a key", fields(receivers=["c0", "bob"]), "malformed", "2 has 1 wrapped"),
    ("a commitment to another key", fields(commit="0" * 64), "key", "commits to"),
    # Sizes that lie
    ("a terabyte announced", fields(size=2**40), "oversize", "more than 16384 chunks"),
    ("two megabytes announced", fields(size=2 << 20), "oversize", "announces 2097152 bytes where at most 1048576"),
    ("size -1", fields(size=-1), "malformed", "size is -1"),
    ("one byte more announced", rebuilt(lambda head: head.update(size=head["size"] + 1)), "malformed", "follow the head"),
    ("one byte less announced", rebuilt(lambda head: head.update(size=head["size"] - 1)), "malformed", "follow the head"),
    ("chunks of 0 bytes", fields(chunk=0), "malformed", "chunk is 0"),
    ("chunks of 1 GB", fields(chunk=1 << 30), "malformed", "chunk is"),
    ("shorter chunks than there are", fields(chunk=100), "malformed", "chunks; it claims 1"),
    # What is inside
    ("NaN", message(reply({**TENSORS, "a": torch.tensor([1.0, float("nan"), 0.0])})), "malformed", "NaN or infinity"),
    ("infinity", message(reply({**TENSORS, "a": torch.tensor([1.0, float("-inf"), 0.0])})), "malformed", "NaN or infinity"),
    ("out of bounds", message(reply({**TENSORS, "b": torch.full((2, 2), 101, dtype=torch.int8)})), "malformed", "reaches 101"),
    ("another shape", message(reply({**TENSORS, "a": torch.zeros(4)})), "malformed", "shape|3"),
    ("another type", message(reply({**TENSORS, "a": torch.zeros(3, dtype=torch.float64)})), "malformed", "float64|F64|type"),
    ("another name", message(reply({"a": TENSORS["a"], "c": TENSORS["b"]})), "malformed", "c"),
    ("a tensor less", message(reply({"a": TENSORS["a"]})), "malformed", "b"),
    ("a tensor more", message(reply({**TENSORS, "../../x": torch.zeros(1)})), "malformed", "x"),
    ("tensors that overlap", message(safetensors({"a": INDEX, "b": INDEX}, bytes(12))), "malformed", "begins at byte 0 where 12"),
    ("tensors with a gap", message(safetensors({"a": {**INDEX, "data_offsets": [4, 16]}}, bytes(16))), "malformed", "begins at byte 4"),
    ("more values than bytes", message(safetensors({"a": {**INDEX, "shape": [2**40]}}, bytes(12))), "malformed", "claims bytes"),
    ("too many tensors", message(safetensors({f"x{i}": {**INDEX, "shape": [0], "data_offsets": [0, 0]} for i in range(9)})), "malformed", "at most 8"),
    ("a pickle inside", message(pickle.dumps(Evil())), "malformed", "header of|too short|version"),
    ("a torch file inside", message(torch_zip()), "malformed", "header of"),
    ("a bomb inside", message(BOMB), "malformed", "header of"),
    ("nothing inside", message(b""), "malformed", "too short"),
    ("an inner version of another time", message(reply().replace(b'"v":2', b'"v":9')), "malformed", "version 9"),
]  # fmt: skip


def test_there_are_enough_cases_and_each_is_another() -> None:
    assert len(CASES) >= 60 and len({name for name, *_ in CASES}) == len({data for _, data, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize(("data", "why", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_message_is_refused_and_counted(data: bytes, why: str, words: str, in_pieces: bool) -> None:
    coordinator = Coordinator(in_pieces=in_pieces)
    with pytest.raises(MessageError, match=words) as refused:
        coordinator.accept(data)
    assert reason(refused.value) == why
    assert coordinator.window.counts[why] >= 1 and coordinator.window.size == 0
    # A bad message does no harm to the good one that follows.
    assert coordinator.accept(GOOD).client == "alice"


def test_the_good_message_is_accepted_once() -> None:
    coordinator = Coordinator()
    assert torch.equal(coordinator.accept(GOOD).tensors["a"], TENSORS["a"])
    for data, why in ((GOOD, "replay"), (message(), "duplicate")):
        with pytest.raises(Refused) as refused:
            coordinator.accept(data)
        assert refused.value.why == why


def test_a_replay_after_a_restart_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "window.jsonl"
    Coordinator(path).accept(GOOD)
    with pytest.raises(Refused) as refused:
        Coordinator(path).accept(GOOD)
    assert refused.value.why == "replay"


def test_a_member_that_was_revoked_is_not_heard() -> None:
    coordinator = Coordinator()
    del coordinator.senders["alice"]
    with pytest.raises(Refused, match="alice is not a member, or is not one any more"):
        coordinator.accept(GOOD)


def test_a_flood_is_refused() -> None:
    coordinator = Coordinator(most=1)
    coordinator.accept(GOOD)
    with pytest.raises(Refused, match="alice sent more than 1"):
        coordinator.accept(message(sequence=8))


# --- lists of chunks that lie ---------------------------------------------------------------------------------------------

LONG = {"chunk": 50}


def listed(
    change: Callable[[dict[str, Any]], object] | None, digests: Callable[[list[bytes]], list[bytes]], coordinator: Coordinator
) -> bytes:
    """A message of several chunks whose list a member has changed and signed."""
    data = send(sealed(**LONG), coordinator.store)
    head = wire._split(data)
    fields = json.loads(bytes(head.header))
    if change is not None:
        change(fields)
    text = json.dumps(fields).encode()
    parts = digests([bytes(head.digests[i : i + 32]) for i in range(0, len(head.digests), 32)])
    signed = wire._PREFIX.pack(b"fdfm", 1, 1, len(text), len(parts), b"0.1.0") + text + head.wrapped + b"".join(parts)
    return signed + ALICE.signer.sign(wire._signed(signed))


LISTS: list[tuple[str, Callable[[dict[str, Any]], object] | None, Callable[[list[bytes]], list[bytes]], str, str]] = [
    ("one chunk twice", None, lambda parts: [parts[0], parts[0], *parts[2:]], "chunk", "Chunk 1 .* not the one that was signed"),
    ("two chunks exchanged", None, lambda parts: [parts[1], parts[0], *parts[2:]], "chunk", "Chunk 0 .* not the one"),
    ("the last left out", lambda head: head.update(size=50 * (head["size"] // 50)), lambda parts: parts[:-1], "chunk", "does not open"),
    ("one more than there are", lambda head: head.update(size=head["size"] + 50), lambda parts: [*parts, bytes(32)], "chunk", "Chunk"),
    ("one digest more", None, lambda parts: [*parts, bytes(32)], "malformed", "chunks; it claims"),
    ("one digest less", None, lambda parts: parts[:-1], "malformed", "chunks; it claims"),
    ("a larger size", lambda head: head.update(size=head["size"] + 1), lambda parts: parts, "chunk", "has .* bytes instead of"),
    ("a smaller size", lambda head: head.update(size=head["size"] - 1), lambda parts: parts, "chunk", "has .* bytes instead of"),
    ("another size of chunks", lambda head: head.update(chunk=49), lambda parts: parts, "chunk", "Chunk 0 .* bytes instead of"),
    ("the id of another transfer", lambda head: head.update(id="0" * 32), lambda parts: parts, "chunk", "Chunk 0 .* is missing"),
]  # fmt: skip


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize(("change", "digests", "why", "words"), [case[1:] for case in LISTS], ids=[case[0] for case in LISTS])
def test_a_list_of_chunks_that_lies_is_refused(change, digests, why: str, words: str, in_pieces: bool) -> None:
    coordinator = Coordinator(in_pieces=in_pieces)
    assert sealed(**LONG).num_chunks > 3
    data = listed(change, digests, coordinator)
    with pytest.raises(Refused, match=words) as refused:
        coordinator.accept(data)
    assert refused.value.why == why


def test_a_request_is_no_reply() -> None:
    """Kinds are signed, so a message cannot be taken for one of another kind; what is inside says its own kind as well."""
    inside = unpack(Coordinator().opener.open(message(pack(Request.of("train", 3))))[1])
    assert isinstance(inside, Request)


# --- two hundred thousand mutations ---------------------------------------------------------------------------------------

SHORT = message(b"0123456789" * 3)
BYTES = b'0123456789{}[]",:.-eE\\truefalsn'
VALUES: list[Any] = [None, True, -1, 0, 1, 2**53, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "alice", "c", "\ud800", "\0", "../x", [], {}, ["c0"],
                     [["c0"]], {"a": 1}, "0" * 32, "f" * 64, ["c0"] * 300, "x" * 5000, [1] * 500]  # fmt: skip


def mutated(draw: random.Random, data: bytes, most: int) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(min(len(changed), most) + 1)
        match draw.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                changed[at : at + 1] = bytes([draw.choice(BYTES)])
            case 2:
                del changed[at : at + draw.randrange(1, 9)]
            case 3:
                changed[at:at] = draw.randbytes(draw.randrange(1, 5))
            case 4:
                del changed[at:]
            case 5:
                other = draw.randrange(len(changed) + 1)
                changed[at : at + 8] = changed[other : other + 8]
    return bytes(changed)


def survives(coordinator: Coordinator, data: bytes) -> bool:
    """Whether the payload is handed over; any error but a typed one fails the test."""
    try:
        envelope = coordinator.opener.read(data)
        coordinator.window.check(envelope.header)
        receive_all(envelope, coordinator.store)
    except MessageError:
        return False
    return True


def growth(work: Callable[[], None]) -> int:
    process = psutil.Process()
    before = process.memory_info().rss
    work()
    return process.memory_info().rss - before


@pytest.mark.parametrize("seed", range(4))
def test_mutated_bytes_are_refused_in_little_memory(seed: int) -> None:
    """35,000 each: most in the prefix and the header, where the decoder decides; the rest anywhere."""
    draw, coordinator = random.Random(seed), Coordinator()
    assert survives(coordinator, SHORT)
    accepted = 0

    def work() -> None:
        nonlocal accepted
        for i in range(35_000):
            data = mutated(draw, SHORT, AT_WRAP if i % 4 else len(SHORT))
            accepted += data != SHORT and survives(coordinator, data)

    assert growth(work) < 50_000_000
    assert accepted == 0


@pytest.mark.parametrize("seed", range(2))
def test_random_bytes_are_refused(seed: int) -> None:
    draw, coordinator = random.Random(seed), Coordinator()
    for _ in range(10_000):
        tail = draw.randbytes(draw.randrange(200))
        sizes = struct.pack("<HII", draw.choice([0, 1, 2, 65535]), draw.choice([0, 10, 2**31, len(tail)]), draw.choice([0, 1, 2**31]))
        assert not survives(coordinator, draw.choice([b"", b"fdfm", b"fdfm\x01\0", b"fdfm\x01\0" + sizes + bytes(16)]) + tail)


def test_fields_that_a_member_has_signed_are_refused_or_read() -> None:
    """10,000 headers of any kind under a good signature, so that what follows the signature is reached as well."""
    draw, coordinator = random.Random(0), Coordinator()

    def change(head: dict[str, Any]) -> None:
        for _ in range(draw.choice([1, 1, 2, 3])):
            name = draw.choice(sorted(head))
            match draw.randrange(4):
                case 0 | 1:
                    head[name] = draw.choice(VALUES)
                case 2:
                    head[draw.choice(["x", "size ", "\ud800"])] = head.pop(name)
                case 3:
                    head[name] = head[draw.choice(sorted(head))]

    def work() -> None:
        for _ in range(10_000):
            survives(coordinator, rebuilt(change, SHORT))

    assert growth(work) < 50_000_000


def test_cards_of_any_kind_are_refused_or_read() -> None:
    draw = random.Random(0)
    for _ in range(10_000):
        card: Any = ALICE.card.to_json()
        for _ in range(draw.choice([1, 2])):
            name = draw.choice(sorted(card))
            card[name] = draw.choice([*VALUES, card[name][:-4] if isinstance(card[name], str) else 0])
        try:
            Card.from_json(card)
        except MessageError:
            continue


def test_chunks_of_any_kind_are_refused() -> None:
    draw, coordinator = random.Random(0), Coordinator()
    sending = sealed(**LONG)
    envelope = coordinator.opener.read(send(sending, coordinator.store))
    chunks = [sending.chunk(i) for i in range(sending.num_chunks)]
    for _ in range(20_000):
        i = draw.randrange(len(chunks))
        data = mutated(draw, draw.choice(chunks), 200)
        try:
            piece = envelope.decrypt(i, data)
        except Refused:
            continue
        assert data == chunks[i] and len(piece) <= 50

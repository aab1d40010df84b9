"""What crosses a boundary: packing is exact and measured exactly, and no bytes whatever break the receiver."""

from __future__ import annotations

import json
import math
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedfm.core.errors import MessageError
from fedfm.core.messages import MAX_HEADER, MAX_TENSORS, Body, Failure, Message, Reply, Request, pack, size, unpack
from fedfm.testing.mutations import ODD, changed
from fedfm.testing.parts import same

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = TEXT.filter(lambda name: name != "__metadata__")
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 9),
)
TREES = st.dictionaries(NAMES, TENSORS, max_size=6)
META = st.dictionaries(TEXT, st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT), max_size=4)
ROUNDS = st.integers(0, 10**9)
MESSAGES = st.one_of(
    st.builds(lambda body, own, own_tensors: Request(body, own, own_tensors), st.builds(Body, TEXT, ROUNDS, TREES, META), META, TREES),
    st.builds(Reply, TEXT, TEXT, ROUNDS, TREES, META),
    st.builds(Failure, TEXT, TEXT, TEXT),
)


def equal(x: Message, y: Message) -> bool:
    if isinstance(x, Failure) or isinstance(y, Failure):
        return x == y
    if isinstance(x, Request) and isinstance(y, Request):
        return dict(x.own) == dict(y.own) and same(x.own_tensors, y.own_tensors) and x.body.digest == y.body.digest
    return (
        type(x) is type(y)
        and same(x.tensors, y.tensors)
        and (x.verb, x.round, dict(x.meta)) == (y.verb, y.round, dict(y.meta))
        and getattr(x, "client", "") == getattr(y, "client", "")
    )


@given(MESSAGES)
def test_what_is_packed_arrives_in_its_order_and_has_the_size_that_was_told(message: Message) -> None:
    data = pack(message)
    assert len(data) == size(message)
    assert equal(unpack(data), message)
    assert equal(unpack(memoryview(bytearray(data))), message)


@given(TREES)
def test_the_tensors_are_a_safetensors_file(tensors) -> None:
    data = pack(Request.of("train", 1, tensors))
    (n,) = struct.unpack("<I", data[:4])
    loaded = load(data[4 + n :])
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], leaf) for name, leaf in tensors.items())


def test_views_of_one_memory_and_transposes_are_packed_by_value() -> None:
    x = torch.arange(6.0).view(2, 3)
    arrived = unpack(pack(Request.of("train", 1, {"x": x, "again": x, "t": x.T, "row": x[1], "none": x[:0]})))
    assert isinstance(arrived, Request)
    assert torch.equal(arrived.tensors["t"], x.T) and torch.equal(arrived.tensors["again"], x) and arrived.tensors["none"].shape == (0, 3)
    assert unpack(pack(Reply("a", "train", 1, {}, {"loss": math.nan}))).meta["loss"] != 0  # type: ignore[union-attr]


SAMPLE = Reply(
    "hôpital",
    "train",
    3,
    {"a": torch.randn(3), "b": torch.zeros(2, 2, dtype=torch.int8), "c": torch.ones((), dtype=torch.float64), "d": torch.zeros(0, 3)},
    {"loss": 1.5, "note": "x", "none": None, "n": 3},
)


def survives(data: bytes) -> None:
    """Either a message that can be packed again, or a MessageError."""
    try:
        message = unpack(data)
    except MessageError:
        return
    assert len(pack(message)) == size(message)


def test_mutated_bytes_are_refused_or_read() -> None:
    draw, good = random.Random(0), pack(SAMPLE)
    for _ in range(5000):
        survives(changed(good, draw))


@given(st.data())
@settings(max_examples=400)
def test_mutated_fields_are_refused_or_read(data) -> None:
    packed = pack(SAMPLE)
    (n,) = struct.unpack("<I", packed[:4])
    (m,) = struct.unpack("<Q", packed[4 + n : 12 + n])
    head, index, body = json.loads(packed[4 : 4 + n]), json.loads(packed[12 + n : 12 + n + m]), packed[12 + n + m :]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([head, head.get("meta"), index, *index.values()]).filter(lambda x: isinstance(x, dict) and x))
        name = data.draw(st.sampled_from(sorted(place)))
        value = data.draw(st.sampled_from(ODD))
        match data.draw(st.sampled_from(["set", "drop", "add"])):
            case "set":
                place[name] = value
            case "drop":
                del place[name]
            case "add":
                place[data.draw(st.sampled_from(["x", "__metadata__", "\ud800"]))] = value
        if not index or not all(isinstance(x, dict) for x in index.values()):
            break
    raw_head, raw_index = json.dumps(head).encode(), json.dumps(index).encode()
    length = data.draw(st.sampled_from([len(raw_index), len(raw_index), 0, 2**63, len(raw_index) - 1]))
    survives(struct.pack("<I", len(raw_head)) + raw_head + struct.pack("<Q", length) + raw_index + body)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        unpack(data)


def crafted(head: object, tensors: bytes | None = None) -> bytes:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<I", len(raw)) + raw + (save({}) if tensors is None else tensors)


TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def index(**entries: object) -> bytes:
    """The head of a safetensors file that claims these tensors."""
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head


REPLY = {"v": 2, "kind": "reply", "verb": "train", "round": 1, "client": "a", "meta": {}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x01", "too short"),
        (struct.pack("<I", MAX_HEADER + 1) + bytes(MAX_HEADER + 1), "header of"),
        (struct.pack("<I", 100) + b"{}", "header of 100"),
        (crafted(b"[" * 100_000), "not JSON"),
        (crafted(b"9" * 5000), "not JSON"),
        (crafted(b"\xff\xfe{"), "not JSON"),
        (crafted({**REPLY, "client": "\ud800"}), "not JSON"),
        (crafted({**REPLY, "v": 1}), "version 1"),
        (crafted([]), "version None"),
        (crafted({**REPLY, "kind": "pickle"}), "kind 'pickle'"),
        (crafted({**REPLY, "round": -1}), "round is -1"),
        (crafted({**REPLY, "round": True}), "round is True"),
        (crafted({**REPLY, "client": 7}), "client is 7"),
        (crafted({**REPLY, "meta": {"a": [1]}}), "meta"),
        (crafted(REPLY, b""), "safetensors"),
        (crafted(REPLY, save({"a": torch.zeros(2)})[:-1]), "claim 8 bytes and have 7"),
        (crafted(REPLY, save({"a": torch.zeros(2)}) + b"x"), "claim 8 bytes and have 9"),
        (crafted(REPLY, save({"a": torch.zeros(2, dtype=torch.complex64)})), "C64"),
        (crafted(REPLY, index(a={"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]})), "claims the shape"),
        (crafted(REPLY, index(a={"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]}) + bytes(4)), "claims the shape"),
        (crafted(REPLY, index(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]})), "claims the shape"),
        (crafted(REPLY, index(a={"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}) + bytes(4)), "claims the shape"),
        (crafted(REPLY, index(a={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}) + bytes(12)), "begins at byte 4"),
        (crafted(REPLY, index(a=TWO, b=TWO) + bytes(8)), "begins at byte 0 where 8 is next"),
        (crafted(REPLY, index(a={"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}) + b"\x07"), "booleans"),
        (crafted(REPLY, index(**{f"x{i}": NOTHING for i in range(MAX_TENSORS + 1)})), "at most 100000 are allowed"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_refusals(data: bytes, words: str) -> None:
    with pytest.raises(MessageError, match=words.replace("[", r"\[")):
        unpack(data)


def test_a_size_that_was_allowed_is_a_limit() -> None:
    data = pack(SAMPLE)
    assert equal(unpack(data, max_bytes=len(data)), SAMPLE)
    with pytest.raises(MessageError, match=f"at most {len(data) - 1}"):
        unpack(data, max_bytes=len(data) - 1)


def test_what_the_receiver_would_refuse_is_not_sent() -> None:
    with pytest.raises(MessageError, match="complex64"):
        pack(Request.of("train", 1, {"x": torch.zeros(1, dtype=torch.complex64)}))
    with pytest.raises(MessageError, match="as a tensor"):
        pack(Reply("a", "describe", 0, {}, {"x" * MAX_HEADER: 1}))


def test_a_column_of_a_matrix_crosses_as_what_it_says() -> None:
    matrix = torch.arange(16.0).view(4, 4)
    for leaf in (matrix[:, 1:2], matrix[:, 1], matrix[1:2, 1:2], matrix[:1, 2], matrix[3, ::16], matrix.T, matrix[:0, :1], matrix[1, 1]):
        arrived = unpack(pack(Request.of("train", 1, {"x": leaf})))
        assert isinstance(arrived, Request) and torch.equal(arrived.tensors["x"], leaf) and arrived.tensors["x"].shape == leaf.shape

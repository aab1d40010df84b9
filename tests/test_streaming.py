"""An answer that is read in pieces is the answer: the same values, the same sum, the same refusals, and little memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")

from fedfm.channels import Plain
from fedfm.core import tree
from fedfm.core.errors import MessageError, RunError
from fedfm.core.leaves import Leaf, deltas, number
from fedfm.core.messages import Body, Failure, Reply, pack, pack_views, size, unpack, unpack_from
from fedfm.core.parts import Errand, Transform, Update
from fedfm.core.session import Answer
from fedfm.core.sums import Partial
from fedfm.core.tree import PIECE, LazyTree, Spec, Tree
from fedfm.testing.parts import context, like, parameters, same
from fedfm.testing.sessions import Scripted
from fedfm.transforms import CastBF16, ClipByNorm, Int8, TopK
from fedfm.wire.envelope import Envelope, Header, Opener, seal
from fedfm.wire.identity import Identity
from fedfm.wire.refusal import Refused
from fedfm.wire.transfer import Memory, Spool, send

ALICE, BOB = Identity.create("alice"), Identity.create("bob")
NOW = 1_800_000_000.0
HEADER = Header("c", "run-1", 3, 7, "reply", NOW, NOW + 60)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
TREES = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 9)), min_size=0, max_size=6)


class Held:
    """Bytes that are read in pieces, and the longest reading."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size, self.longest = data, len(data), 0

    def read(self, start: int, stop: int) -> bytes:
        self.longest = max(self.longest, stop - start)
        return self.data[start:stop]


def made(rows) -> dict[str, torch.Tensor]:
    return {
        f"leaf {i}": torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for i, (dtype, shape, seed) in enumerate(rows)
    }


def travelled(payload: bytes, chunk: int) -> tuple[Envelope, Memory]:
    """What the receiver has of a payload in chunks of some bytes."""
    store = Memory()
    head = send(seal(payload, ALICE, [BOB.card], replace(HEADER, chunk=chunk)), store)
    return Opener(BOB, {"alice": ALICE.card}, "c", now=lambda: NOW).read(head), store


def spooled(reply: Reply, chunk: int = 100) -> Reply:
    """The reply as the engine hands it over."""
    envelope, store = travelled(pack(reply), chunk)
    arrived = unpack_from(Spool(envelope, store))
    assert isinstance(arrived, Reply) and isinstance(arrived.tensors, LazyTree)
    return arrived


@given(TREES)
@settings(max_examples=60)
def test_a_tree_that_is_read_in_pieces_is_the_tree(rows) -> None:
    values = made(rows)
    whole = Reply("a", "train", 3, values, {"weight": 2.0})
    data = pack(whole)
    assert b"".join(pack_views(whole)) == data
    lazy = unpack_from(Held(data))
    assert isinstance(lazy, Reply) and (lazy.client, lazy.meta) == ("a", {"weight": 2.0})
    assert tree.equal(lazy.tensors, values) and list(lazy.tensors) == list(values) and Spec.of(lazy.tensors) == Spec.of(values)
    assert size(lazy) == len(data) and tree.num_bytes(lazy.tensors) == tree.num_bytes(values)
    assert tree.norm(lazy.tensors) == tree.norm(values)
    for name in values:
        assert tree.ends(lazy.tensors, name) == tree.ends(values, name)


def test_sizes_are_known_without_reading_and_a_reading_is_a_piece() -> None:
    values = {"w": torch.randn(3 * PIECE + 1), "n": torch.tensor([float("nan"), 1.0]), "none": torch.zeros(0, 3)}
    source = Held(pack(Reply("a", "train", 3, values)))
    arrived = unpack_from(source)
    assert isinstance(arrived, Reply)
    size(arrived), Spec.of(arrived.tensors).require_shapes(arrived.tensors, "it")
    assert source.longest < 1000
    assert arrived.tensors["none"].shape == (0, 3) and torch.equal(arrived.tensors["w"], values["w"])
    assert source.longest == 4 * PIECE
    assert [piece.numel() for piece in tree.pieces(arrived.tensors, "w")] == [PIECE, PIECE, PIECE, 1]
    assert tree.first_not_finite(arrived.tensors) == "n" and all(end != end for end in tree.ends(arrived.tensors, "n"))


@given(st.integers(0, 10**6), st.integers(0, 400), st.integers(1, 255))
@settings(max_examples=150)
def test_what_is_refused_as_a_whole_is_refused_in_pieces(seed: int, place: int, flip: int) -> None:
    """A changed byte is a message error both ways, or changes both messages alike."""
    data = bytearray(pack(Reply("a", "train", 3, made([(torch.float32, [3], seed), (torch.bool, [4], seed)]), {"weight": 2.0})))
    data[place % len(data)] ^= flip

    def outcome(lazy: bool) -> object:
        try:
            message = unpack_from(Held(bytes(data))) if lazy else unpack(bytes(data))
            tensors = getattr(message, "tensors", {})
            return type(message), {name: (leaf.dtype, leaf.shape, tree.raw(leaf).tobytes()) for name, leaf in tensors.items()}
        except MessageError as error:
            return str(error)

    assert outcome(lazy=True) == outcome(lazy=False)


@given(st.binary(min_size=0, max_size=2000), st.integers(1, 700), st.integers(0, 2000), st.integers(0, 2000))
@settings(max_examples=60)
def test_a_spool_gives_back_any_stretch_whatever_the_chunks(payload: bytes, chunk: int, x: int, y: int) -> None:
    envelope, store = travelled(payload, chunk)
    spool = Spool(envelope, store)
    store.drop(envelope.header.id)
    start, stop = sorted(min(end, len(payload)) for end in (x, y))
    assert spool.read(start, stop) == payload[start:stop] and spool.read(0, len(payload)) == payload and spool.size == len(payload)


def test_a_spool_has_no_name_and_its_content_is_sealed(tmp_path: Path) -> None:
    payload = b"a secret of the owner " * 50
    envelope, store = travelled(payload, 100)
    spool = Spool(envelope, store, tmp_path)
    assert not list(tmp_path.iterdir())
    spool._file.seek(0)
    kept = spool._file.read()
    assert len(kept) == len(payload) + 11 * 16 and b"secret" not in kept
    # Somebody else writes to the disk: what comes back is refused, and is this machine's failure, not the client's.
    spool._file.seek(250)
    spool._file.write(bytes([kept[250] ^ 1]))
    with pytest.raises(RunError, match=r"alice .* cannot be kept in .* does not open"):
        spool.read(0, len(payload))
    with pytest.raises(RunError, match="cannot be kept in"):
        Spool(envelope, store, tmp_path / "gone")


@pytest.mark.parametrize("index", [0, 3, 10])
@pytest.mark.parametrize("change", ["flipped", "missing", "short", "exchanged"])
def test_a_chunk_that_is_not_the_signed_one_is_refused_before_anything_is_read(index: int, change: str) -> None:
    envelope, store = travelled(bytes(1100), 100)
    key = (envelope.header.id, index)
    data = store.chunks[key]
    if change == "missing":
        del store.chunks[key]
    else:
        other = store.chunks[envelope.header.id, (index + 1) % 11]
        store.chunks[key] = {"flipped": data[:50] + bytes([data[50] ^ 1]) + data[51:], "short": data[:-1], "exchanged": other}[change]
    with pytest.raises(Refused) as refused:
        Spool(envelope, store)
    assert refused.value.why == "chunk"


# --- a round ------------------------------------------------------------------------------------------------------------------

PARAMS = {**parameters(), "large": torch.zeros(PIECE + 3)}
LEAVES = (
    *deltas(Spec.of(PARAMS)),
    Leaf("count", (4,), group="told", reduce="sum"),
    number("weight"),
    number("loss", "mean", signed=True),
)


def errand(*transforms: Transform) -> Errand:
    return Errand(Body("train", 3, PARAMS), LEAVES, PARAMS, transforms=transforms, sums=True)


def replies(*transforms: Transform) -> list[Reply]:
    answers = []
    for i in range(3):
        payload = {**like(PARAMS, f"client {i}"), "count": torch.arange(4.0) * i}
        update = Update(payload, 2.0 + i, client=f"client-{i}")
        for transform in transforms:
            update, _ = transform.encode(update, {}, context(PARAMS, 3, client=f"client-{i}"))
        answers.append(Reply(f"client-{i}", "train", 3, update.payload, {"weight": 2.0 + i, "loss": 0.5}))
    return answers


def collected(answers: Iterable[Answer], *transforms: Transform) -> tuple[Partial, list[Failure]]:
    clients = [f"client-{i}" for i in range(3)]
    outcomes = list(Plain().collect(Scripted(lambda _: answers), errand(*transforms), clients, None, context(PARAMS, 3)))
    (total,) = (outcome for outcome in outcomes if isinstance(outcome, Partial))
    return total, [outcome for outcome in outcomes if isinstance(outcome, Failure)]


@pytest.mark.parametrize("chunk", [999, 65_536, 1_000_003])
@pytest.mark.parametrize(
    "transforms", [(), (ClipByNorm(0.5),), (CastBF16(),), (Int8(),), (TopK(fraction=0.5, error_feedback=False),)], ids=repr
)
def test_a_sum_of_pieces_is_the_sum_to_the_bit(transforms: tuple[Transform, ...], chunk: int) -> None:
    answers = replies(*transforms)
    whole, failures = collected(answers, *transforms)
    lazy, others = collected([spooled(answer, chunk) for answer in reversed(answers)], *transforms)
    assert not failures and not others
    assert same(lazy.totals(), whole.totals()) and same(lazy.mean(), whole.mean()) and lazy.by_client == whole.by_client


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**31, -(2.0**29)], ids=repr)
def test_one_bad_value_at_the_end_is_its_clients_failure_and_the_sum_is_as_before(value: float) -> None:
    """An update is judged when all of its pieces were seen, and before one of them counts."""
    first, second, third = replies()
    large = third.tensors["large"].clone()
    large[-1] = value
    bad = replace(third, tensors={**third.tensors, "large": large})
    total, (failure,) = collected([spooled(answer) for answer in (first, bad, second)])
    expected, _ = collected([first, second, Failure("client-2", "train", "x")])
    assert failure.client == "client-2" and failure.stage == "decode"
    assert same(total.totals(), expected.totals()) and total.clients == ["client-0", "client-1"]


def test_an_update_whose_decoding_is_the_identity_is_never_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [spooled(answer) for answer in replies(ClipByNorm(0.5))]

    def refuse(self: LazyTree, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was put together")

    monkeypatch.setattr(LazyTree, "__getitem__", refuse)
    total, failures = collected(answers, ClipByNorm(0.5))
    assert total.num_clients == 3 and not failures


def test_a_disk_that_fails_ends_the_run_and_is_no_clients_failure() -> None:
    first, *others = [spooled(answer) for answer in replies()]
    spool = first.tensors._source  # type: ignore[attr-defined]
    spool._file.seek(spool.size // 2)
    spool._file.write(b"what somebody else wrote")
    with pytest.raises(RunError, match="resume the run"):
        collected([first, *others])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process's memory can be reset on Linux alone")
def test_memory_grows_by_the_sum_alone(tmp_path: Path) -> None:
    """An update of 64 MB is added to its sum within 12 MB, and its mean takes the place of the sum."""
    leaves = tuple(Leaf(f"layer {i}", (1 << 21,)) for i in range(8))
    update: Tree = {leaf.name: torch.randn(leaf.shape).mul_(1e-3) for leaf in leaves}
    first = update["layer 0"][:5].double()
    arrived = spooled(Reply("a", "train", 3, update), 512_000)
    del update
    total = Partial(leaves)

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def growth() -> int:
        grown = status("VmHWM") - before
        Path("/proc/self/clear_refs").write_text("5")
        return grown

    before = status("VmRSS")
    growth()
    total.add("a", arrived.tensors, {}, 7.0)
    assert growth() < 12e6 and [part.total.limbs for part in total._parts] == [1] * 8
    mean = total.take_mean()
    assert growth() < 30e6
    assert torch.allclose(mean["layer 0"][:5].double(), first, rtol=1e-6, atol=1e-12)

"""What a channel with several exchanges keeps and needs, what an owner has spent, and rounds that no server counts to."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from parts import HELLO, Masks

from fedfm.client.house import House
from fedfm.client.memory import home
from fedfm.client.policy import KINDS, Policy
from fedfm.client.runtime import Runtime
from fedfm.client.spent import SpentStore
from fedfm.core import registry
from fedfm.core.errors import ConfigError, DataError, MessageError, RunError
from fedfm.core.messages import Failure, Reply, Request, unpack
from fedfm.engines import Process
from fedfm.federation import Federation
from fedfm.simulation import Simulation
from fedfm.testing import tiny
from fedfm.verbs import Describe


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three owners whose channel has two exchanges and shows sums alone."""
    folder = tmp_path_factory.mktemp("boundary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(folder / "cache"))
        yield tiny.federation(folder, channel=Masks())


# --- channels with several exchanges ------------------------------------------------------------------------------------------------


def test_what_a_channel_keeps_goes_when_another_round_begins_for_anybody(masked: Federation) -> None:
    runtime = Runtime(Simulation.build(masked).house)

    def hello(round: int, clients: str) -> None:
        (*answers,) = runtime.handle({client: Request.of(HELLO, round) for client in clients})
        assert all(isinstance(answer, Reply) for answer in answers)

    hello(1, "abc")
    assert set(runtime.scratch) == {"a", "b", "c"}
    hello(1, "a")
    assert set(runtime.scratch) == {"a", "b", "c"}
    hello(2, "b")
    assert set(runtime.scratch) == {"b"}, "the secrets of a round that is over are still held"


def test_an_owner_that_withholds_counts_under_sums_is_named_with_the_reason(masked: Federation) -> None:
    simulation = Simulation.build(masked, policies={"b": Policy.open(may_leave=tuple(set(KINDS) - {"counts"}))})
    house: House = simulation.house
    with (
        simulation.open() as session,
        pytest.raises(DataError, match=r"b does not say .*rule 'may_leave'.*tells its counts .Masks shows sums alone"),
    ):
        Describe().roster(masked.channel, session, house.clients, house.labels, house.key)


def test_processes_that_would_be_ended_between_two_exchanges_are_refused(masked: Federation) -> None:
    few = Simulation.build(replace(masked, engine=Process(device="cpu", max_processes=2)))
    with pytest.raises(ConfigError, match=r"2 processes.*3 owners.*Masks"):
        few.open()
    Simulation.build(replace(masked, engine=Process(device="cpu", max_processes=3))).open().close()


# --- what is spent ------------------------------------------------------------------------------------------------------------------


def test_no_flipped_bit_takes_the_last_expense_back(tmp_path: Path) -> None:
    store = SpentStore(tmp_path)
    for amount in (1.0, 0.5):
        store.of("a").add("epsilon", amount)
    path = home(tmp_path, "a") / "spent.jsonl"
    whole = path.read_bytes()
    for bit in range(8):
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1 << bit]))
        with pytest.raises(RunError, match="line 2"):
            store.entries("a")


def test_an_expense_that_lacks_its_newline_alone_is_spent(tmp_path: Path) -> None:
    store = SpentStore(tmp_path)
    store.of("a").add("epsilon", 1.0)
    path = home(tmp_path, "a") / "spent.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.of("a").total("epsilon") == 1.0
    store.of("a").add("epsilon", 2.0)
    assert SpentStore(tmp_path).entries("a") == [("epsilon", 1.0), ("epsilon", 2.0)]


# --- many tensors -------------------------------------------------------------------------------------------------------------------


def test_too_many_tensors_are_counted_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    index = json.dumps({f"t{i}": empty for i in range(1000)}).encode()
    head = json.dumps({"v": 2, "kind": "reply", "verb": "train", "round": 1, "client": "a", "meta": {}}).encode()
    data = struct.pack("<I", len(head)) + head + struct.pack("<Q", len(index)) + index
    assert len(getattr(unpack(data), "tensors")) == 1000  # noqa: B009
    read, loads = list[int](), json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(len(text)) or loads(text))
    with pytest.raises(MessageError, match="1000 tensors where at most 900"):
        unpack(data, max_tensors=900)
    assert sum(read) == len(head), "the index was read before it was refused"


# --- lying servers ------------------------------------------------------------------------------------------------------------------


def test_a_round_that_no_server_counts_to_is_refused(masked: Federation) -> None:
    runtime = Runtime(Simulation.build(masked).house)
    for verb in ("train", "evaluate", HELLO):
        (answer,) = runtime.handle({"a": Request.of(verb, 10**12)})
        assert isinstance(answer, Failure) and "round 1000000000000" in answer.reason


@pytest.fixture(scope="module", autouse=True)
def index() -> Iterator[None]:
    """The index of parts is read once in a process; other tests add to it."""
    yield
    registry.entries.cache_clear()

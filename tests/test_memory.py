"""What a client remembers, and what a crash may not take from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfm.client.memory import Memory, home
from fedfm.core import disk
from fedfm.core.errors import RunError
from fedfm.core.tree import equal


def tree(value: float) -> dict[str, torch.Tensor]:
    return {
        "transforms.0/error": torch.full((3, 2), value),
        "local/c": torch.tensor(value, dtype=torch.bfloat16),
        "step": torch.tensor([int(value)], dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 4),
    }


@pytest.fixture(params=["disk", "process"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Memory:
    return Memory(tmp_path if request.param == "disk" else None)


def test_a_client_goes_on_from_what_was_counted(memory: Memory) -> None:
    assert memory.load("a", None) == {}
    assert memory.save("a", 2, None, tree(2)) == 2
    assert memory.save("a", 7, 2, tree(7)) == 7
    assert equal(memory.load("a", 7), tree(7))
    # The server crashed after the client had written ticket 7, and asks again from ticket 2.
    assert equal(memory.load("a", 2), tree(2))
    assert memory.save("a", 7, 2, tree(7)) == 7
    assert equal(memory.load("a", 7), tree(7))


def test_an_answer_that_was_lost_leaves_no_trace(memory: Memory) -> None:
    memory.save("a", 1, None, tree(1))
    # Rounds 2 and 3 were late or refused: the server still counts ticket 1.
    for ticket in (2, 3):
        assert equal(memory.load("a", 1), tree(1))
        memory.save("a", ticket, 1, tree(ticket))
    assert equal(memory.load("a", 1), tree(1)) and equal(memory.load("a", 3), tree(3))
    # A first answer that was never counted is no memory at all.
    memory.save("b", 1, None, tree(1))
    assert memory.load("b", None) == {}
    assert memory.save("b", 2, None, {}) is None


def test_a_client_that_never_remembered_has_no_ticket(memory: Memory, tmp_path: Path) -> None:
    assert memory.save("a", 1, None, {}) is None
    assert list(tmp_path.iterdir()) == []
    assert memory.save("a", 2, None, tree(2)) == 2
    # Nothing more to remember is something to remember.
    assert memory.save("a", 3, 2, {}) == 3 and memory.load("a", 3) == {} and equal(memory.load("a", 2), tree(2))


def test_what_was_counted_twice_last_and_the_newest_are_kept(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    for ticket in range(1, 6):
        memory.save("a", ticket, ticket - 1 or None, tree(ticket))
    assert sorted(path.name for path in home(tmp_path, "a").iterdir()) == [
        "memory-000003.safetensors",
        "memory-000004.safetensors",
        "memory-000005.safetensors",
    ]


def test_a_memory_that_is_gone_is_refused_and_not_taken_for_none(memory: Memory) -> None:
    with pytest.raises(RunError, match=r"'a' no longer has what it remembered with ticket 3, .* nothing else"):
        memory.load("a", 3)
    for ticket in range(1, 6):
        memory.save("a", ticket, ticket - 1 or None, tree(ticket))
    with pytest.raises(RunError, match=r"'a' no longer has what it remembered with ticket 2, .*\[3, 4, 5\]"):
        memory.load("a", 2)


def test_memories_share_no_storage(memory: Memory) -> None:
    bank = torch.zeros(4, 2)
    memory.save("a", 1, None, {"c": bank[1]})
    bank.fill_(9)
    memory.load("a", 1)["c"].fill_(7)
    assert memory.load("a", 1)["c"].tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 2), st.booleans(), st.booleans()), max_size=12))
def test_disk_and_process_remember_alike_whatever_is_lost(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[str, int, bool, bool]]
) -> None:
    """Any history of rounds, asked again after crashes, counted or lost: equal to a plain record of what was counted."""
    stores = [Memory(tmp_path_factory.mktemp("run")), Memory(None)]
    truth: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}}
    counted: dict[str, int | None] = {"a": None, "b": None}
    for ticket, (client, crashes, is_counted, remembers) in enumerate(rounds, start=1):
        kept = None
        for _ in range(1 + crashes):
            for store in stores:
                assert equal(store.load(client, counted[client]), truth[client])
                kept = store.save(client, ticket, counted[client], tree(ticket) if remembers else {})
        if is_counted and kept is not None:
            counted[client], truth[client] = kept, tree(ticket) if remembers else {}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/", "..", "", "a/b", "A" * 500, "a\0b", "Zürich & Söhne"])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    memory = Memory(tmp_path / "run")
    memory.save(name, 1, None, tree(1))
    assert equal(memory.load(name, 1), tree(1))
    assert [path.parent for path in tmp_path.rglob("*.safetensors")] == [home(tmp_path / "run", name)]
    assert home(tmp_path / "run", name).resolve().parent == (tmp_path / "run" / "clients").resolve()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    elif how == "flipped":
        data[-1] ^= 1
    elif how == "header":
        data[20] ^= 1
    path.write_bytes(b"" if how == "empty" else bytes(data))


@pytest.mark.parametrize("how", ["cut", "flipped", "header", "empty"])
def test_a_damaged_memory_is_named_and_not_skipped(tmp_path: Path, how: str) -> None:
    memory = Memory(tmp_path)
    memory.save("a", 1, None, tree(1))
    memory.save("a", 2, 1, tree(2))
    path = home(tmp_path, "a") / "memory-000002.safetensors"
    damage(path, how)
    with pytest.raises(RunError, match=r"memory-000002\.safetensors: what client 'a' remembered with ticket 2 cannot be read"):
        memory.load("a", 2)


def test_a_memory_that_is_another_clients_or_rounds_is_refused(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    for client in ("a", "b"):
        memory.save(client, 1, None, tree(1))
    mine, other = (home(tmp_path, client) / "memory-000001.safetensors" for client in ("a", "b"))
    mine.write_bytes(other.read_bytes())
    with pytest.raises(RunError, match="do not match"):
        memory.load("a", 1)
    other.rename(other.with_name("memory-000005.safetensors"))
    with pytest.raises(RunError, match="do not match"):
        memory.load("b", 5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_client_killed_while_it_writes_has_the_old_memory_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    memory, marks = Memory(tmp_path), 0
    memory.save("a", 1, None, tree(1))

    def kill(name: str) -> None:
        nonlocal marks
        marks += 1
        if marks == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(disk, "on_step", kill)
        with pytest.raises(Killed):
            memory.save("a", 2, 1, tree(2))
    fresh = Memory(tmp_path)
    assert equal(fresh.load("a", 1), tree(1))
    fresh.save("a", 2, 1, tree(2))
    assert equal(fresh.load("a", 2), tree(2))
    assert len(list(home(tmp_path, "a").iterdir())) == 2, "an unfinished file is left behind"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text("in the way")
    with pytest.raises(RunError, match="could not be written"):
        Memory(tmp_path).save("a", 1, None, tree(1))

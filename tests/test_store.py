"""What a client remembers, and what a crash may not take from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfm.client.store import StateStore, home
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
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return StateStore(tmp_path if request.param == "disk" else None)


def test_a_client_starts_from_what_it_had_before_the_round(store: StateStore) -> None:
    for round in (2, 3, 7):
        store.save("a", round, tree(round))
    assert equal(store.load("a", 8), tree(7))
    assert equal(store.load("a", 100), tree(7))
    # The server crashed after the client had written round 7 and asks for it again.
    assert equal(store.load("a", 7), tree(3))
    store.save("a", 7, tree(7))
    assert equal(store.load("a", 8), tree(7)) and equal(store.load("a", 7), tree(3))


def test_a_client_that_never_remembered_starts_empty(store: StateStore) -> None:
    assert store.load("a", 5) == {}
    store.save("a", 5, tree(5))
    assert store.load("a", 5) == {} and store.load("b", 9) == {}
    store.save("a", 5, tree(5))
    assert store.load("a", 5) == {}


def test_nothing_to_remember_writes_nothing(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save("a", 1, {})
    assert list(tmp_path.iterdir()) == []
    store.save("a", 2, tree(2))
    store.save("a", 3, {})
    assert store.load("a", 4) == {} and equal(store.load("a", 3), tree(2))


def test_two_versions_are_kept(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for round in range(1, 6):
        store.save("a", round, tree(round))
    assert sorted(path.name for path in home(tmp_path, "a").iterdir()) == ["memory-000004.safetensors", "memory-000005.safetensors"]


def test_a_memory_that_is_gone_is_refused_and_not_taken_for_none(store: StateStore) -> None:
    for round in range(1, 6):
        store.save("a", round, tree(round))
    with pytest.raises(RunError, match=r"'a' is asked for round 4, .* from round 3 is no longer kept"):
        store.load("a", 4)


def test_an_abandoned_future_is_forgotten(store: StateStore) -> None:
    """The server's last checkpoint was lost, and it goes on from an earlier one."""
    store.save("a", 1, tree(1))
    store.save("a", 5, tree(5))
    assert equal(store.load("a", 3), tree(1))
    store.save("a", 3, tree(3))
    assert equal(store.load("a", 6), tree(3))


def test_memories_share_no_storage(store: StateStore) -> None:
    bank = torch.zeros(4, 2)
    store.save("a", 1, {"c": bank[1]})
    bank.fill_(9)
    store.load("a", 2)["c"].fill_(7)
    assert store.load("a", 2)["c"].tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.booleans(), st.booleans()), max_size=12))
def test_disk_and_process_remember_alike_whatever_crashes(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[str, bool, bool]]
) -> None:
    """Any history of rounds, some of them asked twice because the server crashed: equal to a plain record of what was committed."""
    stores = [StateStore(tmp_path_factory.mktemp("run")), StateStore(None)]
    truth: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}}
    for round, (client, crashed, remembers) in enumerate(rounds, start=1):
        for _ in range(2 if crashed else 1):
            for store in stores:
                assert equal(store.load(client, round), truth[client])
                store.save(client, round, tree(round) if remembers else {})
        truth[client] = tree(round) if remembers else {}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/", "..", "", "a/b", "A" * 500, "a\0b", "Zürich & Söhne"])
def test_no_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    store = StateStore(tmp_path / "run")
    store.save(name, 1, tree(1))
    assert equal(store.load(name, 2), tree(1))
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
    store = StateStore(tmp_path)
    store.save("a", 1, tree(1))
    store.save("a", 2, tree(2))
    path = home(tmp_path, "a") / "memory-000002.safetensors"
    damage(path, how)
    with pytest.raises(RunError, match=r"memory-000002\.safetensors: what client 'a' remembered after round 2 cannot be read"):
        store.load("a", 3)


def test_a_memory_that_is_another_clients_or_rounds_is_refused(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for client in ("a", "b"):
        store.save(client, 1, tree(1))
    mine, other = (home(tmp_path, client) / "memory-000001.safetensors" for client in ("a", "b"))
    mine.write_bytes(other.read_bytes())
    with pytest.raises(RunError, match="do not match"):
        store.load("a", 2)
    other.rename(other.with_name("memory-000005.safetensors"))
    with pytest.raises(RunError, match="do not match"):
        store.load("b", 6)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_client_killed_while_it_writes_has_the_old_memory_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    store, marks = StateStore(tmp_path), 0
    store.save("a", 1, tree(1))

    def kill(name: str) -> None:
        nonlocal marks
        marks += 1
        if marks == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(disk, "on_step", kill)
        with pytest.raises(Killed):
            store.save("a", 2, tree(2))
    fresh = StateStore(tmp_path)
    assert equal(fresh.load("a", 2), tree(1))
    fresh.save("a", 2, tree(2))
    assert equal(fresh.load("a", 3), tree(2))
    assert len(list(home(tmp_path, "a").iterdir())) == 2, "an unfinished file is left behind"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text("in the way")
    with pytest.raises(RunError, match="could not be written"):
        StateStore(tmp_path).save("a", 1, tree(1))

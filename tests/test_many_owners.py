"""What must not grow with the number of owners, and a sample of them that is evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import small

from fedfm.core import disk, messages
from fedfm.core.errors import ConfigError, FedfmError
from fedfm.core.messages import Body, Request
from fedfm.data import owners as layout
from fedfm.observers import Evaluate
from fedfm.run.folder import read_journal
from fedfm.run.loop import resume, run
from fedfm.simulation import Simulation


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))


def test_names_without_a_readable_letter_have_folders_of_their_own() -> None:
    # A digest of 4 bytes had about 10 pairs among these.
    names = [chr(0x4E00 + i % 20_000) + chr(0x4E00 + i // 20_000) for i in range(300_000)]
    assert len({disk.slug(name) for name in names}) == len(names)


def test_a_sample_of_the_owners_is_evenly_spread_and_always_the_same() -> None:
    clients = [f"owner{i:03d}" for i in range(100)]
    assert Evaluate(owners=4).chosen(clients) == ["owner000", "owner025", "owner050", "owner075"]
    assert Evaluate(owners=100).chosen(clients) == Evaluate().chosen(clients) == Evaluate(owners=101).chosen(clients) == clients
    for owners in range(1, 101):
        assert len(set(Evaluate(owners=owners).chosen(clients))) == owners
    with pytest.raises(ConfigError, match="it must be 1 or more, or null for all"):
        Evaluate(owners=0)


def test_only_the_sample_is_evaluated_and_training_stays_the_same(tmp_path: Path) -> None:
    def reports(evaluate: Evaluate, out: str) -> list[Mapping[str, Any]]:
        return [record.metrics["eval"] for _, record in run(small(tmp_path, evaluate=evaluate, rounds=2), out=tmp_path / out)]

    some, all_of_them = reports(Evaluate(owners=2), "some"), reports(Evaluate(), "all")
    for mine, other in zip(some, all_of_them, strict=True):
        assert mine["owners"] == {owner: other["owners"][owner] for owner in ("ann", "bob")}
        assert mine["pooled"] != other["pooled"]
    assert [record.metrics["eval"]["owners"].keys() for _, record in resume(tmp_path / "some", 3)] == [{"ann", "bob"}]


def test_nobodys_examples_are_opened_to_say_how_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = small(tmp_path, evaluate=Evaluate(every=0), rounds=0)
    Simulation.build(federation)

    def refuse(path: str) -> Any:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(layout, "_mapped", refuse)
    list(run(federation, out=tmp_path / "run"))
    holdings = read_journal(tmp_path / "run").first["roster"]["holdings"]
    monkeypatch.undo()
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    house = Simulation.build(federation).house
    assert {client: row["tokens"] for client, row in holdings.items()} == {
        client: int(house.shard(client).train.lengths.sum()) for client in house.clients
    }


def test_a_body_is_measured_once_for_all_who_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    body = Body("train", 1, {f"layer{i}": torch.zeros(3, 4) for i in range(50)})
    sizes = [len(messages.pack(Request(body, {"ticket": i}))) for i in range(5)]
    calls: list[int] = []
    original = messages._index
    monkeypatch.setattr(messages, "_index", lambda tensors: calls.append(1) or original(tensors))
    assert [messages.size(Request(body, {"ticket": i})) for i in range(5)] == sizes and len(calls) <= 1


def test_labels_are_numbers_while_rows_are_divided(tmp_path: Path) -> None:
    import tracemalloc

    from fedfm.data.prepare import _labels
    from fedfm.data.records import Record

    num = 200_000
    rows = (Record({"label": f"{'class' * 10} {i % 77}"}, "here") for i in range(num))
    tracemalloc.start()
    label_n, places = _labels(rows, "label")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * num and len(label_n) == num
    assert [places[f"{'class' * 10} {i % 77}"] for i in range(300)] == label_n[:300].tolist()
    assert list(places) == sorted(places)


def test_an_owner_whose_head_is_gone_is_named(tmp_path: Path) -> None:
    federation = small(tmp_path, rounds=1)
    owners = Simulation.build(federation).owners
    (owners.path("bob") / "shard.json").unlink()
    with pytest.raises(FedfmError, match="bob"):
        list(run(federation, out=tmp_path / "run"))


def test_the_split_is_a_line_for_each_owner_and_a_start_reads_each_owners_head_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = small(tmp_path, rounds=0, evaluate=Evaluate(every=0))
    Simulation.build(federation)
    read: list[Path] = []
    original = layout._read
    monkeypatch.setattr(layout, "_read", lambda path: read.append(path) or original(path))
    list(run(federation, out=tmp_path / "run"))
    assert len(read) == len(set(read)) == 1 + 3
    lines = (tmp_path / "run" / "split.json").read_text().splitlines()
    rows = json.loads("".join(lines))
    assert lines[0] == "[" and lines[-1] == "]" and [json.loads(line.removesuffix(",")) for line in lines[1:-1]] == rows
    assert [row["owner"] for row in rows] == ["ann", "bob", "cid"] and all(row["train"] > 0 for row in rows)

"""A member that does not have the base gets it from the coordinator, once, by its digest, and as far as its owner's policy lets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedfm.core.errors import MessageError, MissingExtra

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.client.policy import Policy
from fedfm.coordination import Coordination
from fedfm.core.messages import ClientId, Reply, Request
from fedfm.core.round import play, start
from fedfm.data import Data
from fedfm.engines import Embedded, Nats
from fedfm.engines.nats import NatsSession
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.models import Model
from fedfm.models.files import paths_of, sets_of
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing import tiny
from fedfm.testing.broker import server
from fedfm.testing.engines import ask
from fedfm.testing.parts import same
from fedfm.testing.silos import Silos
from fedfm.tuning import LoRA
from fedfm.wire import parts
from fedfm.wire.parts import HandOut, part_id

try:
    server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

OWNERS = ("anna", "bela")


def rows(owner: str) -> list[dict[str, str]]:
    k = OWNERS.index(owner) if owner in OWNERS else 0
    return [{"text": tiny.TEXT[(11 * i + k) % 256]} for i in range(8 + k)]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Federation, Silos]]:
    """Two members and two that are particular; a base that lies where the coordinator is, under a name that leads nowhere for members."""
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    every = {owner: rows(owner) for owner in (*OWNERS, "cleo", "dora")}
    policies = {"cleo": Policy.open(model_bytes=0), "dora": Policy.open(models=("0" * 32,))}
    with Silos(tmp_path / "silos", every, policies, torch.get_num_threads()) as silos:
        silos.start()
        home = tmp_path / "coordinator" / "models" / "some" / "base"
        foundation = tiny.foundation("Llama")
        foundation.model.save_pretrained(home)
        foundation.tokenizer.save_pretrained(home)
        # Members were started elsewhere.
        monkeypatch.chdir(tmp_path / "coordinator")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"owner": owner, **row}) + "\n" for owner in OWNERS for row in rows(owner)))
        yield (
            Federation(
                model=Model("models/some/base"),
                data=Data(str(path), by="owner", test_fraction=0.3),
                task=CausalLM(max_length=16),
                tuning=LoRA(r=2),
                local=SGD(lr=0.1, steps=1, batch_size=2),
                engine=Nats(str(silos.home("coordinator")), device="cpu"),
            ),
            silos,
        )


@pytest.mark.slow
def test_a_member_without_the_base_gets_it_from_the_coordinator(there: tuple[Federation, Silos]) -> None:
    federation, silos = there
    reference = Simulation.build(replace(federation, engine=Embedded(bank=1, device="cpu")))
    with reference.open() as alone:
        expected, _ = play(
            reference.federation, start(reference.federation, reference.house.start), alone, reference.clients, reference.key
        )
    site = Coordination.build(federation, OWNERS)
    files = sets_of(paths_of(federation.model))["model"]
    with site.open() as session:
        state, record = play(site.federation, start(site.federation, site.house.start), session, OWNERS, site.key)
        assert not record.failures and same(state.params, expected.params)
        assert isinstance(session, NatsSession)
        # Both asked, and each part was handed out for all.
        assert session._files._asked and max(session._files._asked.values()) < 5
        for owner in OWNERS:
            (kept,) = (silos.home(owner) / "models").glob("*/")
            assert {path.name for path in kept.iterdir()} == {file.name for file in files}
            assert all(file.is_at(kept / file.name) for file in files)
        refused = ask(session, dict.fromkeys(("cleo", "dora"), Request.of("describe")))
        assert not any(isinstance(answer, Reply) for answer in refused.values())
        assert "'model_bytes'" in str(refused["cleo"]) and "--models" in str(refused["cleo"])
        assert "'models'" in str(refused["dora"]) and "is not among the owner's 1" in str(refused["dora"])
        assert not list(silos.home("dora").glob("models/*")), "nothing was fetched"
    with silos.connect("coordinator") as connection:
        assert connection.stored(silos.names.bodies)[0] == 0, "it is freed when the session ends"
    # Kept: the next run asks for nothing.
    with site.open() as session:
        answers = ask(session, dict.fromkeys(OWNERS, Request.of("describe")))
        assert all(isinstance(answer, Reply) for answer in answers.values())
        assert isinstance(session, NatsSession) and not session._files._asked


def test_parts_are_handed_out_once_for_all_and_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_SIZE", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(95)))
    stored, readers = dict[str, bytes](), {"a", "b"}

    def store(id: str, payload: object) -> frozenset[ClientId]:
        stored[id] = bytes(payload)  # type: ignore[call-overload]
        return frozenset(readers)

    handing = HandOut({"d" * 32: path}, store, lambda id: stored.pop(id))

    def asking(member: str, index: object, digest: str = "d" * 32) -> None:
        handing.answer("job", member, json.dumps([digest, index]).encode())

    for index in range(10):
        asking("a", index)
        asking("b", index)
        assert stored[part_id("job", "d" * 32, index)] == bytes(range(95))[10 * index : 10 * index + 10] and len(stored) <= 3
    readers.add("late")
    asking("late", 9)
    assert len(stored) == 3
    for wrong in ("", "[]", "null", "[1, 2, 3]", '["x", 0]', "[" * 500, "x" * 5000, '[["d"], 0]'):
        with pytest.raises(MessageError):
            handing.answer("job", "a", wrong.encode())
    for index in (-1, 10, 1 << 80, True, 0.5, "0", None):
        with pytest.raises(MessageError, match="there is not"):
            asking("a", index)
    for _ in range(48):
        asking("a", 3)
    with pytest.raises(MessageError, match="50 times"):
        for _ in range(3):
            asking("a", 3)
    handing.close()
    assert not stored

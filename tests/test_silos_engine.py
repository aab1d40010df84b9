"""Members in processes of their own, over a real broker: the numbers are those of the embedded engine, and nobody is counted twice."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedfm.core.errors import MissingExtra
from fedfm.core.messages import Body, Failure, Reply, Request, pack_parts

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.client.memory import home
from fedfm.client.policy import Policy
from fedfm.core.disk import slug
from fedfm.data import Data
from fedfm.engines import Embedded, Nats
from fedfm.engines.nats import NatsSession
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.methods import Scaffold
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing import check_engine, tiny
from fedfm.testing.broker import server
from fedfm.testing.engines import ask
from fedfm.testing.silos import Consortium
from fedfm.transforms import ClipByNorm, TopK
from fedfm.tuning import LoRA

try:
    server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow
OWNERS = ("anna", "bela")


def rows(owner: str) -> list[dict[str, str]]:
    k = OWNERS.index(owner)
    return [{"text": f"{tiny.TEXT[(17 * i + 5 * k) % 256]} {tiny.TEXT[(i * k) % 256]}"} for i in range(5 + 2 * k)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"owner": owner, **row}) + "\n" for owner in OWNERS for row in rows(owner)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(folder / "cache"))
        yield Federation(
            model=tiny.spec("Llama"),
            data=Data(str(path), by="owner", test_fraction=0.3),
            task=CausalLM(max_length=16),
            tuning=LoRA(r=4, dropout=0.1),
            local=SGD(lr=0.1, steps=3, batch_size=2),
            transforms=(TopK(fraction=0.5), ClipByNorm(max_norm=0.5)),
            engine=Embedded(bank=1, device="cpu"),
        )


@pytest.fixture
def consortium(tmp_path: Path, federation: Federation) -> Iterator[Consortium]:
    import torch

    with Consortium(tmp_path / "consortium", {owner: rows(owner) for owner in OWNERS}, threads=torch.get_num_threads()) as consortium:
        yield consortium


def test_members_give_the_numbers_of_clients_run_one_by_one(federation: Federation, consortium: Consortium, tmp_path: Path) -> None:
    """Bit for bit, with control variates, error feedback and dropout; each member has its own rows alone."""
    consortium.start()
    check_engine(Nats(str(consortium.link), device="cpu"), replace(federation, method=Scaffold()), tmp_path / "run")
    job = json.loads((tmp_path / "run" / "job.json").read_text())
    assert job["session"] == 2
    for owner in OWNERS:
        folder = home(consortium.home(owner) / "jobs" / slug(job["name"]), owner)
        assert [path.name for path in sorted(folder.iterdir())] == [f"memory-{ticket:06d}.safetensors" for ticket in (1, 2, 3)]

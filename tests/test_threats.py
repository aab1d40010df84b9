"""What docs/THREATS.md says and no other test backs; and the pages written by hand name what there is."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from fedfm import notation
from fedfm.aggregators import Mean
from fedfm.client.plan import ClientPlan
from fedfm.client.policy import Policy
from fedfm.core.check import check
from fedfm.core.errors import ModelError
from fedfm.core.messages import Reply
from fedfm.core.parts import RoundContext
from fedfm.core.roster import Holding
from fedfm.core.round import start
from fedfm.data import Data
from fedfm.engines import Embedded, Process
from fedfm.engines.process import ProcessSession
from fedfm.federation import Federation
from fedfm.local import AdamW
from fedfm.models import Model, load
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM, Classification
from fedfm.testing import tiny
from fedfm.transforms import TopK
from fedfm.tuning import BitFit, Full, LoRA
from fedfm.verbs import Describe, Evaluation

ROOT = Path(__file__).parent.parent


def test_every_test_that_is_named_exists() -> None:
    named = 0
    for line in (ROOT / "docs" / "THREATS.md").read_text(encoding="utf-8").splitlines():
        file = ""
        for name_of_test in re.findall(r"`((?:\w+\.py::)?test_\w+)`", line):
            file, _, name = (name_of_test if "::" in name_of_test else f"{file}::{name_of_test}").partition("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {name}"
            named += 1
    assert named > 20


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    """Two owners with classes."""
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    rows = [{"owner": "ab"[i % 2], "text": text, "label": "xyz"[i % 3]} for i, text in enumerate(tiny.TEXT[:40])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Data(str(tmp_path / "rows.jsonl"), by="owner", test_fraction=0.3)
    return Federation(tiny.spec("Llama"), data, task=CausalLM(max_length=16), local=AdamW(steps=1), engine=Embedded(device="cpu"))


SIX = {"weight", "loss", "steps", "examples", "tokens", "padding"}


def trained(simulation: Simulation) -> list[Reply]:
    """What each client answers in the first round."""
    plan = simulation.federation
    state = start(plan, simulation.house.start)
    errand = plan.work(state, simulation.clients, RoundContext(1, simulation.key, state.params, len(simulation.clients)))
    with simulation.open() as session:
        answers = list(session.exchange({client: errand.request(client) for client in simulation.clients}))
    assert answers
    return [answer for answer in answers if isinstance(answer, Reply) or pytest.fail(f"{answer}")]


def test_what_leaves_a_client_is_its_payload_and_six_numbers(plan: Federation) -> None:
    simulation = Simulation.build(plan)
    params = simulation.house.start
    for answer in trained(simulation):
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in answer.tensors.items()} == {
            name: (leaf.shape, torch.float32) for name, leaf in params.items()
        }
        assert set(answer.meta) == SIX
        assert all(isinstance(value, float) for value in answer.meta.values())


def test_a_client_that_remembers_adds_its_ticket(plan: Federation) -> None:
    for answer in trained(Simulation.build(replace(plan, transforms=(TopK(fraction=0.5),)))):
        assert set(answer.meta) == SIX | {"ticket"} and answer.meta["ticket"] == 1


def test_what_a_client_is_told_is_its_plan(plan: Federation) -> None:
    client_plan = plan.client_plan()
    assert {item.name for item in fields(client_plan)} == {"model", "task", "tuning", "local", "transforms", "channel"}
    assert notation.build(ClientPlan, notation.write(client_plan), "plan") == client_plan
    words = notation.write(client_plan)
    assert all(word not in words for word in (plan.data.source, "sampler", "aggregator", "server", "seed", "rounds"))


def test_a_process_is_told_its_own_client_and_the_runs_key(plan: Federation) -> None:
    simulation = Simulation.build(replace(plan, engine=Process(device="cpu")))
    with simulation.open() as session:
        assert isinstance(session, ProcessSession)
        meta = session._hello("a", Path("home")).meta
    assert meta["key"] == simulation.key.digest.hex() and meta["client"] == "a"
    assert set(meta) == {
        "client", "plan", "data", "folder", "key", "device", "threads", "choices", "num_clients", "cohort_size", "num_rounds", "policy", "run", "max_bytes",
    }  # fmt: skip
    assert str(simulation.house.shards["b"]) not in str(meta)


def test_a_policy_withholds_counts_labels_and_what_an_evaluation_tells_of_them(plan: Federation) -> None:
    plan = replace(plan, task=Classification(max_length=16), model=tiny.spec("Bert", num_hidden_layers=1))
    silent = {"a": Policy.open(may_leave=("losses", "evaluation"))}
    simulation = Simulation.build(replace(plan, aggregator=Mean(weights="uniform")), policies=silent)
    house, uniform = simulation.house, simulation.federation
    with simulation.open() as session:
        roster = Describe().roster(uniform.channel, session, house.clients, house.labels, house.key)
        report = Evaluation().report(uniform, start(uniform, house.start), session, house.clients, house.key, len(house.labels))
    assert roster.holdings["a"] == Holding() and roster.holdings["b"].train and roster.withholds("labels") == ["a"]
    assert [f.where for f in check(plan, 2, roster) if f.level == "refusal"] == ["aggregator"]
    assert not [f for f in check(uniform, 2, roster) if f.level == "refusal"]
    meta = {answer.client: answer.meta for answer in trained(simulation)}
    assert {name: meta["a"][name] for name in SIX - {"loss"}} == {**dict.fromkeys(SIX - {"loss"}, 0.0), "weight": 1.0}
    assert meta["b"]["weight"] == roster.holdings["b"].train
    assert set(report["owners"]) == {"b"} and "rule 'may_leave'" in report["failed"]["a"], "the sums of an evaluation hold counts"


def test_embeddings_travel_only_with_full_tuning_and_the_check_says_so() -> None:
    base = Federation(Model("nowhere"), Data("stdlib"))
    texts = {type(tuning): [f.text for f in check(replace(base, tuning=tuning)) if f.where == "tuning"] for tuning in (LoRA(), Full())}
    assert not texts[LoRA] and "rows show which tokens" in texts[Full][0]
    for shape, tuning in (("Llama", LoRA(targets=("all-linear",))), ("GPT2", BitFit())):
        foundation = tiny.foundation(shape)
        embedding = foundation.model.get_input_embeddings().weight.shape
        assert all(leaf[-len(embedding) :] != embedding for leaf in tuning.attach(foundation).spec.shapes)


class Marks:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def saved(folder: Path) -> Path:
    foundation = tiny.foundation("Llama")
    foundation.model.save_pretrained(folder)
    foundation.tokenizer.save_pretrained(folder)
    return folder


def test_weights_that_are_a_pickle_are_not_opened(tmp_path: Path) -> None:
    folder, mark = saved(tmp_path / "model"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    torch.save(Marks(mark), folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load(Model(str(folder)), "causal_lm", device="cpu")
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "whoever opens it runs it"


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    folder, mark = saved(tmp_path / "model"), tmp_path / "mark"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Other"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    with pytest.raises(ModelError):
        load(Model(str(folder)), "causal_lm", device="cpu")
    assert not mark.exists()


def test_what_is_quoted_is_what_the_sources_say() -> None:
    quotes = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "docs" / "adding-a-technique.md").read_text(encoding="utf-8"), re.S)
    assert quotes
    for path, quoted in quotes:
        assert quoted in (ROOT / path).read_text(encoding="utf-8"), f"{path} reads otherwise now"


@pytest.mark.parametrize("page", ["concepts.md", "adding-a-technique.md", "THREATS.md"])
def test_files_that_are_named_exist(page: str) -> None:
    for name in re.findall(r"`(\w+/[\w/]*(?:\.py)?)\b", (ROOT / "docs" / page).read_text(encoding="utf-8")):
        assert (ROOT / "src" / "fedfm" / name).exists() or (ROOT / name).exists(), name

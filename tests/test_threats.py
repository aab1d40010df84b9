"""What docs/THREATS.md says and no other test backs; and the pages written by hand name what there is."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedfm.core.check import check
from fedfm.core.errors import ModelError
from fedfm.core.messages import Reply, Request
from fedfm.data import Data
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.local import AdamW
from fedfm.models import Model, load
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing import tiny
from fedfm.tuning import BitFit, Full, LoRA

ROOT = Path(__file__).parent.parent


def test_every_test_that_is_named_exists() -> None:
    named = 0
    for line in (ROOT / "docs" / "THREATS.md").read_text(encoding="utf-8").splitlines():
        file = ""
        for found in re.findall(r"`((?:\w+\.py::)?test_\w+)`", line):
            file, _, name = (found if "::" in found else f"{file}::{found}").partition("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {name}"
            named += 1
    assert named > 20


def test_what_leaves_a_client_is_its_payload_and_six_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"owner": "ab"[i % 2], "text": text}) for i, text in enumerate(tiny.TEXT[:40])))
    plan = Federation(
        tiny.spec("Llama"), Data(str(rows), by="owner"), task=CausalLM(max_length=16), local=AdamW(steps=1), engine=Embedded(device="cpu")
    )
    site = Simulation.build(plan)
    params = site.house.start
    with site.open() as session:
        for answer in session.exchange(dict.fromkeys(site.clients, Request.of("train", 1, params))):
            assert isinstance(answer, Reply)
            assert {name: (leaf.shape, leaf.dtype) for name, leaf in answer.tensors.items()} == {
                name: (leaf.shape, torch.float32) for name, leaf in params.items()
            }
            assert set(answer.meta) == {"weight", "loss", "steps", "examples", "tokens", "padding"}
            assert all(isinstance(value, float) for value in answer.meta.values())


def test_embeddings_travel_only_with_full_tuning_and_the_check_says_so() -> None:
    base = Federation(Model("nowhere"), Data("stdlib"))
    told = {type(tuning): [f.text for f in check(replace(base, tuning=tuning)) if f.where == "tuning"] for tuning in (LoRA(), Full())}
    assert not told[LoRA] and "rows show which tokens" in told[Full][0]
    for shape, tuning in (("Llama", LoRA(targets=("all-linear",))), ("GPT2", BitFit())):
        foundation = tiny.foundation(shape)
        embedding = foundation.model.get_input_embeddings().weight.shape
        assert all(leaf[-len(embedding) :] != embedding for leaf in tuning.attach(foundation).spec.shapes)


class Marks:
    """Unpickled, it leaves a mark."""

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

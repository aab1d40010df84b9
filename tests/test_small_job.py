"""What a small run must not do beside its work: import what it does not use, load or read a thing twice. Counts, not seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# A run from start to end, in a process that has imported nothing before; tests import peft and more.
JOB = """
import collections, json, sys
from pathlib import Path

import tokenizers
import transformers

import fedfm
from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.local import AdamW
from fedfm.models import Model, digest
from fedfm.tasks import CausalLM
from fedfm.testing import tiny
from fedfm.tuning import LoRA

folder = Path(sys.argv[1])
rows = folder / "rows.jsonl"
rows.write_text("".join('{"owner": "%s", "text": "%s"}\\n' % ("ab"[i % 2], text) for i, text in enumerate(tiny.TEXT[:20])))
model = Model(architecture="Llama", config=tuple(tiny.CONFIGS["Llama"].items()), tokenizer=tiny.tokenizer_folder())
calls = collections.Counter()


def counted(owner, name, label):
    inner = getattr(owner, name)

    def call(*args, **options):
        calls[label] += 1
        return inner(*args, **options)

    setattr(owner, name, call)


counted(transformers.AutoTokenizer, "from_pretrained", "tokenizers loaded")
counted(transformers.AutoConfig, "for_model", "configs made")
counted(transformers.AutoModelForCausalLM, "from_config", "models built")
counted(digest, "tokenizer_words", "digests of the tokenizer")
from fedfm.run import base

counted(base, "weights_digest", "digests of the weights")
counted(transformers.PreTrainedModel, "save_pretrained", "bases saved")
plan = Federation(model, Data(str(rows), by="owner"), task=CausalLM(max_length=16), tuning=LoRA(r=2), local=AdamW(steps=1), rounds=1)
for _ in fedfm.run(plan, out=folder / "run"):
    pass
print(json.dumps(calls))
print(json.dumps(sorted({"peft", "pydantic", "datasets", "pyarrow", "rich", "tensorboard", "nats"} & sys.modules.keys())))
"""


def test_a_run_loads_each_thing_once_and_imports_only_what_it_uses(tmp_path: Path) -> None:
    environment = {**os.environ, "FEDFM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", JOB, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls, modules = done.stdout.splitlines()[-2:]
    names = (
        "tokenizers loaded", "configs made", "models built", "digests of the weights", "digests of the tokenizer", "bases saved",
    )  # fmt: skip
    assert json.loads(calls) == dict.fromkeys(names, 1)
    assert json.loads(modules) == []

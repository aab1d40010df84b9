"""The tour: federated tuning of a language model on any machine, offline, in a few minutes.

The owners are the packages of Python's standard library, the public text is Python's manual. A tokenizer and a small Llama are
trained on the public text by the same trainer as everything else (a federation of one owner whose parameters all train), and kept
for the next time; then LoRA is tuned across the owners and compared with its two ends.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fedfm.aggregators import Mean
from fedfm.core import disk, words
from fedfm.core.version import VERSION
from fedfm.data import Data, public_text
from fedfm.federation import Federation
from fedfm.local import AdamW
from fedfm.models import Model, train_bpe
from fedfm.observers import Evaluate
from fedfm.observers.base import Watcher
from fedfm.observers.progress import Progress
from fedfm.reports import show_comparison
from fedfm.run.compare import compare
from fedfm.run.folder import RECIPE, is_finished
from fedfm.run.loop import resume, run
from fedfm.server import FedAvgM
from fedfm.tasks import CausalLM
from fedfm.tuning import Full, LoRA

log = logging.getLogger(__name__)

VOCABULARY = 1024


def base_federation(folder: Path) -> Federation:
    """The base model's training: one owner, whose text is public, and every parameter.

    Args:
        folder: Holds ``tokenizer/`` and ``public/``.
    """
    size = {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    return Federation(
        name="base",
        model=Model(architecture="Llama", config=tuple(size.items()), tokenizer=str(folder / "tokenizer")),
        data=Data(str(folder / "public"), test_fraction=0.05),
        tuning=Full(),
        local=AdamW(lr=8e-3, steps=60, batch_size=6, weight_decay=0.1, warmup=4, decay=0.7),
        rounds=6,
    )


def federation(model: str) -> Federation:
    """The tour's plan. :func:`recipe` is the same as text.

    Args:
        model: Folder of the base model.
    """
    return Federation(
        name="quickstart",
        model=Model(model),
        data=Data("stdlib"),
        task=CausalLM(max_length=64),
        tuning=LoRA(r=8, alpha=16.0, targets=("q_proj", "v_proj", "up_proj", "down_proj")),
        local=AdamW(lr=2e-2, steps=5, batch_size=4),
        # One owner has a quarter of all text; the others count as much as it does.
        aggregator=Mean(weights="uniform"),
        server=FedAvgM(lr=1.0, momentum=0.5),
        evaluate=Evaluate(max_examples=12),
        rounds=8,
    )


def recipe(model: str) -> str:
    """The tour's plan as text: ``recipes/quickstart.yaml``.

    Args:
        model: Folder of the base model.
    """
    return f"""\
# What `make quickstart` runs: the packages of this machine's own Python library are the owners.
# The base model is what it has trained on Python's manual; any other stands here as well.
name: quickstart
model: {model}
data: {{source: stdlib}}
task: {{CausalLM: {{max_length: 64}}}}
tuning: {{LoRA: {{r: 8, alpha: 16, targets: [q_proj, v_proj, up_proj, down_proj]}}}}
local: {{AdamW: {{lr: 2.0e-2, steps: 5, batch_size: 4}}}}
aggregator: {{Mean: {{weights: uniform}}}}   # one owner has a quarter of all text; the others count as much as it does
server: {{FedAvgM: {{lr: 1.0, momentum: 0.5}}}}
evaluate: {{max_examples: 12}}
rounds: 8
seed: 0
"""


def main(out: Path = Path("runs/quickstart"), quick: bool = False) -> Path:
    """Trains the base model (or finds it), tunes it across the owners, compares, and prints the table.

    Args:
        out: The run's folder; if it exists already, ``-2``, ``-3``... is added.
        quick: Runs one round with very little data, to see that everything works.

    Returns:
        The run's folder.
    """
    began = time.monotonic()
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    print("Federated tuning of a language model, on this machine and offline.\n\nThe base model: Python's manual, which is public.")
    model = base_model(quick, [Progress()])
    plan = federation(str(model))
    if quick:
        plan = replace(
            plan, data=Data("stdlib", limit=20), local=AdamW(steps=1, batch_size=1), evaluate=Evaluate(max_examples=1, ends=1), rounds=1
        )
    out = unused(out)
    print("\nThe federation: each package of Python's standard library is an owner, and its text stays where it is.")
    table = compare(plan, out, watchers=[Progress()], stage=Progress(live=False).stage).to_json()
    print()
    show_comparison(table)
    print(f"\nDone in {words.duration(time.monotonic() - began)}.")
    print(f"  report   {out / 'report.html'}   open it in a browser")
    print(f"  adapter  {out / 'model'}   loads in peft and transformers")
    print(f"  recipe   {out / 'recipe.yaml'}   change a part: fedfm compare {out / 'recipe.yaml'} tuning.LoRA.r=16 --out runs/mine")
    return out


def base_model(quick: bool = False, watchers: Sequence[Watcher] = ()) -> Path:
    """The folder of a tokenizer and a small Llama trained on public text. A finished one is reused, an interrupted one resumed.

    Args:
        quick: One short round.
    """
    texts = list(public_text())
    root = disk.cache() / "quickstart"
    plan = base_federation(Path())
    if quick:
        plan = replace(plan, rounds=1, local=AdamW(steps=2))
    ingredients = "\0".join([VERSION, repr(plan), str(VOCABULARY), *texts])
    folder = root / hashlib.blake2b(ingredients.encode(), digest_size=8).hexdigest()
    run_folder, model = folder / "run", folder / "run" / "model"
    if not (is_finished(run_folder) and (model / "config.json").is_file()):
        if not (folder / "tokenizer" / "tokenizer.json").is_file():
            disk.write_atomic(folder / "public" / "manual.txt", "\n\n".join(texts).encode())
            fresh = folder / f".tokenizer-{os.getpid()}"
            train_bpe(texts, VOCABULARY).save_pretrained(fresh)
            fresh.replace(folder / "tokenizer")
        plan = replace(base_federation(folder), rounds=plan.rounds, local=plan.local)
        _play(resume(run_folder, watchers=watchers) if (run_folder / RECIPE).is_file() else run(plan, out=run_folder, watchers=watchers))
    else:
        print(f"Found, trained by an earlier quickstart: {model}")
    if not quick:
        _point(root / "model", model)
    return model


def unused(out: Path) -> Path:
    """``out``, or the first of ``out-2``, ``out-3``... that does not exist."""
    free, i = out, 2
    while free.exists():
        free, i = out.with_name(f"{out.name}-{i}"), i + 1
    return free


def _play(rounds: Iterable[object]) -> None:
    for _ in rounds:
        pass


def _point(link: Path, target: Path) -> None:
    """Sets a link for recipes, whose name stays the same when the base changes."""
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    try:
        fresh.symlink_to(target)
        fresh.replace(link)
    except OSError as error:  # The cache is read-only. Recipes that use the link will say what is missing.
        log.info("%s could not be set: %s", link, error)

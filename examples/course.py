"""What most of the course starts from: a small base model, the packages of the standard library as owners, and LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedfm import Federation, resume, run
from fedfm.core import disk, words
from fedfm.core.round import RoundRecord
from fedfm.data import Data, public_text
from fedfm.local import AdamW
from fedfm.models import Model, train_bpe
from fedfm.observers import Evaluate
from fedfm.run.folder import is_finished
from fedfm.samplers import Uniform
from fedfm.tasks import CausalLM
from fedfm.tuning import Full, LoRA


def base_model(quick: bool = False) -> Path:
    """A small Llama that has read Python's manual, and nothing else. Trained when it is first asked for, in less than a minute, and kept.

    Training it is a federation of one owner, whose text is public and whose parameters all travel.
    """
    folder = disk.cache() / ("course-quick" if quick else "course")
    ran = folder / "run"
    if not (is_finished(ran) and (ran / "model" / "config.json").is_file()):
        public = folder / "public"
        public.mkdir(parents=True, exist_ok=True)
        (public / "manual.txt").write_text("\n\n".join(public_text()), encoding="utf-8")
        train_bpe(public_text(), vocab_size=512).save_pretrained(folder)
        size = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
        plan = Federation(
            model=Model(architecture="Llama", config=tuple(size.items()), tokenizer=str(folder)),
            data=Data(str(public)),
            task=CausalLM(max_length=64),
            tuning=Full(),
            local=AdamW(lr=1e-2, steps=10 if quick else 150, batch_size=16, weight_decay=0.1, warmup=5, schedule="cosine"),
            rounds=1,
        )
        for _ in resume(ran) if (ran / "recipe.yaml").is_file() else run(plan, out=ran):
            pass
    return ran / "model"


def base(quick: bool = False) -> Federation:
    """Six packages a round tune that model with LoRA.

    Args:
        quick: A base model that has hardly read, and one short round: only to see that it works.
    """
    return Federation(
        model=Model(str(base_model(quick))),
        data=Data("stdlib", limit=60),
        task=CausalLM(max_length=64),
        tuning=LoRA(r=4, targets=("all-linear",)),
        local=AdamW(lr=1e-2, steps=4 if quick else 10, batch_size=4),
        sampler=Uniform(clients=6),
        evaluate=Evaluate(max_examples=4 if quick else 8, ends=4 if quick else 8),
        rounds=1 if quick else 5,
    )


def play(federation: Federation) -> RoundRecord:
    """Runs it without a folder. Returns the record of its last round."""
    *_, (_, record) = run(federation)
    return record


def weigh(plans: Mapping[str, Federation]) -> dict[str, tuple[float, int]]:
    """Plays each, and prints the bytes of an update and the loss of the last round."""
    weighed = {}
    print(f"{'an update as':<14} {'bytes':>8} {'loss':>7}")
    for name, plan in plans.items():
        record = play(plan)
        weighed[name] = loss(record), record.bytes_up // len(record.clients)
        print(f"{name:<14} {words.size(weighed[name][1]):>8} {weighed[name][0]:>7.3f}")
    return weighed


def loss(record: RoundRecord) -> float:
    """The loss on everyone's held-out text together."""
    pooled: float = record.metrics["eval"]["pooled"]["loss"]
    return pooled

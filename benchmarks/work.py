"""The work that is timed: a Llama from scratch, owners of synthetic text, and a federation over them."""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory

from fedfm.data import Data
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.local import AdamW
from fedfm.models import Model, train_bpe
from fedfm.observers import Evaluate
from fedfm.samplers import Uniform
from fedfm.tasks import CausalLM
from fedfm.tuning import LoRA

TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Shape:
    """A cohort's batch.

    Args:
        clients: In a round.
        batch: Rows of each client in a step.
        length: Tokens of a row.
    """

    clients: int
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.clients} x {self.batch} x {self.length}"


SHAPES: tuple[Shape, ...] = (Shape(16, 1, 64), Shape(8, 2, 128), Shape(32, 1, 32))


def parse(options: argparse.ArgumentParser, text: str) -> Shape:
    """``16x1x64``."""
    try:
        clients, batch, length = map(int, text.split("x"))
    except ValueError:
        options.error(f"--shapes {text}: a shape is clients x batch x tokens, such as 16x1x64")
    return Shape(clients, batch, length)


@dataclass(frozen=True)
class Size:
    """A Llama's config."""

    hidden: int = 288
    layers: int = 6
    intermediate: int = 768
    heads: int = 6
    vocab: int = 2048
    dtype: str = "float32"


@contextmanager
def workshop(size: Size) -> Iterator[Path]:
    """A temporary folder with the tokenizer, where prepared data is cached too."""
    before = os.environ.get("FEDFM_CACHE")
    with TemporaryDirectory(prefix="fedfm-benchmark-") as name:
        os.environ["FEDFM_CACHE"] = name
        train_bpe(topics.topics.values(), size.vocab).save_pretrained(Path(name, "tokenizer"))
        try:
            yield Path(name)
        finally:
            del os.environ["FEDFM_CACHE"]
            if before is not None:
                os.environ["FEDFM_CACHE"] = before


def owners(folder: Path, registered: int, rows: int, length: int) -> Path:
    """A file of rows of words, each at least ``length`` tokens long, for so many owners."""
    path = folder / f"owners-{registered}-{rows}-{length}.jsonl"
    vocabulary, rng = " ".join(topics.topics.values()).split(), random.Random(0)
    with path.open("w") as file:
        for owner in range(registered):
            # Every word is a token or more, and what is beyond the length is cut: no row is padded.
            lines = (" ".join(rng.choices(vocabulary, k=length)) for _ in range(rows))
            file.writelines(json.dumps({"owner": f"owner{owner:05d}", "text": line}) + "\n" for line in lines)
    return path


def federation(
    folder: Path,
    size: Size,
    shape: Shape,
    *,
    registered: int,
    steps: int,
    rounds: int,
    bank: int | None = None,
    threads: int | None = None,
) -> Federation:
    """LoRA of rank 8 on query and value, AdamW, FedAvg, nothing evaluated.

    Args:
        registered: Owners, of whom ``shape.clients`` take part in a round.
        bank: Clients per batch; ``None`` lets the engine choose.
    """
    config = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": max(shape.length, 128),
    }
    return Federation(
        model=Model(architecture="Llama", config=config, tokenizer=str(folder / "tokenizer"), dtype=size.dtype),  # type: ignore[arg-type]
        data=Data(str(owners(folder, registered, steps * shape.batch, shape.length)), by="owner", test_fraction=0.0, min_examples=1),
        task=CausalLM(max_length=shape.length, packed=False),
        tuning=LoRA(r=8, alpha=16.0, targets=TARGETS),
        local=AdamW(lr=1e-3, steps=steps, batch_size=shape.batch, max_grad_norm=1.0),
        sampler=Uniform(clients=shape.clients),
        engine=Embedded(bank=bank or "auto", threads=threads),
        evaluate=Evaluate(every=0),
        rounds=rounds,
    )

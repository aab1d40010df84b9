"""Models, tokenizers, examples and a federation small enough to build in a test, in the shapes that matter: Llama, GPT-2, BERT, and a RoBERTa classifier,
whose head has two layers and which counts positions from its padding token's id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

from fedfm.core.batch import Batch, IntArray
from fedfm.core.keys import Key
from fedfm.core.task import Head, Vocabulary
from fedfm.data import Data
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.models import Foundation, Model, load, train_bpe
from fedfm.tasks import CausalLM
from fedfm.tuning import LoRA

CONFIGS: dict[str, dict[str, int]] = {
    "Llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "Bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Roberta": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
HEADS: dict[str, Head] = {"Llama": "causal_lm", "GPT2": "causal_lm", "Bert": "masked_lm", "Roberta": "sequence_classification"}
LABELS = ("a", "b", "c")
TEXT = [
    f"the {a} {b} {c} the {d}."
    for a in ("small", "old", "red", "quiet")
    for b in ("cat", "dog", "bird", "king")
    for c in ("saw", "took", "left", "found")
    for d in ("house", "river", "book", "tree")
]
# Ids that are text: special tokens are few and come first.
FIRST, LAST = 5, 290


@cache
def tokenizer_folder() -> str:
    """A byte-level BPE tokenizer of 300 tokens with a mask token, on disk."""
    tokenizer = train_bpe(TEXT, 300)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    folder = Path(mkdtemp(prefix="fedfm-tiny-"))
    tokenizer.save_pretrained(folder)
    return str(folder)


def spec(architecture: str, **config: object) -> Model:
    """A model from scratch: ``Llama``, ``GPT2``, ``Bert`` or ``Roberta``, 2 layers of width 32."""
    return Model(architecture=architecture, config=tuple({**CONFIGS[architecture], **config}.items()), tokenizer=tokenizer_folder())


def foundation(architecture: str = "Llama", head: Head | None = None, labels: tuple[str, ...] = (), **config: object) -> Foundation:
    """The model of :func:`spec`, loaded on the CPU, with the same weights each time. A classifier gets :data:`LABELS` unless labels are given."""
    head = head or HEADS[architecture]
    return load(spec(architecture, **config), head, labels or (LABELS if head == "sequence_classification" else ()), "cpu", Key.root(0))


class Memory:
    """Examples held in memory.

    Args:
        ids: Token ids of each example ``(n,)``.
        starts: First target of each example.
        labels: Class of each example.
    """

    vocabulary = Vocabulary(300, special=(0, 1, 2, 3), mask=300)

    def __init__(self, ids: Sequence[IntArray], starts: Sequence[int] | None = None, labels: Sequence[int] | None = None) -> None:
        self._ids, self._starts, self._labels = ids, starts, labels
        self.lengths: IntArray = np.array([len(row) for row in ids])

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, i: int) -> IntArray:
        """Token ids of example ``i``."""
        return self._ids[i]

    def start(self, i: int) -> int:
        """Index of the first target of example ``i``."""
        return self._starts[i] if self._starts else 0

    def label(self, i: int) -> int:
        """Class of example ``i``, -1 where there is none."""
        return self._labels[i] if self._labels else -1


def examples(seed: int, count: int, shortest: int = 9, longest: int = 9, classes: int = 0) -> Memory:
    """Random sequences of random lengths."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(FIRST, LAST, rng.integers(shortest, longest + 1)) for _ in range(count)]
    return Memory(ids, labels=[int(rng.integers(classes)) for _ in range(count)] if classes else None)


def batch_of(foundation: Foundation, clients: int = 1, rows: int = 2, length: int = 7) -> Batch:
    """Random ids ``(clients * rows, length)`` that ask at every position, or once per row of a classifier."""
    generator = torch.Generator().manual_seed(0)
    total = clients * rows
    per_row = foundation.head == "sequence_classification"
    count = total if per_row else total * length
    row_p = torch.arange(total) if per_row else torch.arange(total).repeat_interleave(length)
    return Batch(
        inputs={"input_ids": torch.randint(FIRST, LAST, (total, length), generator=generator)},
        shape=(total, length),
        pick_p=torch.arange(count),
        per_row=per_row,
        row_q=row_p,
        owner_q=row_p // rows,
        targets={"labels": torch.zeros(count, dtype=torch.int64)},
        num_clients=clients,
        lengths=np.full(clients, length),
        real_rows=np.full(clients, rows),
        num_tokens=total * length,
    )


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """Logits ``(P, C)`` of a plain model of ``transformers`` or ``peft`` at the batch's picks."""
    logits: torch.Tensor = model(**batch.inputs).logits
    # Virtual tokens in front have logits too.
    return logits if batch.per_row else logits[:, -batch.shape[1] :].reshape(-1, logits.shape[-1])


def disturbed(params: dict[str, torch.Tensor], seed: int = 1, scale: float = 0.2) -> dict[str, torch.Tensor]:
    """Parameters moved at random, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: p + scale * torch.randn(p.shape, generator=generator) for name, p in params.items()}


def federation(folder: Path, owners: Sequence[str] = ("a", "b", "c"), rows: int = 30, **changes: Any) -> Federation:
    """A federation that plays a round in a blink: a Llama of one layer, LoRA of rank 2, one step of two rows, clients one by one.

    Args:
        folder: Where its rows are written, as ``rows.jsonl``: a text and a label each.
        owners: Whose each row is, in turn; a name that stands here twice has twice as many.
        rows: How many rows, at most 256.
        changes: Fields of the federation that are to be others.
    """
    source = folder / "rows.jsonl"
    lines = [{"owner": owners[i % len(owners)], "text": text, "label": "xyz"[i % 3]} for i, text in enumerate(TEXT[:rows])]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = Federation(
        model=spec("Llama", num_hidden_layers=1),
        data=Data(str(source), by="owner", test_fraction=0.3),
        task=CausalLM(max_length=16, packed=False),
        tuning=LoRA(r=2),
        local=SGD(lr=0.1, steps=1, batch_size=2),
        engine=Embedded(bank=1, device="cpu"),
    )
    return replace(base, **changes)

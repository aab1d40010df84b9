"""Models and tokenizers small enough to build in a test, in the three shapes that matter: Llama, GPT-2, BERT."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from fedfm.core.keys import Key
from fedfm.core.task import Vocabulary
from fedfm.models import Foundation, Model, load, train_bpe

CONFIGS = {
    "Llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "Bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
HEADS = {"Llama": "causal_lm", "GPT2": "causal_lm", "Bert": "masked_lm"}
TEXT = [
    f"the {a} {b} {c} the {d}."
    for a in ("small", "old", "red", "quiet")
    for b in ("cat", "dog", "bird", "king")
    for c in ("saw", "took", "left", "found")
    for d in ("house", "river", "book", "tree")
]


@cache
def tokenizer_folder() -> str:
    """A byte-level BPE tokenizer of 300 tokens with a mask token, on disk."""
    tokenizer = train_bpe(TEXT, 300)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    folder = Path(mkdtemp(prefix="fedfm-tiny-"))
    tokenizer.save_pretrained(folder)
    return str(folder)


def spec(architecture: str, **config: object) -> Model:
    """A model from scratch."""
    return Model(architecture=architecture, config={**CONFIGS[architecture], **config}, tokenizer=tokenizer_folder())  # type: ignore[arg-type]


def foundation(architecture: str, head: str | None = None, labels: tuple[str, ...] = (), **config: object) -> Foundation:
    """It, loaded, on the CPU."""
    return load(spec(architecture, **config), head or HEADS[architecture], labels, "cpu", Key.root(0))  # type: ignore[arg-type]


class Memory:
    """Examples held in memory."""

    vocabulary = Vocabulary(300, special=(0, 1, 2, 3), mask=300)

    def __init__(self, ids: list[np.ndarray], starts: list[int] | None = None, labels: list[int] | None = None) -> None:
        self._ids, self._starts, self._labels = ids, starts, labels
        self.lengths = np.array([len(own) for own in ids])

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, i: int) -> np.ndarray:
        return self._ids[i]

    def start(self, i: int) -> int:
        return self._starts[i] if self._starts else 0

    def label(self, i: int) -> int:
        return self._labels[i] if self._labels else -1


def examples(seed: int, count: int, shortest: int = 9, longest: int = 9, classes: int = 0) -> Memory:
    """Random sequences of random lengths."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, 290, rng.integers(shortest, longest + 1)) for _ in range(count)]
    return Memory(ids, labels=[int(rng.integers(classes)) for _ in range(count)] if classes else None)

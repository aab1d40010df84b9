"""Causal language modelling: predict each next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfm.core.batch import IntArray, Row
from fedfm.core.task import Encoder, Example, Examples, RawRow, Task
from fedfm.core.tree import Tree
from fedfm.data.records import written_in
from fedfm.tasks.sequences import LONG, Steps, TextEncoder, Texts, ends, head, language_metrics, require_length, shifted, texts_of, tokenize


@dataclass(frozen=True)
class CausalLM(Task):
    """Predicts each next token of an owner's texts: ``-mean log p(x_t | x_<t)``.

    Packed, the texts of an owner are joined, each opened by BOS (where the tokenizer has one) and closed by EOS, and cut into blocks of
    ``max_length``: no padding, nothing lost but a last block of one token. A block may span texts, and then attends across them.
    Not packed, each text is one example, cut to ``max_length``. A text of more than 262,144 characters is tokenized in pieces.

    Args:
        text: Column that holds the text.
        max_length: Tokens of an example, at least 2.
        packed: Whether texts are joined into full blocks.

    Raises:
        ConfigError: if ``max_length`` is below 2.
    """

    text: str = "text"
    max_length: int = 128
    packed: bool = True

    def __post_init__(self) -> None:
        require_length(self, self.max_length, 2)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row must have."""
        return (self.text,)

    @property
    def example_is_row(self) -> bool:
        """Not where texts are joined."""
        return not self.packed

    def require(self, row: RawRow) -> None:
        """Refuses a row without text."""
        written_in(row, self.text)

    def encoder(self, tokenizer: Any) -> Encoder:
        """A fresh encoder for one owner."""
        return _Encoder(self, tokenizer)

    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[Row]:
        """Ids, and at each position the next one."""
        return [Row(ids, shifted(ids)) for ids in map(examples.ids, index.tolist())]

    def summarise(self, sums: Tree) -> dict[str, float]:
        """``loss``, ``perplexity``, ``token_accuracy``."""
        return language_metrics(sums)

    def opening(self, tokenizer: Any, text: str) -> IntArray:
        """The text, opened as in training."""
        return np.concatenate([np.array(ends(tokenizer, "CausalLM")[0], dtype=np.int32), *tokenize(tokenizer, [text])])


class _Encoder(TextEncoder):
    def __init__(self, task: CausalLM, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.bos, self.eos = ends(tokenizer, "CausalLM")
        self.rest, self.closing = np.zeros(0, dtype=np.int32), np.array([self.eos], dtype=np.int32)

    def steps(self, rows: Sequence[RawRow]) -> Steps:
        texts = texts_of(rows, self.task.text)
        self.dropped += len(rows) - len(texts)
        size, opened = self.task.max_length, np.array(self.bos, dtype=np.int32)
        if not self.task.packed:
            heads = [head(self.tokenizer, text, size) if len(text) > LONG else text for text in texts]
            cut = yield Texts(heads)
            return [Example(np.array([*opened, *ids[:size], self.eos], dtype=np.int32)[:size]) for ids in cut]
        whole = yield Texts(texts)
        closed = [part for ids in whole for part in (opened, ids, self.closing)]
        stream = np.concatenate([self.rest, *closed])
        full = len(stream) // size * size
        self.rest = stream[full:].copy()
        return [Example(block) for block in stream[:full].reshape(-1, size)]

    def flush(self) -> list[Example]:
        rest, self.rest = self.rest, self.rest[:0]
        return [Example(rest)] if len(rest) >= 2 else []

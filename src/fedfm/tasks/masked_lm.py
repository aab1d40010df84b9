"""Masked language modelling.

Devlin, Chang, Lee, Toutanova, `BERT <https://arxiv.org/abs/1810.04805>`_, 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfm.core.batch import IGNORE, IntArray, Row
from fedfm.core.errors import ConfigError, ModelError
from fedfm.core.task import Encoder, Example, Examples, RawRow, Task, Vocabulary
from fedfm.core.tree import Tree
from fedfm.data.records import written_in
from fedfm.tasks.sequences import Steps, TextEncoder, Texts, language_metrics, require_length, texts_of


@dataclass(frozen=True)
class MaskedLM(Task):
    """Predicts tokens that were hidden: each with probability ``mask_probability``, drawn anew each time an example is used.

    Of those chosen 80 % become the mask token, 10 % a random token, 10 % stay. Special tokens are never chosen. Where chance would choose
    none, one is, so that every example has a target. With ``mask_probability=1`` every token is a target. The paper's code differs in
    choosing a fixed share of each sequence.

    Args:
        text: Column that holds the text.
        max_length: Tokens of an example with its special tokens, at least 3; longer texts are cut.
        mask_probability: In ``(0, 1]``.

    Raises:
        ConfigError: if a value is out of range.
    """

    text: str = "text"
    max_length: int = 128
    mask_probability: float = 0.15

    head = "masked_lm"

    def __post_init__(self) -> None:
        require_length(self, self.max_length, 3)
        if not 0 < self.mask_probability <= 1:
            raise ConfigError(f"{self!r}: mask_probability must be above 0 and at most 1.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row must have."""
        return (self.text,)

    def require(self, row: RawRow) -> None:
        """Refuses a row without text."""
        written_in(row, self.text)

    def encoder(self, tokenizer: Any) -> Encoder:
        """A fresh encoder for one owner.

        Raises:
            ModelError: if the tokenizer has no mask token.
        """
        return _Encoder(self, tokenizer)

    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[Row]:
        """Ids, some of them hidden; the targets are the hidden ids."""
        return [self._hide(examples.ids(i), examples.vocabulary, rng) for i in index.tolist()]

    def _hide(self, ids: IntArray, vocabulary: Vocabulary, rng: np.random.Generator) -> Row:
        assert vocabulary.mask is not None  # the encoder refused such a tokenizer
        words = np.flatnonzero(~np.isin(ids, vocabulary.special))
        chosen = words[rng.random(len(words)) < self.mask_probability]
        if not len(chosen):
            chosen = rng.choice(words, 1)
        roll = rng.random(len(chosen))
        inputs, targets = ids.astype(np.int64), np.full(len(ids), IGNORE, dtype=np.int64)
        targets[chosen] = ids[chosen]
        inputs[chosen[roll < 0.8]] = vocabulary.mask
        random = chosen[roll >= 0.9]
        inputs[random] = rng.integers(vocabulary.size, size=len(random))
        return Row(inputs, targets)

    def summarise(self, sums: Tree) -> dict[str, float]:
        """``loss``, ``perplexity``, ``token_accuracy``, of the hidden tokens."""
        return language_metrics(sums)


class _Encoder(TextEncoder):
    def __init__(self, task: MaskedLM, tokenizer: Any) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError(
                "MaskedLM needs a token that hides others, but the tokenizer has no mask_token. Use an encoder's, or CausalLM."
            )
        self.task, self.tokenizer, self.special = task, tokenizer, set(tokenizer.all_special_ids)

    def steps(self, rows: Sequence[RawRow]) -> Steps:
        encoded = yield Texts(texts_of(rows, self.task.text), special=True, max_length=self.task.max_length)
        examples = [Example(ids) for ids in encoded if not self.special.issuperset(ids.tolist())]
        self.dropped += len(rows) - len(examples)
        return examples

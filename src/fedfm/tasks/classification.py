"""Sequence classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedfm.core.batch import Batch, IntArray, Row
from fedfm.core.errors import ConfigError
from fedfm.core.task import Encoder, Example, Examples, RawRow, Scorer, Task
from fedfm.core.tree import Tree
from fedfm.data.records import name_in, text_in, unknown_label, written_in
from fedfm.tasks.sequences import Steps, TextEncoder, Texts, ratio, require_length, tokenize


@dataclass(frozen=True)
class Classification(Task):
    """Predicts one class for a text: ``-log p(label | text)``.

    Args:
        text: Column that holds the text.
        label: Column that holds the class, as text or a number.
        max_length: Tokens of an example with its special tokens, at least 2; longer texts are cut.
        labels: The classes in the order of their indices; ``None`` takes all that occur in training, sorted, or in the base's
            own order where its head tells the same classes.

    Raises:
        ConfigError: if a value is out of range or a class is named twice.
    """

    text: str = "text"
    label: str = "label"
    max_length: int = 128
    labels: tuple[str, ...] | None = None

    head = "sequence_classification"
    headline = "accuracy"
    lower_is_better = False

    def __post_init__(self) -> None:
        require_length(self, self.max_length, 2)
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ConfigError(f"{self!r}: labels must name two or more different classes.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row must have."""
        return (self.text, self.label)

    @property
    def label_column(self) -> str:
        """The column that holds a row's class."""
        return self.label

    def require(self, row: RawRow) -> None:
        """Refuses a row without text or label, or with a label that is not one of ``labels``."""
        written_in(row, self.text)
        label = name_in(row, self.label)
        if self.labels is not None and label not in self.labels:
            raise unknown_label(row, label, self.labels, "the task's labels")

    def encoder(self, tokenizer: Any) -> Encoder:
        """A fresh encoder for one owner."""
        return _Encoder(self, tokenizer)

    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[Row]:
        """Ids, and the class."""
        return [Row(examples.ids(i), np.array([examples.label(i)])) for i in index.tolist()]

    def stats(self, logits_pc: torch.Tensor, batch: Batch, owner_q: torch.Tensor, num_clients: int) -> dict[str, torch.Tensor]:
        """Adds, for each class, true positives, false positives and false negatives ``(K, C)``."""
        sums = super().stats(logits_pc, batch, owner_q, num_clients)
        guess_q, label_q, num_classes = logits_pc.argmax(-1), batch.targets["labels"], logits_pc.shape[-1]

        def count(class_q: torch.Tensor, one_q: torch.Tensor) -> torch.Tensor:
            zero = torch.zeros(num_clients * num_classes, dtype=torch.float64, device=owner_q.device)
            return zero.index_add(0, owner_q * num_classes + class_q, one_q.double()).view(num_clients, num_classes)

        wrong_q = guess_q != label_q
        return {**sums, "tp": count(label_q, ~wrong_q), "fp": count(guess_q, wrong_q), "fn": count(label_q, wrong_q)}

    def summarise(self, sums: Tree) -> dict[str, float]:
        """``loss``, ``accuracy`` and ``macro_f1``, the mean of ``2 tp / (2 tp + fp + fn)`` over the classes that occur or were guessed."""
        both_c = 2 * sums["tp"] + sums["fp"] + sums["fn"]
        f1_c = 2 * sums["tp"][both_c > 0] / both_c[both_c > 0]
        loss, accuracy = (ratio(sums[key], sums["targets"]) for key in ("loss", "hits"))
        return {"loss": loss, "accuracy": accuracy, "macro_f1": ratio(f1_c.sum(), len(f1_c))}

    def predictor(self, tokenizer: Any, labels: Sequence[str]) -> Scorer:
        """The likeliest class of a text, with its probability; the column of the class is not needed."""
        return _Guesser(self, tokenizer, labels)


class _Encoder(TextEncoder):
    def __init__(self, task: Classification, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer

    def steps(self, rows: Sequence[RawRow]) -> Steps:
        pairs = [(text_in(row, self.task.text), name_in(row, self.task.label)) for row in rows]
        used = [(words, label) for words, label in pairs if words.strip()]
        self.dropped += len(pairs) - len(used)
        encoded = yield Texts([words for words, _ in used], special=True, max_length=self.task.max_length)
        return [Example(ids, label=label) for ids, (_, label) in zip(encoded, used)]


class _Guesser(Scorer):
    answers = ("prediction", "probability")

    def __init__(self, task: Classification, tokenizer: Any, labels: Sequence[str]) -> None:
        self.task, self.tokenizer, self.labels = task, tokenizer, tuple(labels)
        self.columns = (task.text,)
        self.details = tuple(f"probability_{label}" for label in labels)

    def examples(self, row: RawRow) -> list[Example]:
        words = text_in(row, self.task.text)
        if not words.strip():
            return []
        return [Example(ids) for ids in tokenize(self.tokenizer, [words], special=True, max_length=self.task.max_length)]

    def measure(self, logits_pc: torch.Tensor, batch: Batch, owner_q: torch.Tensor, num_rows: int) -> dict[str, torch.Tensor]:
        p_pc = torch.softmax(logits_pc.double(), dim=-1)
        return {"probability": torch.zeros(num_rows, p_pc.shape[-1], dtype=p_pc.dtype, device=p_pc.device).index_add(0, owner_q, p_pc)}

    def answer(self, sums: Tree) -> dict[str, Any]:
        p_c = sums["probability"]
        if not p_c.isfinite().all():
            return {}
        best = int(p_c.argmax())
        return {"prediction": self.labels[best], "probability": float(p_c[best]), **dict(zip(self.details, p_c.tolist(), strict=True))}

"""A task with another loss and another input, as another package would write it: which of two texts is the better one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedfm.core.batch import Batch, IntArray, Row, Shaping
from fedfm.core.task import Encoder, Example, Examples, RawRow, Task
from fedfm.core.tree import Tree
from fedfm.data.sources import text_in
from fedfm.tasks.sequences import ratio, tokenize


@dataclass(frozen=True)
class Ranking(Task):
    """``-log sigmoid(s(better) - s(worse))`` with ``s`` the difference of a classifier's two logits: one loss from two rows.

    The model is told which half of a text a token is in.

    Args:
        better: Column that holds the better text.
        worse: Column that holds the other.
        max_length: Tokens of both together.
    """

    better: str = "better"
    worse: str = "worse"
    max_length: int = 32

    head = "sequence_classification"
    labels = ("worse", "better")

    @property
    def columns(self) -> tuple[str, ...]:
        return self.better, self.worse

    def encoder(self, tokenizer: Any) -> Encoder:
        return _Encoder(self, tokenizer)

    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[Row]:
        """The better text's row, and the worse one's."""
        rows = []
        for i in index.tolist():
            for ids in np.split(examples.ids(i), [examples.start(i)]):
                half = (np.arange(len(ids)) >= len(ids) // 2).astype(np.int64)
                rows.append(Row(ids, np.array([1]), {"token_type_ids": half}))
        return rows

    def batch(self, parts: Sequence[Sequence[Row]], shaping: Shaping) -> Batch:
        """One loss for each pair of rows."""
        batch = super().batch(parts, shaping)
        return replace(batch, row_q=batch.row_q[::2], owner_q=batch.owner_q[::2], targets={})

    def losses(self, logits_pc: torch.Tensor, batch: Batch) -> torch.Tensor:
        score_q2 = (logits_pc[:, 1] - logits_pc[:, 0]).float().view(-1, 2)
        return -torch.nn.functional.logsigmoid(score_q2[:, 0] - score_q2[:, 1])

    def stats(self, logits_pc: torch.Tensor, batch: Batch, owner_q: torch.Tensor, num_clients: int) -> dict[str, torch.Tensor]:
        """The better text is found where the loss is below that of a tie."""
        loss_q = self.losses(logits_pc, batch).double()
        zero = torch.zeros(num_clients, dtype=torch.float64, device=owner_q.device)
        values = {"loss": loss_q, "hits": (loss_q < math.log(2)).double(), "targets": torch.ones_like(loss_q)}
        return {name: zero.index_add(0, owner_q, value_q) for name, value_q in values.items()}

    def summarise(self, sums: Tree) -> dict[str, float]:
        return {"loss": ratio(sums["loss"], sums["targets"]), "accuracy": ratio(sums["hits"], sums["targets"])}


class _Encoder(Encoder):
    def __init__(self, task: Ranking, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer

    def add(self, rows: Sequence[RawRow]) -> list[Example]:
        texts = [text_in(row, column) for row in rows for column in self.task.columns]
        ids = [np.array(own, dtype=np.int32) for own in tokenize(self.tokenizer, texts, True, self.task.max_length // 2)]
        return [Example(np.concatenate(pair), start=len(pair[0])) for pair in zip(ids[::2], ids[1::2], strict=True)]

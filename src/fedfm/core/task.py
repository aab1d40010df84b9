"""What is learned, and the batches it is learned from.

A task turns rows into token sequences once (:meth:`Task.encoder`), and sequences into inputs and
targets each time they are used (:meth:`Task.rows`). Every task is the same to the trainer:
logits at some positions, a class for each of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from fedfm.core.parts import Part
from fedfm.core.tree import Tree

IGNORE = -100
Row = Mapping[str, Any]
Head = Literal["causal_lm", "masked_lm", "sequence_classification"]
IntArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Example:
    """One sequence.

    Args:
        ids: Token ids ``(n,)``.
        start: Index of the first token that is a target (a prompt before it is not).
        label: Its class, for classification.
    """

    ids: IntArray
    start: int = 0
    label: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """What a task must know of a tokenizer once text is ids.

    Args:
        size: Ids are below it.
        special: Ids that are not text.
        mask: The mask token's id; ``None`` where there is none.
    """

    size: int
    special: tuple[int, ...] = ()
    mask: int | None = None


class Examples(Protocol):
    """An owner's encoded sequences; may live on disk."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer that made the ids."""
        ...

    def __len__(self) -> int: ...
    @property
    def lengths(self) -> IntArray:
        """Tokens of each ``(N,)``."""
        ...

    def ids(self, i: int) -> IntArray:
        """Token ids of example ``i``, ``(n,)``."""
        ...

    def start(self, i: int) -> int:
        """Its first target."""
        ...

    def label(self, i: int) -> int:
        """Its class, an index into the task's labels; -1 where there is none."""
        ...


class Encoder(ABC):
    """Rows of one owner, as they stream in, to examples.

    Attributes:
        dropped: Rows so far that gave nothing to learn from (empty text, no target left).
    """

    dropped: int = 0

    @abstractmethod
    def add(self, rows: Sequence[Row]) -> list[Example]:
        """Examples completed by these rows.

        Raises:
            DataError: naming the column that is missing or has the wrong type.
        """

    def flush(self) -> list[Example]:
        """What is left at the end."""
        return []


class Task(Part, ABC):
    """What is learned.

    Attributes:
        head: What the model ends in.
        max_length: Tokens of the longest sequence it makes.
        labels: The classes, where the recipe names them; ``None`` takes them from the data.
    """

    room = "tasks"
    head: ClassVar[Head] = "causal_lm"
    max_length: int
    labels: tuple[str, ...] | None = None

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that a row must have."""

    @property
    def label_column(self) -> str | None:
        """The column that holds a row's class, for tasks and partitioners that need one."""
        return None

    @abstractmethod
    def encoder(self, tokenizer: Any) -> Encoder:
        """A fresh encoder for one owner. ``tokenizer`` is a ``PreTrainedTokenizerFast``."""

    @abstractmethod
    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[tuple[IntArray, IntArray]]:
        """Inputs and targets of the examples at ``index``.

        Each input is ``(n,)``; its targets are ``(n,)`` aligned to positions (:data:`IGNORE` where nothing is asked,
        shifted already for causal tasks), or ``(1,)`` for a sequence's class.
        """

    def stats(self, logits_pc: torch.Tensor, target_p: torch.Tensor, owner_p: torch.Tensor, num_clients: int) -> dict[str, torch.Tensor]:
        """Sums per client, float64 ``(K, ...)``, from which :meth:`summarise` makes metrics. Sums of sums mean pooled."""
        loss_p = torch.nn.functional.cross_entropy(logits_pc.float(), target_p, reduction="none").double()
        hit_p = (logits_pc.argmax(-1) == target_p).double()
        zero = torch.zeros(num_clients, dtype=torch.float64, device=owner_p.device)
        return {
            "loss": zero.index_add(0, owner_p, loss_p),
            "hits": zero.index_add(0, owner_p, hit_p),
            "targets": zero.index_add(0, owner_p, torch.ones_like(hit_p)),
        }

    def no_stats(self, num_clients: int, classes: int = 2, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """The sums of nothing."""
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return self.stats(torch.zeros(0, max(classes, 1), device=device), nothing, nothing, num_clients)

    @abstractmethod
    def summarise(self, sums: Tree) -> dict[str, float]:
        """Metrics from sums of one client or pooled (no client axis); always has ``loss``. NaN where nothing was evaluated."""


@dataclass
class Batch:
    """Rows of K clients, ``R`` each, client after client; unused rows have no targets.

    Args:
        input_ids: ``(K*R, L)``.
        attention_mask: ``(K*R, L)``, 1 for tokens; ``None`` where padding on the right cannot be seen (causal models).
        position_p: Where logits are asked: indices into ``K*R*L``; ``None`` asks once per row with a target (``row_p``).
        row_p: Row of each target.
        target_p: Class of each.
        owner_p: Client (0..K-1) of each.
        num_clients: K.
        lengths: Longest row of each client ``(K,)``; what lies beyond in its rows is padding.
        real_rows: Rows in use of each client ``(K,)``.
        num_tokens: Tokens that are not padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_p: torch.Tensor | None
    row_p: torch.Tensor
    target_p: torch.Tensor
    owner_p: torch.Tensor
    num_clients: int
    lengths: IntArray
    real_rows: IntArray
    num_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        if device.type == "cpu":
            return self
        move = partial(torch.Tensor.to, device=device, non_blocking=device.type == "cuda")
        return replace(
            self,
            input_ids=move(self.input_ids),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
            position_p=None if self.position_p is None else move(self.position_p),
            row_p=move(self.row_p),
            target_p=move(self.target_p),
            owner_p=move(self.owner_p),
        )

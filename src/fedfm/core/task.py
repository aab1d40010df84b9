"""What is learned, and the batches it is learned from.

A task turns an owner's rows into token sequences once (:meth:`Task.encoder`), sequences into rows of a batch each
time they are used (:meth:`Task.rows`), and rows into named tensors (:meth:`Task.batch`). It owns its loss
(:meth:`Task.losses`): to a trainer every task is logits at some places, and a loss for each target. What it answers
for a row that is not trained on is a :class:`Predictor`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch

from fedfm.core.batch import Batch, IntArray, Row, Shaping, collate
from fedfm.core.errors import ConfigError, RowError
from fedfm.core.parts import Part
from fedfm.core.tree import Tree
from fedfm.core.words import Metric

RawRow = Mapping[str, Any]
Head = Literal["causal_lm", "masked_lm", "sequence_classification"]
SQUARES = ("loss_squares", "loss_targets", "target_squares")
"""Sums over rows of ``y^2``, ``x y`` and ``x^2``, ``y`` a row's loss and ``x`` its targets: the standard error of a sample needs them."""


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


def tokenizer_words(tokenizer: Any) -> list[Any]:
    """What a tokenizer is made of, as JSON."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The last call left these; they are no part of the tokenizer.
    backend.update(truncation=None, padding=None)
    return [backend, tokenizer.special_tokens_map, tokenizer.chat_template]


class Examples(Protocol):
    """An owner's encoded sequences; may live on disk."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the tokenizer that made the ids."""
        ...

    def __len__(self) -> int: ...
    @property
    def lengths(self) -> IntArray:
        """Number of tokens of each example ``(N,)``."""
        ...

    def ids(self, i: int) -> IntArray:
        """Token ids of example ``i``, ``(n,)``."""
        ...

    def start(self, i: int) -> int:
        """Index of the first target of example ``i``."""
        ...

    def label(self, i: int) -> int:
        """Class of example ``i``, an index into the task's labels; -1 where there is none."""
        ...


class Encoder(ABC):
    """Rows of one owner, as they stream in, to examples.

    Attributes:
        dropped: Rows so far that gave nothing to learn from (empty text, no target left).
    """

    dropped: int = 0

    @abstractmethod
    def add(self, rows: Sequence[RawRow]) -> list[Example]:
        """Examples completed by these rows.

        Raises:
            DataError: naming the column that is missing or has the wrong type.
        """

    @classmethod
    def add_all(cls, work: Sequence[tuple[Self, Sequence[RawRow]]]) -> list[list[Example]]:
        """What :meth:`add` gives for each encoder and its rows, in that order. The owners of the encoders differ.

        Raises:
            DataError: as :meth:`add` does.
        """
        return [encoder.add(rows) for encoder, rows in work]

    def flush(self) -> list[Example]:
        """Examples that remain after the last row."""
        return []


class Predictor(ABC):
    """What a task answers for one row, whose truth need not be there.

    Attributes:
        columns: Columns that a row must have.
        answers: Columns of an answer, in order.
        details: Columns that an answer has too, written where they are asked for.
    """

    columns: tuple[str, ...]
    answers: tuple[str, ...]
    details: tuple[str, ...] = ()


class Scorer(Predictor):
    """Answers made of the model's logits."""

    @abstractmethod
    def examples(self, row: RawRow) -> list[Example]:
        """Examples of one row; none where it holds nothing to answer.

        Raises:
            DataError: naming the column that is missing or has the wrong type.
        """

    @abstractmethod
    def measure(self, logits_pc: torch.Tensor, batch: Batch, owner_q: torch.Tensor, num_rows: int) -> dict[str, torch.Tensor]:
        """Sums per row of the file ``(num_rows, ...)`` in float64; sums of several batches are added.

        Args:
            owner_q: The row of the file to which each loss belongs.
        """

    @abstractmethod
    def answer(self, sums: Tree) -> dict[str, Any]:
        """The answer for one row from its sums, a value for each column; empty where the model gives no number."""


class Writer(Predictor):
    """Answers that the model writes."""

    @abstractmethod
    def prompt(self, row: RawRow, room: int | None) -> IntArray:
        """What the model reads before it answers ``(n,)``; empty where there is nothing to answer.

        Args:
            room: Most tokens that it may have; ``None`` for any number.

        Raises:
            DataError: naming the column that is missing or has the wrong type, or if the prompt is too long and may not be cut.
        """

    @abstractmethod
    def answer(self, text: str) -> dict[str, Any]:
        """The answer for one row from what the model wrote."""


class Task(Part, ABC):
    """What is learned.

    Attributes:
        head: What the model ends in.
        max_length: Tokens of the longest sequence it makes.
        labels: The classes, where the recipe names them; ``None`` takes them from the data.
        headline: The metric of :meth:`summarise` that leads wherever results are shown.
        lower_is_better: Direction of the headline.
    """

    room = "tasks"
    headline: ClassVar[str] = "loss"
    lower_is_better: ClassVar[bool] = True
    head: ClassVar[Head] = "causal_lm"
    max_length: int
    labels: tuple[str, ...] | None = None

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that a row must have."""

    @property
    def metric(self) -> Metric:
        """The headline with its direction."""
        return Metric(self.headline, self.lower_is_better)

    @property
    def example_is_row(self) -> bool:
        """Whether each example is made of one row, and no row is in two: then what hides an example hides a row."""
        return True

    @property
    def label_column(self) -> str | None:
        """The column that holds a row's class, for tasks and partitioners that need one."""
        return None

    def require(self, row: RawRow) -> None:
        """Refuses a row that this task cannot use. Asked of each row before its owner gets it, so that ``data.bad_rows`` can count it.

        A task says here all that its encoder would refuse; this default looks at the columns alone.

        Raises:
            RowError: telling what is wrong, of which kind, and where.
        """
        for column in self.columns:
            if column not in row:
                place = getattr(row, "where", "a row")
                raise RowError(f"{place} has no column {column!r}. Its columns: {', '.join(row)}.", "column", place)

    @abstractmethod
    def encoder(self, tokenizer: Any) -> Encoder:
        """A fresh encoder for one owner. ``tokenizer`` is a ``PreTrainedTokenizerFast``."""

    @abstractmethod
    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[Row]:
        """Rows of the examples at ``index``, in that order; one example may give several.

        What is drawn from ``rng`` is drawn for one example after the other, so that a batch may be cut between any two. Targets of a causal
        task are shifted already.
        """

    def batch(self, parts: Sequence[Sequence[Row]], shaping: Shaping) -> Batch:
        """One batch from the rows of K clients, all rows of an example included; ``parts`` may be empty."""
        return collate(parts, shaping)

    def losses(self, logits_pc: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of each target ``(Q,)``, from the logits at the batch's picks; cross-entropy unless the task says otherwise."""
        return torch.nn.functional.cross_entropy(logits_pc.float(), batch.targets["labels"], reduction="none")

    def stats(self, logits_pc: torch.Tensor, batch: Batch, owner_q: torch.Tensor, num_clients: int) -> dict[str, torch.Tensor]:
        """Sums per client, float64 ``(K, ...)``, from which :meth:`summarise` makes metrics. Their sum over clients gives the pooled metrics.

        Args:
            owner_q: The owner of each loss. It may differ from ``batch.owner_q``: many owners may share a client's place in the batch.
        """
        loss_q = self.losses(logits_pc, batch).double()
        hit_q = (logits_pc.argmax(-1) == batch.targets["labels"]).double()
        zero = torch.zeros(num_clients, dtype=torch.float64, device=owner_q.device)
        return {
            "loss": zero.index_add(0, owner_q, loss_q),
            "hits": zero.index_add(0, owner_q, hit_q),
            "targets": zero.index_add(0, owner_q, torch.ones_like(hit_q)),
            **_squares(loss_q, batch, owner_q, num_clients),
        }

    def no_stats(self, num_clients: int, classes: int = 2, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """The sums where there is no target."""
        empty = self.batch([[]], Shaping(per_row=self.head == "sequence_classification")).to(torch.device(device))
        return self.stats(torch.zeros(0, max(classes, 1), device=device), empty, empty.owner_q, num_clients)

    @abstractmethod
    def summarise(self, sums: Tree) -> dict[str, float]:
        """Metrics from sums of one client or pooled (no client axis); always has ``loss``. NaN where nothing was evaluated."""

    def predictor(self, tokenizer: Any, labels: Sequence[str]) -> Predictor:
        """Answers for the rows of a file; unless the task says otherwise, each row's own metrics.

        Args:
            labels: The classes, in the order of their indices.
        """
        return RowMetrics(self, tokenizer)

    def opening(self, tokenizer: Any, text: str) -> IntArray:
        """Ids ``(n,)`` that the model reads before it writes: ``text`` as in training, in the task's template where it has one.

        Raises:
            ConfigError: if the task's model does not write text.
        """
        raise ConfigError(
            f"This run's task is {type(self).__name__}, whose model does not write text; generate needs CausalLM or Instruct."
        )


class RowMetrics(Scorer):
    """The metrics of a row, as if it were all that is evaluated; ``targets`` counts what they are the mean of.

    The sums of rows add up: the mean of ``loss`` weighted by ``targets`` is the pooled loss of the same examples.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self.task, self.tokenizer, self.columns = task, tokenizer, task.columns
        nothing = {name: value[0] for name, value in task.no_stats(1).items()}
        self.answers = (*task.summarise(nothing), *(["targets"] if "targets" in nothing else []))

    def examples(self, row: RawRow) -> list[Example]:
        """The examples that the task's encoder makes of this row alone."""
        encoder = self.task.encoder(self.tokenizer)
        return [*encoder.add([row]), *encoder.flush()]

    def measure(self, logits_pc: torch.Tensor, batch: Batch, owner_q: torch.Tensor, num_rows: int) -> dict[str, torch.Tensor]:
        """The task's own sums."""
        return self.task.stats(logits_pc, batch, owner_q, num_rows)

    def answer(self, sums: Tree) -> dict[str, Any]:
        """The task's own metrics."""
        metrics = self.task.summarise(sums)
        if not math.isfinite(metrics["loss"]):
            return {}
        return {**metrics, **({"targets": int(sums["targets"])} if "targets" in sums else {})}


def _squares(loss_q: torch.Tensor, batch: Batch, owner_q: torch.Tensor, num_clients: int) -> dict[str, torch.Tensor]:
    """:data:`SQUARES` of each client, float64 ``(K,)``. The targets of a row depend on each other, so a row is the unit."""
    rows = batch.shape[0]
    zero_r, zero_k = (torch.zeros(n, dtype=torch.float64, device=owner_q.device) for n in (rows, num_clients))
    y_r = zero_r.index_add(0, batch.row_q, loss_q)
    x_r = zero_r.index_add(0, batch.row_q, torch.ones_like(loss_q))
    owner_r = torch.zeros(rows, dtype=owner_q.dtype, device=owner_q.device).index_copy(0, batch.row_q, owner_q)
    products = (y_r * y_r, x_r * y_r, x_r * x_r)
    return {name: zero_k.index_add(0, owner_r, product_r) for name, product_r in zip(SQUARES, products, strict=True)}

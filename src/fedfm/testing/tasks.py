"""What every task must do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedfm.core.errors import DataError
from fedfm.core.keys import Key
from fedfm.core.task import IGNORE, Example, IntArray, Row, Task, Vocabulary
from fedfm.testing.parts import check_part
from fedfm.testing.tiny import Memory


def check_task(task: Task, rows: Sequence[Row], tokenizer: Any) -> None:
    """Rows become the same examples however they stream in, examples the inputs and targets that the key decides, and sums of metrics add up.

    Args:
        rows: At least three rows that the task can use, with the columns it names.
        tokenizer: A ``PreTrainedTokenizerFast``.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(task)
    name = type(task).__name__
    examples = _encode(task, rows, tokenizer, len(rows))
    assert len(examples) and all(_same(a, b) for a, b in zip(examples, _encode(task, rows, tokenizer, 1), strict=True)), (
        f"{name}: examples depend on how the rows stream in"
    )
    for example in examples:
        assert 0 < len(example.ids) <= task.max_length, f"{name}: an example of {len(example.ids)} tokens; max_length is {task.max_length}"
        assert 0 <= example.start < len(example.ids), f"{name}: the first target {example.start} is not among {len(example.ids)} tokens"
        assert min(example.ids) >= 0 and max(example.ids) < len(tokenizer), f"{name}: ids that the tokenizer does not have"
    for column in task.columns:
        assert column in rows[0], f"{name} needs a column {column!r} that the suite's rows do not have"
        try:
            task.encoder(tokenizer).add([{key: value for key, value in rows[0].items() if key != column}])
        except DataError as error:
            assert repr(column) in str(error), f"{name}: the missing column {column!r} is not named: {error}"
        else:
            raise AssertionError(f"{name} takes a row without its column {column!r}")

    labels = sorted({example.label for example in examples if example.label is not None})
    memory = Encoded(examples, tokenizer, labels)
    _check_rows(name, task, memory, len(labels) if task.head == "sequence_classification" else len(tokenizer))
    _check_metrics(name, task)


def _encode(task: Task, rows: Sequence[Row], tokenizer: Any, chunk: int) -> list[Example]:
    encoder = task.encoder(tokenizer)
    found = [example for first in range(0, len(rows), chunk) for example in encoder.add(rows[first : first + chunk])]
    return found + encoder.flush()


def _same(a: Example, b: Example) -> bool:
    return np.array_equal(a.ids, b.ids) and (a.start, a.label) == (b.start, b.label)


class Encoded(Memory):
    """What a task's encoder made.

    Args:
        labels: The classes, in the order of their indices.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Any, labels: Sequence[str] = ()) -> None:
        super().__init__(
            [example.ids for example in examples],
            [example.start for example in examples],
            [labels.index(example.label) if example.label is not None else -1 for example in examples],
        )
        self.vocabulary = Vocabulary(len(tokenizer), tuple(tokenizer.all_special_ids), tokenizer.mask_token_id)


def _check_rows(name: str, task: Task, examples: Memory, classes: int) -> None:
    index = np.arange(len(examples))
    before = [examples.ids(i).copy() for i in range(len(examples))]
    found = task.rows(examples, index, Key.root(1).numpy())
    assert all(np.array_equal(examples.ids(i), own) for i, own in enumerate(before)), f"{name}.rows changed the examples"
    assert len(found) == len(index), f"{name}.rows gives {len(found)} rows for {len(index)} examples"
    for (ids, targets), own in zip(found, before, strict=True):
        assert len(ids) == len(own), f"{name}: an input of {len(ids)} tokens from an example of {len(own)}"
        expected = 1 if task.head == "sequence_classification" else len(ids)
        assert len(targets) == expected, f"{name}: {len(targets)} targets for {expected} places"
        asked = targets[targets != IGNORE]
        assert len(asked) and asked.min() >= 0 and asked.max() < classes, f"{name}: targets {asked}, of {classes} classes"
    again = task.rows(examples, index, Key.root(1).numpy())
    assert all(_equal(a, b) for a, b in zip(found, again, strict=True)), f"{name}.rows is not decided by the key"


def _equal(a: tuple[IntArray, IntArray], b: tuple[IntArray, IntArray]) -> bool:
    return np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def _check_metrics(name: str, task: Task) -> None:
    generator = Key.root(0).fold("check_task").generator()
    logits_pc = torch.randn(40, 5, generator=generator)
    target_p, owner_p = torch.randint(5, (40,), generator=generator), torch.randint(2, (40,), generator=generator)
    whole = task.stats(logits_pc, target_p, owner_p, 3)
    assert all(x.dtype == torch.float64 and x.shape[0] == 3 for x in whole.values()), f"{name}.stats are not float64 sums per client"
    parts = [task.stats(logits_pc[s], target_p[s], owner_p[s], 3) for s in (slice(0, 13), slice(13, 40))]
    assert all(torch.allclose(whole[x], parts[0][x] + parts[1][x], rtol=1e-12) for x in whole), f"{name}.stats do not add up over batches"
    assert not any(x[2].any() for x in whole.values()), f"{name}.stats: a client without targets has some"
    pooled = task.summarise({x: value.sum(0) for x, value in whole.items()})
    assert "loss" in pooled and all(math.isfinite(value) for value in pooled.values()), f"{name}.summarise gives {pooled}"
    only = torch.nn.functional.cross_entropy(logits_pc, target_p).item()
    assert math.isclose(pooled["loss"], only, rel_tol=1e-5), f"{name}: the pooled loss is {pooled['loss']}, the mean over targets {only}"
    nobody = task.summarise({x: value[2] for x, value in whole.items()})
    assert all(math.isnan(value) for value in nobody.values()), f"{name}.summarise makes {nobody} of nothing"

"""What every task must do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fedfm.core.bad_rows import KINDS
from fedfm.core.batch import Batch, Row, Shaping
from fedfm.core.errors import DataError, RowError
from fedfm.core.keys import Key
from fedfm.core.task import Example, RawRow, Scorer, Task, Vocabulary, Writer
from fedfm.testing.parts import check_part
from fedfm.testing.tiny import Memory


def check_task(task: Task, rows: Sequence[RawRow], tokenizer: Any) -> None:
    """Rows become the same examples however they stream in, examples the rows that the key decides; there is one finite loss for each target, its
    client's and nobody else's, and sums of metrics add up. An answer for a row has the columns that are declared, and does not depend on other rows.

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
    _check_together(task, rows, tokenizer)
    for example in examples:
        assert 0 < len(example.ids) <= task.max_length, f"{name}: an example of {len(example.ids)} tokens; max_length is {task.max_length}"
        assert 0 <= example.start < len(example.ids), f"{name}: the first target {example.start} is not among {len(example.ids)} tokens"
        assert min(example.ids) >= 0 and max(example.ids) < len(tokenizer), f"{name}: ids that the tokenizer does not have"
    for row in rows:
        task.require(row)
    for column in task.columns:
        assert column in rows[0], f"{name} needs a column {column!r} that the suite's rows do not have"
        without = {key: value for key, value in rows[0].items() if key != column}
        _check_refused(f"{name}'s encoder", task.encoder(tokenizer).add, [without], column)
        _check_refused(f"{name}.require", task.require, without, column)

    labels = sorted({example.label for example in examples if example.label is not None})
    memory = Encoded(examples, tokenizer, labels)
    classes = max(len(labels), 2) if task.head == "sequence_classification" else len(tokenizer)
    _check_rows(name, task, memory)
    _check_losses(name, task, memory, classes)
    _check_predictor(name, task, rows, tokenizer, labels or [str(i) for i in range(classes)])


def _check_refused(what: str, take: Callable[[Any], object], row: object, column: str) -> None:
    try:
        take(row)
    except RowError as error:
        assert repr(column) in str(error), f"{what} does not name the missing column {column!r}: {error}"
        assert error.kind in KINDS, f"{what} tells of a fault of the kind {error.kind!r}; known are {', '.join(KINDS)}"
    else:
        raise AssertionError(f"{what} takes a row without its column {column!r}")


def _encode(task: Task, rows: Sequence[RawRow], tokenizer: Any, chunk: int) -> list[Example]:
    encoder = task.encoder(tokenizer)
    examples = [example for first in range(0, len(rows), chunk) for example in encoder.add(rows[first : first + chunk])]
    return examples + encoder.flush()


def _check_together(task: Task, rows: Sequence[RawRow], tokenizer: Any) -> None:
    """Owners whose rows are encoded at once have the examples that each would have alone."""
    turned = list(reversed(rows))
    encoders = [task.encoder(tokenizer), task.encoder(tokenizer)]
    together = type(encoders[0]).add_all([(encoders[0], rows), (encoders[1], turned)])
    for encoder, examples, own in zip(encoders, together, (rows, turned), strict=True):
        alone = _encode(task, own, tokenizer, len(own))
        both = [*examples, *encoder.flush()]
        assert len(both) == len(alone) and all(map(_same, both, alone)), (
            f"{type(task).__name__}: an owner's examples depend on whose rows are encoded with them"
        )


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


def _check_rows(name: str, task: Task, examples: Memory) -> None:
    index = np.arange(len(examples))
    before = [examples.ids(i).copy() for i in range(len(examples))]
    rows = task.rows(examples, index, Key.root(1).numpy())
    assert all(np.array_equal(examples.ids(i), ids) for i, ids in enumerate(before)), f"{name}.rows changed the examples"
    assert len(rows) >= len(index), f"{name}.rows gives {len(rows)} rows for {len(index)} examples"
    for row in rows:
        assert 0 < len(row.ids) <= task.max_length, f"{name}: a row of {len(row.ids)} tokens; max_length is {task.max_length}"
        assert row.extra.keys() == rows[0].extra.keys(), f"{name}: rows with different inputs, {set(row.extra)} and {set(rows[0].extra)}"
        unaligned = [what for what, x in row.extra.items() if len(x) != len(row.ids)]
        assert not unaligned, f"{name}: {unaligned} do not have a value for each of {len(row.ids)} tokens"
    again = task.rows(examples, index, Key.root(1).numpy())
    assert len(again) == len(rows) and all(map(_equal, rows, again)), f"{name}.rows is not decided by the key"
    rng = Key.root(1).numpy()
    single = [row for i in index for row in task.rows(examples, np.array([i]), rng)]
    assert len(single) == len(rows) and all(map(_equal, rows, single)), f"{name}.rows does not draw for one example after the other"


def _equal(a: Row, b: Row) -> bool:
    extra = a.extra.keys() == b.extra.keys() and all(np.array_equal(x, b.extra[what]) for what, x in a.extra.items())
    return extra and np.array_equal(a.ids, b.ids) and np.array_equal(a.targets, b.targets)


def _check_batch(name: str, batch: Batch, classes: int) -> None:
    rows, length = batch.shape
    num = rows // batch.num_clients
    assert batch.inputs and all(len(x) == rows for x in batch.inputs.values()), f"{name}.batch: not every input has {rows} rows"
    assert len(batch.pick_p) and batch.pick_p.min() >= 0 and batch.pick_p.max() < (rows if batch.per_row else rows * length), (
        f"{name}.batch asks for logits at {batch.pick_p}, of {batch.shape} places"
    )
    assert torch.equal(batch.owner_q, batch.row_q // num), f"{name}.batch: a loss is not its row's client's"
    assert len(batch.lengths) == len(batch.real_rows) == batch.num_clients, f"{name}.batch does not count rows and lengths for each client"
    assert batch.real_rows.max() <= num and 0 < batch.num_tokens <= batch.num_slots, f"{name}.batch counts more than it holds"
    labels = batch.targets.get("labels", torch.zeros(1, dtype=torch.int64))
    assert labels.min() >= 0 and labels.max() < classes, f"{name}: targets {labels}, of {classes} classes"


def _check_losses(name: str, task: Task, examples: Memory, classes: int) -> None:
    shaping = Shaping(causal=task.head == "causal_lm", per_row=task.head == "sequence_classification")
    halves = np.array_split(np.arange(len(examples)), 2)
    rows = [task.rows(examples, index, Key.root(1).numpy()) for index in halves]
    batch = task.batch([*rows, []], shaping)
    _check_batch(name, batch, classes)
    logits_pc = torch.randn(len(batch.pick_p), classes, generator=Key.root(0).fold("check_task").generator())
    loss_q = task.losses(logits_pc, batch)
    assert loss_q.shape == batch.owner_q.shape and loss_q.isfinite().all(), (
        f"{name}.losses gives {tuple(loss_q.shape)} for {len(batch.owner_q)} targets, finite: {loss_q.isfinite().all()}"
    )
    counts = torch.bincount(batch.owner_q, minlength=3).tolist()
    assert min(counts[:2]) > 0 and counts[2] == 0, f"{name}: {counts} losses of two clients with examples and one without"

    whole = task.stats(logits_pc, batch, batch.owner_q, 3)
    assert all(x.dtype == torch.float64 and x.shape[0] == 3 for x in whole.values()), f"{name}.stats are not float64 sums per client"
    # The same examples one by one: batches of their own, whose logits are where theirs were.
    first, sums = 0, task.no_stats(3, classes)
    assert all(not x.any() and x.shape == whole[what].shape for what, x in sums.items()), f"{name}.no_stats are not the sums of nothing"
    for owner, index in enumerate(halves):
        rng = Key.root(1).numpy()
        for i in index:
            part = task.batch([task.rows(examples, np.array([i]), rng)], shaping)
            last = first + len(part.pick_p)
            stats = task.stats(logits_pc[first:last], part, torch.full_like(part.owner_q, owner), 3)
            first, sums = last, {what: sums[what] + x for what, x in stats.items()}
    assert first == len(logits_pc), f"{name}: examples ask for {first} logits one by one and for {len(logits_pc)} together"
    assert all(torch.allclose(whole[x], sums[x], rtol=1e-5) for x in whole), f"{name}.stats do not add up over batches"
    assert not any(x[2].any() for x in whole.values()), f"{name}.stats: a client without targets has some"
    pooled = task.summarise({x: value.sum(0) for x, value in whole.items()})
    assert "loss" in pooled and all(math.isfinite(value) for value in pooled.values()), f"{name}.summarise gives {pooled}"
    assert task.headline in pooled, f"{name}: its headline {task.headline!r} is not among the metrics {set(pooled)}"
    mean = loss_q.double().mean().item()
    assert math.isclose(pooled["loss"], mean, rel_tol=1e-5), f"{name}: the pooled loss is {pooled['loss']}, the mean over targets {mean}"
    nobody = task.summarise({x: value[2] for x, value in whole.items()})
    assert all(math.isnan(value) for value in nobody.values()), f"{name}.summarise makes {nobody} of nothing"


def _check_predictor(name: str, task: Task, rows: Sequence[RawRow], tokenizer: Any, labels: Sequence[str]) -> None:
    predictor = task.predictor(tokenizer, labels)
    named = [*predictor.answers, *predictor.details]
    assert predictor.answers and len(set(named)) == len(named), f"{name}: its answers have the columns {named}"
    assert isinstance(predictor, Scorer | Writer), f"{name}: its predictor is neither a Scorer nor a Writer"
    ask: Callable[[RawRow], Any] = predictor.examples if isinstance(predictor, Scorer) else partial(predictor.prompt, room=None)
    for column in predictor.columns:
        try:
            ask({key: value for key, value in rows[0].items() if key != column})
        except DataError as error:
            assert repr(column) in str(error), f"{name}: the missing column {column!r} is not named: {error}"
        else:
            raise AssertionError(f"{name} answers for a row without its column {column!r}")
    # What is known only of training rows is not needed.
    asked = [{column: row[column] for column in predictor.columns} for row in rows]
    if isinstance(predictor, Writer):
        for row in asked:
            ids = predictor.prompt(row, None)
            assert len(ids) and min(ids) >= 0 and max(ids) < len(tokenizer), f"{name}: ids that the tokenizer does not have"
        assert tuple(predictor.answer("text")) == predictor.answers, f"{name}: an answer has other columns than {predictor.answers}"
        return
    _check_scores(name, task, predictor, [Encoded(predictor.examples(row), tokenizer) for row in asked], len(labels))


def _check_scores(name: str, task: Task, scorer: Scorer, sets: Sequence[Memory], classes: int) -> None:
    shaping = Shaping(causal=task.head == "causal_lm", per_row=task.head == "sequence_classification")
    classes = classes if shaping.per_row else sets[0].vocabulary.size
    parts = [task.rows(own, np.arange(len(own)), Key.root(i).numpy()) for i, own in enumerate(sets)]
    owners = torch.tensor([i for i, part in enumerate(parts) for _ in part])
    batch = task.batch([[row for part in parts for row in part]], shaping)
    logits_pc = torch.randn(len(batch.pick_p), classes, generator=Key.root(0).fold("check_scores").generator())
    together = scorer.measure(logits_pc, batch, owners[batch.row_q], len(sets))
    first = 0
    for i, part in enumerate(parts):
        one = task.batch([part], shaping)
        last = first + len(one.pick_p)
        alone = scorer.measure(logits_pc[first:last], one, torch.zeros_like(one.owner_q), 1)
        first = last
        for what, x in together.items():
            assert x.dtype == torch.float64, f"{name}: the sums {what!r} of an answer are not float64"
            assert torch.allclose(x[i], alone[what][0], rtol=1e-5), f"{name}: the answer for a row depends on the rows beside it ({what})"
        answer = scorer.answer({what: x[i] for what, x in together.items()})
        named = {*scorer.answers, *scorer.details}
        assert set(answer) == named, f"{name}: an answer has the columns {sorted(answer)}, declared are {sorted(named)}"
    nan = {what: torch.full_like(x[0], math.nan) for what, x in together.items()}
    assert scorer.answer(nan) == {}, f"{name} makes an answer of numbers that are none"

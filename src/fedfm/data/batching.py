"""Which examples a client takes in which step, and the batch that K clients share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from fedfm.core.keys import Key
from fedfm.core.parts import Work
from fedfm.core.task import IGNORE, Batch, Examples, IntArray


def plan(examples: Examples, work: Work, key_client: Key, key_round: Key) -> list[IntArray]:
    """The examples of each optimizer step of one client in one round, ``batch_size * accumulate`` of them.

    A shuffle is cut into steps, of which one may be short; ``epochs`` takes whole shuffles, ``steps`` as much of the next shuffle as it
    needs. With examples of unequal length each shuffle is sorted by length before it is cut, and the steps are put in an order drawn
    from ``key_round``: in any one step all clients of the round are at about the same quantile of their own lengths, so a bank pads little.
    With equal lengths it is plain shuffling. Depends on nothing but the client's own examples, ``work`` and the two keys.

    Args:
        key_client: Names the client and the round; draws the shuffles.
        key_round: Names the round; the same for all its clients.
    """
    n = len(examples)
    if n == 0:
        return []
    size = n if work.batch_size is None else min(n, work.batch_size * work.accumulate)
    per_shuffle = -(-n // size)
    assert (work.steps is None) != (work.epochs is None), work
    steps = work.steps if work.steps is not None else (work.epochs or 0) * per_shuffle
    if size == n:
        return [np.arange(n)] * steps
    lengths = examples.lengths
    ragged = bool((lengths != lengths[0]).any())
    rng, quantile_s = key_client.numpy(), key_round.numpy().random(steps)
    planned: list[IntArray] = []
    while len(planned) < steps:
        num = min(per_shuffle, steps - len(planned))
        drawn = rng.permutation(n)[: num * size]
        sizes = np.full(num, size)
        # Where the cut leaves a short step, it falls on any length, not always on the longest.
        sizes[rng.integers(num)] -= num * size - len(drawn)
        if ragged:
            drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        cut = np.split(drawn, np.cumsum(sizes)[:-1])
        rank_s = np.argsort(np.argsort(quantile_s[len(planned) : len(planned) + num]))
        planned += [cut[rank] for rank in rank_s]
    return planned


def collate(
    parts: Sequence[Sequence[tuple[IntArray, IntArray]]],
    rows: int,
    pad_id: int,
    causal: bool,
    per_row_targets: bool,
    multiple: int = 1,
    most: int | None = None,
) -> Batch:
    """One batch from the inputs and targets of K clients.

    Args:
        parts: For each client at most ``rows`` pairs, as :meth:`fedfm.core.task.Task.rows` gives them.
        rows: Rows of each client in the batch; those it does not fill are empty.
        pad_id: Fills what lies right of a row's end.
        causal: Leaves the attention mask out, for padding on the right cannot be seen.
        per_row_targets: Targets are one class for each row rather than one for each position.
        multiple: The batch's length is rounded up to a multiple of it,
        most: but not beyond this, which may be all that the model takes.
    """
    pairs = list(chain.from_iterable(parts))
    real_rows = np.array([len(part) for part in parts])
    assert (real_rows <= rows).all(), (real_rows, rows)
    row_i = np.repeat(np.arange(len(parts)) * rows - np.cumsum(real_rows) + real_rows, real_rows) + np.arange(len(pairs))
    length_r = np.zeros(len(parts) * rows, dtype=np.int64)
    length_r[row_i] = [len(ids) for ids, _ in pairs]
    longest_k = length_r.reshape(len(parts), rows).max(axis=1, initial=0)
    longest = max(int(longest_k.max(initial=1)), 1)
    width = -(-longest // multiple) * multiple
    width = width if most is None else max(min(width, most), longest)
    used_rl = np.arange(width) < length_r[:, None]
    input_rl = np.full(used_rl.shape, pad_id, dtype=np.int64)
    target_p, position_p = np.zeros(0, dtype=np.int64), None
    if pairs:
        input_rl[used_rl] = np.concatenate([ids for ids, _ in pairs])
        target_p = np.concatenate([targets for _, targets in pairs]).astype(np.int64, copy=False)
    asked = target_p != IGNORE
    if per_row_targets:
        row_p = row_i[asked]
    else:
        position_p = np.flatnonzero(used_rl)[asked]
        row_p = position_p // width
    mask = None
    if not causal:
        # An empty row attends to its first position: attention over nothing is NaN, which would spread through the gradients.
        used_rl[length_r == 0, 0] = True
        mask = torch.from_numpy(used_rl.astype(np.int64))
    return Batch(
        input_ids=torch.from_numpy(input_rl),
        attention_mask=mask,
        position_p=None if position_p is None else torch.from_numpy(position_p),
        row_p=torch.from_numpy(row_p),
        target_p=torch.from_numpy(target_p[asked]),
        owner_p=torch.from_numpy(row_p // rows),
        num_clients=len(parts),
        lengths=longest_k,
        real_rows=real_rows,
        num_tokens=int(length_r.sum()),
    )


def waste(batch: Batch) -> float:
    """The share of a batch that is padding."""
    return 1 - batch.num_tokens / batch.input_ids.numel()

"""Rows, and the batch that K clients share: named tensors, and who owns what in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORE = -100
IntArray = np.ndarray[Any, np.dtype[Any]]
NO_EXTRA: Mapping[str, IntArray] = MappingProxyType({})


class Row(NamedTuple):
    """One row of a batch.

    Args:
        ids: Token ids ``(n,)``.
        targets: Aligned to positions ``(n,)``, :data:`IGNORE` where nothing is asked; or one class ``(1,)`` for the whole row.
        extra: Other inputs of the model by name, each aligned to positions ``(n,)`` (``token_type_ids``).
    """

    ids: IntArray
    targets: IntArray
    extra: Mapping[str, IntArray] = NO_EXTRA


@dataclass(frozen=True)
class Shaping:
    """How rows become a rectangle.

    Args:
        pad_id: Fills the positions after a row's end.
        causal: Leaves the attention mask out, because a causal model cannot see padding on the right.
        per_row: A model gives one vector of logits for each row rather than one for each position.
        multiple: The batch's length is rounded up to a multiple of it.
        longest: The rounded length does not exceed this, the longest that the model may take.
    """

    pad_id: int = 0
    causal: bool = False
    per_row: bool = False
    multiple: int = 1
    longest: int | None = None


@dataclass
class Batch:
    """Rows of K clients, ``R`` each, client after client. Unused rows have no targets.

    A model gives logits at P picks; a task makes Q losses of them. For most tasks these are the same places.

    Args:
        inputs: What the model is called with, each ``(K*R, ...)``. A causal batch has no ``attention_mask``.
        shape: Rows and padded length, ``(K*R, L)``.
        pick_p: Where logits are asked: indices into the ``K*R*L`` positions, or into the rows with ``per_row``.
        per_row: The model gives one vector of logits for each row.
        row_q: A row of each loss; it says whose the loss is.
        owner_q: Client (0..K-1) of each loss.
        targets: What the losses compare the logits with, by name; ``labels`` ``(P,)`` for classes.
        num_clients: K.
        lengths: Longest row of each client ``(K,)``; what lies beyond in its rows is padding.
        real_rows: Rows in use of each client ``(K,)``.
        num_tokens: Tokens that are not padding.
    """

    inputs: dict[str, torch.Tensor]
    shape: tuple[int, int]
    pick_p: torch.Tensor
    per_row: bool
    row_q: torch.Tensor
    owner_q: torch.Tensor
    targets: dict[str, torch.Tensor]
    num_clients: int
    lengths: IntArray
    real_rows: IntArray
    num_tokens: int

    @property
    def num_slots(self) -> int:
        """Number of tokens, padding included."""
        return self.shape[0] * self.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        if device == self.pick_p.device:
            return self
        move = partial(torch.Tensor.to, device=device, non_blocking=device.type == "cuda")
        return replace(
            self,
            inputs={name: move(x) for name, x in self.inputs.items()},
            pick_p=move(self.pick_p),
            row_q=move(self.row_q),
            owner_q=move(self.owner_q),
            targets={name: move(x) for name, x in self.targets.items()},
        )


def collate(parts: Sequence[Sequence[Row]], shaping: Shaping) -> Batch:
    """One batch from the rows of K clients, with one loss for each target.

    Args:
        parts: The rows of each client. All have the same extra inputs.
    """
    rows, num = list(chain.from_iterable(parts)), max((1, *map(len, parts)))
    real_rows = np.array([len(part) for part in parts])
    row_i = np.repeat(np.arange(len(parts)) * num - np.cumsum(real_rows) + real_rows, real_rows) + np.arange(len(rows))
    length_r = np.zeros(len(parts) * num, dtype=np.int64)
    length_r[row_i] = [len(row.ids) for row in rows]
    longest_k = length_r.reshape(len(parts), num).max(axis=1, initial=0)
    longest = max(int(longest_k.max(initial=1)), 1)
    width = -(-longest // shaping.multiple) * shaping.multiple
    width = width if shaping.longest is None else max(min(width, shaping.longest), longest)
    used_rl = np.arange(width) < length_r[:, None]

    def filled(values: Sequence[IntArray], padding: int) -> torch.Tensor:
        value_rl = np.full(used_rl.shape, padding, dtype=np.int64)
        if values:
            value_rl[used_rl] = np.concatenate(values)
        return torch.from_numpy(value_rl)

    inputs = {"input_ids": filled([row.ids for row in rows], shaping.pad_id)}
    inputs |= {name: filled([row.extra[name] for row in rows], 0) for name in (rows[0].extra if rows else ())}
    label_p = np.concatenate([np.zeros(0, dtype=np.int64), *(row.targets for row in rows)]).astype(np.int64, copy=False)
    asked = label_p != IGNORE
    if shaping.per_row:
        row_p = pick_p = row_i[asked]
    else:
        pick_p = np.flatnonzero(used_rl)[asked]
        row_p = pick_p // width
    if not shaping.causal:
        # An empty row attends to its first position: attention over nothing is NaN, which would spread through the gradients.
        used_rl[length_r == 0, 0] = True
        inputs["attention_mask"] = torch.from_numpy(used_rl.astype(np.int64))
    return Batch(
        inputs=inputs,
        shape=(len(parts) * num, width),
        pick_p=torch.from_numpy(pick_p),
        per_row=shaping.per_row,
        row_q=torch.from_numpy(row_p),
        owner_q=torch.from_numpy(row_p // num),
        targets={"labels": torch.from_numpy(label_p[asked])},
        num_clients=len(parts),
        lengths=longest_k,
        real_rows=real_rows,
        num_tokens=int(length_r.sum()),
    )

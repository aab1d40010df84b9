"""What a bank relies on, seen before it is relied on: rows belong to clients, and a causal model does not look ahead.

A bank puts client after client into one batch, and a site takes the k-th part of the rows for client k. A base that lays its activations out
in another way (Longformer puts positions before rows) would train on other clients' tensors, silently. A causal task leaves out
the mask and trains on every position; a base that sees later tokens would train on its own answers.
"""

from __future__ import annotations

import numpy as np
import torch

from fedfm.client.objective import Learner
from fedfm.core.batch import IGNORE, Batch, Row, collate
from fedfm.core.errors import ModelError
from fedfm.core.keys import Key
from fedfm.core.task import Examples

# Tokens of a row that is probed with.
TOKENS = 16
# How far trainable tensors are moved, so that nothing is zero.
SCALE = 0.1


def probe_rows(learner: Learner, start_d: torch.Tensor, examples: Examples, key: Key) -> str | None:
    """Why two clients must not share a batch: client 0's logits or gradients move with what is client 1's, or client 1's do not.

    Args:
        start_d: Trainable parameters, which are moved at random for each client.
        examples: Whose rows are taken, the first two.
        key: Draws the disturbance.
    """
    drawn = torch.stack([torch.randn(start_d.shape, generator=key.fold("probe", i).generator()) for i in range(3)]).to(start_d.device)
    theta_0d, theta_1d, changed_1d = start_d + SCALE * drawn
    rows = [
        [_cut(row, learner.shaping.per_row) for row in learner.task.rows(examples, np.array([i]), key.fold("probe", "rows").numpy())]
        for i in (0, len(examples) > 1)
    ]
    batch = learner.batch(rows)
    turned = learner.batch([rows[0], [row._replace(ids=row.ids[::-1]) for row in rows[1]]])
    theta_kd = torch.stack([theta_0d, theta_1d])
    try:
        usual = _numbers(learner, theta_kd, batch)
        others = {"trainable tensors": _numbers(learner, torch.stack([theta_0d, changed_1d]), batch)}
        if any((row.ids != row.ids[::-1]).any() for row in rows[1]):
            others["rows"] = _numbers(learner, theta_kd, turned)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # A site that cannot divide its activations among clients.
        return f"two clients do not fit into one batch ({str(error).splitlines()[0]})"
    for what, other in others.items():
        for number, (x_0, x_1), (y_0, y_1) in zip(("logits", "gradient"), usual, other, strict=True):
            if _moved(x_0, y_0):
                return f"a client's {number} change with another client's {what}"
            if torch.equal(x_1, y_1):
                return f"a client's {number} do not change with its own {what}"
    return None


def probe_causal(learner: Learner, start_d: torch.Tensor, examples: Examples, key: Key) -> None:
    """Changes the second half of a row and looks at the logits of the first.

    Args:
        start_d: Trainable parameters to look with.
        examples: Whose row is taken, the longest of the first few.
        key: Draws the other tokens.

    Raises:
        ModelError: if the model looks ahead.
    """
    longest = np.array([int(np.argmax(examples.lengths[:8]))])
    row = learner.task.rows(examples, longest, key.fold("probe", "rows").numpy())[0]
    ids = np.asarray(row.ids[:TOKENS]).astype(np.int64)
    half = len(ids) // 2
    later = key.fold("probe", "later").numpy().integers(examples.vocabulary.size, size=len(ids) - half)
    targets = np.where(np.arange(len(ids)) < half, ids, IGNORE)
    extra = {name: x[:TOKENS] for name, x in row.extra.items()}
    with torch.no_grad():
        learner.tuned.bind(start_d.unsqueeze(0))
        usual, changed = (
            learner.tuned.logits(collate([[Row(tokens, targets, extra)]], learner.shaping).to(learner.device))
            for tokens in (ids, np.concatenate([ids[:half], later]))
        )
    if half and _moved(usual, changed):
        raise ModelError(
            f"{type(learner.tuned.model).__name__} looks ahead: its logits at a position change when a later token changes, so "
            f"{type(learner.task).__name__} would train it on its own answers. Use the task MaskedLM, or a causal base "
            "(an encoder's architecture becomes one with is_decoder: true in its config)."
        )


def _cut(row: Row, per_row: bool) -> Row:
    """A few tokens of a row: up to the last target, or the first where the row has one for all."""
    aligned = not per_row and len(row.targets) == len(row.ids)
    asked = np.flatnonzero(row.targets != IGNORE) if aligned else np.zeros(0, dtype=np.int64)
    end = int(asked[-1]) + 1 if len(asked) else min(len(row.ids), TOKENS)
    own = slice(max(end - TOKENS, 0), end)
    return Row(row.ids[own], row.targets[own] if aligned else row.targets, {name: x[own] for name, x in row.extra.items()})


def _numbers(learner: Learner, theta_kd: torch.Tensor, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of each of two clients, and gradients of each."""
    theta_kd = theta_kd.detach().requires_grad_(True)
    with torch.enable_grad():
        learner.tuned.bind(theta_kd)
        logits_pc = learner.tuned.logits(batch)
        (grad_kd,) = torch.autograd.grad(learner.task.losses(logits_pc, batch).sum(), theta_kd)
    row_p = batch.pick_p if batch.per_row else batch.pick_p // batch.shape[1]
    first_p = row_p < batch.shape[0] // 2
    return [(logits_pc[first_p].detach(), logits_pc[~first_p].detach()), (grad_kd[0], grad_kd[1])]


def _moved(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two answers differ by more than rounding, relative to the largest value."""
    tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2
    return bool((x.float() - y.float()).abs().max() > tolerance * x.float().abs().max())

"""Checks two things that a bank relies on: rows belong to clients, and a causal model does not look ahead.

A bank puts client after client into one batch, and a site takes the k-th part of the rows for client k. A base that lays its activations out
in another way (Longformer puts positions before rows) would train on other clients' tensors, silently. A causal task leaves out
the mask and trains on every position; a base that sees later tokens would train on its own answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedfm.client.objective import Learner
from fedfm.core.batch import IGNORE, Batch, Row, collate
from fedfm.core.errors import ModelError
from fedfm.core.keys import Key
from fedfm.core.task import Examples

# Longest row of a probe, in tokens.
TOKENS = 16
# Standard deviation of the noise on trainable tensors, so that nothing is zero.
SCALE = 0.1


def probe_rows(learner: Learner, start_d: torch.Tensor, examples: Examples, key: Key) -> str | None:
    """Why two clients must not share a batch; ``None`` where they may.

    Each client's loss has a gradient for its own trainable tensors and none for the other's, and nothing of client 0 moves when the trainable
    tensors and the rows of client 1 change.

    Args:
        start_d: Trainable parameters, which are moved at random for each client.
        examples: The first two give the rows.
        key: Draws the disturbance.
    """
    drawn = [torch.randn(start_d.shape, generator=key.fold("probe", i).generator()).to(start_d.device) for i in range(3)]
    theta_0d, theta_1d, other_1d = (start_d + SCALE * noise_d for noise_d in drawn)
    rows = [
        [_cut(row, learner.shaping.per_row) for row in learner.task.rows(examples, np.array([i]), key.fold("probe", "rows").numpy())]
        for i in (0, min(1, len(examples) - 1))
    ]
    turned = [rows[0], [row._replace(ids=row.ids[::-1]) for row in rows[1]]]
    try:
        _drop(learner, torch.stack([theta_0d, theta_1d]), learner.batch(rows), key)
        usual = _numbers(learner, torch.stack([theta_0d, theta_1d]), learner.batch(rows))
        changed = _numbers(learner, torch.stack([theta_0d, other_1d]), learner.batch(turned))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # A site raises this where it cannot divide its activations, or its dropout, among clients.
        return f"two clients do not fit into one batch ({str(error).splitlines()[0]})"
    for k, grad_kd in enumerate(usual.grads):
        # This is exact: a tensor on which the loss does not depend has a gradient of zero, whatever its type.
        if ((grad_kd[1 - k] != 0) & grad_kd[1 - k].isfinite()).any():
            return "a client's loss depends on another client's trainable tensors"
        if not grad_kd[k].any():
            return "a client's loss does not depend on its own trainable tensors"
    if _moved(usual.logits_0, changed.logits_0) or _moved(usual.grads[0][0].to(usual.logits_0.dtype), changed.grads[0][0]):
        return "a client's logits or gradients change with another client's rows"
    return None


def probe_causal(learner: Learner, start_d: torch.Tensor, examples: Examples, key: Key) -> None:
    """Changes the second half of a row and looks at the logits of the first.

    Args:
        start_d: Trainable parameters of the probe.
        examples: The longest of the first eight gives the row.
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
    learner.tuned.bind(start_d.unsqueeze(0))
    batches = [
        collate([[Row(tokens, targets, extra)]], learner.shaping).to(learner.device)
        for tokens in (ids, np.concatenate([ids[:half], later]))
    ]
    with torch.no_grad():
        usual, changed = (learner.tuned.logits(batch) for batch in batches)
    if half == 0 or torch.equal(usual, changed):
        return
    # Rounding may depend on what else is in a batch (experts), and a model in half precision looks ahead by no more: the gradient decides.
    if _moved(usual, changed) or _reaches(learner, batches[0], half):
        raise ModelError(
            f"{type(learner.tuned.model).__name__} looks ahead: its logits at a position change when a later token changes, so "
            f"{type(learner.task).__name__} would train it on its own answers. Use the task MaskedLM, or a causal base "
            "(an encoder's architecture becomes one with is_decoder: true in its config)."
        )


def _reaches(learner: Learner, batch: Batch, half: int) -> bool:
    """Whether the loss has a gradient for the embeddings of tokens from ``half`` on."""
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_(True))
        return embedded[-1]

    embeddings = learner.tuned.model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            loss = learner.tuned.logits(batch).float().logsumexp(dim=-1).sum()
            (grad_rld,) = torch.autograd.grad(loss, embedded[0])
    finally:
        handle.remove()
    return bool(grad_rld[:, half:].any())


@dataclass(frozen=True)
class _Numbers:
    """Results of a batch of two clients.

    Args:
        logits_0: Client 0's logits.
        grads: For each client the gradient of its loss, ``(2, D)``.
    """

    logits_0: torch.Tensor
    grads: list[torch.Tensor]


def _numbers(learner: Learner, theta_kd: torch.Tensor, batch: Batch) -> _Numbers:
    theta_kd = theta_kd.requires_grad_(True)
    with torch.enable_grad():
        learner.tuned.bind(theta_kd)
        logits_pc = learner.tuned.logits(batch)
        loss_q = learner.task.losses(logits_pc, batch)
        grads = [torch.autograd.grad(loss_q[batch.owner_q == k].sum(), theta_kd, retain_graph=k == 0)[0] for k in (0, 1)]
    row_p = batch.pick_p if batch.per_row else batch.pick_p // batch.shape[1]
    return _Numbers(logits_pc[row_p < batch.shape[0] // 2].detach(), grads)


@torch.no_grad()
def _drop(learner: Learner, theta_kd: torch.Tensor, batch: Batch, key: Key) -> None:
    """A forward pass with dropout: a site that cannot place each client's mask raises RuntimeError."""
    learner.tuned.bind(theta_kd, [key.fold("probe", "dropout", k) for k in range(len(theta_kd))])
    learner.tuned.logits(batch)


def _cut(row: Row, per_row: bool) -> Row:
    """A few tokens of a row: up to the last target, or the first where the row has one for all."""
    aligned = not per_row and len(row.targets) == len(row.ids)
    asked = np.flatnonzero(row.targets != IGNORE) if aligned else np.zeros(0, dtype=np.int64)
    end = int(asked[-1]) + 1 if len(asked) else min(len(row.ids), TOKENS)
    window = slice(max(end - TOKENS, 0), end)
    return Row(row.ids[window], row.targets[window] if aligned else row.targets, {name: x[window] for name, x in row.extra.items()})


def _moved(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two answers differ by more than rounding, relative to the largest value."""
    tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2
    return bool((x.float() - y.float()).abs().max() > tolerance * x.float().abs().max())

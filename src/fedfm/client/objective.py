"""What K clients minimise in one step, computed by one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedfm.core.batch import Batch, IntArray, Row, Shaping
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.parts import ClientId, Objective
from fedfm.core.secret import Secret
from fedfm.core.task import Examples, Task
from fedfm.tuning.base import Tuned


@dataclass(frozen=True)
class Learner:
    """A tuned model and a task.

    Args:
        device: Where the model is.
    """

    tuned: Tuned
    task: Task
    shaping: Shaping
    device: torch.device

    @property
    def exact(self) -> torch.dtype:
        """The type that sums are kept in. MPS has no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def batch(self, parts: Sequence[Sequence[Row]]) -> Batch:
        """Rows of K clients as one batch, on the device."""
        return self.task.batch(parts, self.shaping).to(self.device)

    def losses(self, theta_kd: torch.Tensor, batch: Batch, dropout: list[Key] | None = None) -> torch.Tensor:
        """The loss of each target ``(Q,)``, with client k's tensors for row block k."""
        self.tuned.bind(theta_kd, dropout)
        return self.tuned.losses(batch, self.task.losses)


@dataclass
class Tally:
    """What adds up over the steps of a round.

    Args:
        loss_k: Sum over steps of each client's loss.
        lr_sum_k: Sum of the rates used.
        tokens_k: Tokens that each client has trained on.
        num_tokens: Tokens of all clients.
        num_slots: Tokens and padding of all batches.
    """

    loss_k: torch.Tensor
    lr_sum_k: torch.Tensor
    tokens_k: IntArray
    num_tokens: int = 0
    num_slots: int = 0

    @staticmethod
    def zeros(num_clients: int, learner: Learner) -> Tally:
        """Before the first step."""
        loss_k, lr_sum_k = torch.zeros(2, num_clients, dtype=learner.exact, device=learner.device)
        return Tally(loss_k, lr_sum_k, np.zeros(num_clients, dtype=np.int64))

    def count(self, parts: Sequence[Sequence[Row]], owners: Sequence[int], batch: Batch) -> None:
        """Counts a batch that is trained on; ``owners`` says whose each part is."""
        for owner, part in zip(owners, parts, strict=True):
            self.tokens_k[owner] += sum(len(row.ids) for row in part)
        self.num_tokens += batch.num_tokens
        self.num_slots += batch.num_slots


@dataclass(frozen=True)
class Step:
    """One step of K clients.

    Args:
        index: The examples that each client takes.
        size: Examples of a client in a micro-batch.
        max_grad_norm: Bound on each client's gradient norm.
        key: The run's key, or another end's.
        number: Counted from 0 in the round.
        secrets: Where each client's noise comes from; none of a trainer that adds none.
    """

    clients: Sequence[ClientId]
    examples: Sequence[Examples]
    index: Sequence[IntArray]
    size: int
    max_grad_norm: float | None
    key: Key
    round: int
    number: int
    secrets: Sequence[Secret | None] = ()

    def keys(self, *names: str) -> list[Key]:
        """A key for each client."""
        key = self.key.fold(*names, self.round)
        return [key.fold(client, self.number) for client in self.clients]

    @property
    def micro(self) -> range:
        """Where each micro-batch begins."""
        return range(0, max((len(own) for own in self.index), default=0), self.size)


@dataclass(frozen=True)
class _Losses:
    """What targets cost.

    Args:
        owner_q: Client of each target.
        loss_q: Loss of each target.
    """

    owner_q: torch.Tensor
    loss_q: torch.Tensor


@dataclass(frozen=True)
class _Slices:
    """A bank whose slices are examples.

    Args:
        owner_n: Client of each example.
        grad_nd: Gradient of each example's own mean loss.
        losses: What the examples' targets cost.
    """

    owner_n: torch.Tensor
    grad_nd: torch.Tensor
    losses: _Losses


class StepObjective(Objective):
    """The clients' mean losses in one step.

    Args:
        tally: Where the first call reports its loss and its tokens.
        shares: Whether more than one slice can share a batch.
    """

    def __init__(self, learner: Learner, step: Step, tally: Tally, shares: Callable[[], bool]) -> None:
        self.learner, self.step, self.tally, self.shares = learner, step, tally, shares
        self.num, self.reported = len(step.clients), False

    def keys(self, name: str) -> list[Key]:
        """A key for each client in this round and step."""
        return self.step.keys("local", name)

    def losses(self, theta_kd: torch.Tensor) -> torch.Tensor:
        """Each client's loss ``(K,)`` in float32, summed in float64."""
        loss_k = torch.zeros(self.num, dtype=self.learner.exact, device=self.learner.device)
        with torch.no_grad():
            for batch, keys in zip(self._batches, self._dropout, strict=True):
                loss_q = self.learner.losses(theta_kd.detach(), batch, keys) * self._weight_k[batch.owner_q]
                loss_k.index_add_(0, batch.owner_q, loss_q.to(self.learner.exact))
        if not self.reported:
            self.tally.loss_k[: self.num] += loss_k
            self.reported = True
        return loss_k.float()

    def gradient(self, theta_kd: torch.Tensor) -> torch.Tensor:
        """Each client's gradient ``(K, D)``, clipped."""
        theta_kd = theta_kd.detach().requires_grad_(True)
        grad_kd = torch.zeros(())
        for i, (batch, keys) in enumerate(zip(self._batches, self._dropout, strict=True)):
            with torch.enable_grad():
                loss_q = self.learner.losses(theta_kd, batch, keys) * self._weight_k[batch.owner_q]
                # The sum of the clients' means: each client's gradient is its own.
                (grad,) = torch.autograd.grad(loss_q.sum(), theta_kd)
            grad_kd = grad_kd.add_(grad) if i else grad
            if not self.reported:
                self.tally.loss_k[: self.num].index_add_(0, batch.owner_q, loss_q.detach().to(self.learner.exact))
        self.reported = True
        if self.step.max_grad_norm is not None:
            norm_k = torch.linalg.vector_norm(grad_kd, dim=1, keepdim=True)
            grad_kd.mul_((self.step.max_grad_norm / (norm_k + 1e-6)).clamp(max=1.0))
        return grad_kd

    def per_example(self, theta_kd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of each example's own mean loss ``(N, D)``, and each example's client ``(N,)``."""
        if not self.shares():
            raise ConfigError(
                "The trainer asks for the gradient of each example, but this model runs one client at a time. "
                "Use a tuning that banks (LoRA, IA3, BitFit, Head), on a base whose rows do not mix."
            )
        slices = [self._slices(theta_kd, *micro) for micro in self._examples()]
        self._report([own.losses for own in slices])
        return torch.cat([own.grad_nd for own in slices]), torch.cat([own.owner_n for own in slices])

    def clipped_sum(self, theta_kd: torch.Tensor, max_norm: float) -> torch.Tensor:
        """The sum over each client's examples ``(K, D)`` of clipped gradients; memory is that of one micro-batch."""
        theta_kd, sum_kd, losses = theta_kd.detach(), torch.zeros_like(theta_kd), list[_Losses]()
        for batch, owners, keys in self._examples(apart=not self.shares()):
            own = self._slices(theta_kd, batch, owners, keys)
            norm_n = torch.linalg.vector_norm(own.grad_nd, dim=1)
            # Rounding the factor and the product may add half a unit each.
            factor_n = (max_norm * (1 - torch.finfo(norm_n.dtype).eps) / norm_n.clamp(min=1e-30)).clamp(max=1.0)
            # A gradient that is no number has no length that could be bounded, and must not be seen in the sum.
            clipped_nd = torch.where(norm_n.isfinite().unsqueeze(1), own.grad_nd.mul_(factor_n.unsqueeze(1)), 0.0)
            sum_kd.index_add_(0, own.owner_n, clipped_nd)
            losses.append(_Losses(own.losses.owner_q, own.losses.loss_q.nan_to_num(0.0, 0.0, 0.0)))
        self._report(losses)
        return sum_kd

    @property
    def sizes(self) -> list[int]:
        """How many examples each client has in all."""
        return [len(examples) for examples in self.step.examples]

    def noisy(self, sum_kd: torch.Tensor, std_k: Sequence[float]) -> torch.Tensor:
        """``sum_kd`` with normal noise from each client's own coins."""
        rows = []
        for row_d, std, client, secret in zip(sum_kd, std_k, self.step.clients, self.step.secrets, strict=True):
            assert secret is not None, f"{client} has no coins for noise"
            rows.append(secret.stream("noise", self.step.number).noisy(row_d, std).float())
        return torch.stack(rows).to(sum_kd.device)

    def _report(self, losses: Sequence[_Losses]) -> None:
        """Tells the losses of the step's first call."""
        if self.reported:
            return
        loss_k, count_k = torch.zeros(2, self.num, dtype=self.learner.exact, device=self.learner.device)
        for own in losses:
            loss_k.index_add_(0, own.owner_q, own.loss_q.to(self.learner.exact))
            count_k.index_add_(0, own.owner_q, torch.ones_like(own.loss_q, dtype=self.learner.exact))
        self.tally.loss_k[: self.num] += loss_k / count_k.clamp(min=1)
        self.reported = True

    def _slices(self, theta_kd: torch.Tensor, batch: Batch, owners: list[int], keys: list[Key]) -> _Slices:
        """A micro-batch computed as a bank of its examples."""
        owner_n = torch.tensor(owners, device=self.learner.device)
        theta_nd = theta_kd.detach()[owner_n].requires_grad_(True)
        with torch.enable_grad():
            loss_q = self.learner.losses(theta_nd, batch, keys)
            (grad_nd,) = torch.autograd.grad((loss_q * _weights([batch], len(owners))[batch.owner_q]).sum(), theta_nd)
        return _Slices(owner_n, grad_nd, _Losses(owner_n[batch.owner_q], loss_q.detach()))

    def _examples(self, apart: bool = False) -> Iterator[tuple[Batch, list[int], list[Key]]]:
        """The micro-batches once more, each example a slice of its own: the batch, the examples' clients, and their keys for dropout.

        Args:
            apart: Whether each example is a batch by itself.
        """
        step, rngs, counted = self.step, [key.numpy() for key in self.step.keys("rows")], self.reported
        dropout = step.keys("dropout")
        for micro, first in enumerate(step.micro):
            cut = [(k, i, own[i : i + 1]) for k, own in enumerate(step.index) for i in range(first, min(first + step.size, len(own)))]
            for some in [[one] for one in cut] if apart else [cut]:
                parts = [self.learner.task.rows(step.examples[k], own, rngs[k]) for k, _, own in some]
                owners, batch = [k for k, _, _ in some], self.learner.batch(parts)
                if not counted:
                    self.tally.count(parts, owners, batch)
                yield batch, owners, [dropout[k].fold(micro, "example", i) for k, i, _ in some]

    @cached_property
    def _batches(self) -> list[Batch]:
        """The micro-batches of the step. They are cut between examples: all rows of one stay together."""
        step, rngs, batches = self.step, [key.numpy() for key in self.step.keys("rows")], []
        for first in step.micro:
            parts = [
                self.learner.task.rows(examples, own[first : first + step.size], rng)
                for examples, own, rng in zip(step.examples, step.index, rngs, strict=True)
            ]
            batches.append(self.learner.batch(parts))
            if not self.reported:
                self.tally.count(parts, range(self.num), batches[-1])
        return batches

    @cached_property
    def _dropout(self) -> list[list[Key]]:
        """A key for each client in each micro-batch."""
        keys = self.step.keys("dropout")
        return [[key.fold(micro) for key in keys] for micro in range(len(self.step.micro))]

    @cached_property
    def _weight_k(self) -> torch.Tensor:
        """What each of a client's targets counts for in its mean."""
        return _weights(self._batches, self.num)


def _weights(batches: Sequence[Batch], num_clients: int) -> torch.Tensor:
    """One over the targets of each client ``(K,)``."""
    count_k = sum(torch.bincount(batch.owner_q, minlength=num_clients) for batch in batches)
    assert isinstance(count_k, torch.Tensor)
    return 1.0 / count_k.clamp(min=1).float()

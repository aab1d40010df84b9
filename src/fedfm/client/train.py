"""Local work: K clients as one batch. K = 1 is an owner's own machine; there is no second trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from fedfm.core.keys import Key
from fedfm.core.parts import ClientId, Cohort, LocalTrainer, Work
from fedfm.core.task import Batch, Examples, IntArray, Task
from fedfm.core.tree import Tree
from fedfm.data import collate, plan
from fedfm.tuning.base import Tuned


@dataclass
class Job:
    """One client's work in a round.

    Args:
        examples: Its training examples.
        memory: What its trainer remembers from its last round.
    """

    client: ClientId
    examples: Examples
    memory: Tree = field(default_factory=dict)


@dataclass
class Trained:
    """What came of a job.

    Args:
        delta: ``w_after - w_before`` and the leaves that the trainer adds.
        params_d: The client's own parameters after its work ``(D,)``.
        metrics: ``loss`` (mean over its steps), ``steps``, ``examples``, ``tokens``, ``padding`` (share of its bank's tokens that were padding).
        finite: Whether its loss and parameters are numbers.
    """

    client: ClientId
    delta: dict[str, torch.Tensor]
    params_d: torch.Tensor
    memory: dict[str, torch.Tensor]
    metrics: dict[str, float]
    finite: bool


Rows = list[tuple[IntArray, IntArray]]
# Of one batch that is evaluated: 1 GiB of float32.
MAX_LOGITS = 1 << 28


class Bank:
    """A tuned model, a task and a trainer: everything that training needs but the clients.

    Args:
        pad_id: Token that fills rows on the right.
        causal: Whether padding on the right cannot be seen, so that no mask is needed.
    """

    def __init__(self, tuned: Tuned, task: Task, local: LocalTrainer, pad_id: int, device: torch.device, key: Key) -> None:
        self.tuned, self.task, self.local, self.pad_id, self.device, self.key = tuned, task, local, pad_id, device, key
        self.causal = task.head == "causal_lm"
        self.per_row = task.head == "sequence_classification"
        # Tensor cores want lengths in eights; on a CPU that is only waste.
        self.multiple = 1 if device.type == "cpu" else 8
        self.max_tokens = 16384

    def train(
        self, start: Tree, jobs: Sequence[Job], round: int, work: Work | None = None, starts_kd: torch.Tensor | None = None
    ) -> list[Trained]:
        """Every job's local work, from the same start unless ``starts_kd`` says where each begins.

        Args:
            start: The global parameters, and leaves that came with them.
            work: Instead of the trainer's own amount.
            starts_kd: Parameters of each job ``(K, D)``, where jobs do not begin at ``start``; for trainers that do not look back at it.
        """
        work = work or self.local.work
        jobs = list(jobs)
        steps_of = {
            job.client: plan(job.examples, work, self.key.fold("batches", round, job.client), self.key.fold("buckets", round))
            for job in jobs
        }
        # Those with most steps first: whoever is still at work is a prefix, and needs no mask.
        order = sorted(range(len(jobs)), key=lambda i: -len(steps_of[jobs[i].client]))
        ordered = [jobs[i] for i in order]
        steps = [steps_of[job.client] for job in ordered]
        spec = self.tuned.spec
        start_d = spec.flatten(start).to(self.device)
        start_kd = start_d.expand(len(jobs), -1) if starts_kd is None else starts_kd[order].to(self.device)
        cohort = Cohort(
            theta_kd=start_kd.clone(),
            start_d=start_d,
            received={name: leaf.to(self.device) for name, leaf in start.items() if name not in spec.names},
            memory=_stack([job.memory for job in ordered], self.device),
        )
        self.local.init(cohort)
        # MPS has no float64.
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        loss_k, lr_sum_k = torch.zeros(2, len(jobs), dtype=exact, device=self.device)
        tokens = np.zeros(len(jobs), dtype=np.int64)
        filled = padded = 0
        for step in range(len(steps[0])):
            k = sum(len(own) > step for own in steps)
            lrs = [self.local.lr_at(step, len(own), round) for own in steps[:k]]
            lr_k = torch.tensor(lrs, dtype=torch.float32, device=self.device).unsqueeze(1)
            batches = self._batches(ordered[:k], [own[step] for own in steps[:k]], work, round, step)
            active = cohort.head(k)
            theta = active.theta_kd.detach().requires_grad_(True)
            grad_kd: torch.Tensor | None = None
            count_k = sum(
                (torch.bincount(batch.owner_p, minlength=k) for batch, _ in batches), torch.zeros(k, dtype=torch.int64, device=self.device)
            )
            for micro, (batch, tokens_k) in enumerate(batches):
                keys = [self.key.fold("dropout", round, job.client, step, micro) for job in ordered[:k]]
                self.tuned.bind(theta, keys)
                weight_p = (1.0 / count_k.clamp(min=1).float())[batch.owner_p]
                loss_p = F.cross_entropy(self.tuned.logits(batch).float(), batch.target_p, reduction="none") * weight_p
                # The sum of the clients' means: each client's gradient is its own.
                (grad,) = torch.autograd.grad(loss_p.sum(), theta)
                grad_kd = grad if grad_kd is None else grad_kd.add_(grad)
                loss_k[:k].index_add_(0, batch.owner_p, loss_p.detach().to(exact))
                tokens[:k] += tokens_k
                filled, padded = filled + batch.num_tokens, padded + batch.input_ids.numel()
            assert grad_kd is not None
            with torch.no_grad():
                if work.max_grad_norm is not None:
                    norm_k = torch.linalg.vector_norm(grad_kd, dim=1, keepdim=True)
                    grad_kd.mul_((work.max_grad_norm / (norm_k + 1e-6)).clamp(max=1.0))
                self.local.step(active, grad_kd, lr_k, step)
                lr_sum_k[:k] += lr_k.squeeze(1)
        self.tuned.bind(cohort.theta_kd[:1])
        steps_k = torch.tensor([len(own) for own in steps], device=self.device)
        with torch.no_grad():
            delta_kd = cohort.theta_kd - start_kd
            extra = self.local.finish(cohort, lr_sum_k, steps_k)
        ok = (loss_k.isfinite() & delta_kd.isfinite().all(dim=1)).tolist()
        loss = (loss_k / steps_k.clamp(min=1)).tolist()
        delta_kd, theta_kd = delta_kd.cpu(), cohort.theta_kd.cpu()
        waste = 1 - filled / padded if padded else 0.0
        done: dict[int, Trained] = {}
        for row, i in enumerate(order):
            seen = sum(len(index) for index in steps[row])
            done[i] = Trained(
                client=jobs[i].client,
                delta={**spec.unflatten(delta_kd[row]), **{name: leaf[row].cpu() for name, leaf in extra.items()}},
                params_d=theta_kd[row],
                memory={name: leaf[row].cpu().clone() for name, leaf in cohort.memory.items()},
                metrics={
                    "loss": loss[row],
                    "steps": float(len(steps[row])),
                    "examples": float(seen),
                    "tokens": float(tokens[row]),
                    "padding": waste,
                },
                finite=bool(ok[row]),
            )
        return [done[i] for i in range(len(jobs))]

    def _batches(self, jobs: Sequence[Job], index: Sequence[IntArray], work: Work, round: int, step: int) -> list[tuple[Batch, IntArray]]:
        """The micro-batches of one step, and each client's tokens in them."""
        rows = [
            self.task.rows(job.examples, own, self.key.fold("rows", round, job.client, step).numpy())
            for job, own in zip(jobs, index, strict=True)
        ]
        size = work.batch_size or max(len(own) for own in rows)
        found = []
        for first in range(0, max(len(own) for own in rows), size):
            parts = [own[first : first + size] for own in rows]
            batch = self.collate(parts)
            found.append((batch, np.array([sum(len(ids) for ids, _ in part) for part in parts])))
        return found

    def collate(self, parts: list[Rows]) -> Batch:
        """Rows of K clients as one batch."""
        rows = max(1, max(len(part) for part in parts))
        return collate(parts, rows, self.pad_id, self.causal, self.per_row, self.multiple, self.task.max_length).to(self.device)

    @torch.no_grad()
    def evaluate(
        self, theta_kd: torch.Tensor, sets: Sequence[Examples], max_tokens: int | None = None, fold: str = "evaluate"
    ) -> dict[str, torch.Tensor]:
        """Sums of each set of examples, ``(len(sets), ...)`` float64, from which the task makes metrics.

        Args:
            theta_kd: One row ``(1, D)`` for all sets, which then share batches; or a row for each set.
            max_tokens: Bound on the padded tokens of a batch, the bank's own unless given; a large vocabulary, whose logits are many more, lowers it.
        """
        max_tokens = max_tokens or self.max_tokens
        theta_kd = theta_kd.to(self.device)
        if not self.per_row and sets:
            max_tokens = min(max_tokens, max(1, MAX_LOGITS // sets[0].vocabulary.size))
        if theta_kd.shape[0] == 1:
            return self._evaluate_shared(theta_kd, sets, max_tokens, fold)
        return self._evaluate_bank(theta_kd, sets, max_tokens, fold)

    def _evaluate_shared(self, theta_kd: torch.Tensor, sets: Sequence[Examples], max_tokens: int, fold: str) -> dict[str, torch.Tensor]:
        self.tuned.bind(theta_kd)
        where = sorted(((int(n), s, i) for s, own in enumerate(sets) for i, n in enumerate(own.lengths)), reverse=True)
        sums = self._no_sums(len(sets))
        first = 0
        while first < len(where):
            size = max(1, max_tokens // max(where[first][0], 1))
            chunk = where[first : first + size]
            rows: Rows = []
            for _, s, i in chunk:
                # Not the set's place: what is drawn for an owner must not depend on who is evaluated with it.
                rows += self.task.rows(sets[s], np.array([i]), self.key.fold(fold, i).numpy())
            batch = self.collate([rows])
            owner_p = torch.tensor([s for _, s, _ in chunk], device=self.device)[batch.row_p]
            _add(sums, self._stats(batch, owner_p, len(sets)))
            first += size
        return sums

    def _evaluate_bank(self, theta_kd: torch.Tensor, sets: Sequence[Examples], max_tokens: int, fold: str) -> dict[str, torch.Tensor]:
        assert theta_kd.shape[0] == len(sets)
        self.tuned.bind(theta_kd)
        order = [np.argsort(-own.lengths, kind="stable") for own in sets]
        longest = max((int(own.lengths.max()) for own in sets if len(own)), default=1)
        size = max(1, max_tokens // (len(sets) * longest))
        sums = self._no_sums(len(sets))
        for first in range(0, max((len(own) for own in sets), default=0), size):
            parts = []
            for s, own in enumerate(sets):
                parts.append(
                    [
                        row
                        for i in order[s][first : first + size]
                        for row in self.task.rows(own, np.array([i]), self.key.fold(fold, int(i)).numpy())
                    ]
                )
            batch = self.collate(parts)
            _add(sums, self._stats(batch, batch.owner_p, len(sets)))
        return sums

    def _stats(self, batch: Batch, owner_p: torch.Tensor, num: int) -> dict[str, torch.Tensor]:
        logits_pc = self.tuned.logits(batch)
        where = torch.device("cpu") if self.device.type == "mps" else self.device
        return self.task.stats(logits_pc.to(where), batch.target_p.to(where), owner_p.to(where), num)

    def _no_sums(self, num: int) -> dict[str, torch.Tensor]:
        where = torch.device("cpu") if self.device.type == "mps" else self.device
        return self.task.no_stats(num, getattr(getattr(self.tuned.model, "config", None), "num_labels", 2), where)


def _add(sums: dict[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> None:
    for name, value in more.items():
        sums[name] += value


def _stack(memories: Sequence[Tree], device: torch.device) -> dict[str, torch.Tensor]:
    """Each client's leaves as rows; zeros for those who remember nothing yet."""
    names = {name: leaf for memory in memories for name, leaf in memory.items()}
    return {name: torch.stack([memory.get(name, torch.zeros_like(leaf)) for memory in memories]).to(device) for name, leaf in names.items()}

"""Local work: K clients as one batch. K = 1 is an owner's own machine; there is no second trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedfm.client.objective import Learner, Step, StepObjective, Tally
from fedfm.client.probe import probe_causal, probe_rows
from fedfm.core.batch import Batch, IntArray, Row, Shaping
from fedfm.core.keys import Key
from fedfm.core.parts import ClientId, Cohort, LocalTrainer, Work
from fedfm.core.secret import Secret
from fedfm.core.task import Examples, Scorer, Task
from fedfm.core.tree import Tree
from fedfm.data import plan, poisson
from fedfm.tuning.base import Tuned

log = logging.getLogger(__name__)
# Logits per evaluation batch: 1 GiB of float32.
MAX_LOGITS = 1 << 28


@dataclass
class Job:
    """One client's work in a round.

    Args:
        examples: Its training examples.
        memory: What its trainer remembers from its last round.
        secret: Where its batches and noise come from, for a trainer that promises privacy.
    """

    client: ClientId
    examples: Examples
    memory: Tree = field(default_factory=dict)
    secret: Secret | None = None


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


@dataclass(frozen=True)
class Course:
    """Who takes which examples in which step of a round. Those with most steps first: whoever is still at work is a prefix, and needs no mask.

    Args:
        jobs: The clients' jobs in that order.
        places: Where each stood before.
        index: The examples of each client's steps.
        key: The run's key, or another end's.
    """

    jobs: list[Job]
    places: list[int]
    index: list[list[IntArray]]
    work: Work
    round: int
    key: Key

    @staticmethod
    def of(jobs: Sequence[Job], work: Work, round: int, key: Key) -> Course:
        """Plans a round."""
        steps = [_steps(job, work, round, key) for job in jobs]
        places = sorted(range(len(jobs)), key=lambda i: -len(steps[i]))
        return Course([jobs[i] for i in places], places, [steps[i] for i in places], work, round, key)

    @property
    def num_steps(self) -> int:
        """Steps of the client that has most."""
        return max((len(own) for own in self.index), default=0)

    def step(self, number: int) -> Step:
        """The step of those who are still at work."""
        k = sum(len(own) > number for own in self.index)
        index = [own[number] for own in self.index[:k]]
        return Step(
            clients=[job.client for job in self.jobs[:k]],
            examples=[job.examples for job in self.jobs[:k]],
            index=index,
            size=self.work.batch_size or max(1, *(len(own) for own in index)),
            max_grad_norm=self.work.max_grad_norm,
            key=self.key,
            round=self.round,
            number=number,
            secrets=[job.secret for job in self.jobs[:k]],
        )


def _steps(job: Job, work: Work, round: int, key: Key) -> list[IntArray]:
    """The examples of each of a client's steps."""
    if not work.poisson:
        return plan(job.examples, work, key.fold("batches", round, job.client), key.fold("buckets", round))
    assert job.secret is not None, f"{job.client} has no coins for Poisson batches"
    return poisson(len(job.examples), work, job.secret.stream("batches"))


Watch = Callable[[int, Sequence[ClientId], torch.Tensor], None]
"""Called with the number of steps done, those who took the last one, and their parameters ``(K, D)``."""


class Bank:
    """A tuned model, a task and a trainer: everything that training needs but the clients.

    Args:
        pad_id: Token that fills rows on the right.
    """

    def __init__(self, tuned: Tuned, task: Task, local: LocalTrainer, pad_id: int, device: torch.device, key: Key) -> None:
        self.tuned, self.task, self.local, self.pad_id, self.device, self.key = tuned, task, local, pad_id, device, key
        # Tensor cores want lengths in eights; a CPU would only compute padding.
        multiple = 1 if device.type == "cpu" else 8
        shaping = Shaping(pad_id, task.head == "causal_lm", task.head == "sequence_classification", multiple, task.max_length)
        self.learner = Learner(tuned, task, shaping, device)
        self.max_tokens = 16384
        self._looked, self._shares = not shaping.causal, None if tuned.banks else False

    def look(self, start: Tree, sets: Iterable[Examples]) -> None:
        """Looks once, where the task is causal, whether the base is.

        Args:
            start: Parameters to look with.
            sets: Whose rows are taken; the first that has some.

        Raises:
            ModelError: if the base looks ahead.
        """
        examples = None if self._looked else next((own for own in sets if len(own)), None)
        if examples is not None:
            probe_causal(self.learner, self.tuned.spec.flatten(start).to(self.device), examples, self.key)
            self._looked = True

    def shares(self, start: Tree, sets: Iterable[Examples]) -> bool:
        """Whether clients can share a batch: their tuning banks, and the base keeps their rows apart, which is tried once.

        Args:
            start: Parameters to try it with.
            sets: Whose rows are taken; the first that has some.
        """
        examples = None if self._shares is not None else next((own for own in sets if len(own)), None)
        if examples is not None:
            reason = probe_rows(self.learner, self.tuned.spec.flatten(start).to(self.device), examples, self.key)
            if reason is not None:
                log.warning("%s mixes the rows of a batch: %s; clients run one by one", type(self.tuned.model).__name__, reason)
            self._shares = reason is None
        return self._shares is not False

    def train(
        self,
        start: Tree,
        jobs: Sequence[Job],
        round: int,
        work: Work | None = None,
        starts_kd: torch.Tensor | None = None,
        watch: Watch | None = None,
    ) -> list[Trained]:
        """Every job's local work, from the same start unless ``starts_kd`` says where each begins.

        Args:
            start: The global parameters, and leaves that came with them.
            work: Instead of the trainer's own amount.
            starts_kd: Parameters of each job ``(K, D)``, where jobs do not begin at ``start``.
            watch: Shown the parameters after each step; it must not change them.

        Raises:
            ModelError: if the task is causal and the base looks ahead.
        """
        sets = [job.examples for job in jobs]
        self.look(start, sets)
        if len(jobs) > 1 and not self.shares(start, sets):
            own_1d = [None] * len(jobs) if starts_kd is None else list(torch.split(starts_kd, 1))
            return [self.train(start, [job], round, work, own, watch)[0] for job, own in zip(jobs, own_1d, strict=True)]
        course = Course.of(jobs, work or self.local.work, round, self.key)
        cohort, start_kd = self._begin(course, start, starts_kd)
        tally = Tally.zeros(len(jobs), self.learner)
        for number in range(course.num_steps):
            step = course.step(number)
            objective = StepObjective(self.learner, step, tally, lambda: self.shares(start, sets))
            self._descend(course, cohort, objective, number)
            if watch is not None:
                watch(number + 1, step.clients, cohort.theta_kd[: objective.num])
        return self._finish(course, cohort, start_kd, tally)

    def _begin(self, course: Course, start: Tree, starts_kd: torch.Tensor | None) -> tuple[Cohort, torch.Tensor]:
        """The cohort before its first step, and where each client starts ``(K, D)``."""
        spec = self.tuned.spec
        start_d = spec.flatten(start).to(self.device)
        start_kd = start_d.expand(len(course.jobs), -1) if starts_kd is None else starts_kd[course.places].to(self.device)
        cohort = Cohort(
            theta_kd=start_kd.clone(),
            start_kd=start_kd,
            received={name: leaf.to(self.device) for name, leaf in start.items() if name not in spec.names},
            memory=_stack([job.memory for job in course.jobs], self.device),
        )
        self.local.init(cohort)
        return cohort, start_kd

    @torch.no_grad()
    def _descend(self, course: Course, cohort: Cohort, objective: StepObjective, number: int) -> None:
        """One step of those who are still at work."""
        k, tally = objective.num, objective.tally
        lrs = [self.local.lr_at(number, len(own), course.round) for own in course.index[:k]]
        lr_k = torch.tensor(lrs, dtype=torch.float32, device=self.device).unsqueeze(1)
        self.local.descend(cohort.head(k), objective, lr_k, number)
        tally.lr_sum_k[:k] += lr_k.squeeze(1)

    @torch.no_grad()
    def _finish(self, course: Course, cohort: Cohort, start_kd: torch.Tensor, tally: Tally) -> list[Trained]:
        """What came of each job, in the order in which they were asked for."""
        self.tuned.bind(cohort.theta_kd[:1])
        steps_k = torch.tensor([len(own) for own in course.index], device=self.device)
        delta_kd = cohort.theta_kd - start_kd
        extra = self.local.finish(cohort, tally.lr_sum_k, steps_k)
        finite = (tally.loss_k.isfinite() & delta_kd.isfinite().all(dim=1)).tolist()
        loss = (tally.loss_k / steps_k.clamp(min=1)).tolist()
        delta_kd, theta_kd = delta_kd.cpu(), cohort.theta_kd.cpu()
        padding = 1 - tally.num_tokens / tally.num_slots if tally.num_slots else 0.0
        trained = {
            place: Trained(
                client=job.client,
                delta={**self.tuned.spec.unflatten(delta_kd[row]), **{name: leaf[row].cpu() for name, leaf in extra.items()}},
                params_d=theta_kd[row],
                memory={name: leaf[row].cpu().clone() for name, leaf in cohort.memory.items()},
                metrics={
                    "loss": loss[row],
                    "steps": float(len(course.index[row])),
                    "examples": float(sum(len(index) for index in course.index[row])),
                    "tokens": float(tally.tokens_k[row]),
                    "padding": padding,
                },
                finite=bool(finite[row]),
            )
            for row, (place, job) in enumerate(zip(course.places, course.jobs, strict=True))
        }
        return [trained[place] for place in range(len(trained))]

    @torch.no_grad()
    def evaluate(
        self,
        theta_kd: torch.Tensor,
        sets: Sequence[Examples],
        max_tokens: int | None = None,
        fold: str = "evaluate",
        watch: Callable[[int], None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Sums of each set of examples, ``(len(sets), ...)`` float64, from which the task makes metrics.

        Args:
            theta_kd: One row ``(1, D)`` for all sets, which then share batches; or a row for each set.
            max_tokens: Bound on the padded tokens of a batch, the bank's own unless given; a large vocabulary, whose logits are many more, lowers it.
            watch: With one row for all sets: called with the number of examples done, after each batch.

        Raises:
            ModelError: if the task is causal and the base looks ahead.
        """
        start = self.tuned.spec.unflatten(theta_kd[0])
        self.look(start, sets)
        max_tokens = self._bounded(sets, max_tokens)
        theta_kd = theta_kd.to(self.device)
        if theta_kd.shape[0] == 1:
            return self._evaluate_shared(theta_kd, sets, max_tokens, fold, watch)
        if self.shares(start, sets):
            longest = max((int(own.lengths.max()) for own in sets if len(own)), default=1)
            # As many owners together as one example of each keeps within the bound.
            size = max(1, max_tokens // longest)
            banks = [
                self._evaluate_bank(theta_kd[first : first + size], sets[first : first + size], max_tokens, fold)
                for first in range(0, len(sets), size)
            ]
            return {name: torch.cat([sums[name] for sums in banks]) for name in banks[0]}
        alone = [
            self._evaluate_shared(theta_1d, [own], max_tokens, fold) for theta_1d, own in zip(torch.split(theta_kd, 1), sets, strict=True)
        ]
        return {name: torch.cat([sums[name] for sums in alone]) for name in alone[0]}

    @torch.no_grad()
    def score(self, theta_1d: torch.Tensor, sets: Sequence[Examples], scorer: Scorer, first: int = 0) -> dict[str, torch.Tensor]:
        """What ``scorer`` measures of each set ``(len(sets), ...)``, with one model for all.

        Args:
            theta_1d: The model's parameters ``(1, D)``.
            sets: The examples of each row of a file.
            first: Number of the first of these rows. What is drawn for a row depends on its number alone.

        Raises:
            ModelError: if the task is causal and the base looks ahead.
        """
        self.look(self.tuned.spec.unflatten(theta_1d[0]), sets)
        self.tuned.bind(theta_1d.to(self.device))
        sums: dict[str, torch.Tensor] = {}

        def draw(s: int, i: int) -> list[Row]:
            return self.task.rows(sets[s], np.array([i]), self.key.fold("predict", first + s, i).numpy())

        for batch, owner_q in self._shared_batches(sets, self._bounded(sets, None), draw):
            logits_pc = self.tuned.logits(batch)
            where = self._sums_device
            more = scorer.measure(logits_pc.to(where), batch.to(where), owner_q.to(where), len(sets))
            sums = {name: sums[name] + value if name in sums else value for name, value in more.items()}
        return sums

    def _bounded(self, sets: Sequence[Examples], max_tokens: int | None) -> int:
        """Most padded tokens of a batch."""
        max_tokens = max_tokens or self.max_tokens
        if self.learner.shaping.per_row or not sets:
            return max_tokens
        return min(max_tokens, max(1, MAX_LOGITS // sets[0].vocabulary.size))

    def _evaluate_shared(
        self, theta_kd: torch.Tensor, sets: Sequence[Examples], max_tokens: int, fold: str, watch: Callable[[int], None] | None = None
    ) -> dict[str, torch.Tensor]:
        self.tuned.bind(theta_kd)
        sums = self._no_sums(len(sets))
        for batch, owner_q in self._shared_batches(sets, max_tokens, lambda s, i: self._rows(sets[s], i, fold), watch):
            _add(sums, self._stats(batch, owner_q, len(sets)))
        return sums

    def _shared_batches(
        self,
        sets: Sequence[Examples],
        max_tokens: int,
        draw: Callable[[int, int], list[Row]],
        watch: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        """All examples in batches, the longest first, with the set to which each loss belongs.

        Args:
            draw: The rows of an example, by the numbers of its set and of its place there.
        """
        places = sorted(((int(n), s, i) for s, own in enumerate(sets) for i, n in enumerate(own.lengths)), reverse=True)
        first = 0
        while first < len(places):
            size = max(1, max_tokens // max(places[first][0], 1))
            rows: list[Row] = []
            owners: list[int] = []
            for _, s, i in places[first : first + size]:
                own = draw(s, i)
                rows += own
                owners += [s] * len(own)
            batch = self.learner.batch([rows])
            yield batch, torch.tensor(owners, device=self.device)[batch.row_q]
            first += size
            if watch is not None:
                watch(min(first, len(places)))

    def _evaluate_bank(self, theta_kd: torch.Tensor, sets: Sequence[Examples], max_tokens: int, fold: str) -> dict[str, torch.Tensor]:
        assert theta_kd.shape[0] == len(sets)
        self.tuned.bind(theta_kd)
        order = [np.argsort(-own.lengths, kind="stable") for own in sets]
        longest = max((int(own.lengths.max()) for own in sets if len(own)), default=1)
        size = max(1, max_tokens // (len(sets) * longest))
        sums = self._no_sums(len(sets))
        for first in range(0, max((len(own) for own in sets), default=0), size):
            parts = [
                [row for i in index[first : first + size].tolist() for row in self._rows(own, i, fold)]
                for own, index in zip(sets, order, strict=True)
            ]
            batch = self.learner.batch(parts)
            _add(sums, self._stats(batch, batch.owner_q, len(sets)))
        return sums

    def _rows(self, examples: Examples, i: int, fold: str) -> list[Row]:
        """Rows of one example. What is drawn for it must not depend on who is evaluated with it."""
        return self.task.rows(examples, np.array([i]), self.key.fold(fold, i).numpy())

    def _stats(self, batch: Batch, owner_q: torch.Tensor, num: int) -> dict[str, torch.Tensor]:
        logits_pc, where = self.tuned.logits(batch), self._sums_device
        return self.task.stats(logits_pc.to(where), batch.to(where), owner_q.to(where), num)

    def _no_sums(self, num: int) -> dict[str, torch.Tensor]:
        return self.task.no_stats(num, getattr(getattr(self.tuned.model, "config", None), "num_labels", 2), self._sums_device)

    @property
    def _sums_device(self) -> torch.device:
        """Where sums are kept: MPS has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device


def _add(sums: dict[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> None:
    for name, value in more.items():
        sums[name] += value


def _stack(memories: Sequence[Tree], device: torch.device) -> dict[str, torch.Tensor]:
    """Each client's leaves as rows; zeros for those who remember nothing yet."""
    names = {name: leaf for memory in memories for name, leaf in memory.items()}
    return {name: torch.stack([memory.get(name, torch.zeros_like(leaf)) for memory in memories]).to(device) for name, leaf in names.items()}

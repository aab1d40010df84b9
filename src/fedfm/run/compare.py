"""Did federating pay? A run beside its two ends: each owner alone, and all data in one place."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedfm.client.bank import Bank, Job
from fedfm.client.requests import start_of, stays_home
from fedfm.core import display
from fedfm.core.errors import DataError
from fedfm.core.messages import ClientId
from fedfm.core.parts import RoundContext, Update, Work, innermost
from fedfm.core.task import Examples
from fedfm.core.tree import Tree
from fedfm.data import Sample
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.observers.base import Watcher
from fedfm.observers.evaluate import Evaluate, estimated, summary
from fedfm.run.folder import COMPARE, RECIPE, RunFolder, latest_state
from fedfm.run.log import logged
from fedfm.run.loop import resume, run
from fedfm.server import FedAvg
from fedfm.simulation import Simulation

Stage = Callable[[str, int | None, int | None], None]
Scores = dict[str, Any]
TOGETHER = 512
"""Examples of everybody's test data on which each model is scored, unless ``evaluate.max_examples`` is null."""


@dataclass(frozen=True)
class Comparison:
    """The table that answers whether federating paid.

    Args:
        owners: For each owner the metrics on its own test data (all, or ``evaluate.ends`` examples), ``before``, with its own model (``local``), ``federated`` and
            ``centralised``.
        pooled: The same four on everybody's test data; ``local`` is the mean over the owners' own models.
        headline: The metric that leads, with its direction.
        everybody: ``examples`` of everybody's test data that ``pooled`` is made on, the same ones for all models, ``of`` how many, and the
            standard ``error`` of the headline of each of the four where that is not all.
        travelled: ``bytes_up`` and ``bytes_down``, and ``bytes_if_full_model`` had the whole model gone both ways.
        seconds: What each of the three took.
    """

    owners: list[dict[str, Any]]
    pooled: dict[str, dict[str, float]]
    headline: dict[str, Any]
    everybody: dict[str, Any]
    travelled: dict[str, int]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As written to ``compare.json``."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """The table and the verdict, for a notebook."""
        from fedfm.reports import comparison_lines

        return display.text(comparison_lines(self.to_json()))


def compare(
    federation: Federation, out: Path | str, rounds: int | None = None, *, watchers: Sequence[Watcher] = (), stage: Stage | None = None
) -> Comparison:
    """Runs a federation in ``out`` (or finishes the run that is there), then its two ends from the same start.

    An owner alone takes as many steps as a client that is in every round, ``rounds * steps``, with the same batch and trainer.
    Centralised training sees the same number of tokens as all rounds together: ``rounds * steps`` steps of a batch ``cohort`` times as large.
    Both have a rate that falls by rounds, where the recipe has one. With one local step in a round the optimizer is the server's (federated SGD
    under FedAdam), and theirs too; with more it is the trainer's, and they have no server.

    Args:
        out: The run's folder.
        stage: Told what is being done and how far it is, after the federated run.

    Raises:
        DataError: if no owner has test data to compare on.
    """
    out, stage = Path(out), stage or (lambda text, done, total: None)
    federation = federation if rounds is None else replace(federation, rounds=rounds)
    played = (
        resume(out, federation=federation, watchers=watchers) if (out / RECIPE).is_file() else run(federation, out=out, watchers=watchers)
    )
    for _ in played:
        pass
    with RunFolder.open(out) as folder, logged(out) as notes:
        notes.begin()
        ends = _Ends(federation, folder)
        table = ends.compare(stage)
        folder.write_json(COMPARE, table.to_json())
    from fedfm.reports import render

    render(out)
    return table


class _Ends:
    """The two ends of a run, trained by the same bank from the same start."""

    def __init__(self, federation: Federation, folder: RunFolder) -> None:
        self.simulation = Simulation.build(federation, folder.path)
        self.house, self.plan = self.simulation.house, self.simulation.federation
        self.house.choices.update(folder.choices())
        self.start = self.house.start
        self.ledger = folder.ledger(folder.journal.rounds[-1])
        self.after = latest_state(folder.path)
        # What the server sends beside the parameters, such as SCAFFOLD's control variate.
        travelling = self.plan.travelling(self.start)
        self.sent = self.plan.server.broadcast(travelling, self.plan.server.init(travelling))
        whole: dict[ClientId, Examples] = {client: self.house.shard(client).test for client in self.house.clients}
        self.sizes = {client: len(test) for client, test in whole.items()}
        ends = self.plan.evaluate.ends
        self.tests = whole if ends is None else {client: Sample(test, ends) for client, test in whole.items()}
        self.everybody = sampled(self.tests, None if self.plan.evaluate.max_examples is None else TOGETHER)
        self.is_all = sum(map(len, self.everybody.values())) == sum(map(len, self.tests.values()))

    def compare(self, stage: Stage) -> Comparison:
        began = time.perf_counter()
        stage("Evaluating before and after", None, None)
        models = {"before": [self.start], "federated": self.federated()}
        own = {way: self.score(models[way], self.tests) for way in models}
        if not own["before"]["owners"]:
            raise DataError("No owner has test data, so there is nothing to compare on. Give data.test, or a data.test_fraction above 0.")
        seconds = {"federated": self.ledger.seconds, "evaluate": time.perf_counter() - began}

        began, num_clients = time.perf_counter(), len(self.house.clients)
        local: dict[ClientId, dict[str, float]] = {}
        alone = []
        stage("Training each owner alone", 0, num_clients)
        for done, (client, params) in enumerate(self.alone()):
            scores = self.score([params], self.everybody)
            mine = scores if self.is_all else self.score([params], {client: self.tests[client]})
            local[client] = mine["owners"].get(client, {})
            alone.append(scores)
            stage("Training each owner alone", done + 1, num_clients)
        seconds["local"] = time.perf_counter() - began

        began = time.perf_counter()
        stage("Training on all data in one place", None, None)
        models["centralised"] = [self.centralised()]
        own["centralised"] = self.score(models["centralised"], self.tests)
        seconds["centralised"] = time.perf_counter() - began
        together = own if self.is_all else {way: self.score(models[way], self.everybody) for way in models}
        return self.table(own, local, together, alone, seconds)

    def table(
        self,
        own: Mapping[str, Scores],
        local: Mapping[ClientId, dict[str, float]],
        together: Mapping[str, Scores],
        alone: Sequence[Scores],
        seconds: dict[str, float],
    ) -> Comparison:
        """The comparison, from the scores on own and on everybody's test data."""
        owners = [
            {"owner": client, "local": local[client], **{way: scores["owners"].get(client, {}) for way, scores in own.items()}}
            for client in self.house.clients
            if client in own["before"]["owners"]
        ]
        errors = {way: scores["error"] for way, scores in together.items() if "error" in scores}
        if alone and all("error" in scores for scores in alone):
            # All models are scored on the same examples, so their errors go together.
            errors["local"] = statistics.fmean(scores["error"] for scores in alone)
        full = self.house.foundation.num_params * getattr(torch, self.plan.model.dtype).itemsize
        return Comparison(
            owners=owners,
            pooled={way: scores["pooled"] for way, scores in together.items()} | {"local": _mean([scores["pooled"] for scores in alone])},
            headline=self.plan.task.metric.to_json(),
            everybody={
                "examples": sum(map(len, self.everybody.values())),
                "of": sum(self.sizes.values()),
                "error": errors,
            },
            travelled={
                "bytes_up": self.ledger.bytes_up,
                "bytes_down": self.ledger.bytes_down,
                "bytes_if_full_model": 2 * full * self.ledger.client_rounds,
            },
            seconds=seconds,
        )

    def federated(self) -> list[Tree]:
        """The model that came of the run; one for each owner where some parameters stay at home."""
        params, house, counted = self.after.params, self.house, self.after.counted
        own = {client: self.plan.tuning.own(client) for client in house.clients}
        if not stays_home(house) and not any(own.values()):
            return [params]
        memories = {client: house.memory.load(client, counted.get(client)) if stays_home(house) else {} for client in house.clients}
        return [start_of(params, own[client], memory, house).all for client, memory in memories.items()]

    def score(self, models: Sequence[Tree], sets: Mapping[ClientId, Examples]) -> Scores:
        """Metrics on sets of test examples, and pooled, of one model for all or of one for each owner."""
        if len(models) > 1:
            models = [model for client, model in zip(self.house.clients, models, strict=True) if client in sets]
        sums = self.house.bank.evaluate(torch.stack([self.house.tuned.spec.flatten(params) for params in models]), list(sets.values()))
        totals = {
            client: estimated(self.plan.task, {name: value[i].cpu() for name, value in sums.items()}, len(own), self.sizes[client])
            for i, (client, own) in enumerate(sets.items())
        }
        return summary(self.plan.task, totals)

    def alone(self) -> Iterator[tuple[ClientId, Tree]]:
        """Each owner's own model. Owners with as many steps share a bank."""
        groups: dict[int, list[ClientId]] = {}
        for client in self.house.clients:
            groups.setdefault(self.steps(len(self.house.shard(client).train)), []).append(client)
        for steps, clients in groups.items():
            for first in range(0, len(clients), self.bank_size):
                jobs = [Job(client, self.house.shard(client).train) for client in clients[first : first + self.bank_size]]
                yield from zip(
                    (job.client for job in jobs), self.trained("alone", jobs, replace(self.work, steps=steps, epochs=None)), strict=True
                )

    def centralised(self) -> Tree:
        """The model of somebody who holds all data."""
        everyone = self.simulation.owners.pooled()
        examples = everyone.shard(everyone.ids[0]).train
        cohort = max(self.plan.sampler.cohort_size(len(self.house.clients)), 1)
        # Where clients make passes over their own data, an owner of mean size stands for each of the cohort.
        work = replace(self.work, steps=self.steps(math.ceil(len(examples) / len(self.house.clients))), epochs=None)
        if work.batch_size is not None:
            # The batch of a whole cohort, in parts that fit into memory as a bank does.
            together = max(size for size in range(1, cohort + 1) if size <= self.bank_size and cohort % size == 0)
            work = replace(work, batch_size=work.batch_size * together, accumulate=work.accumulate * cohort // together)
        (params,) = self.trained("centralised", [Job(everyone.ids[0], examples)], work)
        return params

    @property
    def work(self) -> Work:
        """What a client does in a round."""
        return innermost(self.plan.local).work

    @cached_property
    def bank_size(self) -> int:
        """Clients in a batch."""
        # Whatever engine ran the federation, its ends are trained here.
        return Embedded(bank=self.plan.engine.bank, device=self.plan.engine.device).open(self.house).bank_size()

    def trained(self, name: str, jobs: list[Job], work: Work) -> list[Tree]:
        """What comes of each job in all the rounds, ``work.steps`` steps in each, without a federation."""
        local, server, rounds = innermost(self.plan.local), self.plan.server, self.plan.rounds
        bank, spec = self.house.bank, self.house.tuned.spec
        bank = Bank(self.house.tuned, self.plan.task, local, bank.pad_id, bank.device, self.house.key.fold(name))
        steps = work.steps or 0
        if steps != 1 or self.sent:
            # Of several steps the optimizer is the trainer's; and what is sent to clients ties a step to them.
            server = FedAvg()
        if not rounds * steps:
            return [self.start for _ in jobs]
        if "plain-step" in server.traits().is_ and local.lr_at(0, steps, 1) == local.lr_at(0, steps, rounds):
            # Rounds mean nothing to somebody alone: one training that never stops.
            done = bank.train(self.start, jobs, 1, replace(work, steps=rounds * steps))
            return [spec.unflatten(own.params_d) for own in done]
        # With one local step in a round the optimizer is the server's, and a rate may fall from round to round.
        params_k: list[Tree] = [self.start for _ in jobs]
        state_k = [server.init(self.start) for _ in jobs]
        for round in range(1, rounds + 1):
            done = bank.train(self.start, jobs, round, work, torch.stack([spec.flatten(params) for params in params_k]))
            for k, own in enumerate(done):
                ctx = RoundContext(round, bank.key, params_k[k], 1, own.client)
                params_k[k], state_k[k] = server.step(params_k[k], Update(own.delta), state_k[k], ctx)
        return params_k

    def steps(self, num_examples: int) -> int:
        """Steps in a round of an owner with so many training examples."""
        work = self.plan.local.work
        if work.steps is not None:
            return work.steps
        batch = num_examples if work.batch_size is None else work.batch_size * work.accumulate
        return (work.epochs or 1) * math.ceil(num_examples / max(batch, 1))


def sampled(tests: Mapping[ClientId, Examples], most: int | None) -> dict[ClientId, Examples]:
    """At most ``most`` of everybody's test examples, as many of each owner; where owners are many, two of each of some, evenly spread."""
    if most is None or sum(map(len, tests.values())) <= most:
        return dict(tests)
    clients = list(Evaluate(owners=most // 2).chosen(list(tests)))
    return {client: Sample(tests[client], most // len(clients)) for client in clients}


def _mean(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each metric; a model that diverged has none, and makes the mean NaN rather than look better."""
    names = {name: None for report in reports for name in report}
    return {name: statistics.fmean(report.get(name, math.nan) for report in reports) for name in names}

"""Did federating pay? A run beside its two ends: each owner alone, and all data in one place."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from fedfm.core.stage import Stage
from fedfm.core.task import Examples, Task
from fedfm.core.tree import Tree
from fedfm.core.words import Metric
from fedfm.data import Sample
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.observers.base import Watcher
from fedfm.observers.evaluate import Evaluate, estimated, summary
from fedfm.observers.owners import MISSING
from fedfm.run.folder import COMPARE, RECIPE, RunFolder, latest_state
from fedfm.run.log import logged
from fedfm.run.loop import resume, run
from fedfm.server import FedAvg
from fedfm.simulation import Simulation

Scores = dict[str, Any]
TOGETHER = 512
"""Examples of everybody's test data on which each model is scored, unless ``evaluate.max_examples`` is null."""
CURVE = 10
"""Evaluations of an end while it trains, the one before training not counted."""


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
        seconds: What each of the three took; ``curves``, the evaluations of the ends while they trained, and ``evaluate``, all others.
        curves: For ``local`` and ``centralised``: ``round`` and the ``pooled`` metrics after as many steps as that many rounds have, on the test
            examples that the run's own scores are made on. Under ``local`` each owner's test data is scored with its own model.
        sums: Where the channel shows sums alone, in the place of ``owners``: how many there are, ``gain`` and ``lose`` by federating, the ``mean`` of each
            of the four, and why there is no more (``missing``).
    """

    owners: list[dict[str, Any]]
    pooled: dict[str, dict[str, float]]
    headline: dict[str, Any]
    everybody: dict[str, Any]
    travelled: dict[str, int]
    seconds: dict[str, float]
    curves: dict[str, list[dict[str, Any]]]
    sums: dict[str, Any] = field(default_factory=dict)

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
        self.scored = [score.round for score in folder.journal.scores if score.evaluated]
        # What the server sends beside the parameters, such as SCAFFOLD's control variate.
        travelling = self.plan.travelling(self.start)
        self.sent = self.plan.server.broadcast(travelling, self.plan.server.init(travelling))
        whole: dict[ClientId, Examples] = {client: self.house.shard(client).test for client in self.house.clients}
        self.sizes = {client: len(test) for client, test in whole.items()}
        ends = self.plan.evaluate.ends
        self.tests = whole if ends is None else {client: Sample(test, ends) for client, test in whole.items()}
        self.everybody = sampled(self.tests, None if self.plan.evaluate.max_examples is None else TOGETHER)
        self.is_all = sum(map(len, self.everybody.values())) == sum(map(len, self.tests.values()))
        self.curves = {end: self.curve(whole) for end in ("local", "centralised")}

    def compare(self, stage: Stage) -> Comparison:
        began = time.perf_counter()
        stage("Evaluating before and after", None, None)
        models = {"before": [self.start], "federated": self.federated()}
        own = {way: self.score(models[way], self.tests) for way in models}
        if not own["before"]["owners"]:
            raise DataError("No owner has test data, so there is nothing to compare on. Give data.test, or a data.test_fraction above 0.")
        seconds = {"federated": self.ledger.seconds, "evaluate": time.perf_counter() - began}
        start = self.house.tuned.spec.flatten(self.start).unsqueeze(0)

        began, num_clients, curve = time.perf_counter(), len(self.house.clients), self.curves["local"]
        curve.at(0, list(curve.sets), start)
        local: dict[ClientId, dict[str, float]] = {}
        alone = []
        stage("Training each owner alone", 0, num_clients)
        for done, (client, params) in enumerate(self.alone()):
            scores = self.score([params], self.everybody)
            mine = scores if self.is_all else self.score([params], {client: self.tests[client]})
            local[client] = mine["owners"].get(client, {})
            alone.append(scores)
            stage("Training each owner alone", done + 1, num_clients)
        seconds["local"] = time.perf_counter() - began - curve.seconds

        began, curve = time.perf_counter(), self.curves["centralised"]
        curve.totals.update({round: totals for round, totals in self.curves["local"].totals.items() if round == 0})
        stage("Training on all data in one place", None, None)
        models["centralised"] = [self.centralised()]
        own["centralised"] = self.score(models["centralised"], self.tests)
        seconds["centralised"] = time.perf_counter() - began - curve.seconds
        seconds["curves"] = sum(curve.seconds for curve in self.curves.values())
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
        hides = "single-updates" in self.plan.channel.traits().hides
        return Comparison(
            owners=[] if hides else owners,
            sums=counted(self.plan.task.metric, owners) if hides else {},
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
            curves={end: curve.points() for end, curve in self.curves.items()},
        )

    def federated(self) -> list[Tree]:
        """The model that came of the run; one for each owner where some parameters stay at home."""
        params, house, counted = self.after.params, self.house, self.after.counted
        own = {client: self.plan.tuning.own(client) for client in house.clients}
        if not stays_home(house) and not any(own.values()):
            return [params]
        memories = {client: house.memory.load(client, counted.get(client)) if stays_home(house) else {} for client in house.clients}
        return [start_of(params, own[client], memory, house).all for client, memory in memories.items()]

    def curve(self, tests: Mapping[ClientId, Examples]) -> _Curve:
        """An empty learning curve, at rounds in which the run was scored and on the examples of those scores."""
        most = self.plan.evaluate.max_examples
        sets = {
            client: tests[client] if most is None else Sample(tests[client], most)
            for client in self.plan.evaluate.chosen(self.house.clients)
            if self.sizes[client]
        }
        rounds = [round for round in self.scored if 0 < round <= self.after.round]
        chosen = {rounds[(i + 1) * len(rounds) // CURVE - 1] for i in range(CURVE)} if len(rounds) > CURVE else set(rounds)
        return _Curve(self.plan.task, self.house.bank, sets, self.sizes, chosen)

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
                    (job.client for job in jobs),
                    self.trained("alone", jobs, replace(self.work, steps=steps, epochs=None), self.curves["local"].at),
                    strict=True,
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
        curve = self.curves["centralised"]
        watch: Curve = lambda round, _, theta_kd: curve.at(round, list(curve.sets), theta_kd)  # noqa: E731
        (params,) = self.trained("centralised", [Job(everyone.ids[0], examples)], work, watch)
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

    def trained(self, name: str, jobs: list[Job], work: Work, watch: Curve) -> list[Tree]:
        """What comes of each job in all the rounds, ``work.steps`` steps in each, without a federation.

        Args:
            watch: Shown the parameters when each round is over.
        """
        local, server, rounds = innermost(self.plan.local), self.plan.server, self.after.round
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
            def by_round(step: int, clients: Sequence[ClientId], theta_kd: torch.Tensor) -> None:
                if step % steps == 0:
                    watch(step // steps, clients, theta_kd)

            done = bank.train(self.start, jobs, 1, replace(work, steps=rounds * steps), watch=by_round)
            return [spec.unflatten(own.params_d) for own in done]
        # With one local step in a round the optimizer is the server's, and a rate may fall from round to round.
        params_k: list[Tree] = [self.start for _ in jobs]
        state_k = [server.init(self.start) for _ in jobs]
        for round in range(1, rounds + 1):
            done = bank.train(self.start, jobs, round, work, torch.stack([spec.flatten(params) for params in params_k]))
            for k, own in enumerate(done):
                ctx = RoundContext(round, bank.key, params_k[k], 1, own.client)
                params_k[k], state_k[k] = server.step(params_k[k], Update(own.delta), state_k[k], ctx)
            watch(round, [job.client for job in jobs], torch.stack([spec.flatten(params) for params in params_k]))
        return params_k

    def steps(self, num_examples: int) -> int:
        """Steps in a round of an owner with so many training examples."""
        work = self.plan.local.work
        if work.steps is not None:
            return work.steps
        batch = num_examples if work.batch_size is None else work.batch_size * work.accumulate
        return (work.epochs or 1) * math.ceil(num_examples / max(batch, 1))


Curve = Callable[[int, Sequence[ClientId], torch.Tensor], None]
"""Called with a round that is over, whose parameters they are, and the parameters ``(K, D)``."""


class _Curve:
    """The learning curve of an end.

    Args:
        sets: Test examples of each owner that it is scored on.
        sizes: How many each owner has in all.
        rounds: Rounds after which it is scored.
    """

    def __init__(
        self, task: Task, bank: Bank, sets: Mapping[ClientId, Examples], sizes: Mapping[ClientId, int], rounds: Collection[int]
    ) -> None:
        self.task, self.bank, self.sets, self.sizes, self.rounds = task, bank, sets, sizes, {0, *rounds} if rounds else set()
        self.totals: dict[int, dict[ClientId, Tree]] = {}
        self.seconds = 0.0

    def at(self, round: int, clients: Sequence[ClientId], theta_kd: torch.Tensor) -> None:
        """Scores models after a round, each on its owner's examples; or one model on the examples of all these owners."""
        rows = [k for k, client in enumerate(clients) if client in self.sets]
        if round not in self.rounds or not rows:
            return
        began = time.perf_counter()
        own = {clients[k]: self.sets[clients[k]] for k in rows}
        sums = self.bank.evaluate(theta_kd if len(theta_kd) == 1 else theta_kd[rows], list(own.values()))
        for i, (client, examples) in enumerate(own.items()):
            measured = {name: value[i].cpu() for name, value in sums.items()}
            self.totals.setdefault(round, {})[client] = estimated(self.task, measured, len(examples), self.sizes[client])
        self.seconds += time.perf_counter() - began

    def points(self) -> list[dict[str, Any]]:
        """The scores by round, pooled over owners."""
        return [{"round": round, "pooled": summary(self.task, totals)["pooled"]} for round, totals in sorted(self.totals.items())]


def counted(metric: Metric, owners: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Owners' scores as counts and means, as a channel that shows sums alone lets a deployment know them."""
    known = [{way: row[way].get(metric.name) for way in ("before", "local", "federated", "centralised") if way in row} for row in owners]
    pairs = [(scores["federated"], scores["local"]) for scores in known]
    means = (
        {way: {"mean": statistics.fmean(scores[way] for scores in known)} for way in known[0]}
        if known and all(None not in s.values() for s in known)
        else {}
    )
    return {
        "owners": len(pairs),
        "gain": sum(metric.is_better(federated, local) for federated, local in pairs),
        "lose": sum(metric.is_better(local, federated) for federated, local in pairs),
        **means,
        "missing": MISSING,
    }


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

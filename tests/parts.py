"""Small parts, as another package would bring them: one for each door."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from fedfm.client.house import House
from fedfm.client.verb import Contribution, Verb
from fedfm.core import leaves as declare
from fedfm.core import tree
from fedfm.core.batch import Batch, IntArray, Row, Shaping
from fedfm.core.errors import ConfigError, DataError, FedfmError, MessageError, RunError
from fedfm.core.keys import Key
from fedfm.core.leaves import Kind, Leaf
from fedfm.core.messages import Body, Failure, Reply, Request, Scalar
from fedfm.core.parts import (
    Channel,
    ClientId,
    Cohort,
    Errand,
    LocalTrainer,
    Objective,
    Partial,
    RoundContext,
    Scratch,
    Sealed,
    ServerOptimizer,
    Session,
    Traits,
    Transform,
    Update,
    Work,
    traits,
)
from fedfm.core.session import Answer
from fedfm.core.task import Encoder, Example, Examples, RawRow, Task
from fedfm.core.tree import Spec, Tree
from fedfm.data.records import text_in
from fedfm.tasks.sequences import ratio, tokenize
from fedfm.tuning.base import Tuning, WrappedTuning
from fedfm.verbs.train import number


@dataclass(frozen=True)
class Hadamard(Tuning):
    """LoHa, as another package would bring it: it reads its adapters and does nothing else."""

    peft_type = "LOHA"

    r: int = 8

    @classmethod
    def from_peft(cls, config, tensors):
        return cls(r=int(config["r"]))

    def attach(self, foundation):
        raise NotImplementedError

    def save(self, foundation, params, folder):
        raise NotImplementedError

    def merge(self, foundation, params):
        raise NotImplementedError


@dataclass(frozen=True)
class Personal(WrappedTuning):
    """Some leaves of ``inner`` train and stay with their client. With an empty ``home`` it is ``inner``.

    Args:
        inner: What trains.
        home: Patterns of the names that stay (``*lora_B*``).
    """

    inner: Tuning
    home: tuple[str, ...] = ()

    def travels(self, spec: Spec) -> tuple[str, ...]:
        return tuple(name for name in self.inner.travels(spec) if not any(fnmatchcase(name, pattern) for pattern in self.home))


@dataclass(frozen=True)
class Ranks(WrappedTuning):
    """Clients with the first rows of ``A`` and columns of ``B`` only. The scale stays that of the full rank.

    Args:
        inner: LoRA of the full rank.
        ranks: Each client's rank; a client that is not named has the full one.

    Raises:
        ConfigError: if a rank is less than 1.
    """

    inner: Tuning
    ranks: tuple[tuple[ClientId, int], ...] = ()

    def __post_init__(self) -> None:
        if any(rank < 1 for _, rank in self.ranks):
            raise ConfigError(f"Ranks.ranks is {self.ranks}; a rank is 1 or more.")

    def own(self, client: ClientId) -> Mapping[str, int]:
        ranks = dict(self.ranks)
        return {"rank": ranks[client]} if client in ranks else {}

    def cut(self, tree: Tree, own: Mapping[str, Scalar]) -> dict[str, torch.Tensor]:
        if "rank" not in own:
            return dict(tree)
        rank = number(own, "rank")
        if not rank:
            raise MessageError(f"a request's rank is {rank!r}; it is 1 or more.")
        return {
            name: leaf[:rank] if name.endswith(".lora_A.weight") else leaf[:, :rank] if name.endswith(".lora_B.weight") else leaf
            for name, leaf in tree.items()
        }

    def pad(self, tree: Tree, spec: Spec, own: Mapping[str, Scalar]) -> dict[str, torch.Tensor]:
        shapes = dict(zip(spec.names, spec.shapes, strict=True))
        full = {name: leaf.new_zeros(shapes[name]) for name, leaf in tree.items()}
        for name, leaf in tree.items():
            full[name][tuple(slice(size) for size in leaf.shape)] = leaf
        return full


HELLO, HELLOS, UNIFORM, RING, TICKET = "masks.hello", "masks.hellos", "masks.uniform", "masks.ring", "ticket"
PRIME = 2**521 - 1


@dataclass(frozen=True)
class Masks(Channel):
    """Two exchanges that give one sum. First each client answers a public value; then each adds masks that cancel in the sum of all.

    A test of the door, and no protection: nobody checks whose value is whose, the group is a toy, and one missing client loses the sum.

    Args:
        grid: Integers count units of ``2^-grid``.
        bound: No value is larger, times its client's weight.
    """

    grid: int = 32
    bound: float = 2.0**24

    verbs = (HELLO,)

    def traits(self) -> Traits:
        return traits(hides=["single-updates"])

    def collect(
        self, session: Session, errand: Errand, clients: Sequence[ClientId], deadline: float | None, ctx: RoundContext
    ) -> Iterator[Update | Partial | Failure]:
        publics: dict[ClientId, str] = {}
        hello = Body(HELLO, errand.body.round)
        for answer in ask(session, {name: errand.request(name, hello) for name in clients}, deadline):
            value = None if isinstance(answer, Failure) else answer.meta.get("public")
            if isinstance(answer, Failure):
                yield answer
            elif not isinstance(value, str) or set(answer.meta) != {"public"} or answer.tensors:
                yield Failure(answer.client, "channel", "it gave no public value.")
            else:
                publics[answer.client] = value
        meta = {**errand.body.meta, HELLOS: json.dumps(publics, sort_keys=True), UNIFORM: errand.uniform}
        body = replace(errand.body, meta=meta)
        yield from self._sum(errand, list(ask(session, {name: errand.request(name, body) for name in publics}, deadline)))

    def _sum(self, errand: Errand, answers: Sequence[Answer]) -> Iterator[Partial | Failure]:
        """The sum of all rings, if none is missing."""
        size = sum(leaf.size for leaf in errand.leaves) + 1
        total, tickets, lost = torch.zeros(size, dtype=torch.int64), dict[ClientId, int](), list[Failure]()
        for answer in answers:
            try:
                if isinstance(answer, Failure):
                    lost.append(answer)
                    continue
                ring, ticket = _ring(answer, size)
                total += ring
                tickets |= {} if ticket is None else {answer.client: ticket}
            except MessageError as error:
                lost.append(Failure(answer.client, "channel", str(error)))
        clients = [answer.client for answer in answers]
        bound = self.bound * len(clients)
        if lost:
            missing = {failure.client for failure in lost}
            yield from lost
            yield from (
                Failure(name, "channel", f"its masks do not cancel without {sorted(missing)}.") for name in clients if name not in missing
            )
        elif int(total.abs().max()) > bound * 2**self.grid:
            yield from (Failure(name, "channel", "the masks of this round did not cancel.") for name in clients)
        elif clients:
            partial = Partial.of_ring(errand.leaves, total, self.grid, bound, clients, errand.uniform)
            partial.tickets = tickets
            yield partial

    def answer(self, client: ClientId, request: Request, scratch: Scratch) -> Sealed:
        if request.verb != HELLO:
            return super().answer(client, request, scratch)
        # From the system, not from the run's key: masks cancel, so that a run resumes with the same bits all the same.
        secret = secrets.randbits(512)
        scratch["secret"] = secret
        # Of one length, so that a run's bytes are the same each time.
        return Sealed({}, {"public": f"{pow(3, secret, PRIME):0132x}"})

    def seal(self, update: Update, leaves: tuple[Leaf, ...], request: Request, scratch: Scratch) -> Sealed:
        me, secret, relayed = update.client or "", scratch.get("secret"), request.meta.get(HELLOS)
        try:
            publics = {str(name): int(value, 16) for name, value in json.loads(str(relayed)).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise MessageError("the server did not relay the public values.") from error
        if not isinstance(secret, int) or publics.get(me) != pow(3, secret, PRIME):
            raise MessageError("the server did not relay this client's own public value.")
        if len(publics) < 2:
            raise MessageError("a sum of one client hides nothing.")
        ring = self._integers(update, leaves, request.meta.get(UNIFORM) is True)
        for other, public in sorted(publics.items()):
            if other != me:
                shared = f"{request.verb} {request.round} {sorted((me, other))} {pow(public, secret, PRIME)}"
                generator = Key(hashlib.blake2b(shared.encode(), digest_size=32).digest()).generator()
                mask = torch.randint(-(2**63), 2**63 - 1, ring.shape, generator=generator)
                ring += mask if me < other else -mask
        return Sealed({RING: ring}, {} if update.ticket is None else {TICKET: update.ticket})

    def _integers(self, update: Update, leaves: Sequence[Leaf], uniform: bool) -> torch.Tensor:
        """The answer as ``Partial.of_ring`` reads it."""
        weight = 1.0 if uniform else update.weight
        tensors = [leaf for reduce in ("mean", "sum") for leaf in declare.payload(leaves) if leaf.reduce == reduce]
        numbers = {"weight": update.weight, **update.metrics}
        values = [(leaf, update.payload[leaf.name].reshape(-1).double()) for leaf in tensors]
        values += [(leaf, torch.tensor([numbers[leaf.name]], dtype=torch.float64)) for leaf in declare.numbers(leaves)]
        terms = [value * (weight if leaf.reduce == "mean" else 1.0) for leaf, value in values]
        term_d = torch.cat([*terms, torch.tensor([weight], dtype=torch.float64)])
        if not term_d.abs().max() <= self.bound:
            raise MessageError(f"its answer holds a value that is not finite or beyond {self.bound:g}, which the ring does not hold.")
        return (term_d * 2**self.grid).round().to(torch.int64)


def ask(session: Session, requests: Mapping[ClientId, Request], deadline: float | None) -> Iterator[Answer]:
    """One answer for each request."""
    waiting = dict(requests)
    for answer in session.exchange(requests, deadline):
        request = waiting.pop(answer.client, None)
        if request is None:
            continue
        if isinstance(answer, Reply) and (answer.verb, answer.round) != (request.verb, request.round):
            yield Failure(answer.client, "channel", f"it answered {answer.verb} of round {answer.round}.")
        else:
            yield answer
    yield from (Failure(client, "channel", "it gave no answer.") for client in waiting)


def _ring(reply: Reply, size: int) -> tuple[torch.Tensor, int | None]:
    Spec((RING,), ((size,),), (torch.int64,)).require_shapes(reply.tensors, "its answer")
    ticket = reply.meta.get(TICKET)
    if reply.meta.keys() - {TICKET} or not (ticket is None or (type(ticket) is int and 0 <= ticket < 1 << 31)):
        raise MessageError("it tells more than its ticket.")
    return reply.tensors[RING], ticket if isinstance(ticket, int) else None


NORM, BELOW = "norm", "clip.below"


@dataclass(frozen=True)
class AdaptiveClip(Transform):
    """``x * min(1, C / ||x||)`` with ``C <- C exp(-lr (share of clients below C - quantile))``. With ``lr=0`` it is a clip at ``norm``.

    Andrew, Thakkar, McMahan, Ramaswamy, `Differentially Private Learning with Adaptive Clipping <https://arxiv.org/abs/1905.03871>`_, 2019.

    Args:
        norm: ``C`` of the first round.
        quantile: Share of clients that should lie below it.
        lr: Rate of its logarithm.
    """

    norm: float = 0.1
    quantile: float = 0.5
    lr: float = 0.5

    def traits(self) -> Traits:
        return traits(needs=["float-leaves"], is_=["linear"])

    def init(self, params: Tree) -> Tree:
        return {NORM: torch.tensor(self.norm, dtype=torch.float64)}

    def broadcast(self, state: Tree) -> Tree:
        return state

    def leaves(self, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        return (*leaves, declare.number(BELOW, bound=1.0))

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        Spec((NORM,), ((),), (torch.float64,)).require(ctx.received, "what the server sent for AdaptiveClip")
        bound = float(ctx.received[NORM])
        deltas = {name: leaf for name, leaf in update.payload.items() if not tree.added(name, ctx.params)}
        norm = tree.norm(deltas)
        shorter = deltas if norm <= bound else {name: leaf * (bound / norm) for name, leaf in deltas.items()}
        return replace(update, payload={**update.payload, **shorter}, metrics={**update.metrics, BELOW: float(norm <= bound)}), memory

    def finish(self, aggregate: Update, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        share = aggregate.metrics.get(BELOW, self.quantile) / max(aggregate.num_clients, 1)
        return aggregate, {NORM: state[NORM] * math.exp(-self.lr * (share - self.quantile))} if aggregate.num_clients else state


CHANGES, SEED = "scalars.changes", "scalars.seed"


def direction(seed: torch.Tensor, step: int, size: int) -> torch.Tensor:
    """The signs ``(size,)`` along which everybody moves in a step."""
    return torch.randint(2, (size,), generator=Key.root(int(seed)).fold("scalars", step).generator()).float() * 2 - 1


@dataclass(frozen=True)
class Scalars(LocalTrainer):
    """``w += a_s z_s``, ``a_s = -lr (f(w + c z_s) - f(w - c z_s)) / 2c``, and the numbers ``a_s`` are all that leaves: seeded SPSA.

    The signs ``z_s`` come from a seed that the server sends, so that both halves draw the same ones.

    Args:
        lr: Learning rate.
        c: How far to either side a loss is taken.
        steps: In a round; each is a number in the payload.
    """

    lr: float = 0.01
    c: float = 0.01
    steps: int = 3

    @property
    def work(self) -> Work:
        return Work(batch_size=2, steps=self.steps, epochs=None)

    def traits(self) -> Traits:
        return traits(hides=["deltas"])

    def lr_at(self, step: int, num_steps: int, round: int) -> float:
        return self.lr

    def init(self, cohort: Cohort) -> None:
        Spec((SEED,), ((),), (torch.int64,)).require({SEED: cohort.received.get(SEED, torch.zeros(0))}, "what the server sent for Scalars")
        cohort.slots[CHANGES] = torch.zeros(len(cohort.theta_kd), self.steps, device=cohort.theta_kd.device)

    def descend(self, cohort: Cohort, objective: Objective, lr_k: torch.Tensor, step: int) -> None:
        z_d = direction(cohort.received[SEED], step, cohort.theta_kd.shape[1]).to(cohort.theta_kd.device)
        difference_k = objective.losses(cohort.theta_kd + self.c * z_d) - objective.losses(cohort.theta_kd - self.c * z_d)
        change_k1 = -lr_k * difference_k.unsqueeze(1) / (2 * self.c)
        cohort.theta_kd.add_(change_k1 * z_d)
        cohort.slots[CHANGES][:, step] = change_k1.squeeze(1)

    def leaves(self, trained: Spec, travelling: Spec) -> tuple[Leaf, ...]:
        return (Leaf(CHANGES, (self.steps,), group="scalars"),)

    def finish(self, cohort: Cohort, lr_sum_k: torch.Tensor, steps_k: torch.Tensor) -> dict[str, torch.Tensor]:
        return {CHANGES: cohort.slots[CHANGES]}


@dataclass(frozen=True)
class ScalarsServer(ServerOptimizer):
    """``w += sum_s mean(a_s) z_s``: the mean of the clients' parameters, rebuilt from numbers.

    Args:
        seed: From which each round's seed is drawn.
    """

    seed: int = 0

    def init(self, params: Tree) -> Tree:
        return {SEED: self._drawn(0)}

    def broadcast(self, params: Tree, state: Tree) -> Tree:
        return state

    def step(self, params: Tree, update: Update, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        spec = Spec.of(params)
        w_d = spec.flatten(params)
        for step, change in enumerate(update.payload[CHANGES]):
            w_d = w_d + change * direction(state[SEED], step, spec.size)
        return spec.unflatten(w_d), {SEED: self._drawn(ctx.round)}

    def _drawn(self, round: int) -> torch.Tensor:
        return torch.tensor(Key.root(self.seed).fold(round).seed())


@dataclass(frozen=True)
class Metered(Transform):
    """Each update costs its client one of ``limit``, for good. With a limit above the number of attempts it changes nothing.

    Args:
        limit: Updates that a client will give.
    """

    limit: int = 10

    def traits(self) -> Traits:
        return traits(is_=["linear"])

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        if ctx.spent is not None:
            if ctx.spent.total("updates") >= self.limit:
                raise RunError(f"its owner gives {self.limit} updates, and all of them are spent.")
            ctx.spent.add("updates", 1)
        return update, memory


@dataclass(frozen=True)
class Private(Transform):
    """Promises privacy without any, and covers deltas alone."""

    def traits(self) -> Traits:
        return traits(is_=["linear", "private"])


LONGER, LENGTH = "longer", "more_than"


@dataclass(frozen=True)
class Count(Verb):
    """Counts the training examples that are longer than so many tokens."""

    name = "count"

    def errand(self, more_than: int, sums: bool = True) -> Errand:
        return Errand(Body(self.name, meta={LENGTH: more_than}), (declare.number(LONGER),), sums=sums, uniform=True)

    def total(self, channel: Channel, session: Session, clients: Sequence[ClientId], more_than: int, key: Key) -> float:
        """The count of all owners together.

        Raises:
            DataError: naming an owner that does not answer.
        """
        total = 0.0
        for item in channel.collect(session, self.errand(more_than), clients, None, RoundContext(0, key, {}, len(clients))):
            if isinstance(item, Failure):
                raise DataError(f"{item.client}: {item.reason}")
            total += item.totals()[LONGER].item() if isinstance(item, Partial) else item.metrics[LONGER]
        return total

    def tells(self, request: Request, house: House) -> Mapping[Kind, str]:
        return {"counts": "it is one"}

    def answer(self, requests: Mapping[ClientId, Request], house: House) -> Iterator[Contribution | Failure]:
        for client, request in requests.items():
            try:
                more_than = number(request.meta, LENGTH)
                if more_than is None:
                    raise MessageError("the request names no length.")
                longer = float((house.shard(client).train.lengths > more_than).sum())
                yield Contribution(Update({}, client=client, metrics={LONGER: longer}), (declare.number(LONGER),))
            except FedfmError as error:
                yield Failure(client, self.name, str(error))


@dataclass(frozen=True)
class Pairs(Task):
    """``-log sigmoid(s(better) - s(worse))`` with ``s`` the difference of a classifier's two logits: one loss from two rows.

    The model gets the half of the text that each token is in.

    Args:
        better: Column that holds the better text.
        worse: Column that holds the other.
        max_length: Tokens of both together.
    """

    better: str = "better"
    worse: str = "worse"
    max_length: int = 32

    head = "sequence_classification"
    labels = ("worse", "better")

    @property
    def columns(self) -> tuple[str, ...]:
        return self.better, self.worse

    def require(self, row: RawRow) -> None:
        for column in self.columns:
            text_in(row, column)

    def encoder(self, tokenizer: Any) -> Encoder:
        return _PairEncoder(self, tokenizer)

    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[Row]:
        """The better text's row, and the worse one's."""
        rows = []
        for i in index.tolist():
            for ids in np.split(examples.ids(i), [examples.start(i)]):
                half = (np.arange(len(ids)) >= len(ids) // 2).astype(np.int64)
                rows.append(Row(ids, np.array([1]), {"token_type_ids": half}))
        return rows

    def batch(self, parts: Sequence[Sequence[Row]], shaping: Shaping) -> Batch:
        """One loss for each pair of rows."""
        batch = super().batch(parts, shaping)
        return replace(batch, row_q=batch.row_q[::2], owner_q=batch.owner_q[::2], targets={})

    def losses(self, logits_pc: torch.Tensor, batch: Batch) -> torch.Tensor:
        score_q2 = (logits_pc[:, 1] - logits_pc[:, 0]).float().view(-1, 2)
        return -torch.nn.functional.logsigmoid(score_q2[:, 0] - score_q2[:, 1])

    def stats(self, logits_pc: torch.Tensor, batch: Batch, owner_q: torch.Tensor, num_clients: int) -> dict[str, torch.Tensor]:
        """The better text counts as recognised where the loss is below that of a tie."""
        loss_q = self.losses(logits_pc, batch).double()
        zero = torch.zeros(num_clients, dtype=torch.float64, device=owner_q.device)
        values = {"loss": loss_q, "hits": (loss_q < math.log(2)).double(), "targets": torch.ones_like(loss_q)}
        return {name: zero.index_add(0, owner_q, value_q) for name, value_q in values.items()}

    def summarise(self, sums: Tree) -> dict[str, float]:
        return {"loss": ratio(sums["loss"], sums["targets"]), "accuracy": ratio(sums["hits"], sums["targets"])}


class _PairEncoder(Encoder):
    def __init__(self, task: Pairs, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer

    def add(self, rows: Sequence[RawRow]) -> list[Example]:
        texts = [text_in(row, column) for row in rows for column in self.task.columns]
        ids = [np.array(own, dtype=np.int32) for own in tokenize(self.tokenizer, texts, True, self.task.max_length // 2)]
        return [Example(np.concatenate(pair), start=len(pair[0])) for pair in zip(ids[::2], ids[1::2], strict=True)]

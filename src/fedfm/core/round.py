"""A round is one sentence: sample, work, encode, collect, decode, aggregate, finish, step, record.

*Work* and *encode* happen where the client is (:mod:`fedfm.client.runtime`); the rest is here.
Updates stream: the server holds the aggregate and one update, never a cohort (robust rules excepted).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedfm.core import messages
from fedfm.core.check import Plan
from fedfm.core.errors import MessageError, RoundError
from fedfm.core.keys import Key
from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.parts import ClientId, RoundContext, Session, Update
from fedfm.core.sums import LIMIT
from fedfm.core.tree import Spec, Tree, norm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerState:
    """Everything the server needs to go on.

    Args:
        round: Rounds completed.
        params: The global trainable parameters.
        server: The server optimizer's state.
    """

    round: int
    params: Tree
    server: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class RoundRecord:
    """What a round leaves in the metrics. Numbers that time decides are in ``seconds`` alone.

    Args:
        cohort: Who was asked.
        failures: Who failed, where and why; one entry for each attempt.
        clients: What each client told about its work.
        metrics: Of the round: ``train_loss`` (weighted), ``update_norm``, and what observers add under ``eval``.
        bytes_up: Bytes of all replies.
        bytes_down: Bytes of all requests.
    """

    round: int
    cohort: tuple[ClientId, ...]
    failures: tuple[Failure, ...]
    clients: Mapping[ClientId, Mapping[str, float]]
    metrics: Mapping[str, Any]
    bytes_up: int
    bytes_down: int
    seconds: Mapping[str, float] = field(default_factory=dict)


def start(plan: Plan, params: Tree) -> ServerState:
    """The state before the first round."""
    return ServerState(0, dict(params), plan.server.init(params))


class Meter(Session):
    """A session that counts the bytes of what passes, and tells ``watch`` of each answer."""

    def __init__(self, inner: Session, watch: Callable[[Reply | Failure], None] | None = None) -> None:
        self.inner, self.watch = inner, watch
        self.bytes_up = self.bytes_down = 0

    def exchange(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> Iterator[Reply | Failure]:
        """The inner session's replies, counted."""
        # A broadcast is one request object for many clients: measured once, counted for each.
        sizes: dict[int, int] = {}
        for request in requests.values():
            if id(request) not in sizes:
                sizes[id(request)] = messages.size(request)
            self.bytes_down += sizes[id(request)]
        for answer in self.inner.exchange(requests, deadline):
            if isinstance(answer, Reply):
                self.bytes_up += messages.size(answer)
            if self.watch is not None:
                self.watch(answer)
            yield answer

    def close(self) -> None:
        """Closes the inner session."""
        self.inner.close()


def play(
    plan: Plan,
    state: ServerState,
    session: Session,
    clients: Sequence[ClientId],
    key: Key,
    watch: Callable[[Reply | Failure], None] | None = None,
) -> tuple[ServerState, RoundRecord]:
    """One round.

    Args:
        clients: Everyone registered, in a fixed order.
        key: The run's root key.
        watch: Called with each answer as it arrives.

    Raises:
        RoundError: if fewer than ``plan.min_clients`` updates arrive, or one fails under ``on_failure: stop``.
    """
    began = time.perf_counter()
    ctx = RoundContext(state.round + 1, key, state.params, len(clients))
    meter = Meter(session, watch)
    cohort = plan.sampler.sample(clients, ctx)
    told: dict[ClientId, Mapping[str, float]] = {}
    failures: list[Failure] = []
    request = Request("train", ctx.round, {**state.params, **plan.server.broadcast(state.params, state.server)})
    expected = expected_payload(plan, state.params)

    def updates() -> Iterator[Update]:
        for update in _collect(plan, meter, cohort, request, expected, ctx, failures):
            told[update.client or "*"] = {"weight": update.weight, **update.metrics}
            yield update

    aggregate = plan.aggregator(updates(), ctx)
    for transform in reversed(plan.transforms):
        aggregate = transform.finish(aggregate, ctx)
    params, server = plan.server.step(state.params, aggregate, state.server, ctx)
    Spec.of(state.params).require(params, f"Round {ctx.round}, parameters after the server step")

    losses = [(seen["weight"], seen["loss"]) for seen in (told[c] for c in cohort if c in told) if "loss" in seen]
    total = sum(weight for weight, _ in losses)
    metrics = {"update_norm": norm(aggregate.payload), "num_clients": aggregate.num_clients, "weight": aggregate.weight}
    if total > 0:
        metrics["train_loss"] = sum(weight * loss for weight, loss in losses) / total
    record = RoundRecord(
        round=ctx.round,
        cohort=tuple(cohort),
        failures=tuple(failures),
        clients={client: told[client] for client in cohort if client in told},
        metrics=metrics,
        bytes_up=meter.bytes_up,
        bytes_down=meter.bytes_down,
        seconds={"train": time.perf_counter() - began},
    )
    return ServerState(ctx.round, params, server), record


def expected_payload(plan: Plan, params: Tree) -> Spec:
    """What a decoded payload must look like: a delta for each parameter, and what the local trainer adds."""
    spec = Spec.of(params)
    extra = plan.local.extra(spec.size)
    return Spec((*spec.names, *extra), (*spec.shapes, *extra.values()), (*spec.dtypes, *(torch.float32 for _ in extra)))


def _collect(
    plan: Plan, session: Session, cohort: Sequence[ClientId], request: Request, expected: Spec, ctx: RoundContext, failures: list[Failure]
) -> Iterator[Update]:
    """Decoded updates as they arrive; asks again or gives up as the recipe says."""
    pending, arrived = list(cohort), 0
    for attempt in range(2 if plan.on_failure == "retry" else 1):
        failed: list[Failure] = []
        for item in plan.channel.collect(session, dict.fromkeys(pending, request), plan.deadline, ctx):
            if isinstance(item, Failure):
                failed.append(item)
            else:
                try:
                    update = decode(plan, item, ctx)
                    # One leaf-by-leaf check stands between what arrived and the sum.
                    expected.require(update.payload, "Its update")
                    require_summable(expected.flatten(update.payload), update.weight)
                except MessageError as error:
                    failed.append(Failure(item.client or "*", "decode", str(error)))
                    continue
                arrived += update.num_clients
                yield update
            if failed and plan.on_failure == "stop":
                break
        failed.sort(key=lambda failure: failure.client)
        failures.extend(failed)
        for failure in failed:
            log.warning("round %d: %s failed in %s (attempt %d): %s", ctx.round, failure.client, failure.stage, attempt + 1, failure.reason)
        if failed and plan.on_failure == "stop":
            first = failed[0]
            raise RoundError(
                f"Round {ctx.round}: client {first.client!r} failed in {first.stage}: {first.reason} "
                "The recipe says on_failure: stop; leave_out would go on without it, retry would ask once more."
            )
        pending = [failure.client for failure in failed]
        if not pending:
            break
    needed = max(1, plan.min_clients, plan.aggregator.min_updates())
    # A Poisson cohort may be empty by chance; that is a round without an update, not a failure.
    if arrived < needed and (cohort or needed > 1):
        reasons = "; ".join(f"{failure.client}: {failure.reason}" for failure in failures[:3])
        raise RoundError(f"Round {ctx.round}: {arrived} of {len(cohort)} clients gave an update, at least {needed} are needed. {reasons}")


def decode(plan: Plan, update: Update, ctx: RoundContext) -> Update:
    """Undoes the transforms' representations, right to left."""
    ctx = replace(ctx, client=update.client)
    for transform in reversed(plan.transforms):
        update = transform.decode(update, ctx)
    return update


def require_summable(x_d: torch.Tensor, weight: float) -> None:
    """Refuses an update so large that, with a few like it, no sum could hold it.

    Raises:
        MessageError: if a value times the weight reaches 1/256 of what an exact sum can hold.
    """
    largest, bound = max(abs(end.item()) for end in x_d.aminmax()) if len(x_d) else 0.0, LIMIT / 256
    if not largest * weight < bound:
        raise MessageError(f"Its update reaches {largest:.3g} with weight {weight:g}; a sum takes products below {bound:.3g}.")

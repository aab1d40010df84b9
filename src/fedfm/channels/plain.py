"""One exchange; the server sees each update."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.parts import Channel, ClientId, RoundContext, Session, Update
from fedfm.core.words import number

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plain(Channel):
    """One exchange; the server sees each update.

    Every client that was asked has exactly one outcome. An answer that nobody asked for is logged and dropped.
    A reply's ``weight`` is its update's weight (1 where the client does not tell), its other numbers are the update's metrics.
    """

    def collect(
        self, session: Session, requests: Mapping[ClientId, Request], deadline: float | None, ctx: RoundContext
    ) -> Iterator[Update | Failure]:
        """The updates as they arrive, and who failed."""
        waiting = set(requests)
        for answer in session.exchange(requests, deadline):
            if answer.client not in waiting:
                log.warning("round %d: dropped an answer of %r, who was not asked or has answered already", ctx.round, answer.client)
                continue
            waiting.remove(answer.client)
            yield answer if isinstance(answer, Failure) else _update(answer, requests[answer.client])
        for client in sorted(waiting):
            yield Failure(client, "channel", "it gave no answer.")


def _update(reply: Reply, request: Request) -> Update | Failure:
    if (reply.verb, reply.round) != (request.verb, request.round):
        return Failure(
            reply.client,
            "channel",
            f"it answered {reply.verb} of round {reply.round}, was asked to {request.verb} in round {request.round}.",
        )
    told = {name: value for name, value in reply.meta.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    numbers = {name: number(value) for name, value in told.items()}
    metrics = {name: value for name, value in numbers.items() if value is not None}
    if len(metrics) < len(told):
        name = next(name for name, value in numbers.items() if value is None)
        return Failure(reply.client, "channel", f"its {name} is {told[name]!r:.20}, not a finite number.")
    weight = metrics.pop("weight", 1.0)
    if not weight > 0 or (reply.meta.get("weight") is not None and "weight" not in told):
        return Failure(reply.client, "channel", f"its weight is {reply.meta['weight']!r:.20}; it must be a number above 0.")
    return Update(reply.tensors, weight=weight, client=reply.client, metrics=metrics)

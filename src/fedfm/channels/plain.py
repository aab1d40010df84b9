"""One exchange; the server sees each update."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedfm.core import leaves, words
from fedfm.core.errors import MessageError, RunError
from fedfm.core.leaves import Leaf
from fedfm.core.messages import ClientId, Failure, Reply, Request
from fedfm.core.parts import TICKET, Channel, Errand, Partial, RoundContext, Scratch, Sealed, Session, Update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plain(Channel):
    """One exchange; the server sees each update. Answers that may be summed are added as they arrive, so that the server never holds a cohort.

    Every client that was asked has exactly one outcome. An answer that nobody asked for is logged and dropped.
    """

    def collect(
        self, session: Session, errand: Errand, clients: Sequence[ClientId], deadline: float | None, ctx: RoundContext
    ) -> Iterator[Update | Partial | Failure]:
        """The updates as they arrive, or their sum at the end, and who failed."""
        waiting = dict.fromkeys(clients)
        total = Partial(errand.leaves, errand.uniform) if errand.sums else None
        for answer in session.exchange({client: errand.request(client) for client in clients}, deadline):
            if answer.client not in waiting:
                log.warning("round %d: dropped an answer of %r, who was not asked or has answered already", ctx.round, answer.client)
                continue
            del waiting[answer.client]
            opened = answer if isinstance(answer, Failure) else _opened(answer, errand, ctx)
            outcome = _added(total, opened) if isinstance(opened, Update) and total is not None else opened
            if outcome is not None:
                yield outcome
        for client in sorted(waiting):
            yield Failure(client, "channel", "it gave no answer.")
        if total is not None and total.num_clients:
            yield total

    def seal(self, update: Update, leaves: tuple[Leaf, ...], request: Request, scratch: Scratch) -> Sealed:
        """The payload unchanged, its numbers in the clear."""
        ticket = {} if update.ticket is None else {TICKET: update.ticket}
        return Sealed(update.payload, {**update.metrics, **ticket})


def _opened(reply: Reply, errand: Errand, ctx: RoundContext) -> Update | Failure:
    """The update in a reply; a failure of its client where the reply is malformed."""
    try:
        update = _read(reply, errand)
    except MessageError as error:
        return Failure(reply.client, "channel", str(error))
    try:
        update = errand.decoded(update, ctx)
    except MessageError as error:
        return Failure(reply.client, "decode", str(error))
    except RunError:
        # This machine's own disk is at fault, not a client.
        raise
    except Exception as error:
        # A payload that no check foresaw must not end the round for everybody else.
        log.debug("an update of %r could not be decoded", reply.client, exc_info=True)
        return Failure(reply.client, "decode", f"its payload cannot be decoded ({type(error).__name__}).")
    try:
        errand.judge(update)
    except MessageError as error:
        return Failure(reply.client, "bounds", str(error))
    return update


def _read(reply: Reply, errand: Errand) -> Update:
    body = errand.body
    if (reply.verb, reply.round) != (body.verb, body.round):
        raise MessageError(f"it answered {reply.verb} of round {reply.round}, was asked to {body.verb} in round {body.round}.")
    declared = leaves.numbers(errand.leaves)
    numbers: dict[str, float] = {}
    for leaf in declared:
        value = reply.meta.get(leaf.name)
        if value is None and leaf.optional:
            continue
        if value is None:
            raise MessageError(f"it does not tell its {leaf.name}.")
        number = words.number(value)
        if number is None and not (leaf.nan and isinstance(value, float) and math.isnan(value)):
            raise MessageError(f"its {leaf.name} is {value!r:.20}, not a finite number.")
        numbers[leaf.name] = math.nan if number is None else number
        leaf.require(numbers[leaf.name], "its answer")
    ticket = reply.meta.get(TICKET)
    given = errand.own.get(reply.client, {}).get(TICKET)
    if ticket is not None and (not isinstance(ticket, int) or isinstance(ticket, bool) or ticket != given):
        raise MessageError(f"its ticket is {ticket!r:.20}; the one that it was given is {given}.")
    unknown = reply.meta.keys() - numbers.keys() - {TICKET}
    if unknown:
        raise MessageError(f"it tells {sorted(unknown)[:3]}, which nobody asked for.")
    weight = numbers.pop("weight", 1.0)
    if not weight > 0:
        raise MessageError(f"its weight is {weight:g}; it must be a number above 0.")
    return Update(reply.tensors, weight, client=reply.client, metrics=numbers, ticket=ticket)


def _added(total: Partial, update: Update) -> Failure | None:
    """Adds an update to the sum; one that does not fit is its client's failure."""
    assert update.client is not None
    try:
        total.add(update.client, update.payload, {"weight": update.weight, **update.metrics}, update.weight)
    except MessageError as error:
        return Failure(update.client, "decode", str(error))
    if update.ticket is not None:
        total.tickets[update.client] = update.ticket
    return None

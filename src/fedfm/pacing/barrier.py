"""Everybody who was asked answers or fails before the round goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedfm.core.errors import RoundError
from fedfm.core.messages import ClientId, Failure
from fedfm.core.parts import Errand, Pacing, Partial, Plan, RoundContext, Session, Update
from fedfm.core.words import clean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Barrier(Pacing):
    """A round waits until each of its cohort has answered, has failed or is past the deadline. The default.

    A client that fails is left out, asked once more, or ends the run, as the recipe's ``on_failure`` says.
    """

    def gather(
        self, plan: Plan, session: Session, errand: Errand, cohort: Sequence[ClientId], ctx: RoundContext
    ) -> Iterator[Update | Partial | Failure]:
        """The answers as they arrive.

        Raises:
            RoundError: if fewer than ``plan.min_clients`` updates arrive, or one fails under ``on_failure: stop``.
        """
        pending, failures, num_arrived = list(cohort), list[Failure](), 0
        for attempt in range(2 if plan.on_failure == "retry" else 1):
            failed: list[Failure] = []
            for item in plan.channel.collect(session, replace(errand, attempt=attempt), pending, plan.deadline, ctx):
                if not isinstance(item, Failure):
                    num_arrived += item.num_clients
                    yield item
                    continue
                client = clean(item.client)
                log.warning("round %d: %s failed in %s (attempt %d): %s", ctx.round, client, item.stage, attempt + 1, item.reason)
                failed.append(item)
                if plan.on_failure == "stop":
                    raise RoundError(
                        f"Round {ctx.round}: client {client!r} failed in {item.stage}: {item.reason} "
                        "The recipe says on_failure: stop; leave_out would go on without it, retry would ask once more."
                    )
            # In an order that time does not decide.
            failed.sort(key=lambda failure: failure.client)
            yield from failed
            failures += failed
            pending = [failure.client for failure in failed]
            if not pending:
                break
        needed = max(1, plan.min_clients, plan.aggregator.min_updates())
        # A Poisson cohort may be empty by chance; that is a round without an update, not a failure.
        if num_arrived < needed and (cohort or needed > 1):
            reasons = "; ".join(f"{clean(failure.client)}: {failure.reason}" for failure in failures[:3])
            raise RoundError(
                f"Round {ctx.round}: {num_arrived} of {len(cohort)} clients gave an update, at least {needed} are needed. {reasons}"
            )

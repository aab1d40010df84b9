"""The client's side of every exchange.

A runtime hosts one client in an owner's house, or many on a simulation's machine; several that are asked the same thing share a batch.
What they can be asked are the verbs in the index and the exchanges of their channel. Anything else is refused.

An owner with a policy has a guard (:mod:`fedfm.client.guard`), which every request passes before data is read, and every answer before it leaves.

Covered here: a server that asks the wrong client, for an unknown verb, or in a round that no federation reaches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from fedfm.client.house import House
from fedfm.client.verb import Contribution, Verb, verbs
from fedfm.core.errors import FedfmError, MessageError, PolicyError
from fedfm.core.messages import ClientId, Failure, Reply, Request
from fedfm.core.parts import Scratch, Sealed, errand_id
from fedfm.core.session import Answer

log = logging.getLogger(__name__)
# Rounds are counted one by one.
_MAX_ROUND = 1 << 31


class Runtime:
    """Answers requests for the clients of a house.

    Attributes:
        scratch: What the channel keeps of each client between the exchanges of one errand, with the errand's name; dropped when a client is
            asked in another round.
    """

    def __init__(self, house: House) -> None:
        self.house = house
        self.scratch: dict[ClientId, tuple[str, Scratch]] = {}
        self._scratch_round = 0

    def handle(self, requests: Mapping[ClientId, Request]) -> Iterator[Answer]:
        """One answer for each request. Requests with equal bodies are answered together, as one bank."""
        known, channel = verbs(), self.house.plan.channel
        served: dict[ClientId, Request] = {}
        for client, request in requests.items():
            refusal = self._refusal(client, request, known)
            if refusal is not None:
                yield refusal
            elif request.verb in channel.verbs:
                scratch = self._scratch_of(client, request)
                yield self._reply(client, request, partial(channel.answer, client, request, scratch))
            else:
                served[client] = request
        for group in by_body(served):
            yield from self._answer(known[next(iter(group.values())).verb], group)

    def _refusal(self, client: ClientId, request: Request, known: Mapping[str, Verb]) -> Failure | None:
        """Why a request is not answered; ``None`` where it is. Nothing of the client's data has been read yet."""
        if client not in self.house.shards:
            return Failure(client, "exchange", f"no client {client!r} is hosted here")
        guard, verb = self.house.guard(client), known.get(request.verb)
        try:
            if guard is not None:
                guard.receive(request)
            if request.round >= _MAX_ROUND:
                raise MessageError(f"the round {request.round} is refused; a federation has fewer than {_MAX_ROUND}")
            if verb is None and request.verb not in self.house.plan.channel.verbs:
                raise MessageError(f"the verb {request.verb!r} is not known here; known are {', '.join(sorted(known))}")
            if guard is not None:
                guard.admit(request, None if verb is None else verb.tells(request, self.house))
        except PolicyError as error:
            return self._failed(request, Failure(client, error.stage, str(error)), error)
        except FedfmError as error:
            return self._failed(request, Failure(client, "exchange", str(error)))
        except Exception as error:
            # A rule that cannot be looked at refuses.
            log.debug("a request could not be admitted", exc_info=True)
            return self._failed(request, Failure(client, "exchange", f"it cannot be looked at ({type(error).__name__})."))
        return None

    def _failed(self, request: Request, failure: Failure, refusal: PolicyError | None = None) -> Failure:
        """A failure as it leaves the house: logged, and no more of its reason than the owner lets leave."""
        guard = self.house.guard(failure.client)
        return failure if guard is None else guard.refuse(request, failure, refusal)

    def _answer(self, verb: Verb, group: dict[ClientId, Request]) -> Iterator[Answer]:
        """The answers of one bank; one that does not fit into memory is halved until it does."""
        waiting = dict(group)
        try:
            for outcome in verb.answer(group, self.house):
                client = outcome.client if isinstance(outcome, Failure) else outcome.update.client or ""
                request = waiting.pop(client)
                yield self._failed(request, outcome) if isinstance(outcome, Failure) else self._sealed(request, outcome)
            return
        except FedfmError as error:
            reason, crowded = str(error), False
        except Exception as error:
            # A kernel may not exist here, or a file may have changed: the round must be able to go on without this client.
            log.debug("a bank failed", exc_info=True)
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            crowded = isinstance(error, RuntimeError) and is_out_of_memory(error)
        # This stands after the handlers, because an error that is being handled keeps its tensors alive.
        if crowded and self.house.foundation.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(waiting) > 1 and (verb.banked or not crowded):
            yield from self._halved(verb, waiting, crowded)
        elif crowded and verb.shrink(self.house):
            yield from self._answer(verb, waiting)
        else:
            yield from (self._failed(request, Failure(client, verb.name, reason)) for client, request in waiting.items())

    def _halved(self, verb: Verb, waiting: dict[ClientId, Request], crowded: bool) -> Iterator[Answer]:
        """Tries again with half as many: until they fit into memory, or until the one whose data or request breaks the others' bank is alone."""
        half = (len(waiting) + 1) // 2
        if crowded:
            log.warning("a bank of %d clients does not fit into memory: going on with %d at a time", len(waiting), half)
            self.house.choices["bank"] = min(self.house.choices.get("bank", half), half)
        items = list(waiting.items())
        for part in (items[:half], items[half:]):
            yield from self._answer(verb, dict(part))

    def _sealed(self, request: Request, contribution: Contribution) -> Answer:
        update, channel = contribution.update, self.house.plan.channel
        client = update.client or ""
        scratch = self._scratch_of(client, request)
        return self._reply(client, request, partial(channel.seal, update, contribution.leaves, request, scratch), contribution)

    def _reply(self, client: ClientId, request: Request, seal: Callable[[], Sealed], contribution: Contribution | None = None) -> Answer:
        """An answer as it leaves the house: held to its owner's policy, sealed by the channel, counted and logged."""
        guard = self.house.guard(client)
        try:
            if guard is not None and contribution is not None:
                guard.inspect(contribution)
            sealed = seal()
            reply = Reply(client, request.verb, request.round, sealed.tensors, sealed.meta)
            if guard is not None:
                guard.release(request, reply, contribution)
        except PolicyError as error:
            return self._failed(request, Failure(client, error.stage, str(error)), error)
        except FedfmError as error:
            return self._failed(request, Failure(client, "channel", str(error)))
        return reply

    def _scratch_of(self, client: ClientId, request: Request) -> Scratch:
        if request.round != self._scratch_round:
            # A round that is over leaves no secret behind, whoever is asked next.
            self.scratch.clear()
            self._scratch_round = request.round
        name, scratch = self.scratch.get(client, ("", Scratch()))
        if name != errand_id(request):
            scratch = Scratch(self.house.vault(client))
            self.scratch[client] = errand_id(request), scratch
        return scratch


def by_body(requests: Mapping[ClientId, Request]) -> list[dict[ClientId, Request]]:
    """Requests in groups of equal bodies."""
    same: dict[int, dict[ClientId, Request]] = {}
    for client, request in requests.items():
        same.setdefault(id(request.body), {})[client] = request
    if len(same) < 2:
        return list(same.values())
    # A digest reads every byte, so it is computed only where there is more than one body object.
    groups: dict[str, dict[ClientId, Request]] = {}
    for group in same.values():
        groups.setdefault(next(iter(group.values())).body.digest, {}).update(group)
    return list(groups.values())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator's or the CPU's allocator gave up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

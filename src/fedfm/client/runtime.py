"""The client's side of every verb.

A runtime hosts one client in an owner's house, or many on a simulation's machine; several asked
together share a batch. Verbs: ``describe``, ``train``, ``evaluate``. Anything else is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
import torch

from fedfm.client.bank import Bank, Job
from fedfm.client.site import Site
from fedfm.client.store import StateStore
from fedfm.core.batch import IntArray
from fedfm.core.errors import DataError, FedfmError
from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.parts import ClientId, RoundContext, Update
from fedfm.core.task import Examples
from fedfm.core.tree import Tree

log = logging.getLogger(__name__)
Answer = Reply | Failure


class Runtime:
    """Answers requests for the clients of a site.

    Args:
        store: Where clients keep what they remember from round to round.
    """

    def __init__(self, site: Site, store: StateStore) -> None:
        self.site, self.store = site, store
        self._verbs = {"describe": self._describe, "train": self._train, "evaluate": self._evaluate}

    @cached_property
    def bank(self) -> Bank:
        """The model, the task and the trainer; loads the model."""
        site = self.site
        return Bank(
            site.tuned,
            site.federation.task,
            site.federation.local,
            site.foundation.tokenizer.pad_token_id,
            site.foundation.device,
            site.key,
        )

    def handle(self, requests: Mapping[ClientId, Request]) -> Iterator[Answer]:
        """One answer for each request. Requests of one verb and round are answered together, as one bank."""
        # A broadcast is one request object; clients that are asked something else are another bank.
        groups: dict[tuple[str, int], dict[ClientId, Request]] = {}
        for client, request in requests.items():
            if client not in self.site.clients:
                yield Failure(client, "exchange", f"no client {client!r} is hosted here")
            elif request.verb not in self._verbs:
                yield Failure(client, "exchange", f"the verb {request.verb!r} is not known here; known are {', '.join(self._verbs)}")
            else:
                groups.setdefault((request.verb, id(request)), {})[client] = request
        for (verb, _), group in groups.items():
            yield from self._answer(verb, group)

    def _answer(self, verb: str, group: dict[ClientId, Request]) -> Iterator[Answer]:
        """The answers of one bank; one that does not fit into memory is halved until it does."""
        waiting = dict(group)
        try:
            for answer in self._verbs[verb](group):
                waiting.pop(answer.client)
                yield answer
            return
        except FedfmError as error:
            reason, halve = str(error), False
        except RuntimeError as error:
            # A kernel that does not exist here: the round must be able to go on without this bank.
            log.debug("a bank failed", exc_info=True)
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            # An evaluation's batch is bounded by its tokens, whoever shares it.
            halve = is_out_of_memory(error) and (len(waiting) > 1 if verb != "evaluate" else self.bank.max_tokens > 256)
        # Outside the handlers: an error that is being handled keeps its tensors alive.
        if not halve:
            yield from (Failure(client, verb, reason) for client in waiting)
            return
        if self.site.foundation.device.type == "cuda":
            torch.cuda.empty_cache()
        if verb == "evaluate":
            self.bank.max_tokens //= 2
            log.warning("an evaluation does not fit into memory: going on with %d tokens at a time", self.bank.max_tokens)
            yield from self._answer(verb, waiting)
            return
        half = (len(waiting) + 1) // 2
        log.warning("a bank of %d clients does not fit into memory: going on with %d at a time", len(waiting), half)
        if verb == "train" and "bank" in self.site.choices:
            self.site.choices["bank"] = min(self.site.choices["bank"], half)
        items = list(waiting.items())
        for part in (items[:half], items[half:]):
            yield from self._answer(verb, dict(part))

    def _describe(self, requests: Mapping[ClientId, Request]) -> Iterator[Answer]:
        for client, request in requests.items():
            shard = self.site.open_shard(client)
            meta: dict[str, float | int] = {
                "train": len(shard.train),
                "test": len(shard.test),
                "tokens": int(np.asarray(shard.train.lengths).sum()),
                **{f"label:{label}": count for label, count in shard.histogram().items()},
            }
            yield Reply(client, "describe", request.round, {}, meta)

    def _train(self, requests: Mapping[ClientId, Request]) -> Iterator[Answer]:
        request = next(iter(requests.values()))
        plan = self.site.federation
        memories, examples = {}, {}
        for client in requests:
            try:
                memories[client], examples[client] = self.store.load(client, request.round), _opened(self.site.open_shard(client).train)
            except FedfmError as error:
                # What is wrong in one house is no failure of those who share its bank.
                yield Failure(client, "train", str(error))
        if not memories:
            return
        jobs = [Job(client, examples[client], _under("local/", memory)) for client, memory in memories.items()]
        spec = self.site.tuned.spec
        params = {name: request.tensors[name] for name in spec.names}
        for trained in self.bank.train(request.tensors, jobs, request.round):
            client = trained.client
            if not trained.finite:
                yield Failure(
                    client,
                    "train",
                    f"its loss or parameters became NaN or infinite in round {request.round} (loss {trained.metrics['loss']})",
                )
                continue
            ctx = RoundContext(request.round, self.site.key, params, self.site.num_clients, client)
            update = Update(trained.delta, float(len(examples[client])), 1, client, trained.metrics)
            memory: dict[str, torch.Tensor] = {f"local/{name}": leaf for name, leaf in trained.memory.items()}
            try:
                for i, transform in enumerate(plan.transforms):
                    place = f"transforms.{i}/"
                    update, after = transform.encode(update, _under(place, memories[client]), ctx)
                    memory.update({place + name: leaf for name, leaf in after.items()})
                self.store.save(client, request.round, memory)
            except FedfmError as error:
                yield Failure(client, "train", str(error))
                continue
            yield Reply(client, "train", request.round, update.payload, {"weight": update.weight, **update.metrics})

    def _evaluate(self, requests: Mapping[ClientId, Request]) -> Iterator[Answer]:
        request = next(iter(requests.values()))
        split, most = str(request.meta.get("split", "test")), request.meta.get("max_examples")
        spec = self.site.tuned.spec
        theta_d = spec.flatten({name: request.tensors[name] for name in spec.names})
        sets: dict[ClientId, Examples] = {}
        for client in requests:
            try:
                sets[client] = _opened(self._examples(client, split, int(most) if isinstance(most, int) else None))
            except FedfmError as error:
                yield Failure(client, "evaluate", str(error))
        sums = self.bank.evaluate(theta_d.unsqueeze(0), list(sets.values()))
        for row, client in enumerate(sets):
            yield Reply(
                client,
                "evaluate",
                request.round,
                {name: value[row].cpu().clone() for name, value in sums.items()},
                {"examples": len(sets[client])},
            )

    def _examples(self, client: ClientId, split: str, most: int | None) -> Examples:
        shard = self.site.open_shard(client)
        found: Examples = shard.train if split == "train" else shard.test
        return found if most is None else Some(found, most)


def _opened(examples: Examples) -> Examples:
    """The examples, their files opened: what is damaged is told here, and not in the middle of a bank."""
    if len(examples.lengths) != len(examples):
        raise DataError(
            f"{len(examples.lengths)} examples are there, and {len(examples)} were prepared. Clear the cache and prepare the data again."
        )
    return examples


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator's or the CPU's allocator gave up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _under(place: str, memory: Tree) -> Tree:
    """The part of a client's memory that belongs to ``place``."""
    return {name.removeprefix(place): leaf for name, leaf in memory.items() if name.startswith(place)}


class Some:
    """The first ``most`` of some examples, evenly spread."""

    def __init__(self, examples: Examples, most: int) -> None:
        self.examples, self.vocabulary = examples, examples.vocabulary
        self.index: IntArray = np.unique(np.linspace(0, len(examples) - 1, min(most, len(examples))).astype(np.int64))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each."""
        return np.asarray(self.examples.lengths)[self.index]

    def ids(self, i: int) -> IntArray:
        """Token ids of example ``i``."""
        return self.examples.ids(int(self.index[i]))

    def start(self, i: int) -> int:
        """Its first target."""
        return self.examples.start(int(self.index[i]))

    def label(self, i: int) -> int:
        """Its class."""
        return self.examples.label(int(self.index[i]))

"""The embedded engine: all clients in this process, a bank at a time."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from fedfm.client.compiled import compile_base, pays, supported
from fedfm.client.footprint import base_bytes, client_bytes
from fedfm.client.house import House
from fedfm.client.runtime import Runtime, by_body
from fedfm.client.verb import verbs
from fedfm.core.clock import Clock, Wall
from fedfm.core.errors import ConfigError, DataError
from fedfm.core.messages import ClientId, Failure, Request
from fedfm.core.parts import Finding, Plan, warn
from fedfm.core.session import Answer, Session
from fedfm.engines.base import Engine, require_threads

log = logging.getLogger(__name__)
# Clients that are asked together what no bank is needed for.
_TOGETHER = 64


@dataclass(frozen=True)
class Embedded(Engine):
    """Runs clients in process: K of them share one frozen base and one batch. The default.

    With ``bank=1`` clients run one by one, and every number is that of a client on a machine of its own.

    Args:
        bank: Clients per batch; ``auto`` takes the whole cohort where the machine's memory holds it, else equal parts that it holds.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        threads: Of torch; ``None`` leaves what is set. A run's numbers are exact for one number of threads.
        compile: Whether torch compiles the base before the first round, which takes minutes and saves about a tenth of each round; numbers
            agree with the eager ones to float rounding. ``auto`` does so in long runs: where more than one client shares a batch on a CPU, and
            a tenth of what the planned steps, tokens and parameters take by arithmetic is more than 90 s.
        memory: Gigabytes that ``auto`` may count on; ``None`` for half of what the device has in all.

    Raises:
        ConfigError: if a number is out of range.
    """

    concerns = ("efficiency",)

    bank: int | Literal["auto"] = "auto"
    device: str = "auto"
    threads: int | None = None
    memory: float | None = None
    compile: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        if self.bank != "auto" and self.bank < 1:
            raise ConfigError(f"Embedded.bank is {self.bank}; it must be 1 or more, or auto.")
        require_threads("Embedded", self.threads)
        if self.memory is not None and not (self.memory > 0 and math.isfinite(self.memory)):
            raise ConfigError(f"Embedded.memory is {self.memory} GB; it must be a finite number above 0.")

    def check(self, plan: Plan) -> Iterator[Finding]:
        """A deadline cannot stop what runs in this process."""
        if plan.deadline is not None:
            yield warn(
                "deadline",
                f"the embedded engine looks at the {plan.deadline:g} s between banks only: a bank that has begun runs to its end, and only those "
                "after it are late. For a deadline that ends a client's work, use the engine Process.",
            )

    def open(self, house: House, clock: Clock | None = None) -> EmbeddedSession:
        """A session in this process; nothing is loaded before it is needed."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return EmbeddedSession(self, house, clock or Wall())


class EmbeddedSession(Session):
    """Clients in this process."""

    def __init__(self, engine: Embedded, house: House, clock: Clock) -> None:
        self.engine, self.house, self.clock = engine, house, clock
        self.runtime = Runtime(house)
        self._waiting: deque[_Group] = deque()
        self._answers: Iterator[Answer] = iter(())
        self._warned = False

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        """Lines the requests up in banks. A deadline is looked at between banks."""
        groups = self._groups(requests)
        # What it takes to load the model, once in a run, is not the clients' time.
        expires = math.inf if deadline is None else self.clock.now() + deadline
        self._waiting.extend(_Group(group, deadline or 0.0, expires) for group in groups)

    def receive(self) -> Answer | None:
        """The next answer; runs the next bank where the last one has given all of its own."""
        while True:
            answer = next(self._answers, None)
            if answer is not None or not self._waiting:
                return answer
            self._answers = self._run(self._waiting.popleft())

    def abandon(self) -> None:
        """Forgets the banks that have not run."""
        self._waiting.clear()
        self._answers = iter(())

    def close(self) -> None:
        """Nothing runs outside this process."""
        self.abandon()

    def settle(self) -> None:
        """Chooses the bank's size, and compiles the model where that pays."""
        bank, choices = self.bank_size(), self.house.choices
        if self.engine.compile is False:
            return
        if "compile" not in choices:
            choices["compile"] = bank if self._wants_compiled(bank) else 0
        if choices["compile"]:
            log.info("compiling the model for %d clients", choices["compile"])
            reason = compile_base(self.house, choices["compile"])
            if reason is not None:
                log.warning("The model is not compiled: %s. The run goes on without.", reason)
                choices["compile"] = 0

    def _wants_compiled(self, bank: int) -> bool:
        if self.engine.compile is True:
            return True
        on_cpu = self.house.foundation.device.type == "cpu"
        return on_cpu and self.engine.bank != 1 and pays(self.house, bank) and supported(self.house) is None

    def bank_size(self) -> int:
        """Clients per batch: what the recipe says or an earlier part of this run chose, else what the cohort, its tokens and the memory come to."""
        choices = self.house.choices
        if self.engine.bank == 1:
            return 1
        if not self.house.can_share():
            if self.engine.bank != "auto" and not self.house.tuned.banks and not self._warned:
                name = type(self.house.plan.tuning).__name__
                log.warning("%s cannot bank: clients run one by one instead of %d at a time", name, self.engine.bank)
                self._warned = True
            return 1
        if self.engine.bank != "auto":
            return min(self.engine.bank, choices.get("bank", self.engine.bank))
        if "bank" not in choices:
            choices["bank"] = self._choose()
        return choices["bank"]

    def _choose(self) -> int:
        """The largest bank that fits, evened out so that the last one is as full as the others. Neither the clock nor free memory decides."""
        house, cohort = self.house, max(self.house.cohort_size, 1)
        budget = self.engine.memory * 1e9 if self.engine.memory is not None else 0.5 * total_memory(house.foundation.device)
        fits = max(1, int((budget - base_bytes(house)) // client_bytes(house)))
        size = math.ceil(cohort / math.ceil(cohort / min(fits, cohort)))
        log.info("bank size %d of %d clients", size, cohort)
        return size

    def _run(self, group: _Group) -> Iterator[Answer]:
        if self.clock.now() > group.expires:
            return iter([Failure(client, "deadline", f"no answer after {group.deadline:g} s") for client in group.requests])
        return self.runtime.handle(group.requests)

    def _groups(self, requests: Mapping[ClientId, Request]) -> list[dict[ClientId, Request]]:
        known, groups = verbs(), list[dict[ClientId, Request]]()
        for group in by_body(requests):
            verb = known.get(next(iter(group.values())).verb)
            if verb is None or not verb.banked:
                groups += _chunks(list(group.items()), _TOGETHER)
                continue
            hosted = [item for item in group.items() if item[0] in self.house.shards]
            groups += _chunks([item for item in group.items() if item[0] not in self.house.shards], _TOGETHER)
            size = self.bank_size()
            if size < len(hosted):
                # Clients of like length share a bank, which keeps padding low.
                hosted.sort(key=lambda item: (-_mean_length(self.house, item[0]), item[0]))
            groups += _chunks(hosted, size)
        return groups


@dataclass(frozen=True)
class _Group:
    """Requests that are answered together, and when it is too late for that."""

    requests: dict[ClientId, Request]
    deadline: float
    expires: float


def total_memory(device: torch.device) -> int:
    """Bytes that the device has in all, used or free."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _chunks(items: list[tuple[ClientId, Request]], size: int) -> list[dict[ClientId, Request]]:
    return [dict(items[first : first + size]) for first in range(0, len(items), size)]


def _mean_length(house: House, client: ClientId) -> float:
    try:
        return float(house.shard(client).train.lengths.mean())
    except DataError:
        return 0.0  # It will say so itself when it is asked to train.

"""The embedded engine: all clients in this process, a bank at a time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import psutil
import torch

from fedfm.client.bank import Job
from fedfm.client.runtime import Runtime, is_out_of_memory
from fedfm.client.site import Site
from fedfm.client.store import StateStore
from fedfm.core.errors import ConfigError, DataError
from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.parts import ClientId, Engine, Session, Work
from fedfm.core.task import Examples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedded(Engine):
    """Runs clients in process: K of them share one frozen base and one batch. The default.

    With ``bank=1`` clients run one by one, and every number is that of a client on a machine of its own.

    Args:
        bank: Clients per batch; ``auto`` takes what a short timing finds fastest within the memory that is free.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        threads: Of torch; ``None`` leaves what is set. A run's numbers are exact for one number of threads.

    Raises:
        ConfigError: if a number is out of range.
    """

    concerns = ("efficiency",)

    bank: int | Literal["auto"] = "auto"
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.bank != "auto" and self.bank < 1:
            raise ConfigError(f"Embedded.bank is {self.bank}; it must be 1 or more, or auto.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"Embedded.threads is {self.threads}; it must be 1 or more.")

    def open(self, site: Site) -> EmbeddedSession:
        """A session in this process; nothing is loaded before it is needed."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return EmbeddedSession(self, site)


class EmbeddedSession(Session):
    """Clients in this process."""

    def __init__(self, engine: Embedded, site: Site) -> None:
        self.engine, self.site = engine, site
        self.runtime = Runtime(site, StateStore(site.folder))
        self.told = False

    def exchange(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> Iterator[Reply | Failure]:
        """Answers bank by bank. A deadline is looked at between banks."""
        # Choosing the bank's size takes its time once in a run, which is not the clients'.
        groups, waiting = self._groups(requests), dict(requests)
        began = time.monotonic()
        for group in groups:
            if deadline is not None and time.monotonic() - began > deadline:
                yield from (Failure(client, "deadline", f"no answer after {deadline:g} s") for client in waiting)
                return
            for answer in self.runtime.handle(group):
                waiting.pop(answer.client, None)
                yield answer

    def _groups(self, requests: Mapping[ClientId, Request]) -> list[dict[ClientId, Request]]:
        training: list[tuple[ClientId, Request]] = []
        others: list[tuple[ClientId, Request]] = []
        for item in requests.items():
            (training if item[1].verb == "train" and item[0] in self.site.clients else others).append(item)
        groups = _chunks(others, 64)
        if training:
            size = self.bank_size([client for client, _ in training], training[0][1])
            if size < len(training):
                # Clients of like length share a bank, which keeps padding low.
                training.sort(key=lambda item: (-_mean_length(self.site, item[0]), item[0]))
            groups += _chunks(training, size)
        return groups

    def bank_size(self, clients: list[ClientId], request: Request) -> int:
        """Clients per batch: what the recipe says, what an earlier part of this run chose, or what a timing finds; 1 where clients cannot share one.

        Raises:
            ModelError: if the task is causal and the base looks ahead.
        """
        size = self.engine.bank
        self.runtime.bank.look(request.tensors, self._training_sets(clients))
        if size != "auto" and size > 1 and not self.site.tuned.banks and not self.told:
            name = type(self.site.federation.tuning).__name__
            log.warning("%s cannot bank: clients run one by one instead of %d at a time", name, size)
            self.told = True
        if size == 1 or not self.runtime.bank.shares(request.tensors, self._training_sets(clients)):
            return 1
        if size != "auto":
            return size
        if "bank" not in self.site.choices:
            self.site.choices["bank"] = self._measure(clients, request)
        return self.site.choices["bank"]

    def _training_sets(self, clients: list[ClientId]) -> Iterator[Examples]:
        for client in clients:
            try:
                yield self.site.open_shard(client).train
            except DataError:
                continue  # It will say so itself when it is asked to train.

    def _measure(self, clients: list[ClientId], request: Request) -> int:
        """Doubles the bank while memory allows and a step per client does not get much dearer; takes the largest that is among the fastest."""
        # The choice holds for the whole run: a first cohort that is small by chance must not bound it.
        usual = self.site.federation.sampler.cohort_size(len(self.site.clients))
        clients = list(islice(dict.fromkeys([*clients, *self.site.clients]), max(len(clients), usual)))
        if len(clients) == 1:
            return 1
        bank = self.runtime.bank
        work = Work(bank.local.work.batch_size, 1, None, 1)
        longest = sorted(clients, key=lambda client: -_mean_length(self.site, client))
        times: dict[int, float] = {}
        size = 1
        while True:
            size = min(size, len(clients))
            jobs = [Job(client, self.site.open_shard(client).train) for client in longest[:size]]
            before, seconds = _used(bank.device, fresh=True), []
            try:
                for _ in range(3):
                    began = time.perf_counter()
                    bank.train(request.tensors, jobs, request.round, work)
                    _wait(bank.device)
                    seconds.append((time.perf_counter() - began) / size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                break
            grown = max(_used(bank.device) - before, 0)
            times[size] = min(seconds)
            # The next size needs about twice as much again; leave a fifth of what is free.
            if size == len(clients) or times[size] > 1.5 * min(times.values()) or 2 * grown > 0.8 * _free(bank.device):
                break
            size *= 2
        # Of sizes as good as the fastest the largest: a timing is noisy, and a whole cohort is never far from one batch of central training.
        best = max((size for size, one in times.items() if one <= 1.05 * min(times.values())), default=1)
        log.info("bank size %d of %d clients (%.1f ms per client and step)", best, len(clients), 1000 * times.get(best, 0.0))
        return best

    def close(self) -> None:
        """Nothing runs outside this process."""


def _chunks(items: list[tuple[ClientId, Request]], size: int) -> list[dict[ClientId, Request]]:
    return [dict(items[first : first + size]) for first in range(0, len(items), size)]


def _mean_length(site: Site, client: ClientId) -> float:
    try:
        return float(site.open_shard(client).train.lengths.mean())
    except DataError:
        return 0.0  # It will say so itself when it is asked to train.


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _used(device: torch.device, fresh: bool = False) -> int:
    """The peak so far; of a GPU, with ``fresh``, the peak from here on."""
    if device.type == "cuda":
        if fresh:
            torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)

"""Every client its own operating-system process: nothing crosses in memory.

A client is started when it is first asked, opens its own owner's data and no other, keeps its memory and its log in
its own folder, and lives on between rounds. What passes between it and the server are frames of bytes on two pipes
(:mod:`fedfm.client.frames`, :mod:`fedfm.core.messages`): no code, no pickle, no shared memory.

Whatever a client writes is durable before it answers, so ending one means killing it, at any time; it is started anew when
it is next asked. Covered here: a client that dies, hangs, answers too much, out of turn or in another's name is named and left to the
recipe's rule. Not covered: what its process could reach on this machine (it runs as the same user). POSIX only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from tempfile import TemporaryDirectory

import psutil
import torch

from fedfm import notation
from fedfm.client.footprint import base_bytes
from fedfm.client.frames import Inbox, Outbox
from fedfm.client.house import House
from fedfm.client.memory import home
from fedfm.client.policy import write_policy
from fedfm.core import words
from fedfm.core.clock import Clock, Wall
from fedfm.core.errors import ConfigError, MessageError
from fedfm.core.messages import MAX_TENSORS, Body, ClientId, Failure, Reply, Request, Scalar, pack_parts, unpack
from fedfm.core.parts import Finding, Plan, warn
from fedfm.core.session import Answer, Session
from fedfm.engines.base import Engine, require_threads

_PROCESS_BYTES = 400_000_000
_THREADS_PER_CORE = 4
# An answer of this size is read alone, and a log of this size begins anew.
_LARGE, _MAX_LOG = 1 << 20, 16 << 20
# Seconds without a byte of it after which a long answer is no longer read alone.
_STALLED = 1.0
_WORKER = (sys.executable, "-P", "-m", "fedfm.client.worker")


@dataclass(frozen=True)
class Process(Engine):
    """Each client in a process of its own, its messages bytes on a pipe.

    At the same number of threads its numbers are those of ``Embedded(bank=1)``, bit for bit. A process takes a few seconds to
    start and holds a base model of its own: for tens of clients, not thousands. Where the channel has several exchanges for one answer, all
    clients must fit at once, because a client that is ended in between loses what it keeps for the next exchange.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``; all clients share it.
        threads: CPU threads of each client; ``None`` takes as many as this process has.
        max_processes: Most clients alive at a time, idle ones ended first; ``None`` for as many as half of the machine's memory holds.
        start_timeout: Seconds a process has to come up, and no more than a round's deadline.

    Raises:
        ConfigError: if a number is out of range.
    """

    device: str = "auto"
    threads: int | None = None
    max_processes: int | None = None
    start_timeout: float = 120.0

    def __post_init__(self) -> None:
        require_threads("Process", self.threads)
        if self.max_processes is not None and self.max_processes < 1:
            raise ConfigError(f"Process: max_processes is {self.max_processes}; it must be 1 or more, or null.")
        if not self.start_timeout > 0:
            raise ConfigError(f"Process: start_timeout is {self.start_timeout} seconds; it must be more than 0.")

    def check(self, plan: Plan) -> Iterator[Finding]:
        """More processes than this machine has room for."""
        if self.max_processes is None:
            return
        memory, cores = psutil.virtual_memory().total, os.cpu_count() or 1
        needed, threads = self.max_processes * _PROCESS_BYTES, self.max_processes * (self.threads or 1)
        if needed > memory / 2:
            yield warn(
                "engine",
                f"{self.max_processes} processes take {words.size(needed)} before they load their models, and this machine has {words.size(memory)} "
                "of memory. Leave max_processes out, for as many as half of it holds.",
            )
        if threads > _THREADS_PER_CORE * cores:
            yield warn(
                "engine",
                f"{self.max_processes} processes with {self.threads or 1} or more threads each share {cores} processors: each becomes slow, and may "
                f"miss a deadline. Set max_processes to about {max(1, cores // (self.threads or 1))}.",
            )

    def open(self, house: House, clock: Clock | None = None) -> ProcessSession:
        """A session in which no client has been started yet.

        Raises:
            ConfigError: if a channel with several exchanges asks more clients than may be alive at a time.
        """
        most = self.max_processes or processes_that_fit(house)
        _require_room(house, most)
        text, threads = notation.write(house.plan), self.threads or torch.get_num_threads()
        # A value and its place take at most 16 bytes, whatever a transform makes of them; the rest is for names and for what an evaluation sums.
        spec = house.tuned.spec
        max_bytes = 16 * sum(leaf.size for leaf in house.plan.local.leaves(spec, spec)) + (16 << 20)

        def hello(client: ClientId, folder: Path) -> Request:
            meta: dict[str, Scalar] = {
                "client": client,
                "plan": text,
                "data": str(house.shards[client].absolute()),
                "folder": str(folder),
                "key": house.key.digest.hex(),
                "device": house.device,
                "threads": threads,
                "choices": json.dumps(house.choices),
                "num_clients": house.num_clients,
                "cohort_size": house.cohort_size,
                "num_rounds": house.num_rounds,
                "policy": write_policy(house.policies[client]) if client in house.policies else "",
                "run": house.run,
                "max_bytes": max_bytes,
            }
            return Request(Body("hello", meta=meta))

        # Two more for each leaf, which a quantiser or a sparsifier may send beside it.
        max_tensors = 3 * len(house.plan.local.leaves(spec, spec)) + 64
        return ProcessSession(house.clients, hello, _WORKER, house.folder, max_bytes, most, self.start_timeout, clock, max_tensors)


def _require_room(house: House, most: int) -> None:
    # The first question goes to all owners at once, through the channel.
    channel = house.plan.channel
    if channel.verbs and most < len(house.clients):
        raise ConfigError(
            f"Process: at most {most} processes live at a time (max_processes, or what the memory holds), and there are {len(house.clients)} owners. "
            f"{type(channel).__name__} asks each of them more than once for one answer, and a client that is ended in between loses what it keeps. "
            f"Set max_processes to {len(house.clients)}, or use Embedded."
        )


def processes_that_fit(house: House) -> int:
    """How many clients half of the machine's memory holds: each has Python, its libraries and a base model of its own."""
    each = _PROCESS_BYTES + 2 * base_bytes(house)
    return max(1, int(0.5 * psutil.virtual_memory().total // each))


class ProcessSession(Session):
    """Processes, one for each client that has been asked.

    Args:
        clients: Who may be asked.
        hello: Makes a client's first message, with all that its process needs; gets the folder below.
        command: What starts a client; it reads frames from its input and writes frames to its output.
        folder: Where each client has a folder of its own, for memory and log; ``None`` for one that goes with the session.
        max_bytes: The longest message that a client may send.
        max_processes: Most clients alive at a time.
        start_timeout: Seconds a process has to answer its first message.
        clock: Measures deadlines.
        max_tensors: Most tensors that an answer may hold.
    """

    def __init__(
        self,
        clients: Sequence[ClientId],
        hello: Callable[[ClientId, Path], Request],
        command: Sequence[str] = _WORKER,
        folder: Path | None = None,
        max_bytes: int = 1 << 30,
        max_processes: int | None = None,
        start_timeout: float = 120.0,
        clock: Clock | None = None,
        max_tensors: int = MAX_TENSORS,
    ) -> None:
        self._clients, self._hello, self._command = frozenset(clients), hello, tuple(command)
        self._max_bytes, self._max_processes, self._start_timeout = max_bytes, max_processes or inf, start_timeout
        self.clock, self._max_tensors = clock or Wall(), max_tensors
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="fedfm-"))) if folder is None else folder.absolute()
        self._selector = self._stack.enter_context(DefaultSelector())
        self._children: dict[ClientId, _Child] = {}
        self._waiting: deque[_Waiting] = deque()
        self._arrived: deque[Answer] = deque()
        self._given: float | None = None
        self._reader: _Child | None = None
        self._reading_since = 0.0

    @property
    def processes(self) -> dict[ClientId, int]:
        """The process ids of the clients that are alive."""
        return {client: child.process.pid for client, child in self._children.items()}

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        """Puts the requests into a queue. Each is written when its client is alive to read it."""
        expires = inf if deadline is None else self.clock.now() + deadline
        # Living clients come first. A client that is idle later has answered, or was not asked, and may be ended to make room.
        clients = sorted(requests, key=lambda client: client not in self._children)
        self._waiting.extend(_Waiting(client, requests[client], expires) for client in clients)

    def receive(self) -> Answer | None:
        """The next answer, once it is complete."""
        if self._given is not None:
            # A client does not pay for the time that the server spends on another's answer.
            self._excuse(self.clock.now() - self._given)
            self._given = None
        while not self._arrived and (self._waiting or any(child.owed for child in self._children.values())):
            self._write()
            if not self._arrived:
                self._arrived.extend(self._listen())
        if not self._arrived:
            return None
        self._given = self.clock.now()
        return self._arrived.popleft()

    def _excuse(self, seconds: float, but: _Child | None = None) -> None:
        """Gives everybody who owes an answer so much more time, one client excepted."""
        for owed in [*self._waiting, *(owed for child in self._children.values() if child is not but for owed in child.owed)]:
            owed.expires += seconds

    def abandon(self) -> None:
        """Ends the clients that still owe an answer."""
        self._waiting.clear()
        self._arrived.clear()
        self._given = None
        for child in [child for child in self._children.values() if child.owed]:
            self._end(child)

    def close(self) -> None:
        """Ends every client."""
        self.abandon()
        for child in list(self._children.values()):
            self._end(child)
        self._stack.close()

    def _write(self) -> None:
        """Sends waiting requests, as long as there is room for their clients' processes."""
        while self._waiting and self._has_room(self._waiting[0].client):
            waiting = self._waiting.popleft()
            child = self._child(waiting.client, waiting.expires)
            if isinstance(child, Failure):
                self._arrived.append(child)
            else:
                self._ask(child, waiting)

    def _listen_to(self, child: _Child | None) -> None:
        """Reads from this client alone while its long answer arrives, so that one is held at a time; from all again with ``None``."""
        if self._reader is child:
            return
        if self._reader is not None:
            # Nobody could be heard beside it.
            self._excuse(self.clock.now() - self._reading_since, but=self._reader)
        self._reader, self._reading_since = child, self.clock.now()
        for other in self._children.values():
            is_heard, hears = other.inbox.fd in self._selector.get_map(), child is None or other is child
            if is_heard and not hears:
                self._selector.unregister(other.inbox.fd)
            elif hears and not is_heard:
                self._selector.register(other.inbox.fd, EVENT_READ, other)

    def _has_room(self, client: ClientId) -> bool:
        if client in self._children or client not in self._clients:
            return True
        # A start is all computation: more starts at once than processors make each of them late.
        if sum(not child.ready for child in self._children.values()) >= (os.cpu_count() or 1):
            return False
        if len(self._children) >= self._max_processes:
            idle = next((child for child in self._children.values() if not child.owed), None)
            if idle is None:
                return False
            self._end(idle)
        return True

    def _child(self, client: ClientId, expires: float) -> _Child | Failure:
        """The client's process, started if there is none; starting is part of the time that a client has to answer."""
        if client not in self._clients:
            return Failure(client, "exchange", "there is no such client.")
        child = self._children.get(client)
        if child is not None and child.process.poll() is not None:
            self._end(child)
            child = None
        if child is None:
            log = home(self._folder, client) / "log.txt"
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                child = _Child(client, self._command, log, self._max_bytes, self._max_tensors)
            except OSError as error:
                return Failure(
                    client,
                    "start",
                    f"its process cannot be started: {error}. If it is one too many, Process(max_processes=...) bounds them.",
                )
            self._children[client] = child
            if self._reader is None:
                self._selector.register(child.inbox.fd, EVENT_READ, child)
            started_by = min(self.clock.now() + self._start_timeout, expires)
            self._ask(child, _Waiting(client, self._hello(client, self._folder), started_by))
        return child

    def _ask(self, child: _Child, waiting: _Waiting) -> None:
        child.ask(waiting)
        if child.outbox.fd not in self._selector.get_map():
            self._selector.register(child.outbox.fd, EVENT_WRITE, child)

    def _listen(self) -> list[Answer]:
        """Waits until something arrives or a client is late. Returns the complete answers."""
        soonest = min([*(child.expires for child in self._children.values()), *(waiting.expires for waiting in self._waiting)])
        patience = None if soonest == inf else max(0.0, soonest - self.clock.now())
        if self._reader is not None:
            patience = min(_STALLED, self._reader.expires - self.clock.now())
        events = self._selector.select(None if patience is None else max(0.0, patience))
        if not events and self._reader is not None:
            # A client keeps the others waiting only while its bytes flow.
            self._listen_to(None)
        now = self.clock.now()
        answers = []
        for key, _ in events:
            child: _Child = key.data
            if self._children.get(child.client) is not child:
                continue
            if key.fd == child.inbox.fd:
                if self._reader in (None, child):
                    answers.append(self._hear(child))
            elif child.flush():
                self._selector.unregister(key.fd)
        for child in [child for child in self._children.values() if child.expires <= now and self._reader in (None, child)]:
            stage, what = ("deadline", "did not answer") if child.ready else ("start", "did not start")
            answers.append(Failure(child.client, stage, f"it {what} in time, and its process was ended."))
            self._end(child)
        for waiting in [waiting for waiting in self._waiting if waiting.expires <= now and self._reader is None]:
            self._waiting.remove(waiting)
            answers.append(Failure(waiting.client, "deadline", "there was no room for its process in time."))
        return [answer for answer in answers if answer is not None]

    def _hear(self, child: _Child) -> Answer | None:
        owed = bool(child.owed)
        try:
            answer = child.hear()
            self._listen_to(child if answer is None and child.inbox.announced > _LARGE else None)
        except EOFError:
            failure = Failure(child.client, "exchange" if child.ready else "start", self._end(child, patience=1.0))
        except MessageError as error:
            failure = Failure(child.client, "exchange", f"{error} Its process was ended.")
            self._end(child)
        else:
            if not child.ready and isinstance(answer, Failure):
                self._end(child)
            return answer
        return failure if owed else None

    def _end(self, child: _Child, patience: float = 0.0) -> str:
        """Ends the process, after ``patience`` seconds in which it may end by itself. Returns how it ended."""
        del self._children[child.client]
        if self._reader is child:
            self._listen_to(None)
        for fd in (child.inbox.fd, child.outbox.fd):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        return child.end(patience)


@dataclass(eq=False)
class _Waiting:
    """A request that a client has not answered, and the time at which it is late."""

    client: ClientId
    request: Request
    expires: float


class _Child:
    """A client's process, and the requests that it has not answered; the greeting is the first."""

    def __init__(self, client: ClientId, command: Sequence[str], log: Path, max_bytes: int, max_tensors: int) -> None:
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,  # Ctrl-C is for the server, which finishes its round first.
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.client, self.ready, self.log, self.max_tensors = client, False, log, max_tensors
        self.inbox, self.outbox = Inbox(self.process.stdout.fileno(), max_bytes), Outbox(self.process.stdin.fileno())
        self.owed: deque[_Waiting] = deque()
        for fd in (self.inbox.fd, self.outbox.fd):
            os.set_blocking(fd, False)

    @property
    def expires(self) -> float:
        """The time at which the next answer is late."""
        return self.owed[0].expires if self.owed else inf

    def ask(self, waiting: _Waiting) -> None:
        """Sends a request."""
        self.outbox.send(*pack_parts(waiting.request))
        self.owed.append(waiting)
        if self.log.stat().st_size > _MAX_LOG:
            # The file is open for appending, so the next line begins it anew.
            os.truncate(self.log, 0)

    def flush(self) -> bool:
        """Writes what fits. Returns whether nothing is left to write."""
        try:
            return self.outbox.flush()
        except BrokenPipeError:
            # The process is gone. Reading reports that, after any answer that it had written.
            return True

    def hear(self) -> Answer | None:
        """The answer to the oldest request, if it is complete and not the greeting.

        Raises:
            EOFError: if the process is gone.
            MessageError: if what arrived does not answer that request.
        """
        data = self.inbox.receive()
        if data is None:
            return None
        answer = unpack(memoryview(data), max_tensors=self.max_tensors)
        if not self.owed or isinstance(answer, Request) or answer.client != self.client:
            raise MessageError(f"A message of kind {type(answer).__name__} arrived that nobody asked for.")
        request = self.owed.popleft().request
        if isinstance(answer, Reply) and (answer.verb, answer.round) != (request.verb, request.round):
            raise MessageError(
                f"{answer.verb!r} of round {answer.round} was answered, but {request.verb!r} of round {request.round} was asked."
            )
        if self.ready:
            return answer
        self.ready = isinstance(answer, Reply)
        return None if self.ready else answer

    def end(self, patience: float) -> str:
        """Ends the process. Returns how it ended."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
        # Processes that it started belong to its group, and may hold its pipes.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        if code < 0:
            return f"its process ended with signal {-code} ({signal.strsignal(-code)})."
        return f"its process ended with exit code {code}; its log.txt tells more."

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from tempfile import TemporaryDirectory

import torch

from fedfm import notation
from fedfm.client.frames import Inbox, Outbox
from fedfm.client.house import House
from fedfm.client.memory import home
from fedfm.core.clock import Clock, Wall
from fedfm.core.errors import ConfigError, MessageError
from fedfm.core.messages import Body, ClientId, Failure, Reply, Request, Scalar, pack, unpack
from fedfm.core.session import Answer, Session
from fedfm.engines.base import Engine

_WORKER = (sys.executable, "-P", "-m", "fedfm.client.worker")


@dataclass(frozen=True)
class Process(Engine):
    """Each client in a process of its own, its messages bytes on a pipe.

    At the same number of threads its numbers are those of ``Embedded(bank=1)``, bit for bit. A process takes a few seconds to
    start and holds a base model of its own: for tens of clients, not thousands.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``; all clients share it.
        threads: CPU threads of each client; ``None`` takes as many as this process has.
        max_processes: Most clients alive at a time, idle ones ended first; ``None`` for no bound.
        start_timeout: Seconds a process has to come up. A round's deadline counts from then.

    Raises:
        ConfigError: if a number is out of range.
    """

    device: str = "auto"
    threads: int | None = None
    max_processes: int | None = None
    start_timeout: float = 120.0

    def __post_init__(self) -> None:
        for name, value in (("threads", self.threads), ("max_processes", self.max_processes)):
            if value is not None and value < 1:
                raise ConfigError(f"Process: {name} is {value}; it must be 1 or more, or null.")
        if not self.start_timeout > 0:
            raise ConfigError(f"Process: start_timeout is {self.start_timeout} seconds; it must be more than 0.")

    def open(self, house: House, clock: Clock | None = None) -> ProcessSession:
        """A session in which no client has been started yet."""
        text, threads = notation.write(house.plan), self.threads or torch.get_num_threads()
        # A value and its place take at most 16 bytes, whatever a transform makes of them; the rest is for names and for what an evaluation sums.
        spec = house.tuned.spec
        max_bytes = 16 * sum(leaf.size for leaf in house.plan.local.leaves(spec, spec)) + (16 << 20)

        def hello(client: ClientId, folder: Path) -> Request:
            withheld = sorted(house.policy(client).withhold)
            told: dict[str, Scalar] = {
                "client": client,
                "plan": text,
                "data": str(house.shards[client].absolute()),
                "folder": str(folder),
                "key": house.key.digest.hex(),
                "device": house.device,
                "threads": threads,
                "choices": json.dumps(house.choices),
                "num_clients": house.num_clients,
                "withhold": ",".join(withheld),
                "max_bytes": max_bytes,
            }
            return Request(Body("hello", meta=told))

        return ProcessSession(
            house.clients, hello, _WORKER, house.folder, max_bytes, self.max_processes, self.start_timeout, clock or Wall()
        )


class ProcessSession(Session):
    """Processes, one for each client that has been asked.

    Args:
        clients: Who may be asked.
        hello: A client's first message, all that its process is told; gets the folder below.
        command: What starts a client; it reads frames from its input and writes frames to its output.
        folder: Where each client has a folder of its own, for memory and log; ``None`` for one that goes with the session.
        max_bytes: The longest message that a client may send.
        max_processes: Most clients alive at a time.
        start_timeout: Seconds a process has to answer its first message.
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
    ) -> None:
        self._clients, self._hello, self._command = frozenset(clients), hello, tuple(command)
        self._max_bytes, self._max_processes, self._start_timeout = max_bytes, max_processes or inf, start_timeout
        self.clock = clock or Wall()
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="fedfm-"))) if folder is None else folder.absolute()
        self._selector = self._stack.enter_context(DefaultSelector())
        self._children: dict[ClientId, _Child] = {}
        self._waiting: deque[tuple[ClientId, Request, float]] = deque()
        self._arrived: deque[Answer] = deque()
        self._given: float | None = None

    @property
    def processes(self) -> dict[ClientId, int]:
        """The process ids of the clients that are alive."""
        return {client: child.process.pid for client, child in self._children.items()}

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        """Lines the requests up; each is written when its client is there to read it."""
        limit = inf if deadline is None else deadline
        # Those alive come first: whoever is idle later has answered, or was not asked, and may make room.
        clients = sorted(requests, key=lambda client: client not in self._children)
        self._waiting.extend((client, requests[client], limit) for client in clients)

    def receive(self) -> Answer | None:
        """The next answer, once it is complete."""
        if self._given is not None:
            # A client does not pay for the time that the server spends on another's answer.
            for child in self._children.values():
                child.expires += self.clock.now() - self._given
            self._given = None
        while not self._arrived and (self._waiting or any(child.owes for child in self._children.values())):
            self._write()
            if not self._arrived:
                self._arrived.extend(self._listen())
        if not self._arrived:
            return None
        self._given = self.clock.now()
        return self._arrived.popleft()

    def abandon(self) -> None:
        """Ends the clients that still owe an answer."""
        self._waiting.clear()
        self._arrived.clear()
        self._given = None
        for child in [child for child in self._children.values() if child.owes]:
            self._end(child)

    def close(self) -> None:
        """Ends every client."""
        self.abandon()
        for child in list(self._children.values()):
            self._end(child)
        self._stack.close()

    def _write(self) -> None:
        """Hands requests to the clients that there is room for."""
        while self._waiting and self._has_room(self._waiting[0][0]):
            client, request, limit = self._waiting.popleft()
            child = self._child(client)
            if isinstance(child, Failure):
                self._arrived.append(child)
            else:
                self._ask(child, request, pack(request), limit)

    def _has_room(self, client: ClientId) -> bool:
        if client in self._children or client not in self._clients:
            return True
        # Starting is all computation: more at once than there are processors makes every one of them late.
        if sum(not child.ready for child in self._children.values()) >= (os.cpu_count() or 1):
            return False
        if len(self._children) >= self._max_processes:
            idle = next((child for child in self._children.values() if not child.owes), None)
            if idle is None:
                return False
            self._end(idle)
        return True

    def _child(self, client: ClientId) -> _Child | Failure:
        """The client's process, started if there is none."""
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
                child = _Child(client, self._command, log, self._max_bytes, self.clock)
            except OSError as error:
                return Failure(
                    client,
                    "start",
                    f"its process cannot be started: {error}. If it is one too many, Process(max_processes=...) bounds them.",
                )
            self._children[client] = child
            self._selector.register(child.inbox.fd, EVENT_READ, child)
            hello = self._hello(client, self._folder)
            self._ask(child, hello, pack(hello), self._start_timeout)
        return child

    def _ask(self, child: _Child, request: Request, frame: bytes, limit: float) -> None:
        child.ask(request, frame, limit)
        if child.outbox.fd not in self._selector.get_map():
            self._selector.register(child.outbox.fd, EVENT_WRITE, child)

    def _listen(self) -> list[Answer]:
        """Waits for something to arrive or for a client to be late; the answers that are complete."""
        soonest = min(child.expires for child in self._children.values())
        events = self._selector.select(None if soonest == inf else max(0.0, soonest - self.clock.now()))
        now = self.clock.now()
        answers = []
        for key, _ in events:
            child: _Child = key.data
            if self._children.get(child.client) is not child:
                continue
            if key.fd == child.inbox.fd:
                answers.append(self._hear(child))
            elif child.flush():
                self._selector.unregister(key.fd)
        for child in [child for child in self._children.values() if child.expires <= now]:
            stage, what = ("deadline", "did not answer") if child.ready else ("start", "did not start")
            answers.append(Failure(child.client, stage, f"it {what} in time, and its process was ended."))
            self._end(child)
        return [answer for answer in answers if answer is not None]

    def _hear(self, child: _Child) -> Answer | None:
        owed = child.owes
        try:
            answer = child.hear()
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
        """Ends the process, after ``patience`` seconds in which it may do so itself; how it ended."""
        del self._children[child.client]
        for fd in (child.inbox.fd, child.outbox.fd):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        return child.end(patience)


class _Child:
    """A client's process, and what it owes: its greeting first, then an answer."""

    def __init__(self, client: ClientId, command: Sequence[str], log: Path, max_bytes: int, clock: Clock) -> None:
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
        self.client, self.clock, self.ready, self.expires = client, clock, False, inf
        self.inbox, self.outbox = Inbox(self.process.stdout.fileno(), max_bytes), Outbox(self.process.stdin.fileno())
        self._owed: deque[tuple[Request, float]] = deque()
        for fd in (self.inbox.fd, self.outbox.fd):
            os.set_blocking(fd, False)

    @property
    def owes(self) -> bool:
        """Whether an answer is awaited."""
        return bool(self._owed)

    def ask(self, request: Request, frame: bytes, limit: float) -> None:
        """Queues a request, to be answered within ``limit`` seconds of the answer to the one before it."""
        self.outbox.send(frame)
        self._owed.append((request, limit))
        if len(self._owed) == 1:
            self.expires = self.clock.now() + limit

    def flush(self) -> bool:
        """Writes what fits; whether nothing is left to write."""
        try:
            return self.outbox.flush()
        except BrokenPipeError:
            # It is gone, which reading from it will tell, after what it may have said before.
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
        answer = unpack(memoryview(data))
        if not self._owed or isinstance(answer, Request) or answer.client != self.client:
            raise MessageError(f"A message of kind {type(answer).__name__} arrived that nobody asked for.")
        request, _ = self._owed.popleft()
        if isinstance(answer, Reply) and (answer.verb, answer.round) != (request.verb, request.round):
            raise MessageError(
                f"{answer.verb!r} of round {answer.round} was answered, but {request.verb!r} of round {request.round} was asked."
            )
        self.expires = self.clock.now() + self._owed[0][1] if self._owed else inf
        if self.ready:
            return answer
        self.ready = isinstance(answer, Reply)
        return None if self.ready else answer

    def end(self, patience: float) -> str:
        """Ends the process; how it ended."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        if code < 0:
            return f"its process ended with signal {-code} ({signal.strsignal(-code)})."
        return f"its process ended with exit code {code}; its log.txt tells more."

"""A connection to the broker (NATS JetStream) behind blocking calls.

A thread of its own runs the network. A lost connection is made again, for ever, with pauses that grow to ``_SLOWEST`` seconds; a call that it cut is
made again, so that what was published is stored once or twice, never silently not at all (receivers drop what they have, see
:mod:`fedfm.wire.window`). TLS is spoken from the first byte: somebody on the way cannot talk a client out of it. The broker's configuration
must say ``handshake_first: true``.

Covered here: a broker that is killed, restarted or full, a network that is cut, a key that is refused. Not covered: a broker that loses what it has
acknowledged; how soon it writes to its disk is its ``sync_interval``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import queue
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedfm.core import words
from fedfm.core.errors import ConfigError, MissingExtra, WireError
from fedfm.wire.identity import Nkey
from fedfm.wire.subjects import Branch

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

T = TypeVar("T")
# Seconds: of the first and of the longest pause between two attempts, of one attempt, of one question to the broker, of one wait for a message,
# and between two looks at whether the connection is still there.
_FIRST, _SLOWEST, _ATTEMPT, _ANSWER, _PULL, _LOOK = 0.1, 5.0, 10.0, 5.0, 20.0, 0.25
_REFUSED = re.compile(r"authorization violation|user authentication|authentication (expired|revoked|timeout)", re.IGNORECASE)
_FORBIDDEN = re.compile(r"permissions violation for (?:publish|subscription) to \"?([^\"\s]+)", re.IGNORECASE)
_NANO = 10**9


class Unreachable(WireError):
    """The broker cannot be used at all; what is wanted of it may be asked again when it is back."""


class LoginRefused(Unreachable):
    """The broker does not know who connects, or does so no more."""


def mutual_tls(authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 in which both sides show a certificate of the consortium's authority.

    Args:
        authority: Certificate of the authority, PEM; no other authority is trusted.
        certificate: Our certificate, PEM.
        key: Its private key, PEM.

    Raises:
        ConfigError: if one of them cannot be read or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"The certificates {authority}, {certificate} and the key {key} cannot be used: {error}.") from error
    return context


class Connection:
    """A connection that is kept.

    Args:
        servers: ``nats://host:4222``, one or more of the same broker.
        inbox: Prefix of the subjects on which the broker answers, :meth:`~fedfm.wire.subjects.Names.inbox`.
        nkey: The login.
        tls: :func:`mutual_tls`, or what makes it for each attempt, because a certificate may be renewed meanwhile; ``None`` for none, which only a
            test should want.
        name: As the broker's log shows it.
        patience: Seconds that a call waits for the broker before it fails, unless it says otherwise.

    Attributes:
        reconnects: How often a lost connection was made again.
        is_closed: Whether :meth:`close` was called.

    Raises:
        MissingExtra: if the extra ``deploy`` is not installed.
        WireError: if the broker cannot be reached within ``patience``, or refuses the key.
    """

    def __init__(
        self,
        servers: Sequence[str],
        inbox: str,
        nkey: Nkey | None = None,
        tls: ssl.SSLContext | Callable[[], ssl.SSLContext] | None = None,
        name: str = "fedfm",
        patience: float = 15.0,
    ) -> None:
        _require_nats()
        self._servers, self._inbox, self._nkey, self._tls, self._name = list(servers), inbox, nkey, tls, name
        self.patience = patience
        self.reconnects = -1
        self._client: Client | None = None
        self._error, self._is_refused, self.is_closed = "", False, False
        self._begun: set[asyncio.Task[None]] = set()
        self._watched: dict[str, set[asyncio.Future[None]]] = {}
        self._loop = asyncio.new_event_loop()
        self._change = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fedfm-nats", daemon=True)
        self._thread.start()
        self._keeper = asyncio.run_coroutine_threadsafe(self._keep(), self._loop)
        try:
            self._wait(self._ready(time.monotonic() + patience))
        except BaseException:
            self.close()
            raise

    # --- what it does ------------------------------------------------------------------------------------------------

    def publish(self, subject: str, data: bytes, id: str | None = None, patience: float | None = None) -> None:
        """Stores a message in the stream that keeps its subject; returns when the broker has it.

        Args:
            id: Messages with the same id within the stream's window of duplicates are stored once.

        Raises:
            WireError: if that was not possible in time, the stream is full, or it is not allowed.
        """
        self._wait(self._publish(subject, data, id, self._until(patience)))

    def publish_soon(self, subject: str, data: bytes, patience: float | None = None) -> concurrent.futures.Future[None]:
        """As :meth:`publish`, without waiting; the future tells how it ended."""
        return asyncio.run_coroutine_threadsafe(self._publish(subject, data, None, self._until(patience)), self._loop)

    def get(self, branch: Branch, subject: str, patience: float | None = None) -> bytes | None:
        """The last message that is stored under a subject; ``None`` where there is none.

        Raises:
            WireError: as :meth:`publish`.
        """
        return self._wait(self._get(branch, subject, self._until(patience)))

    def get_soon(self, branch: Branch, subject: str, patience: float | None = None) -> concurrent.futures.Future[bytes | None]:
        """As :meth:`get`, without waiting."""
        return asyncio.run_coroutine_threadsafe(self._get(branch, subject, self._until(patience)), self._loop)

    def held(self, branch: Branch, subjects: str, patience: float | None = None) -> set[str]:
        """Which subjects of a pattern are stored.

        Raises:
            WireError: as :meth:`publish`.
        """
        held: set[str] = set()
        while True:
            asked = {"subjects_filter": subjects, "offset": len(held)}
            answer = self._ask(branch.info, asked, patience)
            page = answer.get("state", {}).get("subjects") or {}
            held |= page.keys()
            if not page or len(held) >= answer.get("total", 0):
                return held

    def inbox(self, branches: Iterable[Branch] = ()) -> Inbox:
        """What arrives on these branches."""
        return Inbox(self, branches)

    @property
    def is_connected(self) -> bool:
        """Whether the broker is there now."""
        return self._client is not None

    @property
    def problem(self) -> str:
        """Why it is not, as far as that is known."""
        return self._error

    def close(self) -> None:
        """Ends it. Calling it twice is fine."""
        if self.is_closed:
            return
        self.is_closed = True
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(_ANSWER)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ANSWER)
        if not self._thread.is_alive():
            self._loop.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what the coordinator alone may do ---------------------------------------------------------------------------

    def make_stream(
        self, branch: Branch, max_bytes: int, max_age: float = 7 * 86400.0, patience: float | None = None, is_board: bool = False
    ) -> None:
        """Makes the stream of a branch, or raises its limit: what another run needs stays. A full one refuses new messages, and loses no old ones.

        Args:
            max_bytes: Bytes on the broker's disk.
            max_age: Seconds after which a message is deleted.
            is_board: Whether it keeps the last message of each subject alone, for whoever asks for it, and is never full.

        Raises:
            WireError: as :meth:`publish`.
        """
        config = {
            "name": branch.stream,
            "subjects": [branch.all],
            # What was acknowledged is deleted; what nobody consumes, as chunks are, stays until it is purged.
            "retention": "limits" if is_board else "workqueue",
            "storage": "file",
            "discard": "old" if is_board else "new",
            "max_msgs_per_subject": 1 if is_board else -1,
            "max_bytes": max_bytes,
            "max_age": int(max_age * _NANO),
            "max_msgs": -1,
            "max_consumers": -1,
            "max_msg_size": -1,
            "num_replicas": 1,
            "allow_direct": True,
            "duplicate_window": 120 * _NANO,
        }
        try:
            self._ask(f"$JS.API.STREAM.CREATE.{branch.stream}", config, patience)
        except _Exists:
            known = self._ask(branch.info, {}, patience)["config"]
            config["max_bytes"] = max(max_bytes, int(known["max_bytes"]))
            self._ask(f"$JS.API.STREAM.UPDATE.{branch.stream}", config, patience)

    def make_consumer(
        self,
        branch: Branch,
        subject: str | None = None,
        ack_wait: float = 30.0,
        patience: float | None = None,
        lasting: float | None = None,
        one_by_one: bool = False,
    ) -> None:
        """Makes the durable consumer of a branch's messages: each is delivered, in order, until it is acknowledged.

        Args:
            subject: What it delivers; default :attr:`Branch.message`.
            ack_wait: Seconds after which a message that was neither acknowledged nor said to be worked on is delivered again.
            lasting: Seconds after which the broker deletes the consumer if nobody uses it; ``None`` for never.
            one_by_one: Whether a message waits until the one before it is acknowledged, so that they stay in order also when the receiver was killed.

        Raises:
            WireError: as :meth:`publish`.
        """
        config = {
            "durable_name": branch.consumer,
            "name": branch.consumer,
            "filter_subject": subject or branch.message,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": int(ack_wait * _NANO),
            "max_deliver": -1,
            "max_ack_pending": 1 if one_by_one else 1000,
            "replay_policy": "instant",
        }
        if lasting is not None:
            config["inactive_threshold"] = int(lasting * _NANO)
        place = f"$JS.API.CONSUMER.DURABLE.CREATE.{branch.stream}.{branch.consumer}"
        self._ask(place, {"stream_name": branch.stream, "config": config}, patience)

    def delete_consumer(self, branch: Branch, patience: float | None = None) -> None:
        """Deletes the durable consumer of a branch's messages; nothing where there is none.

        Raises:
            WireError: as :meth:`publish`.
        """
        with suppress(_Absent):
            self._ask(f"$JS.API.CONSUMER.DELETE.{branch.stream}.{branch.consumer}", {}, patience)

    def purge(self, branch: Branch, subjects: str, patience: float | None = None) -> None:
        """Deletes what is stored under a pattern of subjects.

        Raises:
            WireError: as :meth:`publish`.
        """
        self._ask(f"$JS.API.STREAM.PURGE.{branch.stream}", {"filter": subjects}, patience)

    def delete_stream(self, branch: Branch, patience: float | None = None) -> None:
        """Deletes a branch with all that is stored in it; nothing where there is none.

        Raises:
            WireError: as :meth:`publish`.
        """
        with suppress(_Absent):
            self._ask(f"$JS.API.STREAM.DELETE.{branch.stream}", {}, patience)

    def stored(self, branch: Branch, patience: float | None = None) -> tuple[int, int]:
        """How many messages a stream holds, and their bytes.

        Raises:
            WireError: as :meth:`publish`.
        """
        state = self._ask(branch.info, {}, patience).get("state", {})
        return int(state.get("messages", 0)), int(state.get("bytes", 0))

    # --- how it does it ----------------------------------------------------------------------------------------------

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self.is_closed:
            work.close()
            raise WireError("The connection to the broker was closed.")
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("A blocking call was made in the connection's own thread.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return result(future)
        except BaseException:
            future.cancel()
            raise

    def _until(self, patience: float | None) -> float:
        return time.monotonic() + (self.patience if patience is None else patience)

    def _ask(self, subject: str, asked: Mapping[str, Any], patience: float | None) -> dict[str, Any]:
        data = json.dumps(asked).encode()

        async def ask(client: Client) -> dict[str, Any]:
            return _answer((await client.request(subject, data, timeout=_ANSWER)).data)

        return self._wait(self.call(subject, ask, self._until(patience)))

    async def _publish(self, subject: str, data: bytes, id: str | None, until: float) -> None:
        headers = {"Nats-Msg-Id": id} if id else None

        async def publish(client: Client) -> None:
            if len(data) > client.max_payload:
                raise WireError(
                    f"A message of {len(data)} bytes is longer than the {client.max_payload} that the broker takes (max_payload)."
                )
            _answer((await client.request(subject, data, timeout=_ANSWER, headers=headers)).data)

        await self.call(subject, publish, until)

    async def _get(self, branch: Branch, subject: str, until: float) -> bytes | None:
        place = f"{branch.get.removesuffix(branch.all)}{subject}"

        async def get(client: Client) -> bytes | None:
            message = await client.request(place, b"", timeout=_ANSWER)
            status = (message.headers or {}).get("Status")
            if status is None:
                return message.data
            if status == "404":
                return None
            raise _Later(f"the broker answered {status}")

        return await self.call(place, get, until)

    async def call(self, subject: str, work: Callable[[Client], Awaitable[T]], until: float) -> T:
        """Does something with the broker, again after each lost connection, in the connection's own thread.

        Args:
            subject: What is published to: the broker's word that this is not allowed ends the call.
            until: Seconds on the monotonic clock.

        Raises:
            WireError: if it is not done by then, is not allowed, or the key is refused.
        """
        import nats.errors

        forbidden: asyncio.Future[None] = self._loop.create_future()
        self._watched.setdefault(subject.lower(), set()).add(forbidden)
        reason = ""
        try:
            while True:
                client = await self._ready(until, reason)
                task = asyncio.ensure_future(work(client))
                lost = asyncio.ensure_future(self._lost(client))
                try:
                    waiting: set[asyncio.Future[Any]] = {task, lost, forbidden}
                    await asyncio.wait(waiting, timeout=until - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
                    if task.done():
                        return task.result()
                    if forbidden.done():
                        raise WireError(f"The broker does not let this key use {subject}.")
                    reason = "the connection was lost" if lost.done() else "the broker does not answer"
                except (TimeoutError, nats.errors.Error, OSError, _Later) as error:
                    reason = str(error) or type(error).__name__
                    await asyncio.sleep(_FIRST)
                finally:
                    await _stop(task, lost)
                if time.monotonic() >= until:
                    raise self._late(reason)
        finally:
            watchers = self._watched[subject.lower()]
            watchers.discard(forbidden)
            if not watchers:
                del self._watched[subject.lower()]
            forbidden.cancel()

    async def _ready(self, until: float, reason: str = "") -> Client:
        """The connected client."""
        while self._client is None:
            if self._is_refused:
                raise LoginRefused(
                    f"The broker refuses this key ({self._error}). It is not a member's, or was revoked. Ask the coordinator for a new invitation."
                )
            self._change.clear()
            try:
                await asyncio.wait_for(self._change.wait(), until - time.monotonic())
            except TimeoutError as error:
                raise self._late(reason) from error
        return self._client

    def _late(self, reason: str) -> Unreachable:
        reason = "; ".join(filter(None, [reason, self._error])) or "no answer"
        return Unreachable(f"The broker at {words.listed(self._servers)} could not be used in time: {words.clean(reason, 200)}.")

    async def _lost(self, client: Client) -> None:
        while self._client is client:
            event = self._lost_event
            await event.wait()

    async def _keep(self) -> None:
        """Connects, and connects again, until it is cancelled."""
        pause = _FIRST
        self._lost_event = asyncio.Event()
        while True:
            try:
                client, gone = await asyncio.wait_for(self._connect(), _ATTEMPT)
            except Exception as error:  # Whatever it was, the next attempt may do better; a keeper that has died never will.
                self._note(error)
                self._is_refused = bool(_REFUSED.search(str(error)))
                self._change.set()
                await asyncio.sleep(pause)
                pause = min(2 * pause, _SLOWEST)
                continue
            pause, self._error, self._is_refused = _FIRST, "", False
            self._client, self._lost_event = client, asyncio.Event()
            self.reconnects += 1
            self._change.set()
            try:
                # nats-py calls back at the end of its closing, which an error on the way may keep it from reaching.
                while client.is_connected:
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(gone.wait(), _LOOK)
                        break
            finally:
                self._client = None
                self._lost_event.set()
                with suppress(Exception):
                    await client.close()

    async def _connect(self) -> tuple[Client, asyncio.Event]:
        import nats.errors
        from nats.aio.client import Client

        client, gone = Client(), asyncio.Event()

        async def closed() -> None:
            gone.set()

        async def failed(error: Exception) -> None:
            self._note(error)
            if isinstance(error, nats.errors.UnexpectedEOF | nats.errors.StaleConnectionError):
                gone.set()
            match = _FORBIDDEN.search(str(error))
            for watcher in self._watched.get(match[1].lower(), ()) if match else ():
                if not watcher.done():
                    watcher.set_result(None)

        options: dict[str, Any] = {} if self._nkey is None else {"nkeys_seed_str": self._nkey.seed}
        if self._tls is not None:
            options |= {"tls": self._tls() if callable(self._tls) else self._tls, "tls_handshake_first": True}
        try:
            # Connecting again is ours: nats-py would keep what was written before the cut, and stops for ever after some errors.
            await client.connect(
                self._servers,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=_FIRST,  # type: ignore[arg-type, unused-ignore]
                connect_timeout=int(_ATTEMPT / 2),
                ping_interval=10,
                name=self._name,
                inbox_prefix=self._inbox,
                error_cb=failed,
                closed_cb=closed,
                disconnected_cb=closed,
                **options,
            )
        except BaseException:
            with suppress(Exception):
                await client.close()
            raise
        return client, gone

    def _note(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        # The last server that was tried says why; that none is left says nothing.
        if "no servers available" not in text:
            self._error = words.clean(text.removeprefix("nats: "), 160)

    async def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return task

    async def _end(self) -> None:
        # What was received and not taken goes back while there is a connection.
        with suppress(TimeoutError):
            await asyncio.wait_for(_stop(*self._begun), 1.0)
        self._keeper.cancel()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        client = self._client
        if client is not None:
            with suppress(Exception):
                await client.flush(1)
                await client.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(_stop(*others), 1.0)
        # Sockets are closed in the loop's next steps.
        await asyncio.sleep(_FIRST)


@dataclass(frozen=True)
class Delivery:
    """A message that the broker holds until it is acknowledged.

    Args:
        branch: Where it arrived.
        data: What was published.
        times: How often it has been delivered; more than 1 after a crash or a slow receiver.
    """

    branch: Branch
    data: bytes
    times: int
    _connection: Connection
    _reply: str

    def acknowledge(self, patience: float | None = None) -> None:
        """Lets the broker forget it: its work is done. Returns when the broker knows.

        Raises:
            WireError: if the broker could not be told; it will deliver the message again.
        """

        async def acknowledge(client: Client) -> None:
            await client.request(self._reply, b"+ACK", timeout=_ANSWER)

        connection = self._connection
        connection._wait(connection.call(self._reply, acknowledge, connection._until(patience)))

    def working(self) -> None:
        """Asks for more time: the broker waits again before it delivers the message anew."""

        async def working(client: Client) -> None:
            await client.publish(self._reply, b"+WPI")

        connection = self._connection
        connection._wait(connection.call(self._reply, working, connection._until(None)))


class Inbox:
    """Messages of several branches as they arrive; at most one of each is held here.

    Args:
        connection: Where they come from.
        branches: Whose messages.
    """

    def __init__(self, connection: Connection, branches: Iterable[Branch] = ()) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[tuple[Delivery | WireError, asyncio.Event]] = queue.SimpleQueue()
        self._pulls: dict[Branch, asyncio.Task[None]] = {}
        for branch in branches:
            self.add(branch)

    def add(self, branch: Branch) -> None:
        """Receives the messages of a branch too."""
        if branch not in self._pulls:
            self._pulls[branch] = self._connection._wait(self._connection._begin(self._pull(branch)))

    def remove(self, branch: Branch) -> None:
        """Receives no more messages of a branch. One that is here and was not taken goes back to the broker."""
        pull = self._pulls.pop(branch, None)
        if pull is not None and not self._connection.is_closed:
            self._connection._wait(_stop(pull))

    def next(self, timeout: float | None = None) -> Delivery | None:
        """The next message, waiting for it; ``None`` if none arrives in ``timeout`` seconds.

        Raises:
            WireError: if the broker refuses this key or does not let it read a branch, or the connection was closed.
        """
        try:
            delivery, taken = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if not self._connection.is_closed:
            self._connection._loop.call_soon_threadsafe(taken.set)
        if isinstance(delivery, WireError):
            raise delivery
        return delivery

    def close(self) -> None:
        """Receives no more."""
        for branch in list(self._pulls):
            self.remove(branch)

    async def _pull(self, branch: Branch) -> None:
        try:
            await self._pull_each(branch)
        finally:
            if self._connection.is_closed:
                self._queue.put((WireError("The connection to the broker was closed."), asyncio.Event()))

    async def _pull_each(self, branch: Branch) -> None:
        request = json.dumps({"batch": 1, "expires": int(_PULL * _NANO)}).encode()

        async def pull(client: Client) -> Msg:
            # A message comes under its own subject, so it needs a subscription of its own. Ending that ends the request at the broker too.
            subject = client.new_inbox()
            answered: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

            async def arrived(message: Msg) -> None:
                if not answered.done():
                    answered.set_result(message)

            subscription = await client.subscribe(subject, cb=arrived)
            try:
                await client.publish(branch.next, request, reply=subject)
                await asyncio.wait({answered}, timeout=_PULL + _ANSWER)
                if not answered.done():
                    raise TimeoutError
                await subscription.unsubscribe()
                return answered.result()
            except asyncio.CancelledError:
                with suppress(Exception):
                    # What arrives until the broker knows goes back to it.
                    await subscription.drain()  # type: ignore[no-untyped-call, unused-ignore]
                    if answered.done():
                        await answered.result().nak()
                raise

        while True:
            taken = asyncio.Event()
            try:
                message = await self._connection.call(branch.next, pull, time.monotonic() + 10 * _PULL)
            except WireError as error:
                if self._connection._client is None and not self._connection._is_refused:
                    continue
                self._queue.put((error, taken))
                await taken.wait()
                await asyncio.sleep(_SLOWEST)
                continue
            status = (message.headers or {}).get("Status")
            if status is None:
                self._queue.put((Delivery(branch, message.data, _times(message.reply), self._connection, message.reply), taken))
                try:
                    await taken.wait()
                except asyncio.CancelledError:
                    # Nobody will take it here; another inbox shall not wait for it.
                    with suppress(Exception):
                        await message.nak()
                    raise
            elif status not in ("404", "408"):
                # The consumer moved or is being made again.
                await asyncio.sleep(_FIRST)


def result(future: concurrent.futures.Future[T]) -> T:
    """What came of something that was started, waiting for it.

    Raises:
        WireError: if it was not possible, or the connection was closed meanwhile.
    """
    try:
        return future.result()
    except concurrent.futures.CancelledError as error:
        raise WireError("The connection to the broker was closed.") from error


class _Later(Exception):
    """The broker cannot do it yet; it is asked again."""


class _Exists(WireError):
    """A stream is there, with other limits."""


class _Absent(WireError):
    """There is no such stream or consumer."""


# The broker's numbers for: a stream exists with another configuration, there is none of a kind, the answer comes too early after its start.
_EXISTS, _NONE, _SOON = 10058, {10059: "stream", 10014: "consumer"}, {10008, 10009, 10005, 10074}


def _answer(data: bytes) -> dict[str, Any]:
    """What JetStream answers."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Later(f"the broker's answer is not JSON ({error})") from error
    if not isinstance(answer, dict):
        raise _Later("the broker's answer is not an object")
    refusal = answer.get("error")
    if not isinstance(refusal, dict):
        return answer
    number, text = refusal.get("err_code"), words.clean(refusal.get("description", "no reason"), 160)
    if number == _EXISTS:
        raise _Exists(text)
    if number in _NONE:
        raise _Absent(f"The broker has no such {_NONE[number]} ({text}).")
    if number in _SOON:
        raise _Later(text)
    raise WireError(f"The broker refused: {text}. (JetStream error {number})")


def _times(reply: str) -> int:
    """How often a message was delivered, which stands in the subject of its acknowledgement."""
    tokens = reply.split(".")
    # Newer brokers put their domain and account before the stream.
    place = 4 if len(tokens) == 9 else 6
    return int(tokens[place]) if len(tokens) > place and tokens[place].isascii() and tokens[place].isdigit() else 1


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    """Ends tasks that nobody waits for any more, and takes their errors."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's log is: this one follows from nats-py over TLS whenever a broker goes away."""
    return "eof_received() has no effect when using ssl" not in record.getMessage()


def _require_nats() -> None:
    logging.getLogger("asyncio").addFilter(_is_worth_saying)
    try:
        import nats.aio.client  # noqa: F401
        import nkeys  # noqa: F401
    except ImportError as error:
        raise MissingExtra("nats-py", "deploy", "A consortium") from error

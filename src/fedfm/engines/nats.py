"""Every client in its owner's house, reached through a broker (NATS JetStream) that carries what it can neither read nor forge.

A member first gets a greeting, which says what the run is; then requests. A request is a body, sealed once for all who are asked, stored once, and
fetched by each; and a small part for one member, which names the body. Answers are sealed to the coordinator, and each is handed over as it arrives.

Covered here: answers that are forged, of another run, late, sent twice or not asked for are dropped and counted by kind; a member that
does not answer in time is named and left to the recipe's rule; a broker that goes away and comes back; a coordinator that starts anew, whose
earlier questions nobody's answer is taken for. Not covered: two runs at a time over one link (each takes the other's answers for answers of another
run); a member's word about its own data.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedfm import notation
from fedfm.client.house import House
from fedfm.core import disk
from fedfm.core.clock import Clock, Wall
from fedfm.core.errors import ConfigError, MessageError, RunError, WireError
from fedfm.core.messages import Body, ClientId, Failure, Reply, Request, Scalar, pack_parts, unpack
from fedfm.core.session import Answer, Session
from fedfm.core.version import VERSION as RELEASE
from fedfm.engines.base import Engine
from fedfm.wire.envelope import MAX_LIFETIME, MAX_RECEIVERS, Header, Opener, Payload, seal
from fedfm.wire.link import Link
from fedfm.wire.nats import Unreachable
from fedfm.wire.refusal import Refused, reason
from fedfm.wire.stored import Stored
from fedfm.wire.transfer import receive_all, send
from fedfm.wire.window import Window

if TYPE_CHECKING:
    from fedfm.wire.envelope import Envelope
    from fedfm.wire.identity import Card
    from fedfm.wire.nats import Connection, Delivery
    from fedfm.wire.subjects import Branch, Names

log = logging.getLogger(__name__)

TALK = 1
"""Version of what coordinator and member say to each other: the greeting, the request and its body, the answer."""
HELLO, REQUEST, BODY, REPLY = "hello", "request", "body", "reply"
BODY_ID = "body"
"""Where a request names its body."""
ACK_WAIT = 12.0
"""Seconds after which the broker delivers a message again that its receiver was killed with."""
JOB = "job.json"
# Messages of one session; its number and theirs make a sequence that no other session of the run has.
_SESSION_BITS = 28
# Seconds: between two looks at the clock while nothing arrives, that a question without a deadline is meant to last, that closing may take.
_LOOK, _LASTING, _CLOSING = 0.25, 7 * 86400.0, 3.0
# Seconds between two looks at who belongs, while answers are waited for.
_FOLLOW = 2.0
_OUT = "it does not belong to the consortium, or does no more."


@dataclass(frozen=True)
class Nats(Engine):
    """Members on machines of their own, over a NATS broker. They only dial out, and everything is signed and sealed end to end.

    At the same number of threads the numbers are those of ``Embedded(bank=1)``, bit for bit. The recipe's ``data.source`` is not read: each member
    names its own file.

    Args:
        consortium: The coordinator's folder, which says where the broker is, who we are and who the members are.
        device: Of the coordinator's own copy of the model; each member chooses its own.
        storage: Gigabytes that the broker may hold of what each member sends, of what it is sent, and of all bodies.

    Raises:
        ConfigError: if a number is out of range.
    """

    consortium: str = "consortium"
    device: str = "auto"
    storage: float = 1.0

    def __post_init__(self) -> None:
        if not (self.storage > 0 and math.isfinite(self.storage)):
            raise ConfigError(f"Nats.storage is {self.storage} GB; it must be a finite number above 0.")

    def members(self) -> tuple[ClientId, ...]:
        """Who belongs to the consortium now, sorted.

        Raises:
            ConfigError: if there is no consortium in the folder, or others can enter it.
            RunError: if its roster is damaged.
        """
        return tuple(sorted(self._link().peers()))

    def _link(self) -> Link:
        from fedfm.silos.consortium import Consortium

        return Consortium.open(Path(self.consortium)).link()

    def open(self, house: House, clock: Clock | None = None) -> NatsSession:
        """A session in which nobody has been greeted yet.

        Raises:
            ConfigError: if the consortium's folder cannot be used.
            WireError: if the broker cannot be reached.
        """
        base = house.base  # before the tuning puts its own parameters into the model
        spec = house.tuned.spec
        leaves = house.plan.local.leaves(spec, spec)
        # A value and its place take at most 16 bytes, whatever a transform makes of them; the rest is for names and for what an evaluation sums.
        max_bytes = 16 * sum(leaf.size for leaf in leaves) + (16 << 20)

        def hello() -> dict[str, Scalar]:
            return {
                "talk": TALK,
                "release": RELEASE,
                "plan": notation.write(house.plan),
                "base": base,
                "labels": json.dumps(house.labels),
                "key": house.key.digest.hex(),
                "choices": json.dumps(house.choices),
                "num_clients": house.num_clients,
                "cohort_size": house.cohort_size,
                "num_rounds": house.num_rounds,
                "run": house.run,
                "data_rules": json.dumps(dict(house.data_rules)),
            }

        link, job = self._link(), Job.begin(house.folder, house.run)
        connection = link.connect()
        try:
            return NatsSession(connection, link, job, hello, max_bytes, 3 * len(leaves) + 64, clock, self.storage)
        except BaseException:
            connection.close()
            raise


def make_streams(connection: Connection, names: Names, members: Iterable[str], storage: float = 1.0) -> None:
    """Makes what members read from and write to at the broker, where it is not there; a member has no right to make anything.

    Args:
        storage: Gigabytes that each stream may hold.

    Raises:
        WireError: if the broker refuses.
    """
    max_bytes = int(storage * 1e9)
    connection.make_stream(names.bodies, max_bytes)
    for name in members:
        for branch in (names.down(name), names.up(name)):
            connection.make_stream(branch, max_bytes)
            # A member that was killed with a greeting must not find the request that follows it first.
            connection.make_consumer(branch, ack_wait=ACK_WAIT, one_by_one=branch == names.down(name))


@dataclass(frozen=True)
class Job:
    """A run as its messages call it, the same after every restart; and how often it was begun.

    Args:
        name: From the run's name, with random digits that no other run has.
        session: 1 the first time.
    """

    name: str
    session: int

    @staticmethod
    def begin(folder: Path | None, run: str) -> Job:
        """The job of the run in a folder, begun once more; that is written down before it is used.

        Args:
            folder: The run's folder; ``None`` for a run that leaves nothing.

        Raises:
            RunError: if it cannot be read or written.
        """
        job = Job(f"{re.sub('[^a-z0-9]+', '-', run.lower()).strip('-')[:40] or 'run'}-{secrets.token_hex(6)}", 1)
        if folder is None:
            return job
        path = folder / JOB
        if path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
                job = Job(str(known["name"]), int(known["session"]) + 1)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{path} cannot be read ({error}). It names this run to its members. Restore it from a copy, or start a new run."
                ) from error
        disk.write_atomic(path, json.dumps(vars(job)).encode())
        return job


@dataclass
class _Owed:
    """A member that has not answered a request, and the time at which it is late."""

    client: ClientId
    request: Request
    expires: float


@dataclass(frozen=True)
class _Stored:
    """A body that is at the broker, for these members."""

    body: Body
    id: str
    receivers: frozenset[ClientId]


class NatsSession(Session):
    """Members behind a broker.

    Args:
        connection: To the broker; it is closed with the session.
        link: Who they are.
        job: What the run is called.
        hello: Makes the greeting; called when a member is first asked, because what it tells may be chosen meanwhile.
        max_bytes: The longest answer.
        max_tensors: Most tensors that an answer may hold.
        clock: Measures deadlines.
        storage: Gigabytes that each stream at the broker may hold.

    Attributes:
        dropped: Messages that were not taken, by the reason: a word of :data:`fedfm.wire.refusal.REASONS`.
    """

    def __init__(
        self,
        connection: Connection,
        link: Link,
        job: Job,
        hello: Callable[[], dict[str, Scalar]],
        max_bytes: int,
        max_tensors: int,
        clock: Clock | None = None,
        storage: float = 1.0,
    ) -> None:
        self.clock = clock or Wall()
        self._link, self._job, self._hello, self._max_bytes, self._max_tensors = link, job, hello, max_bytes, max_tensors
        self._me, self._names, self._window, self._storage = link.me, link.names, Window(), storage
        self._peers: dict[str, Card] = {}
        self._window.open(job.name)
        self._opener = Opener(self._me, self._peers, link.consortium, max_bytes)
        self._sequence = job.session << _SESSION_BITS
        self._greeted: set[ClientId] = set()
        self._owed: dict[int, _Owed] = {}
        self._arrived: deque[Answer] = deque()
        self._bodies: list[_Stored] = []
        self._given: float | None = None
        self._is_closed = False
        self._connection = connection
        self._members: dict[Branch, str] = {}
        self._inbox = connection.inbox()
        self._follow()

    @property
    def dropped(self) -> Counter[str]:
        """Messages that were not taken, by the reason."""
        return self._window.counts

    # --- members ----------------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Takes over who joined and who was revoked since.

        Raises:
            RunError: if the roster is damaged.
            WireError: if the broker cannot be used.
        """
        peers, self._followed = dict(self._link.peers()), time.monotonic()
        gone = [name for name in self._peers if name not in peers]
        new = [name for name, card in peers.items() if self._peers.get(name) != card]
        for name in gone:
            branch = self._names.up(name)
            self._inbox.remove(branch)
            self._members.pop(branch, None)
        # Other keys are another member, even under the same name: it knows nothing of this run, and reads no body that was sealed before.
        changed = {*gone, *new}
        for sequence in [sequence for sequence, owed in self._owed.items() if owed.client in changed]:
            self._arrived.append(Failure(self._owed.pop(sequence).client, "exchange", _OUT))
        self._greeted -= changed
        self._bodies = [replace(stored, receivers=stored.receivers - changed) for stored in self._bodies]
        make_streams(self._connection, self._names, new, self._storage)
        self._peers.clear()
        self._peers.update(peers)
        for name in new:
            branch = self._names.up(name)
            self._members[branch] = name
            self._inbox.add(branch)

    # --- questions --------------------------------------------------------------------------------------------------------

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        """Stores each body once, and each member's own part for it to find. A member that is away finds it when it comes.

        Raises:
            WireError: if the broker cannot be used, which is no member's failure; a run goes on from its last round when it is back.
        """
        self._follow()
        lasting = _LASTING if deadline is None else min(deadline, MAX_LIFETIME)
        expires = math.inf if deadline is None else self.clock.now() + deadline
        known = {client: request for client, request in requests.items() if client in self._peers}
        self._arrived.extend(Failure(client, "exchange", _OUT) for client in requests if client not in known)
        same: dict[int, list[ClientId]] = {}
        for client, request in known.items():
            same.setdefault(id(request.body), []).append(client)
        for group in same.values():
            for first in range(0, len(group), MAX_RECEIVERS):
                self._ask({client: known[client] for client in group[first : first + MAX_RECEIVERS]}, lasting, expires)

    def _ask(self, requests: Mapping[ClientId, Request], lasting: float, expires: float) -> None:
        """Asks members that share a body."""
        body = next(iter(requests.values())).body
        try:
            stored = self._store(body, frozenset(requests), lasting)
        except Unreachable:
            raise
        except WireError as error:
            self._arrived.extend(Failure(client, "exchange", str(error)) for client in requests)
            return
        for client, request in requests.items():
            try:
                if client not in self._greeted:
                    self._post(client, HELLO, 0, pack_parts(Request(Body(HELLO, meta=self._hello()))), _LASTING)
                    self._greeted.add(client)
                own = Request(Body(request.verb, request.round, meta={BODY_ID: stored.id}), request.own, request.own_tensors)
                sequence = self._post(client, REQUEST, request.round, pack_parts(own), lasting)
                self._owed[sequence] = _Owed(client, request, expires)
            except Unreachable:
                raise
            except WireError as error:
                self._arrived.append(Failure(client, "exchange", str(error)))

    def _store(self, body: Body, receivers: frozenset[ClientId], lasting: float) -> _Stored:
        """The body at the broker, stored if it is not there for all of these."""
        for stored in self._bodies:
            if stored.body is body and receivers <= stored.receivers:
                return stored
        self._drop(stored for stored in self._bodies if stored.body.round != body.round)
        cards = [self._peers[client] for client in sorted(receivers)]
        id, data = self._seal(BODY, body.round, pack_parts(Request(body)), cards, max(lasting, 3600.0), self._names.bodies)
        self._connection.publish(self._names.bodies.head(id), data)
        self._bodies.append(_Stored(body, id, receivers))
        return self._bodies[-1]

    def _post(self, client: ClientId, kind: str, round: int, payload: Payload, lasting: float) -> int:
        """Puts a message into a member's stream; its sequence."""
        branch = self._names.down(client)
        _, data = self._seal(kind, round, payload, [self._peers[client]], lasting, branch)
        self._connection.publish(branch.message, data)
        return self._sequence

    def _seal(self, kind: str, round: int, payload: Payload, cards: list[Card], lasting: float, branch: Branch) -> tuple[str, bytes]:
        """The id of a message and what is to be published; its chunks are stored."""
        self._sequence += 1
        header = Header.now(self._link.consortium, self._job.name, round, self._sequence, kind, lasting)
        sealed = seal(payload, self._me, cards, header)
        return sealed.header.id, send(sealed, Stored(self._connection, branch))

    def _drop(self, bodies: Iterable[_Stored]) -> None:
        """Deletes bodies that nobody is asked about any more."""
        for stored in list(bodies):
            self._bodies.remove(stored)
            # What stays is deleted by its age.
            with suppress(WireError):
                self._connection.purge(self._names.bodies, self._names.bodies.head(stored.id), _CLOSING)
                self._connection.purge(self._names.bodies, self._names.bodies.chunks(stored.id), _CLOSING)

    # --- answers ----------------------------------------------------------------------------------------------------------

    def receive(self) -> Answer | None:
        """The next answer, once it is complete.

        Raises:
            WireError: if a deadline passes while the broker is away, which is no member's failure; or if the broker refuses us.
        """
        if self._given is not None:
            # A member does not pay for the time that the coordinator spends on another's answer.
            spent = self.clock.now() - self._given
            for owed in self._owed.values():
                owed.expires += spent
            self._given = None
        while not self._arrived and self._owed:
            self._listen()
        if not self._arrived:
            return None
        self._given = self.clock.now()
        return self._arrived.popleft()

    def abandon(self) -> None:
        """Waits no longer; answers that come are late."""
        self._owed.clear()
        self._arrived.clear()
        self._given = None

    def close(self) -> None:
        """Ends the connection. Members stay where they are."""
        if self._is_closed:
            return
        self._is_closed = True
        self.abandon()
        self._drop(self._bodies)
        self._connection.close()

    def _listen(self) -> None:
        """Waits until something arrives or a member is late."""
        soonest = min(owed.expires for owed in self._owed.values())
        # The clock may be another than the machine's, so it is looked at now and then.
        delivery = self._inbox.next(min(_LOOK, max(0.0, soonest - self.clock.now())))
        if delivery is not None:
            answer = self._take(delivery)
            if answer is not None:
                self._arrived.append(answer)
        if time.monotonic() >= self._followed + _FOLLOW:
            with suppress(WireError):
                self._follow()
        now = self.clock.now()
        if not self._connection.is_connected and any(owed.expires <= now for owed in self._owed.values()):
            raise Unreachable("A deadline passed while the broker was away. The round is played again when it is back.")
        for sequence in [sequence for sequence, owed in self._owed.items() if owed.expires <= now]:
            self._arrived.append(Failure(self._owed.pop(sequence).client, "deadline", "it did not answer in time."))

    def _take(self, delivery: Delivery) -> Answer | None:
        """The answer in a message; ``None`` where it is none that is waited for."""
        answer, header = None, None
        try:
            # Nobody has this name: what was on its way when its sender was revoked.
            sender = self._members.get(delivery.branch, "")
            envelope = self._opener.read(delivery.data, sender=sender, max_bytes=self._max_bytes)
            header = envelope.header
            owed = self._expected(header)
            if owed is not None:
                answer = self._answer(envelope, delivery.branch, owed)
                del self._owed[header.sequence]
                self._window.take(header)
        except WireError as error:
            log.info("an answer could not be fetched, and is delivered again: %s", error)
            return None
        except MessageError as error:
            self._count(error)
        # A message that the broker was not told of comes again, and is a replay then.
        with suppress(WireError):
            delivery.acknowledge(_CLOSING)
            if header is not None and header.num_chunks > 1:
                Stored(self._connection, delivery.branch).drop(header.id)
        return answer

    def _count(self, error: MessageError) -> None:
        self._window.count(error)
        log.info("a message was dropped (%s): %s", reason(error), error)

    def _expected(self, header: Header) -> _Owed | None:
        """The question that a message answers; ``None``, and counted, where there is none."""
        try:
            self._window.check(header)
        except Refused as error:
            log.info("a message was dropped (%s): %s", error.why, error)
            return None
        owed = self._owed.get(header.sequence)
        if owed is None or owed.client != header.sender or header.kind != REPLY or header.round != owed.request.round:
            self._count(Refused("late", f"{header.sender} sent a {header.kind} that nobody waits for, or waits for any more."))
            return None
        return owed

    def _answer(self, envelope: Envelope, branch: Branch, owed: _Owed) -> Answer:
        """What a member answers; a failure where that is of no use."""
        try:
            payload = receive_all(envelope, Stored(self._connection, branch))
            return self._checked(unpack(memoryview(payload), self._max_bytes, self._max_tensors), owed)
        except MessageError as error:
            self._count(error)
            return Failure(owed.client, "exchange", str(error))

    def _checked(self, answer: Request | Answer, owed: _Owed) -> Answer:
        asked = owed.request
        if isinstance(answer, Request) or answer.client != owed.client:
            raise MessageError(f"A message of kind {type(answer).__name__} arrived that nobody asked for.")
        if isinstance(answer, Reply) and (answer.verb, answer.round) != (asked.verb, asked.round):
            raise MessageError(
                f"{answer.verb!r} of round {answer.round} was answered, but {asked.verb!r} of round {asked.round} was asked."
            )
        return answer

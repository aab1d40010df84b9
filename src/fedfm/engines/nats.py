"""Every client in its owner's house, reached through a broker (NATS JetStream) that carries what it can neither read nor forge.

A member first gets a greeting, which says what the run is; then requests. A request is a body, sealed once for all who are asked, stored once, and
fetched by each; and a small part for one member, which names the body. Answers are sealed to the coordinator, and each is handed over as it arrives.
A long one is checked to its last chunk first, and waits on the coordinator's disk, still encrypted; then it is read piece by piece, once to be judged
and once to be added, so that no answer is ever in memory as a whole.

Covered here: answers that are forged, of another run, late, sent twice or not asked for are dropped and counted by kind; a member that
does not answer in time is named and left to the recipe's rule; a broker that goes away and comes back; a coordinator that starts anew, whose
earlier questions nobody's answer is taken for; several runs at a time, each of which takes its own answers alone; a member that comes back after its
deadline, which is told so before it works. Not covered: a member's word about its own data.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedfm import notation
from fedfm.client.house import House
from fedfm.core import disk
from fedfm.core.clock import Clock, Wall
from fedfm.core.errors import ConfigError, MessageError, RunError, WireError
from fedfm.core.leaves import Leaf
from fedfm.core.messages import Body, ClientId, Failure, Reply, Request, Scalar, pack_parts, pack_views, size, unpack, unpack_from
from fedfm.core.parts import Finding, Plan, warn
from fedfm.core.session import Answer, Session
from fedfm.core.version import VERSION as RELEASE
from fedfm.engines.base import Engine
from fedfm.engines.over import OVER, Over, over_id
from fedfm.models.files import paths_of, sets_of, write_sets
from fedfm.wire.envelope import MAX_LIFETIME, MAX_RECEIVERS, Header, Opener, Payload, seal
from fedfm.wire.link import Link
from fedfm.wire.nats import Unreachable
from fedfm.wire.parts import ASK, PART, HandOut
from fedfm.wire.refusal import Refused, reason
from fedfm.wire.stored import Stored
from fedfm.wire.traffic import TRAFFIC, Traffic
from fedfm.wire.transfer import Spool, receive_all, send
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
STORAGE = 0.3
"""Gigabytes that a stream at the broker may hold, unless more is needed: three parts of a base's file, and a body."""
# Messages of one session; its number and theirs make a sequence that no other session of the run has.
_SESSION_BITS = 28
# Seconds: between two looks at the clock while nothing arrives, that a question without a deadline is meant to last, that closing may take.
_LOOK, _LASTING, _CLOSING = 0.25, 7 * 86400.0, 3.0
# Bytes of what members say of themselves: a few kilobytes each.
_PRESENCES = 64 << 20
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
        storage: Gigabytes that the broker sets aside for what each member sends, for what it is sent, and for all bodies; more where this plan's
            messages are longer.

    Raises:
        ConfigError: if a number is out of range.
    """

    trusts_clients = False

    consortium: str = "consortium"
    device: str = "auto"
    storage: float = STORAGE

    def __post_init__(self) -> None:
        if not (self.storage > 0 and math.isfinite(self.storage)):
            raise ConfigError(f"Nats.storage is {self.storage} GB; it must be a finite number above 0.")

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Warns where one member's word decides."""
        if plan.bounding() is None:
            yield warn(
                "bounds",
                "null lets one member decide a round by a long update or a large weight. Leave it out (auto), or give it numbers of your own.",
            )

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
        leaves: tuple[Leaf, ...] = ()
        if not house.lacks_classes:
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
                "files": write_sets(files),
                "labels": json.dumps(house.labels),
                "key": house.key.digest.hex(),
                "choices": json.dumps(house.choices),
                "num_clients": house.num_clients,
                "cohort_size": house.cohort_size,
                "num_rounds": house.num_rounds,
                "run": house.run,
                "data_rules": json.dumps(dict(house.data_rules)),
            }

        paths = paths_of(house.plan.model)
        files = sets_of(paths)
        link, job = self._link(), Job.begin(house.folder, house.run)
        connection = link.connect()
        try:
            # A stream that is full refuses messages: one is being sent, one is being read, and one came too late.
            storage = max(self.storage, 3 * max_bytes / 1e9)
            traffic = Traffic(None if house.folder is None else house.folder / TRAFFIC)
            session = NatsSession(connection, link, job, hello, max_bytes, 3 * len(leaves) + 64, clock, storage, house.folder, traffic)
            session.hand_out({file.digest: paths[name][file.name] for name, one in files.items() for file in one})
            return session
        except BaseException:
            connection.close()
            raise


def make_streams(connection: Connection, names: Names, members: Iterable[str], storage: float = STORAGE) -> None:
    """Makes what members read from and write to at the broker, where it is not there; a member has no right to make anything.

    Args:
        storage: Gigabytes that each stream may hold.

    Raises:
        WireError: if the broker refuses.
    """
    max_bytes = int(storage * 1e9)
    connection.make_stream(names.bodies, max_bytes)
    connection.make_stream(names.presences, _PRESENCES, max_age=MAX_LIFETIME, is_board=True)
    for name in members:
        for branch in (names.down(name), names.up(name)):
            connection.make_stream(branch, max_bytes)
        # A member that was killed with a greeting must not find the request that follows it first.
        connection.make_consumer(names.down(name), ack_wait=ACK_WAIT, one_by_one=True)


def end_job(link: Link, folder: Path) -> None:
    """Deletes what the broker still holds of a run that is over: answers that came too late for it, and who would take them.

    Args:
        folder: The run's folder.

    Raises:
        RunError: if its name cannot be read.
        WireError: if the broker cannot be used.
    """
    job = Job.read(folder)
    if job is None:
        return
    with link.connect() as connection:
        for name in link.peers():
            branch = link.names.up(name).of(job.name)
            connection.purge(branch, branch.all)
            connection.delete_consumer(branch)


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
        known = Job.read(folder)
        if known is not None:
            job = replace(known, session=known.session + 1)
        disk.write_atomic(folder / JOB, json.dumps(vars(job)).encode())
        return job

    @staticmethod
    def read(folder: Path) -> Job | None:
        """The job of the run in a folder as it was begun last; ``None`` where it was not.

        Raises:
            RunError: if it cannot be read.
        """
        path = folder / JOB
        if not path.exists():
            return None
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return Job(str(known["name"]), int(known["session"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} cannot be read ({error}). It names this run to its members. Restore it from a copy, or start a new run."
            ) from error


@dataclass
class _Owed:
    """A member that has not answered a request, and the time at which it is late."""

    client: ClientId
    request: Request
    expires: float


@dataclass(frozen=True)
class _Stored:
    """A body that is at the broker, for these members. Its tensors are not kept: who asks anew brings them."""

    body: weakref.ref[Body]
    round: int
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
        folder: Where a long answer waits, encrypted and without a name, while it is read; ``None`` for the system's folder for such files.
        traffic: Where it is noted who was asked and has answered.

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
        storage: float = STORAGE,
        folder: Path | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.clock, self._traffic = clock or Wall(), traffic or Traffic(None)
        self._link, self._job, self._hello, self._max_bytes, self._max_tensors = link, job, hello, max_bytes, max_tensors
        self._me, self._names, self._window, self._storage, self._folder = link.me, link.names, Window(), storage, folder
        self._peers: dict[str, Card] = {}
        self._window.open(job.name)
        self._opener = Opener(self._me, self._peers, link.consortium, max_bytes)
        self._sequence = job.session << _SESSION_BITS
        self._greeted: set[ClientId] = set()
        self._ended: dict[ClientId, int] = {}
        self._owed: dict[int, _Owed] = {}
        self._arrived: deque[Answer] = deque()
        self._bodies: list[_Stored] = []
        self._given: float | None = None
        self._is_closed = False
        self._connection = connection
        self._parts: dict[str, str] = {}
        self.hand_out({})
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
            branch = self._up(name)
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
            branch = self._up(name)
            self._connection.make_consumer(branch, ack_wait=ACK_WAIT, lasting=_LASTING)
            self._members[branch] = name
            self._inbox.add(branch)

    def _up(self, name: str) -> Branch:
        """Where a member answers in this run."""
        return self._names.up(name).of(self._job.name)

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
                    if self._job.session > 1:
                        # What a session that was killed has asked, nobody waits for any more.
                        self._end(client, (self._job.session << _SESSION_BITS) - 1, Over.session(request.round))
                    self._post(client, HELLO, 0, pack_parts(Request(Body(HELLO, meta=self._hello()))), _LASTING)
                    self._greeted.add(client)
                own = Request(Body(request.verb, request.round, meta={BODY_ID: stored.id}), request.own, request.own_tensors)
                sequence = self._post(client, REQUEST, request.round, pack_parts(own), lasting)
                self._owed[sequence] = _Owed(client, request, expires)
                self._traffic.asked(client, request.verb, request.round, size(request))
            except Unreachable:
                raise
            except WireError as error:
                self._arrived.append(Failure(client, "exchange", str(error)))

    def _store(self, body: Body, receivers: frozenset[ClientId], lasting: float) -> _Stored:
        """The body at the broker, stored if it is not there for all of these."""
        for stored in self._bodies:
            if stored.body() is body and receivers <= stored.receivers:
                return stored
        self._drop(stored for stored in self._bodies if stored.round != body.round)
        cards = [self._peers[client] for client in sorted(receivers)]
        id, data = self._seal(BODY, body.round, pack_views(Request(body)), cards, max(lasting, 3600.0), self._names.bodies)
        self._connection.publish(self._names.bodies.head(id), data)
        self._bodies.append(_Stored(weakref.ref(body), body.round, id, receivers))
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

    def _end(self, client: ClientId, sequence: int, over: Over) -> None:
        """Leaves word for a member that its requests up to this one are over, which it reads before it works on one."""
        # A member that does not learn of it works for nothing, and its answer is late.
        if sequence <= self._ended.get(client, 0) or client not in self._peers or not self._connection.is_connected:
            return
        self._ended[client] = sequence
        header = Header.now(self._link.consortium, self._job.name, over.round, sequence, OVER, _LASTING)
        note = seal(over.pack(), self._me, [self._peers[client]], header).message()
        with suppress(WireError):
            self._connection.publish(self._names.down(client).head(over_id(self._job.name)), note, patience=_CLOSING)

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
            self._do_not_charge(self._given)
            self._given = None
        while not self._arrived and self._owed:
            self._listen()
        self._traffic.write(self.dropped)
        if not self._arrived:
            return None
        self._given = self.clock.now()
        return self._arrived.popleft()

    def hand_out(self, paths: Mapping[str, Path]) -> None:
        """Lets members ask for files, by their digests."""
        self._files = HandOut(paths, self._store_part, self._free_part)

    def _store_part(self, id: str, payload: Payload) -> frozenset[ClientId]:
        """Stores a part of a file for all who belong, under a name that they can compute; who can read it."""
        names = sorted(self._peers)[:MAX_RECEIVERS]
        own, data = self._seal(PART, 0, payload, [self._peers[name] for name in names], _LASTING, self._names.bodies)
        self._parts[id] = own
        self._connection.publish(self._names.bodies.head(id), data)
        return frozenset(names)

    def _free_part(self, id: str) -> None:
        with suppress(WireError):
            self._connection.purge(self._names.bodies, self._names.bodies.head(id), _CLOSING)
            self._connection.purge(self._names.bodies, self._names.bodies.chunks(self._parts.pop(id)), _CLOSING)

    def _give_part(self, envelope: Envelope) -> None:
        """What a member asks for while it makes itself ready; the time that it takes is nobody's."""
        began, header = self.clock.now(), envelope.header
        if envelope.inline is None:
            raise MessageError(f"{header.sender} asks for a part of a file in {header.size} bytes.")
        self._files.answer(self._job.name, header.sender, envelope.decrypt(0, envelope.inline))
        for owed in self._owed.values():
            owed.expires += self.clock.now() - began

    def abandon(self) -> None:
        """Waits no longer; answers that come are late."""
        for sequence, owed in self._owed.items():
            self._end(owed.client, sequence, Over.abandoned(owed.request))
        self._owed.clear()
        self._arrived.clear()
        self._given = None

    def close(self) -> None:
        """Ends the connection. Members stay where they are."""
        if self._is_closed:
            return
        self._is_closed = True
        self.abandon()
        self._files.close()
        self._traffic.write(self.dropped, at_once=True)
        self._drop(self._bodies)
        self._connection.close()

    def _listen(self) -> None:
        """Waits until something arrives or a member is late."""
        soonest = min(owed.expires for owed in self._owed.values())
        # The clock may be another than the machine's, so it is looked at now and then.
        delivery = self._inbox.next(min(_LOOK, max(0.0, soonest - self.clock.now())))
        if delivery is not None:
            began = self.clock.now()
            answer = self._take(delivery)
            self._do_not_charge(began)
            if answer is not None:
                self._arrived.append(answer)
        if time.monotonic() >= self._followed + _FOLLOW:
            with suppress(WireError):
                self._follow()
        now = self.clock.now()
        if not self._connection.is_connected and any(owed.expires <= now for owed in self._owed.values()):
            raise Unreachable("A deadline passed while the broker was away. The round is played again when it is back.")
        for sequence in [sequence for sequence, owed in self._owed.items() if owed.expires <= now]:
            owed = self._owed.pop(sequence)
            if not any(other.client == owed.client and earlier < sequence for earlier, other in self._owed.items()):
                self._end(owed.client, sequence, Over.deadline(owed.request))
            self._arrived.append(Failure(owed.client, "deadline", "it did not answer in time."))
            self._traffic.answered(owed.client, owed.request.verb, owed.request.round, failure="deadline: it did not answer in time.")

    def _do_not_charge(self, began: float) -> None:
        """Members do not pay for the time that the coordinator has spent on another's answer: its transfer, and what was done with it."""
        spent = self.clock.now() - began
        for owed in self._owed.values():
            owed.expires += spent

    def _take(self, delivery: Delivery) -> Answer | None:
        """The answer in a message; ``None`` where it is none that is waited for."""
        answer, header = None, None
        try:
            # Nobody has this name: what was on its way when its sender was revoked.
            sender = self._members.get(delivery.branch, "")
            envelope = self._opener.read(delivery.data, sender=sender, max_bytes=self._max_bytes)
            header = envelope.header
            owed = None if header.kind == ASK else self._expected(header)
            if header.kind == ASK and header.job == self._job.name:
                self._give_part(envelope)
            if owed is not None:
                answer = self._answer(envelope, delivery.branch, owed)
                failure = f"{answer.stage}: {answer.reason}" if isinstance(answer, Failure) else ""
                self._traffic.answered(owed.client, owed.request.verb, owed.request.round, header.size, failure)
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
        """What a member answers; a failure where that is of no use. The tensors of a long answer are read when they are used."""
        store = Stored(self._connection, branch)
        try:
            if envelope.num_chunks > 1:
                message = unpack_from(Spool(envelope, store, self._folder), self._max_bytes, self._max_tensors)
            else:
                message = unpack(memoryview(receive_all(envelope, store)), self._max_bytes, self._max_tensors)
            return self._checked(message, owed)
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

"""A member's house: it waits for what its coordinator asks, works on the owner's own data, and answers.

::

    <folder>/
      membership.json         where the broker is, who the member is, who the coordinator is; and its keys (fedfm.silos.membership)
      window                  which messages were worked on
      paused, left            since when its owner has paused it; that it left the consortium
      prepared/               the owner's rows as the models read them; can be made again
      clients/<member>/       the owner's log, questions, and what was spent, over all runs
      jobs/<job>/             a run: its greeting, and what the member remembers of it
      models/<digest>/        bases that the coordinator gave

A message is acknowledged when its answer is stored at the broker. A member that is killed before finds the message again when it is back, starts from
what the coordinator counted last, and gives the same answer; of two answers to one question the coordinator takes one. While the broker is away the
member waits for it, and says so. A member that comes back after a deadline works on nothing that is over, and writes into the owner's log what it missed.

Covered here: messages that are not the coordinator's, not for this member, not new, or of another version; a plan that the owner's policy refuses, before a
model or data is read; another base than the coordinator's. Not covered: what the allowed answers reveal; work for two runs at a time (they are done one after the
other).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm import notation
from fedfm.client import pause
from fedfm.client.log import OwnerLog
from fedfm.client.plan import ClientPlan
from fedfm.client.policy import Policy
from fedfm.client.verb import verbs
from fedfm.core import disk, words
from fedfm.core.errors import ColumnError, ConfigError, FedfmError, MessageError, ModelError, PolicyError, RunError, WireError
from fedfm.core.keys import Key
from fedfm.core.messages import Body, Failure, Request, pack_parts, unpack
from fedfm.core.version import VERSION as RELEASE
from fedfm.engines.nats import ACK_WAIT, BODY, BODY_ID, HELLO, REPLY, REQUEST, TALK
from fedfm.engines.over import OVER, Over, over_id
from fedfm.models.files import FileSets, ModelFile, read_sets
from fedfm.models.store import Fetch, ModelStore
from fedfm.service.furnish import Base, Furniture, furnish
from fedfm.service.home import PREPARED, alone, has_left
from fedfm.service.presence import Voice, Word
from fedfm.service.waiting import Watch, connected
from fedfm.silos.membership import Membership
from fedfm.wire.envelope import Envelope, Header, Opener, seal
from fedfm.wire.parts import Fetcher
from fedfm.wire.refusal import Refused, reason
from fedfm.wire.stored import Stored
from fedfm.wire.transfer import receive_all, send
from fedfm.wire.window import Window

if TYPE_CHECKING:
    from fedfm.client.house import House
    from fedfm.client.runtime import Runtime
    from fedfm.core.session import Answer
    from fedfm.wire.nats import Connection, Delivery

log = logging.getLogger(__name__)
# Runs whose models are held at a time, and bytes of a greeting.
_HELD, _MAX_HELLO = 2, 2 << 20
# Seconds: between two looks at whether to stop, between two words to the broker that work goes on, that an answer waits for the broker,
# and that the broker is asked to note that a message is done.
_LOOK, _BEAT, _PATIENCE, _ACKNOWLEDGED = 0.5, ACK_WAIT / 4, 3600.0, 6.0
# A message of at most a few kilobytes.
_MAX_NOTE = 1 << 14


@dataclass(frozen=True)
class Greeting:
    """What a coordinator says of a run, checked field by field.

    Args:
        plan: What a client is told of the federation.
        base: Digest of the base's weights.
        files: The files of the base.
        labels: Class names.
        key: The run's root key.
        choices: What was chosen for the whole run.
        num_clients: How many clients the federation has.
        cohort_size: How many a usual round asks.
        num_rounds: How many rounds are planned.
        run: The run's name.
        data_rules: How rows become examples.
    """

    plan: ClientPlan
    base: str
    files: FileSets
    labels: tuple[str, ...]
    key: Key
    choices: Mapping[str, int]
    num_clients: int
    cohort_size: int
    num_rounds: int
    run: str
    data_rules: Mapping[str, Any]

    @staticmethod
    def of(hello: Mapping[str, Any]) -> Greeting:
        """The greeting in a message's metadata.

        Raises:
            MessageError: if it is of another version, which is named with ours, or no greeting.
        """
        if hello.get("talk") != TALK:
            theirs = f"{hello.get('talk')!r:.20} (fedfm {hello.get('release')!r:.20})"
            raise MessageError(
                f"The coordinator speaks version {theirs}, and this member speaks version {TALK} (fedfm {RELEASE}). Install the same version on both sides."
            )
        try:
            labels, choices, rules = (json.loads(hello[name]) for name in ("labels", "choices", "data_rules"))
            if not all(isinstance(label, str) for label in labels):
                raise ValueError("a label is no text")
            if not all(isinstance(value, int) for value in choices.values()):
                raise ValueError("a choice is no number")
            key, plan = Key(bytes.fromhex(hello["key"])), notation.build(ClientPlan, hello["plan"], "plan")
            return Greeting(
                plan=plan,
                base=str(hello["base"]),
                files=read_sets(str(hello["files"])),
                labels=tuple(labels),
                key=key,
                choices=dict(choices),
                num_clients=int(hello["num_clients"]),
                cohort_size=int(hello["cohort_size"]),
                num_rounds=int(hello["num_rounds"]),
                run=str(hello["run"]),
                data_rules=dict(rules),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError, ConfigError) as error:
            raise MessageError(f"The coordinator's greeting cannot be read: {str(error)[:200] or type(error).__name__}.") from error


class Member:
    """One owner's side of all runs of a consortium.

    Args:
        membership: Which consortium it belongs to; what it keeps lies in the same folder.
        data: The owner's own rows.
        policy: What the owner lets happen; ``None`` for the strictest default.
        test: The owner's own test rows; ``None`` holds out some of ``data``.
        device: Where the model runs.
        models: A folder with bases of the owner's own, where files are looked for too.

    Raises:
        ConfigError: if its keys are missing or damaged, or others can read them.
    """

    def __init__(
        self,
        membership: Membership,
        data: str,
        policy: Policy | None = None,
        test: str | None = None,
        device: str = "auto",
        models: Path | None = None,
    ) -> None:
        link, folder = membership.link(), membership.folder
        self._coordinator = membership.coordinator
        self.link, self.folder, self.data, self.test, self.device = link, folder, data, test, device
        self.policy = policy or Policy()
        self.models = ModelStore(folder / "models", models)
        self.name = link.me.name
        self.window = Window(folder / "window", any_job=True)
        self._opener = Opener(link.me, link.peers(), link.consortium)
        # For what has expired: it is not worked on, but its owner is told what it was.
        self._late_opener = Opener(link.me, link.peers(), link.consortium, skew=math.inf)
        self._down = link.names.down(self.name)
        self._log, self._work_now, self._wrong = OwnerLog(folder, self.name), ("", "", 0), ""
        self._runtimes: OrderedDict[str, Runtime] = OrderedDict()
        self._body: tuple[str, Body] | None = None
        self._secret = _secret(folder / "secret")

    def serve(self, stop: threading.Event | None = None) -> None:
        """Answers until ``stop`` is set, through lost connections.

        Raises:
            WireError: if the broker refuses this member.
            RunError: if the member's folder cannot be written.
        """
        stop = stop or threading.Event()
        with alone(self.folder):
            try:
                self._serve(stop)
            finally:
                if has_left(self.folder):
                    with self._noting():
                        self._log.note_leave(datetime.now().astimezone(), self.link.consortium)

    def _serve(self, stop: threading.Event) -> None:
        self._note_pause()
        connection = connected(self.link, stop)
        if connection is None:
            return
        with connection, Voice(self.link, connection, self._word), Watch(self.link, connection):
            log.info("connected to %s as %s", ", ".join(self.link.servers), self.name)
            inbox = connection.inbox([self._down])
            while not stop.is_set() and not has_left(self.folder):
                delivery = inbox.next(_LOOK)
                self._note_pause()
                if delivery is not None:
                    self.take(delivery, connection)

    def _word(self) -> Word:
        """What this member says of itself."""
        since, (run, verb, round) = pause.since(self.folder), self._work_now
        return Word(
            talk=TALK, paused="" if since is None else since.isoformat(), run=run, verb=verb, round=round, dropped=dict(self.window.counts)
        )

    def _note_pause(self) -> None:
        with self._noting():
            self._log.note_pause(datetime.now().astimezone(), pause.since(self.folder))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """A log that cannot be written keeps every answer here, as the guard sees to; it does not end the member."""
        try:
            yield
        except RunError as error:
            if str(error) != self._wrong:
                self._wrong = str(error)
                log.error("%s", error)

    def take(self, delivery: Delivery, connection: Connection) -> None:
        """Works on one message, and acknowledges it when nothing more is to be done about it.

        Raises:
            WireError: if the broker was away for an hour.
            RunError: if the member's folder cannot be written.
        """
        header = self._work(delivery, connection)
        if header is not None:
            self.window.take(header)
        try:
            # A broker that was killed may not remember that it delivered the message, and answers nothing then. It delivers it again, as a replay.
            delivery.acknowledge(_ACKNOWLEDGED)
        except WireError as error:
            log.info("the broker was not told that a message is done: %s", error)

    def _work(self, delivery: Delivery, connection: Connection) -> Header | None:
        """The header of a message whose work is done; ``None`` where the message is dropped, and counted."""
        try:
            envelope = self._opener.read(delivery.data, sender=self._coordinator.name)
        except MessageError as error:
            self.window.count(error)
            log.warning("a message was dropped (%s): %s", reason(error), error)
            if reason(error) == "expired":
                self._note_expired(delivery.data)
            return None
        header = envelope.header
        try:
            self.window.check(header)
        except Refused as error:
            log.info("a message was dropped (%s): %s", error.why, error)
            return None
        try:
            if header.kind not in (HELLO, REQUEST):
                raise MessageError(f"A member takes a greeting or a request; this is a {header.kind}.")
            if header.kind == REQUEST and self._is_over(header, connection):
                return header
            payload = receive_all(envelope, Stored(connection, self._down, patience=_PATIENCE))
            if header.kind == HELLO:
                if len(payload) > _MAX_HELLO:
                    raise MessageError(f"A greeting of {len(payload)} bytes arrived; at most {_MAX_HELLO} are allowed.")
                self._greet(header.job, bytes(payload))
            else:
                with _working(delivery):
                    self._respond(envelope, _request(unpack(memoryview(payload))), connection)
        except MessageError as error:
            self.window.count(error)
            log.warning("a message was dropped (%s): %s", reason(error), error)
            if reason(error) == "late":
                self._note_late(header, Over(header.round, "", "the coordinator has deleted what was asked"))
        return header

    # --- what is over -----------------------------------------------------------------------------------------------------

    def _is_over(self, header: Header, connection: Connection) -> bool:
        """Whether the coordinator waits no more for the answer to a request; then its owner is told."""
        data = connection.get(self._down, self._down.head(over_id(header.job)), _PATIENCE)
        if data is None:
            return False
        note, payload = self._opener.open(data, self._coordinator.name)
        if (note.kind, note.job) != (OVER, header.job):
            raise MessageError("A note that a round is over is about something else.")
        if header.sequence > note.sequence:
            return False
        over = Over.unpack(payload)
        self._note_late(header, over if over.round == header.round else Over(header.round, "", f"round {over.round} is over as well"))
        return True

    def _note_expired(self, data: bytes) -> None:
        """Tells the owner of a request that expired before this member came to it."""
        with suppress(MessageError):
            header = self._late_opener.read(data, sender=self._coordinator.name).header
            if header.kind == REQUEST:
                self._note_late(header, Over(header.round, "", "its deadline passed"))

    def _note_late(self, header: Header, over: Over) -> None:
        late = time.time() - header.expires
        by = f", {words.duration(late)} before this member was ready" if late > 0 else ""
        run, why = self._run_name(header.job), f"{over.why} (the deadline was {_when(header.expires)}{by})"
        with self._noting():
            self._log.add("late", datetime.now().astimezone(), run=run, verb=over.verb or "a request", round=header.round, why=why)
        log.warning("left out of round %d of %s: %s", header.round, run, why)

    def _run_name(self, job: str) -> str:
        """A run's name, as its greeting has it."""
        if job in self._runtimes:
            return words.clean(self._runtimes[job].house.run, 80)
        try:
            return words.clean(_request(unpack((self._home(job) / "hello").read_bytes())).meta["run"], 80)
        except (OSError, MessageError, KeyError):
            return words.clean(job, 80)

    # --- runs -------------------------------------------------------------------------------------------------------------

    def _home(self, job: str) -> Path:
        return self.folder / "jobs" / disk.slug(job)

    def _greet(self, job: str, payload: bytes) -> None:
        """Keeps a greeting for the requests that follow it, also after a restart."""
        path = self._home(job) / "hello"
        if not path.exists() or path.read_bytes() != payload:
            disk.make_folder(path.parent)
            disk.write_atomic(path, payload, private=True)
            self._runtimes.pop(job, None)

    def _fetch_by(self, header: Header, connection: Connection) -> Fetch:
        """How files of a base are fetched while a request waits for them."""
        fetcher = Fetcher(self.link, self._coordinator.name, header, connection, _PATIENCE)

        def fetch(file: ModelFile, path: Path) -> None:
            fetcher.fetch(file.digest, file.size, path)

        return fetch

    def _runtime(self, job: str, request: Request, fetch: Fetch) -> Runtime:
        """The client's side of a run; loads the model and prepares the data where that was not done yet.

        Raises:
            FedfmError: if the greeting, the policy, the data or the model does not allow it.
        """
        if job in self._runtimes:
            self._runtimes.move_to_end(job)
            return self._runtimes[job]
        path = self._home(job) / "hello"
        if not path.exists():
            raise MessageError("this member was not greeted for this run, or no longer has its folder.")
        from fedfm.client.runtime import Runtime

        hello = _request(unpack(path.read_bytes()))
        while len(self._runtimes) >= _HELD:
            self._runtimes.popitem(last=False)
        runtime = Runtime(self._house(job, Greeting.of(hello.meta), request, fetch))
        if not runtime.house.lacks_classes:
            # The model is loaded now, so that a failure to load is a failure to start, not one of the first round.
            runtime.house.bank  # noqa: B018
        self._runtimes[job] = runtime
        return runtime

    def _house(self, job: str, greeting: Greeting, request: Request, fetch: Fetch) -> House:
        house = self._empty(job, greeting)
        self._admit(house, request)
        try:
            base = Base(greeting.base, greeting.files, self.models, fetch)
            owner = Furniture(self.name, self.data, self.test, self.policy.columns, self.folder / PREPARED)
            furnish(house, owner, greeting.data_rules, base)
        except FedfmError as error:
            guard = house.guard(self.name)
            assert guard is not None
            guard.receive(request)
            guard.refuse(request, Failure(self.name, "start", str(error)), error if isinstance(error, PolicyError) else None)
            raise
        return house

    def _empty(self, job: str, greeting: Greeting) -> House:
        """The house before any data or model is in it."""
        from fedfm.client.house import House
        from fedfm.client.peers import PEERS, Peers

        return House(
            plan=greeting.plan,
            shards={},
            labels=greeting.labels,
            key=greeting.key,
            num_clients=greeting.num_clients,
            cohort_size=greeting.cohort_size,
            num_rounds=greeting.num_rounds,
            device=self.device,
            folder=self._home(job),
            choices=dict(greeting.choices),
            policies={self.name: self.policy},
            records=self.folder,
            coordinator=self._coordinator.fingerprint,
            run=greeting.run,
            identity=self.link.me.sign,
            peers=Peers(self.folder / PEERS),
        )

    def _admit(self, house: House, request: Request) -> None:
        """Holds the plan to the owner's policy before any data or model is read.

        Raises:
            PolicyError: naming the rule that refuses; it is in the owner's log then.
        """
        guard = house.guard(self.name)
        assert guard is not None
        try:
            guard.admit_plan()
        except PolicyError as error:
            guard.receive(request)
            guard.refuse(request, Failure(self.name, error.stage, str(error)), error)
            raise

    # --- requests ---------------------------------------------------------------------------------------------------------

    def _respond(self, envelope: Envelope, own: Request, connection: Connection) -> None:
        """Works, and stores the answer at the broker.

        Raises:
            MessageError: if the body is gone, because nobody waits for the answer any more, or is not the coordinator's.
        """
        header = envelope.header
        body = self._fetch(header, own, connection)
        self._work_now = self._run_name(header.job), own.verb, header.round
        try:
            answer = self._answer(header, Request(body, own.own, own.own_tensors), self._fetch_by(header, connection))
        finally:
            self._work_now = "", "", 0
        if self._is_over(header, connection):
            return
        up = self.link.names.up(self.name).of(header.job)
        reply = Header.now(self.link.consortium, header.job, header.round, header.sequence, REPLY)
        # The secret makes the answer to a question the same transfer after a restart, so that what the broker has is not sent again.
        secret = hashlib.blake2b(header.id.encode(), key=self._secret, digest_size=32).digest()
        sealed = seal(pack_parts(answer), self.link.me, [self._coordinator], reply, secret)
        connection.publish(up.message, send(sealed, Stored(connection, up, patience=_PATIENCE)), patience=_PATIENCE)

    def _answer(self, header: Header, request: Request, fetch: Fetch) -> Answer:
        stage = "start"
        try:
            runtime = self._runtime(header.job, request, fetch)
            stage = request.verb
            self._wait_for_a_person(runtime, request, header.expires)
            (answer,) = runtime.handle({self.name: request})
        except PolicyError as error:
            return Failure(self.name, error.stage, str(error))
        except FedfmError as error:
            log.warning("%s failed: %s", stage, error)
            return Failure(self.name, stage, str(error) if not self.policy.withholds("reasons") or _is_public(error) else _KEPT)
        except Exception as error:
            log.exception("%s failed", stage)
            return Failure(self.name, stage, _KEPT if self.policy.withholds("reasons") else f"{type(error).__name__}: {str(error)[:200]}")
        return answer

    def _wait_for_a_person(self, runtime: Runtime, request: Request, until: float) -> None:
        """Keeps a request until its owner has answered, or nobody waits for it any more.

        Args:
            until: Seconds since 1970.
        """
        house = runtime.house
        guard, verb = house.guard(self.name), verbs().get(request.verb)
        if guard is None or self.policy.ask == "never":
            return
        tells = None if verb is None else verb.tells(request, house)
        if guard.is_waiting(request, tells):
            log.warning("a person is asked about %s: fedfm approve %s", words.clean(house.run, 80), self.folder)
        while guard.is_waiting(request, tells) and time.time() < until:
            time.sleep(_LOOK)

    def _fetch(self, header: Header, own: Request, connection: Connection) -> Body:
        """The body that a request names, from the broker where it is not the one that was used last."""
        id = own.meta.get(BODY_ID)
        if not isinstance(id, str):
            raise MessageError("A request names no body.")
        if self._body is None or self._body[0] != id:
            bodies = self.link.names.bodies
            data = connection.get(bodies, bodies.head(id), _PATIENCE)
            if data is None:
                raise Refused("late", f"The body of a request of round {header.round} is gone; nobody waits for the answer any more.")
            envelope = self._opener.read(data, sender=self._coordinator.name)
            found = envelope.header
            if (found.id, found.kind, found.job, found.round) != (id, BODY, header.job, header.round):
                raise MessageError("The body of a request belongs to something else.")
            payload = receive_all(envelope, Stored(connection, bodies, patience=_PATIENCE))
            self._body = id, _request(unpack(memoryview(payload))).body
        body = self._body[1]
        if (body.verb, body.round) != (own.verb, own.round) or body.round != header.round:
            raise MessageError("A request and its body ask for different things.")
        return body


_KEPT = "its owner's log tells why."


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"


def _is_public(error: FedfmError) -> bool:
    """Whether an error says nothing of the owner's data: versions, digests and names of columns that the coordinator itself sent."""
    return isinstance(error, MessageError | ModelError | ColumnError)


def _request(message: object) -> Request:
    if not isinstance(message, Request):
        raise MessageError(f"A {type(message).__name__} arrived where a request was expected.")
    return message


def _secret(path: Path) -> bytes:
    """32 random bytes that stay with the member.

    Raises:
        RunError: if they cannot be read or written.
    """
    import secrets

    if not path.exists():
        disk.make_folder(path.parent)
        disk.write_atomic(path, secrets.token_bytes(32), private=True)
    data = path.read_bytes()
    if len(data) != 32:
        raise RunError(f"{path} has {len(data)} bytes instead of 32. Delete it: what is on its way is sent once more then.")
    return data


@contextmanager
def _working(delivery: Delivery) -> Iterator[None]:
    """Tells the broker now and then that a message is being worked on, so that it is not delivered again."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT):
            try:
                delivery.working()
            except WireError as error:
                log.info("the broker could not be told that work goes on: %s", error)

    thread = threading.Thread(target=beat, name="fedfm-working", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

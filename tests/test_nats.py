"""A real broker: what is published is there after kill -9, calls outlive lost connections, and a key that is refused is told so."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedfm.core.errors import ConfigError, MissingExtra, WireError

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.testing.broker import Broker, server
from fedfm.wire.envelope import Header, Opener, seal
from fedfm.wire.identity import Identity
from fedfm.wire.nats import Connection, Inbox, mutual_tls
from fedfm.wire.stored import Stored
from fedfm.wire.subjects import Names
from fedfm.wire.transfer import receive, receive_all, send

try:
    server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow
NAMES = Names("c")
COORDINATOR, ALICE, BOB = (Identity.create(name) for name in ("c0", "alice", "bob"))
MEMBERS = {person.name: person for person in (ALICE, BOB)}
USERS = {COORDINATOR.nkey: NAMES.coordinator_rights("c0"), **{person.nkey: NAMES.member_rights(name) for name, person in MEMBERS.items()}}
ID = "0123456789abcdef" * 2


def connect(broker: Broker, person: Identity, **changes) -> Connection:
    options = {"nkey": person.nkey, "tls": broker.tls(), "patience": 15.0, **changes}
    return Connection([broker.url], NAMES.inbox(person.name), **options)


def make_streams(coordinator: Connection) -> None:
    for name in MEMBERS:
        coordinator.make_stream(NAMES.up(name), 1 << 30)
        coordinator.make_consumer(NAMES.up(name))
        coordinator.make_stream(NAMES.down(name), 1 << 30)
        coordinator.make_consumer(NAMES.down(name), ack_wait=1.0)
    coordinator.make_stream(NAMES.bodies, 1 << 30)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker"), USERS) as broker:
        with connect(broker, COORDINATOR) as coordinator:
            make_streams(coordinator)
        yield broker


@pytest.fixture(scope="module")
def coordinator(broker: Broker) -> Iterator[Connection]:
    with connect(broker, COORDINATOR) as connection:
        yield connection


@pytest.fixture(scope="module")
def alice(broker: Broker) -> Iterator[Connection]:
    with connect(broker, ALICE) as connection:
        yield connection


def sealed(payload: bytes, **changes):
    return seal(payload, ALICE, [COORDINATOR.card], replace(Header.now("c", "run-1", 1, 1, "reply"), **changes))


def test_a_message_goes_up_and_one_comes_down(coordinator: Connection, alice: Connection) -> None:
    up, down = NAMES.up("alice"), NAMES.down("alice")
    mine, theirs = alice.inbox([down]), coordinator.inbox([up, NAMES.up("bob")])
    for i in range(3):
        coordinator.publish(down.message, b"request %d" % i)
        request = mine.next(10)
        assert request is not None and request.data == b"request %d" % i and request.times == 1
        alice.publish(up.message, b"reply %d" % i)
        request.acknowledge()
        reply = theirs.next(10)
        assert reply is not None and (reply.branch, reply.data) == (up, b"reply %d" % i)
        reply.acknowledge()
    # What was acknowledged takes no more room.
    assert coordinator.stored(up)[0] == coordinator.stored(down)[0] == 0
    assert mine.next(0.2) is None
    mine.close()
    theirs.close()


def test_what_was_not_acknowledged_is_delivered_again(coordinator: Connection, alice: Connection) -> None:
    down = NAMES.down("alice")
    inbox = alice.inbox([down])
    coordinator.publish(down.message, b"again")
    first = inbox.next(10)
    assert first is not None and first.times == 1
    # Saying that one is at work gives more time; saying nothing does not.
    for _ in range(3):
        time.sleep(0.6)
        first.working()
    assert inbox.next(0.1) is None
    second = inbox.next(10)
    assert second is not None and (second.data, second.times) == (b"again", 2)
    second.acknowledge()
    assert inbox.next(1.5) is None
    inbox.close()


def test_the_same_message_id_is_stored_once(coordinator: Connection, alice: Connection) -> None:
    up = NAMES.up("alice")
    before = coordinator.stored(up)[0]
    for _ in range(3):
        alice.publish(up.chunk(ID, 7), b"x", id="same")
    assert coordinator.stored(up)[0] == before + 1
    coordinator.purge(up, up.chunks(ID))


@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 100_001])
def test_a_payload_passes_whatever_its_length(coordinator: Connection, alice: Connection, size: int) -> None:
    up, payload = NAMES.up("alice"), bytes(i * 37 % 256 for i in range(size))
    store, theirs, inbox = Stored(alice, up, depth=3), Stored(coordinator, up, depth=3), coordinator.inbox([up])
    alice.publish(up.message, send(sealed(payload, chunk=1000), store))
    arrived = inbox.next(10)
    assert arrived is not None
    envelope = Opener(COORDINATOR, {"alice": ALICE.card}, "c").read(arrived.data, sender="alice")
    assert theirs.held(envelope.header.id) == (set(range(envelope.num_chunks)) if size > 1000 else set())
    assert receive_all(envelope, theirs) == payload
    if size > 5000:
        assert b"".join(receive(envelope, theirs, first=3)) == payload[3000:]
    theirs.drop(envelope.header.id)
    assert theirs.held(envelope.header.id) == set() and theirs.get(envelope.header.id, 0) is None
    arrived.acknowledge()
    inbox.close()


def test_a_body_is_stored_once_and_found_by_its_id(coordinator: Connection, alice: Connection, broker: Broker) -> None:
    bodies, payload = NAMES.bodies, bytes(range(256)) * 100
    body = seal(payload, COORDINATOR, [ALICE.card, BOB.card], replace(Header.now("c", "run-1", 1, 1, "body"), chunk=5000))
    coordinator.publish(bodies.head(body.header.id), send(body, Stored(coordinator, bodies)))
    assert coordinator.stored(bodies)[0] == body.num_chunks + 1
    with connect(broker, BOB) as bob:
        for person, connection in ((ALICE, alice), (BOB, bob)):
            head = connection.get(bodies, bodies.head(body.header.id))
            assert head is not None
            envelope = Opener(person, {"c0": COORDINATOR.card}, "c").read(head)
            assert receive_all(envelope, Stored(connection, bodies)) == payload
    coordinator.purge(bodies, bodies.all)


def test_a_full_stream_refuses_and_keeps_what_it_has(coordinator: Connection, alice: Connection) -> None:
    up = NAMES.up("alice")
    coordinator.purge(up, up.all)
    # A limit is raised alone, never lowered, so the stream begins anew.
    coordinator._ask(f"$JS.API.STREAM.DELETE.{up.stream}", {}, None)
    coordinator.make_stream(up, 50_000)
    try:
        with pytest.raises(WireError, match="maximum bytes"):
            send(sealed(bytes(200_000), chunk=10_000), Stored(alice, up))
        assert 1 <= coordinator.stored(up)[0] <= 5
    finally:
        coordinator.make_stream(up, 1 << 30)
        coordinator.make_stream(up, 50_000)
        send(sealed(bytes(200_000), chunk=10_000), Stored(alice, up))
        coordinator.make_consumer(up)
        coordinator.purge(up, up.all)


def test_a_message_that_is_too_long_is_refused_here(alice: Connection) -> None:
    with pytest.raises(WireError, match="max_payload"):
        alice.publish(NAMES.up("alice").message, bytes(2 << 20))


def test_a_member_reaches_nothing_of_anothers(coordinator: Connection, alice: Connection, broker: Broker) -> None:
    up, down = NAMES.up("bob"), NAMES.down("bob")
    coordinator.publish(down.message, b"for bob")
    coordinator.publish(down.chunk(ID, 0), b"for bob")
    before = coordinator.stored(up)
    attempts = [
        lambda: alice.publish(up.message, b"forged"),
        lambda: alice.publish(down.message, b"forged"),
        lambda: alice.publish(NAMES.down("alice").message, b"forged"),
        lambda: alice.publish(NAMES.bodies.head(ID), b"forged"),
        lambda: alice.get(down, down.chunk(ID, 0)),
        lambda: alice.held(down, down.all),
        lambda: alice.make_stream(NAMES.up("alice"), 1 << 40),
        lambda: alice.make_consumer(down),
        lambda: alice.purge(down, down.all),
        lambda: alice.delete_stream(down),
    ]
    for attempt in attempts:
        began = time.monotonic()
        with pytest.raises(WireError, match="does not let this key use"):
            attempt()
        assert time.monotonic() - began < 3
    inbox = Inbox(alice, [down])
    with pytest.raises(WireError, match="does not let this key use"):
        inbox.next(10)
    inbox.close()
    assert coordinator.stored(up) == before and coordinator.get(down, down.chunk(ID, 0)) == b"for bob"
    coordinator.purge(down, down.all)
    # And it goes on as if nothing had been.
    alice.publish(NAMES.up("alice").chunk(ID, 0), b"mine")
    coordinator.purge(NAMES.up("alice"), NAMES.up("alice").all)


@pytest.mark.parametrize(
    ("authority", "certificate", "person", "words"),
    [
        ("ca", "intruder", ALICE, "could not be used|refuses"),
        ("other", "client", ALICE, "could not be used"),
        ("ca", "expired", ALICE, "could not be used|refuses"),
        ("ca", "client", Identity.create("alice"), "refuses this key"),
        ("ca", "client", None, "refuses this key"),
    ],
)
def test_who_is_not_a_member_does_not_get_in(broker: Broker, authority: str, certificate: str, person: Identity | None, words: str) -> None:
    with pytest.raises(WireError, match=words):
        Connection([broker.url], NAMES.inbox("alice"), person and person.nkey, broker.tls(authority, certificate), patience=2.0)


def test_without_tls_nobody_gets_in_and_tls_cannot_be_talked_away(broker: Broker) -> None:
    with pytest.raises(WireError):
        Connection([broker.url], NAMES.inbox("alice"), ALICE.nkey, None, patience=2.0)
    # A man in the middle who offers a plain connection sees a handshake and no login.
    listener, seen = socket.create_server(("127.0.0.1", 0)), b""

    def listen() -> None:
        nonlocal seen
        client, _ = listener.accept()
        with client:
            client.settimeout(2.0)
            client.sendall(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"auth_required":true,"nonce":"abc"}\r\n')
            try:
                while data := client.recv(4096):
                    seen += data
            except OSError:
                pass

    thread = threading.Thread(target=listen)
    thread.start()
    with pytest.raises(WireError), listener:
        Connection([f"nats://127.0.0.1:{listener.getsockname()[1]}"], NAMES.inbox("alice"), ALICE.nkey, broker.tls(), patience=1.0)
    thread.join()
    assert seen and b"CONNECT" not in seen and ALICE.nkey.public.encode() not in seen


def test_keys_that_do_not_fit_are_named(broker: Broker) -> None:
    with pytest.raises(ConfigError, match=r"intruder\.key"):
        mutual_tls(broker.folder / "ca.pem", broker.folder / "client.pem", broker.folder / "intruder.key")
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        mutual_tls(broker.folder / "absent.pem", broker.folder / "client.pem", broker.folder / "client.key")


def test_a_broker_that_is_not_there_is_named_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(WireError, match=r"127\.0\.0\.1:9 could not be used"):
        Connection(["nats://127.0.0.1:9"], "_INBOX.x", patience=1.0)
    assert time.monotonic() - began < 5


def test_kill_9_of_the_broker_in_the_middle_of_a_transfer(tmp_path: Path) -> None:
    """Calls that were cut are made again; what was acknowledged is there; nothing is counted twice."""
    payload = bytes(range(256)) * 40_000
    with (
        Broker(tmp_path, USERS, sync_interval="always") as broker,
        connect(broker, COORDINATOR) as coordinator,
        connect(broker, ALICE) as alice,
    ):
        make_streams(coordinator)
        up = NAMES.up("alice")
        inbox, store = coordinator.inbox([up]), Stored(alice, up, depth=4)
        sending = sealed(payload, chunk=50_000)

        def restart() -> None:
            time.sleep(0.15)
            broker.kill()
            time.sleep(0.5)
            broker.start()

        for _ in range(2):
            thread = threading.Thread(target=restart)
            thread.start()
            head = send(sending, store)
            alice.publish(up.message, head, id=sending.header.id)
            thread.join()
        assert alice.reconnects >= 1
        arrived = inbox.next(30)
        assert arrived is not None
        envelope = Opener(COORDINATOR, {"alice": ALICE.card}, "c").read(arrived.data, sender="alice")
        thread = threading.Thread(target=restart)
        thread.start()
        assert hashlib.sha256(receive_all(envelope, Stored(coordinator, up))).digest() == hashlib.sha256(payload).digest()
        thread.join()
        arrived.acknowledge(patience=30)
        assert coordinator.reconnects >= 1


def test_a_member_that_is_revoked_is_told_and_one_that_is_taken_back_goes_on(tmp_path: Path) -> None:
    with Broker(tmp_path, USERS) as broker, connect(broker, COORDINATOR) as coordinator, connect(broker, ALICE) as alice:
        make_streams(coordinator)
        up = NAMES.up("alice")
        alice.publish(up.message, b"one")
        broker.change({nkey: rights for nkey, rights in USERS.items() if nkey != ALICE.nkey})
        with pytest.raises(WireError, match=r"refuses this key.*revoked"):
            for _ in range(100):
                alice.publish(up.message, b"two")
                time.sleep(0.05)
        with connect(broker, BOB) as bob:
            bob.publish(NAMES.up("bob").message, b"still here")
        before = coordinator.stored(up)[0]
        broker.change(USERS)
        until = time.monotonic() + 15
        while True:
            try:
                alice.publish(up.message, b"three")
                break
            except WireError:
                assert time.monotonic() < until
                time.sleep(0.2)
        assert coordinator.stored(up)[0] == before + 1


def test_a_call_that_waits_ends_when_the_connection_is_closed(broker: Broker) -> None:
    connection = connect(broker, ALICE)
    inbox = connection.inbox([NAMES.down("alice")])
    assert inbox.next(0.1) is None
    threading.Timer(0.2, connection.close).start()
    with pytest.raises(WireError, match="closed"):
        inbox.next(30)
    connection.close()
    with pytest.raises(WireError, match="closed"):
        connection.publish(NAMES.up("alice").message, b"x")

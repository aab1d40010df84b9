"""The real broker lets in whom it should, to what it should, and nobody else to anything else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography.hazmat.primitives.hpke", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")

from cryptography import x509
from cryptography.hazmat.primitives import hashes

import fedfm as fedfm_package
from fedfm.core.errors import ConfigError, MissingExtra, RunError, WireError
from fedfm.silos import certificates
from fedfm.silos.authority import Authority
from fedfm.silos.broker import Broker, User, find_server
from fedfm.silos.certificates import Holder, key_pem, new_key
from fedfm.silos.consortium import COORDINATOR, Consortium, Settings
from fedfm.silos.enrol import Declined, Desk, Entering, Reception, enter
from fedfm.silos.invitation import Invitation
from fedfm.silos.membership import CLIENT, Membership
from fedfm.wire.identity import Identity
from fedfm.wire.nats import Connection, Inbox

try:
    find_server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

DAY = timedelta(days=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class World:
    """A consortium with its broker, and a coordinator that answers requests to enter."""

    folder: Path
    consortium: Consortium
    connection: Connection
    desk: Desk
    stop: threading.Event = field(default_factory=threading.Event)
    members: dict[str, Membership] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return self.consortium.broker.settings.port

    def serve(self) -> None:
        reception = Reception(self.desk, self.connection)
        inbox = Inbox(self.connection, [reception.branch])
        while not self.stop.is_set():
            delivery = inbox.next(0.05)
            if delivery is not None:
                reception.take(delivery)
        inbox.close()

    def join(self, name: str) -> Membership:
        """A new member, over the broker; and its streams, as a coordinator makes them."""
        invitation = self.consortium.invite(name, certificates.now())
        member = enter(invitation, self.folder / "members" / name, patience=20)
        self.members[name] = member
        for branch in (self.consortium.names.up(name), self.consortium.names.down(name)):
            self.connection.make_stream(branch, 1 << 20)
            self.connection.make_consumer(branch)
        return member

    def connect(self, member: Membership, patience: float = 10.0) -> Connection:
        return Connection(member.urls, member.names.inbox(member.member), tls=member.context(), patience=patience)

    def line(self, context: ssl.SSLContext | None, **connect: Any) -> Line:
        return Line(self.port, context, connect)


class Line:
    """NATS spoken by hand, so that a test says exactly what a bad client says, and sees exactly what it hears."""

    def __init__(self, port: int, context: ssl.SSLContext | None, connect: dict[str, Any]) -> None:
        plain = socket.create_connection(("127.0.0.1", port), timeout=5)
        try:
            self.socket = plain if context is None else context.wrap_socket(plain, server_hostname="127.0.0.1")
            self.file = self.socket.makefile("rb")
            options = {
                "verbose": False,
                "pedantic": False,
                "lang": "test",
                "version": "1",
                "protocol": 1,
                "headers": True,
                "no_responders": True,
            }
            self.socket.sendall(b"CONNECT " + json.dumps({**options, **connect}).encode() + b"\r\n")
            self.info = self.file.readline()
            heard = self.say()
        except BaseException:
            for one in (getattr(self, "file", None), getattr(self, "socket", None), plain):
                if one is not None:
                    one.close()
            raise
        if "PONG" not in heard:
            self.close()
            raise ConnectionError(heard)

    def say(self, *lines: bytes) -> str:
        """Sends lines, and answers what is heard until the broker has taken them all."""
        self.socket.sendall(b"".join(line + b"\r\n" for line in (*lines, b"PING")))
        heard: list[str] = []
        while not (heard and heard[-1].startswith("PONG")):
            line = self.file.readline()
            if not line:
                break
            heard.append(line.decode(errors="replace"))
        return "".join(heard)

    def publish(self, subject: str, data: bytes = b"{}", reply: str = "") -> str:
        return self.say(f"PUB {subject} {reply} {len(data)}".replace("  ", " ").encode(), data)

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def delivered(heard: str) -> bool:
    """Whether a message came."""
    return any(line.startswith(("MSG ", "HMSG ")) for line in heard.splitlines())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("silos")
    port = free_port()
    settings = Settings("north", (f"tls://127.0.0.1:{port}",), f"127.0.0.1:{port}")
    consortium = Consortium.create(folder / "north", settings, certificates.now())
    consortium.broker.start()
    inbox = consortium.names.inbox(COORDINATOR)
    connection = Connection(settings.urls, inbox, tls=consortium.context(), patience=10)
    world = World(folder, consortium, connection, Desk(consortium))
    thread = threading.Thread(target=world.serve)
    thread.start()
    try:
        connection.make_stream(consortium.names.bodies, 1 << 20)
        for name in ("alice", "bob"):
            world.join(name)
        yield world
    finally:
        world.stop.set()
        thread.join(10)
        connection.close()
        consortium.broker.stop()


# --- what works -----------------------------------------------------------------------------------------------------


def test_a_member_that_was_invited_enters_and_connects_with_its_own_key(world: World) -> None:
    alice, names = world.members["alice"], world.consortium.names
    with world.connect(alice) as line:
        line.publish(names.up("alice").message, b"hello")
    held = world.connection.get(names.up("alice"), names.up("alice").message)
    assert held == b"hello"
    row = next(row for row in world.consortium.members().table(certificates.now()) if row["member"] == "alice")
    assert row["state"] == "member" and row["keys"] == alice.identity.card.short


def test_a_member_reads_what_it_is_sent_and_what_all_are_sent(world: World) -> None:
    names, id = world.consortium.names, "0" * 32
    body = f"{names.bodies.root}.{id}.message"
    world.connection.publish(body, b"to all")
    world.connection.publish(names.down("alice").message, b"to alice")
    with world.connect(world.members["alice"]) as line:
        assert line.get(names.bodies, body) == b"to all"
        inbox = Inbox(line, [names.down("alice")])
        delivery = inbox.next(5)
        assert delivery is not None and delivery.data == b"to alice"
        delivery.acknowledge()
        inbox.close()


def test_nothing_secret_of_the_member_reaches_the_coordinator_or_the_broker(world: World) -> None:
    """The request, opened with the coordinator's own keys, holds no private key; nor does any file of the coordinator."""
    invitation = world.consortium.invite("zoe", certificates.now())
    entering = Entering.begin(invitation, world.folder / "members" / "zoe")
    _, asked, _ = world.desk._read(entering.ask(certificates.now()), certificates.now())
    identity = entering.identity
    text = json.dumps(asked)
    assert "PRIVATE KEY" not in text and asked.keys() == {"invitation", "token", "request"}
    secrets = [identity.sign, identity.x25519, identity.mlkem, key_pem(entering.key)]
    written = [path.read_bytes() for path in world.consortium.folder.rglob("*") if path.is_file()]
    alice = (world.members["alice"].folder / CLIENT).read_bytes().partition(b"-----BEGIN CERTIFICATE")[0]
    assert b"PRIVATE KEY" in alice
    assert not any(secret in data for secret in [*secrets, alice] for data in written)
    # The token neither: the coordinator keeps its digest.
    assert not any(invitation.token in data or asked["token"].encode() in data for data in written)


# --- who does not get in --------------------------------------------------------------------------------------------


def client(world: World, folder: Path, pem: str | bytes, key: Any) -> ssl.SSLContext:
    """A client of the true authority with this certificate."""
    return trusting(world.consortium.authority.pem, folder, pem, key)


def trusting(authority: str, folder: Path, pem: str | bytes, key: Any) -> ssl.SSLContext:
    path = folder / "bad.pem"
    path.write_bytes(key_pem(key) + (pem if isinstance(pem, bytes) else pem.encode()))
    path.chmod(0o600)
    context = ssl.create_default_context(cadata=authority)
    context.load_cert_chain(path)
    return context


def issued(world: World, folder: Path, role: str, name: str, when: datetime, is_known: bool = True) -> ssl.SSLContext:
    """A certificate of the true authority.

    Args:
        is_known: Whether the broker is told of it, so that it can be refused for its dates alone.
    """
    key = new_key()
    made = world.consortium.authority.client(role, name, key.public_key(), when, DAY)
    if is_known:
        known = User(Holder("north", role, name, made.serial).uri, world.consortium.names.member_rights(name), f"north_member_{name}")
        world.consortium.broker.configure([*world.consortium.users(world.consortium.members(), certificates.now()), known])
    return client(world, folder, made.pem, key)


def named(
    world: World, folder: Path, sign: Callable[[x509.CertificateBuilder, Any], x509.Certificate], authority: str = ""
) -> ssl.SSLContext:
    """A certificate that names alice as hers does, signed by somebody else."""
    key, alice = new_key(), certificates.certificate((world.members["alice"].folder / CLIENT).read_bytes())
    now = certificates.now()
    builder = x509.CertificateBuilder(
        certificates.subject(authority, "north") if authority else world.consortium.authority.certificate.subject,
        alice.subject,
        key.public_key(),
        alice.serial_number,
        now - DAY,
        now + DAY,
    )
    for extension in alice.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    from cryptography.hazmat.primitives import serialization

    return client(world, folder, sign(builder, key).public_bytes(serialization.Encoding.PEM), key)


def another_authority(world: World, folder: Path) -> ssl.SSLContext:
    other = Authority.create(folder / "other", "north", certificates.now())
    return named(world, folder, lambda builder, key: builder.sign(other.key, hashes.SHA256()))


def self_signed(world: World, folder: Path) -> ssl.SSLContext:
    return named(world, folder, lambda builder, key: builder.sign(key, hashes.SHA256()), "alice")


def signed_by_a_member(world: World, folder: Path) -> ssl.SSLContext:
    bob = certificates.load_key(world.members["bob"].folder / CLIENT)
    return named(world, folder, lambda builder, key: builder.sign(bob, hashes.SHA256()), "bob")


def without_certificate(world: World, folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=world.consortium.authority.pem)


def expired(world: World, folder: Path) -> ssl.SSLContext:
    return issued(world, folder, "member", "alice", certificates.now() - 3 * DAY)


def not_yet_valid(world: World, folder: Path) -> ssl.SSLContext:
    return issued(world, folder, "member", "alice", certificates.now() + DAY)


def not_in_the_roster(world: World, folder: Path) -> ssl.SSLContext:
    """The authority signed it for alice, but it is not the certificate that the roster names: an earlier one, for instance."""
    return issued(world, folder, "member", "alice", certificates.now(), is_known=False)


def second_coordinator(world: World, folder: Path) -> ssl.SSLContext:
    return issued(world, folder, "coordinator", COORDINATOR, certificates.now(), is_known=False)


def the_brokers_own(world: World, folder: Path) -> ssl.SSLContext:
    broker = world.consortium.folder / "broker"
    context = ssl.create_default_context(cadata=world.consortium.authority.pem)
    context.load_cert_chain(broker / "server.pem", broker / "server.key")
    return context


def revoked(world: World, folder: Path) -> ssl.SSLContext:
    if "mallory" not in world.members:
        mallory = world.join("mallory")
        with world.line(mallory.context()):
            pass
        world.consortium.revoke("mallory", certificates.now())
    return world.members["mallory"].context()


def withdrawn_invitation(world: World, folder: Path) -> ssl.SSLContext:
    invitation = world.consortium.invite("late", certificates.now())
    world.consortium.revoke("late", certificates.now())
    return bootstrap(world, folder, invitation)


def superseded_invitation(world: World, folder: Path) -> ssl.SSLContext:
    first = world.consortium.invite("late", certificates.now())
    world.consortium.invite("late", certificates.now())
    return bootstrap(world, folder, first)


def expired_invitation(world: World, folder: Path) -> ssl.SSLContext:
    return bootstrap(world, folder, world.consortium.invite("late", certificates.now() - 8 * DAY))


def bootstrap(world: World, folder: Path, invitation: Invitation) -> ssl.SSLContext:
    return client_of(folder, invitation)


def client_of(folder: Path, invitation: Invitation) -> ssl.SSLContext:
    return trusting(invitation.authority, folder, invitation.certificate, certificates.parse_key(invitation.key.encode(), "the invitation"))


def limited(version: ssl.TLSVersion) -> Callable[[World, Path], ssl.SSLContext]:
    def make(world: World, folder: Path) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=world.consortium.authority.pem)
        context.load_cert_chain(world.members["alice"].folder / CLIENT)
        # OpenSSL speaks the old versions only at its lowest level of security; Python warns of them.
        context.set_ciphers("ALL:@SECLEVEL=0")
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
        return context

    return make


UNSIGNED = "certificate signed by unknown authority"
DATES = "certificate has expired or is not yet valid"
NOBODY = "authentication error"
VERSIONS = "client offered only unsupported versions"
OUTSIDE: dict[str, tuple[Callable[[World, Path], ssl.SSLContext], str]] = {
    "another authority of the same name": (another_authority, UNSIGNED),
    "self-signed": (self_signed, UNSIGNED),
    "signed by a member": (signed_by_a_member, UNSIGNED),
    "no certificate": (without_certificate, "client didn't provide a certificate"),
    "expired certificate": (expired, DATES),
    "certificate that is not yet valid": (not_yet_valid, DATES),
    "certificate that the roster does not name": (not_in_the_roster, NOBODY),
    "second coordinator": (second_coordinator, NOBODY),
    "the broker's own certificate": (the_brokers_own, "incompatible key usage"),
    "revoked member": (revoked, NOBODY),
    "withdrawn invitation": (withdrawn_invitation, NOBODY),
    "superseded invitation": (superseded_invitation, NOBODY),
    "expired invitation": (expired_invitation, DATES),
    "TLS 1.0": (limited(ssl.TLSVersion.TLSv1), VERSIONS),
    "TLS 1.1": (limited(ssl.TLSVersion.TLSv1_1), VERSIONS),
    "TLS 1.2": (limited(ssl.TLSVersion.TLSv1_2), VERSIONS),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_these_do_not_get_in(case: str, world: World, tmp_path: Path) -> None:
    make, why = OUTSIDE[case]
    context = make(world, tmp_path)
    broker = world.consortium.broker
    begin = broker._log_size()
    with pytest.raises((ssl.SSLError, ConnectionError)):
        world.line(context)
    # For this reason, in the broker's own words, and for no other.
    end = time.monotonic() + 5
    while why not in broker._log(begin) and time.monotonic() < end:
        time.sleep(0.01)
    assert why in broker._log(begin)
    world.consortium.apply(certificates.now())


def test_the_harness_gets_in_with_the_right_certificate(world: World, tmp_path: Path) -> None:
    """Without this, the cases above could pass because nothing ever connects."""
    with world.line(world.members["alice"].context()) as line:
        assert b"INFO" in line.info
    modern = ssl.create_default_context(cadata=world.consortium.authority.pem)
    modern.load_cert_chain(world.members["alice"].folder / CLIENT)
    with world.line(modern) as line:
        assert line.socket.version() == "TLSv1.3"  # type: ignore[union-attr]


def test_without_tls_the_broker_says_nothing_at_all(world: World) -> None:
    with socket.create_connection(("127.0.0.1", world.port), timeout=10) as plain:
        plain.sendall(b'CONNECT {"verbose":true}\r\nPING\r\n')
        heard = plain.recv(4096)
        # A TLS alert at most, and no word of NATS.
        assert b"INFO" not in heard and b"PONG" not in heard and b"+OK" not in heard


def test_a_member_does_not_talk_to_a_broker_without_tls_or_of_another_authority(world: World, tmp_path: Path) -> None:
    """Somebody on the way who answers in the broker's place gets no word of the member."""
    for kind in ("plain", "member as broker"):
        heard: list[bytes] = []
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=pretend, args=(server, world if kind != "plain" else None, heard))
            thread.start()
            port = server.getsockname()[1]
            with pytest.raises((WireError, ssl.SSLError)):
                Connection([f"tls://127.0.0.1:{port}"], "_INBOX.north.alice", tls=world.members["alice"].context(), patience=1.0)
        thread.join(10)
        assert not any(b"CONNECT" in data for data in heard), kind


def pretend(server: socket.socket, world: World | None, heard: list[bytes]) -> None:
    """A broker of somebody on the way: in plain text, or with a member's certificate."""
    server.settimeout(3)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            line, _ = server.accept()
            line.settimeout(1)
            if world is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(world.members["bob"].folder / CLIENT)
                line = context.wrap_socket(line, server_side=True)
            else:
                line.sendall(
                    b'INFO {"server_id":"X","version":"2.15.1","proto":1,"max_payload":1048576,"headers":true,"auth_required":true}\r\n'
                )
            heard.append(line.recv(4096))
        except OSError:
            continue
        finally:
            line.close()
        return


# --- what they may not do who are in ---------------------------------------------------------------------------------

HEX = "0" * 32
PUBLISH = {
    "another member's answers": "fed.north.up.bob.message",
    "another member's chunks": f"fed.north.up.bob.chunk.{HEX}.0",
    "a request to another member (start a run)": "fed.north.down.bob.message",
    "a request to itself": "fed.north.down.alice.message",
    "a body": f"fed.north.body.{HEX}.message",
    "a request to enter": f"fed.north.enrol.{HEX}.ask",
    "an answer to a request to enter": f"fed.north.enrol.{HEX}.answer",
    "another consortium": "fed.south.up.alice.message",
    "another member's inbox": "_INBOX.north.bob.x",
    "the coordinator's inbox": f"_INBOX.north.{COORDINATOR}.x",
    "read another's stream": "$JS.API.STREAM.MSG.GET.fed_north_DOWN_bob",
    "read another's answers": "$JS.API.STREAM.MSG.GET.fed_north_UP_bob",
    "read requests to enter": "$JS.API.STREAM.MSG.GET.fed_north_ENROL",
    "read another's stream directly": "$JS.API.DIRECT.GET.fed_north_DOWN_bob",
    "read another's subject directly": "$JS.API.DIRECT.GET.fed_north_DOWN_bob.fed.north.down.bob.message",
    "read another's answer directly": "$JS.API.DIRECT.GET.fed_north_UP_bob.fed.north.up.bob.message",
    "read an enrolment directly": f"$JS.API.DIRECT.GET.fed_north_ENROL.fed.north.enrol.{HEX}.ask",
    "own right to read, with another's subject": "$JS.API.DIRECT.GET.fed_north_DOWN_alice.fed.north.down.bob.message",
    "consumer of another's stream": "$JS.API.CONSUMER.CREATE.fed_north_DOWN_bob",
    "named consumer of another's stream": "$JS.API.CONSUMER.CREATE.fed_north_DOWN_bob.spy.fed.north.down.bob.>",
    "durable consumer of another's stream": "$JS.API.CONSUMER.DURABLE.CREATE.fed_north_DOWN_bob.spy",
    "consumer of its own stream": "$JS.API.CONSUMER.DURABLE.CREATE.fed_north_DOWN_alice.mine",
    "consumer of all bodies": "$JS.API.CONSUMER.CREATE.fed_north_BODY.spy",
    "next message of another": "$JS.API.CONSUMER.MSG.NEXT.fed_north_DOWN_bob.inbox",
    "next answer of another": "$JS.API.CONSUMER.MSG.NEXT.fed_north_UP_bob.inbox",
    "acknowledge for another": "$JS.ACK.fed_north_DOWN_bob.inbox.1.1.1.1.0",
    "acknowledge for the coordinator": "$JS.ACK.fed_north_UP_alice.inbox.1.1.1.1.0",
    "delete another's consumer": "$JS.API.CONSUMER.DELETE.fed_north_DOWN_bob.inbox",
    "delete its own consumer": "$JS.API.CONSUMER.DELETE.fed_north_DOWN_alice.inbox",
    "pause a consumer": "$JS.API.CONSUMER.PAUSE.fed_north_DOWN_bob.inbox",
    "list consumers": "$JS.API.CONSUMER.LIST.fed_north_DOWN_bob",
    "create a stream": "$JS.API.STREAM.CREATE.mine",
    "change a stream": "$JS.API.STREAM.UPDATE.fed_north_UP_bob",
    "delete a stream": "$JS.API.STREAM.DELETE.fed_north_UP_bob",
    "delete its own stream": "$JS.API.STREAM.DELETE.fed_north_UP_alice",
    "purge a stream": "$JS.API.STREAM.PURGE.fed_north_UP_bob",
    "purge its own stream": "$JS.API.STREAM.PURGE.fed_north_DOWN_alice",
    "delete a message": "$JS.API.STREAM.MSG.DELETE.fed_north_UP_bob",
    "copy a stream": "$JS.API.STREAM.SNAPSHOT.fed_north_UP_bob",
    "restore a stream": "$JS.API.STREAM.RESTORE.fed_north_UP_bob",
    "list streams": "$JS.API.STREAM.LIST",
    "names of streams": "$JS.API.STREAM.NAMES",
    "look into another's stream": "$JS.API.STREAM.INFO.fed_north_UP_bob",
    "account": "$JS.API.INFO",
    "servers": "$SYS.REQ.SERVER.PING",
    "connections": "$SYS.REQ.SERVER.PING.CONNZ",
    "accounts": "$SYS.REQ.ACCOUNT.PING.CONNZ",
    "reload": "$SYS.REQ.SERVER.X.RELOAD",
}
SUBSCRIBE = {
    "another member's requests": "fed.north.down.bob.>",
    "another member's answers": "fed.north.up.bob.>",
    "its own requests, past its consumer": "fed.north.down.alice.>",
    "all members": "fed.north.up.*.message",
    "the consortium": "fed.north.>",
    "everything": ">",
    "every first word": "*",
    "another's inbox": "_INBOX.north.bob.>",
    "the coordinator's inbox": f"_INBOX.north.{COORDINATOR}.>",
    "all inboxes": "_INBOX.>",
    "all inboxes of the consortium": "_INBOX.north.*.*",
    "requests to enter": "fed.north.enrol.>",
    "what JetStream is asked": "$JS.API.>",
    "what JetStream tells": "$JS.EVENT.>",
    "acknowledgements": "$JS.ACK.>",
    "the system": "$SYS.>",
}


def contents(world: World) -> dict[str, Any]:
    """What the broker holds: streams, messages, consumers."""
    names = world.consortium.names
    branches = [names.bodies, names.enrolments, *(of(name) for of in (names.up, names.down) for name in ("alice", "bob"))]
    held: dict[str, Any] = {branch.stream: world.connection.stored(branch) for branch in branches}
    listed = world.connection._ask("$JS.API.STREAM.LIST", {}, None)
    held["streams"] = sorted((one["config"]["name"], one["state"]["consumer_count"]) for one in listed["streams"])
    return held


@pytest.mark.parametrize("case", PUBLISH)
def test_a_member_may_not_publish(case: str, world: World) -> None:
    subject, before = PUBLISH[case], contents(world)
    with world.line(world.members["alice"].context()) as line:
        line.say(b"SUB _INBOX.north.alice.> 1")
        for reply in ("", "_INBOX.north.alice.x"):
            heard = line.publish(subject, reply=reply)
            assert f'Permissions Violation for Publish to "{subject}"' in heard
            assert not delivered(heard)
    assert contents(world) == before


@pytest.mark.parametrize("case", SUBSCRIBE)
def test_a_member_may_not_subscribe(case: str, world: World) -> None:
    subject = SUBSCRIBE[case]
    with world.line(world.members["alice"].context()) as line:
        assert f'Permissions Violation for Subscription to "{subject}"' in line.say(f"SUB {subject} 1".encode())
        assert "Permissions Violation" in line.say(f"SUB {subject} queue 2".encode())
        # Nor does it hear what another says.
        with world.line(world.members["bob"].context()) as bob:
            bob.publish("fed.north.up.bob.quiet", b"for the coordinator alone")
        assert not delivered(line.say())


def test_the_harness_hears_what_it_may(world: World) -> None:
    """Without this, the cases above could pass because nothing is ever heard."""
    names = world.consortium.names
    world.connection.publish(f"{names.down('alice').root}.note", b"hello")
    with world.line(world.members["alice"].context()) as line:
        assert "Violation" not in line.say(b"SUB _INBOX.north.alice.> 1")
        place = f"$JS.API.DIRECT.GET.{names.down('alice').stream}.{names.down('alice').root}.note"
        heard = line.publish(place, b"", "_INBOX.north.alice.x")
        for _ in range(50):
            heard += line.say()
            if "hello" in heard:
                break
            time.sleep(0.02)
        assert "hello" in heard and "Violation" not in heard


def test_a_member_sees_which_of_its_chunks_are_stored(world: World) -> None:
    """NATS must not answer, in the place of the coordinator's account, that the member's has no JetStream."""
    branch = world.consortium.names.up("alice")
    with world.connect(world.members["alice"]) as hers:
        for reload in (False, True):
            if reload:
                world.consortium.broker.reload()
            id = f"{int(reload):032x}"
            for index in range(3):
                hers.publish(branch.chunk(id, index), b"piece")
            for _ in range(20):
                assert hers.held(branch, branch.chunks(id)) == {branch.chunk(id, index) for index in range(3)}


def test_what_a_client_says_of_itself_changes_nothing(world: World) -> None:
    """A certificate of alice's and bob's name in every field: it is alice."""
    bob = world.members["bob"]
    uri = Holder("north", "member", "bob", certificates.certificate((bob.folder / CLIENT).read_bytes()).serial_number).uri
    nkey = bob.identity.nkey
    from nkeys import from_seed

    signature = __import__("base64").urlsafe_b64encode(from_seed(bytearray(nkey.seed.encode())).sign(b"nonce")).decode()
    claims: list[dict[str, Any]] = [
        {"user": uri},
        {"user": uri, "pass": ""},
        {"nkey": nkey.public, "sig": signature},
        {"nkey": Identity.create("eve").nkey.public, "sig": signature},
        {"auth_token": uri},
        {"jwt": "eyJ0eXAiOiJKV1QifQ.e30.x", "nkey": nkey.public, "sig": signature},
        {"user": Holder("north", "coordinator", COORDINATOR, world.consortium.members().serial).uri},
        {"name": "bob"},
    ]
    for claim in claims:
        with world.line(world.members["alice"].context(), **claim) as line:
            assert "Violation" in line.publish("fed.north.up.bob.message"), claim
            assert "Violation" in line.publish("fed.north.down.bob.message"), claim
            assert "Violation" not in line.publish("fed.north.up.alice.claim"), claim


DEPUTY = {
    "purge another's stream": "$JS.API.STREAM.PURGE.fed_north_UP_bob",
    "delete another's stream": "$JS.API.STREAM.DELETE.fed_north_UP_bob",
    "delete its own stream": "$JS.API.STREAM.DELETE.fed_north_UP_alice",
    "delete another's consumer": "$JS.API.CONSUMER.DELETE.fed_north_DOWN_bob.inbox",
    "take another's message": "$JS.API.CONSUMER.MSG.NEXT.fed_north_DOWN_bob.inbox",
    "acknowledge for another": "$JS.ACK.fed_north_DOWN_bob.inbox.1.1.1.1.0",
    "answer for another": "fed.north.up.bob.message",
    "ask another": "fed.north.down.bob.message",
    "write a body": f"fed.north.body.{HEX}.message",
    "speak to another": "_INBOX.north.bob.x",
    "speak to the coordinator": f"_INBOX.north.{COORDINATOR}.x",
}


@pytest.mark.parametrize("case", DEPUTY)
def test_the_broker_is_no_deputy(case: str, world: World) -> None:
    """A client chooses where the broker answers it, and NATS does not ask whether the client may write there.

    In one account this test fails: a member deletes another's stream by asking for something of its own. In a room of its own the answer stays there.
    """
    names, subject = world.consortium.names, DEPUTY[case]
    alice, bob = world.members["alice"], world.members["bob"]
    note = f"{names.down('alice').root}.note"
    world.connection.publish(note, b"{}")
    world.connection.publish(names.down("alice").message, b"+ACK")
    with world.line(bob.context()) as his, world.line(world.consortium.context()) as hub, world.line(alice.context()) as line:
        his.say(b"SUB _INBOX.north.bob.> 1")
        if subject.startswith(("fed.", f"_INBOX.north.{COORDINATOR}")):
            hub.say(f"SUB {subject} 1".encode())
        before = contents(world)
        for place, data in [
            (f"$JS.API.DIRECT.GET.{names.down('alice').stream}.{note}", b""),
            (names.down("alice").next, b'{"batch":1,"no_wait":true}'),
            (names.up("alice").info, b"{}"),
            (f"{names.up('alice').root}.claim", b"{}"),
        ]:
            # NATS refuses the last kind itself, as a name that is its own.
            assert ("Violation" in line.publish(place, data, subject)) == subject.startswith("$JS.ACK.")
        time.sleep(0.1)
        after = contents(world)
        assert not delivered(his.say()) and not delivered(hub.say())
    for stream in (names.up("bob").stream, names.down("bob").stream, names.bodies.stream, "streams"):
        assert after[stream] == before[stream]


BOOTSTRAP = {
    "publish as a member": "PUB fed.north.up.alice.message 2\r\n{}",
    "publish a request": "PUB fed.north.down.alice.message 2\r\n{}",
    "use another invitation": f"PUB fed.north.enrol.{HEX}.ask 2\r\n{{}}",
    "answer itself": "PUB fed.north.enrol.OWN.answer 2\r\n{}",
    "read another's answer": f"PUB $JS.API.DIRECT.GET.fed_north_ENROL.fed.north.enrol.{HEX}.answer 0\r\n",
    "read its own request again": "PUB $JS.API.DIRECT.GET.fed_north_ENROL.fed.north.enrol.OWN.ask 0\r\n",
    "read the stream of enrolments": "PUB $JS.API.DIRECT.GET.fed_north_ENROL 2\r\n{}",
    "read bodies": f"PUB $JS.API.DIRECT.GET.fed_north_BODY.fed.north.body.{HEX}.message 0\r\n",
    "take requests": "PUB $JS.API.CONSUMER.MSG.NEXT.fed_north_ENROL.inbox 2\r\n{}",
    "list streams": "PUB $JS.API.STREAM.NAMES 2\r\n{}",
    "purge": "PUB $JS.API.STREAM.PURGE.fed_north_ENROL 2\r\n{}",
    "subscribe to enrolments": "SUB fed.north.enrol.> 9",
    "subscribe to everything": "SUB > 9",
    "subscribe to a member's inbox": "SUB _INBOX.north.alice.> 9",
    "the system": "PUB $SYS.REQ.SERVER.PING 0\r\n",
}


@pytest.mark.parametrize("case", BOOTSTRAP)
def test_an_invitation_opens_a_connection_for_entering_and_for_nothing_else(case: str, world: World, tmp_path: Path) -> None:
    if "guest" not in world.__dict__:
        world.__dict__["guest"] = world.consortium.invite("guest", certificates.now())
    invitation: Invitation = world.__dict__["guest"]
    with world.line(bootstrap(world, tmp_path, invitation)) as line:
        heard = line.say(*BOOTSTRAP[case].replace("OWN", invitation.id).encode().split(b"\r\n"))
        assert "Permissions Violation" in heard


# --- entering, over the broker ---------------------------------------------------------------------------------------


def test_a_used_invitation_is_refused_and_counted(world: World, tmp_path: Path) -> None:
    invitation = world.consortium.invite("carol", certificates.now())
    enter(invitation, tmp_path / "first", patience=20)
    before = world.desk.counts["used"]
    with pytest.raises(Declined, match=r"was used on .* with other keys"):
        enter(invitation, tmp_path / "second", patience=20)
    assert world.desk.counts["used"] == before + 1
    # Its own service starts with the same file again and again.
    assert enter(invitation, tmp_path / "first", patience=20).member == "carol" and world.desk.counts["used"] == before + 1
    row = next(row for row in world.consortium.members().table(certificates.now()) if row["member"] == "carol")
    assert row["refused"] == 1 and row["state"] == "member"


def test_of_two_who_use_one_invitation_at_once_one_enters(world: World, tmp_path: Path) -> None:
    invitation, ends = world.consortium.invite("dave", certificates.now()), {}

    def attempt(name: str) -> None:
        try:
            ends[name] = enter(invitation, tmp_path / name, patience=20, again=0.5)
        except Declined as declined:
            ends[name] = declined

    threads = [threading.Thread(target=attempt, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    winners = [end for end in ends.values() if isinstance(end, Membership)]
    assert len(ends) == 2 and len(winners) == 1
    (winner,) = winners
    assert world.consortium.members().members["dave"].card.fingerprint == winner.identity.card.fingerprint
    with world.line(winner.context()) as line:
        assert "Violation" not in line.publish("fed.north.up.dave.message")


def test_a_member_returns_on_a_new_machine_with_its_keys_and_the_old_certificate_is_void(world: World, tmp_path: Path) -> None:
    old = world.join("erin")
    new = tmp_path / "new machine"
    new.mkdir(mode=0o700)
    shutil.copy(old.folder / "identity.json", new)
    invitation = world.consortium.invite("erin", certificates.now())
    with pytest.raises(ConfigError, match="return with the keys that it has"):
        enter(invitation, tmp_path / "without keys", patience=5)
    back = enter(invitation, new, patience=20)
    assert back.identity.card.fingerprint == old.identity.card.fingerprint and world.desk.counts["returned"] == 1
    with world.line(back.context()):
        pass
    with pytest.raises((ConnectionError, ssl.SSLError)):
        world.line(old.context())


def test_a_revoked_member_is_cut_off_and_the_others_are_not(world: World, tmp_path: Path) -> None:
    frank = world.join("frank")
    with world.line(frank.context()) as his, world.line(world.members["bob"].context()) as bobs, world.connect(frank) as kept:
        world.consortium.revoke("frank", certificates.now())
        end = time.monotonic() + 5
        heard = ""
        while time.monotonic() < end:
            try:
                said = his.say()
            except OSError:
                break
            heard += said
            if "PONG" not in said:
                break
        assert time.monotonic() < end
        assert "PONG" in bobs.say()
        with pytest.raises(WireError):
            kept.publish("fed.north.up.frank.message", b"still here", patience=3)
    with pytest.raises((ConnectionError, ssl.SSLError)):
        world.line(frank.context())
    # The name may come back, with new keys.
    again = enter(world.consortium.invite("frank", certificates.now()), tmp_path / "again", patience=20)
    assert again.identity.card.fingerprint != frank.identity.card.fingerprint


def test_an_answer_of_somebody_else_is_not_believed(world: World, tmp_path: Path) -> None:
    """A man in the middle who can write on the broker, with keys of his own, in the coordinator's name."""
    invitation = world.consortium.invite("grace", certificates.now())
    false = Consortium.create(tmp_path / "false", Settings("north", world.consortium.settings.urls, "127.0.0.1:4222"), certificates.now())
    entering = Entering.begin(invitation, tmp_path / "grace")
    from fedfm.silos.enrol import ANSWER, _header
    from fedfm.wire.envelope import seal

    now = certificates.now()
    made = false.authority.client("member", "grace", entering.key.public_key(), now, DAY)
    answer = json.dumps({"request": entering.digest, "certificate": made.pem, "urls": list(invitation.urls)}).encode()
    forged = seal(answer, false.identity, [entering.identity.card], _header("north", ANSWER, now, 60.0)).message()
    world.connection.publish(world.consortium.names.answer(invitation.id), forged)
    with pytest.raises(Exception, match="not signed with its key"):
        enter(invitation, tmp_path / "grace", patience=5)
    assert not (tmp_path / "grace" / "membership.json").exists()


def test_the_commands_reach_a_broker_that_another_process_runs(world: World, tmp_path: Path) -> None:
    def fedfm(*words: object) -> str:
        environment = os.environ | {"PYTHONPATH": str(Path(fedfm_package.__file__).parent.parent)}
        command = [sys.executable, "-m", "fedfm.cli.main", "consortium", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = world.consortium.folder
    fedfm("invite", folder, "heidi", "--out", "heidi.json")
    heidi = enter(Invitation.read(tmp_path / "heidi.json", certificates.now()), tmp_path / "heidi", patience=20)
    with world.line(heidi.context()) as line:
        assert "heidi" in fedfm("list", folder) and "PONG" in line.say()
        assert "has cut it off" in fedfm("revoke", folder, "heidi")
        with contextlib.suppress(OSError):
            assert "PONG" not in line.say() or "PONG" not in line.say()
    with pytest.raises((ConnectionError, ssl.SSLError)):
        world.line(heidi.context())


# --- the process -----------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named(world: World, tmp_path: Path) -> None:
    settings = Settings("south", (f"tls://127.0.0.1:{world.port}",), f"127.0.0.1:{world.port}")
    other = Consortium.create(tmp_path / "south", settings, certificates.now())
    with pytest.raises(ConfigError, match=f"127.0.0.1:{world.port}: another program does already"):
        other.broker.start()
    assert other.broker.process() is None


def test_what_the_broker_stored_is_there_after_kill_9(tmp_path: Path) -> None:
    port = free_port()
    settings = Settings("east", (f"tls://127.0.0.1:{port}",), f"127.0.0.1:{port}")
    consortium = Consortium.create(tmp_path / "east", settings, certificates.now())
    broker, names = consortium.broker, consortium.names
    broker.start()
    try:
        with Connection(settings.urls, names.inbox(COORDINATOR), tls=consortium.context()) as line:
            line.make_stream(names.bodies, 1 << 20)
            line.publish(f"{names.bodies.root}.{HEX}.message", b"kept")
            process = broker.process()
            assert process is not None
            process.kill()
            process.wait(10)
            assert broker.process() is None
            # A second object, as after a restart of the coordinator, starts it again and stops it.
            again = Broker(broker.folder, broker.settings)
            again.start()
            assert Broker(broker.folder, broker.settings).process() is not None
            assert line.get(names.bodies, f"{names.bodies.root}.{HEX}.message") == b"kept"
            again.start()
            again.stop()
            assert broker.process() is None
            with pytest.raises(RunError, match="does not run"):
                broker.reload()
    finally:
        broker.stop()


def test_certificates_that_end_soon_are_made_anew_while_the_broker_runs(tmp_path: Path) -> None:
    port = free_port()
    settings = Settings("west", (f"tls://127.0.0.1:{port}",), f"127.0.0.1:{port}")
    now = certificates.now()
    consortium = Consortium.create(tmp_path / "west", settings, now - 340 * DAY)
    first = consortium.members().serial
    consortium.broker.start()
    try:
        consortium.renew(now)
        assert consortium.members().serial != first
        with Line(port, consortium.context(), {}) as line:
            made = line.socket.getpeercert()  # type: ignore[union-attr]
            assert ssl.cert_time_to_seconds(made["notAfter"]) > (now + 300 * DAY).timestamp()
        second = consortium.members().serial
        consortium.renew(now)
        assert consortium.members().serial == second
    finally:
        consortium.broker.stop()


def test_the_configuration_is_private_and_what_nats_refuses_does_not_replace_it(world: World) -> None:
    broker = world.consortium.broker
    before = broker.configuration.read_bytes()
    assert broker.configuration.stat().st_mode & 0o777 == 0o600
    bad = Broker(broker.folder, type(broker.settings)(**{**vars(broker.settings), "sync": "never"}))
    with pytest.raises(ConfigError, match="NATS refuses"):
        bad.configure([])
    assert broker.configuration.read_bytes() == before
    for path in broker.folder.rglob("*"):
        assert not path.stat().st_mode & 0o077, path


def test_a_broker_of_somebody_else_runs_with_what_the_page_says(tmp_path: Path) -> None:
    """docs/deploy.md, taken at its word: its block, the file that fedfm writes, and nats-server started by hand."""
    port = free_port()
    settings = Settings("owls", (f"tls://127.0.0.1:{port}",), f"127.0.0.1:{port}", broker="external")
    consortium = Consortium.create(tmp_path / "owls", settings, certificates.now())
    folder, names = consortium.folder / "broker", consortium.names
    page = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    block = next(part for part in page.split("```") if "verify_and_map" in part)
    for name in ("server.pem", "server.key", "ca.pem"):
        block = block.replace(f'"{name}"', f'"{folder / name}"')
    block = block.replace("/var/lib/nats", str(tmp_path / "store"))
    text = f"listen: 127.0.0.1:{port}\n{block}\ninclude {consortium.broker.accounts_file.name}\n"
    (folder / "theirs.conf").write_text(text, encoding="utf-8")
    with subprocess.Popen(
        [str(find_server()), "-c", str(folder / "theirs.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            with Connection(settings.urls, names.inbox(COORDINATOR), tls=consortium.context(), patience=10) as line:
                line.make_stream(names.enrolments, 1 << 20)
                invitation = consortium.invite("alice", certificates.now())
                context = client_of(tmp_path, invitation)
                with pytest.raises((ConnectionError, ssl.SSLError)):
                    Line(port, context, {})
                for _ in range(2):
                    server.send_signal(signal.SIGHUP)
                    time.sleep(0.3)
                line.publish(names.answer(invitation.id), b"answer")
                with Connection(settings.urls, names.inbox(invitation.id), tls=context, patience=10) as hers:
                    assert hers.get(names.enrolments, names.answer(invitation.id)) == b"answer"
        finally:
            server.terminate()

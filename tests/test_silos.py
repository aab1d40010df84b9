"""A consortium's folder, its roster, invitations and the protocol of entering, without a broker; the commands."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography.hazmat.primitives.hpke", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.cli import main as cli
from fedfm.core import disk
from fedfm.core.errors import ConfigError, DataError, MessageError, MissingExtra, RunError
from fedfm.silos import certificates, private
from fedfm.silos.authority import Authority
from fedfm.silos.broker import find_server
from fedfm.silos.certificates import Holder, new_key
from fedfm.silos.consortium import Consortium, Settings, default_listen, token_digest
from fedfm.silos.enrol import _MAGIC, Declined, Desk, Entering, entered
from fedfm.silos.invitation import Invitation
from fedfm.silos.members import GRACE, ROSTER, Members
from fedfm.silos.membership import CLIENT, Membership
from fedfm.wire.identity import Card, Identity

try:
    find_server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

NOW = certificates.now()
DAY = timedelta(days=1)
URL = "tls://127.0.0.1:4222"


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium.create(tmp_path / "north", Settings("north", (URL,)), NOW)


def exchange(consortium: Consortium, invitation: Invitation, folder: Path, desk: Desk | None = None) -> Membership:
    """Asks and accepts, without a broker between."""
    entering = Entering.begin(invitation, folder)
    answer = (desk or Desk(consortium, lambda: NOW)).answer(entering.ask(NOW))
    assert answer is not None and answer.invitation == invitation.id
    membership = entering.accept(answer.data, NOW)
    assert membership is not None
    return membership


# --- the folder -----------------------------------------------------------------------------------------------------


def test_everything_in_the_folder_is_its_owners_alone(consortium: Consortium) -> None:
    old = os.umask(0)
    try:
        member = exchange(consortium, consortium.invite("alice", NOW), consortium.folder.parent / "alice")
    finally:
        os.umask(old)
    for root in (consortium.folder, member.folder):
        for path in (root, *root.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode & 0o077 == 0, f"{path}: {mode:03o}"


@pytest.mark.parametrize("place", [".", "ca", "ca/ca.key", "coordinator/identity.json", "coordinator/client.pem", "broker"])
def test_what_is_open_to_others_is_refused_with_the_remedy(place: str, consortium: Consortium) -> None:
    path = consortium.folder / place
    path.chmod(0o755 if path.is_dir() else 0o644)
    with pytest.raises(ConfigError, match=r"open to other users|can be read by others") as refused:
        opened = Consortium.open(consortium.folder)
        opened.authority, opened.identity, opened.context(), opened.broker
    assert "chmod" in str(refused.value) and path.name in str(refused.value)


def test_a_consortium_is_never_begun_over_something(consortium: Consortium, tmp_path: Path) -> None:
    before = (consortium.folder / ROSTER).read_bytes()
    with pytest.raises(ConfigError, match="is not empty"):
        Consortium.create(consortium.folder, consortium.settings, NOW)
    assert (consortium.folder / ROSTER).read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        Consortium.create(tmp_path / "file", consortium.settings, NOW)
    with pytest.raises(ConfigError, match="holds no consortium"):
        Consortium.open(tmp_path / "nowhere")


WRONG: dict[str, dict[str, Any]] = {
    "name": {"name": "North!"},
    "urls, none": {"urls": ()},
    "urls, plain": {"urls": ("nats://host:4222",)},
    "urls, without a port": {"urls": ("tls://host",)},
    "urls, with a password": {"urls": ("tls://me:secret@host:4222",)},
    "urls, with a path": {"urls": ("tls://host:4222/x",)},
    "urls, port": {"urls": ("tls://host:99999",)},
    "urls, host": {"urls": ("tls://ho st:4222",)},
    "listen": {"listen": "4222"},
    "listen, port": {"listen": "127.0.0.1:0"},
    "broker": {"broker": "mine"},
    "sync": {"sync": "often"},
    "sync, zero": {"sync": "0s"},
    "max_payload": {"max_payload": 1000},
    "max_payload, kind": {"max_payload": True},
    "max_store": {"max_store": -1},
    "member_days": {"member_days": 0},
    "invitation_days": {"invitation_days": 400},
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_mean_what_they_say_are_named(case: str) -> None:
    with pytest.raises(ConfigError, match=case.partition(",")[0]):
        Settings(**{"name": "north", "urls": (URL,), **WRONG[case]})


def test_settings_survive_being_written(tmp_path: Path) -> None:
    settings = Settings("north", (URL, "tls://broker.example.org:4223"), "0.0.0.0:4222", "external", "always", 2 << 20, 1 << 30, 10, 30, 1)
    settings.write(tmp_path / "consortium.yaml")
    assert Settings.read(tmp_path / "consortium.yaml") == settings
    assert settings.hosts == ["127.0.0.1", "broker.example.org"]
    assert default_listen([URL]) == "127.0.0.1:4222" and default_listen(["tls://broker.example.org:4443"]) == "0.0.0.0:4443"


@pytest.mark.parametrize(
    "text", ["", "[]", "{name: north}", "{name: north, urls: x}", "{name: 3, urls: [a]}", "{name: n, urls: [a], colour: red}", "{a: ", "\0"]
)
def test_a_damaged_settings_file_is_refused(text: str, tmp_path: Path) -> None:
    private.write(tmp_path / "consortium.yaml", text.encode())
    with pytest.raises(ConfigError, match=r"consortium\.yaml"):
        Settings.read(tmp_path / "consortium.yaml")


def test_the_settings_reach_the_broker(tmp_path: Path) -> None:
    settings = Settings("north", ("tls://broker.example.org:4443",), "0.0.0.0:4443", sync="always", max_payload=2 << 20, max_store=1 << 30)
    consortium = Consortium.create(tmp_path / "north", settings, NOW)
    text = consortium.broker.configuration.read_text()
    for wanted in (
        '"sync_interval": "always"',
        '"max_file_store": 1073741824',
        "max_payload: 2097152",
        "port: 4443",
        '"verify_and_map": true',
    ):
        assert wanted in text
    names = certificates.certificate((consortium.folder / "broker" / "server.pem").read_bytes())
    assert "broker.example.org" in str(names.extensions)
    # The coordinator itself need not go out and come back in.
    assert consortium.url == "tls://127.0.0.1:4443" and "127.0.0.1" in str(names.extensions)


@pytest.mark.parametrize(
    ("listen", "url"),
    [("0.0.0.0:1", "tls://127.0.0.1:1"), ("[::]:2", "tls://[::1]:2"), ("10.0.0.7:3", "tls://10.0.0.7:3"), ("::1:4", "tls://[::1]:4")],
)
def test_where_the_coordinator_reaches_its_own_broker(listen: str, url: str, tmp_path: Path) -> None:
    assert Consortium(tmp_path, Settings("north", (URL,), listen)).url == url
    assert Consortium(tmp_path, Settings("north", (URL,), listen, "external")).url == URL


def test_a_broker_of_somebody_else_gets_a_file_to_install(tmp_path: Path) -> None:
    consortium = Consortium.create(tmp_path / "north", Settings("north", (URL,), broker="external"), NOW)
    consortium.invite("alice", NOW)
    text = consortium.broker.accounts_file.read_text()
    listed = json.loads(text.partition("accounts: ")[2])
    (invitation,) = set(listed) - {"north"}
    assert len(listed["north"]["users"]) == 1 and listed[invitation]["imports"] and not consortium.broker.configuration.exists()
    with pytest.raises(ConfigError, match="broker: external"):
        consortium.broker.start()


# --- certificates ---------------------------------------------------------------------------------------------------


def test_a_certificate_names_its_holder_and_its_number_once(consortium: Consortium) -> None:
    key = new_key()
    made = consortium.authority.client("member", "alice", key.public_key(), NOW, DAY)
    certificate = certificates.certificate(made.pem.encode())
    authority = consortium.authority.certificate
    held = certificates.require_issued(certificate, authority, key.public_key(), NOW)
    assert held == Holder("north", "member", "alice", made.serial) and Holder.parse(held.uri) == held
    for other, when, why in [
        (new_key().public_key(), NOW, "another key"),
        (key.public_key(), NOW + 2 * DAY, "clock of this machine"),
        (key.public_key(), NOW - 2 * DAY, "clock of this machine"),
    ]:
        with pytest.raises(MessageError, match=why):
            certificates.require_issued(certificate, authority, other, when)
    with pytest.raises(MessageError, match="authority of this consortium"):
        certificates.require_issued(
            certificate, Authority.create(consortium.folder / "other", "north", NOW).certificate, key.public_key(), NOW
        )


def test_a_certificate_ends_with_its_authority(consortium: Consortium) -> None:
    end = consortium.authority.certificate.not_valid_after_utc
    made = consortium.authority.client("member", "alice", new_key().public_key(), end - DAY, 365 * DAY)
    assert made.expires == end
    with pytest.raises(ConfigError, match="authority of north expired"):
        consortium.authority.client("member", "alice", new_key().public_key(), end + DAY, DAY)


@pytest.mark.parametrize(
    "uri", ["", "urn:fedfm:north:member:alice", "urn:fedfm:north:king:alice:ff", "urn:fedfm:north:member:a b:ff", "x" * 5000]
)
def test_other_names_are_no_holders(uri: str) -> None:
    with pytest.raises(MessageError, match="names no holder"):
        Holder.parse(uri)


def test_a_request_must_be_signed_by_its_own_key_of_the_right_kind() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    good = certificates.request(new_key(), "alice")
    assert certificates.requested_key(good)
    other = certificates.request(new_key(), "alice")
    der, wrong = (x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER) for pem in (good, other))
    import base64

    mixed = base64.encodebytes(der[: len(der) - 72] + wrong[len(wrong) - 72 :]).decode()
    big = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(certificates.subject("a", None))
        .sign(rsa.generate_private_key(65537, 2048), hashes.SHA256())
    )
    for pem in (
        b"",
        b"x" * 50_000,
        good[:-60],
        f"-----BEGIN CERTIFICATE REQUEST-----\n{mixed}-----END CERTIFICATE REQUEST-----\n".encode(),
        big.public_bytes(serialization.Encoding.PEM),
    ):
        with pytest.raises(MessageError):
            certificates.requested_key(pem)


# --- the roster -----------------------------------------------------------------------------------------------------


def test_the_roster_tells_everything_again(consortium: Consortium) -> None:
    alice = exchange(consortium, consortium.invite("alice", NOW), consortium.folder.parent / "alice")
    consortium.invite("bob", NOW)
    consortium.revoke("alice", NOW)
    members = Consortium.open(consortium.folder).members()
    assert members.members["alice"].revoked == NOW and members.members["alice"].card == alice.identity.card
    assert [(row["member"], row["state"]) for row in members.table(NOW)] == [("alice", "revoked"), ("bob", "invited")]
    assert [row["state"] for row in members.table(NOW + 8 * DAY)] == ["revoked", "void"]
    events = [json.loads(line)["event"] for line in (consortium.folder / ROSTER).read_text().splitlines()]
    assert events == ["founded", "coordinator", "invited", "joined", "invited", "revoked"]


@pytest.mark.parametrize("change", ["one byte", "a line less", "two lines exchanged", "a line twice", "another event", "no first line"])
def test_a_roster_that_was_changed_lets_nobody_in(change: str, consortium: Consortium) -> None:
    for name in ("alice", "bob"):
        exchange(consortium, consortium.invite(name, NOW), consortium.folder.parent / name)
    consortium.revoke("alice", NOW)
    path = consortium.folder / ROSTER
    lines = path.read_text().splitlines(keepends=True)
    changed = {
        "one byte": [*lines[:2], lines[2].replace("alice", "alicf"), *lines[3:]],
        "a line less": [*lines[:4], *lines[5:]],
        "two lines exchanged": [*lines[:3], lines[4], lines[3], *lines[5:]],
        "a line twice": [*lines, lines[-1]],
        "another event": [*lines[:-1], lines[-1].replace("revoked", "blessed")],
        "no first line": lines[1:],
    }[change]
    assert changed != lines
    path.write_text("".join(changed))
    with pytest.raises(RunError, match=r"damaged.*nobody is let in"):
        Consortium.open(consortium.folder)
    with pytest.raises(RunError, match="damaged"):
        consortium.invite("carol", NOW)


def test_a_line_that_a_crash_cut_short_is_dropped(consortium: Consortium) -> None:
    path = consortium.folder / ROSTER
    consortium.invite("alice", NOW)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert Members.read(path).table(NOW) == []
    consortium.invite("bob", NOW)
    assert [row["member"] for row in Members.read(path).table(NOW)] == ["bob"]


WELL_FORMED = [
    {"event": "blessed", "time": NOW.isoformat()},
    {"event": "revoked", "time": NOW.isoformat()},
    {"event": "revoked", "time": "yesterday", "member": "alice"},
    {"event": "revoked", "time": "2026-01-01T00:00:00", "member": "alice"},
    {"event": "revoked", "time": NOW.isoformat(), "member": "Alice!"},
    {"event": "joined", "time": NOW.isoformat(), "member": "alice", "invitation": "0" * 32},
    {"event": "coordinator", "time": NOW.isoformat(), "serial": 12, "expires": NOW.isoformat()},
    {"event": "founded", "time": NOW.isoformat(), "consortium": "north", "card": {}},
    {
        "event": "invited",
        "time": NOW.isoformat(),
        "member": "a",
        "invitation": "0" * 32,
        "token": "x",
        "serial": "1",
        "expires": NOW.isoformat(),
        "card": "",
    },
]


@pytest.mark.parametrize("entry", WELL_FORMED, ids=lambda entry: json.dumps(entry)[:50])
def test_lines_of_the_wrong_shape_are_refused_though_their_digests_hold(entry: dict[str, Any], consortium: Consortium) -> None:
    path = consortium.folder / ROSTER
    what = {name: value for name, value in entry.items() if name != "event"}
    Members.read(path)._chain().add(entry["event"], **what)
    with pytest.raises(RunError, match=rf"{ROSTER}:3 is damaged"):
        Members.read(path)


def test_two_processes_do_not_change_it_at_once(consortium: Consortium) -> None:
    other = Consortium.open(consortium.folder)
    with consortium.changing(), pytest.raises(RunError, match="being changed by another process"), other.changing(patience=0.05):
        pass
    with other.changing():
        pass


# --- who may connect ------------------------------------------------------------------------------------------------


def test_users_follow_the_roster(consortium: Consortium) -> None:
    def roles(when: Any = NOW) -> list[str]:
        return sorted(":".join(user.name.split(":")[3:5]) for user in consortium.users(consortium.members(), when))

    assert roles() == ["coordinator:coordinator"]
    invitation = consortium.invite("alice", NOW)
    opening = f"invitation:{invitation.id}"
    assert roles() == ["coordinator:coordinator", opening]
    assert roles(NOW + 8 * DAY) == ["coordinator:coordinator"]
    exchange(consortium, invitation, consortium.folder.parent / "alice")
    # A member whose answer was lost can ask again, for a day.
    assert roles() == ["coordinator:coordinator", opening, "member:alice"]
    assert roles(NOW + GRACE) == ["coordinator:coordinator", "member:alice"]
    assert roles(NOW + 366 * DAY) == ["coordinator:coordinator"]
    consortium.revoke("alice", NOW)
    assert roles() == ["coordinator:coordinator"]


def test_revoking_nobody_is_an_error_that_tells_why(consortium: Consortium) -> None:
    with pytest.raises(ConfigError, match="never invited"):
        consortium.revoke("alice", NOW)
    assert consortium.invite("alice", NOW) and consortium.revoke("alice", NOW) is False
    exchange(consortium, consortium.invite("alice", NOW), consortium.folder.parent / "alice")
    assert consortium.revoke("alice", NOW) is True
    with pytest.raises(ConfigError, match="was revoked on"):
        consortium.revoke("alice", NOW)


@pytest.mark.parametrize("name", ["coordinator", "Alice", "", "a.b", "a" * 41, "../x", "a*"])
def test_names_that_nobody_can_have(name: str, consortium: Consortium) -> None:
    with pytest.raises(ConfigError, match="name"):
        consortium.invite(name, NOW)
    with pytest.raises(ConfigError, match="name"):
        consortium.revoke(name, NOW)


# --- invitations ----------------------------------------------------------------------------------------------------


def test_an_invitation_survives_being_written_and_is_private(consortium: Consortium, tmp_path: Path) -> None:
    invitation = consortium.invite("alice", NOW)
    path = tmp_path / "alice.json"
    invitation.write(path)
    assert Invitation.read(path, NOW) == invitation and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(DataError, match="overwrites nothing"):
        invitation.write(path)
    with pytest.raises(DataError, match="expired on"):
        Invitation.read(path, invitation.expires)
    shown = repr(invitation)
    assert "PRIVATE" not in shown and repr(invitation.token) not in shown


def test_the_coordinator_keeps_the_digest_of_the_token_alone(consortium: Consortium) -> None:
    invitation = consortium.invite("alice", NOW)
    text = (consortium.folder / ROSTER).read_bytes()
    assert token_digest(invitation.token).encode() in text and invitation.token.hex().encode() not in text
    assert len(invitation.token) == 32 and invitation.token != consortium.invite("alice", NOW).token


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another kind": lambda values: values | {"kind": "fedfm card"},
    "another version": lambda values: values | {"version": 2},
    "no token": lambda values: {name: value for name, value in values.items() if name != "token"},
    "short token": lambda values: values | {"token": "AAAA"},
    "token that is no base64": lambda values: values | {"token": "!"},
    "no urls": lambda values: values | {"urls": []},
    "urls of another kind": lambda values: values | {"urls": [3]},
    "member that is no name": lambda values: values | {"member": "../alice"},
    "consortium that is no name": lambda values: values | {"consortium": "*"},
    "id that is no name": lambda values: values | {"id": ">"},
    "no card": lambda values: values | {"coordinator": {}},
    "card with a short key": lambda values: values | {"coordinator": values["coordinator"] | {"sign": "AAAA"}},
    "end that is no time": lambda values: values | {"expires": "soon"},
    "end without a zone": lambda values: values | {"expires": "2099-01-01T00:00:00"},
    "a list": lambda values: [values],
}


@pytest.mark.parametrize("case", [*DAMAGE, "cut short", "not JSON", "too long", "deep", "missing"])
def test_a_damaged_invitation_is_refused_with_the_reason(case: str, consortium: Consortium, tmp_path: Path) -> None:
    path = tmp_path / "alice.json"
    consortium.invite("alice", NOW).write(path)
    if case in DAMAGE:
        path.write_text(json.dumps(DAMAGE[case](json.loads(path.read_text()))))
    elif case == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut short": path.read_bytes()[:-9], "not JSON": b"\xff", "too long": b" " * 70_000, "deep": b"[" * 60_000}[case])
    with pytest.raises(DataError, match=r"alice\.json"):
        Invitation.read(path, NOW)


# --- entering -------------------------------------------------------------------------------------------------------


def decline(consortium: Consortium, entering: Entering, desk: Desk, when: Any = NOW) -> Declined:
    answer = desk.answer(entering.ask(when))
    assert answer is not None
    with pytest.raises(Declined) as declined:
        entering.accept(answer.data, when)
    return declined.value


def test_entering(consortium: Consortium, tmp_path: Path) -> None:
    desk = Desk(consortium, lambda: NOW)
    member = exchange(consortium, consortium.invite("alice", NOW), tmp_path / "alice", desk)
    assert Membership.read(member.folder) == member and member.context()
    assert consortium.members().members["alice"].card.fingerprint == member.identity.card.fingerprint
    assert dict(desk.counts) == {"joined": 1}
    assert sorted(path.name for path in member.folder.iterdir()) == [CLIENT, "identity.json", "membership.json"]


def test_a_lost_answer_can_be_asked_for_again_and_is_the_same(consortium: Consortium, tmp_path: Path) -> None:
    """The member crashes after its request, and begins again with the same invitation."""
    invitation, desk = consortium.invite("alice", NOW), Desk(consortium, lambda: NOW)
    first = desk.answer(Entering.begin(invitation, tmp_path / "alice").ask(NOW))
    serial = consortium.members().members["alice"].serial
    member = exchange(consortium, invitation, tmp_path / "alice", Desk(Consortium.open(consortium.folder), lambda: NOW))
    assert first is not None and consortium.members().members["alice"].serial == serial
    assert certificates.certificate((member.folder / CLIENT).read_bytes()).serial_number == serial


def test_the_coordinator_crashes_before_the_broker_knows(consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invitation = consortium.invite("alice", NOW)
    entering = Entering.begin(invitation, tmp_path / "alice")
    with monkeypatch.context() as patch:
        patch.setattr(Consortium, "apply", lambda *_: (_ for _ in ()).throw(RunError("killed")))
        with pytest.raises(RunError, match="killed"):
            Desk(consortium, lambda: NOW).answer(entering.ask(NOW))
    assert "member:alice" not in consortium.broker.configuration.read_text()
    desk = Desk(Consortium.open(consortium.folder), lambda: NOW)
    assert exchange(consortium, invitation, tmp_path / "alice", desk)
    assert dict(desk.counts) == {"again": 1} and "member:alice" in consortium.broker.configuration.read_text()


class Killed(BaseException):
    """What a test ends a process with."""


def crash_at(number: int, work: Callable[[], object]) -> bool:
    """Does the work, and ends it at the durable step of that number; whether there was such a step."""
    steps = 0

    def step(name: str) -> None:
        nonlocal steps
        steps += 1
        if steps == number:
            raise Killed

    disk.on_step = step
    try:
        work()
    except Killed:
        return True
    finally:
        disk.on_step = None
    return False


def test_either_side_can_die_at_every_durable_step_of_entering(tmp_path: Path) -> None:
    """Afterwards the same invitation works, the member is there once, and the broker knows it."""
    number, goes_on = 0, True
    while goes_on:
        number += 1
        root = tmp_path / str(number)
        consortium = Consortium.create(root / "north", Settings("north", (URL,), broker="external"), NOW)
        invitation = consortium.invite("alice", NOW)
        goes_on = crash_at(number, partial(exchange, consortium, invitation, root / "alice"))
        again = Consortium.open(consortium.folder)
        member = entered(invitation, root / "alice") or exchange(again, invitation, root / "alice")
        events = [json.loads(line)["event"] for line in (again.folder / ROSTER).read_text().splitlines()]
        assert events.count("joined") == 1 and "returned" not in events, number
        known = again.members().members["alice"]
        assert known.card == member.identity.card and member.context()
        assert certificates.certificate((member.folder / CLIENT).read_bytes()).serial_number == known.serial
        assert f"member:alice:{known.serial:x}" in again.broker.accounts_file.read_text()
        assert sorted(path.name for path in member.folder.iterdir() if not path.name.startswith(".")) == [
            CLIENT,
            "identity.json",
            "membership.json",
        ]
    assert number > 15


def test_a_broker_folder_that_is_gone_is_made_from_the_roster(tmp_path: Path) -> None:
    consortium = Consortium.create(tmp_path / "north", Settings("north", (URL,)), NOW)
    exchange(consortium, consortium.invite("alice", NOW), tmp_path / "alice")
    before = consortium.broker.configuration.read_text()
    shutil.rmtree(consortium.folder / "broker")
    again = Consortium.open(consortium.folder)
    again.renew(NOW)
    assert again.broker.configuration.read_text() == before and (consortium.folder / "broker" / "server.pem").exists()


def test_a_revocation_that_the_broker_did_not_hear_is_told_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    consortium = Consortium.create(tmp_path / "north", Settings("north", (URL,)), NOW)
    exchange(consortium, consortium.invite("alice", NOW), tmp_path / "alice")
    with monkeypatch.context() as patch:
        patch.setattr(Consortium, "apply", lambda *_: (_ for _ in ()).throw(RunError("the broker does not answer")))
        with pytest.raises(RunError, match="does not answer"):
            consortium.revoke("alice", NOW)
    assert "member:alice" in consortium.broker.configuration.read_text()
    with pytest.raises(ConfigError, match="was revoked on"):
        consortium.revoke("alice", NOW)
    assert "member:alice" not in consortium.broker.configuration.read_text()


def test_the_coordinator_can_die_at_every_durable_step_of_revoking(tmp_path: Path) -> None:
    number, goes_on = 0, True
    while goes_on:
        number += 1
        consortium = Consortium.create(tmp_path / str(number) / "north", Settings("north", (URL,), broker="external"), NOW)
        exchange(consortium, consortium.invite("alice", NOW), tmp_path / str(number) / "alice")
        goes_on = crash_at(number, partial(consortium.revoke, "alice", NOW))
        again = Consortium.open(consortium.folder)
        was_written = again.members().members["alice"].revoked is not None
        # The broker may not have been told. What the coordinator does when it starts tells it.
        again.renew(NOW)
        assert ("member:alice" in again.broker.accounts_file.read_text()) is not was_written
        assert was_written or goes_on


def test_refusals_are_answered_counted_and_written_down(consortium: Consortium, tmp_path: Path) -> None:
    from dataclasses import replace

    desk = Desk(consortium, lambda: NOW)
    invitation = consortium.invite("alice", NOW)
    wrong = replace(invitation, token=bytes(32))
    assert "token" in str(decline(consortium, Entering.begin(wrong, tmp_path / "thief"), desk))
    unknown = replace(invitation, id="f" * 32)
    assert "not known" in str(decline(consortium, Entering.begin(unknown, tmp_path / "unknown"), desk))
    other = replace(invitation, member="eve")
    assert "other keys" in str(decline(consortium, Entering.begin(other, tmp_path / "eve"), desk))
    late = Desk(consortium, lambda: invitation.expires)
    entering = Entering.begin(invitation, tmp_path / "alice")
    answer = late.answer(entering.ask(invitation.expires - timedelta(seconds=1)))
    assert answer is not None and late.counts["expired"] == 1
    exchange(consortium, invitation, tmp_path / "alice", desk)
    assert "was used on" in str(decline(consortium, Entering.begin(invitation, tmp_path / "second"), desk))
    void = consortium.invite("bob", NOW)
    consortium.invite("bob", NOW)
    assert "withdrawn" in str(decline(consortium, Entering.begin(void, tmp_path / "bob"), desk))
    assert dict(desk.counts) == {"token": 1, "unknown": 1, "keys": 1, "joined": 1, "used": 1, "void": 1}
    lines = [json.loads(line) for line in (consortium.folder / ROSTER).read_text().splitlines()]
    assert [line["why"] for line in lines if line["event"] == "refused"] == ["token", "keys", "expired", "used", "void"]


def test_a_thief_cannot_fill_the_disk(consortium: Consortium, tmp_path: Path) -> None:
    desk, invitation = Desk(consortium, lambda: NOW), consortium.invite("alice", NOW)
    exchange(consortium, invitation, tmp_path / "alice", desk)
    entering = Entering.begin(invitation, tmp_path / "thief")
    for _ in range(20):
        decline(consortium, entering, desk)
    assert desk.counts["used"] == 20 and consortium.members().refused["alice"] == 8


def test_keys_of_another_are_not_taken(consortium: Consortium, tmp_path: Path) -> None:
    """One set of keys is one member: otherwise a message of one would be good for the other."""
    from dataclasses import replace

    exchange(consortium, consortium.invite("alice", NOW), tmp_path / "alice")
    invitation, desk = consortium.invite("bob", NOW), Desk(consortium, lambda: NOW)
    private.make_folder(tmp_path / "bob")
    replace(Identity.load(tmp_path / "alice" / "identity.json"), name="bob").save(tmp_path / "bob" / "identity.json")
    assert "somebody else" in str(decline(consortium, Entering.begin(invitation, tmp_path / "bob"), desk))
    assert desk.counts["taken"] == 1


def test_a_member_returns_with_the_keys_that_it_has_alone(consortium: Consortium, tmp_path: Path) -> None:
    from dataclasses import replace

    exchange(consortium, consortium.invite("alice", NOW), tmp_path / "alice")
    desk, invitation = Desk(consortium, lambda: NOW + DAY), consortium.invite("alice", NOW + DAY)
    # Somebody else removes the fingerprint from the invitation, and comes with keys of his own.
    thief = Entering.begin(replace(invitation, card=""), tmp_path / "thief")
    answer = desk.answer(thief.ask(NOW + DAY))
    assert answer is not None and desk.counts["keys"] == 1
    old = consortium.members().members["alice"]
    back = Entering.begin(invitation, tmp_path / "alice")
    again = desk.answer(back.ask(NOW + DAY))
    assert again is not None and back.accept(again.data, NOW + DAY) is not None
    new = consortium.members().members["alice"]
    assert new.serial != old.serial and new.since == old.since and desk.counts["returned"] == 1


def test_a_folder_of_another_membership_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    exchange(consortium, consortium.invite("alice", NOW), tmp_path / "alice")
    with pytest.raises(ConfigError, match="belongs to alice in north, and the invitation is for bob"):
        Entering.begin(consortium.invite("bob", NOW), tmp_path / "alice")
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o755)
    with pytest.raises(ConfigError, match="open to other users"):
        Entering.begin(consortium.invite("bob", NOW), loose)


def test_only_the_coordinator_of_the_invitation_is_believed(consortium: Consortium, tmp_path: Path) -> None:
    """A man in the middle with an authority and keys of his own, in the coordinator's name."""
    invitation = consortium.invite("alice", NOW)
    entering = Entering.begin(invitation, tmp_path / "alice")
    false = Consortium.create(tmp_path / "false", consortium.settings, NOW)
    from fedfm.silos.enrol import ANSWER, ASK, _header
    from fedfm.wire.envelope import seal

    key = entering.key.public_key()
    theirs, ours = (one.authority.client("member", "alice", key, NOW, DAY).pem for one in (false, consortium))
    bob = consortium.authority.client("member", "bob", key, NOW, DAY).pem
    opening = consortium.authority.client("coordinator", "alice", key, NOW, DAY).pem
    other = consortium.authority.client("member", "alice", new_key().public_key(), NOW, DAY).pem
    good = {"request": entering.digest, "certificate": ours, "urls": [URL]}

    def answer(values: Any, sender: Identity, kind: str = ANSWER, card: Any = None) -> bytes:
        return seal(json.dumps(values).encode(), sender, [card or entering.identity.card], _header("north", kind, NOW, 60)).message()

    for values, sender, why in [
        (good, false.identity, "not signed"),
        (good | {"certificate": theirs}, consortium.identity, "authority of this consortium"),
        (good | {"certificate": bob}, consortium.identity, "was not asked for"),
        (good | {"certificate": opening}, consortium.identity, "was not asked for"),
        (good | {"certificate": other}, consortium.identity, "another key"),
        (good | {"certificate": "x"}, consortium.identity, "cannot be read"),
        (good | {"urls": []}, consortium.identity, "no address"),
        ([], consortium.identity, "no JSON object"),
    ]:
        with pytest.raises(MessageError, match=why):
            entering.accept(answer(values, sender), NOW)
    # Of the coordinator, but for another request, of another kind, for other keys, or old: no answer to this request.
    assert entering.accept(answer(good | {"request": "0" * 64}, consortium.identity), NOW) is None
    assert entering.accept(answer(good, consortium.identity, ASK), NOW) is None
    assert entering.accept(answer(good, consortium.identity, card=Identity.create("alice").card), NOW) is None
    assert entering.accept(answer(good, consortium.identity), NOW + DAY) is None
    assert not (tmp_path / "alice" / "membership.json").exists()
    assert entering.accept(answer(good, consortium.identity), NOW) is not None


def same(data: bytes, other: bytes) -> bool:
    """Whether two requests say the same: base64 has bits that mean nothing."""
    begin = len(_MAGIC) + 4
    end = begin + int.from_bytes(other[len(_MAGIC) : begin], "little")
    try:
        cards = [Card.from_json(json.loads(one[begin:end])) for one in (data, other)]
    except (ValueError, MessageError, RecursionError):
        return False
    return data[:begin] + data[end:] == other[:begin] + other[end:] and cards[0] == cards[1]


def test_mutated_requests_are_refused_with_typed_errors_alone(consortium: Consortium, tmp_path: Path) -> None:
    """20,000 mutations of a request: no other exception, and nobody enters."""
    import random

    invitation, desk = consortium.invite("alice", NOW), Desk(consortium, lambda: NOW)
    good = Entering.begin(invitation, tmp_path / "alice").ask(NOW)
    draw = random.Random(7)
    for _ in range(20_000):
        data = bytearray(good)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(data))
            kind = draw.randrange(4)
            if kind == 0:
                data[place] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del data[place : place + draw.randrange(1, 64)]
            elif kind == 2:
                data[place:place] = draw.randbytes(draw.randrange(1, 16))
            else:
                data[place : place + 4] = draw.randbytes(4)
            data = data or bytearray(b"x")
        if not same(bytes(data), good):
            assert desk.answer(bytes(data)) is None
    assert desk.counts["unreadable"] == sum(desk.counts.values()) and consortium.members().members == {}
    assert desk.answer(good) is not None and consortium.members().members.keys() == {"alice"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "fedfm membership", "version": 1}', "\0"])
def test_a_damaged_membership_is_refused(text: str, consortium: Consortium, tmp_path: Path) -> None:
    member = exchange(consortium, consortium.invite("alice", NOW), tmp_path / "alice")
    private.write(member.folder / "membership.json", text.encode())
    with pytest.raises(ConfigError, match="is damaged"):
        Membership.read(member.folder)
    with pytest.raises(ConfigError, match="holds no membership"):
        (member.folder / "membership.json").unlink()
        Membership.read(member.folder)


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedfm", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_commands_from_beginning_to_end(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = call("consortium", "init", "north", "--name", "north", "--url", "tls://broker.example.org:4443")
    card = Consortium.open(Path("north")).identity.card
    assert code == 0 and card.short in out and "0.0.0.0:4443" in out
    assert "Nobody was invited yet" in call("consortium", "list", "north")[1]
    code, out, _ = call("consortium", "invite", "north", "alice")
    assert code == 0 and "alice.invitation.json" in out and card.short in out
    assert "alice" in (listed := call("consortium", "list", "north")[1]) and "invited" in listed
    consortium = Consortium.open(Path("north"))
    invitation = Invitation.read(Path("alice.invitation.json"), NOW)
    exchange(consortium, invitation, tmp_path / "alice")
    (row,) = json.loads(call("consortium", "list", "north", "--json")[1])["members"]
    assert row["state"] == "member" and row["refused"] == 0
    code, out, _ = call("consortium", "invite", "north", "alice", "--out", "again.json")
    assert code == 0 and "the keys that alice has" in out
    code, out, _ = call("consortium", "revoke", "north", "alice")
    assert code == 0 and "revoked  alice" in out and "The broker does not run" in out
    assert json.loads(call("consortium", "list", "north", "--json")[1])["members"][0]["state"] == "revoked"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["init", "north", "--name", "North!"], "name"),
        (["init", "north", "--name", "north", "--url", "nats://x:1"], "tls://HOST:PORT"),
        (["init", "made", "--name", "north"], "is not empty"),
        (["invite", "nowhere", "alice"], "holds no consortium"),
        (["invite", "made", "Alice"], "is no name"),
        (["invite", "made", "alice", "--out", "made/consortium.yaml"], "overwrites nothing"),
        (["revoke", "made", "alice"], "never invited"),
        (["list", "nowhere"], "holds no consortium"),
    ],
)
def test_the_commands_refuse_with_one_message(words: list[str], why: str, call: Callable[..., tuple[int, str, str]]) -> None:
    assert call("consortium", "init", "made", "--name", "north", "--json")[0] == 0
    before = (Path("made") / ROSTER).read_bytes()
    code, _, err = call("consortium", *words)
    assert code == 2 and err.startswith("error: ") and why in err and err.count("\n") == 1
    assert (Path("made") / ROSTER).read_bytes() == before


@pytest.mark.parametrize("missing", ["cryptography", "nkeys", "nats-server"])
def test_a_missing_extra_is_named_with_the_remedy_and_nothing_is_left(missing: str, tmp_path: Path) -> None:
    words = ["consortium", "init", "north", "--name", "north"]
    hide = (
        "import fedfm.silos.broker as broker; broker.shutil.which = lambda *_, **__: None"
        if missing == "nats-server"
        else f"sys.modules[{missing!r}] = None"
    )
    code = f"import sys; {hide}; sys.argv = ['fedfm', *{words!r}]; from fedfm.cli.main import main; main()"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "pip install 'fedfm[deploy]'" in done.stderr and missing in done.stderr
    assert not list(tmp_path.rglob("*.key")) and not (tmp_path / "north" / "consortium.yaml").exists()


# --- secrets --------------------------------------------------------------------------------------------------------


def test_secrets_come_from_the_operating_system() -> None:
    """No generator that can be repeated is imported by what makes keys and tokens."""
    for path in sorted((Path(cli.__file__).parents[1] / "silos").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in [*names, module]:
                assert name.split(".")[0] not in ("random", "numpy", "torch") and name != "fedfm.core.keys", f"{path.name} imports {name}"

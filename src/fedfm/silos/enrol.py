"""How a member enters a consortium: both halves.

::

    member                                                     coordinator
    has an invitation: token, coordinator's card               has the digest of the token
    makes its keys
    ask: card, {invitation, token, request for a certificate}  checks the seal, the token, the keys
         signed by the member, sealed to the coordinator       writes "joined" into the roster: the invitation is used up
                                                               lets the broker know the new user
    checks signature, name, key, authority                     answer: {certificate, name}, signed, sealed to the member

- The member makes its keys itself and keeps them. It sends public keys, and a request that proves that it has the private one.
- The token is sent sealed, so the broker does not learn it. It is good for one set of keys: whoever asks first with it enters, and a second one is
  refused, counted and written down. The same keys may ask again, because an answer can be lost; they get the same certificate.
- The member believes an answer only if the coordinator of its invitation signed it, for this very request.
- A member that is there already, and whose invitation therefore names its keys, enters with these alone.

Covered here: a stolen invitation that was used or is void; two at once; a man in the middle, the broker among them; a crash of either side at any
moment. Not covered: an invitation that somebody else used first. The member is refused then, the roster shows who entered, and ``fedfm consortium
revoke`` puts that one out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm.core import words
from fedfm.core.errors import ConfigError, MessageError, RunError
from fedfm.silos import certificates, private
from fedfm.silos.consortium import Consortium, token_digest
from fedfm.silos.invitation import Invitation
from fedfm.silos.members import Invited, Members
from fedfm.silos.membership import CLIENT, IDENTITY, MEMBERSHIP, Membership
from fedfm.wire.envelope import MAX_LIFETIME, Header, Opener, seal
from fedfm.wire.identity import Card, Identity
from fedfm.wire.refusal import Refused
from fedfm.wire.subjects import Names, require_name

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

    from fedfm.wire.nats import Connection, Delivery
    from fedfm.wire.subjects import Branch

JOB, ASK, ANSWER = "enrolment", "enrol-ask", "enrol-answer"
_OPENING = "invitation.pem"
_MAGIC = b"fedfm enrol 1\0"
_MAX_MESSAGE, _MAX_CARD = 1 << 16, 1 << 13
# Bytes of requests and answers that the broker keeps for a day.
_MAX_STORED = 64 << 20
# Refused requests that are written down for each invitation; all of them are counted.
_MAX_WRITTEN = 8


class Declined(MessageError):
    """A request to enter that is refused.

    Args:
        why: One word, under which it is counted.
        message: What the one who asked is told.
    """

    def __init__(self, why: str, message: str) -> None:
        super().__init__(message)
        self.why = why


class Unanswered(RunError):
    """The coordinator did not answer in time."""


# --- the member's half ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entering:
    """A member that has made its keys and asks to enter.

    Args:
        invitation: What it was given.
        folder: Where its keys are.
        identity: Its keys for messages.
        key: Its key for the connection.
    """

    invitation: Invitation
    folder: Path
    identity: Identity
    key: EllipticCurvePrivateKey

    @staticmethod
    def begin(invitation: Invitation, folder: Path) -> Entering:
        """Makes the keys, or takes those that are in the folder: after a crash, or of a member that returns.

        Raises:
            ConfigError: if the folder is another member's or consortium's, others can enter it, or the invitation is for other keys.
            RunError: if it cannot be written.
        """
        private.make_folder(folder)
        if (folder / MEMBERSHIP).exists():
            known = Membership.read(folder)
            if (known.consortium, known.member) != (invitation.consortium, invitation.member):
                raise ConfigError(
                    f"{words.clean(folder, 120)} belongs to {known.member} in {known.consortium}, and the invitation is for {invitation.member} in "
                    f"{invitation.consortium}. Give another folder."
                )
        if not (folder / IDENTITY).exists():
            if invitation.card:
                raise ConfigError(
                    f"This invitation lets {invitation.member} return with the keys that it has, and {words.clean(folder, 120)} does not have them. "
                    f"Copy {IDENTITY} there from the machine or backup that has it. If it is lost, the coordinator must revoke {invitation.member} first."
                )
            Identity.create(invitation.member).save(folder / IDENTITY)
        identity = Identity.load(folder / IDENTITY)
        if identity.name != invitation.member or (invitation.card and identity.card.fingerprint != invitation.card):
            raise ConfigError(
                f"{words.clean(folder, 120)} has the keys of {identity.name} ({identity.card.short}), and this invitation is for other keys"
                f" of {invitation.member}. Give the folder with those, or an empty one if the coordinator invites new keys."
            )
        pending = _pending(folder, invitation)
        if not pending.exists():
            private.write(pending, certificates.key_pem(certificates.new_key()))
        return Entering(invitation, folder, identity, certificates.load_key(pending))

    @property
    def digest(self) -> str:
        """Names this request: the same for the same keys, however often it is sent."""
        return _digest(self.identity.card, self.key.public_key())

    def ask(self, now: datetime) -> bytes:
        """The request, ready to be sent."""
        invitation = self.invitation
        asked = {
            "invitation": invitation.id,
            "token": base64.b64encode(invitation.token).decode(),
            "request": certificates.request(self.key, invitation.member).decode(),
        }
        lasting = min((invitation.expires - now).total_seconds(), MAX_LIFETIME)
        header = _header(invitation.consortium, ASK, now, lasting)
        sealed = seal(json.dumps(asked).encode(), self.identity, [invitation.coordinator], header).message()
        card = json.dumps(self.identity.card.to_json(), separators=(",", ":")).encode()
        return _MAGIC + len(card).to_bytes(4, "little") + card + sealed

    def accept(self, answer: bytes, now: datetime) -> Membership | None:
        """Takes an answer, and completes the folder.

        Returns:
            The membership; ``None`` for an answer to somebody else's request.

        Raises:
            Declined: if the coordinator refuses; the reason is the coordinator's.
            MessageError: if the answer is not the coordinator's, or its certificate is not what was asked for.
            RunError: if the folder cannot be written.
        """
        invitation = self.invitation
        coordinator = invitation.coordinator
        opener = Opener(self.identity, {coordinator.name: coordinator}, invitation.consortium, _MAX_MESSAGE, now=_clock(now))
        try:
            header, payload = opener.open(answer, coordinator.name)
        except Refused as refused:
            # Signed by the coordinator, but long ago, or for somebody else who used the same invitation.
            if refused.why in ("expired", "key"):
                return None
            raise
        values = _object(payload)
        if header.kind != ANSWER or values.get("request") != self.digest:
            return None
        if "refused" in values:
            raise Declined("refused", f"The coordinator of {invitation.consortium} refuses: {words.clean(values['refused'], 400)}")
        pem, urls = values.get("certificate"), values.get("urls")
        if not isinstance(pem, str) or not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
            raise MessageError("The coordinator's answer has no certificate, or no address of the broker.")
        authority = certificates.certificate(invitation.authority.encode())
        held = certificates.require_issued(certificates.certificate(pem.encode()), authority, self.key.public_key(), now)
        if (held.consortium, held.role, held.name) != (invitation.consortium, "member", invitation.member):
            raise MessageError(
                f"The coordinator's answer has a certificate for the {held.role} {held.name} of {held.consortium}, which was not asked for."
            )
        # One file with both, so that a crash cannot leave a key without its certificate.
        private.write(self.folder / CLIENT, certificates.key_pem(self.key) + pem.encode())
        membership = Membership(
            self.folder, invitation.consortium, invitation.member, tuple(urls), invitation.authority, coordinator, invitation.id
        )
        membership.write()
        _pending(self.folder, invitation).unlink(missing_ok=True)
        return membership


def _pending(folder: Path, invitation: Invitation) -> Path:
    """Where the key waits for its certificate."""
    return folder / f"pending-{invitation.id}.key"


# --- the coordinator's half -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An answer, and to whom.

    Args:
        invitation: Id of the invitation of the request.
        data: The sealed answer.
    """

    invitation: str
    data: bytes


class Desk:
    """Answers requests to enter, one at a time.

    Args:
        consortium: The coordinator's folder.
        now: The time.

    Attributes:
        counts: Answers by kind: ``joined``, ``returned``, ``again`` (the same keys asked before), and each kind of refusal.
    """

    def __init__(self, consortium: Consortium, now: Callable[[], datetime] = certificates.now) -> None:
        self.consortium, self._now = consortium, now
        self.counts: Counter[str] = Counter()
        self._written: Counter[str] = Counter()

    def answer(self, data: bytes) -> Answer | None:
        """The answer to a request; what it changes is on disk, and the broker knows it, when this returns.

        Refused are: requests that cannot be read or are not signed by the keys in them (``unreadable``); an invitation that does not exist
        (``unknown``), has another token (``token``), was used with other keys (``used``), was withdrawn (``void``) or expired (``expired``); and keys
        that are not those that it names (``keys``), or that somebody else here has (``taken``). Those of an invitation that exists are written down in the roster.

        Args:
            data: The request.

        Returns:
            ``None`` if nobody can be answered, because the request is unreadable.

        Raises:
            RunError: if the roster cannot be written, or the broker does not follow it. The request may be tried again.
        """
        now = self._now()
        try:
            card, asked, key = self._read(data, now)
        except MessageError:
            self.counts["unreadable"] += 1
            return None
        request = _digest(card, key)
        try:
            values = self._enter(card, key, asked, request, now)
        except Declined as declined:
            values = {"refused": str(declined)}
        answer = json.dumps({"request": request, **values}).encode()
        header = _header(self.consortium.settings.name, ANSWER, now, 86400.0)
        return Answer(asked["invitation"], seal(answer, self.consortium.identity, [card], header).message())

    def _read(self, data: bytes, now: datetime) -> tuple[Card, dict[str, Any], EllipticCurvePublicKey]:
        begin = len(_MAGIC) + 4
        if not begin <= len(data) <= _MAX_MESSAGE or not data.startswith(_MAGIC):
            raise MessageError("This is no request to enter.")
        end = begin + int.from_bytes(data[len(_MAGIC) : begin], "little")
        if not begin < end <= min(len(data), begin + _MAX_CARD):
            raise MessageError("This request to enter has no card.")
        card = Card.from_json(_object(data[begin:end]))
        settings = self.consortium.settings
        opener = Opener(self.consortium.identity, {card.name: card}, settings.name, _MAX_MESSAGE, now=_clock(now))
        header, payload = opener.open(data[end:], card.name)
        asked = _object(payload)
        if header.kind != ASK or not all(isinstance(asked.get(name), str) for name in ("invitation", "token", "request")):
            raise MessageError("This is no request to enter.")
        require_name(asked["invitation"])
        return card, asked, certificates.requested_key(asked["request"].encode())

    def _enter(self, card: Card, key: EllipticCurvePublicKey, asked: dict[str, Any], request: str, now: datetime) -> dict[str, Any]:
        with self.consortium.changing() as members:
            try:
                invited = _require(members, card, asked, request, now)
            except Declined as declined:
                self._decline(members, asked["invitation"], declined, card, now)
                raise
            if invited.used is not None:
                self.counts["again"] += 1
                certificate = members.members[invited.member].certificate
            else:
                self.counts["returned" if invited.member in members.members and invited.card else "joined"] += 1
                certificate = self.consortium.enter(members, invited, now, card=card, key=key, request=request).pem
            # In both cases: a crash may have come before the broker was told.
            self.consortium.apply(now, members)
        return {"certificate": certificate, "member": invited.member, "urls": list(self.consortium.settings.urls)}

    def _decline(self, members: Members, invitation: str, declined: Declined, card: Card, now: datetime) -> None:
        self.counts[declined.why] += 1
        self._written[invitation] += 1
        known = members.invitations.get(invitation)
        # A thief must not fill the disk.
        if known is not None and self._written[invitation] <= _MAX_WRITTEN:
            members.add("refused", now, member=known.member, invitation=invitation, why=declined.why, card=card.fingerprint)


def _require(members: Members, card: Card, asked: dict[str, Any], request: str, now: datetime) -> Invited:
    """The invitation, if this request may use it or has used it."""
    invited = members.invitations.get(asked["invitation"])
    if invited is None:
        raise Declined("unknown", "This invitation is not known here.")
    try:
        token = base64.b64decode(asked["token"], validate=True)
    except (binascii.Error, ValueError):
        token = b""
    # First of all: who does not have the token learns nothing of the invitation.
    if not hmac.compare_digest(token_digest(token), invited.token):
        raise Declined("token", "The token is not that of this invitation.")
    if invited.used is not None and not (invited.request == request and _holds(members, invited, card)):
        raise Declined(
            "used",
            f"This invitation was used on {invited.used:%Y-%m-%d %H:%M} UTC, with other keys. If that was not you, tell the coordinator at once.",
        )
    if invited.withdrawn:
        raise Declined("void", "This invitation was withdrawn. Ask the coordinator for another one.")
    if now >= invited.expires:
        raise Declined("expired", f"This invitation expired on {invited.expires:%Y-%m-%d %H:%M} UTC. Ask the coordinator for another one.")
    if card.name != invited.member or (invited.card and card.fingerprint != invited.card):
        raise Declined("keys", f"This invitation is for other keys, of {invited.member}.")
    others = [members.coordinator, *(member.card for member in members.members.values() if member.name != invited.member)]
    if any(other is not None and other.fingerprint == card.fingerprint for other in others):
        raise Declined("taken", "These keys belong to somebody else in this consortium. Every member makes its own.")
    return invited


def _holds(members: Members, invited: Invited, card: Card) -> bool:
    member = members.members.get(invited.member)
    return member is not None and member.revoked is None and member.card.fingerprint == card.fingerprint


# --- over the broker ------------------------------------------------------------------------------------------------


def entered(invitation: Invitation, folder: Path) -> Membership | None:
    """The membership that came of this very invitation, if it has been used from this folder; a service starts with it again and again.

    Raises:
        ConfigError: if others can enter the folder, or what is in it is damaged.
    """
    if not (folder / MEMBERSHIP).exists():
        return None
    known = Membership.read(folder)
    if known.invitation != invitation.id:
        return None
    # What a crash left.
    _pending(folder, invitation).unlink(missing_ok=True)
    return known


def enter(
    invitation: Invitation, folder: Path, patience: float = 120.0, now: Callable[[], datetime] = certificates.now, again: float = 10.0
) -> Membership:
    """Enters a consortium. If it is cut off, it can be called again with the same folder; if it is done, that asks nobody.

    Args:
        folder: The member's folder; it is made where it is missing.
        patience: Seconds to wait for the coordinator.
        again: Seconds after which the request is sent once more.

    Raises:
        ConfigError: if the invitation and the folder do not go together.
        Declined: if the coordinator refuses.
        MessageError: if an answer is not the coordinator's.
        RunError: if the folder cannot be written; ``Unanswered`` if the coordinator does not answer in time.
        WireError: if the broker cannot be reached; ``LoginRefused`` if it does not let the invitation in.
    """
    from fedfm.wire.nats import Connection

    membership = entered(invitation, folder)
    if membership is not None:
        return membership
    entering = Entering.begin(invitation, folder)
    names, deadline = Names(invitation.consortium), time.monotonic() + patience
    opening = folder / _OPENING
    private.write(opening, invitation.key.encode() + invitation.certificate.encode())
    try:
        context = certificates.client_context(invitation.authority, opening)
    finally:
        opening.unlink()
    with Connection(
        invitation.urls, names.inbox(invitation.id), tls=context, name=f"enrolment {invitation.member}", patience=patience
    ) as line:
        next_ask = 0.0
        while True:
            answer = line.get(names.enrolments, names.answer(invitation.id))
            membership = None if answer is None else entering.accept(answer, now())
            if membership is not None:
                return membership
            if time.monotonic() >= deadline:
                raise Unanswered(
                    f"The coordinator of {invitation.consortium} did not answer within {patience:.0f} s. It answers while fedfm serve runs there. "
                    f"Your keys are kept in {words.clean(folder, 120)}: try again with the same invitation."
                )
            if time.monotonic() >= next_ask:
                line.publish(names.ask(invitation.id), entering.ask(now()))
                next_ask = time.monotonic() + again
            time.sleep(0.05)


class Reception:
    """Takes requests to enter from the broker to the desk, and the answers back.

    Args:
        desk: Answers them.
        connection: The coordinator's.
    """

    def __init__(self, desk: Desk, connection: Connection) -> None:
        self._desk, self._connection = desk, connection
        self._names = desk.consortium.names
        connection.make_stream(self._names.enrolments, _MAX_STORED, max_age=86400.0)
        connection.make_consumer(self._names.enrolments, self._names.asks)

    @property
    def branch(self) -> Branch:
        """Where requests arrive."""
        return self._names.enrolments

    def take(self, delivery: Delivery) -> None:
        """Answers a request, and lets the broker forget it. A crash in between lets it arrive again, and it is answered alike.

        Raises:
            RunError: as :meth:`Desk.answer`.
            WireError: if the answer cannot be sent.
        """
        answer = self._desk.answer(delivery.data)
        if answer is not None:
            self._connection.publish(self._names.answer(answer.invitation), answer.data)
        delivery.acknowledge()


# --- both -----------------------------------------------------------------------------------------------------------


def _header(consortium: str, kind: str, now: datetime, lasting: float) -> Header:
    created = now.timestamp()
    return Header(consortium, JOB, 0, 0, kind, created, created + lasting)


def _clock(now: datetime) -> Callable[[], float]:
    return now.timestamp


def _digest(card: Card, key: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives import serialization

    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.blake2b(bytes.fromhex(card.fingerprint) + encoded, digest_size=32, person=b"fedfm enrol").hexdigest()


def _object(data: bytes) -> dict[str, Any]:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"A message of an enrolment is not JSON ({str(error)[:80]}).") from error
    if not isinstance(value, dict):
        raise MessageError("A message of an enrolment is no JSON object.")
    return value

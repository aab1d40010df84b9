"""Who belongs to a consortium, as its roster tells it: a file that is only added to, each line chained to those before it.

===========  ==========================================================================================================
founded      the consortium began
coordinator  the coordinator has a new certificate
invited      somebody may enter under this name; an earlier invitation for it is void
joined       a new member entered, with keys of its own
returned     a member that was there entered again with the same keys, such as on a new machine; its earlier certificate is void
refused      an invitation was used that does not hold (:meth:`fedfm.silos.enrol.Desk.answer` says which ones are written down)
====
revoked      a member, or an invitation that nobody used yet, is out
left         a member went of its own accord
===========  ==========================================================================================================
====

No secret is in it: of an invitation's token, the digest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fedfm.core.chain import Chain, Line
from fedfm.core.errors import MessageError, RunError
from fedfm.wire.identity import Card
from fedfm.wire.subjects import require_name

ROSTER = "roster.jsonl"
GRACE = timedelta(hours=24)
"""How long a used invitation still opens a connection, so that a member whose answer was lost can ask for it again."""


@dataclass(frozen=True)
class Invited:
    """An invitation, as the coordinator remembers it.

    Args:
        id: 32 hexadecimal digits.
        member: The name under which somebody may enter.
        token: Digest of its token.
        serial: Of the certificate in it.
        expires: From then on it is void.
        card: Fingerprint of the only keys that may use it; empty where they are not known yet.
        used: When somebody entered with it.
        request: Digest of the request that it was used for.
        withdrawn: Whether a later invitation, or a person, made it void.
    """

    id: str
    member: str
    token: str
    serial: int
    expires: datetime
    card: str = ""
    used: datetime | None = None
    request: str = ""
    withdrawn: bool = False

    def opens(self, now: datetime) -> bool:
        """Whether the broker lets its holder in."""
        return not self.withdrawn and now < self.expires and (self.used is None or now < self.used + GRACE)


@dataclass(frozen=True)
class Member:
    """A member.

    Args:
        name: Its slug.
        card: Its public keys.
        serial: Of its certificate.
        certificate: Its certificate, as text.
        expires: When its certificate does.
        since: When it joined first, with these keys.
        revoked: Since when it is out; ``None`` while it belongs.
        left: Whether it went of its own accord.
    """

    name: str
    card: Card
    serial: int
    certificate: str
    expires: datetime
    since: datetime
    revoked: datetime | None = None
    left: bool = False


@dataclass
class Members:
    """What a roster says.

    Attributes:
        consortium: Its slug.
        coordinator: The coordinator's public keys.
        serial: Of the coordinator's certificate.
        expires: When that one does.
        members: By name.
        invitations: By id.
        refused: How many invitations were refused, by member's name.
    """

    path: Path
    consortium: str = ""
    coordinator: Card | None = None
    serial: int = 0
    expires: datetime | None = None
    members: dict[str, Member] = field(default_factory=dict)
    invitations: dict[str, Invited] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def read(path: Path) -> Members:
        """The roster in a file.

        Raises:
            RunError: naming the first line that is not what was written.
        """
        read = Members(path)
        for line in read._chain().lines():
            read._take(line)
        if not read.consortium:
            raise damaged(path, 1, "it does not say which consortium it is of")
        return read

    def add(self, event: str, now: datetime, **what: Any) -> None:
        """Adds a line, durably. One process does so at a time (:meth:`fedfm.silos.consortium.Consortium.changing`).

        Raises:
            RunError: if the file is damaged or cannot be written.
        """
        self._take(self._chain().add(event, time=now.isoformat(), **what))

    def active(self, now: datetime) -> list[Member]:
        """Members that may connect."""
        return [member for member in self.members.values() if member.revoked is None and now < member.expires]

    def open_invitation(self, member: str, now: datetime) -> Invited | None:
        """The invitation with which somebody can still enter under this name."""
        return next((i for i in self.invitations.values() if i.member == member and i.used is None and i.opens(now)), None)

    def table(self, now: datetime) -> list[dict[str, Any]]:
        """A row for each name, as a person reads it: state, dates, fingerprint of the keys, refused uses of its invitations."""
        rows = []
        for name in sorted({*self.members, *(invited.member for invited in self.invitations.values())}):
            member, invited = self.members.get(name), self.open_invitation(name, now)
            row: dict[str, Any] = {
                "member": name,
                "state": "void",
                "since": None,
                "until": None,
                "refused": self.refused[name],
                "keys": None,
            }
            if member is not None:
                out = "left" if member.left else "revoked"
                state = out if member.revoked is not None else "expired" if now >= member.expires else "member"
                until = member.revoked or member.expires
                row |= {"state": state, "since": member.since.isoformat(), "until": until.isoformat(), "keys": member.card.short}
            if invited is not None and row["state"] != "member":
                row |= {"state": "invited", "since": None, "until": invited.expires.isoformat()}
            rows.append(row)
        return rows

    def _chain(self) -> Chain:
        return Chain(self.path, damaged, "roster")

    def _take(self, line: Line) -> None:
        what = line.what
        try:
            if line.event not in _TAKEN:
                raise ValueError(f"the event {line.event!r:.40} is not known to this version of fedfm")
            if (line.number == 1) != (line.event == "founded"):
                raise ValueError("a roster begins with 'founded', once")
            _TAKEN[line.event](self, what, _time(what, "time"))
        except (KeyError, TypeError, ValueError, MessageError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).removesuffix(".")
            raise damaged(self.path, line.number, reason) from error


def damaged(path: Path, number: int, why: str) -> RunError:
    """The error of a line that is not what was written."""
    return RunError(
        f"{path}:{number} is damaged: {why}. Who belongs to the consortium is not known any more, so nobody is let in. Restore the file from a copy."
    )


# --- what each line changes -----------------------------------------------------------------------------------------


def _founded(to: Members, what: Mapping[str, Any], when: datetime) -> None:
    to.consortium, to.coordinator = require_name(what["consortium"]), Card.from_json(what["card"])


def _coordinator(to: Members, what: Mapping[str, Any], when: datetime) -> None:
    to.serial, to.expires = _serial(what), _time(what, "expires")


def _invited(to: Members, what: Mapping[str, Any], when: datetime) -> None:
    member = require_name(what["member"])
    _withdraw(to, member)
    id = require_name(what["invitation"])
    to.invitations[id] = Invited(id, member, _digest(what, "token"), _serial(what), _time(what, "expires"), _text(what, "card"))


def _joined(to: Members, what: Mapping[str, Any], when: datetime) -> None:
    name, invitation = require_name(what["member"]), to.invitations[what["invitation"]]
    if invitation.used is not None or invitation.member != name:
        raise ValueError("it uses an invitation that was used before, or is another member's")
    card = Card.from_json(what["card"])
    old = to.members.get(name)
    since = old.since if old is not None and old.card.fingerprint == card.fingerprint else when
    to.members[name] = Member(name, card, _serial(what), _text(what, "certificate"), _time(what, "expires"), since)
    to.invitations[invitation.id] = replace(invitation, used=when, request=_digest(what, "request"))


def _refused(to: Members, what: Mapping[str, Any], when: datetime) -> None:
    to.refused[require_name(what["member"])] += 1


def _revoked(to: Members, what: Mapping[str, Any], when: datetime) -> None:
    name = require_name(what["member"])
    _withdraw(to, name)
    if name in to.members:
        to.members[name] = replace(to.members[name], revoked=when)


def _left(to: Members, what: Mapping[str, Any], when: datetime) -> None:
    name = require_name(what["member"])
    _withdraw(to, name)
    to.members[name] = replace(to.members[name], revoked=when, left=True)


def _withdraw(to: Members, member: str) -> None:
    for id, invitation in to.invitations.items():
        if invitation.member == member:
            to.invitations[id] = replace(invitation, withdrawn=True)


_TAKEN: Mapping[str, Callable[[Members, Mapping[str, Any], datetime], None]] = {
    "founded": _founded,
    "coordinator": _coordinator,
    "invited": _invited,
    "joined": _joined,
    "returned": _joined,
    "refused": _refused,
    "revoked": _revoked,
    "left": _left,
}


def _text(what: Mapping[str, Any], name: str) -> str:
    if not isinstance(what[name], str):
        raise ValueError(f"its {name!r} is no text")
    return str(what[name])


def _digest(what: Mapping[str, Any], name: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", _text(what, name)):
        raise ValueError(f"its {name!r} is no digest")
    return str(what[name])


def _serial(what: Mapping[str, Any]) -> int:
    # As text: a reader of JSON may round a number of 160 bits.
    return int(_text(what, "serial"), 16)


def _time(what: Mapping[str, Any], name: str) -> datetime:
    when = datetime.fromisoformat(_text(what, name))
    if when.tzinfo is None:
        raise ValueError(f"its {name!r} names no time zone")
    return when

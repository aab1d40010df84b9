"""The one place with names: subjects, streams and consumers at the broker, and who may use which.

::

    fed.<consortium>.down.<member>.message            a request to a member
    fed.<consortium>.down.<member>.chunk.<id>.<i>     a piece of what is too long for one message
    fed.<consortium>.up.<member>.<run>.message        a member's answer; the run by its digest, so that each run takes its own answers alone
    fed.<consortium>.up.<member>.<run>.chunk.<id>.<i>
    fed.<consortium>.body.<id>.message                what many members are asked alike, stored once
    fed.<consortium>.body.<id>.chunk.<i>
    fed.<consortium>.here.<member>.now                a member's last word that it is there, and whether it answers
    fed.<consortium>.here.<member>.leave              that it leaves
    fed.<consortium>.enrol.<invite>.ask               a new member's keys
    fed.<consortium>.enrol.<invite>.answer            its certificate and final name

A stream keeps one branch of them. The coordinator makes streams and consumers; a member needs no right to make anything.

Covered here: what a member may publish, read and subscribe to, as lists for the broker's configuration. Not covered: a broker that does not keep
them. Against that one, messages are signed and sealed. A member chooses the subject on which the broker answers it, and brokers do not check it:
it can put the broker's answers where it may not publish. Receivers refuse them, because they are not signed by the sender that the subject names.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from fedfm.core.errors import MessageError

_NAME = re.compile(r"[a-z0-9-]{1,40}")
_ID = re.compile(r"[0-9a-f]{32}")
CONSUMER = "inbox"
"""The durable consumer of each stream of messages."""


def require_name(name: object) -> str:
    """The name, if it is a slug: lower-case letters, digits and hyphens, at most 40.

    Raises:
        MessageError: if it is something else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MessageError(f"{_shown(name)} is no name; a name has 1 to 40 letters a-z, digits and hyphens.")
    return name


def require_id(value: object) -> str:
    """The id of a transfer, 32 hexadecimal digits.

    Raises:
        MessageError: if it is something else.
    """
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise MessageError(f"{_shown(value)} is no id of a transfer, which has 32 hexadecimal digits.")
    return value


def _shown(value: object) -> str:
    # What is nested may be nested too deep to be shown.
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else f"A {type(value).__name__}"


@dataclass(frozen=True)
class Branch:
    """Subjects that one stream keeps: messages, and the chunks of those that are long.

    Args:
        stream: Name of the stream.
        root: What its subjects begin with.
        consumer: Name of the durable consumer of its messages.
    """

    stream: str
    root: str
    consumer: str = CONSUMER

    def of(self, job: str) -> Branch:
        """The part of it that belongs to one run: whoever takes its messages takes no other run's."""
        name = hashlib.blake2b(job.encode(), digest_size=16, person=b"fedfm run").hexdigest()
        return Branch(self.stream, f"{self.root}.{name}", name)

    @property
    def all(self) -> str:
        """All subjects of the stream."""
        return f"{self.root}.>"

    @property
    def message(self) -> str:
        """Where messages are published."""
        return f"{self.root}.message"

    def head(self, id: str) -> str:
        """Where a message is published that is looked up by its id."""
        return f"{self.root}.head.{require_id(id)}"

    def chunk(self, id: str, index: int) -> str:
        """Where chunk ``index`` of a transfer is."""
        return f"{self.chunks(id).removesuffix('>')}{index}"

    def chunks(self, id: str) -> str:
        """All chunks of a transfer."""
        return f"{self.root}.chunk.{require_id(id)}.>"

    def index(self, subject: str) -> int | None:
        """The number of the chunk that is at ``subject``; ``None`` where that is no chunk."""
        last = subject.rpartition(".")[2]
        return int(last) if len(last) <= 9 and last.isascii() and last.isdigit() else None

    @property
    def get(self) -> str:
        """Where the broker is asked for one stored subject of it."""
        return f"$JS.API.DIRECT.GET.{self.stream}.{self.root}.>"

    @property
    def info(self) -> str:
        """Where the broker is asked which subjects the stream holds."""
        return f"$JS.API.STREAM.INFO.{self.stream}"

    @property
    def next(self) -> str:
        """Where the next message is asked for."""
        return f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self.consumer}"

    @property
    def acknowledge(self) -> str:
        """Where messages are acknowledged."""
        return f"$JS.ACK.{self.stream}.{self.consumer}.>"


@dataclass(frozen=True)
class Rights:
    """What a broker lets somebody do; all else is refused.

    Args:
        publish: Subjects it may publish to.
        subscribe: Subjects it may read.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


@dataclass(frozen=True)
class Names:
    """The names of one consortium.

    Args:
        consortium: Its slug.

    Raises:
        MessageError: if it is no slug.

    Example:
        >>> Names("nightingale").up("st-marys").message
        'fed.nightingale.up.st-marys.message'
    """

    consortium: str

    def __post_init__(self) -> None:
        require_name(self.consortium)

    def down(self, member: str) -> Branch:
        """What a member is sent."""
        return Branch(f"{self._streams}DOWN_{require_name(member)}", f"{self._root}.down.{member}")

    def up(self, member: str) -> Branch:
        """What a member sends."""
        return Branch(f"{self._streams}UP_{require_name(member)}", f"{self._root}.up.{member}")

    @property
    def bodies(self) -> Branch:
        """What many members are asked alike. A body is stored once, under its id."""
        return Branch(f"{self._streams}BODY", f"{self._root}.body")

    @property
    def presences(self) -> Branch:
        """What each member said last of itself: the stream, which the coordinator reads."""
        return Branch(f"{self._streams}HERE", f"{self._root}.here")

    def here(self, member: str) -> str:
        """Where a member says now and then that it is there."""
        return f"{self._root}.here.{require_name(member)}.now"

    def leave(self, member: str) -> str:
        """Where a member says that it leaves."""
        return f"{self._root}.here.{require_name(member)}.leave"

    @property
    def enrolments(self) -> Branch:
        """All enrolments: the stream, which the coordinator reads."""
        return Branch(f"{self._streams}ENROL", f"{self._root}.enrol")

    def ask(self, invite: str) -> str:
        """Where a new member sends its keys."""
        return f"{self._root}.enrol.{require_name(invite)}.ask"

    def answer(self, invite: str) -> str:
        """Where it finds the coordinator's answer."""
        return f"{self._root}.enrol.{require_name(invite)}.answer"

    @property
    def asks(self) -> str:
        """The requests of all new members."""
        return f"{self._root}.enrol.*.ask"

    def inbox(self, name: str) -> str:
        """The prefix of the subjects on which the broker answers somebody."""
        return f"_INBOX.{self.consortium}.{require_name(name)}"

    def member_rights(self, member: str) -> Rights:
        """What a member may do: send, read what it is sent, and nothing of anybody else's."""
        up, down, bodies = self.up(member), self.down(member), self.bodies
        presence = (self.here(member), self.leave(member))
        publish = (up.all, up.info, up.get, down.next, down.acknowledge, down.get, bodies.get, *presence)
        return Rights(publish, (f"{self.inbox(member)}.>",))

    def enrolment_rights(self, invite: str) -> Rights:
        """What somebody with an invitation may do: ask once, and read the answer."""
        answer = f"$JS.API.DIRECT.GET.{self.enrolments.stream}.{self.answer(invite)}"
        return Rights((self.ask(invite), answer), (f"{self.inbox(invite)}.>",))

    def coordinator_rights(self, coordinator: str) -> Rights:
        """What the coordinator may do: everything in its consortium."""
        return Rights((f"{self._root}.>", "$JS.API.>", "$JS.ACK.>"), (f"{self._root}.>", f"{self.inbox(coordinator)}.>"))

    @property
    def _root(self) -> str:
        return f"fed.{self.consortium}"

    @property
    def _streams(self) -> str:
        # Several consortia may share a broker. A slug has no underscore, so no two names meet.
        return f"fed_{self.consortium}_"

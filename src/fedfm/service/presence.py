"""Who is there: what a member says of itself now and then, and what the coordinator keeps of it.

A member says, every ``BEAT`` seconds and whenever it changes, that it is there, with which version, what it works on and whether it is paused. The word
is signed, sealed to the coordinator, and expires soon. The broker keeps the last one of each member. The coordinator looks at them and keeps
``presence.json`` in its folder, which ``fedfm status`` shows. A member that leaves says so in the same way, in a word that lasts.

Covered here: a word that is forged, of another member, or older than the last one is dropped and counted; a member that leaves with a certificate that
was replaced meanwhile leaves nothing. Not covered: whether a word is true. What a member says of itself is shown to people, and decides nothing.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm.core import words
from fedfm.core.errors import FedfmError, MessageError
from fedfm.core.version import VERSION as RELEASE
from fedfm.silos import certificates
from fedfm.wire.envelope import MAX_LIFETIME, Header, Opener, seal
from fedfm.wire.refusal import Refused, reason

if TYPE_CHECKING:
    from fedfm.silos.consortium import Consortium
    from fedfm.wire.link import Link
    from fedfm.wire.nats import Connection

log = logging.getLogger(__name__)
PRESENCE = "presence.json"
JOB, HERE, LEAVE = "presence", "here", "leave"
BEAT = 10.0
"""Seconds between two words of a member."""
AWAY = 3 * BEAT + 5.0
"""Seconds without a word after which a member counts as away."""
_LASTING, _MAX_WORD, _PATIENCE = 60.0, 1 << 14, 5.0
# Between two looks at whether there is something to say, and after a word that the broker did not take.
_LOOK, _AGAIN = 0.5, 3.0


@dataclass(frozen=True)
class Word:
    """What a member says of itself.

    Args:
        release: Version of fedfm.
        talk: Version of what coordinator and member say to each other.
        paused: Since when it is paused, ISO 8601; empty where it is not.
        run: The run that it works for; empty where it waits.
        verb: What it does there.
        round: In which round.
        dropped: Messages that it did not take, by kind.
    """

    release: str = RELEASE
    talk: int = 0
    paused: str = ""
    run: str = ""
    verb: str = ""
    round: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    def pack(self) -> bytes:
        """As it travels."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def unpack(data: bytes) -> Word:
        """Undoes :meth:`pack`; texts are cleaned and cut, because people read them.

        Raises:
            MessageError: if it is something else.
        """
        values = _object(data)
        try:
            texts = {name: words.clean(_typed(values[name], str), 80) for name in ("release", "paused", "run", "verb")}
            dropped = {words.clean(why, 20): _typed(number, int) for why, number in _typed(values["dropped"], dict).items()}
            return Word(talk=_typed(values["talk"], int), round=_typed(values["round"], int), dropped=dropped, **texts)
        except (KeyError, ValueError) as error:
            raise MessageError(f"A member's word of itself cannot be read ({error}).") from error


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _object(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MessageError("A member's word of itself is not JSON.") from error
    if not isinstance(values, dict):
        raise MessageError("A member's word of itself is no object.")
    return values


# --- the member's half ----------------------------------------------------------------------------------------------


class Voice:
    """Says now and then that a member is there, in a thread of its own, because a member works for hours.

    Args:
        link: The member's.
        connection: Its connection.
        word: What there is to say now.
        beat: Seconds between two words where nothing changes.
    """

    def __init__(self, link: Link, connection: Connection, word: Callable[[], Word], beat: float = BEAT) -> None:
        self._link, self._connection, self._word, self._beat = link, connection, word, beat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedfm-presence", daemon=True)

    def __enter__(self) -> Voice:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        said, last = -self._beat, Word(release="")
        pause = 0.0
        while not self._stop.wait(pause):
            pause = _LOOK
            try:
                word = self._word()
                if word != last or time.monotonic() >= said + self._beat:
                    say(self._link, self._connection, self._link.names.here(self._link.me.name), HERE, word.pack(), _LASTING)
                    said, last = time.monotonic(), word
            except FedfmError as error:
                # A pause that cannot be read is the guard's to refuse; a broker that is away hears of us when it is back.
                log.debug("nothing could be said: %s", error)
                pause = _AGAIN


def say(link: Link, connection: Connection, subject: str, kind: str, payload: bytes, lasting: float) -> None:
    """Puts a word of a member where the coordinator looks.

    Raises:
        WireError: if the broker cannot be used.
    """
    (coordinator,) = link.peers().values()
    header = Header.now(link.consortium, JOB, 0, 0, kind, lasting)
    connection.publish(subject, seal(payload, link.me, [coordinator], header).message(), patience=_PATIENCE)


def say_goodbye(link: Link, connection: Connection, serial: int) -> None:
    """Tells the coordinator that this member leaves. The word waits for a coordinator that is away.

    Args:
        serial: Number of the certificate with which it leaves; a later one, of a member that entered again, is not meant.

    Raises:
        WireError: if the broker cannot be used.
    """
    payload = json.dumps({"serial": f"{serial:x}"}).encode()
    say(link, connection, link.names.leave(link.me.name), LEAVE, payload, MAX_LIFETIME)


# --- the coordinator's half -----------------------------------------------------------------------------------------


class Attendance:
    """What the members said last, kept in ``presence.json``.

    Args:
        consortium: The coordinator's folder.
        connection: The coordinator's connection.
    """

    def __init__(self, consortium: Consortium, connection: Connection) -> None:
        self._consortium, self._connection, self._names = consortium, connection, consortium.names
        known = read(consortium.folder)
        self._members: dict[str, dict[str, Any]] = known.get("members", {})
        self._dropped = Counter[str](known.get("dropped", {}))
        self._heard: dict[str, bytes] = {}
        self._is_first = True

    def look(self) -> None:
        """Takes what is new, lets members go that said that they leave, and writes it down.

        Raises:
            RunError: if the roster cannot be read or written.
            WireError: if the broker cannot be used.
        """
        cards = self._consortium.cards()
        opener = Opener(self._consortium.identity, cards, self._consortium.settings.name, _MAX_WORD)
        leaving = self._connection.held(self._names.presences, f"{self._names.presences.root}.*.leave")
        for name in cards:
            self._hear(name, opener)
            if self._names.leave(name) in leaving:
                self._let_go(name, opener)
        self._members = {name: known for name, known in self._members.items() if name in cards}
        write(self._consortium.folder, {"time": time.time(), "members": self._members, "dropped": dict(self._dropped)})
        self._is_first = False

    def _hear(self, name: str, opener: Opener) -> None:
        data = self._connection.get(self._names.presences, self._names.here(name))
        if data is None or data == self._heard.get(name):
            return
        self._heard[name] = data
        last = self._members.get(name, {})
        try:
            header, payload = opener.open(data, name)
            if header.kind != HERE or header.job != JOB:
                raise MessageError(f"{name} said a {header.kind} where a word of its presence was expected.")
            if header.created < last.get("created", 0.0):
                raise Refused("replay", f"A word of {name} arrived that is older than its last one.")
            word = asdict(Word.unpack(payload))
        except MessageError as error:
            self._drop(name, error)
            return
        # A word that was here before we looked was said some time ago; one that came since is of this moment, whatever the member's clock says.
        seen = min(header.created, time.time()) if self._is_first else time.time()
        self._members[name] = {"seen": seen, "created": header.created, **word}

    def _drop(self, name: str, error: MessageError) -> None:
        why = reason(error)
        if self._is_first and why == "expired":
            return
        self._dropped[why] += 1
        log.info("a word of %s was dropped (%s): %s", name, why, error)
        if why == "version":
            # It cannot be read, so its reason alone says who speaks another version.
            self._members[name] = {**self._members.get(name, {}), "version": words.clean(error, 200)}

    def _let_go(self, name: str, opener: Opener) -> None:
        """Takes a member that leaves off the roster and the broker."""
        subject = self._names.leave(name)
        data = self._connection.get(self._names.presences, subject)
        if data is None:
            return
        try:
            header, payload = opener.open(data, name)
            serial = _object(payload).get("serial")
            if header.kind != LEAVE or header.job != JOB or not isinstance(serial, str):
                raise MessageError(f"{name} said a {header.kind} where it was expected to say that it leaves.")
            if self._consortium.let_go(name, serial, certificates.now()):
                log.warning("%s has left the consortium", name)
        except MessageError as error:
            self._drop(name, error)
        self._connection.purge(self._names.presences, subject)


def read(folder: Path) -> dict[str, Any]:
    """What is known of who is there; empty where nothing was ever heard."""
    try:
        known = json.loads((folder / PRESENCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def write(folder: Path, known: Mapping[str, Any]) -> None:
    """Writes it down for those who look on; nothing else depends on it, so it is not synced."""
    temporary = folder / f".{PRESENCE}.tmp"
    with suppress(OSError):
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.chmod(0o600)
        temporary.replace(folder / PRESENCE)

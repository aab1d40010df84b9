"""Files that a member lacks: handed out by the coordinator in parts, each stored once at the broker for all who may read it, and freed again.

A member asks for a part of a file by the file's digest. The coordinator seals the part to all members and stores it under a name that both can compute; the
member looks there until it has it, and asks again now and then. At most a few parts are at the broker at a time, whatever the size of the file.

Covered here: asking for what was not named; asking without end; a part of another run, another file, or another size. The whole file is verified by its
digest when it is complete. Not covered: a member that is not allowed to have the base: whoever belongs may.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedfm.core import words
from fedfm.core.errors import MessageError, WireError
from fedfm.wire.envelope import Header, Opener, Payload, seal
from fedfm.wire.refusal import Refused
from fedfm.wire.stored import Stored
from fedfm.wire.transfer import receive

if TYPE_CHECKING:
    from fedfm.wire.link import Link
    from fedfm.wire.nats import Connection

log = logging.getLogger(__name__)
ASK, PART = "ask-part", "part"
_SIZE, _KEPT, _ASKS, _LONGEST = 64 << 20, 3, 50, 1 << 10
# Seconds: between two looks for a part, after which it is asked for again.
_LOOK, _AGAIN = 0.2, 5.0


def part_id(job: str, digest: str, index: int) -> str:
    """Where a part is found."""
    return hashlib.blake2b(f"{job}/{digest}/{index}".encode(), digest_size=16).hexdigest()


class HandOut:
    """The coordinator's side: files by their digests.

    Args:
        paths: The files that members may ask for.
        store: Seals a payload to all members and stores it under a name; who can read it.
        free: Deletes what is stored under a name.
    """

    def __init__(self, paths: Mapping[str, Path], store: Callable[[str, Payload], frozenset[str]], free: Callable[[str], None]) -> None:
        self._paths, self._store, self._free = dict(paths), store, free
        self._kept: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._asked: Counter[tuple[str, str]] = Counter()

    def answer(self, job: str, member: str, payload: bytes) -> None:
        """Stores the part that a member asks for, where it is not there for that member.

        Raises:
            MessageError: if it asks for what there is not, or too often.
            WireError: if the broker cannot be used.
        """
        if len(payload) > _LONGEST:
            raise MessageError(f"A question for a part of a file has {len(payload)} bytes; at most {_LONGEST} are allowed.")
        try:
            digest, index = json.loads(payload)
            path = self._paths[digest]
            # Its type comes first: a text times a size would fill the memory.
            if type(index) is not int or not 0 <= index * _SIZE < path.stat().st_size:
                raise ValueError("no such part")
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, OSError) as error:
            raise MessageError(f"{member} asks for a part of a file that there is not: {words.clean(error, 80)}.") from error
        id = part_id(job, digest, index)
        self._asked[member, id] += 1
        if self._asked[member, id] > _ASKS:
            raise MessageError(f"{member} asked {_ASKS} times for one part of {path.name}.")
        if member in self._kept.get(id, frozenset()):
            self._kept.move_to_end(id)
            return
        for old in [id] if id in self._kept else list(self._kept)[: max(0, len(self._kept) + 1 - _KEPT)]:
            self._drop(old)
        with path.open("rb") as file:
            file.seek(index * _SIZE)
            data = file.read(_SIZE)
        self._kept[id] = self._store(id, data)
        log.info("%s: part %d of %d is handed out", path.name, index + 1, -(-path.stat().st_size // _SIZE))

    def close(self) -> None:
        """Frees all of it."""
        for id in list(self._kept):
            self._drop(id)

    def _drop(self, id: str) -> None:
        del self._kept[id]
        self._free(id)


@dataclass(frozen=True)
class Fetcher:
    """A member's side.

    Args:
        link: Who the member is, and who the coordinator.
        coordinator: The coordinator's name.
        asked: The header of the request that needs the file.
        connection: To the broker.
        patience: Seconds that one part may take.
    """

    link: Link
    coordinator: str
    asked: Header
    connection: Connection
    patience: float = 3600.0

    def fetch(self, digest: str, size: int, path: Path) -> None:
        """Writes a file part by part; whole parts that are there already are kept.

        Raises:
            WireError: if a part does not come in time.
            Refused: if one is not what was asked for.
            OSError: if it cannot be written.
        """
        path.touch()
        begun = path.stat().st_size // _SIZE
        with path.open("r+b") as file:
            for index in range(begun, -(-size // _SIZE)):
                file.truncate(index * _SIZE)
                file.seek(index * _SIZE)
                for piece in self._part(digest, index, min(_SIZE, size - index * _SIZE)):
                    file.write(piece)
                file.flush()
                log.info("%s of %s of %s are here", words.size(min((index + 1) * _SIZE, size)), words.size(size), path.name)

    def _part(self, digest: str, index: int, size: int) -> list[bytes]:
        """One part; held in memory until all of it is verified, so that a file never holds half a part."""
        id, until, again = part_id(self.asked.job, digest, index), time.monotonic() + self.patience, 0.0
        bodies, opener = self.link.names.bodies, Opener(self.link.me, self.link.peers(), self.link.consortium, _SIZE)
        while time.monotonic() < until:
            data = self.connection.get(bodies, bodies.head(id), self.patience)
            try:
                if data is not None:
                    envelope = opener.read(data, sender=self.coordinator)
                    header = envelope.header
                    if (header.kind, header.job, header.size) != (PART, self.asked.job, size):
                        raise MessageError(f"Part {index} of a file is of another run, or has {header.size} bytes instead of {size}.")
                    return list(receive(envelope, Stored(self.connection, bodies, patience=self.patience)))
            except Refused as error:
                # It was sealed before this member came, or is being freed: it is asked for anew.
                log.info("a part is asked for again: %s", error)
            if time.monotonic() >= again:
                self._ask(digest, index)
                again = time.monotonic() + _AGAIN
            time.sleep(_LOOK)
        raise WireError(f"The coordinator gave no part {index} of a file of the base in {self.patience:.0f} s.")

    def _ask(self, digest: str, index: int) -> None:
        me, asked = self.link.me, self.asked
        header = Header.now(self.link.consortium, asked.job, asked.round, asked.sequence, ASK, 600.0)
        sealed = seal(json.dumps([digest, index]).encode(), me, [self.link.peers()[self.coordinator]], header)
        self.connection.publish(self.link.names.up(me.name).of(asked.job).message, sealed.message(), patience=self.patience)

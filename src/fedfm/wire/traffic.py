"""Who was asked, who has answered, how long it took and how much it was: ``traffic.json`` in the run's folder, for ``fedfm status``.

It is for people who look on. It is written at most every half second, without syncing, and nothing depends on it: a run without it goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedfm.core import words

TRAFFIC = "traffic.json"
# Seconds between two writes.
_PAUSE = 0.5


class Traffic:
    """What passed between the coordinator and each member of a run.

    Args:
        path: Where it is noted; ``None`` for nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        known = {} if path is None else read(path)
        self._members: dict[str, dict[str, Any]] = known.get("members", {})
        self._dropped: dict[str, int] = known.get("dropped", {})
        self._written = 0.0
        self._asked: dict[tuple[str, str, int], float] = {}

    def asked(self, member: str, verb: str, round: int, size: int) -> None:
        """A request was sent.

        Args:
            size: Bytes of the request, with the body that several members share.
        """
        known = self._members.setdefault(member, {"seconds": {}, "bytes_up": 0, "bytes_down": 0})
        self._asked[member, verb, round] = time.monotonic()
        known |= {"verb": verb, "round": round, "waiting": True, "failure": ""}
        known["bytes_down"] += size

    def answered(self, member: str, verb: str, round: int, size: int = 0, failure: str = "") -> None:
        """An answer is here, or none comes.

        Args:
            size: Bytes of the answer.
            failure: Why it is none; empty for an answer that counts.
        """
        known = self._members.get(member)
        if known is None:
            return
        began = self._asked.pop((member, verb, round), None)
        known["bytes_up"] += size
        if (known.get("verb"), known.get("round")) == (verb, round):
            known["waiting"] = False
        if failure:
            known["failure"] = words.clean(failure, 200)
        elif began is not None:
            seconds = time.monotonic() - began
            known["seconds"][verb] = {"round": round, "seconds": float(f"{seconds:.4g}")}

    def write(self, dropped: Mapping[str, int], at_once: bool = False) -> None:
        """Writes it down, unless it was a moment ago.

        Args:
            dropped: Messages of this session that were not taken, by the reason.
            at_once: Whether it is written in any case.
        """
        now = time.monotonic()
        if self._path is None or not (at_once or now >= self._written + _PAUSE):
            return
        self._written = now
        every = {why: self._dropped.get(why, 0) + dropped.get(why, 0) for why in sorted({*self._dropped, *dropped})}
        text = json.dumps({"time": time.time(), "members": self._members, "dropped": every})
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        # Nobody's work depends on it.
        with suppress(OSError):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._path)


def read(path: Path) -> dict[str, Any]:
    """What was noted last; empty where that is nothing."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}

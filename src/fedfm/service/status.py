"""What ``fedfm status`` shows: who is there, what runs, how fast, and what was dropped. Read from the coordinator's folder, without torch and without the network.

Covered here: a folder whose coordinator is down (who was seen last, and when). Not covered: what a policy keeps at home; a number that nobody sent is left out.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedfm.core import words
from fedfm.core.errors import RunError
from fedfm.core.journal import METRICS
from fedfm.service import presence
from fedfm.service.jobs import Job, is_served, jobs
from fedfm.silos.consortium import Consortium
from fedfm.wire import traffic

# Rounds over which seconds are averaged, and bytes of the end of the metrics that are read for them.
_ROUNDS, _TAIL = 5, 8 << 20
# Runs that are over and shown to a person.
_OVER = 3


def look(folder: Path) -> dict[str, Any]:
    """Who belongs and is there, and what runs, as one object.

    Raises:
        ConfigError: if there is no consortium in the folder.
        RunError: if its roster is damaged.
    """
    consortium = Consortium.open(folder)
    known = presence.read(folder)
    serving = is_served(folder)
    is_own = consortium.settings.broker == "own"
    told = [_job(job) for job in jobs(folder)]
    dropped = Counter[str](known.get("dropped", {}))
    for job in told:
        dropped.update(job["dropped"])
    members = known.get("members", {})
    return {
        "consortium": consortium.settings.name,
        "serving": serving,
        "broker": (consortium.broker.process() is not None) if is_own else None,
        "members": [_member(name, members.get(name, {}), serving) for name in sorted(consortium.cards())],
        "jobs": told,
        "dropped": dict(sorted(dropped.items())),
    }


def _member(name: str, known: Mapping[str, Any], serving: bool) -> dict[str, Any]:
    seen = known.get("seen")
    is_here = serving and seen is not None and time.time() - seen < presence.AWAY
    state = "never seen" if seen is None else "away" if not is_here else "paused" if known.get("paused") else "here"
    if "version" in known:
        state = "other version"
    work = {name: known[name] for name in ("run", "verb", "round")} if is_here and known.get("run") else None
    return {
        "member": name,
        "state": state,
        "last_seen": None if seen is None else datetime.fromtimestamp(seen, UTC).isoformat(timespec="seconds"),
        "version": known.get("release"),
        "problem": known.get("version", ""),
        "paused": known.get("paused") or None,
        "work": work,
        "dropped": known.get("dropped", {}),
    }


def _job(job: Job) -> dict[str, Any]:
    try:
        state, (done, rounds) = job.state, job.rounds
    except RunError as error:
        # One damaged run must not hide the others.
        return {"name": job.name, "state": "damaged", "round": 0, "rounds": 0, "failure": str(error), "dropped": {}, "members": {}}
    passed = traffic.read(job.run / traffic.TRAFFIC)
    members = {
        name: {
            "seconds": _seconds(known),
            "waiting": bool(known.get("waiting")) and state == "running",
            "failure": known.get("failure", ""),
        }
        | {size: known.get(size, 0) for size in ("bytes_up", "bytes_down")}
        for name, known in passed.get("members", {}).items()
    }
    return {
        "name": job.name,
        "state": state,
        "round": done,
        "rounds": rounds,
        "failure": job.failure,
        **_speed(job.run / METRICS),
        "members": members,
        "dropped": passed.get("dropped", {}),
    }


def _seconds(known: Mapping[str, Any]) -> float | None:
    """How long a member took for its last round of training; of whatever it was asked, where it was asked for no training."""
    every = known.get("seconds", {})
    last = every.get("train") or (list(every.values())[-1] if every else None)
    return None if last is None else last["seconds"]


def _speed(path: Path) -> dict[str, Any]:
    """Of the last rounds: seconds of one; of the last one: tokens or rows a second while members worked, and bytes both ways."""
    records = [record for record in _tail(path) if record.get("round", 0) > 0][-_ROUNDS:]
    speed: dict[str, Any] = {"seconds_a_round": None, "tokens_a_second": None, "rows_a_second": None, "bytes_up": None, "bytes_down": None}
    if not records:
        return speed
    speed["seconds_a_round"] = sum(sum(record["seconds"].values()) for record in records) / len(records)
    last = records[-1]
    speed |= {name: last.get(name) for name in ("bytes_up", "bytes_down")}
    worked = last["seconds"].get("train", 0.0)
    for name, count in (("tokens_a_second", "tokens"), ("rows_a_second", "examples")):
        # A count that an owner keeps at home is 0 or missing.
        total = sum(words.number(numbers.get(count)) or 0.0 for numbers in last.get("clients", {}).values())
        if worked > 0 and total > 0:
            speed[name] = total / worked
    return speed


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last records of a run that can be read."""
    try:
        with path.open("rb") as file:
            begin = max(0, path.stat().st_size - _TAIL)
            file.seek(begin)
            lines = file.read().split(b"\n")[1 if begin else 0 : -1]
        return [json.loads(line) for line in lines[-_ROUNDS:]]
    except (OSError, ValueError):
        return []


# --- in words -------------------------------------------------------------------------------------------------------


def in_words(status: Mapping[str, Any]) -> list[str]:
    """The lines that a person reads."""
    broker = {True: ", its broker runs", False: ", its broker does not run", None: ""}[status["broker"]]
    lines = [f"{status['consortium']}: the coordinator is {'up' if status['serving'] else 'down'}{broker}.", ""]
    lines += [f"{'member':<24}{'state':<14}{'last seen':<18}{'version':<10}works on"] if status["members"] else ["Nobody has entered yet."]
    lines += [_member_line(member) for member in status["members"]]
    over = [job for job in status["jobs"] if job["state"] in ("finished", "failed")]
    shown = [job for job in status["jobs"] if job not in over[:-_OVER]]
    if len(shown) < len(status["jobs"]):
        lines += ["", f"{len(status['jobs']) - len(shown)} earlier runs are over (--json shows them)."]
    for job in shown:
        lines += ["", *_job_lines(job)]
    if status["dropped"]:
        lines += ["", "Messages that were dropped: " + ", ".join(f"{why} {number}" for why, number in status["dropped"].items())]
    return [words.clean(line, 300) for line in lines]


def _member_line(member: Mapping[str, Any]) -> str:
    work = member["work"]
    doing = f"{work['verb']}, round {work['round']} of {work['run']}" if work else ""
    if member["paused"]:
        doing = f"paused since {_local(member['paused'])}"
    return f"{member['member']:<24}{member['state']:<14}{_ago(member['last_seen']):<18}{member['version'] or '-':<10}{member['problem'] or doing}".rstrip()


def _job_lines(job: Mapping[str, Any]) -> list[str]:
    lines = [f"{job['name']}  {job['state']}, round {job['round']} of {job['rounds']}  {job['failure'][:200]}".rstrip()]
    if job.get("seconds_a_round") is not None:
        rate = [
            f"{words.count(job[name])} {what} a second"
            for name, what in (("tokens_a_second", "tokens"), ("rows_a_second", "rows"))
            if job[name] is not None
        ]
        sizes = f"{words.size(job['bytes_up'])} up, {words.size(job['bytes_down'])} down"
        lines.append("  " + ", ".join([f"{words.duration(job['seconds_a_round'])} a round", *rate, sizes]))
    if job["state"] == "running":
        waiting = [name for name, member in job["members"].items() if member["waiting"]]
        lines += [f"  waits for {words.listed(waiting, 8)}"] if waiting else []
        took = [f"{name} {words.duration(member['seconds'])}" for name, member in job["members"].items() if member["seconds"] is not None]
        lines += [f"  last work of each: {', '.join(took)}"] if took else []
        lines += [f"  {name}: {member['failure']}" for name, member in job["members"].items() if member["failure"]]
    return lines


def _ago(seen: str | None) -> str:
    return "-" if seen is None else f"{words.duration(max(0.0, time.time() - datetime.fromisoformat(seen).timestamp()))} ago"


def _local(when: str) -> str:
    try:
        return f"{datetime.fromisoformat(when).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return when

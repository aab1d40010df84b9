"""``fedfm pause`` and ``fedfm leave``: what an owner does with its own membership."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path

from fedfm.cli.parts import show_json
from fedfm.client import pause as pauses
from fedfm.core import words
from fedfm.core.errors import ConfigError, RunError, WireError
from fedfm.service import home, presence
from fedfm.silos import certificates, private
from fedfm.silos.membership import CLIENT, Membership

# Seconds: until the broker is given up, that the coordinator may take to let a member go, that the member's process may take to end.
_BROKER, _COORDINATOR, _PROCESS = 15.0, 15.0, 5.0


def pause(folder: Path, resume: bool, as_json: bool) -> None:
    """``fedfm pause``.

    Raises:
        ConfigError: if there is no membership in the folder.
        RunError: if it cannot be written.
    """
    membership = Membership.read(folder)
    changed = pauses.end(folder) if resume else pauses.begin(folder, _now())
    is_running = home.is_running(folder)
    if changed and not is_running:
        _note_pause(membership)
    since = pauses.since(folder)
    if as_json:
        show_json({"member": membership.member, "paused": since.isoformat() if since else None, "changed": changed, "running": is_running})
        return
    if resume:
        print(f"{membership.member} answers {'again' if changed else 'already; it was not paused'}.")
    else:
        print(
            f"{membership.member} is paused since {since:%Y-%m-%d %H:%M}: nothing leaves. The coordinator is told when it asks, and goes on without it."
        )
        print(f"End the pause: fedfm pause {folder} --resume")
    if not is_running:
        print(f"No process answers for {folder} at the moment; fedfm join {folder} --data FILE starts it.")


def leave(folder: Path, delete: bool, yes: bool, as_json: bool) -> None:
    """``fedfm leave``.

    Raises:
        ConfigError: if there is no membership in the folder, or nobody confirms that it is deleted.
        RunError: if it cannot be written.
        WireError: if the broker cannot be reached; nothing has changed then.
    """
    membership = Membership.read(folder)
    if delete and not yes:
        _confirm(membership)
    told = home.has_left(folder) or _say_goodbye(membership)
    is_running = _await_end(folder)
    if not is_running:
        _note_leave(membership)
    deleted = home.delete(folder) if delete and not is_running else []
    if as_json:
        show_json({"member": membership.member, "left": True, "coordinator_knows": told, "running": is_running, "deleted": deleted})
        return
    where = membership.consortium
    print(
        f"{membership.member} has left {where}."
        if told
        else f"{membership.member} leaves {where}; its coordinator is away and takes it off the roster when it is back."
    )
    if is_running:
        again = f", and then delete: fedfm leave {folder} --delete" if delete else ""
        print(f"The member's process still works, and ends when that is done. Stop it, or wait{again}")
    elif deleted:
        print(f"Deleted: {', '.join(deleted)}. The owner's log stays: fedfm log {folder}")
    else:
        print(f"Keys, memory of runs and copies of rows are still in {folder}; delete them: fedfm leave {folder} --delete")


def _say_goodbye(membership: Membership) -> bool:
    """Tells the coordinator; whether it has let the member go."""
    from fedfm.wire.nats import LoginRefused

    folder, link = membership.folder, membership.link()
    serial = certificates.certificate(private.read(folder / CLIENT)).serial_number
    try:
        with link.connect(_BROKER) as connection:
            presence.say_goodbye(link, connection, serial)
            # From here on it is said, and its own process ends.
            home.leave(folder, _now())
            until = time.monotonic() + _COORDINATOR
            while time.monotonic() < until:
                if not connection.is_connected:
                    # The broker has cut it off: the next attempt is refused.
                    connection.held(link.names.up(membership.member), link.names.up(membership.member).all, patience=2.0)
                time.sleep(0.2)
    except LoginRefused:
        home.leave(folder, _now())
        return True
    except WireError:
        if not home.has_left(folder):
            raise
    return False


def _await_end(folder: Path) -> bool:
    """Whether the member's process still runs, after a while."""
    until = time.monotonic() + _PROCESS
    while home.is_running(folder) and time.monotonic() < until:
        time.sleep(0.2)
    return home.is_running(folder)


def _confirm(membership: Membership) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("--delete asks a person; in a script, say --yes as well.")
    answer = input(
        f"Delete the keys of {membership.member}, what it remembers of runs, and its copies of rows in {words.clean(membership.folder, 120)}? [y/N] "
    )
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("Nothing was deleted, and the member did not leave.")


def _note_pause(membership: Membership) -> None:
    from fedfm.client.log import OwnerLog

    try:
        with home.alone(membership.folder):
            OwnerLog(membership.folder, membership.member).note_pause(_now(), pauses.since(membership.folder))
    except RunError as error:
        print(f"The owner's log was not written: {error}", file=sys.stderr)


def _note_leave(membership: Membership) -> None:
    from fedfm.client.log import OwnerLog

    try:
        with home.alone(membership.folder):
            OwnerLog(membership.folder, membership.member).note_leave(_now(), membership.consortium)
    except RunError as error:
        print(f"The owner's log was not written: {error}", file=sys.stderr)


def _now() -> datetime:
    return datetime.now().astimezone()

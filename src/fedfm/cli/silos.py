"""``fedfm serve``, ``join``, ``attach``, and ``run --consortium``: a run across organisations."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fedfm.cli.commands import Telling, stoppable
from fedfm.cli.parts import show_json
from fedfm.client.policy import read_policy
from fedfm.core import words
from fedfm.core.errors import ConfigError, RunError, WireError
from fedfm.recipe import read
from fedfm.run.log import LOG
from fedfm.service import coordinator, jobs
from fedfm.service.home import has_left, stay
from fedfm.service.jobs import Job
from fedfm.service.member import Member
from fedfm.silos.certificates import now
from fedfm.silos.consortium import Consortium
from fedfm.silos.enrol import Unanswered, enter, entered
from fedfm.silos.invitation import Invitation
from fedfm.silos.membership import Membership
from fedfm.wire.nats import LoginRefused

# Seconds: between two looks at a run, that a member asks the coordinator before it says that it waits, between two attempts.
_LOOK, _PATIENCE, _AGAIN = 0.3, 10.0, 2.0


def serve(folder: Path, at_once: int, log_level: str) -> None:
    """``fedfm serve``."""
    Telling(quiet=True, log_level=log_level).watchers()
    consortium = Consortium.open(folder)

    def ready() -> None:
        print(
            f"Coordinating {consortium.settings.name} with {len(consortium.cards())} members at {', '.join(consortium.settings.urls)}. "
            "Ctrl-C ends it; what was completed is kept.",
            flush=True,
        )

    with stoppable(f"the next fedfm serve {folder} goes on."):
        coordinator.serve(consortium, ready, at_once, log_level)


def join(
    path: Path,
    data: str,
    test: str | None,
    policy: Path | None,
    folder: Path | None,
    device: str,
    log_level: str,
    models: Path | None = None,
) -> None:
    """``fedfm join``."""
    Telling(quiet=True, log_level=log_level).watchers()
    rules = None if policy is None else read_policy(policy)
    with stoppable("what was asked meanwhile waits at the broker, and the same command goes on."):
        membership = _membership(path, folder)
        if has_left(membership.folder):
            raise ConfigError(
                f"{membership.member} has left {membership.consortium}. To come back, ask its coordinator for a new invitation."
            )
        member = Member(membership, data, rules, test, device, models)
        if policy is None:
            print("No policy: the strictest default holds, and a person is asked about every run (fedfm approve).", flush=True)
        print(
            f"{member.name} waits for what {member.link.consortium} asks. Ctrl-C ends it; fedfm log {member.folder} shows what left.",
            flush=True,
        )
        try:
            member.serve()
        except LoginRefused:
            if not has_left(member.folder):
                raise
        if has_left(member.folder):
            print(f"{member.name} has left {member.link.consortium}. Its log stays: fedfm log {member.folder}", flush=True)


def _membership(path: Path, folder: Path | None) -> Membership:
    """The membership in a folder, or the one to which an invitation leads.

    Raises:
        ConfigError: if there is none, or the invitation and the folder do not go together.
        DataError: if the invitation cannot be used.
    """
    if path.is_dir():
        if folder is not None:
            raise ConfigError(
                f"{words.clean(path, 120)} is a member's folder already; --folder is for an invitation. Leave one of them out."
            )
        return Membership.read(path)
    # A service gives the same invitation at each start, also after it expired.
    invitation = Invitation.read(path, datetime.min.replace(tzinfo=UTC))
    home = folder or Path(invitation.member)
    membership = entered(invitation, home)
    if membership is not None:
        return membership
    membership = _enter(Invitation.read(path, now()), home)
    stay(home)
    print(f"Entered {membership.consortium} as {membership.member}; keys and certificate are in {home}.")
    print(f"coordinator  {membership.coordinator.short}   (compare it with the coordinator on the telephone)")
    print(f"your keys    {membership.identity.card.short}   (fedfm consortium list shows them there)", flush=True)
    return membership


def _enter(invitation: Invitation, home: Path) -> Membership:
    """Enters, and waits while the coordinator is away."""
    told = ""
    while True:
        try:
            return enter(invitation, home, _PATIENCE)
        except LoginRefused:
            raise
        except (WireError, Unanswered) as error:
            if now() >= invitation.expires:
                raise
            if str(error) != told:
                told = str(error)
                print(f"Waiting for the coordinator of {invitation.consortium}: {told}", file=sys.stderr, flush=True)
            time.sleep(_AGAIN)


def submit(folder: Path, recipe: Path, overrides: Sequence[str], telling: Telling) -> None:
    """``fedfm run --consortium``."""
    job = coordinator.submit(folder, read(recipe, overrides))
    print(f"Submitted as {job.name}.", file=telling.stream, flush=True)
    if not jobs.is_served(folder):
        print(f"No coordinator is up; it begins with: fedfm serve {folder}", file=telling.stream, flush=True)
    _follow(job, telling)


def attach(folder: Path, name: str | None, telling: Telling) -> None:
    """``fedfm attach``."""
    Consortium.open(folder)
    _follow(jobs.job(folder, name), telling)


def _follow(job: Job, telling: Telling) -> None:
    """Shows a job's progress until it ends.

    Raises:
        RunError: if it ended without a result.
    """
    with _detachable(job, telling):
        seen = 0
        while True:
            state = job.state
            if not telling.quiet:
                seen = _show(job.run / LOG, seen, telling)
            if state in ("finished", "failed"):
                break
            time.sleep(_LOOK)
    if state == "failed":
        raise RunError(f"{job.name} ended without a result: {job.failure}")
    if telling.as_json:
        show_json({"job": job.name, "run": str(job.run), "model": str(job.run / "model"), "report": str(job.run / "report.html")})
    else:
        print(f"Model: {job.run / 'model'}\nReport: {job.run / 'report.html'}")


def _show(path: Path, seen: int, telling: Telling) -> int:
    """Prints the lines of a run's log from a place in it on; the place after them."""
    if not path.exists():
        return seen
    with path.open("rb") as file:
        # The log begins anew when it is long.
        file.seek(seen if path.stat().st_size >= seen else 0)
        for line in file:
            if not line.endswith(b"\n"):
                return file.tell() - len(line)
            print(line.decode("utf-8", "replace").rstrip(), file=telling.stream, flush=True)
        return file.tell()


@contextmanager
def _detachable(job: Job, telling: Telling) -> Iterator[None]:
    """Ctrl-C leaves a run alone."""
    logging.getLogger("fedfm").setLevel(logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nDetached; the run goes on. Go back to it: fedfm attach {job.folder} {job.name}", file=telling.stream)
        sys.exit(0)

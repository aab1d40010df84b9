"""``fedfm serve``, ``join``, ``attach``, ``status``, and ``run --consortium``: a run across organisations."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedfm.cli.commands import Telling, stoppable
from fedfm.cli.parts import show_json
from fedfm.client.policy import read_policy
from fedfm.core.errors import RunError
from fedfm.recipe import read
from fedfm.run.log import LOG
from fedfm.silos import coordinator
from fedfm.silos.coordinator import LINK, Job
from fedfm.silos.member import Member
from fedfm.wire.link import Link

_LOOK = 0.3


def serve(folder: Path, log_level: str) -> None:
    """``fedfm serve``."""
    Telling(quiet=True, log_level=log_level).watchers()
    link = coordinator.require_folder(folder)
    print(f"Coordinating {link.consortium} with {len(link.peers)} members. Ctrl-C ends it; what was completed is kept.", flush=True)
    with stoppable(f"the next fedfm serve {folder} goes on."):
        coordinator.serve(folder)


def join(folder: Path, data: str, test: str | None, policy: Path | None, device: str, log_level: str) -> None:
    """``fedfm join``."""
    Telling(quiet=True, log_level=log_level).watchers()
    link = Link.read(folder / LINK)
    member = Member(link, folder, data, None if policy is None else read_policy(policy), test, device)
    if policy is None:
        print("No policy: the strictest default holds, and a person is asked about every run (fedfm approve).", flush=True)
    print(f"{member.name} waits for what {link.consortium} asks. Ctrl-C ends it; fedfm log {folder} shows what left.", flush=True)
    with stoppable("what was asked meanwhile waits at the broker."):
        member.serve()


def submit(folder: Path, recipe: Path, overrides: Sequence[str], telling: Telling) -> None:
    """``fedfm run --consortium``."""
    job = coordinator.submit(folder, read(recipe, overrides))
    print(f"Submitted as {job.name}.", file=telling.stream, flush=True)
    if not coordinator.is_served(folder):
        print(f"No coordinator is up; it begins with: fedfm serve {folder}", file=telling.stream, flush=True)
    _follow(job, telling)


def attach(folder: Path, name: str | None, telling: Telling) -> None:
    """``fedfm attach``."""
    coordinator.require_folder(folder)
    _follow(coordinator.job(folder, name), telling)


def status(folder: Path, as_json: bool) -> None:
    """``fedfm status``."""
    told = coordinator.status(folder)
    if as_json:
        show_json(told)
        return
    print(f"{told['consortium']}: the coordinator is {'up' if told['serving'] else 'down'}. Members: {', '.join(told['members'])}.")
    for job in told["jobs"]:
        print(f"{job['name']}  {job['state']:<8}  round {job['round']} of {job['rounds']}  {job['failure'][:200]}".rstrip())


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

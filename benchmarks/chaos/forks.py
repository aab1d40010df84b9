"""Forks of this process that do one thing, and what happens to them at a durable step.

A fork has imported everything already, so it works at once. The process that forks must have one thread and must not compute gradients: autograd refuses
to work in a fork of a process that did.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedfm.core import disk

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Trap:
    """What happens at a durable step of a process: just before or just after a write, a rename, or a line that is added.

    Args:
        step: Which one, from 1, counted from the start of the process.
        what: ``kill`` ends the process with SIGKILL, ``broker`` ends the broker so, ``full`` lets the disk be full there, once.
    """

    step: int
    what: Literal["kill", "broker", "full"] = "kill"

    def spring(self, broker: int) -> None:
        """Does it."""
        if self.what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid() if self.what == "kill" else broker, signal.SIGKILL)


class Fork:
    """A fork that works until it ends or is killed. It ends with this process.

    Args:
        work: What it does.
        log: Where it says what.
        trap: What happens to it.
        broker: The broker's process.
        steps: A file to which the name of each durable step is added.
    """

    def __init__(self, work: Callable[[], None], log: Path, trap: Trap | None = None, broker: int = 0, steps: Path | None = None) -> None:
        assert threading.active_count() == 1, "a fork of a process with threads may hang"
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._work(work, log, trap, broker, steps)

    def poll(self) -> int | None:
        """``None`` while it works; then its exit code, or the signal that ended it as a negative number."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def kill(self) -> bool:
        """Ends it with SIGKILL; whether it was at work."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return self.status == -signal.SIGKILL

    def _work(self, work: Callable[[], None], log: Path, trap: Trap | None, broker: int, steps: Path | None) -> None:
        code = 1
        try:
            ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True, format="%(process)d %(asctime)s %(name)s %(message)s")
            disk.on_step = _Counter(trap, broker, steps)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


class _Counter:
    """Counts the durable steps of this process."""

    def __init__(self, trap: Trap | None, broker: int, steps: Path | None) -> None:
        self._trap, self._broker, self._steps, self._count = trap, broker, steps, 0

    def __call__(self, name: str) -> None:
        self._count += 1
        if self._steps is not None:
            with self._steps.open("a") as file:
                file.write(name + "\n")
        if self._trap is not None and self._count == self._trap.step:
            self._trap.spring(self._broker)

"""Several runs at a time: each is played by a process of its own, so that nothing but the machine and the broker is shared, and its numbers are those of a run alone.

A process that plays a run (``service/player.py``) ends with the coordinator, however that ends: it holds a pipe to it, and the system tells it when that closes.

Covered here: a coordinator that is killed and started again while such a process still ends (the run waits for its folder). Not covered: memory; each run
holds a copy of its own of the model.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

log = logging.getLogger(__name__)
# Seconds: that a process has to end, and between two attempts at a run whose process ended without a word.
_ENDING, _AGAIN = 30.0, 3.0


class Players:
    """Processes that play runs.

    Args:
        folder: The coordinator's folder.
        most: How many at a time.
        log_level: What they show.
    """

    def __init__(self, folder: Path, most: int, log_level: str = "warning") -> None:
        self._folder, self._most, self._log_level = folder, most, log_level
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._again: dict[str, float] = {}

    def look(self, waiting: list[str]) -> None:
        """Notes which processes have ended, and starts the next ones.

        Args:
            waiting: Names of the jobs that are not over, in the order in which they run.
        """
        for name, process in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self._processes[name]
            _close(process)
            if code:
                log.warning("the process of %s ended with %d; it goes on if the run is not over", name, code)
            self._again[name] = time.monotonic() + _AGAIN
        ready = [name for name in waiting if name not in self._processes and time.monotonic() >= self._again.get(name, 0.0)]
        for name in ready[: self._most - len(self._processes)]:
            command = [sys.executable, "-P", "-m", "fedfm.service.player", str(self._folder), name, self._log_level]
            # A session of its own: Ctrl-C is for the coordinator, which ends it in good order.
            self._processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """Ends all of them; what was completed is kept."""
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _ENDING
        for process in self._processes.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close(process)
        self._processes.clear()


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()

"""Flower's deployment on this machine: a SuperLink, SuperNodes, and an app whose members answer with what they were sent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.peers.run import FLOWER
from fedfm.testing.broker import free_port

APP = Path(__file__).parent / "deployed"
_BIN = FLOWER.parent


class Deployment:
    """A SuperLink and its SuperNodes, each a process of its own, without TLS, which is in their favour.

    Args:
        folder: For the database, logs, and what a run notes.
        members: SuperNodes.
    """

    def __init__(self, folder: Path, members: int) -> None:
        self.folder, self.members = folder, members
        self._port = free_port()
        self.superlink: subprocess.Popen[bytes] | None = None
        self._nodes: list[subprocess.Popen[bytes]] = []
        home = folder / "flwr"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )
        self._env = {
            **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(_BIN / words[0]), *words[1:]], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env, start_new_session=True
            )

    def serve(self) -> None:
        """Starts the SuperLink; after a kill it goes on with the same database."""
        self.superlink = self._start(
            "superlink", "flower-superlink", "--insecure", "--database", str(self.folder / "state.db"),
            "--port", str(self._port),
        )  # fmt: skip

    def __enter__(self) -> Deployment:
        self.serve()
        time.sleep(8.0)
        for k in range(self.members):
            words = ("--insecure", "--superlink", f"127.0.0.1:{self._port}", "--port", str(free_port()))
            self._nodes.append(self._start(f"node-{k}", "flower-supernode", *words))
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self._nodes, self.superlink]:
            if process is not None:
                end(process)

    def pid(self) -> int | None:
        """The SuperLink's process."""
        return None if self.superlink is None else self.superlink.pid

    def kill(self) -> None:
        """Ends the SuperLink with SIGKILL, and with it what it started."""
        assert self.superlink is not None
        os.killpg(self.superlink.pid, signal.SIGKILL)
        self.superlink.wait()

    def run(self, values: int, rounds: int) -> Path:
        """Submits a run of so many rounds over so many float32 values; the file in which it notes them."""
        out = self.folder / f"rounds-{values}-{time.time_ns()}.txt"
        app = self.folder / f"app-{out.stem}"
        shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
        config = f"members={self.members} values={values} rounds={rounds} out='{out}'"
        subprocess.run(
            [str(_BIN / "flwr"), "run", str(app), "here", "--run-config", config], env=self._env, check=True, capture_output=True
        )
        return out

    def log(self) -> str:
        """The SuperLink's last lines."""
        return (self.folder / "superlink.log").read_text(errors="replace")[-3000:]


def noted(path: Path) -> list[tuple[int, int, float]]:
    """Round, answers and time of each round that a run has completed."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(number), int(answered), float(at)) for number, answered, at in (line.split() for line in lines)]


def await_rounds(path: Path, count: int, patience: float) -> list[tuple[int, int, float]]:
    """What a run has noted, once there are so many rounds, or nothing more is waited for."""
    until = time.monotonic() + patience
    while len(done := noted(path)) < count and time.monotonic() < until:
        time.sleep(0.2)
    return done


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process and those that it started."""
    for sign in ("-TERM", "-KILL"):
        subprocess.run(["kill", sign, f"-{process.pid}"], check=False, capture_output=True)
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            continue


def seconds(rounds: Sequence[tuple[int, int, float]], warmup: int) -> list[float]:
    """Of each round after the first ones."""
    times = [at for _, _, at in rounds]
    return [after - before for before, after in pairwise(times)][max(warmup - 1, 0) :]

"""``make demo-silos``: a consortium on one machine. Broker, coordinator and four members are processes of their own.

Each member has a file of its own that nobody else reads: the sources of one package of Python's library. Everything is done with the commands that
organisations use: init, invite, serve, join, run.

Covered here: whatever was started is ended, also on Ctrl-C. Not covered: a firewall, and machines that are apart; docs/deploy.md is for them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path

from fedfm.client.policy import Policy, write_policy
from fedfm.core.errors import FedfmError, RunError
from fedfm.observers.progress import Progress
from fedfm.quickstart import base_model, unused
from fedfm.silos.consortium import Consortium

MEMBERS = ("asyncio", "email", "importlib", "unittest")
_LINES, _PATIENCE = 24, 120.0


def main(out: Path = Path("runs/silos"), quick: bool = False) -> Path:
    """Begins a consortium, lets four members enter, and runs a recipe across them.

    Args:
        out: A folder for all of it; if it exists already, ``-2``, ``-3``... is added.
        quick: Little training, to see that everything works.

    Returns:
        The run's folder.

    Raises:
        RunError: if one of the processes fails.
    """
    began = time.monotonic()
    print("The base model: Python's manual, which is public.", flush=True)
    model = base_model(quick, [Progress()])
    out = unused(out)
    folder = out / "consortium"
    out.mkdir(parents=True)
    _run("consortium", "init", str(folder), "--name", "demo", "--url", f"tls://127.0.0.1:{_free_port()}")
    recipe = out / "recipe.yaml"
    recipe.write_text(_recipe(model, quick), encoding="utf-8")
    with ExitStack() as ends:
        _start(ends, out / "coordinator.log", "serve", str(folder))
        for name in MEMBERS:
            home = out / name
            home.mkdir()
            _run("consortium", "invite", str(folder), name, "--out", str(home / "invitation.json"))
            rows = _write_rows(name, home / "rows.jsonl", 8 if quick else 200)
            (home / "policy.yaml").write_text(write_policy(Policy.open()), encoding="utf-8")
            join = ["join", str(home / "invitation.json"), "--folder", str(home / "keys"), "--data", str(home / "rows.jsonl")]
            _start(ends, home / "log.txt", *join, "--policy", str(home / "policy.yaml"))
            print(f"{name}: a process of its own, with {rows} rows of its own in {home}", flush=True)
        _await_members(folder, out)
        _run("consortium", "list", str(folder))
        _run("run", str(recipe), "--consortium", str(folder))
        print(f"\nDone in {time.monotonic() - began:.0f} s.")
        print(f"  what left a member   fedfm log {out / MEMBERS[0] / 'keys'}")
        print(f"  the coordinator      fedfm status {folder}", flush=True)
    return next((folder / "runs").iterdir())


def _recipe(model: Path, quick: bool) -> str:
    return f"""\
# What `make demo-silos` runs. The members' data are theirs alone, so data.source is not read.
name: silos
model: {model}
data: {{source: each member's own, test_fraction: 0.2}}
task: {{CausalLM: {{max_length: 64}}}}
tuning: {{LoRA: {{r: 8, alpha: 16, targets: [q_proj, v_proj, up_proj, down_proj]}}}}
local: {{AdamW: {{lr: 2.0e-2, steps: {1 if quick else 5}, batch_size: 4}}}}
evaluate: {{max_examples: {1 if quick else 12}}}
rounds: {1 if quick else 5}
"""


def _write_rows(package: str, path: Path, most: int) -> int:
    """Pieces of a package's sources as rows; how many there are."""
    library = Path(sysconfig.get_path("stdlib")) / package
    rows: list[str] = []
    for file in sorted(library.glob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        rows += ["\n".join(lines[begin : begin + _LINES]) for begin in range(0, len(lines), _LINES)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[:most]), encoding="utf-8")
    return len(rows[:most])


def _command(words: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "fedfm.cli.main", *words]


def _run(*words: str) -> None:
    """Shows a command, and does it.

    Raises:
        RunError: if it fails.
    """
    print(f"\n$ fedfm {' '.join(words)}", flush=True)
    if code := subprocess.run(_command(words), check=False).returncode:
        raise RunError(f"fedfm {words[0]} ended with {code}.")


def _start(ends: ExitStack, log: Path, *words: str) -> None:
    """Begins a process that ends with the demonstration."""
    print(f"\n$ fedfm {' '.join(words)} &", flush=True)
    file = ends.enter_context(log.open("wb"))
    # All of them share this machine's cores.
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen(_command(words), stdout=file, stderr=file, env=env, start_new_session=True)
    ends.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _await_members(folder: Path, out: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while len(Consortium.open(folder).cards()) < len(MEMBERS):
        if time.monotonic() >= until:
            raise RunError(f"Not all members entered within {_PATIENCE:.0f} s. {out}/coordinator.log and {out}/MEMBER/log.txt tell why.")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    try:
        main()
    except FedfmError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

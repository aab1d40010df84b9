"""Installs the peers and runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.torch import save_file

from benchmarks.bench import Bench
from benchmarks.common import Pairs, Row, say, seconds_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLOWER = ROOT / ".venv-flower" / "bin" / "python"
# Clients per message are not an option of Flower's simulation; how many actors share the cores is. Both ways are tried.
ACTOR_CPUS = (1, 2)


def install() -> None:
    """Makes Flower's environment; needs a network."""
    subprocess.run([sys.executable, "-m", "venv", FLOWER.parents[1]], check=True)
    subprocess.run([FLOWER, "-m", "pip", "install", "-r", HERE / "flower" / "requirements.txt"], check=True)


def flower(bench: Bench, rounds: int) -> Row:
    """The same clients, base, tokens and first adapters in Flower's simulation: what a row says of it.

    Ray's start, the actors' imports, their loading of the model and the first two rounds are not counted. Our rounds are timed in the same
    sitting, half before and half after.
    """
    if not FLOWER.exists():
        return {"ours_s": None, "theirs_s": None, "ratio": None, "note": "not installed: python -m benchmarks.peers install"}
    ours = [seconds_of(bench.round) for _ in range(rounds - rounds // 2)]
    tried: dict[int, list[float]] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        bench.foundation().model.save_pretrained(folder / "base")
        shards = [bench.house.shard(client).train for client in bench.house.clients]
        np.save(folder / "tokens.npy", np.stack([[shard.ids(i) for i in range(len(shard))] for shard in shards]))
        save_file({name: leaf.contiguous() for name, leaf in bench.start.params.items()}, folder / "start.safetensors")
        work = bench.federation.local.work
        for cpus in ACTOR_CPUS:
            if cpus > (os.cpu_count() or 1):
                continue
            say(f"{bench.shape}: Flower's simulation, {cpus} CPU for each client")
            options = {
                "folder": name, "cohort": bench.shape.clients, "registered": len(shards), "steps": work.steps, "batch": work.batch_size,
                "rounds": rounds, "cpus": cpus,
            }  # fmt: skip
            quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [FLOWER, "-m", "benchmarks.peers.flower.app", json.dumps(options)],
                env={**os.environ, **quiet, "PYTHONPATH": str(ROOT)},
                text=True,
                capture_output=True,
            )
            if done.returncode:
                raise SystemExit(f"Flower's simulation failed:\n{done.stderr[-4000:]}")
            tried[cpus] = json.loads(done.stdout.splitlines()[-1])
    ours += [seconds_of(bench.round) for _ in range(rounds // 2)]
    best = min(tried, key=lambda cpus: np.median(tried[cpus]))
    return {
        **Pairs(tuple(ours), tuple(tried[best])).to_row(),
        "actor_cpus": best,
        "tried_s": {str(c): float(np.median(s)) for c, s in tried.items()},
    }

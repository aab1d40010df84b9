"""Federated rounds on request: the working half of :mod:`benchmarks.pairs`, one process for each source tree.

It reads words from its standard input, a line each, and answers each with a line of JSON: ``round`` plays a round and tells its seconds,
``digest`` tells the bits of the parameters. It ends when its input does. Only public names of fedfm are used, so that it runs on both trees.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import fedfm
from benchmarks.work import Shape, Size, federation, workshop
from fedfm.engines import Embedded
from fedfm.federation import Federation


@dataclass
class Player:
    """A run that plays a round each time it is asked.

    Args:
        rounds: What ``fedfm.run`` gives.
        params: The parameters after the last round.
    """

    rounds: Iterator[tuple[Any, Any]]
    params: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def round(self) -> dict[str, Any]:
        """One round, everything included, and the seconds it took."""
        began = perf_counter()
        state, _ = next(self.rounds)
        seconds = perf_counter() - began
        self.params = state.params
        return {"seconds": seconds}

    def digest(self) -> dict[str, Any]:
        """The digest of names and bits of all parameters."""
        digest = hashlib.blake2b(digest_size=12)
        for name, leaf in self.params.items():
            digest.update(name.encode() + leaf.detach().contiguous().numpy().tobytes())
        return {"digest": digest.hexdigest()}


def prepared(folder: Path, size: Size, shape: Shape, steps: int, threads: int, rounds: int) -> Federation:
    """The cohort benchmark's federation with a bank as large as the cohort, so that no timing chooses it."""
    plan = federation(folder, size, shape, registered=2 * shape.clients, steps=steps, rounds=rounds)
    return replace(plan, engine=Embedded(bank=shape.clients, device="cpu", threads=threads))


def serve(plan: Federation, out: Path) -> None:
    """Answers requests until there are no more. Round 0 (model and data) is done before the first answer."""
    with closing(fedfm.run(plan, out=out)) as rounds:  # type: ignore[type-var]
        player = Player(rounds)
        player.round()
        answers = {"round": player.round, "digest": player.digest}
        print(json.dumps({"source": str(Path(fedfm.__file__).parent)}), flush=True)
        for line in sys.stdin:
            print(json.dumps(answers[line.strip()]()), flush=True)


def main() -> None:
    """The process that ``benchmarks.pairs`` starts."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("clients", "batch", "length", "steps", "threads"):
        options.add_argument(f"--{name}", type=int, required=True)
    options.add_argument("--small", action="store_true", help="a base of two layers of width 32")
    options.add_argument("--job", type=int, metavar="ROUNDS", help="play so many rounds to the end, model and report too, and read nothing")
    given = options.parse_args()
    logging.getLogger("fedfm").setLevel(logging.ERROR)
    size, shape = Size(32, 2, 64, 4, 512) if given.small else Size(), Shape(given.clients, given.batch, given.length)
    with workshop(size) as folder:
        plan = prepared(folder, size, shape, given.steps, given.threads, given.job or 1_000_000)
        if given.job is None:
            serve(plan, folder / "run")
        else:
            for _ in fedfm.run(plan, out=folder / "run"):
                pass


if __name__ == "__main__":
    main()

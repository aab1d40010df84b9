"""A dozen recipes and more before and after a change, bit for bit.

::

    python -m benchmarks.same_bits write before.json      # in the tree before, or with its src first in PYTHONPATH
    python -m benchmarks.same_bits write after.json       # in the tree after
    python -m benchmarks.same_bits compare before.json after.json

``write`` plays small federations on the CPU with one thread, through the public doors alone, so the same file runs on both trees. It notes
a digest of every tensor of the final parameters, of the server's state as saved and of the saved model, and every number of
``metrics.jsonl`` but times. ``compare`` ends with 1 where a tensor differs, and with 0 where only metrics do: those it names, with the
largest relative difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file

import fedfm
from fedfm.aggregators import Mean, TrimmedMean
from fedfm.data import Data, Dirichlet
from fedfm.engines import Embedded, Process
from fedfm.federation import Federation
from fedfm.local import SGD, AdamW, FedProx
from fedfm.methods import Scaffold
from fedfm.observers import Evaluate
from fedfm.samplers import Poisson, Uniform
from fedfm.server import FedAdam, FedAvgM
from fedfm.tasks import CausalLM, Classification, Instruct, MaskedLM
from fedfm.testing.tiny import spec
from fedfm.transforms import CastBF16, ClipByNorm, Int8, TopK
from fedfm.tuning import IA3, BitFit, Full, Head, LoRA, Peft

OWNERS = {"ann": 31, "bob": 17, "cid": 11, "dee": 7, "eve": 5}
FEW = {"ann": 9, "bob": 6}
WORDS = (
    "the",
    "small",
    "old",
    "red",
    "quiet",
    "cat",
    "dog",
    "bird",
    "king",
    "saw",
    "took",
    "left",
    "found",
    "house",
    "river",
    "book",
    "tree",
    "and",
)
# Keys whose values depend on the clock or the machine.
_UNSTEADY = {"seconds", "peak_memory"}
# Below these keys stand owners, by name or by number.
_BY_OWNER = re.compile(r"(?<=clients\.)[^.]+|(?<=owners\.)[^.]+|(?<=failed\.)[^.]+|(?<=failures\.)[^.]+|(?<=cohort\.)[^.]+")

Build = Callable[[Path], Federation]


@dataclass(frozen=True)
class Recipe:
    """A federation to play.

    Args:
        build: Makes it; called with the folder of the rows.
        stop: The run is interrupted after this round and resumed.
        ends: Whether it is compared with its two ends (``compare.json``) too.
    """

    build: Build
    stop: int | None = None
    ends: bool = False


def write_rows(folder: Path) -> None:
    """``all.jsonl`` (five unequal owners) and ``few.jsonl`` (two): texts, classes, instructions and responses of ragged lengths."""
    for name, owners in (("all", OWNERS), ("few", FEW)):
        rng = random.Random(7)

        def text(fewest: int, most: int, rng: random.Random = rng) -> str:
            return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))

        rows = [
            {"owner": owner, "text": text(4, 18), "label": "abc"[rng.randrange(3)], "instruction": text(2, 9), "response": text(1, 8)}
            for owner, count in owners.items()
            for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def base(folder: Path, bank: int = 3, source: str = "all", **parts: Any) -> Federation:
    """Three rounds of LoRA and AdamW over packed text, with ``parts`` in place of its own."""
    federation = Federation(
        model=spec("Llama"),
        data=Data(str(folder / f"{source}.jsonl"), by="owner", test_fraction=0.2, min_examples=1),
        task=CausalLM(max_length=24),
        tuning=LoRA(r=3),
        local=AdamW(lr=1e-2, steps=3, batch_size=2),
        engine=Embedded(bank=bank, device="cpu", threads=1),
        rounds=3,
        seed=11,
    )
    return replace(federation, **parts)


def ragged(folder: Path, bank: int) -> Federation:
    """Instructions of unequal lengths, dropout, and steps of two micro-batches."""
    local = AdamW(lr=1e-2, steps=3, batch_size=4, accumulate=2, weight_decay=0.1)
    return base(folder, bank, task=Instruct(max_length=32), tuning=LoRA(r=3, dropout=0.2, targets=("all-linear",)), local=local)


def poisson(folder: Path) -> Federation:
    """Cohorts of any size: among eight rounds some have no client."""
    return base(folder, sampler=Poisson(rate=0.2), rounds=8, evaluate=Evaluate(every=2, max_examples=2))


def diverging(folder: Path) -> Federation:
    """A rate at which the two owners with most steps end in NaN: they are asked twice in each round, and left out."""
    local = SGD(lr=1e9, epochs=1, batch_size=2, max_grad_norm=None)
    return base(folder, local=local, transforms=(ClipByNorm(max_norm=0.3),), on_failure="retry")


def stateful(folder: Path) -> Federation:
    """State on both sides: error feedback in the clients, moments in the server."""
    return base(folder, transforms=(TopK(fraction=0.25), Int8(block=64)), server=FedAdam(lr=0.01), sampler=Uniform(clients=3), rounds=4)


CLASSES = Classification(max_length=24)
BY_EPOCHS = AdamW(lr=3e-3, epochs=1, batch_size=3, schedule="cosine", warmup=1, decay=0.9)
RECIPES: dict[str, Recipe] = {
    "LoRA, AdamW, bank 1": Recipe(lambda f: base(f, 1)),
    "LoRA, AdamW, bank 3, ends": Recipe(lambda f: base(f, 3), ends=True),
    "LoRA, AdamW, processes": Recipe(lambda f: base(f, source="few", engine=Process(device="cpu", threads=1), rounds=2)),
    "LoRA, dropout, Instruct, bank 1": Recipe(lambda f: ragged(f, 1)),
    "LoRA, dropout, Instruct, bank 3": Recipe(lambda f: ragged(f, 3)),
    "LoRA, Bert, Classification": Recipe(lambda f: base(f, model=spec("Bert"), task=CLASSES)),
    "LoRA, bfloat16, checkpointing": Recipe(lambda f: base(f, model=replace(spec("Llama"), dtype="bfloat16", gradient_checkpointing=True))),
    "IA3": Recipe(lambda f: base(f, tuning=IA3(), task=CausalLM(max_length=24, packed=False))),
    "BitFit, GPT2": Recipe(lambda f: base(f, model=spec("GPT2"), tuning=BitFit(), transforms=(CastBF16(),))),
    "Head, Bert, Classification, Dirichlet": Recipe(
        lambda f: base(
            f,
            2,
            model=spec("Bert"),
            task=CLASSES,
            tuning=Head(),
            data=Data(str(f / "all.jsonl"), partition=Dirichlet(0.5, clients=4, min_size=4)),
        )
    ),
    "Full, SGD": Recipe(lambda f: base(f, tuning=Full(), local=SGD(lr=0.05, steps=2, batch_size=3, momentum=0.9, max_grad_norm=1.0))),
    "Peft LOHA": Recipe(lambda f: base(f, tuning=Peft("LOHA", (("r", 2), ("target_modules", ("q_proj",)))), rounds=2)),
    "MaskedLM, Bert": Recipe(lambda f: base(f, model=spec("Bert"), task=MaskedLM(max_length=24))),
    "FedProx, FedAvgM": Recipe(lambda f: base(f, local=FedProx(AdamW(lr=1e-2, steps=3, batch_size=2), mu=0.1), server=FedAvgM())),
    "SCAFFOLD, SGD": Recipe(lambda f: base(f, local=SGD(lr=0.1, steps=3), method=Scaffold(), sampler=Uniform(clients=3), rounds=4)),
    "TopK with feedback, Int8, FedAdam": Recipe(stateful),
    "FedAdam, Uniform, weights uniform": Recipe(
        lambda f: base(f, server=FedAdam(lr=0.02), sampler=Uniform(clients=3), aggregator=Mean(weights="uniform"))
    ),
    "ClipByNorm, TrimmedMean": Recipe(lambda f: base(f, transforms=(ClipByNorm(max_norm=0.3),), aggregator=TrimmedMean(trim=1))),
    "Poisson": Recipe(poisson),
    "Epochs, cosine": Recipe(lambda f: base(f, local=BY_EPOCHS, task=CausalLM(max_length=24, packed=False))),
    "Two owners diverge, retry": Recipe(diverging),
    "Stopped after round 2 and resumed": Recipe(stateful, stop=2),
}


# --- write ----------------------------------------------------------------------------------------------------------


def final_params(recipe: Recipe, federation: Federation, out: Path) -> Mapping[str, torch.Tensor]:
    """Plays the rounds in ``out``, with an interruption where the recipe has one. Returns the last parameters."""
    params: Mapping[str, torch.Tensor] = {}
    with closing(fedfm.run(federation, out=out)) as rounds:  # type: ignore[type-var]
        for state, record in rounds:
            params = state.params
            if record.round == recipe.stop:
                break
    if recipe.stop is not None:
        for state, _ in fedfm.resume(out):
            params = state.params
    return params


def play(recipe: Recipe, folder: Path, out: Path) -> dict[str, Any]:
    """What a run in ``out`` leaves, as digests and exact numbers."""
    federation = recipe.build(folder)
    params = final_params(recipe, federation, out)
    last_state = max((out / "state").glob("round-*.safetensors"))
    numbers: dict[str, Any] = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        numbers |= {f"round {line['round']}.{path}": value for path, value in flat(line)}
    if recipe.ends:
        fedfm.compare(federation, out)
        numbers |= {f"ends.{path}": value for path, value in flat(json.loads((out / "compare.json").read_text()))}
    return {
        "params": {name: digest(leaf) for name, leaf in params.items()},
        "state": {name: digest(leaf) for name, leaf in load_file(last_state).items() if not name.startswith("params/")},
        "model": {
            f"{path.relative_to(out)}: {name}": digest(leaf)
            for path in sorted((out / "model").rglob("*.safetensors"))
            for name, leaf in load_file(path).items()
        },
        "numbers": numbers,
    }


def digest(leaf: torch.Tensor) -> str:
    """The digest of type, shape and bits."""
    bits = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(f"{leaf.dtype} {tuple(leaf.shape)} ".encode() + bits, digest_size=12).hexdigest()


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and word of nested JSON by its path, floats as ``float.hex()``, without what depends on the clock."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _UNSTEADY:
                yield from flat(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from flat(item, f"{path}.{i}")
    else:
        yield path, value.hex() if isinstance(value, float) else value


def write(file: Path, only: str) -> None:
    """Plays every recipe whose name contains ``only`` and notes what it leaves."""
    logging.getLogger("fedfm").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    runs = {}
    with TemporaryDirectory(prefix="fedfm-same-bits-") as name:
        os.environ["FEDFM_CACHE"] = str(Path(name, "cache"))
        write_rows(Path(name))
        for i, (title, recipe) in enumerate(RECIPES.items()):
            if only in title:
                began = perf_counter()
                runs[title] = play(recipe, Path(name), Path(name, f"run-{i}"))
                print(f"{title}: {perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    where = {"python": platform.python_version(), "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    file.write_text(json.dumps({"source": str(Path(fedfm.__file__).parent), "where": where, "runs": runs}, indent=1) + "\n")


# --- compare --------------------------------------------------------------------------------------------------------


def weights(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """``same``, or how the final parameters or the saved model differ."""
    for kind in ("params", "model"):
        x, y = before[kind], after[kind]
        if missing := set(x) ^ set(y):
            return f"{kind}: {len(missing)} names differ, such as {min(missing)}"
        if changed := [name for name in x if x[name] != y[name]]:
            return f"{kind}: {len(changed)} of {len(x)} differ"
        if list(x) != list(y):
            return f"{kind}: another order"
    return "same"


def server_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """``same`` if every tensor that was in the server's state still is, under whatever name."""
    x, y = Counter(before["state"].values()), Counter(after["state"].values())
    if lost := (x - y).total():
        return f"{lost} of {x.total()} differ"
    more = f", {new} more" if (new := (y - x).total()) else ""
    return ("same" if set(before["state"]) <= set(after["state"]) else "same, other names") + more


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Numbers that differ, those of all rounds and owners together, each with the largest relative difference."""
    largest: dict[str, float] = {}
    words: dict[str, None] = {}
    for path in dict.fromkeys([*before, *after]):
        shown = _BY_OWNER.sub("*", path.removeprefix("ends.") if path.startswith("ends.") else path.partition(".")[2])
        shown = f"ends: {shown}" if path.startswith("ends.") else shown
        if path not in before or path not in after:
            words[f"{shown} only {'after' if path in after else 'before'}"] = None
        elif before[path] != after[path]:
            x, y = number(before[path]), number(after[path])
            if x is None or y is None:
                words[f"{shown} changed"] = None
            else:
                largest[shown] = max(largest.get(shown, 0.0), abs(x - y) / max(abs(x), abs(y)))
    return [*(f"{name} {value:.1e}" for name, value in largest.items()), *words]


def number(value: Any) -> float | None:
    """A float written by :func:`flat`, or an integer; ``None`` for anything else."""
    if isinstance(value, str):
        try:
            return float.fromhex(value) if "0x" in value else None
        except ValueError:
            return None
    return float(value) if isinstance(value, int) else None


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Prints the table. Returns whether all weights and states are the same."""
    if before["where"] != after["where"]:
        print(f"Bits may differ by the machine alone: {before['where']} before, {after['where']} after.")
    rows = [("recipe", "weights", "server state", "metrics that differ")]
    equal = True
    for title in dict.fromkeys([*before["runs"], *after["runs"]]):
        x, y = before["runs"].get(title), after["runs"].get(title)
        if x is None or y is None:
            rows.append((title, f"only {'after' if x is None else 'before'}", "", ""))
            equal = False
            continue
        changes = differences(x["numbers"], y["numbers"])
        rows.append((title, weights(x, y), server_state(x, y), "; ".join(changes) or "none"))
        equal &= weights(x, y) == "same" and server_state(x, y).startswith("same")
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    return equal


def main() -> None:
    """``write FILE`` or ``compare BEFORE AFTER``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="play the recipes and note what they leave")
    writing.add_argument("file", type=Path)
    writing.add_argument("--only", default="", metavar="WORDS", help="only recipes whose name contains this")
    comparing = commands.add_parser("compare", help="two such notes, side by side")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = options.parse_args()
    if given.command == "write":
        write(given.file, given.only)
    elif not compare(json.loads(given.before.read_text()), json.loads(given.after.read_text())):
        sys.exit(1)


if __name__ == "__main__":
    main()

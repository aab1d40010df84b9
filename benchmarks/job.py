"""A small job from start to end, a fresh process each time: federated here, and as a plain loop over the owners through ``peft``.

A Llama of 6.8 M parameters, 8 owners, 2 rounds of 4 steps. Both import their libraries, tokenize, build the base, train, and write an adapter that
``peft`` loads; ours also keeps state, journal, ledger and report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import common
from benchmarks.common import Row, pairs, say

ROOT = Path(__file__).parents[1]
CLIENTS, LENGTH, STEPS, ROUNDS = 8, 64, 4, 2


def job(which: str, folder: Path, threads: int, small: bool) -> None:
    """One job in a process of its own, with a cache of its own."""
    with TemporaryDirectory(dir=folder) as name:
        # -P so that the working directory is not searched for fedfm.
        command = [sys.executable, "-P", "-m", "benchmarks.job", f"--do={which}", f"--folder={folder}", f"--out={name}/run"]
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
        limits = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "FEDFM_CACHE": f"{name}/cache", "PYTHONPATH": path}
        subprocess.run([*command, *(["--quick"] if small else [])], env={**os.environ, **limits}, stdout=subprocess.DEVNULL, check=True)


def ours(folder: Path, out: Path, small: bool) -> None:
    """The federated job."""
    import logging

    import fedfm
    from benchmarks.work import Shape, Size, federation

    logging.getLogger("fedfm").setLevel(logging.ERROR)
    size = Size(32, 2, 64, 4, 512) if small else Size()
    for _ in fedfm.run(federation(folder, size, Shape(CLIENTS, 1, LENGTH), registered=CLIENTS, steps=STEPS, rounds=ROUNDS), out=out):
        pass


def plain(folder: Path, out: Path, small: bool) -> None:
    """The same work as one writes it by hand: each owner in turn through ``peft``, and the mean of what came of it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts: dict[str, list[str]] = {}
    with (folder / f"owners-{CLIENTS}-{STEPS}-{LENGTH}.jsonl").open() as file:
        for line in map(json.loads, file):
            texts.setdefault(line["owner"], []).append(line["text"])
    config = LlamaConfig(
        hidden_size=32 if small else 288, intermediate_size=64 if small else 768, num_hidden_layers=2 if small else 6,
        num_attention_heads=4 if small else 6, vocab_size=len(tokenizer), max_position_embeddings=128,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(out / "base")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16.0, target_modules=["q_proj", "v_proj"]))
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in params.items()}
    for _ in range(ROUNDS):
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for rows in texts.values():
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(start[name])
            optimizer = torch.optim.AdamW(params.values(), 1e-3, weight_decay=0.0)
            for row in rows[:STEPS]:
                ids = tokenizer(row, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
                optimizer.zero_grad(set_to_none=True)
                model(input_ids=ids, labels=ids).loss.backward()
                torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
                optimizer.step()
            for name, p in params.items():
                total[name] += p.detach() / len(texts)
        start = total
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(start[name])
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


def row(folder: Path, repetitions: int, threads: int, small: bool) -> Row:
    """Both jobs in turn."""
    timed = pairs(partial(job, "ours", folder, threads, small), partial(job, "plain", folder, threads, small), repetitions, warmup=1)
    return {"benchmark": "job", **common.machine(), "threads": threads, "against": "plain peft loop", **timed.to_row()}


def main() -> None:
    """The table."""
    options = common.parser(__doc__)
    options.add_argument("--repetitions", type=int, default=11, help="pairs timed (default %(default)s)")
    options.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    options.add_argument("--do", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.do is not None:
        (ours if given.do == "ours" else plain)(given.folder, given.out, given.quick)
        return
    from benchmarks.work import Size, owners, workshop

    with workshop(Size(vocab=512) if given.quick else Size()) as folder:
        owners(folder, CLIENTS, STEPS, LENGTH)
        say("jobs from start to end")
        rows = [row(folder, 1 if given.quick else given.repetitions, given.threads, given.quick)]
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

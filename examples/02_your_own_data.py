"""Your rows, and who owns them: a column says it, or a rule divides them to simulate it.

The file here is made of docstrings: each has its ``text``, the ``module`` that owns it, and its ``kind``. Yours may be .jsonl, .csv,
.parquet, a folder of texts or a Hugging Face data set.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import inspect
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from course import base

from fedfm import Federation, compare
from fedfm.data import IID, Data, Dirichlet
from fedfm.reports import comparison_lines
from fedfm.run.compare import Comparison
from fedfm.samplers import All
from fedfm.simulation import Simulation
from fedfm.tasks import Classification

MODULES = (argparse, datetime, decimal, logging, threading)


def write(path: Path) -> None:
    """Writes one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for module in MODULES:
            things = [thing for thing in vars(module).values() if inspect.isclass(thing) or inspect.isroutine(thing)]
            methods = [part for thing in things if inspect.isclass(thing) for part in vars(thing).values() if inspect.isroutine(part)]
            for part in [*things, *methods]:
                kind = "class" if inspect.isclass(part) else "method" if part in methods else "function"
                if text := inspect.getdoc(part):
                    file.write(json.dumps({"text": text, "module": module.__name__, "kind": kind}) + "\n")


def show(plan: Federation) -> None:
    """The split as a picture: a letter for each 5 % of an owner's rows."""
    owners = Simulation.build(plan).owners
    assert owners is not None
    print(plan.data.partition or f"by {plan.data.by}")
    for row in owners.picture():
        mix = "".join(label[0] * round(20 * count / row["train"]) for label, count in row["labels"].items())
        print(f"  {row['owner']:<10} {row['train']:>4} rows  {mix}")


def main(quick: bool = False) -> Comparison:
    plan = base(quick)
    with TemporaryDirectory() as folder:
        rows = str(Path(folder) / "docstrings.jsonl")
        write(Path(rows))

        print("\nThe same rows, divided in four ways. c: class, f: function, m: method.")
        kinds = replace(plan, task=Classification(text="text", label="kind", max_length=64))
        for data in (
            Data(rows, partition=IID(clients=5)),
            Data(rows, partition=Dirichlet(alpha=1.0, clients=5)),
            Data(rows, partition=Dirichlet(alpha=0.1, clients=5, min_size=10)),
            Data(rows, by="module"),
        ):
            show(replace(kinds, data=data))

        print("\nEach module is an owner and all of them tune the model in every round. Did federating pay?")
        table = compare(replace(plan, data=Data(rows, by="module"), sampler=All()), Path(folder) / "run")
    print("\n".join(comparison_lines(table.to_json())))
    return table


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # 01 has shown what the plan check has to say
    main()

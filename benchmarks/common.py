"""What every benchmark shares: rows, tables, and timings in pairs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from fedfm.core import words

Row = dict[str, Any]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="a small case, to see that it works; its numbers mean nothing")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, one JSON object per line")
    return found


def machine() -> dict[str, Any]:
    """Where and when: the part of a row that makes two of them comparable, or not."""
    packages = {}
    for name in ("fedfm", "torch", "transformers", "peft", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "source tree"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), **packages},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Pairs:
    """Seconds of two ways of doing the same, measured in turn, and the ratio of each pair."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    def to_row(self) -> Row:
        """Medians of both and of the ratio, and the ratio's range."""
        ratios = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        return {
            "ours_s": statistics.median(self.ours),
            "theirs_s": statistics.median(self.theirs),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "repetitions": len(ratios),
        }


def pairs(ours: Callable[[], object], theirs: Callable[[], object], repetitions: int, warmup: int = 2) -> Pairs:
    """Times A B B A A B ... in one process: what drifts (clock, cache, neighbours) falls on both alike."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(warmup + repetitions):
        for mine in (True, False) if i % 2 == 0 else (False, True):
            taken = seconds_of(ours if mine else theirs)
            if i >= warmup:
                seconds[mine].append(taken)
    return Pairs(tuple(seconds[True]), tuple(seconds[False]))


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = perf_counter()
    work()
    return perf_counter() - began


# --- what is shown --------------------------------------------------------------------------------------------------


def _ratio(row: Row) -> str:
    shown = f"{row['ratio']:.2f}"
    return shown if row.get("ratio_min") is None else f"**{shown}** ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"


def _seconds(name: str) -> Callable[[Row], str]:
    return lambda row: "not measured" if row[name] is None else f"{row[name]:.3g} s"


def _stage(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['per_stage'][name]:.3g} s"


def _size(name: str) -> Callable[[Row], str]:
    return lambda row: words.size(row[name])


def _plain(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(name) is None else str(row[name])


def _number(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        return "-" if value is None else f"{100 * value:.1f} %" if row["metric"] in SHARES else f"{value:.3f}"

    return show


SHARES = ("accuracy", "macro_f1")
COLUMNS: Mapping[str, Mapping[str, Callable[[Row], str]]] = {
    "cohort": {
        "clients x batch x tokens": _plain("shape"),
        "against": _plain("against"),
        "federated round": _seconds("ours_s"),
        "the other": _seconds("theirs_s"),
        "federated / other": lambda row: row["note"] if row["ratio"] is None else _ratio(row),
        "bank": _plain("bank"),
        "compiled": _plain("compiled"),
        "pairs": _plain("repetitions"),
    },
    "job": {
        "against": _plain("against"),
        "federated job": _seconds("ours_s"),
        "the other": _seconds("theirs_s"),
        "federated / other": _ratio,
        "pairs": _plain("repetitions"),
    },
    "pairs": {
        "clients x batch x tokens": _plain("shape"),
        "timed": _plain("work"),
        "before": _seconds("theirs_s"),
        "after": _seconds("ours_s"),
        "after / before": _ratio,
        "pairs": _plain("repetitions"),
        "same bits": _plain("same_bits"),
    },
    "memory": {
        "registered": _plain("registered"),
        "in a round": _plain("cohort"),
        "libraries": _size("libraries"),
        "base": _size("base"),
        "bank": _size("bank"),
        "update": _size("update"),
        "peak": _size("peak"),
        "peak / smallest": _ratio,
    },
    "owners": {
        "registered": _plain("registered"),
        "evaluated": _plain("evaluated"),
        **{name: _stage(name) for name in ("prepare", "start", "round", "evaluate", "resume")},
        "libraries": _size("libraries"),
        "prepared": _size("prepared"),
        "peak": _size("peak"),
    },
    "start": {
        "command": _plain("command"),
        "median": _seconds("ours_s"),
        "bound": _seconds("theirs_s"),
        "median / bound": _ratio,
        "imports torch": _plain("imports_torch"),
    },
    "first-hour": {
        "what": _plain("what"),
        "command": lambda row: f"`{row['command']}`",
        "took": _seconds("ours_s"),
        "what it says": _plain("printed"),
    },
    "deployed": {
        "system": _plain("system"),
        "members": _plain("members"),
        "payload": _size("payload"),
        "round": _seconds("round_s"),
        "slowest": _seconds("round_max"),
        "MB/s": lambda row: "-" if row["rate"] is None else f"**{row['rate'] / 1e6:.0f}**",
        "coordinator": _size("coordinator"),
        "broker": lambda row: "-" if row["broker"] is None else words.size(row["broker"]),
        "rounds": _plain("repetitions"),
        "server killed": _plain("killed"),
    },
    "wire": {
        "stage": _plain("stage"),
        "payload": _size("payload"),
        "sync": _plain("sync"),
        "took": _seconds("ours_s"),
        "MB/s": lambda row: (
            "-" if row["payload"] < 1e5 else f"**{row['rate'] / 1e6:.0f}** ({row['rate_min'] / 1e6:.0f} to {row['rate_max'] / 1e6:.0f})"
        ),
        "CPU here": _seconds("cpu_here"),
        "CPU broker": lambda row: "-" if row["cpu_broker"] is None else f"{row['cpu_broker']:.3g} s",
        "broker's memory": lambda row: "-" if row["broker"] is None else words.size(row["broker"]),
        "times": _plain("repetitions"),
    },
    "silos-memory": {
        "members": _plain("members"),
        "update": _size("update"),
        "idle": _size("idle"),
        "peak": _size("peak"),
        "growth in updates": lambda row: f"**{row['growth']:.2f}**",
        "broker": _size("broker"),
        "last round took": _seconds("ours_s"),
    },
    "secagg": {
        "clients": _plain("clients"),
        "values": lambda row: words.count(row["values"]),
        "dropped": _plain("dropped"),
        "neighbours, threshold": lambda row: f"{row['k']}, {row['t']}",
        "client": _seconds("ours_s"),
        "of it quantise": _stage("quantise"),
        "of it mask": _stage("mask"),
        "keys, once": _seconds("keys_s"),
        "Flower": _seconds("theirs_s"),
        "Flower / ours": lambda row: "-" if row["ratio"] is None else f"**{row['ratio']:.1f}**",
        "masks, values/s": lambda row: f"{row['masks'] / 1e6:.0f} M (**{row['masks'] / row['roofline']:.0%}** of the roofline)",
        "bytes a value": lambda row: f"{row['bytes']:.3f}",
        "server takes vectors": _seconds("server_s"),
        "server unmasks": _seconds("unmask_s"),
        "its memory grew": _size("grown"),
    },
    "truth": {
        "command": lambda row: f"`{row['command']}`",
        "rounds": _plain("rounds"),
        "owners": _plain("owners"),
        "metric": _plain("metric"),
        "before": _number("before"),
        "local-only": _number("local"),
        "federated": _number("federated"),
        "centralised": _number("centralised"),
        "travelled": _size("travelled"),
        "federated took": _seconds("ours_s"),
        "centralised took": _seconds("theirs_s"),
        "ratio": _ratio,
    },
}


def table(rows: Sequence[Row]) -> str:
    """Rows of one benchmark as a Markdown table whose columns also line up in a terminal."""
    columns = COLUMNS[rows[0]["benchmark"]]
    lines = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def where(rows: Iterable[Row]) -> str:
    """One line on the machine, the date and the versions of some rows."""
    rows = list(rows)
    first, loads = rows[0], [row["load"] for row in rows]
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    threads = f", {first['threads']} threads" if "threads" in first else ""
    device = f", {first['device']}" if first.get("device", "cpu") != "cpu" else ""
    return (
        f"{first['cpu']}, {first['cores']} cores{threads}{device}; {first['date'][:10]}; {versions}; "
        f"load average while measuring {min(loads):.1f} to {max(loads):.1f}."
    )


def save(rows: Sequence[Row], json_file: Path | None) -> None:
    """Writes the rows so far, so that a long benchmark that is stopped leaves what it has."""
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finish(rows: Sequence[Row], json_file: Path | None) -> None:
    """Shows the rows and writes them where that was asked for."""
    save(rows, json_file)
    print(where(rows), table(rows), sep="\n")


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)

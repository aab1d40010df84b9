"""``fedfm audit``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedfm.cli.parts import show_json
from fedfm.core.errors import ConfigError
from fedfm.federation import Federation
from fedfm.recipe import located, read
from fedfm.run.audit import AUDIT, AuditResult, Wanted, audit_plan
from fedfm.run.audit_rows import ROWS, split_of, typical_rows
from fedfm.run.folder import LEDGER, RECIPE, RunFolder


def audit(path: Path, overrides: Sequence[str], wanted: Wanted, quiet: bool, as_json: bool) -> None:
    """``fedfm audit``."""
    run = path if path.is_dir() else None
    if run is not None and overrides:
        raise ConfigError(f"{run} is a run, whose recipe is what it is. Audit a recipe file to change fields ({overrides[0]!r}).")
    plan = located(read(path if run is None else run / RECIPE, overrides)).resolved()
    if run is not None:
        plan = replace(plan, rounds=_rounds(run, plan))
    stream = sys.stderr if as_json else sys.stdout

    def progress(name: str, round: int, rounds: int) -> None:
        if not quiet and stream.isatty():
            print(f"\r\033[K{name}, round {round} of {rounds}", end="" if round < rounds else "\r\033[K", file=stream, flush=True)

    num_rows = ROWS if run is None else typical_rows(split_of(run))
    result = audit_plan(plan, replace(wanted, progress=progress), num_rows)
    if run is not None:
        _keep(run, result)
    if as_json:
        show_json(result.to_json())
    else:
        print("\n".join(f"{name:<10} {text}" for name, text in result.lines()))
        if run is not None:
            print(f"\nreport     {run / 'report.html'}")
    if result.refuted:
        sys.exit(1)


def _rounds(run: Path, plan: Federation) -> int:
    """How many rounds a run has released."""
    ledger = run / LEDGER
    return int(json.loads(ledger.read_text(encoding="utf-8"))["rounds"]) if ledger.is_file() else plan.rounds


def _keep(run: Path, result: AuditResult) -> None:
    from fedfm.reports import render

    with RunFolder.open(run) as folder:
        folder.write_json(AUDIT, result.to_json())
    render(run)

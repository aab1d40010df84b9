"""``fedfm audit``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

from fedfm.cli.parts import show_json
from fedfm.core.errors import ConfigError
from fedfm.federation import Federation
from fedfm.recipe import located, read
from fedfm.run.audit import AUDIT, AuditResult, Wanted, audit_plan
from fedfm.run.audit_rows import split_of, typical_rows
from fedfm.run.folder import LEDGER, RECIPE, RunFolder


def audit(path: Path, overrides: Sequence[str], wanted: Wanted, quiet: bool, as_json: bool) -> None:
    """``fedfm audit``."""
    run = path if path.is_dir() else None
    if run is not None and overrides:
        raise ConfigError(f"{run} is a run, whose recipe is what it is. Audit a recipe file to change fields ({overrides[0]!r}).")
    wanted = replace(wanted, progress=None if quiet else partial(_progress, sys.stderr if as_json else sys.stdout))
    result = _audited(run, wanted) if run is not None else audit_plan(located(read(path, overrides)).resolved(), wanted)
    if as_json:
        show_json(result.to_json())
    else:
        _show(result)
        if run is not None:
            print(f"\nreport     {run / 'report.html'}")
    if result.refuted:
        sys.exit(1)


def after_run(run: Path, quiet: bool) -> None:
    """Audits a run that has just ended, and ends the program with 1 where its claim is wrong.

    Args:
        quiet: Whether the result is written into the run's folder alone.
    """
    result = _audited(run, Wanted(progress=None if quiet else partial(_progress, sys.stdout)))
    if not quiet:
        print()
        _show(result)
    if result.refuted:
        sys.exit(1)


def _audited(run: Path, wanted: Wanted) -> AuditResult:
    """The audit of a run's promise, which its folder keeps and its report shows."""
    plan = located(read(run / RECIPE)).resolved()
    result = audit_plan(replace(plan, rounds=_rounds(run, plan)), wanted, typical_rows(split_of(run)))
    _keep(run, result)
    return result


def _progress(stream: TextIO, name: str, round: int, rounds: int) -> None:
    if stream.isatty():
        print(f"\r\033[K{name}, round {round} of {rounds}", end="" if round < rounds else "\r\033[K", file=stream, flush=True)


def _show(result: AuditResult) -> None:
    print("\n".join(f"{name:<10} {text}" for name, text in result.lines()))


def _rounds(run: Path, plan: Federation) -> int:
    """How many rounds a run has released."""
    ledger = run / LEDGER
    return int(json.loads(ledger.read_text(encoding="utf-8"))["rounds"]) if ledger.is_file() else plan.rounds


def _keep(run: Path, result: AuditResult) -> None:
    from fedfm.reports import render

    with RunFolder.open(run) as folder:
        folder.write_json(AUDIT, result.to_json())
    render(run)

"""``fedfm sweep``, and ``fedfm compare`` for runs that exist."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fedfm.cli.commands import Telling, stoppable
from fedfm.cli.parts import show_json
from fedfm.core import words
from fedfm.core.errors import ConfigError
from fedfm.reports.runs import Table


def sweep(
    recipe: Path, overrides: Sequence[str], out: Path | None, jobs: int | None, threads: int | None, dry_run: bool, telling: Telling
) -> None:
    """``fedfm sweep``."""
    from fedfm.run.sweep import plans, sweep

    if dry_run:
        cells, _ = plans(recipe, overrides)
        if telling.as_json:
            show_json([{"name": cell.name, "values": dict(cell.values)} for cell in cells])
        else:
            print("\n".join(cell.name for cell in cells))
        return
    telling.watchers()  # sets up the log

    def tell(text: str) -> None:
        if not telling.quiet:
            print(words.clean(text, 400), file=telling.stream, flush=True)

    with stoppable(f"what was completed is kept. Go on with: {shlex.join(['fedfm', *sys.argv[1:]])}"):
        table = sweep(recipe, overrides, out, jobs=jobs, threads=threads, tell=tell)
    _show(table, telling, table.page)
    if table.failed:
        message = (
            f"{len(table.failed)} of {len(table.entries)} runs failed. Start the same command again to try them again; the others are kept."
        )
        print(message, file=sys.stderr)
        sys.exit(1)


def compare_runs(runs: Sequence[Path], out: Path | None, telling: Telling) -> None:
    """``fedfm compare RUN RUN ...``."""
    from fedfm.run.side_by_side import compare_runs

    table = compare_runs(runs)
    if out is not None:
        table = table.written(out, "compare")
    _show(table, telling, table.page)


def are_runs(first: Path, others: Sequence[str]) -> bool:
    """Whether ``compare`` was given several runs, and not one with overrides.

    Raises:
        ConfigError: if it was given both.
    """
    if not others or not first.is_dir():
        return False
    folders = [Path(word).is_dir() for word in others]
    if any(folders) and not all(folders):
        odd = words.clean(others[folders.index(False)], 80)
        raise ConfigError(f"{odd} is no run's folder. Give a recipe or one run with KEY=VALUE, or several runs and nothing else.")
    if not any(folders) and not all("=" in word for word in others):
        odd = words.clean(next(word for word in others if "=" not in word), 80)
        raise ConfigError(f"{odd} is neither a run's folder nor KEY=VALUE.")
    return all(folders)


def _show(table: Table, telling: Telling, page: Path | None) -> None:
    if telling.as_json:
        show_json({**table.to_json(), "page": None if page is None else str(page)})
        return
    if not telling.quiet:
        print()
    print("\n".join(table.lines()))
    if page is not None:
        print(f"\ntable  {page.with_suffix('.csv')}\npage   {page}")

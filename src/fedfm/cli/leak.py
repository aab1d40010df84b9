"""``fedfm leak``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfm.cli.commands import Telling, stoppable
from fedfm.cli.parts import show_json
from fedfm.core.errors import ConfigError, RunError
from fedfm.core.stage import unseen
from fedfm.observers.progress import Progress


@dataclass(frozen=True)
class Target:
    """A recipe with its overrides, or a run's folder.

    Args:
        data: Rows of one owner alone, instead of the recipe's.
        out: The page to write; ``None`` for ``leak.html`` in the run's folder, or ``NAME-leak.html`` here.
    """

    path: Path
    overrides: Sequence[str] = ()
    data: str | None = None
    out: Path | None = None


def leak(target: Target, question: dict[str, Any], telling: Telling) -> None:
    """``fedfm leak``."""
    from fedfm.recipe import located, read
    from fedfm.reports import leak as pages
    from fedfm.run.folder import RECIPE
    from fedfm.run.leak import Question, leak, site_of

    asked, run = Question(**question), target.path if target.path.is_dir() else None
    if run is not None and target.overrides:
        raise ConfigError(f"{run} is a run, whose recipe is fixed. Give the recipe's file to change {target.overrides[0]!r}.")
    if run is not None and not (run / RECIPE).is_file():
        raise RunError(f"{run} holds no run (there is no {RECIPE} in it). Give a run's folder or a recipe.")
    if target.data is not None and asked.owner is not None:
        raise ConfigError("--data holds the rows of one owner, so --owner has nothing to choose from. Leave one of them out.")
    federation = located(read(target.path if run is None else run / RECIPE, target.overrides))
    page = target.out or (Path(f"{federation.name}-leak.html") if run is None else run / "leak.html")
    watchers = telling.watchers()
    stage = Progress(file=telling.stream, live=False).stage if watchers else unseen
    with stoppable("nothing has left, and no page was written."):
        stage("Preparing the data", None, None)
        known = leak(site_of(federation, target.data), asked, str(target.path), run, stage).to_json()
    pages.write(page, known)
    if telling.as_json:
        show_json({**known, "page": str(page)})
        return
    if not telling.quiet:
        print()
    print("\n".join(pages.lines(known)))
    print(f"\npage  {page}  (it shows a text of this owner: keep it at home)")

"""fedfm: Federated Foundation Models. Trains, tunes and grounds foundation models over data that cannot leave its owners.

Importing this package imports nothing heavy; each name loads when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedfm.core.version import VERSION as __version__

if TYPE_CHECKING:
    from dataclasses import replace as replace

    from fedfm.federation import Federation as Federation
    from fedfm.recipe import dump as dump
    from fedfm.recipe import load as load
    from fedfm.run.compare import compare as compare
    from fedfm.run.loop import resume as resume
    from fedfm.run.loop import run as run
    from fedfm.run.opened import open_run as open_run
    from fedfm.run.side_by_side import compare_runs as compare_runs
    from fedfm.run.sweep import sweep as sweep

_LAZY = {
    "Federation": "fedfm.federation",
    "compare": "fedfm.run.compare",
    "compare_runs": "fedfm.run.side_by_side",
    "dump": "fedfm.recipe",
    "load": "fedfm.recipe",
    "open_run": "fedfm.run.opened",
    "replace": "dataclasses",
    "resume": "fedfm.run.loop",
    "run": "fedfm.run.loop",
    "sweep": "fedfm.run.sweep",
}
__all__ = ["Federation", "__version__", "compare", "compare_runs", "dump", "load", "open_run", "replace", "resume", "run", "sweep"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fedfm' has no attribute {name!r}")

"""A run's folder: journal, checkpoints, resume; and a run beside its two ends, local-only and centralised.

``fedfm.run(federation, rounds=10)`` is :func:`fedfm.run.loop.run`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Python binds a package's name in its parent when it is imported, over the function of that name; so the package answers as the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fedfm.run.loop import run

        return run(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

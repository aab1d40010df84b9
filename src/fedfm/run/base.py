"""The base that a run began with, noted so that what was trained on it is never joined to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfm.core.errors import RunError
from fedfm.models import Foundation
from fedfm.models.digest import tokenizer_digest, weights_digest


def digests(foundation: Foundation) -> dict[str, str]:
    """What the journal notes of a base."""
    return {"weights": weights_digest(foundation), "tokenizer": tokenizer_digest(foundation.tokenizer)}


def require_base(known: Mapping[str, Any] | None, foundation: Foundation, path: Path) -> None:
    """Refuses a base that is not the one of the run in ``path``.

    Args:
        known: What its journal notes; ``None`` where it notes nothing yet.

    Raises:
        RunError: naming what has changed.
    """
    changed = [] if known is None else [name for name, digest in digests(foundation).items() if known[name] != digest]
    if changed:
        base = foundation.spec.source or foundation.spec.architecture
        raise RunError(
            f"The base model {base!r} is not the one that {path} began with: its {' and '.join(changed)} changed. "
            "What the run has trained fits the base before. Put that one back, or start the run again in a new folder."
        )

"""An owner's pause: while it lasts, its house answers nothing but that it is paused.

A file in the owner's folder says since when. The guard looks at it before a request is worked on, and again before an answer leaves.

Covered here: every verb and every run; a pause that begins while work is done (its answer does not leave). Not covered: what left before.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from fedfm.core import disk
from fedfm.core.errors import RunError

PAUSED = "paused"


def begin(folder: Path, now: datetime) -> bool:
    """Pauses the house of this folder.

    Args:
        now: With a time zone.

    Returns:
        Whether it was not paused already.

    Raises:
        RunError: if it cannot be written.
    """
    if since(folder) is not None:
        return False
    disk.write_atomic(folder / PAUSED, now.isoformat(timespec="seconds").encode(), private=True)
    return True


def end(folder: Path) -> bool:
    """Ends the pause; whether there was one.

    Raises:
        RunError: if the file cannot be removed.
    """
    try:
        (folder / PAUSED).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise disk.cannot_write(folder / PAUSED, error) from error
    disk.sync(folder)
    return True


def since(folder: Path | None) -> datetime | None:
    """When the pause began; ``None`` where the house is open.

    Raises:
        RunError: if the file is there and cannot be read; nothing may leave then.
    """
    if folder is None:
        return None
    path = folder / PAUSED
    try:
        return datetime.fromisoformat(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}). It says that this house is paused. End the pause: fedfm pause --resume"
        ) from error

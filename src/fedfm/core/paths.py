"""Paths that a person gave: only what the system can look up, and what has an end."""

from __future__ import annotations

import stat
from pathlib import Path

from fedfm.core import words
from fedfm.core.errors import ConfigError


def usable(value: Path | str, what: str) -> Path:
    """``value`` with its home folder filled in; nothing need be there.

    Args:
        what: What the path is for, as the error names it.

    Raises:
        ConfigError: if no file can have this name, the system refuses to look it up, or a pipe or a device is there, which may never end.
    """
    shown = words.clean(value, 120)
    try:
        path = Path(value).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as error:
        raise ConfigError(f"{what} {shown} cannot be looked up: {error.strerror}.") from error
    except (ValueError, RuntimeError) as error:
        reason = "it has a NUL character" if "\0" in str(value) else "there is no such home folder"
        raise ConfigError(f"{what} {shown} is no path: {reason}.") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"{what} {shown} is a pipe, a socket or a device, which may never end. Give a regular file or a folder.")
    return path

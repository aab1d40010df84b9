"""``fedfm status``: who is there, what runs, which round, how fast; once, or again and again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from fedfm.cli.parts import show_json
from fedfm.core.plain import finite
from fedfm.service.status import in_words, look

# Seconds between two looks.
_EVERY = 2.0


def status(folder: Path, watch: bool, as_json: bool) -> None:
    """Shows a consortium; with ``watch`` until Ctrl-C, and in JSON one line for each look."""
    if not watch:
        show_json(look(folder)) if as_json else print("\n".join(in_words(look(folder))))
        return
    try:
        if as_json:
            while True:
                print(json.dumps(finite(look(folder)), ensure_ascii=False, allow_nan=False), flush=True)
                time.sleep(_EVERY)
        _live(folder)
    except KeyboardInterrupt:
        sys.exit(0)


def _live(folder: Path) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # The terminal's full height is not needed, and what does not fit is cut rather than scrolled.
    with Live(Text("\n".join(in_words(look(folder)))), console=Console(), auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            time.sleep(_EVERY)
            live.update(Text("\n".join(in_words(look(folder)))), refresh=True)

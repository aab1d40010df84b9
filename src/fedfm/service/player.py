"""A process that plays one run of a coordinator, beside others (:mod:`fedfm.service.side_by_side`)."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

from fedfm.service.coordinator import play
from fedfm.service.jobs import job


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="fedfm-parent", daemon=True).start()


def main(folder: str, name: str, log_level: str) -> None:
    """Plays one job of a coordinator's folder."""
    _end_with_parent()
    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(levelname)s: %(message)s")
    logging.getLogger("fedfm").setLevel(log_level.upper())
    # So that the run ends in good order: its session is closed, and the round in flight is dropped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        play(job(Path(folder), name))
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

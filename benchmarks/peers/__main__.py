"""``python -m benchmarks.peers install``: the environments that the peers run in."""

from __future__ import annotations

import argparse

from benchmarks.peers.run import install

if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("command", choices=["install"], help="makes .venv-flower; needs a network, about 1.5 GB")
    options.parse_args()
    install()

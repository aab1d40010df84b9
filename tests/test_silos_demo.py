"""The demonstration of a consortium on one machine runs to its end, and leaves no process behind."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from fedfm.core.errors import MissingExtra

pytest.importorskip("cryptography.hazmat.primitives.hpke", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.client.memory import home
from fedfm.service.demo import MEMBERS, main
from fedfm.silos.broker import find_server
from fedfm.silos.consortium import Consortium

try:
    find_server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow


def test_the_demonstration_runs_and_ends_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    run = main(tmp_path / "silos", quick=True)
    assert (run / "report.html").is_file() and (run / "model").is_dir()
    for name in MEMBERS:
        log = home(tmp_path / "silos" / name / "keys", name) / "log.jsonl"
        assert "release" in {json.loads(line)["event"] for line in log.read_text().splitlines()}
    assert Consortium.open(tmp_path / "silos" / "consortium").broker.process() is None
    assert not [process for process in psutil.process_iter() if _is_of(process, tmp_path)]


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False

"""``log.txt`` of a run: what was logged while it was played can be read again."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_run import cache, small  # noqa: F401 (the cache of every test here)

from fedfm.core.errors import DataError, RunError
from fedfm.data import Data
from fedfm.run import log as logs
from fedfm.run.compare import compare
from fedfm.run.log import LogFile, logged
from fedfm.run.loop import resume, run

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) [\w.]+: .+")
log = logging.getLogger("fedfm.test")


def lines(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Logging is set after each test as it was before."""
    logger, root = logging.getLogger("fedfm"), logging.getLogger()
    before = logger.level, logger.propagate, list(logger.handlers), warnings.showwarning, len(root.handlers)
    yield
    assert (logger.level, logger.propagate, list(logger.handlers), warnings.showwarning, len(root.handlers)) == before


def test_a_run_keeps_its_log_and_a_resumed_one_adds_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    list(run(small(tmp_path), 1, out=out))
    first = lines(out)
    assert all(map(LINE.fullmatch, first)) and sum(" INFO " in line for line in first) >= 4
    assert any(re.search(r"INFO fedfm.run.loop: round 1: 3 asked, 0 failed, train_loss \d", line) for line in first)
    list(resume(out, 2))
    assert lines(out)[: len(first)] == first and any("resumed after round 1" in line for line in lines(out)[len(first) :])
    written = capsys.readouterr()
    assert "INFO" not in written.err and "asked" not in written.out, "info goes to the file alone"


@contextmanager
def patched_logged(folder: Path, patch: pytest.MonkeyPatch, shown: list[object]) -> Iterator[LogFile]:
    """A log, with somebody else's hook for Python's warnings in place."""
    patch.setattr(warnings, "showwarning", lambda message, *others: shown.append(message))
    with logged(folder) as notes:
        yield notes


def test_warnings_of_everybody_are_kept_and_shown_as_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[object] = []
    with monkeypatch.context() as patch, patched_logged(tmp_path, patch, shown) as notes:
        notes.begin()
        log.info("for the file")
        log.warning("for both")
        logging.getLogger("another.library").warning("of a library")
        logging.getLogger("another.library").info("for its authors")
        logging.getLogger("fedfmish").warning("of a neighbour")
        warnings.showwarning("of Python", UserWarning, "file.py", 3)
    text = (tmp_path / "log.txt").read_text()
    for words in (
        "INFO fedfm.test: for the file",
        "for both",
        "of a library",
        "of a neighbour",
        "py.warnings: UserWarning: of Python (file.py:3)",
    ):
        assert text.count(words) == 1, words
    assert "for its authors" not in text
    assert [record.message for record in caplog.records] == ["for both", "of a library", "of a neighbour"]
    assert shown == ["of Python"]


def test_a_warning_without_a_handler_is_still_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        with logged(tmp_path):
            log.warning("somebody should know")
            log.info("nobody asked")
            logging.getLogger("another.library").warning("nor this")
    err = capsys.readouterr().err
    assert err.count("somebody should know") == 1 and err.count("nor this") == 1 and "nobody asked" not in err


def test_a_lower_level_is_kept_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fedfm"), logged(tmp_path) as notes:
        notes.begin()
        log.debug("a detail")
    assert "DEBUG fedfm.test: a detail" in (tmp_path / "log.txt").read_text() and "a detail" in caplog.text


def test_an_error_is_its_last_line(tmp_path: Path) -> None:
    federation, out = small(tmp_path), tmp_path / "out"
    rounds = run(federation, out=out)
    next(rounds)
    with pytest.raises(KeyError):
        rounds.throw(KeyError("from outside"))  # type: ignore[attr-defined]
    assert lines(out)[-1].endswith("ERROR fedfm: KeyError: 'from outside'")


def test_what_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError):
        list(run(small(tmp_path, data=Data(str(tmp_path / "no.jsonl"), by="owner")), out=out))
    assert not out.exists()
    list(run(small(tmp_path), 1, out=out))
    before = lines(out)
    with pytest.raises(RunError):
        list(resume(out, 0))
    assert lines(out) == before


def test_words_of_others_stay_on_their_line(tmp_path: Path) -> None:
    with logged(tmp_path) as notes:
        notes.begin()
        log.warning("%s failed", "x\x1b[2J\n2026-01-01T00:00:00+00:00 ERROR fedfm: forged")
        try:
            raise ValueError("of\nlines")
        except ValueError:
            log.exception("%s", "y" * 10_000)
    kept = lines(tmp_path)
    assert "\x1b" not in "".join(kept) and max(map(len, kept)) < 4100
    assert [bool(LINE.fullmatch(line)) for line in kept[:2]] == [True, True] and all(line.startswith("  ") for line in kept[2:])


def test_it_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST", 5000)
    with logged(tmp_path) as notes:
        for i in range(3000):
            log.info("before it begins %d", i)
        notes.begin()
        for i in range(1000):
            log.info("line %d", i)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"log.txt", "log.old.txt"} and max(sizes.values()) <= 5000
    assert lines(tmp_path)[-1].endswith("line 999")


def test_a_disk_that_is_full_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    file = LogFile(tmp_path)
    file.begin()
    file.take(logging.LogRecord("fedfm", logging.INFO, "", 0, "lost", (), None))
    file.close()


def test_two_runs_at_once_end_in_any_order(tmp_path: Path) -> None:
    one, two = (run(small(tmp_path), 1, out=tmp_path / name) for name in ("one", "two"))
    next(one), next(two)
    list(one)
    next(two)
    two.close()  # type: ignore[attr-defined]
    assert all(any("round 1:" in line for line in lines(tmp_path / name)) for name in ("one", "two"))


def test_a_comparison_logs_into_the_run(tmp_path: Path) -> None:
    compare(small(tmp_path, rounds=1), tmp_path / "out")
    assert all(map(LINE.fullmatch, lines(tmp_path / "out")))

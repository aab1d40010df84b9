"""``log.txt`` in a run's folder: what the process that plays the run has logged, so that what scrolled by can be read again.

From ``info`` on, or from the level asked for where that is lower; of other libraries from ``warning`` on, with Python's own warnings. A resumed
run adds to it. Owners' names and clients' words are cleaned: a record is one line, but for a traceback, whose lines are indented.

Covered: memory and disk (two files of at most 4 MiB, ``log.old.txt`` the earlier one). Not covered: loss of power; the journal is what is durable.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from fedfm.core import words

LOG, OLD = "log.txt", "log.old.txt"
_MOST, _LONGEST, _WAITING = 4 << 20, 4000, 1000
_OURS = "fedfm"
_plain = logging.Formatter()


class LogFile:
    """The log of one run.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: TextIO | None = None
        self.waiting: list[str] = []

    def begin(self) -> None:
        """Writes from here on, with what came before. A run that is refused earlier leaves no trace."""
        self._open()
        for text in self.waiting:
            self._write(text)
        self.waiting.clear()

    def take(self, record: logging.LogRecord) -> None:
        """Adds a record."""
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")
        lines = [f"{when} {record.levelname} {words.clean(record.name)}: {words.clean(record.getMessage(), _LONGEST)}"]
        if record.exc_info:
            lines += ["  " + words.clean(line, _LONGEST) for line in _plain.formatException(record.exc_info).splitlines()]
        text = "".join(f"{line}\n" for line in lines)
        if self.file is not None:
            self._write(text)
        elif len(self.waiting) < _WAITING:
            self.waiting.append(text)

    def close(self) -> None:
        """Ends the log. Calling it twice is fine."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.file = None

    def _open(self) -> None:
        # A log that cannot be written ends no run: the journal says whether the disk is full.
        with suppress(OSError):
            self.file = (self.folder / LOG).open("a", encoding="utf-8", errors="replace")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            if self.file is not None and self.file.tell() + len(text.encode("utf-8", "replace")) > _MOST:
                self.close()
                (self.folder / LOG).replace(self.folder / OLD)
                self._open()
            if self.file is not None:
                self.file.write(text)
                self.file.flush()


class _Ours(logging.Handler):
    """Stands at our logger while runs are played: a record goes to their files, and to the handlers before if they would have had it."""

    def emit(self, record: logging.LogRecord) -> None:
        for file in _playing.files:
            file.take(record)
        if _playing.wanted(record):
            for handler in _playing.handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)
            if _playing.propagate:
                logging.getLogger().callHandlers(record)


class _Others(logging.Handler):
    """Stands at the root: what other libraries warn of goes to the files too."""

    def emit(self, record: logging.LogRecord) -> None:
        if not f"{record.name}.".startswith(f"{_OURS}.") and record.levelno >= logging.WARNING:
            for file in _playing.files:
                file.take(record)
        # Python prints a warning that has no handler; we are none in this sense.
        if logging.getLogger().handlers == [self] and logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


class _Playing:
    """The logs of the runs that this process plays now, and how logging was set before the first of them."""

    def __init__(self) -> None:
        self.files: list[LogFile] = []
        self.ours, self.others = _Ours(), _Others()
        self.level, self.before, self.propagate = logging.NOTSET, logging.WARNING, True
        self.handlers: list[logging.Handler] = []
        self.show: Any = None

    def add(self, file: LogFile) -> None:
        logger = logging.getLogger(_OURS)
        if not self.files:
            self.level, self.before, self.propagate = logger.level, logger.getEffectiveLevel(), logger.propagate
            self.handlers = logger.handlers
            logger.handlers, logger.propagate = [self.ours], False
            logger.setLevel(min(self.before, logging.INFO))
            logging.getLogger().addHandler(self.others)
            self.show, warnings.showwarning = warnings.showwarning, self.warning
        self.files.append(file)

    def remove(self, file: LogFile) -> None:
        self.files.remove(file)
        if self.files:
            return
        logger = logging.getLogger(_OURS)
        logger.handlers = [*self.handlers, *(handler for handler in logger.handlers if handler is not self.ours)]
        logger.propagate = self.propagate
        logger.setLevel(self.level)
        logging.getLogger().removeHandler(self.others)
        # Somebody else may have put a hook of his own in place meanwhile.
        if warnings.showwarning == self.warning:
            warnings.showwarning = self.show

    def wanted(self, record: logging.LogRecord) -> bool:
        """Whether a record of ours would have been logged without us: by the level of the nearest logger that has one."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger.name != _OURS:
            if logger.level:
                return True  # It has passed that level.
            logger = logger.parent
        return record.levelno >= self.before

    def warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = f"{category.__name__}: {message} ({filename}:{lineno})"
        record = logging.LogRecord("py.warnings", logging.WARNING, filename, lineno, text, (), None)
        for own in self.files:
            own.take(record)
        self.show(message, category, filename, lineno, file, line)


_playing = _Playing()


@contextmanager
def logged(folder: Path) -> Iterator[LogFile]:
    """Keeps the log of the run in ``folder`` as long as the block lasts, with the error that ends it. It is written once it has begun."""
    file = LogFile(folder)
    _playing.add(file)
    try:
        yield file
    except GeneratorExit:
        raise
    except BaseException as error:
        text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else f"stopped by {type(error).__name__}"
        file.take(logging.LogRecord(_OURS, logging.ERROR, "", 0, "%s", (text,), None))
        raise
    finally:
        _playing.remove(file)
        file.close()

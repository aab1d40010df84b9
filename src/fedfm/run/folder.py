"""A run's folder::

    recipe.yaml               exactly what ran, every field written out
    journal.jsonl             what happened, append-only; a round is committed by its line here
    state/round-000007.safetensors   the server's state after a round; the last two are kept, and the one with the best score
    metrics.jsonl             a line for each committed round, round 0 is the evaluation before training
    metrics.csv               the same as a table: a row for each round, without what is told of single owners
    ledger.json               what it cost
    privacy.jsonl             what it has spent of a privacy promise, append-only; on disk before any noise is drawn
    split.json                who owns how much of what
    clients/                  what simulated clients remember (theirs, not the server's)
    model/                    the result, in the layout the rest of the world loads
    compare.json, report.html
    log.txt                   what the process logged

A round is written in this order: its state, its line in the journal, its line in the metrics and its row in the table, the ledger.
Only the journal decides: its last line whose state file is intact is where a run goes on, and whatever
else is in the folder is brought to agree with that. A journal that is damaged, or gone, or behind what lies beside it, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedfm.core import disk
from fedfm.core.errors import RunError
from fedfm.core.journal import Journal, Mark
from fedfm.core.parts import ServerState
from fedfm.core.plain import finite
from fedfm.core.round import RoundRecord
from fedfm.core.score import best
from fedfm.engines.nats import JOB
from fedfm.run.budget import PRIVACY
from fedfm.run.flat import TABLE, Table, flat
from fedfm.run.ledger import Ledger
from fedfm.run.log import LOG, OLD

RECIPE, JOURNAL, METRICS, LEDGER, SPLIT, COMPARE, MODEL = (
    "recipe.yaml", "journal.jsonl", "metrics.jsonl", "ledger.json", "split.json", "compare.json", "model",
)  # fmt: skip
_KEEP = 2
_ROUND = re.compile(rb'\{"round":(\d{1,9}),')


def is_finished(path: Path) -> bool:
    """Whether the run in ``path`` has played its rounds and written its model.

    Raises:
        RunError: if its journal is damaged.
    """
    return (path / RECIPE).is_file() and read_journal(path).ended


def read_journal(path: Path) -> Journal:
    """The journal of the run in ``path``, checked line by line, and against the states and metrics beside it.

    Raises:
        RunError: if it is damaged, or missing, or lacks rounds that were completed.
    """
    # A run that is being played adds to its journal last, so what lies beside it is looked at first.
    states = [int(file.stem.removeprefix("round-")) for file in path.glob("state/round-*.safetensors") if file.stem[6:].isdigit()]
    measured = _last_measured(path / METRICS)
    journal = Journal.read(path / JOURNAL)
    last = len(journal.rounds) - 1
    remedy = "Restore the journal from a copy, or start the run again in a new folder."
    if not journal.num_lines and (states or measured is not None):
        raise RunError(f"{path} has states or metrics of a run, but no {JOURNAL} that says what they are. {remedy}")
    # A state is written before its line, and the line before its metrics.
    if max(states, default=-1) > last + 1:
        raise RunError(f"{path} has a state of round {max(states)}, but its {JOURNAL} ends after round {last}: lines are missing. {remedy}")
    if measured is not None and measured > last:
        raise RunError(
            f"{path} has metrics of round {measured}, but its {JOURNAL} ends after round {last}: lines are missing. {remedy} "
            f"If it is {METRICS} that was changed, delete it: it is made again from the journal."
        )
    return journal


def _last_measured(path: Path) -> int | None:
    """The highest round of which there are metrics; lines that cannot be read tell nothing."""
    rounds = []
    if path.is_file():
        with path.open("rb") as file:
            # The number stands first in a line, so that a line need not be parsed, which may tell of many owners.
            rounds = [int(match[1]) for match in (_ROUND.match(line) for line in file if line.endswith(b"\n")) if match]
    return max(rounds, default=None)


@dataclass
class RunFolder:
    """An open run folder, locked against every other process until it is closed.

    Attributes:
        journal: What happened so far.
    """

    path: Path
    journal: Journal
    _lock: int = -1

    @cached_property
    def table(self) -> Table:
        """``metrics.csv``."""
        return Table(self.path / TABLE)

    @classmethod
    def create(cls, path: Path, recipe: str) -> Self:
        """A new run's folder.

        Raises:
            RunError: if there is one already, or it cannot be written.
        """
        taken = sorted(item.name for item in path.iterdir() if not item.name.startswith(".")) if path.is_dir() else []
        if RECIPE in taken:
            raise RunError(
                f"{path} holds a run already, and a run is never overwritten. Go on with it: fedfm resume {path}; or choose another --out."
            )
        if taken or (path.exists() and not path.is_dir()):
            raise RunError(f"{path} holds other files ({', '.join(taken[:3]) or 'it is a file'}). Choose another --out.")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk.cannot_write(path, error) from error
        folder = cls(path, Journal(path / JOURNAL))
        folder._acquire()
        try:
            disk.write_atomic(path / RECIPE, recipe.encode())
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of a run that goes on.

        Raises:
            RunError: if there is none, another process has it open, or its journal is damaged.
        """
        if not (path / RECIPE).is_file():
            raise RunError(f"{path} holds no run (there is no {RECIPE} in it). Start one: fedfm run RECIPE --out {path}")
        folder = cls(path, Journal(path / JOURNAL))
        folder._acquire()
        try:
            folder.journal = read_journal(path)
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Releases the lock. Calling it twice is fine."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _acquire(self) -> None:
        busy = f"{self.path} is in use by another process. Wait for it to end, or stop it, then try again."
        self._lock = disk.lock(self.path / ".lock", busy)

    # --- writing ---------------------------------------------------------------------------------------------------

    def note(self, event: str, **what: Any) -> None:
        """Adds a line to the journal, durably."""
        self.journal.add(event, **what)

    def commit(self, state: ServerState, record: RoundRecord, ledger: Ledger) -> None:
        """Commits a round. Once the journal has its line the round is never played again.

        Raises:
            RunError: if it cannot be written; the rounds before it are intact.
        """
        data, line = _state_bytes(state), record_json(record)
        disk.write_atomic(self._state_file(state.round), data)
        self.note("round", round=state.round, state=_digest(data), record=line, ledger=ledger.to_json())
        disk.append(self.path / METRICS, _json(line))
        self.table.add(flat(line))
        disk.write_atomic(self.path / LEDGER, _pretty(ledger.to_json()))
        self.remove_old_states()

    def remove_old_states(self) -> None:
        """Removes states but the last ones and the best one.

        A run that finds its last state damaged goes back a round, so the state that was best until then is kept as well.

        Raises:
            RunError: if one cannot be removed.
        """
        marks = self.journal.rounds
        rounds = {mark.round for mark in marks[-_KEEP:]} | {best(self.journal.scores[: len(marks) - back]) for back in range(_KEEP)}
        kept = {self._state_file(round) for round in rounds if round is not None}
        for old in sorted(set((self.path / "state").glob("round-*.safetensors")) - kept):
            try:
                old.unlink()
            except OSError as error:
                raise disk.cannot_write(old, error) from error

    def discard(self) -> None:
        """Removes a run without a result: only the files that a run writes, and the folder if it is empty then."""
        for name in ("state", "clients", "logs"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (RECIPE, JOURNAL, METRICS, TABLE, LEDGER, SPLIT, LOG, OLD, JOB, PRIVACY, ".lock"):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file into the folder, durably."""
        disk.write_atomic(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file into the folder, durably."""
        disk.write_atomic(self.path / name, _pretty(value))

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a JSON list into the folder, a row on each line, durably."""
        lines = (_json(finite(row)) + ("," if i < len(rows) else "") for i, row in enumerate(rows, 1))
        disk.write_lines(self.path / name, ("[", *lines, "]"))

    def rewrite_folder(self, name: str, write: Callable[[Path], None]) -> None:
        """Calls ``write`` to fill the folder ``name`` afresh. If it raises, the old contents stay. After a crash in between it is called again.

        The folder is written in place, not renamed, because the files may hold its path.
        """
        target, old = self.path / name, self.path / f".{name}.old"
        try:
            disk.step(f"before {name}")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.replace(old)
            target.mkdir()
            try:
                write(target)
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                if old.exists():
                    old.replace(target)
                raise
            for file in filter(Path.is_file, target.rglob("*")):
                disk.sync(file)
            disk.sync(self.path)
            disk.step(f"written {name}")
        except (OSError, SafetensorError) as error:
            raise disk.cannot_write(target, error) from error
        shutil.rmtree(old, ignore_errors=True)

    # --- going on --------------------------------------------------------------------------------------------------

    def first(self, event: str) -> Mapping[str, Any] | None:
        """The first line of a kind that is written once."""
        return self.journal.first.get(event)

    def choices(self) -> dict[str, int]:
        """Choices for the whole run, which a resumed run keeps."""
        return dict(self.journal.choices)

    def ledger(self, mark: Mark) -> Ledger:
        """What the run had cost after a round.

        Raises:
            RunError: if it is not a ledger of this version.
        """
        try:
            return Ledger.from_json(self.journal.line(mark)["ledger"])
        except TypeError as error:
            raise RunError(f"{self.path / JOURNAL}: the ledger of round {mark.round} is of another version of fedfm ({error}).") from error

    def restore(self) -> tuple[ServerState, Ledger] | None:
        """The state after the last committed round, with the folder brought to agree with it; ``None`` if no round was committed.

        The journal stays as it is, but for half a line that a crash left: the ``resume`` line that follows says from which round on it holds.

        Raises:
            RunError: if rounds were committed but none of their states is intact.
        """
        rounds = self.journal.rounds
        newest = next(((mark, state) for mark in reversed(rounds[-_KEEP:]) if (state := self._load(mark)) is not None), None)
        if rounds and newest is None:
            kept = [self._state_file(mark.round).name for mark in rounds[-_KEEP:]]
            raise RunError(
                f"{self.path}: rounds were completed, but their states ({', '.join(kept)}) are gone or damaged. Start again with another --out."
            )
        ledger = Ledger() if newest is None else self.ledger(newest[0])
        # Metrics are never ahead of the journal, so they are cut before a line of it is made void.
        records = self.journal.records(-1 if newest is None else newest[0].round)
        rows: list[dict[str, Any]] = []

        def measured() -> Iterator[str]:
            # The journal tells of every owner, and is read once.
            for record in records:
                rows.append(flat(record))
                yield _json(record)

        disk.write_lines(self.path / METRICS, measured())
        self.table.write(rows)
        disk.write_atomic(self.path / LEDGER, _pretty(ledger.to_json()))
        self.journal.mend()
        for stray in (*self.path.glob(".*.tmp"), *self.path.glob("state/.*.tmp")):
            stray.unlink()
        return None if newest is None else (newest[1], ledger)

    def state_of(self, round: int | Literal["best"]) -> ServerState:
        """The state after a round.

        Args:
            round: Its number, or ``best`` for the round with the best score.

        Raises:
            RunError: if there is no such round, or its state is not kept or damaged.
        """
        marks, chosen = self.journal.rounds, best(self.journal.scores)
        kept = [mark.round for mark in marks if self._state_file(mark.round).is_file()]
        names = ", ".join(f"{number} (best)" if number == chosen else str(number) for number in kept)
        if round == "best":
            if chosen is None:
                raise RunError(
                    f"{self.path} has no best round: no round that it kept was evaluated. Rounds with a state: {names or 'none'}."
                )
            round = chosen
        state = self._load(marks[round]) if 0 <= round < len(marks) else None
        if state is None:
            raise RunError(
                f"{self.path} has no intact state of round {round}: a run keeps its last {_KEEP} rounds and the best one. "
                f"Rounds with a state: {names or 'none'}."
            )
        return state

    def _state_file(self, round: int) -> Path:
        return self.path / "state" / f"round-{round:06d}.safetensors"

    def _load(self, mark: Mark) -> ServerState | None:
        """The state that a line of the journal commits to, if its file is there and intact."""
        path = self._state_file(mark.round)
        try:
            with path.open("rb") as file:
                intact = hashlib.file_digest(file, _new_digest).hexdigest() == mark.state
            return load_state(path) if intact else None
        except OSError:
            return None


def load_state(path: Path) -> ServerState:
    """The server's state in a file.

    Raises:
        RunError: if it is not one.
    """
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["fedfm"])
            params = {name: file.get_tensor(f"params/{name}") for name in meta["params"]}
            parts = {place: {name: file.get_tensor(f"parts/{place}/{name}") for name in names} for place, names in meta["parts"].items()}
            counted = {str(client): int(ticket) for client, ticket in meta["counted"].items()}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not the state of a run: {error}") from error
    return ServerState(meta["round"], params, parts, counted)


def latest_state(path: Path) -> ServerState:
    """The newest intact state of the run in ``path``, for reading only.

    Raises:
        RunError: if there is no run, or no round was committed.
    """
    return state_after(path)


def state_after(path: Path, round: int | Literal["last", "best"] = "last") -> ServerState:
    """The state of the run in ``path`` after a round, for reading only.

    Args:
        round: The newest intact one (``last``), the one with the best score (``best``), or a round's number, whose state must be kept still.

    Raises:
        RunError: if there is no run, no round was committed, or the state of that round is not kept.
    """
    if not (path / RECIPE).is_file():
        raise RunError(f"{path} holds no run (there is no {RECIPE} in it).")
    folder = RunFolder(path, read_journal(path))
    if round != "last":
        return folder.state_of(round)
    for mark in reversed(folder.journal.rounds[-_KEEP:]):
        if (state := folder._load(mark)) is not None:
            return state
    raise RunError(f"The run in {path} has no completed round yet. Go on with it: fedfm resume {path}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; an unfinished last one is what a crash leaves, and is dropped.

    Raises:
        RunError: if a line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    values = []
    for i, line in enumerate(lines[:-1]):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{i + 1} is not JSON ({error}); the file was changed by something else than fedfm.") from error
    return values


def record_json(record: RoundRecord) -> dict[str, Any]:
    """A record as written; a number that JSON does not have (NaN, infinity) becomes null."""
    values: dict[str, Any] = finite(asdict(record))
    return values


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _pretty(value: Any) -> bytes:
    return (json.dumps(finite(value), allow_nan=False, indent=1) + "\n").encode()


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _state_bytes(state: ServerState) -> bytes:
    # safetensors sorts its tensors; the order of a tree is part of it and goes into the header.
    meta = {
        "round": state.round,
        "params": list(state.params),
        "parts": {place: list(tree) for place, tree in state.parts.items()},
        "counted": dict(state.counted),
    }
    # A file holds no tensor twice, but an optimizer's state may start as the parameters themselves.
    tensors = {f"params/{name}": leaf for name, leaf in state.params.items()}
    tensors |= {f"parts/{place}/{name}": leaf.clone() for place, tree in state.parts.items() for name, leaf in tree.items()}
    data: bytes = save({name: leaf.detach().cpu().contiguous() for name, leaf in tensors.items()}, {"fedfm": json.dumps(meta)})
    return data

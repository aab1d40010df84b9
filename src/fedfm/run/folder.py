"""A run's folder::

    recipe.yaml               exactly what ran, every field written out
    journal.jsonl             what happened, append-only; a round is committed by its line here
    state/round-000007.safetensors   the server's state after a round; the last two are kept
    metrics.jsonl             a line for each committed round, round 0 is the evaluation before training
    ledger.json               what it cost
    split.json                who owns how much of what
    clients/                  what simulated clients remember (theirs, not the server's)
    model/                    the result, in the layout the rest of the world loads
    compare.json, report.html

A round is written in this order: its state, its line in the journal, its line in the metrics, the ledger.
Only the journal decides: its last line whose state file is intact is where a run goes on, and whatever
else is in the folder is brought to agree with that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedfm.core import disk
from fedfm.core.errors import RunError
from fedfm.core.parts import ServerState
from fedfm.core.round import RoundRecord
from fedfm.run.ledger import Ledger

RECIPE, JOURNAL, METRICS, LEDGER, SPLIT, COMPARE, MODEL = (
    "recipe.yaml", "journal.jsonl", "metrics.jsonl", "ledger.json", "split.json", "compare.json", "model",
)  # fmt: skip
_KEEP = 2


def is_finished(path: Path) -> bool:
    """Whether the run in ``path`` has played its rounds and written its model."""
    return any(line.get("event") == "end" for line in read_lines(path / JOURNAL))


@dataclass
class RunFolder:
    """An open run folder, locked against every other process until it is closed.

    Attributes:
        journal: Its lines so far.
    """

    path: Path
    journal: list[dict[str, Any]] = field(default_factory=list)
    _lock: int = -1

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
        folder = cls(path)
        folder._acquire()
        disk.write_atomic(path / RECIPE, recipe.encode())
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of a run that goes on.

        Raises:
            RunError: if there is none, or another process has it open.
        """
        if not (path / RECIPE).is_file():
            raise RunError(f"{path} holds no run (there is no {RECIPE} in it). Start one: fedfm run RECIPE --out {path}")
        folder = cls(path)
        folder._acquire()
        folder.journal = read_lines(path / JOURNAL)
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
        try:
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise disk.cannot_write(self.path / ".lock", error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise RunError(f"{self.path} is in use by another process. Wait for it to end, or stop it, then try again.") from error

    # --- writing ---------------------------------------------------------------------------------------------------

    def note(self, event: str, **what: Any) -> None:
        """Adds a line to the journal, durably."""
        line = {"event": event, **what}
        disk.append(self.path / JOURNAL, _json(line))
        self.journal.append(line)

    def commit(self, state: ServerState, record: RoundRecord, ledger: Ledger) -> None:
        """Makes a round last. Once the journal has its line the round is never played again.

        Raises:
            RunError: if it cannot be written; the rounds before it are intact.
        """
        data = _state_bytes(state)
        disk.write_atomic(self._state_file(state.round), data)
        self.note("round", round=state.round, state=_digest(data), record=record_json(record), ledger=ledger.to_json())
        disk.append(self.path / METRICS, _json(record_json(record)))
        disk.write_atomic(self.path / LEDGER, _pretty(ledger.to_json()))
        for old in sorted((self.path / "state").glob("round-*.safetensors"))[:-_KEEP]:
            old.unlink()

    def discard(self) -> None:
        """Removes a run that has come to nothing; only what a run writes, and the folder if that leaves it empty."""
        for name in ("state", "clients", "logs"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (RECIPE, JOURNAL, METRICS, LEDGER, SPLIT, ".lock"):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file into the folder, durably."""
        disk.write_atomic(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file into the folder, durably."""
        disk.write_atomic(self.path / name, _pretty(value))

    def rewrite_folder(self, name: str, write: Callable[[Path], None]) -> None:
        """Has ``write`` fill the folder ``name`` afresh; if it raises, what was there before stays. Done again where a crash came between.

        It is written in place, not renamed into it, because what ``write`` leaves may hold its own path.
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

    def first(self, event: str) -> dict[str, Any] | None:
        """The first line of this kind."""
        return next((line for line in self.journal if line["event"] == event), None)

    def choices(self) -> dict[str, int]:
        """What was chosen by measuring, so that a resumed run need not measure again."""
        return {name: value for line in self.journal if line["event"] == "plan" for name, value in line.items() if name != "event"}

    def restore(self) -> tuple[ServerState, Ledger] | None:
        """The state after the last committed round, with the folder brought to agree with it; ``None`` if no round was committed.

        Raises:
            RunError: if rounds were committed but none of their states is intact.
        """
        rounds = [i for i, line in enumerate(self.journal) if line["event"] == "round"]
        found = next(((i, state) for i in reversed(rounds) if (state := self._load(self.journal[i])) is not None), None)
        if rounds and found is None:
            kept = [self._state_file(self.journal[i]["round"]).name for i in rounds[-_KEEP:]]
            raise RunError(
                f"{self.path}: rounds were completed, but their states ({', '.join(kept)}) are gone or damaged. Start again with another --out."
            )
        last = -1 if found is None else found[0]
        ledger = Ledger() if found is None else Ledger.from_json(self.journal[last]["ledger"])
        # Half a line from a crash, or rounds whose state did not survive, must not stand before what follows; what was measured stays.
        self.journal = [
            line for i, line in enumerate(self.journal) if i <= last or line["event"] in ("start", "recipe", "data", "roster", "plan")
        ]
        records = [line["record"] for line in self.journal if line["event"] == "round"]
        disk.write_atomic(self.path / JOURNAL, "".join(_json(line) + "\n" for line in self.journal).encode())
        disk.write_atomic(self.path / METRICS, "".join(_json(record) + "\n" for record in records).encode())
        disk.write_atomic(self.path / LEDGER, _pretty(ledger.to_json()))
        for stray in (*self.path.glob(".*.tmp"), *self.path.glob("state/.*.tmp")):
            stray.unlink()
        return None if found is None else (found[1], ledger)

    def _state_file(self, round: int) -> Path:
        return self.path / "state" / f"round-{round:06d}.safetensors"

    def _load(self, line: Mapping[str, Any]) -> ServerState | None:
        """The state that a journal line commits to, if its file is there and intact."""
        path = self._state_file(line["round"])
        try:
            return load_state(path) if _digest(path.read_bytes()) == line["state"] else None
        except FileNotFoundError:
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
    if not (path / RECIPE).is_file():
        raise RunError(f"{path} holds no run (there is no {RECIPE} in it).")
    folder = RunFolder(path, read_lines(path / JOURNAL))
    for line in reversed(folder.journal):
        if line["event"] == "round" and (state := folder._load(line)) is not None:
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
    found = []
    for i, line in enumerate(lines[:-1]):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{i + 1} is not JSON ({error}); the file was changed by something else than fedfm.") from error
    return found


def record_json(record: RoundRecord) -> dict[str, Any]:
    """A record as written; a number that JSON does not have (NaN, infinity) becomes null."""
    found: dict[str, Any] = _finite(asdict(record))
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _pretty(value: Any) -> bytes:
    return (json.dumps(_finite(value), allow_nan=False, indent=1) + "\n").encode()


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

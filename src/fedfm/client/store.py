"""What a client remembers from round to round: error feedback, control variates. It never leaves the owner's house.

On disk a memory is ``<folder>/clients/<slug>/memory-000007.safetensors``: what the client knew after round 7.
Two versions are kept, because the server may crash after the client has written and before the round is committed:
the client is then asked for round 7 again, and must start from what it had before it.

Covered here: a torn or altered file, another client's file, a memory that is gone. Each is refused, because going on
from a memory that is not the client's own would change the algorithm without a word. Not covered: secrecy from whoever can read the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedfm.core.disk import cannot_write, slug, write_atomic
from fedfm.core.errors import RunError
from fedfm.core.parts import ClientId
from fedfm.core.tree import Tree


class _Version(NamedTuple):
    before: int | None  # the round of the version it was made from; None for a client's first
    tree: Tree


def home(folder: Path, client: ClientId) -> Path:
    """A client's own folder in a run's, whatever its name is."""
    return folder / "clients" / slug(client)


class StateStore:
    """The memories of one or more clients.

    Args:
        folder: The run's folder; ``None`` keeps them in this process, for as long as it lives.

    Example:
        >>> store = StateStore(None)
        >>> store.save("alice", 3, {"error": torch.ones(1)})
        >>> store.load("alice", 4)["error"].tolist(), dict(store.load("alice", 3))
        ([1.0], {})
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[ClientId, dict[int, _Version]] = {}

    def load(self, client: ClientId, round: int) -> dict[str, torch.Tensor]:
        """What the client knew before ``round``; empty if it knew nothing. The tensors are the caller's to change.

        Raises:
            RunError: if the file is damaged or not this client's, or if that memory is no longer kept.
        """
        versions = self._versions(client)
        past = [version for version in versions if version < round]
        if past:
            return {name: leaf.clone() for name, leaf in self._read(client, past[-1]).tree.items()}
        if versions and (before := self._read(client, versions[0]).before) is not None:
            raise RunError(
                f"Client {client!r} is asked for round {round}, but what it remembered from round {before} is no longer kept (only rounds {versions} are). "
                "Going on without it would change the result. Start the run again in a new folder."
            )
        return {}

    def save(self, client: ClientId, round: int, tree: Tree) -> None:
        """What the client knows after ``round``; durable when this returns.

        Keeps this version and the one before it. Nothing is written while there has never been anything to remember.

        Raises:
            RunError: if it cannot be written.
        """
        versions = self._versions(client)
        if not tree and not versions:
            return
        past = [version for version in versions if version < round]
        # A leaf may be a row of a bank that goes on changing, so it is copied out.
        kept = {name: leaf.detach().to("cpu", copy=True).contiguous() for name, leaf in tree.items()}
        again = self._read(client, round).before if round in versions and not past else None
        self._write(client, round, _Version(past[-1] if past else again, kept))
        # Later versions belong to a future that the server has abandoned.
        self._drop(client, {version for version in versions if version != round} - set(past[-1:]))

    def _path(self, client: ClientId, round: int) -> Path:
        assert self.folder is not None
        return home(self.folder, client) / f"memory-{round:06d}.safetensors"

    def _versions(self, client: ClientId) -> list[int]:
        if self.folder is None:
            return sorted(self._held.get(client, {}))
        found = (
            re.fullmatch(r"memory-(\d{6,})\.safetensors", path.name) for path in home(self.folder, client).glob("memory-*.safetensors")
        )
        return sorted(int(match[1]) for match in found if match)

    def _read(self, client: ClientId, round: int) -> _Version:
        if self.folder is None:
            return self._held[client][round]
        path = self._path(client, round)
        try:
            data = path.read_bytes()
            tree = load(data)
            told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            intact = told["digest"] == _digest(client, round, told["before"], tree)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, client, round, str(error)) from error
        if not intact:
            raise _damaged(path, client, round, "its contents do not match its digest")
        return _Version(int(told["before"]) if told["before"] else None, tree)

    def _write(self, client: ClientId, round: int, version: _Version) -> None:
        if self.folder is None:
            self._held.setdefault(client, {})[round] = version
            return
        before = "" if version.before is None else str(version.before)
        tensors = dict(version.tree)
        write_atomic(self._path(client, round), save(tensors, {"before": before, "digest": _digest(client, round, before, tensors)}))

    def _drop(self, client: ClientId, rounds: set[int]) -> None:
        if self.folder is None:
            for round in rounds:
                del self._held[client][round]
            return
        # A client that was killed while it wrote has left its unfinished file.
        for path in [*(self._path(client, round) for round in rounds), *home(self.folder, client).glob(".memory-*.tmp")]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(path, error) from error


def _digest(client: ClientId, round: int, before: str, tree: Tree) -> str:
    digest = hashlib.blake2b(json.dumps([client, round, before]).encode(), digest_size=16)
    for name, leaf in sorted(tree.items()):
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        digest.update(leaf.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, client: ClientId, round: int, why: str) -> RunError:
    return RunError(
        f"{path}: what client {client!r} remembered after round {round} cannot be read: {why}. "
        "It is not skipped, because the client would go on with a wrong memory. Restore the file from a copy, or start the run again in a new folder."
    )

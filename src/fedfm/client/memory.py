"""What a client remembers from round to round: error feedback, control variates, parameters that stay at home. It never leaves the owner's house.

Each memory has a ticket, which the server gives out with its request. A memory becomes current when the server has counted it: the next request
says which of the client's tickets was counted last, and the client goes on from that one. So an answer that was lost, late or refused, and a
round that a crash took back, leave no trace. On disk a memory is ``<folder>/clients/<slug>/memory-000007.safetensors``, the number its ticket.

Covered here: a torn or altered file, another client's file, a memory that is gone. Each is refused, because going on
from a memory that is not the client's own would change the algorithm without a word. Not covered: secrecy from whoever can read the disk; a server
that lies about the ticket. A run that resumes from an earlier state honestly names an earlier ticket, or none, so the client cannot tell the two apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedfm.core.disk import cannot_write, slug, write_atomic
from fedfm.core.errors import RunError
from fedfm.core.messages import ClientId
from fedfm.core.tree import Tree, raw


def home(folder: Path, client: ClientId) -> Path:
    """The folder of one client in a run's folder. Any client's name is safe."""
    return folder / "clients" / slug(client)


class Memory:
    """The memories of one or more clients.

    Args:
        folder: The run's folder; ``None`` keeps them in this process, for as long as it lives.

    Example:
        >>> memory = Memory(None)
        >>> memory.save("alice", 3, None, {"error": torch.ones(1)})
        3
        >>> memory.load("alice", 3)["error"].tolist(), memory.load("alice", None)
        ([1.0], {})
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[ClientId, dict[int, Tree]] = {}

    def load(self, client: ClientId, counted: int | None) -> dict[str, torch.Tensor]:
        """The memory under the ticket that was counted last; empty where none was. The caller may change the tensors.

        Raises:
            RunError: if that memory is damaged, not this client's, or gone.
        """
        if counted is None:
            return {}
        tickets = self._tickets(client)
        if counted not in tickets:
            kept = f"only those of the tickets {tickets}" if tickets else "and nothing else of this run"
            raise RunError(
                f"Client {client!r} no longer has what it remembered with ticket {counted}, which the server has counted ({kept} are kept). "
                "Going on without it would change the result. Restore the client's folder from a copy, or start the run again in a new folder."
            )
        return {name: leaf.clone() for name, leaf in self._read(client, counted).items()}

    def save(self, client: ClientId, ticket: int, counted: int | None, tree: Tree) -> int | None:
        """Keeps what the client knows after its work under ``ticket``, beside what was counted last and what was counted before that.

        A server whose newest state is damaged goes on from the one before it. All else is forgotten.

        Returns:
            The ticket once the memory is durable, ``None`` where there was never anything to remember.

        Raises:
            RunError: if it cannot be written.
        """
        remembers = bool(tree) or counted is not None
        if remembers:
            # A leaf may be a row of a bank that goes on changing, so it is copied out.
            self._write(client, ticket, {name: leaf.detach().to("cpu", copy=True).contiguous() for name, leaf in tree.items()})
        elif self.folder is not None and not home(self.folder, client).exists():
            return None
        tickets = self._tickets(client)
        before = max((known for known in tickets if counted is not None and known < counted), default=None)
        self._drop(client, set(tickets) - {ticket if remembers else None, counted, before})
        return ticket if remembers else None

    def _path(self, client: ClientId, ticket: int) -> Path:
        assert self.folder is not None
        return home(self.folder, client) / f"memory-{ticket:06d}.safetensors"

    def _tickets(self, client: ClientId) -> list[int]:
        if self.folder is None:
            return sorted(self._held.get(client, {}))
        matches = (
            re.fullmatch(r"memory-(\d{6,})\.safetensors", path.name) for path in home(self.folder, client).glob("memory-*.safetensors")
        )
        return sorted(int(match[1]) for match in matches if match)

    def _read(self, client: ClientId, ticket: int) -> Tree:
        if self.folder is None:
            return self._held[client][ticket]
        path = self._path(client, ticket)
        try:
            data = path.read_bytes()
            tree: Tree = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            intact = metadata["digest"] == _digest(client, ticket, tree)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, client, ticket, str(error)) from error
        if not intact:
            raise _damaged(path, client, ticket, "its contents do not match its digest")
        return tree

    def _write(self, client: ClientId, ticket: int, tree: dict[str, torch.Tensor]) -> None:
        if self.folder is None:
            self._held.setdefault(client, {})[ticket] = tree
            return
        write_atomic(self._path(client, ticket), save(tree, {"digest": _digest(client, ticket, tree)}))

    def _drop(self, client: ClientId, tickets: set[int]) -> None:
        if self.folder is None:
            for ticket in tickets:
                del self._held[client][ticket]
            return
        # A client that was killed while it wrote has left its unfinished file.
        for path in [*(self._path(client, ticket) for ticket in tickets), *home(self.folder, client).glob(".memory-*.tmp")]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(path, error) from error


def _digest(client: ClientId, ticket: int, tree: Tree) -> str:
    digest = hashlib.blake2b(json.dumps([client, ticket]).encode(), digest_size=16)
    for name, leaf in sorted(tree.items()):
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        digest.update(raw(leaf))
    return digest.hexdigest()


def _damaged(path: Path, client: ClientId, ticket: int, why: str) -> RunError:
    return RunError(
        f"{path}: what client {client!r} remembered with ticket {ticket} cannot be read: {why}. "
        "It is not skipped, because the client would go on with a wrong memory. Restore the file from a copy, or start the run again in a new folder."
    )

"""What a runtime stands on: the plan, the owners it hosts, their data, and the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedfm.core.keys import Key
from fedfm.core.parts import ClientId
from fedfm.data import Owners, Shard, prepare
from fedfm.models import Foundation, load, load_tokenizer
from fedfm.models.foundation import max_context, read_config
from fedfm.tuning.base import Tuned

if TYPE_CHECKING:
    from fedfm.federation import Federation

Progress = Callable[[str, int], None]


@dataclass
class Site:
    """One place where clients run: all of them in the embedded engine, one in an owner's house.

    Attributes:
        federation: The plan, its method applied.
        clients: The owners hosted here, in a fixed order.
        open_shard: Opens an owner's data; holds nothing in memory.
        labels: Class names, agreed before the first round.
        key: The run's root key.
        folder: The run's folder; clients keep their memory under it. ``None`` keeps it in this process.
        choices: What was chosen by measuring (the bank's size), kept when a run is resumed.
        owners: Everybody's data, where this site divided it.
        registered: How many clients the federation has, here and elsewhere; 0 where all are here.
        written: The plan as its recipe has it, its method not applied: what can be told to another process as text.
    """

    federation: Federation
    clients: tuple[ClientId, ...]
    open_shard: Callable[[ClientId], Shard]
    labels: tuple[str, ...]
    key: Key
    folder: Path | None = None
    choices: dict[str, int] = field(default_factory=dict)
    owners: Owners | None = None
    written: Federation | None = None
    registered: int = 0

    @property
    def num_clients(self) -> int:
        """How many clients the federation has."""
        return self.registered or len(self.clients)

    @staticmethod
    def build(federation: Federation, folder: Path | None = None, progress: Progress | None = None, owners: Owners | None = None) -> Site:
        """Prepares the data of a whole federation on this machine.

        Args:
            folder: The run's folder.
            progress: Told what is being done and how far it is.
            owners: Data that is prepared already.

        Raises:
            DataError: if no owner has usable data.
            ModelError: if the tokenizer or config does not load.
        """
        written, federation = federation, federation.resolved()
        key = Key.root(federation.seed)
        if owners is None:
            tokenizer = load_tokenizer(federation.model.tokenizer or federation.model.source or "")
            limit = max_context(read_config(federation.model))
            owners = prepare(federation.data, federation.task, tokenizer, key=key.fold("data"), max_context=limit, progress=progress)
        return Site(federation, owners.ids, owners.shard, owners.labels, key, folder, owners=owners, written=written)

    @cached_property
    def foundation(self) -> Foundation:
        """The loaded model."""
        device = getattr(self.federation.engine, "device", "auto")
        return load(self.federation.model, self.federation.task.head, self.labels, device, self.key)

    @cached_property
    def tuned(self) -> Tuned:
        """The model prepared for its tuning."""
        return self.federation.tuning.attach(self.foundation)

"""An owner's house: the plan it was told, its data, what it remembers and has spent, its key, and the policy that guards it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fedfm.client import pause
from fedfm.client.asking import Door, file_door
from fedfm.client.bank import Bank
from fedfm.client.firsts import Firsts
from fedfm.client.guard import Asker, Guard
from fedfm.client.log import OwnerLog
from fedfm.client.memory import Memory
from fedfm.client.peers import Peers
from fedfm.client.plan import ClientPlan
from fedfm.client.policy import OPEN, Policy
from fedfm.client.spent import SpentStore
from fedfm.core.errors import DataError
from fedfm.core.keys import Key
from fedfm.core.leaves import Kind
from fedfm.core.messages import ClientId, Scalar
from fedfm.core.parts import Vault
from fedfm.core.task import Examples
from fedfm.core.tree import Tree
from fedfm.data import Shard, opened
from fedfm.models import Foundation, load
from fedfm.models.digest import files_digest, plan_digest, weights_digest
from fedfm.tuning.base import Tuned

# The choice that bounds the tokens of an evaluation's batch.
EVALUATE_TOKENS = "evaluate_tokens"


@dataclass
class House:
    """One place where clients run: an owner's own machine with one client, or a simulation's with all of them.

    Attributes:
        plan: What it was told of the federation.
        shards: The folder of each client's prepared data, in a fixed order.
        labels: Class names, agreed before the first round; empty until then.
        key: The run's root key.
        num_clients: How many clients the federation has, here and elsewhere.
        cohort_size: How many clients a usual round asks, here and elsewhere.
        num_rounds: How many rounds are planned; 0 where nobody said.
        device: Where the model runs.
        folder: Clients keep what they remember and have spent under it. ``None`` keeps it in this process.
        choices: What was chosen for the whole run (the bank's size, and for how many clients the model is compiled), kept when a run is resumed.
        policies: What each owner lets happen. An owner that is not named allows everything and keeps no log, as in a simulation; a house of one owner
            has one, ``Policy()`` where the owner wrote none.
        records: Owners' logs, questions and what they have spent are under it; ``None`` for ``folder``. A house has one for all its runs.
        coordinator: The fingerprint of who sends the requests, as the engine has verified it.
        run: The run's name.
        now: The owners' clock, for hours and logs.
        door: Asks a person; ``None`` for questions as files under ``records``.
        outline: The tokenizer and the config, where they are loaded already. The model takes them over.
        elsewhere: Clients whose house is another machine, in a fixed order; this one holds none of their data.
        data_rules: How an owner's rows become examples, for houses that prepare their own: the fields of ``data`` that name no file.
        identity: The private key (Ed25519, 32 bytes) by which others know the client; ``None`` where a channel that needs one draws it.
        peers: The public keys by which other clients are known here; ``None`` keeps them in this process.
    """

    plan: ClientPlan
    shards: Mapping[ClientId, Path]
    labels: tuple[str, ...]
    key: Key
    num_clients: int
    cohort_size: int = 1
    num_rounds: int = 0
    device: str = "auto"
    folder: Path | None = None
    choices: dict[str, int] = field(default_factory=dict)
    policies: Mapping[ClientId, Policy] = field(default_factory=dict)
    records: Path | None = None
    coordinator: str = "local"
    run: str = "-"
    now: Callable[[], datetime] = field(default=lambda: datetime.now().astimezone())
    door: Door | None = None
    outline: tuple[Any, Any] | None = None
    elsewhere: tuple[ClientId, ...] = ()
    data_rules: Mapping[str, Scalar] = field(default_factory=dict)
    identity: bytes | None = None
    peers: Peers | None = None

    @property
    def clients(self) -> tuple[ClientId, ...]:
        """Who takes part, here and elsewhere, in a fixed order."""
        return (*self.shards, *self.elsewhere)

    def shard(self, client: ClientId) -> Shard:
        """A client's data, opened; nothing of it is held in memory.

        Raises:
            DataError: if it cannot be read, or is on another machine.
        """
        if client not in self.shards:
            raise DataError(f"The data of {client} is in its own house, not on this machine.")
        return Shard.open(self.shards[client], owner=client)

    def policy(self, client: ClientId) -> Policy:
        """What this owner lets happen."""
        return self.policies.get(client, OPEN)

    def withholds(self, client: ClientId, kind: Kind) -> bool:
        """Whether this owner does not tell this of itself: its policy says so, or the plan's privacy promise would not cover it."""
        return self.policy(client).withholds(kind) or (self.plan.is_silent and kind != "evaluation")

    def guard(self, client: ClientId) -> Guard | None:
        """Who holds this client to its policy and keeps its log; nobody where it has no policy."""
        if client in self.policies and client not in self._guards:
            folder = self.records or self.folder
            self._guards[client] = Guard(
                client=client,
                policy=self.policies[client],
                plan=self.plan,
                asker=Asker(self.coordinator, self.run, min(self.cohort_size, self.num_clients), self.num_rounds),
                log=OwnerLog(folder, client),
                spent=self.spent,
                base=lambda: self.base,
                now=self.now,
                door=self.door or file_door(folder),
                paused=lambda: pause.since(self.records),
            )
        return self._guards.get(client)

    @cached_property
    def _guards(self) -> dict[ClientId, Guard]:
        return {}

    @property
    def lacks_classes(self) -> bool:
        """Whether the task has classes that nobody has named yet. No model with a head for them can be built then."""
        return self.plan.task.label_column is not None and not self.labels

    def vault(self, client: ClientId) -> Vault:
        """What a channel that keeps secrets is lent for this client."""
        if client not in self._vaults:
            if self.peers is None:
                # The clients of one house know each other by what they themselves say.
                self.peers = Peers()
            job = Vault.job_of(self.key)
            self._vaults[client] = Vault(client, job, self.key, self.spent.of(client), self.peers.known, self.identity)
        return self._vaults[client]

    @cached_property
    def _vaults(self) -> dict[ClientId, Vault]:
        return {}

    @cached_property
    def base(self) -> str:
        """The digest of the base's weights. Where they are drawn for classes that nobody has named yet, it names the plan of them."""
        if self.lacks_classes:
            return files_digest(self.plan.model) or plan_digest(self.plan.model)
        return weights_digest(self.foundation)

    @cached_property
    def memory(self) -> Memory:
        """What clients remember from round to round."""
        return Memory(self.folder)

    @cached_property
    def firsts(self) -> Firsts:
        """What clients scored before training."""
        return Firsts(self.folder)

    @cached_property
    def spent(self) -> SpentStore:
        """What clients have spent for good."""
        return SpentStore(self.records or self.folder)

    @cached_property
    def foundation(self) -> Foundation:
        """The loaded model."""
        return load(self.plan.model, self.plan.task.head, self.labels, self.device, self.key, self.outline)

    @cached_property
    def tuned(self) -> Tuned:
        """The model prepared for its tuning."""
        return self.plan.tuning.attach(self.foundation)

    @cached_property
    def start(self) -> Tree:
        """The trainable parameters before the first round: where leaves that stay at home begin."""
        return self.tuned.init(self.key.fold("init"))

    def can_share(self) -> bool:
        """Whether clients can share a batch of this model; looks once, with their own rows.

        Raises:
            ModelError: if the task is causal and the base looks ahead.
        """
        self.bank.look(self.start, self.training_sets())
        return self.bank.shares(self.start, self.training_sets())

    def training_sets(self) -> Iterator[Examples]:
        """The training examples of each client whose data can be read, one at a time."""
        for client in self.clients:
            try:
                yield opened(self.shard(client).train)
            except DataError:
                continue  # Its own work will fail, and say why.

    @cached_property
    def bank(self) -> Bank:
        """The model, the task and the trainer; loads the model."""
        pad_id = self.foundation.tokenizer.pad_token_id
        bank = Bank(self.tuned, self.plan.task, self.plan.local, pad_id, self.foundation.device, self.key)
        bank.max_tokens = self.choices.get(EVALUATE_TOKENS, bank.max_tokens)
        return bank

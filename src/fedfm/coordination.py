"""A federation whose owners keep their data: this machine has the plan, the model and the members' names, and not a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedfm.client.house import House
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.messages import ClientId
from fedfm.federation import Federation
from fedfm.models import load_tokenizer
from fedfm.models.foundation import classes_of, configured
from fedfm.site import Site
from fedfm.verbs import Describe


@dataclass
class Coordination(Site):
    """All that a coordinator needs to play a federation; what owners have, they are asked."""

    @staticmethod
    def build(federation: Federation, members: Sequence[ClientId], folder: Path | None = None) -> Coordination:
        """Loads the tokenizer and the config; nothing is asked yet. Where neither the recipe nor the base names the task's classes, members are asked.

        Args:
            members: Who takes part, in a fixed order.
            folder: The run's folder.

        Raises:
            ConfigError: if there is no member.
            ModelError: if the tokenizer or config does not load.
        """
        plan, key = federation.resolved(), Key.root(federation.seed)
        if not members:
            raise ConfigError("The consortium has no member yet. Invite one, and start the run when it has joined.")
        tokenizer = load_tokenizer(plan.model.tokenizer or plan.model.source or "")
        config = configured(plan.model, plan.task.head, tokenizer)
        labels = (plan.task.labels or classes_of(config)) if plan.task.label_column is not None else ()
        house = House(
            plan=plan.client_plan(),
            shards={},
            labels=labels,
            key=key,
            num_clients=len(members),
            cohort_size=plan.sampler.cohort_size(len(members)),
            num_rounds=plan.rounds,
            device=plan.engine.device,
            folder=folder,
            run=plan.name,
            outline=(tokenizer, config),
            elsewhere=tuple(members),
            data_rules=plan.data.rules(),
        )
        return Coordination(plan, house)

    def ask_classes(self) -> tuple[str, ...]:
        """The classes that occur in any member's rows, sorted: asked before a model is built, in a session of its own.

        Raises:
            ConfigError: naming members who withhold theirs.
            DataError: naming each member that does not answer, and why.
        """
        with self.open() as session:
            return Describe().classes(self.federation.channel, session, self.clients, self.key)

    def with_classes(self, labels: Sequence[str]) -> Coordination:
        """The same with its classes named."""
        return Coordination(self.federation, replace(self.house, labels=tuple(labels)))

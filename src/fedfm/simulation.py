"""A federation whose owners' data was divided on this machine: the plan, the prepared data, and the house in which all clients live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedfm.client.house import House
from fedfm.client.policy import Policy, read_policies, require_known
from fedfm.core.keys import Key
from fedfm.core.messages import ClientId
from fedfm.data import Owners, prepare
from fedfm.federation import Federation
from fedfm.models import load_tokenizer, unchanged
from fedfm.models.foundation import classes_of, configured, max_context
from fedfm.site import Site

Progress = Callable[[str, int], None]


@dataclass
class Simulation(Site):
    """All that is needed to play a federation here.

    Attributes:
        owners: Everybody's prepared data.
    """

    owners: Owners

    @staticmethod
    def build(
        federation: Federation,
        folder: Path | None = None,
        progress: Progress | None = None,
        owners: Owners | None = None,
        policies: Mapping[ClientId, Policy] | None = None,
    ) -> Simulation:
        """Prepares the data of a whole federation on this machine.

        Args:
            folder: The run's folder.
            progress: Told what is being done and how far it is.
            owners: Data that is prepared already.
            policies: What owners let happen, instead of those that the recipe names; an owner that is not named allows everything.

        Raises:
            ConfigError: if a policy's file is wrong.
            DataError: if no owner has usable data.
            ModelError: if the tokenizer or config does not load.
        """
        plan, key = federation.resolved(), Key.root(federation.seed)
        outline = None
        if policies is None:
            policies = {} if plan.policies is None else read_policies(plan.policies)
        if owners is None:
            tokenizer = load_tokenizer(plan.model.tokenizer or plan.model.source or "")
            config = configured(plan.model, plan.task.head, tokenizer)
            outline = tokenizer, config
            with unchanged(tokenizer):
                owners = prepare(
                    plan.data,
                    plan.task,
                    tokenizer,
                    key=key.fold("data"),
                    max_context=max_context(config),
                    classes=classes_of(config),
                    progress=progress,
                    columns={client: policy.columns for client, policy in policies.items() if policy.columns},
                )
        require_known(policies, owners.ids)
        house = House(
            plan=plan.client_plan(),
            shards={client: owners.path(client) for client in owners.ids},
            labels=owners.labels,
            key=key,
            num_clients=len(owners.ids),
            cohort_size=plan.sampler.cohort_size(len(owners.ids)),
            num_rounds=plan.rounds,
            device=plan.engine.device,
            folder=folder,
            policies=policies,
            run=plan.name,
            outline=outline,
            data_rules=plan.data.rules(),
        )
        return Simulation(plan, house, owners)

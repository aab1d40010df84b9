"""Full-parameter tuning: everything trains, one client at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedfm.core.batch import Batch
from fedfm.core.keys import Key
from fedfm.core.parts import Finding, Plan, Traits, traits, warn
from fedfm.core.tree import Spec, Tree
from fedfm.models import Foundation
from fedfm.models.foundation import save as save_model
from fedfm.tuning import layout
from fedfm.tuning.base import Tuned, Tuning
from fedfm.tuning.sites import Asker


@dataclass(frozen=True)
class Full(Tuning):
    """Every parameter trains and travels. Cannot bank: each client needs its own weights in every layer."""

    def traits(self) -> Traits:
        """Embeddings are among what trains."""
        return traits(is_=["embeddings"])

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Embedding rows tell which tokens an owner has; and clients run one by one."""
        yield from unbanked(self, plan)
        if any({"private"} <= part.traits().is_ and "server-noise" not in part.traits().is_ for part in plan.parts().values()):
            return  # noise is in the rows before they leave
        yield warn(
            "tuning",
            "trainable embeddings travel: their rows show which tokens an owner's text has. Freeze them (LoRA), or add differential privacy.",
        )

    def attach(self, foundation: Foundation) -> Tuned:
        """The model itself, called with each client's parameters."""
        return UnbankedModel(foundation, foundation.model, dict(foundation.model.named_parameters()))

    def save(self, foundation: Foundation, params: Tree, folder: Path) -> None:
        """A full model in the Hugging Face layout."""
        save_model(foundation, self.merge(foundation, params), folder)

    def merge(self, foundation: Foundation, params: Tree) -> nn.Module:
        """The base with its parameters replaced."""
        return layout.merged(foundation, params, {})


def unbanked(tuning: Tuning, plan: Plan) -> Iterator[Finding]:
    """A bank that is asked for in vain."""
    bank = getattr(plan.parts().get("engine"), "bank", "auto")
    if isinstance(bank, int) and bank > 1:
        yield warn(
            "engine",
            f"{type(tuning).__name__} cannot bank, so clients run one by one instead of {bank} at a time. Leave bank at auto, or tune with LoRA.",
        )


class UnbankedModel(Tuned):
    """A model called with one client's parameters in place of its own."""

    banks = False

    def __init__(self, foundation: Foundation, model: nn.Module, trainable: dict[str, nn.Parameter], early: bool = True) -> None:
        self.model, self.trainable = model, trainable
        self.spec = Spec(tuple(trainable), tuple(tuple(p.shape) for p in trainable.values()), (torch.float32,) * len(trainable))
        self.asker = Asker(foundation, early=early)
        self.bound: dict[str, torch.Tensor] = {}
        self.dropout: Key | None = None
        if foundation.spec.gradient_checkpointing:
            names = {id(p): name for name, p in trainable.items()}
            self.places = [
                (module, local_name, names[id(p)])
                for module in model.modules()
                for local_name, p in module._parameters.items()
                if p is not None and id(p) in names
            ]
            # The backward pass computes layers again, when the call that put the client's parameters in place is over.
            foundation.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": self._again})

    def init(self, key: Key) -> Tree:
        """The model's own values."""
        return {name: p.detach().to("cpu", torch.float32).clone() for name, p in self.trainable.items()}

    def bind(self, theta_kd: torch.Tensor, dropout: list[Key] | None = None) -> None:
        """Puts one client's row in place."""
        assert theta_kd.shape[0] == 1, "full parameters do not bank"
        leaves = self.spec.unflatten(theta_kd[0])
        self.bound = {name: leaf.to(self.trainable[name].dtype) for name, leaf in leaves.items()}
        self.dropout = dropout[0] if dropout else None

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits ``(P, C)`` at the batch's picks."""
        self.model.train(self.dropout is not None)
        if self.dropout is None:
            return self.asker(self._call, batch)
        # An adapter of another library draws its dropout from the global generator.
        with torch.random.fork_rng():
            torch.manual_seed(self.dropout.seed())
            return self.asker(self._call, batch)

    def _call(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self.model, self.bound, (), inputs)

    def _again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._in_place(self.bound)

    @contextmanager
    def _in_place(self, bound: dict[str, torch.Tensor]) -> Iterator[None]:
        before = [module._parameters[local_name] for module, local_name, _ in self.places]
        try:
            for module, local_name, name in self.places:
                module._parameters[local_name] = bound[name]  # type: ignore[assignment]
            yield
        finally:
            for (module, local_name, _), p in zip(self.places, before, strict=True):
                module._parameters[local_name] = p

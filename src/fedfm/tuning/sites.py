"""Sites: where K clients' trainable tensors act on one frozen base.

A *site* is a place in the base where a client's tensors act: a module and what is done to its input
or output. Rows of a batch lie client after client, ``R`` each, so a site views its activations as
``(K, R*L, d)`` and applies row block k with client k's slice: one matrix product through the frozen
weight for everybody, one batched product for what is theirs. Sites are forward hooks: the base keeps its
modules, names and saved form.
"""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fedfm.core.batch import Batch
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.registry import suggest
from fedfm.core.tree import Spec, Tree
from fedfm.models import Foundation
from fedfm.tuning.base import Losses, Tuned


class Site(ABC):
    """A module of the base and the client tensors that act there.

    Attributes:
        name: The module's name in the base.
        shapes: Leaf name (as saved) to shape, for one client.
        leaves: The bound tensors, each ``(K, *shape)``.
    """

    def __init__(self, name: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.name, self.module, self.shapes = name, module, dict(shapes)
        self.leaves: list[torch.Tensor] = []
        self.dropout: list[Key] | None = None
        self.batch: Batch | None = None

    @abstractmethod
    def init(self, key: Key) -> list[torch.Tensor]:
        """The leaves before the first round, in the order of ``shapes``."""

    @abstractmethod
    def hook(self) -> None:
        """Registers the site's hooks."""

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Activations ``(K*R, ..., d)`` as ``(K, R*..., d)``."""
        return x.reshape(self.leaves[0].shape[0], -1, x.shape[-1])


class BankedModel(Tuned):
    """A frozen base with sites."""

    banks = True

    def __init__(self, foundation: Foundation, sites: Iterable[Site]) -> None:
        self.foundation, self.model, self.sites = foundation, foundation.model, list(sites)
        shapes = {leaf: shape for site in self.sites for leaf, shape in site.shapes.items()}
        self.spec = Spec(tuple(shapes), tuple(shapes.values()), (torch.float32,) * len(shapes))
        for site in self.sites:
            site.hook()
        # :meth:`call`, compiled; ``None`` runs eagerly.
        self.compiled: Callable[[torch.Tensor, dict[str, torch.Tensor], Batch], torch.Tensor] | None = None
        self.theta_kd = torch.zeros(0)
        self.asker = Asker(foundation, early=all(site.module is not output_layer(foundation) for site in self.sites))

    def init(self, key: Key) -> Tree:
        """Every site's leaves."""
        return {
            leaf: value.detach().to("cpu", torch.float32).clone()
            for site in self.sites
            for leaf, value in zip(site.shapes, site.init(key.fold(site.name)), strict=True)
        }

    def bind(self, theta_kd: torch.Tensor, dropout: list[Key] | None = None) -> None:
        """Hands each site its slice of the rows."""
        self.theta_kd = theta_kd
        leaves = self.spec.unflatten(theta_kd)
        for site in self.sites:
            site.leaves = [leaves[name] for name in site.shapes]
            site.dropout = dropout

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits ``(P, C)`` at the batch's picks."""
        for site in self.sites:
            site.batch = batch
        return self.asker(self.model, batch)

    def losses(self, batch: Batch, of: Losses) -> torch.Tensor:
        """The loss of each target ``(Q,)``, by compiled code where there is some."""
        # Only what trains is compiled: evaluation is a small part, and would be a second graph.
        if self.compiled is None or not torch.is_grad_enabled():
            return super().losses(batch, of)
        num = self.theta_kd.shape[0]
        return self.compiled(self.theta_kd, {name: x.reshape(num, -1, *x.shape[1:]) for name, x in batch.inputs.items()}, batch)

    def call(self, theta_kd: torch.Tensor, inputs: dict[str, torch.Tensor], batch: Batch, of: Losses) -> torch.Tensor:
        """The losses ``(Q,)`` as one function of all that changes from step to step: what a compiler takes.

        Args:
            inputs: The batch's, each ``(K, R, L)``, so that a compiler sees that rows are a multiple of clients.
        """
        leaves = self.spec.unflatten(theta_kd)
        for site in self.sites:
            site.leaves = [leaves[name] for name in site.shapes]
        flat = {name: x.flatten(0, 1) for name, x in inputs.items()}
        loss_q = of(self.asker(lambda **_: self.model(**flat), batch), batch)
        for site in self.sites:
            # What is still bound when a compiled function ends becomes one of its outputs.
            site.leaves = []
        return loss_q


class Asker:
    """Runs a model and gives logits where the batch asks for them.

    ``early`` picks the positions before the output layer, so that a large vocabulary is never
    multiplied where nothing is asked; it must be off when a site sits on that layer.
    """

    def __init__(self, foundation: Foundation, early: bool) -> None:
        self.head = foundation.head
        self.positions: torch.Tensor | None = None
        output = output_layer(foundation)
        self.early = early and output is not None
        if early and output is not None:
            output.register_forward_pre_hook(self._pick)

    def _pick(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.positions is None:
            return None
        (hidden,) = args
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.positions),)

    def __call__(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits ``(P, C)``."""
        if batch.per_row:
            rows: torch.Tensor = model(**batch.inputs).logits
            return rows.index_select(0, batch.pick_p)
        if not self.early:
            # Methods that put virtual tokens in front answer for them too.
            full = model(**batch.inputs).logits[:, -batch.shape[1] :]
            picked: torch.Tensor = full.reshape(-1, full.shape[-1]).index_select(0, batch.pick_p)
            return picked
        self.positions = batch.pick_p
        try:
            early: torch.Tensor = model(**batch.inputs).logits
        finally:
            self.positions = None
        return early.reshape(-1, early.shape[-1])


def output_layer(foundation: Foundation) -> nn.Module | None:
    """The layer from hidden states to the vocabulary; ``None`` for classification."""
    if foundation.head == "sequence_classification":
        return None
    layer: nn.Module | None = foundation.model.get_output_embeddings()
    return layer


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one weight matrix (``nn.Linear``, or GPT-2's ``Conv1D``)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_conv1d(module: nn.Module) -> bool:
    """Whether its weight is stored as ``(in, out)``."""
    return type(module).__name__ == "Conv1D"


def in_out(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    a, b = weight.shape
    return (a, b) if is_conv1d(module) else (b, a)


def match(foundation: Foundation, targets: tuple[str, ...], what: str) -> list[tuple[str, nn.Module]]:
    """Linear layers by name: a full name, its last part (``q_proj``), a pattern (``layers.*.mlp.*``) or a regular expression of the whole name.
    ``all-linear`` takes every linear layer but the output's.

    Raises:
        ConfigError: if a target matches nothing.
    """
    output = output_layer(foundation)
    linear = {name: m for name, m in foundation.model.named_modules() if is_linear(m)}
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        if target == "all-linear":
            hits = [name for name, m in linear.items() if m is not output and not name.startswith(foundation.fresh or ("\0",))]
        else:
            hits = [name for name in linear if _matches(name, target)]
        if not hits:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"{what}: target {target!r} matches no linear layer of {type(foundation.model).__name__}.{suggest(target, kinds)} Its linear layers: {', '.join(kinds)}."
            )
        chosen.update({name: linear[name] for name in hits})
    return [(name, linear[name]) for name in linear if name in chosen]


def _matches(name: str, target: str) -> bool:
    if name == target or name.endswith("." + target) or fnmatch.fnmatchcase(name, target):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error:
        return False


def query_value(foundation: Foundation) -> tuple[str, ...]:
    """The attention's query and value projections under the names that this architecture gives them.

    Raises:
        ConfigError: if they are not found.
    """
    last = {name.rpartition(".")[2] for name, m in foundation.model.named_modules() if is_linear(m)}
    for names in (
        ("q_proj", "v_proj"),
        ("query", "value"),
        ("c_attn",),
        ("q_lin", "v_lin"),
        ("query_key_value",),
        ("qkv_proj",),
        ("q", "v"),
        ("Wqkv",),
    ):
        if set(names) <= last:
            return names
    raise ConfigError(
        f"targets: the query and value layers of {type(foundation.model).__name__} are not known here; name them. Its linear layers: {', '.join(sorted(last))}."
    )

"""Which parameters train, which of them travel, and a model prepared for it.

A :class:`Tuning` is a part; :meth:`Tuning.attach` gives a :class:`Tuned` model whose trainable tensors
carry a leading client axis, so that K clients run as one batch through one frozen base.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Self

import torch

from fedfm.core.batch import Batch
from fedfm.core.errors import ModelError
from fedfm.core.keys import Key
from fedfm.core.messages import Scalar
from fedfm.core.parts import ClientId, Part, Traits, traits
from fedfm.core.tree import Spec, Tree
from fedfm.models import Foundation

Losses = Callable[[torch.Tensor, Batch], torch.Tensor]


class Tuned(ABC):
    """A model with its trainable tensors taken out.

    Attributes:
        spec: Names and shapes of one client's trainable tensors; names are those of the saved file.
        banks: Whether more than one client can share a batch.
    """

    spec: Spec
    banks: bool
    model: torch.nn.Module

    @abstractmethod
    def init(self, key: Key) -> Tree:
        """Trainable tensors before the first round: pretrained values where there are some, else drawn from ``key``."""

    @abstractmethod
    def bind(self, theta_kd: torch.Tensor, dropout: list[Key] | None = None) -> None:
        """Makes the model compute with these rows ``(K, D)``, a client each; gradients flow to them.

        Args:
            dropout: A key per client, for training with dropout; ``None`` turns it off.
        """

    @abstractmethod
    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits ``(P, C)`` at the batch's targets, row block k computed with client k's tensors."""

    def losses(self, batch: Batch, of: Losses) -> torch.Tensor:
        """The loss of each target ``(Q,)``.

        Args:
            of: Makes losses of the logits and the batch: the task's.
        """
        return of(self.logits(batch), batch)


class Tuning(Part, ABC):
    """Which parameters train, and which of them travel.

    What trains is the ``spec`` of the tuned model. Clients may hold less than that (``own``, ``cut``, ``pad``: a lower rank), and may keep
    some of what they hold at home (``travels``). By default everybody holds everything, and all of it travels.

    Attributes:
        peft_type: PEFT's name of this tuning; ``None`` where PEFT has no layout for it, or another part reads that layout.
    """

    room = "tuning"
    peft_type: ClassVar[str | None] = None

    def traits(self) -> Traits:
        """Whether every parameter travels."""
        keeps = type(self).travels not in (Tuning.travels, WrappedTuning.travels)
        return traits(hides=["all-parameters"] if keeps else [])

    @abstractmethod
    def attach(self, foundation: Foundation) -> Tuned:
        """Prepares ``foundation``, changing its model in place.

        Raises:
            ConfigError: if a target matches nothing, listing what there is.
        """

    @abstractmethod
    def save(self, foundation: Foundation, params: Tree, folder: Path) -> None:
        """Writes the result in the layout the rest of the world loads: PEFT's for adapters, Hugging Face's for full models."""

    @abstractmethod
    def merge(self, foundation: Foundation, params: Tree) -> torch.nn.Module:
        """A plain ``transformers`` model with the tuning folded in."""

    @classmethod
    def from_peft(cls, config: Mapping[str, object], tensors: Tree) -> Self:
        """The tuning that makes the adapter with this config and these tensors.

        Args:
            config: What ``adapter_config.json`` says. It is not trusted.
            tensors: What ``adapter_model.safetensors`` holds.

        Raises:
            ModelError: if this tuning would compute something else, or make other tensors.
        """
        raise ModelError(f"PEFT has no layout for {cls.__name__}.")

    def travels(self, spec: Spec) -> tuple[str, ...]:
        """Names of the leaves that leave a client, in the order of ``spec``; the others are its own from round to round. Default: all."""
        return spec.names

    def own(self, client: ClientId) -> Mapping[str, Scalar]:
        """Numbers that are this client's alone (``{"rank": 4}``), from which its tensors' shapes follow. Default: none."""
        return {}

    def cut(self, tree: Tree, own: Mapping[str, Scalar]) -> dict[str, torch.Tensor]:
        """What a client with these own numbers holds of a tree of full shapes. Default: all of it.

        Args:
            tree: Leaves of the tuned model's ``spec``, all or some.
        """
        return dict(tree)

    def pad(self, tree: Tree, spec: Spec, own: Mapping[str, Scalar]) -> dict[str, torch.Tensor]:
        """A client's tree in full shapes, zero beyond what the client holds: ``cut(pad(x)) = x``. Default: the tree itself.

        What is beyond must get a gradient of exactly zero, so that clients of unequal size share a bank. (Zeros in both LoRA factors do.)

        Args:
            tree: Leaves as ``cut`` gives them.
            spec: The tuned model's full shapes.
        """
        return dict(tree)


class WrappedTuning(Tuning):
    """A tuning around another: forwards everything, so that a subclass overrides only what it changes.

    A subclass is a frozen dataclass with the field ``inner``. The plan check reads the inner part in its own place, so ``check`` and
    ``traits`` are not passed on.

    Attributes:
        inner: The tuning that does everything else.
    """

    inner: Tuning
    # A method that only forwards needs no docstring.

    def attach(self, foundation: Foundation) -> Tuned:  # noqa: D102
        return self.inner.attach(foundation)

    def save(self, foundation: Foundation, params: Tree, folder: Path) -> None:  # noqa: D102
        self.inner.save(foundation, params, folder)

    def merge(self, foundation: Foundation, params: Tree) -> torch.nn.Module:  # noqa: D102
        return self.inner.merge(foundation, params)

    def travels(self, spec: Spec) -> tuple[str, ...]:  # noqa: D102
        return self.inner.travels(spec)

    def own(self, client: ClientId) -> Mapping[str, Scalar]:  # noqa: D102
        return self.inner.own(client)

    def cut(self, tree: Tree, own: Mapping[str, Scalar]) -> dict[str, torch.Tensor]:  # noqa: D102
        return self.inner.cut(tree, own)

    def pad(self, tree: Tree, spec: Spec, own: Mapping[str, Scalar]) -> dict[str, torch.Tensor]:  # noqa: D102
        return self.inner.pad(tree, spec, own)

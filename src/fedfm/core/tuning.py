"""Which parameters train and travel, and a model prepared for it.

A :class:`Tuning` is a part; :meth:`Tuning.attach` gives a :class:`Tuned` model whose trainable tensors
carry a leading client axis, so that K clients run as one batch through one frozen base.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from fedfm.core.batch import Batch
from fedfm.core.keys import Key
from fedfm.core.parts import Part
from fedfm.core.tree import Spec, Tree


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
        """Logits ``(P, C)`` at the batch's picks, row block k computed with client k's tensors."""


class Tuning(Part, ABC):
    """Which parameters train and travel."""

    room = "tuning"

    @abstractmethod
    def attach(self, foundation: Any) -> Tuned:
        """Prepares ``foundation`` (a :class:`fedfm.models.Foundation`), changing its model in place.

        Raises:
            ConfigError: if a target matches nothing, listing what there is.
        """

    @abstractmethod
    def save(self, foundation: Any, params: Tree, folder: Path) -> None:
        """Writes the result in the layout the rest of the world loads: PEFT's for adapters, Hugging Face's for full models."""

    @abstractmethod
    def merge(self, foundation: Any, params: Tree) -> torch.nn.Module:
        """A plain ``transformers`` model with the tuning folded in."""

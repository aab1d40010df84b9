"""Any other method of the ``peft`` library, one client at a time.

Mangrulkar et al., `PEFT <https://github.com/huggingface/peft>`_.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.parts import Finding, Plan
from fedfm.core.registry import suggest
from fedfm.core.tree import Tree
from fedfm.models import Foundation
from fedfm.models.foundation import save_labels
from fedfm.tuning import layout
from fedfm.tuning.base import Tuned, Tuning
from fedfm.tuning.full import UnbankedModel, unbanked


@dataclass(frozen=True)
class Peft(Tuning):
    """A tuning method of ``peft`` by its type; runs unbanked.

    Args:
        type: ``peft``'s name of it: ``VERA``, ``LOHA``, ``OFT``, ``PROMPT_TUNING``, ``P_TUNING``...
        config: Its configuration, name and value.

    Raises:
        ConfigError: if ``peft`` does not know the type or refuses the configuration, or the type needs a loop of its own (``ADALORA``).
    """

    concerns = ("parameter-efficient",)

    type: str
    config: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.type == "ADALORA":
            raise ConfigError(
                "tuning.Peft: ADALORA moves its ranks between layers after each step of one training loop, from gradients that stay with the "
                "clients here; it would train at its first ranks and never allocate. Use LoRA."
            )
        if isinstance(self.config, Mapping):
            object.__setattr__(self, "config", tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in self.config.items())))

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Clients run one by one."""
        yield from unbanked(self, plan)

    def attach(self, foundation: Foundation) -> Tuned:
        """The base wrapped by ``peft``."""
        import peft

        known = {str(kind.value): cls for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.type not in known:
            raise ConfigError(f"tuning.Peft.type: peft has no {self.type!r}.{suggest(self.type, known)}")
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in self.config}
        try:
            config = known[self.type](task_type=layout.TASK_TYPES.get(foundation.head), **values)
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # They warn of names that transformers is about to drop, which the user cannot change.
                warnings.simplefilter("ignore", FutureWarning)
                torch.manual_seed(foundation.key.fold("peft", self.type).seed())
                model = peft.get_peft_model(foundation.model, config)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"tuning.Peft: {self.type} refuses its configuration: {error}") from error
        except KeyError as error:
            raise ConfigError(f"tuning.Peft: {self.type} does not fit a {foundation.head.replace('_', ' ')} model (no {error}).") from error
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # The caller differentiates with respect to its own rows; the library's copies need no gradients.
        for p in trainable.values():
            p.requires_grad_(False)
        foundation.adapted = model
        return UnbankedModel(foundation, model, trainable, early=False)

    def save(self, foundation: Foundation, params: Tree, folder: Path) -> None:
        """In ``peft``'s layout, by ``peft``."""
        model = self._filled(foundation, params)
        # A prompt method leaves the base as it was; the others have wrapped its layers.
        plain = copy.deepcopy(model).unload() if hasattr(model, "unload") else model.get_base_model()
        base = layout.base_of(foundation, plain, folder)
        for config in model.peft_config.values():
            config.base_model_name_or_path = base
        model.save_pretrained(str(folder))
        save_labels(foundation, folder)

    def merge(self, foundation: Foundation, params: Tree) -> torch.nn.Module:
        """The base with the adapter folded in, where the method can be.

        Raises:
            ConfigError: for methods that live in the input (prompts).
        """
        model = self._filled(foundation, params)
        if not hasattr(model, "merge_and_unload"):
            raise ConfigError(f"tuning.Peft: {self.type} cannot be merged into a model; export it without --merge.")
        merged: torch.nn.Module = model.merge_and_unload()
        return merged

    def _filled(self, foundation: Foundation, params: Tree) -> Any:
        if foundation.adapted is None:
            self.attach(foundation)
        # A merge would change the model, which training never does, so this is a copy.
        model = copy.deepcopy(foundation.adapted)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in params.items():
                parameters[name].copy_(value)
        return model

"""(IA)3: learned rescaling of keys, values and feed-forward activations.

Liu et al., `Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning <https://arxiv.org/abs/2205.05638>`_, 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import nn

from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.tree import Tree
from fedfm.models import Foundation
from fedfm.tuning import layout
from fedfm.tuning.base import Tuning
from fedfm.tuning.head import head_sites
from fedfm.tuning.sites import BankedModel, Site, in_out, is_conv1d, is_linear, match

# Per family: layers whose output is scaled, and layers whose input is (the second half of the feed-forward block).
_FAMILIES = (
    (("k_proj", "v_proj"), ("down_proj",)),
    (("key", "value"), ("output.dense",)),
    (("c_attn",), ("mlp.c_proj",)),
    (("k_lin", "v_lin"), ("lin2",)),
    (("k", "v"), ("wo",)),
)
_LEAF = ".ia3_l"


@dataclass(frozen=True)
class IA3(Tuning):
    """``l * (W x)`` for keys and values, ``W (l * x)`` for the feed-forward output; the vectors ``l`` train, from ones.

    Args:
        targets: Layers whose output is scaled; ``None`` takes keys and values.
        feedforward: Layers whose input is scaled; ``None`` takes the second layer of each feed-forward block.
        modules_to_save: Linear modules trained in full beside the vectors; ``None`` takes a classification head that is new.

    Raises:
        ConfigError: if a target matches nothing.
    """

    concerns = ("parameter-efficient", "communication")
    peft_type = "IA3"

    targets: tuple[str, ...] | None = None
    feedforward: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None

    def attach(self, foundation: Foundation) -> BankedModel:
        """One site for each vector."""
        outputs, inputs = self._targets(foundation)
        fed = match(foundation, inputs, "tuning.IA3.feedforward") if inputs else []
        if self.feedforward is None:
            # BERT's attention output is called output.dense too; only the feed-forward one is meant.
            fed = [(name, module) for name, module in fed if "attention" not in name]
        scaled = match(foundation, outputs, "tuning.IA3.targets") if outputs else []
        sites: list[Site] = [_IA3Site(name, module, feedforward=False) for name, module in scaled]
        sites += [_IA3Site(name, module, feedforward=True) for name, module in fed if name not in dict(scaled)]
        if not sites:
            raise ConfigError("tuning.IA3: nothing to train; name targets or feedforward layers.")
        return BankedModel(
            foundation, [*sites, *head_sites(foundation, self.modules_to_save, "tuning.IA3.modules_to_save", prefix=layout.PREFIX)]
        )

    def _targets(self, foundation: Foundation) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if self.targets is not None and self.feedforward is not None:
            return self.targets, self.feedforward
        names = [name for name, m in foundation.model.named_modules() if is_linear(m)]
        for outputs, inputs in _FAMILIES:
            if all(any(name.endswith("." + part) for name in names) for part in (*outputs, *inputs)):
                return (outputs if self.targets is None else self.targets), (inputs if self.feedforward is None else self.feedforward)
        raise ConfigError(
            f"tuning.IA3: the layers of {type(foundation.model).__name__} are not known here; name both targets and feedforward."
        )

    def save(self, foundation: Foundation, params: Tree, folder: Path) -> None:
        """``adapter_config.json`` and ``adapter_model.safetensors``."""
        vectors = {name.removeprefix(layout.PREFIX).removesuffix(_LEAF): p for name, p in params.items() if name.endswith(_LEAF)}
        config = {
            "peft_type": self.peft_type,
            "target_modules": list(vectors),
            "feedforward_modules": [name for name, p in vectors.items() if p.shape[0] == 1],
            "fan_in_fan_out": any(is_conv1d(foundation.model.get_submodule(name)) for name in vectors),
        }
        layout.save_adapter(foundation, params, _modules(params), config, folder)

    def merge(self, foundation: Foundation, params: Tree) -> nn.Module:
        """The vectors multiplied into the weights."""
        deltas: dict[str, torch.Tensor] = {}
        scales: dict[str, torch.Tensor] = {}
        for name, p in params.items():
            if name.endswith(_LEAF):
                module = name.removeprefix(layout.PREFIX).removesuffix(_LEAF)
                layer = foundation.model.get_submodule(module)
                weight = layer.weight.detach().cpu().double()
                vector = p.double().T if is_conv1d(layer) else p.double()
                deltas[module] = weight * vector - weight
                if p.shape[1] == 1 and getattr(layer, "bias", None) is not None:
                    scales[f"{module}.bias"] = layer.bias.detach().cpu().double() * p.double().squeeze(1)
        return layout.merged(foundation, _modules(params), deltas, scales)

    @classmethod
    def from_peft(cls, config: Mapping[str, object], tensors: Tree) -> Self:
        """The (IA)3 of an adapter."""
        layout.refuse([name for name in ("exclude_modules",) if config.get(name)], cls.__name__)
        saved = layout.saved_in(config, tensors)
        layout.require_names(tensors, (_LEAF,), saved, cls.__name__)
        inputs = layout.names_in(config, "feedforward_modules")
        outputs = tuple(name for name in layout.names_in(config, "target_modules") if name not in inputs)
        return cls(targets=outputs, feedforward=inputs, modules_to_save=saved)


def _modules(params: Tree) -> dict[str, torch.Tensor]:
    """The leaves that are weights of modules trained in full."""
    return {name: p for name, p in params.items() if not name.endswith(_LEAF)}


class _IA3Site(Site):
    def __init__(self, name: str, module: nn.Module, feedforward: bool) -> None:
        n, m = in_out(module)
        super().__init__(name, module, {f"{layout.PREFIX}{name}{_LEAF}": (1, n) if feedforward else (m, 1)})
        self.feedforward = feedforward

    def init(self, key: Key) -> list[torch.Tensor]:
        return [torch.ones(shape) for shape in self.shapes.values()]

    def hook(self) -> None:
        if self.feedforward:
            self.module.register_forward_pre_hook(lambda module, args: (self._scaled(args[0]),))
        else:
            self.module.register_forward_hook(lambda module, args, output: self._scaled(output))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        vector_kd = self.leaves[0].to(x.dtype).flatten(1)
        return (self.blocks(x) * vector_kd.unsqueeze(1)).view_as(x)

"""BitFit: only the biases train.

Ben Zaken, Ravfogel, Goldberg, `BitFit: Simple Parameter-efficient Fine-tuning <https://arxiv.org/abs/2106.10199>`_, 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.tree import Tree
from fedfm.models import Foundation
from fedfm.models.foundation import save as save_model
from fedfm.tuning import layout
from fedfm.tuning.base import Tuning
from fedfm.tuning.head import head_sites
from fedfm.tuning.sites import BankedModel, Site, is_linear, output_layer


@dataclass(frozen=True)
class BitFit(Tuning):
    """Every bias of a linear or normalising layer trains; all else is frozen.

    Args:
        modules_to_save: Linear modules trained in full beside the biases; ``None`` takes a classification head that is new.

    Raises:
        ConfigError: if the base has no biases (Llama has none).
    """

    concerns = ("parameter-efficient", "communication")

    modules_to_save: tuple[str, ...] | None = None

    def attach(self, foundation: Foundation) -> BankedModel:
        """One site for each module with a bias."""
        heads = head_sites(foundation, self.modules_to_save, "tuning.BitFit.modules_to_save", prefix="")
        taken = {site.name for site in heads}
        sites: list[Site] = [
            _BiasSite(name, module)
            for name, module in foundation.model.named_modules()
            if name not in taken and (is_linear(module) or isinstance(module, nn.LayerNorm)) and getattr(module, "bias", None) is not None
        ]
        # An output layer's bias meets activations already picked by position, which are no longer in equal blocks.
        sites = [site for site in sites if site.module is not output_layer(foundation)]
        if not sites:
            raise ConfigError(
                f"tuning.BitFit: {type(foundation.model).__name__} has no biases to train. Use LoRA or IA3 with this architecture."
            )
        return BankedModel(foundation, [*sites, *heads])

    def save(self, foundation: Foundation, params: Tree, folder: Path) -> None:
        """A full model: PEFT has no layout for this."""
        save_model(foundation, self.merge(foundation, params), folder)

    def merge(self, foundation: Foundation, params: Tree) -> nn.Module:
        """The base with the trained biases in place."""
        return layout.merged(foundation, params, {})


class _BiasSite(Site):
    def __init__(self, name: str, module: nn.Module) -> None:
        assert isinstance(module.bias, torch.Tensor)
        super().__init__(name, module, {f"{name}.bias": tuple(module.bias.shape)})

    def init(self, key: Key) -> list[torch.Tensor]:
        assert isinstance(self.module.bias, torch.Tensor)
        return [self.module.bias.float()]

    def hook(self) -> None:
        self.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # The base has added its own bias already; what is added here is the difference.
        assert isinstance(module.bias, torch.Tensor)
        change_kd = self.leaves[0].to(output.dtype) - module.bias
        return (self.blocks(output) + change_kd.unsqueeze(1)).view_as(output)

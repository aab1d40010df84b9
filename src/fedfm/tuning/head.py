"""A classification head alone, or beside adapters: linear modules trained in full."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.registry import suggest
from fedfm.core.tree import Tree
from fedfm.models import Foundation
from fedfm.models.foundation import save as save_model
from fedfm.tuning import layout
from fedfm.tuning.base import Tuning
from fedfm.tuning.sites import BankedModel, Site


@dataclass(frozen=True)
class Head(Tuning):
    """Trains whole linear modules, the classification head by default; the rest of the base is frozen (linear probing).

    Args:
        modules: Names of linear modules, or of modules that contain them; ``None`` takes a classification head that is new.

    Raises:
        ConfigError: if there is no such module.
    """

    concerns = ("parameter-efficient",)

    modules: tuple[str, ...] | None = None

    def attach(self, foundation: Foundation) -> BankedModel:
        """One site for each linear module."""
        sites = head_sites(foundation, self.modules, "tuning.Head.modules", prefix="")
        if not sites:
            raise ConfigError(
                f"tuning.Head: {type(foundation.model).__name__} brings no new head to train. Name modules, or use a Classification task with a base that has no head yet."
            )
        return BankedModel(foundation, sites)

    def save(self, foundation: Foundation, params: Tree, folder: Path) -> None:
        """A full model: PEFT has no layout for this."""
        save_model(foundation, self.merge(foundation, params), folder)

    def merge(self, foundation: Foundation, params: Tree) -> nn.Module:
        """The base with the head in place."""
        return layout.merged(foundation, params, {})


def head_sites(foundation: Foundation, modules: tuple[str, ...] | None, where: str, prefix: str) -> list[Site]:
    """Sites for the linear modules named, or for the base's fresh ones."""
    names = foundation.fresh if modules is None else modules
    known = dict(foundation.model.named_modules())
    sites: list[Site] = []
    for wanted in names:
        hits = [name for name in known if name == wanted or name.endswith("." + wanted)]
        if not hits:
            raise ConfigError(f"{where}: {type(foundation.model).__name__} has no module {wanted!r}.{suggest(wanted, known)}")
        linear = [(n, m) for hit in hits for n, m in known.items() if (n == hit or n.startswith(hit + ".")) and isinstance(m, nn.Linear)]
        if not linear:
            raise ConfigError(f"{where}: {wanted!r} is a {type(known[hits[0]]).__name__}; only linear modules can be trained this way.")
        sites.extend(_HeadSite(name, module, prefix) for name, module in linear)
    return list({site.name: site for site in sites}.values())


class _HeadSite(Site):
    def __init__(self, name: str, module: nn.Linear, prefix: str) -> None:
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": tuple(module.weight.shape)}
        if module.bias is not None:
            shapes[f"{prefix}{name}.bias"] = tuple(module.bias.shape)
        super().__init__(name, module, shapes)

    def init(self, key: Key) -> list[torch.Tensor]:
        # Fresh heads were drawn from the run's key when the model was loaded.
        return [p.float() for p in self.module.parameters()]

    def hook(self) -> None:
        self.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x_ktn = self.blocks(args[0])
        w_kmn, *bias = (leaf.to(x_ktn.dtype) for leaf in self.leaves)
        if bias:
            return torch.baddbmm(bias[0].unsqueeze(1), x_ktn, w_kmn.transpose(1, 2)).view_as(output)
        return torch.bmm(x_ktn, w_kmn.transpose(1, 2)).view_as(output)

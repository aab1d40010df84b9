"""LoRA: low-rank adapters beside frozen linear layers.

Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models <https://arxiv.org/abs/2106.09685>`_, 2021.
Kalajdzievski, `A Rank Stabilization Scaling Factor <https://arxiv.org/abs/2312.03732>`_, 2023 (``rslora``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import nn

from fedfm.core.batch import Batch
from fedfm.core.errors import ConfigError, ModelError
from fedfm.core.keys import Key
from fedfm.core.parts import Finding, Plan, note
from fedfm.core.tree import Tree
from fedfm.models import Foundation
from fedfm.tuning import layout
from fedfm.tuning.base import Tuning
from fedfm.tuning.head import head_sites
from fedfm.tuning.sites import BankedModel, Site, in_out, is_conv1d, match, query_value

_LEAVES = (".lora_A.weight", ".lora_B.weight")
# Options of PEFT's that change what an adapter computes, or which layers have one.
_OPTIONS = (
    "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "trainable_token_indices", "layer_replication", "exclude_modules",
    "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip
# Starts other than these change the base's weights.
_STARTS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoRA(Tuning):
    """``W x + s B A x`` with ``A (r, in)`` and ``B (out, r)`` trained, ``s = alpha / r`` (``alpha / sqrt(r)`` with ``rslora``).

    ``B`` starts at zero, so the first round starts from the base exactly. Saved in PEFT's layout.

    Args:
        r: Rank.
        alpha: Scale.
        targets: Linear layers by name or pattern (``q_proj``, ``layers.*.mlp.*``, ``all-linear``); ``None`` takes query and value.
        dropout: Probability of dropping an input of ``A`` while training.
        rslora: Rank-stabilised scale.
        modules_to_save: Linear modules trained in full beside the adapters; ``None`` takes a classification head that is new.

    Raises:
        ConfigError: if a number is out of range, or a target matches nothing.
    """

    concerns = ("parameter-efficient", "communication")
    peft_type = "LORA"

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    rslora: bool = False
    modules_to_save: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"LoRA.r is {self.r}; a rank is 1 or more.")
        if not self.alpha > 0:
            raise ConfigError(f"LoRA.alpha is {self.alpha}; a scale is more than 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA.dropout is {self.dropout}; a probability is at least 0 and less than 1.")
        if self.targets is not None and not self.targets:
            raise ConfigError("LoRA.targets is empty; leave it out for query and value, or name layers.")

    @property
    def scale(self) -> float:
        """``s``."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Warns of the mean: the mean of factors is not the mean of products."""
        if type(plan.aggregator).__name__ == "Mean":
            yield note(
                "aggregator",
                "the mean of LoRA factors is not the mean of their products; they differ by the weighted covariance of the clients' A and B. "
                "Fewer local steps in a round make the difference smaller; BitFit and IA3 have no products, and no difference.",
            )

    def attach(self, foundation: Foundation) -> BankedModel:
        """One site for each target.

        Raises:
            ConfigError: if a target matches nothing, the rank is above the width of every target, or PEFT would not load the adapter.
        """
        targets = match(foundation, self.targets or query_value(foundation), "tuning.LoRA.targets")
        width, widest = max((min(in_out(module)), name) for name, module in targets)
        if self.r > width:
            raise ConfigError(
                f"tuning.LoRA.r is {self.r}, but no target is wider than {width} ({widest}): a higher rank than that adds parameters to train "
                f"and send, and no change of weights that a lower one could not make. Set r to at most {width}; 4 to 32 are usual."
            )
        layout.require_loads(foundation, [name for name, _ in targets], "tuning.LoRA.targets")
        sites: list[Site] = [_LoRASite(name, module, self) for name, module in targets]
        return BankedModel(
            foundation, [*sites, *head_sites(foundation, self.modules_to_save, "tuning.LoRA.modules_to_save", prefix=layout.PREFIX)]
        )

    def save(self, foundation: Foundation, params: Tree, folder: Path) -> None:
        """``adapter_config.json`` and ``adapter_model.safetensors``."""
        names = [name.removeprefix(layout.PREFIX).removesuffix(".lora_A.weight") for name in params if name.endswith(".lora_A.weight")]
        config = {
            "peft_type": self.peft_type,
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": names,
            "fan_in_fan_out": any(is_conv1d(foundation.model.get_submodule(name)) for name in names),
            "bias": "none",
        }
        layout.save_adapter(foundation, params, _modules(params), config, folder)

    def merge(self, foundation: Foundation, params: Tree) -> nn.Module:
        """``W + s B A`` in every target."""
        deltas: dict[str, torch.Tensor] = {}
        for name in (name for name in params if name.endswith(".lora_A.weight")):
            module = name.removeprefix(layout.PREFIX).removesuffix(".lora_A.weight")
            delta = self.scale * params[name.replace("lora_A", "lora_B")].double() @ params[name].double()
            deltas[module] = delta.T if is_conv1d(foundation.model.get_submodule(module)) else delta
        return layout.merged(foundation, _modules(params), deltas)

    @classmethod
    def from_peft(cls, config: Mapping[str, object], tensors: Tree) -> Self:
        """The LoRA of an adapter; variants of it (DoRA, ranks that differ by layer) are refused."""
        start, used = config.get("init_lora_weights"), [name for name in _OPTIONS if config.get(name)]
        if config.get("bias", "none") != "none":
            used.append("bias")
        if isinstance(start, str) and start not in _STARTS:
            used.append(f"init_lora_weights={start}")
        layout.refuse(used, cls.__name__)
        saved = layout.saved_in(config, tensors)
        layout.require_names(tensors, _LEAVES, saved, cls.__name__)
        try:
            return cls(
                r=int(layout.number_in(config, "r")),
                alpha=float(layout.number_in(config, "lora_alpha")),
                targets=layout.names_in(config, "target_modules"),
                dropout=float(layout.number_in(config, "lora_dropout", 0.0)),
                rslora=bool(config.get("use_rslora", False)),
                modules_to_save=saved,
            )
        except ConfigError as error:
            raise ModelError(str(error)) from error


def _modules(params: Tree) -> dict[str, torch.Tensor]:
    """The leaves that are weights of modules trained in full."""
    return {name: p for name, p in params.items() if not name.endswith(_LEAVES)}


class _LoRASite(Site):
    def __init__(self, name: str, module: nn.Module, lora: LoRA) -> None:
        n, m = in_out(module)
        super().__init__(
            name, module, {f"{layout.PREFIX}{name}.lora_A.weight": (lora.r, n), f"{layout.PREFIX}{name}.lora_B.weight": (m, lora.r)}
        )
        self.lora = lora

    def init(self, key: Key) -> list[torch.Tensor]:
        (a_shape, b_shape) = self.shapes.values()
        # Kaiming uniform with a = sqrt(5), as in the authors' code: uniform on +-1/sqrt(in).
        bound = 1 / math.sqrt(a_shape[1])
        return [torch.empty(a_shape).uniform_(-bound, bound, generator=key.fold("lora_A").generator()), torch.zeros(b_shape)]

    def hook(self) -> None:
        self.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        a_krn, b_kmr = (leaf.to(args[0].dtype) for leaf in self.leaves)
        x = args[0] if not self.lora.dropout or self.dropout is None else self._drop(args[0])
        h_ktr = torch.bmm(self.blocks(x), a_krn.transpose(1, 2))
        return torch.baddbmm(self.blocks(output), h_ktr, b_kmr.transpose(1, 2), alpha=self.lora.scale).view_as(output)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        """Drops inputs. A client's mask is drawn over its own rows and length, so it does not depend on who shares the batch."""
        assert self.dropout is not None and self.batch is not None
        keep = 1 - self.lora.dropout
        axes, rest = self._axes(x, self.batch)
        mask = torch.zeros(len(self.dropout), *axes, *rest, dtype=x.dtype, device=x.device)
        for k, key in enumerate(self.dropout):
            sizes = (int(self.batch.real_rows[k]), int(self.batch.lengths[k]))[: len(axes)]
            drawn = torch.rand(*sizes, *rest, generator=key.fold(self.name).generator(x.device), device=x.device)
            mask[k][tuple(slice(n) for n in sizes)] = (drawn < keep).to(x.dtype) / keep
        return x * mask.view_as(x)

    def _axes(self, x: torch.Tensor, batch: Batch) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of one client's axes that are rows and positions of the batch, and of those that are not.

        Raises:
            RuntimeError: if more than one client shares activations in which no rows are seen.
        """
        num, (rows, width) = batch.num_clients, batch.shape
        if x.shape[:2] == (rows, width) and x.dim() > 2:
            return (rows // num, width), tuple(x.shape[2:])
        if x.shape[0] == rows * width and x.dim() == 2:
            # Positions of all rows one after the other (OPT, experts).
            return (rows // num, width), tuple(x.shape[1:])
        if x.shape[0] == rows and x.dim() == 2:
            # A pooled row has no positions.
            return (rows // num,), tuple(x.shape[1:])
        if num > 1:
            raise RuntimeError(f"the input of {self.name} is {list(x.shape)}, where dropout sees no rows of {rows} x {width} tokens")
        return (), tuple(x.shape)

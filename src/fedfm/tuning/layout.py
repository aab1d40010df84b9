"""How adapters lie on disk: PEFT's own layout, read and written without importing PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedfm.core.errors import ModelError
from fedfm.core.tree import Tree
from fedfm.models import Foundation
from fedfm.models.foundation import save as save_model
from fedfm.tuning.base import Tuning

PREFIX = "base_model.model."
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "masked_lm": None}


def save_adapter(foundation: Foundation, params: Tree, config: Mapping[str, Any], folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, so that ``PeftModel.from_pretrained`` loads them.

    A base that exists nowhere else (built from a config) is saved beside the adapter, in ``base/``.
    """
    base = base_of(foundation, foundation.model, folder)
    saved = sorted(
        {name.removeprefix(PREFIX).rpartition(".")[0] for name in params if ".lora_" not in name and not name.endswith(".ia3_l")}
    )
    full = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "task_type": TASK_TYPES[foundation.head],
        "modules_to_save": saved or None,
        "revision": None,
        **config,
    }
    save_file(
        {name: p.detach().cpu().contiguous() for name, p in params.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    (folder / "adapter_config.json").write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
    foundation.tokenizer.save_pretrained(folder)


def base_of(foundation: Foundation, model: Any, folder: Path) -> str | None:
    """Where the base of an adapter in ``folder`` is. One that exists nowhere else is ``model``, and is saved beside the adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    source = foundation.spec.source
    if source is None:
        save_model(foundation, model, folder / "base")
        return str((folder / "base").resolve())
    if source.startswith("package:"):
        return model.config._name_or_path or None
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def load_adapter(folder: str | Path) -> tuple[Tuning, dict[str, torch.Tensor]]:
    """A LoRA or (IA)3 adapter in PEFT's layout, ours or anybody's: the tuning and its tensors.

    Raises:
        ModelError: if there is none, or it is of a kind that is not banked here.
    """
    from fedfm.tuning.ia3 import IA3
    from fedfm.tuning.lora import LoRA

    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"No adapter could be loaded from {folder}: {error}") from error
    params = {name: t.float() for name, t in tensors.items()}
    targets = config.get("target_modules")
    names = tuple(targets) if isinstance(targets, list) else (targets,)
    # PEFT names every head that a classifier may have; the file tells which there was.
    saved = tuple(name for name in config.get("modules_to_save") or () if any(f".{name}." in tensor for tensor in tensors))
    if config.get("peft_type") == "LORA":
        unusual = [
            name
            for name in ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "trainable_token_indices")
            if config.get(name)
        ]
        if unusual or config.get("bias", "none") != "none":
            raise ModelError(f"The adapter at {folder} uses {', '.join(unusual) or 'bias'}, which this LoRA has not.")
        tuning: Tuning = LoRA(
            r=config["r"],
            alpha=float(config["lora_alpha"]),
            targets=names,
            dropout=float(config.get("lora_dropout", 0.0)),
            rslora=bool(config.get("use_rslora", False)),
            modules_to_save=saved,
        )
    elif config.get("peft_type") == "IA3":
        inputs = tuple(config.get("feedforward_modules") or ())
        tuning = IA3(targets=tuple(name for name in names if name not in inputs), feedforward=inputs, modules_to_save=saved)
    else:
        raise ModelError(f"The adapter at {folder} is a {config.get('peft_type')}; LORA and IA3 can be loaded here.")
    return tuning, params


def merged(
    foundation: Foundation, params: Tree, deltas: Mapping[str, torch.Tensor], replaced: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """A copy of the base with ``deltas`` added to weights (module name, float64) and every parameter that ``params`` or ``replaced`` names set.

    Raises:
        ModelError: if a tensor belongs to no parameter.
    """
    values = {name.removeprefix(PREFIX): p for name, p in params.items() if ".lora_" not in name and not name.endswith(".ia3_l")}
    # A weight's second name is the output layer's, tied to the embeddings: what was learned there alone must not move them.
    second = dict(foundation.model.named_parameters(remove_duplicate=False)).keys() - dict(foundation.model.named_parameters()).keys()
    model: nn.Module = plain_copy(foundation, untie=not second.isdisjoint({*values, *(f"{name}.weight" for name in deltas)}))
    own = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in values if name not in own]
    if missing:
        raise ModelError(f"The model has no parameters {missing[:3]}: these tensors belong to another model.")
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = own[f"{name}.weight"]
            weight.copy_((weight.double().cpu() + delta).to(weight.dtype))
        for name, value in {**values, **(replaced or {})}.items():
            own[name].copy_(value.to(own[name].dtype))
    return model


def plain_copy(foundation: Foundation, untie: bool = False) -> Any:
    """The base as ``transformers`` made it: same weights on the CPU, no hooks of ours.

    Args:
        untie: Give the output layer a weight of its own.
    """
    model = foundation.model
    with foundation.as_published(model.config):
        config = copy.deepcopy(model.config)
    if untie:
        config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        # Not built and then cast: a rotary embedding's frequencies stay float32 in a model of any type.
        fresh = type(model)._from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    if model.can_generate():
        fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.eval()

"""PEFT's own layout of adapters on disk, written and read back without PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fedfm.core.errors import ConfigError, ModelError
from fedfm.core.tree import Tree
from fedfm.models import Foundation
from fedfm.models.foundation import save as save_model
from fedfm.models.foundation import save_labels

PREFIX = "base_model.model."
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "masked_lm": None}


def save_adapter(foundation: Foundation, params: Tree, modules: Tree, config: Mapping[str, object], folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, so that ``PeftModel.from_pretrained`` loads them.

    A base that exists nowhere else (built from a config) is saved beside the adapter, in ``base/``.

    Args:
        params: All leaves.
        modules: Those of them that are weights of modules trained in full.
    """
    base = base_of(foundation, foundation.model, folder)
    saved = _whole(foundation.model, {name.removeprefix(PREFIX) for name in modules})
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
    save_labels(foundation, folder)


def _whole(model: nn.Module, names: set[str]) -> list[str]:
    """The outermost modules of which every weight is among ``names``.

    PEFT keeps a copy of each module that the config names, and always of a classifier's ``classifier`` and ``score``. A name inside one of
    those would be a copy within a copy, which PEFT does not load.
    """
    whole: list[str] = []
    # A module comes before those inside it.
    for name, module in model.named_modules():
        weights = {f"{name}.{weight}" for weight in module.state_dict()}
        if name and weights and weights <= names and not any(name.startswith(outer + ".") for outer in whole):
            whole.append(name)
    return sorted(whole)


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


def require_names(tensors: Tree, leaves: tuple[str, ...], saved: tuple[str, ...], what: str) -> None:
    """Refuses tensors that a tuning would not make: what it does not make would be left out, and the logits would be wrong.

    Args:
        leaves: Ends of the names that every adapted module has (``.lora_A.weight``).
        saved: Modules saved whole.

    Raises:
        ModelError: naming the first that are missing or too many.
    """
    modules = {name.removesuffix(leaf) for name in tensors for leaf in leaves if name.endswith(leaf)}
    expected = {module + leaf for module in modules for leaf in leaves}
    whole = {name for name in tensors if any(f".{module}." in name for module in saved)}
    extra, missing = sorted(tensors.keys() - expected - whole), sorted(expected - tensors.keys())
    if extra:
        raise ModelError(f"It holds tensors that this {what} would not make: {', '.join(extra[:3])}.")
    if missing or not modules:
        raise ModelError(f"It lacks tensors that this {what} would make: {', '.join(missing[:3] or leaves)}.")


def require_loads(foundation: Foundation, targets: Sequence[str], where: str) -> None:
    """Refuses targets of a LoRA adapter that PEFT would not load. PEFT is asked with a copy of the base that has no weights.

    Raises:
        ConfigError: with PEFT's reason.
    """
    # PEFT takes seconds to import. What it refuses are layers of state-space models, which have a convolution beside them.
    if not any(isinstance(module, nn.Conv1d) for module in foundation.model.modules()):
        return
    import peft

    with torch.device("meta"):
        outline = type(foundation.model)._from_config(copy.deepcopy(foundation.model.config))
    try:
        peft.get_peft_model(outline, peft.LoraConfig(target_modules=list(targets)))
    except ValueError as error:
        raise ConfigError(
            f"{where}: peft would not load an adapter with these layers, so what was trained could not be used. Name others. It says: {error}"
        ) from error


def refuse(used: Sequence[str], what: str) -> None:
    """Refuses a config that uses options which a tuning does not have.

    Raises:
        ModelError: naming them, where there are some.
    """
    if used:
        raise ModelError(f"It uses {', '.join(used)}, which this {what} does not have.")


def names_in(config: Mapping[str, object], key: str) -> tuple[str, ...]:
    """A list of modules in a config of PEFT's, or its one pattern; empty where there is none.

    Raises:
        ModelError: if it is neither.
    """
    value = config.get(key) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"Its {key} is {value!r}, not a name or a list of names.")
    return tuple(names)


def number_in(config: Mapping[str, object], key: str, default: float | None = None) -> float:
    """A number in a config of PEFT's.

    Raises:
        ModelError: if it is none.
    """
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError(f"Its {key} is {value!r}, not a number.")
    return value


def saved_in(config: Mapping[str, object], tensors: Tree) -> tuple[str, ...]:
    """The modules that an adapter brings whole. PEFT names every head that a classifier may have; the tensors tell which there was."""
    return tuple(name for name in names_in(config, "modules_to_save") if any(f".{name}." in tensor for tensor in tensors))


def merged(
    foundation: Foundation, modules: Tree, deltas: Mapping[str, torch.Tensor], replaced: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """A copy of the base with ``deltas`` added to weights (module name, float64) and every parameter that ``modules`` or ``replaced`` names set.

    Args:
        modules: Leaves that are parameters of the base, as they are saved.

    Raises:
        ModelError: if a tensor belongs to no parameter.
    """
    values = {name.removeprefix(PREFIX): p for name, p in modules.items()}
    # A weight with a second name is an output layer tied to the embeddings. A delta of that layer alone must not move the embeddings.
    second = dict(foundation.model.named_parameters(remove_duplicate=False)).keys() - dict(foundation.model.named_parameters()).keys()
    model: nn.Module = plain_copy(foundation, untie=not second.isdisjoint({*values, *(f"{name}.weight" for name in deltas)}))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in values if name not in parameters]
    if missing:
        raise ModelError(f"The model has no parameters {missing[:3]}: these tensors belong to another model.")
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = parameters[f"{name}.weight"]
            weight.copy_((weight.double().cpu() + delta).to(weight.dtype))
        for name, value in {**values, **(replaced or {})}.items():
            parameters[name].copy_(value.to(parameters[name].dtype))
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
        # The model is not built and then cast, because a rotary embedding's frequencies stay float32 in a model of any type.
        fresh = type(model)._from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    if model.can_generate():
        fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.eval()

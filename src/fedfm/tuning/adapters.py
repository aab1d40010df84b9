"""Loads adapters from disk, ours or others', in PEFT's layout."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedfm.core import registry
from fedfm.core.errors import MessageError, ModelError
from fedfm.models import Foundation
from fedfm.tuning.base import Tuned, Tuning

log = logging.getLogger(__name__)


def load_adapter(folder: str | Path) -> tuple[Tuning, dict[str, torch.Tensor]]:
    """An adapter in PEFT's layout: the tuning that makes it, and its tensors in float32.

    The tuning is the part of the index whose ``peft_type`` is the adapter's. Whether it fits a base is seen only with that base:
    see :func:`attach_adapter`.

    Raises:
        ModelError: if there is none, no tuning loads its kind, or the tuning would make other tensors.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"No adapter could be loaded from {folder}: {error}") from error
    if not isinstance(config, Mapping):
        raise ModelError(f"No adapter could be loaded from {folder}: its config is not a mapping.")
    params = {name: tensor.float() for name, tensor in tensors.items()}
    kinds = _kinds()
    kind = kinds.get(str(config.get("peft_type")))
    if kind is None:
        raise ModelError(f"The adapter at {folder} is a {config.get('peft_type')}; {' and '.join(sorted(kinds))} can be loaded here.")
    try:
        return kind.from_peft(config, params), params
    except ModelError as error:
        raise ModelError(f"The adapter at {folder} cannot be loaded. {error}") from error


def attach_adapter(folder: str | Path, foundation: Foundation) -> tuple[Tuning, Tuned, dict[str, torch.Tensor]]:
    """An adapter and the base prepared for it. The base's model is changed in place.

    Raises:
        ModelError: if it cannot be loaded, or the tuning makes other tensors of this base than the adapter has.
        ConfigError: if the adapter names a layer that the base does not have.
    """
    tuning, params = load_adapter(folder)
    tuned = tuning.attach(foundation)
    try:
        tuned.spec.require(params, f"The adapter at {folder} does not fit this {type(foundation.model).__name__}")
    except MessageError as error:
        raise ModelError(str(error)) from error
    return tuning, tuned, params


def _kinds() -> dict[str, type[Tuning]]:
    """The tunings that PEFT has a layout for, by its name of them. Of two with one name ours is taken, then the first by its own name."""
    kinds: dict[str, type[Tuning]] = {}
    entries = registry.entries("tuning").values()
    for entry in sorted(entries, key=lambda entry: (not entry.module.startswith("fedfm."), entry.name)):
        try:
            part = entry.load()
        except Exception as error:  # whatever another package raises when it is imported
            log.warning("the tuning %s (%s) is left out, for it cannot be imported: %r", entry.name, entry.summary, error)
            continue
        if not issubclass(part, Tuning) or part.peft_type is None:
            continue
        taken = kinds.setdefault(part.peft_type, part)
        if taken is not part:
            log.warning(
                "%s and %s both load adapters of the kind %s; %s is taken", taken.__name__, entry.name, part.peft_type, taken.__name__
            )
    return kinds

"""Which model: a value, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedfm.core.errors import ConfigError
from fedfm.core.parts import Part


@dataclass(frozen=True)
class Model(Part):
    """The base model: loaded from ``source``, or built from a config to be trained from scratch.

    Args:
        source: A folder in the Hugging Face layout, a hub name, or ``package:name/sub`` for a folder inside an installed Python package.
        architecture: Instead of ``source``: a ``transformers`` architecture by its model class prefix (``Llama``, ``GPT2``, ``Bert``).
        config: Its configuration, name and value; a mapping is accepted. What is left out has the architecture's default.
        tokenizer: Where the tokenizer is; with ``source`` the default is the same place.
        dtype: Of the base's weights and activations: ``float32`` or ``bfloat16`` (float16 would need its loss scaled). Trainable tensors are
            always float32.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        ConfigError: unless exactly one of ``source`` and ``architecture`` is given, or if an architecture has no tokenizer.
    """

    room = "models"

    source: str | None = None
    architecture: str | None = None
    config: tuple[tuple[str, Any], ...] = ()
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", tuple(sorted(dict(self.config).items())))
        if (self.source is None) == (self.architecture is None):
            raise ConfigError(
                f"A model needs a source or an architecture, one of the two; got source={self.source!r}, architecture={self.architecture!r}."
            )
        if self.architecture is not None and self.tokenizer is None:
            raise ConfigError(
                f"A {self.architecture} from scratch needs a tokenizer: give 'tokenizer' a folder that holds a tokenizer.json."
            )
        if self.source is not None and self.config:
            raise ConfigError(f"The model at {self.source!r} brings its own config; 'config' is for models built from scratch.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}; it must be float32 or bfloat16.")

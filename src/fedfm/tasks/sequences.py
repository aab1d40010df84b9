"""What the tasks share: text to ids, ids to targets, sums to metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedfm.core.batch import IGNORE, IntArray
from fedfm.core.errors import ConfigError, ModelError
from fedfm.core.task import RawRow
from fedfm.core.tree import Tree
from fedfm.data.sources import text_in


def require_length(task: object, max_length: int, least: int) -> None:
    """Refuses a ``max_length`` that leaves nothing to learn from.

    Raises:
        ConfigError: with the value.
    """
    if max_length < least:
        raise ConfigError(f"{task!r}: max_length must be {least} or more.")


def texts_of(rows: Sequence[RawRow], column: str) -> list[str]:
    """The texts in ``column`` that are more than white space.

    Raises:
        DataError: if one is absent or not text.
    """
    return [found for found in (text_in(row, column) for row in rows) if found.strip()]


def tokenize(tokenizer: Any, texts: Sequence[str], special: bool = False, max_length: int | None = None) -> list[list[int]]:
    """Ids of each text in one call, cut to ``max_length``, with the model's own special tokens around them if ``special``."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def ends(tokenizer: Any, why: str) -> tuple[list[int], int]:
    """What opens a text (nothing where the tokenizer has no such token) and what closes it.

    Raises:
        ModelError: if nothing closes a text, so that no model could learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{why} needs a token that ends a text, but the tokenizer has no eos_token. Set it in its tokenizer_config.json.")
    return ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), tokenizer.eos_token_id


def shifted(ids: IntArray, start: int = 0) -> IntArray:
    """Targets of a causal model: at each position the next id, from ``ids[start]`` on."""
    first = max(start, 1)
    targets = np.full(len(ids), IGNORE, dtype=np.int64)
    targets[first - 1 : -1] = ids[first:]
    return targets


def language_metrics(sums: Tree) -> dict[str, float]:
    """``loss`` (nats per target), ``perplexity = exp(loss)`` and ``token_accuracy``."""
    loss, accuracy = (ratio(sums[name], sums["targets"]) for name in ("loss", "hits"))
    # exp overflows above 709; a NaN stays one.
    return {"loss": loss, "perplexity": math.inf if loss > 700 else math.exp(loss), "token_accuracy": accuracy}


def ratio(part: Any, whole: Any) -> float:
    """``part / whole``; NaN where there is nothing."""
    return float(part) / float(whole) if float(whole) else math.nan

"""What a base model is made of, in a few letters, so that a run notices when another stands in its place.

Covered here: weights and tokenizers that were changed, on purpose or by an update of a hub's repository. Not covered: code that computes
otherwise with the same weights; the journal tells the versions of the packages.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedfm.core.errors import ModelError
from fedfm.core.task import tokenizer_words
from fedfm.models.foundation import Foundation
from fedfm.models.spec import Model
from fedfm.models.tokenizer import locate

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def weights_digest(foundation: Foundation) -> str:
    """Of the files that the weights were loaded from, every byte; of the tensors themselves where there are none, because they were drawn.

    Raises:
        ModelError: if a file cannot be read.
    """
    of_files = files_digest(foundation.spec)
    if of_files is not None:
        return of_files
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in sorted(foundation.model.state_dict().items()):
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_digest(spec: Model) -> str | None:
    """Of the files that a model's weights are loaded from, every byte; ``None`` where none are on this machine.

    Raises:
        ModelError: if a file cannot be read.
    """
    known = []
    for path in weight_files(spec):
        try:
            state = path.stat()
            known.append([path.name, file_digest(path, state.st_size, state.st_mtime_ns)])
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest() if known else None


def plan_digest(spec: Model) -> str:
    """Of a base whose weights are not drawn yet: it names the recipe's words, and is no digest of any weights."""
    return hashlib.blake2b(repr(spec).encode(), digest_size=16).hexdigest()


def weight_files(spec: Model) -> list[Path]:
    """The safetensors files that a model was loaded from, sorted; none where it was built from a config."""
    from transformers.utils import cached_file

    if spec.source is None:
        return []
    place = locate(spec.source)

    def local(name: str) -> Path | None:
        # It is loaded already, so its files are on this machine and no hub is asked.
        path = cached_file(place, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)

    single, index = local(_SINGLE), local(_INDEX)
    if single is not None:
        return [single]
    if index is None:
        return []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [index.with_name(name) for name in names]


@lru_cache(maxsize=256)
def file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Of all its bytes, read once while its size and time stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Of all that decides what text becomes.

    Args:
        tokenizer: A ``PreTrainedTokenizerFast``.
    """
    return hashlib.blake2b(json.dumps(tokenizer_words(tokenizer), sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

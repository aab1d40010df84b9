"""The files of a base, by name, size and digest: what a machine must have, and how it knows that it does.

A base has up to two sets of files: of the model (weights, config and, where it has no other, the tokenizer), and of the tokenizer where it is elsewhere or the
weights are drawn.

Covered here: names that leave a folder, kinds of files that hold code, too many of them, sizes that are none. Not covered: what a base was taught.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from fedfm.core import words
from fedfm.core.errors import MessageError, ModelError
from fedfm.models.digest import file_digest, weight_files
from fedfm.models.spec import Model
from fedfm.models.tokenizer import locate

MODEL, TOKENIZER = "model", "tokenizer"
_CONFIG = ("config.json", "model.safetensors.index.json")
_WORDS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_NAME, _DIGEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,100}(?:\.[A-Za-z0-9_-]{1,40}){0,3}"), re.compile(r"[0-9a-f]{32}")
_MOST, _LARGEST, _SMALL = 200, 1 << 42, 1 << 28


@dataclass(frozen=True)
class ModelFile:
    """One file of a base.

    Args:
        name: Without any folder.
        size: Bytes.
        digest: BLAKE2b of all its bytes, 32 hexadecimal digits.
    """

    name: str
    size: int
    digest: str

    @property
    def is_weights(self) -> bool:
        """Whether it holds weights; all others are small texts."""
        return self.name.endswith(".safetensors")

    def is_at(self, path: Path) -> bool:
        """Whether this very file is at a path; reads all of it, once while its size and time stay."""
        try:
            state = path.stat()
            return state.st_size == self.size and file_digest(path, state.st_size, state.st_mtime_ns) == self.digest
        except OSError:
            return False


FileSets = Mapping[str, tuple[ModelFile, ...]]


def paths_of(spec: Model) -> dict[str, dict[str, Path]]:
    """Where the files of a base are on this machine: by set, and by name.

    Raises:
        ModelError: if there is no such model.
    """
    sets: dict[str, dict[str, Path]] = {}
    if spec.source is not None:
        weights = weight_files(spec)
        if weights:
            names = (*_CONFIG, *(() if spec.tokenizer else _WORDS))
            sets[MODEL] = {path.name: path for path in weights} | _there(spec.source, names)
    if spec.tokenizer is not None:
        # A folder with a config tells transformers the kind of tokenizer.
        sets[TOKENIZER] = _there(spec.tokenizer, (_CONFIG[0], *_WORDS))
    return {name: dict(sorted(paths.items())) for name, paths in sets.items() if paths}


def _there(source: str, names: Iterable[str]) -> dict[str, Path]:
    from transformers.utils import cached_file

    place = locate(source)
    found = {name: cached_file(place, name, local_files_only=True, _raise_exceptions_for_missing_entries=False) for name in names}
    return {name: Path(path) for name, path in found.items() if path is not None}


def sets_of(paths: Mapping[str, Mapping[str, Path]]) -> FileSets:
    """The files at these paths; every byte is read.

    Raises:
        ModelError: if one cannot be read.
    """

    def file(name: str, path: Path) -> ModelFile:
        try:
            state = path.stat()
            return ModelFile(name, state.st_size, file_digest(path, state.st_size, state.st_mtime_ns))
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error

    return {name: tuple(file(*item) for item in files.items()) for name, files in paths.items()}


def write_sets(sets: FileSets) -> str:
    """The sets as text."""
    return json.dumps({name: [list(astuple(file)) for file in files] for name, files in sets.items()})


def read_sets(text: str) -> FileSets:
    """Undoes :func:`write_sets`, for a text that is not trusted.

    Raises:
        MessageError: naming what is no file of a base.
    """
    try:
        sets = {name: tuple(_checked(*file) for file in files) for name, files in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"A list of a base's files cannot be read: {words.clean(error, 200)}.") from error
    for name, files in sets.items():
        if name not in (MODEL, TOKENIZER) or not files or len(files) > _MOST or len({file.name.lower() for file in files}) < len(files):
            raise MessageError(f"The files of a base's {name!r:.40} are none, too many, or two of one name.")
    return sets


def _checked(name: Any, size: Any, digest: Any) -> ModelFile:
    kinds = isinstance(name, str) and isinstance(digest, str) and isinstance(size, int) and not isinstance(size, bool)
    if not kinds or not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"{name!r:.60} is no file with a size and a digest")
    file = ModelFile(name, size, digest)
    if not (file.is_weights or name in _CONFIG or name in _WORDS):
        raise ValueError(f"{name!r:.60} is neither weights in safetensors, nor a config, nor a tokenizer's")
    if not 0 < size <= (_LARGEST if file.is_weights else _SMALL):
        raise ValueError(f"{name!r:.60} has {size} bytes")
    return file


def base_of(sets: FileSets) -> str | None:
    """The digest of the weights among these files, as :func:`fedfm.models.digest.files_digest` gives it; ``None`` where they are drawn."""
    known = [[file.name, file.digest] for file in sorted(sets.get(MODEL, ()), key=lambda file: file.name) if file.is_weights]
    return hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest() if known else None


def set_digest(files: Iterable[ModelFile]) -> str:
    """Names a set of files: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(sorted(map(astuple, files))).encode(), digest_size=16).hexdigest()

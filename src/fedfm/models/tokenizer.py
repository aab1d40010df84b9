"""Tokenizers: loaded, or trained on public text."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedfm.core.errors import ConfigError, ModelError

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def locate(source: str) -> str:
    """A source as ``transformers`` takes it: ``package:name/sub`` becomes a folder, anything else stays.

    Raises:
        ModelError: if the package is not installed, or a path that looks local does not exist.
    """
    if source.startswith("package:"):
        name, _, rest = source.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"The model is said to be in the Python package {name!r}, which is not installed. Remedy: pip install {name.replace('_', '-')}"
            )
        return str(Path(next(iter(spec.submodule_search_locations))) / rest)
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not Path(source).expanduser().is_dir():
        raise ModelError(
            f"There is no model folder at {source!r} (looked from {Path.cwd()}). Give a folder with a config.json, or a hub name."
        )
    return str(Path(source).expanduser()) if looks_local else source


def load_tokenizer(source: str) -> Any:
    """The fast tokenizer at ``source``; one without a padding token pads with its end-of-text token.

    Raises:
        ModelError: if there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    path = locate(source)
    # transformers tells about missing sentencepiece and the like at length; our error says it once.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones of a file that is damaged
        raise ModelError(f"No tokenizer could be loaded from {source!r}: {(str(error) or repr(error)).splitlines()[0]}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"The tokenizer at {source!r} is not a fast one (it has no tokenizer.json); fedfm needs those.")
    end = tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.pad_token is None:
        if end is None:
            raise ModelError(
                f"The tokenizer at {source!r} has neither a padding nor an end-of-text token; add one to its tokenizer_config.json."
            )
        tokenizer.pad_token = end
    return tokenizer


@contextmanager
def unchanged(tokenizer: Any) -> Iterator[None]:
    """Undoes what tokenizing leaves in a tokenizer (a length to cut at), so that it can be used and saved as it was loaded."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens trained on ``texts``, which must be public.

    Raises:
        ConfigError: if the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS, UNK]
    if vocab_size < 256 + len(special):
        raise ConfigError(f"vocab_size is {vocab_size}; byte-level BPE needs at least {256 + len(special)}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK)

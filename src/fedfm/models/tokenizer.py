"""Tokenizers: loaded, or trained on public text."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from fedfm.core.errors import ConfigError, ModelError
from fedfm.core.paths import usable
from fedfm.core.registry import suggest

log = logging.getLogger(__name__)

# Seconds that the hub has to answer before its cache is asked.
_PATIENCE = 5.0
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def locate(source: str) -> str:
    """A source as ``transformers`` takes it: a folder of this machine, or the name of a model on the Hugging Face hub.

    ``package:name/sub`` is a folder inside an installed package. A source is a folder where it begins with ``.``, ``/`` or ``~``, has more than
    one ``/``, or is there, or the folder above it is. Anything else is a hub name; where the hub does not answer, the copy in the hub's cache is taken.

    Raises:
        ModelError: if the package is not installed, there is no such folder, or neither the hub nor its cache has the model.
    """
    if source.startswith("package:"):
        return _inside_package(source)
    try:
        path = usable(source, "The model")
        above = source.count("/") == 1 and path.parent.is_dir()
        is_folder = path.is_dir()
    except (ConfigError, OSError) as error:
        raise ModelError(str(error)) from error
    if is_folder:
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or above:
        near = suggest(path.name, (beside.name for beside in path.parent.iterdir() if beside.is_dir())) if path.parent.is_dir() else ""
        raise ModelError(
            f"There is no model folder at {source!r} (looked from {Path.cwd()}).{near} Give a folder with a config.json, or a hub name."
        )
    return _on_hub(source)


def _inside_package(source: str) -> str:
    name, _, rest = source.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # what stands before a dot is no package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"The model is said to be in the Python package {name!r}, which is not installed. Remedy: pip install {name.replace('_', '-')}"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / rest)


@cache
def _on_hub(name: str) -> str:
    """``name``, or its folder in the hub's cache where the hub does not answer. It is asked once, and not for long.

    Raises:
        ModelError: if the hub has no such model, or does not answer and the cache has none.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    here = f"There is no folder {name!r} here ({Path.cwd()})"
    if constants.is_offline_mode():
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            HfApi().model_info(name, timeout=_PATIENCE)
            return name
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise ModelError(f"{here}, and the Hugging Face hub has no model of that name. Give a folder with a config.json.") from error
        except Exception as error:  # the network fails in many ways, each with an error of its own
            reason = f"the hub does not answer ({type(error).__name__})"
    try:
        folder = snapshot_download(name, local_files_only=True)
    except Exception as error:  # here too
        raise ModelError(
            f"{here}, and as a model of the Hugging Face hub it cannot be fetched: {reason}, and it was not downloaded before. "
            "Give a folder with a config.json, or load it once where there is a network."
        ) from error
    log.warning("%s: %s is taken as it was downloaded before.", reason, name)
    return str(folder)


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

"""A loaded model with its tokenizer."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedfm.core import words
from fedfm.core.errors import ModelError
from fedfm.core.keys import Key
from fedfm.core.registry import suggest
from fedfm.core.task import Head
from fedfm.models.spec import Model
from fedfm.models.tokenizer import load_tokenizer, locate

if TYPE_CHECKING:
    from collections.abc import Iterator

_AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}
_KINDS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
}
_EXAMPLES = {
    "causal_lm": "Llama, Qwen2 or GPT2, for example",
    "masked_lm": "Bert, Roberta or ModernBert, for example",
    "sequence_classification": "Bert, Roberta or Llama, for example",
}
# Their first position is the one after the padding token's id.
_COUNT_FROM_PADDING = frozenset(
    ("camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
     "xlm-roberta-xl", "xmod")
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass
class Foundation:
    """A base model, its tokenizer, and where they came from.

    Attributes:
        model: A plain ``transformers`` model. Its own dropout is off: a client's numbers must not depend on who shares its batch.
        spec: The part it was loaded from.
        head: What it computes.
        labels: Class names, for classification.
        num_params: Parameters of the base.
        key: Where weights that no checkpoint has are drawn from.
        fresh: Modules that no checkpoint had (a new classification head); they train with any tuning.
        dropout: What the published config says of dropout.
        adapted: The model as another library wrapped it (``peft``), where one did.
    """

    model: Any
    tokenizer: Any
    spec: Model
    head: Head
    labels: tuple[str, ...]
    num_params: int
    key: Key
    fresh: tuple[str, ...]
    dropout: dict[str, float]
    adapted: Any = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def max_context(self) -> int | None:
        """The longest sequence the model takes; ``None`` if its config does not say."""
        return max_context(self.model.config)

    @contextmanager
    def as_published(self, config: Any) -> Iterator[None]:
        """``config`` (the base's, or a copy of it) with the dropout it came with, for saving."""
        off = {name: getattr(config, name) for name in self.dropout}
        for name, p in self.dropout.items():
            setattr(config, name, p)
        try:
            yield
        finally:
            for name, p in off.items():
                setattr(config, name, p)


def max_context(config: Any) -> int | None:
    """The longest sequence that a model with this config takes."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            counts = getattr(config, "model_type", "") in _COUNT_FROM_PADDING
            # MPNet counts from 1, whatever its config says.
            return value - 1 - max(getattr(config, "pad_token_id", None) or 0, 1) if counts else value
    return None


def device_of(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` as a device.

    Raises:
        ModelError: if this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"There is no device {name!r}; it is auto, cpu, cuda, cuda:1 or mps.")
    if (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise ModelError(f"The device {name!r} was asked for, but this machine has none. Use device: auto or cpu.")
    return device


def read_config(spec: Model) -> Any:
    """The model's ``transformers`` config alone, without its weights.

    Raises:
        ModelError: if there is none, or the architecture is unknown.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if spec.source is not None:
        try:
            return AutoConfig.from_pretrained(locate(spec.source), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"No model could be loaded from {spec.source!r}: {_brief(error)}") from error
    known = {name.replace("-", "_").replace("_", ""): name for name in CONFIG_MAPPING}
    wanted = (spec.architecture or "").lower()
    if wanted not in known:
        raise ModelError(f"transformers has no architecture {spec.architecture!r}.{suggest(wanted, known)}")
    try:
        return AutoConfig.for_model(known[wanted], **dict(spec.config))
    except Exception as error:  # each architecture computes with its numbers before, or without, checking them
        raise ModelError(f"The config of {spec.architecture} is not valid: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """What another library's error says, on one line and not at length."""
    return words.clean(" ".join(str(error).split()) or repr(error), 300)


def configured(spec: Model, head: Head, tokenizer: Any) -> Any:
    """The config with which the model is built: read, and fitted to its tokenizer.

    Raises:
        ModelError: if there is none, ``transformers`` has no model of its kind with this head, it has fewer tokens than the tokenizer, or an
            encoder is asked to be causal.
    """
    config = read_config(spec)
    _require_kind(spec, config, head)
    if head == "causal_lm":
        _require_causal(spec, config)
    given = dict(spec.config)
    # An embedding takes its padding row out of training, so a token that also ends texts is not set here.
    if tokenizer.pad_token_id != tokenizer.eos_token_id and (
        getattr(config, "pad_token_id", None) is None or (spec.architecture is not None and "pad_token_id" not in given)
    ):
        config.pad_token_id = tokenizer.pad_token_id
    for name in ("bos", "eos"):
        if spec.architecture is not None:
            setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    if spec.architecture is not None and "vocab_size" not in given:
        config.vocab_size = len(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens and the model only {config.vocab_size}: they do not fit. "
            "Use the tokenizer the model was trained with, or set vocab_size for a model from scratch."
        )
    return config


def _require_kind(spec: Model, config: Any, head: Head) -> None:
    import transformers

    if type(config) not in getattr(transformers, _KINDS[head]):
        kind = getattr(config, "model_type", "") or type(config).__name__
        raise ModelError(
            f"{spec.source or spec.architecture} is a model of the kind {kind}, and transformers has no {head.replace('_', ' ')} model of that kind. "
            f"Choose another base ({_EXAMPLES[head]}) or another task."
        )


def classes_of(config: Any) -> tuple[str, ...]:
    """The classes that a checkpoint's head was trained to tell, in the order of their indices; empty where it has no such head.

    A class without a name is its index.
    """
    if not any(name.endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or ()):
        return ()
    return tuple(str(i) if name == f"LABEL_{i}" else str(name) for i, name in sorted(config.id2label.items()))


def _require_causal(spec: Model, config: Any) -> None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    # An architecture with both heads is an encoder, which transformers also runs as a decoder where its config says so.
    both = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
    if both and not getattr(config, "is_decoder", getattr(config, "causal", False)):
        raise ModelError(
            f"{spec.source or spec.architecture} is an encoder (its config has is_decoder: false): as a causal model it would look ahead and "
            "train on its own answers. Use the task MaskedLM, or a causal base (is_decoder: true in its config makes it one)."
        )


def load(
    spec: Model,
    head: Head,
    labels: Sequence[str] = (),
    device: str = "auto",
    key: Key | None = None,
    outline: tuple[Any, Any] | None = None,
) -> Foundation:
    """Loads or builds the model.

    Args:
        head: What it must compute.
        labels: Class names, for ``sequence_classification``. A checkpoint that was trained for the same keeps its head.
        device: ``auto`` takes CUDA, then MPS, then the CPU.
        key: Where weights that no checkpoint has are drawn from.
        outline: The tokenizer, and the config as ``configured`` gives it, where both are loaded already. The model keeps and changes them.

    Raises:
        ModelError: if it does not load, does not fit its tokenizer, or has no such head.
    """
    if outline is None:
        tokenizer = load_tokenizer(spec.tokenizer or spec.source or "")
        outline = tokenizer, configured(spec, head, tokenizer)
    tokenizer, config = outline
    dropout = _without_dropout(config)
    renew = head == "sequence_classification" and _name_classes(config, spec, tuple(labels))
    key = key or Key.root(0)
    where = device_of(device)
    model, fresh = _build(spec, head, config, key, renew)
    if head != "sequence_classification" and fresh:
        raise ModelError(
            f"The model at {spec.source!r} has no weights for {sorted(fresh)[:4]}: it is not a {head.replace('_', ' ')} model."
        )
    # Rows are padded on the right only where a causal model cannot see it; the advice would be printed into every run.
    logging.getLogger("transformers.modeling_utils").addFilter(_not_about_padding)
    model.config.use_cache = False
    # Not before: an embedding takes its padding row, here the end of a text, out of training.
    # Causal models find a row's last token by the id that pads it, so it must be the one that rows are padded with.
    # Not at all where positions are counted from that id: a copy built with another would count from elsewhere.
    needed = head == "sequence_classification" or getattr(model.config, "pad_token_id", None) is None
    if needed and model.config.model_type not in _COUNT_FROM_PADDING:
        model.config.pad_token_id = tokenizer.pad_token_id
    if spec.gradient_checkpointing:
        model.activation_checkpointing_enable()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.to(where).train()
    if any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    num_params = sum(p.numel() for p in model.parameters())
    return Foundation(model, tokenizer, spec, head, tuple(labels), num_params, key, tuple(sorted(fresh)), dropout)


def _name_classes(config: Any, spec: Model, labels: tuple[str, ...]) -> bool:
    """Writes the classes into a config; says whether a head that was trained for others must be a new one."""
    if len(labels) < 2:
        raise ModelError(f"Classification needs at least 2 classes; the owners' rows show {list(labels)}.")
    known = classes_of(config)
    if set(known) == set(labels) and known != labels:
        raise ModelError(
            f"The recipe names the classes {', '.join(labels)}, but the head of {spec.source!r} has them in the order {', '.join(known)}. "
            "Leave out the task's labels, or give them in that order."
        )
    if known and known != labels:
        log.warning(
            "%s tells the classes %s, and the owners have %s: a new head is trained. To keep the head, give its classes in the task's labels.",
            spec.source, ", ".join(known[:8]), ", ".join(labels[:8]),
        )  # fmt: skip
    config.num_labels = len(labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    return bool(known) and known != labels


def _build(spec: Model, head: Head, config: Any, key: Key, renew: bool) -> tuple[Any, set[str]]:
    """The model, and the modules that no checkpoint had.

    Args:
        renew: Whether the checkpoint's head is left out.
    """
    import transformers

    dtype = getattr(torch, spec.dtype)
    auto = getattr(transformers, _AUTO[head])
    # New weights are drawn inside a fork of the global generator: the caller's stream stays as it was.
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(key.fold("model").seed())
        try:
            if spec.source is None:
                model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
                return model, _head_of(model) if head == "sequence_classification" else set()
            model, info = auto.from_pretrained(
                locate(spec.source), config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True, use_safetensors=True,
                ignore_mismatched_sizes=renew,
            )  # fmt: skip
            fresh = {name.rpartition(".")[0] for name in info["missing_keys"]}
            if renew:
                fresh |= (beside := _head_of(model))
                wrong = [name for name, *_ in info["mismatched_keys"] if name.partition(".")[0] not in beside]
                if wrong:
                    raise ModelError(f"The weights at {spec.source!r} do not fit its config: {wrong[0]}.")
                _draw(model, beside)
        except ModelError:
            raise
        except (
            Exception
        ) as error:  # layers are built of the config's numbers, and each kind fails in its own way of those that make no sense
            verb = "built" if spec.source is None else "loaded"
            raise ModelError(
                f"The model {spec.source or spec.architecture!r} could not be {verb} as a {head.replace('_', ' ')} model: {_brief(error)}"
            ) from error
    return model, fresh


def _draw(model: Any, names: set[str]) -> None:
    """Draws the weights of these modules as the model draws those of a new one."""
    for name in sorted(names):
        for module in model.get_submodule(name).modules():
            for parameter in module.parameters(recurse=False):
                # What transformers has loaded it does not draw.
                parameter._is_hf_initialized = False
            model._init_weights(module)


def _head_of(model: Any) -> set[str]:
    """The modules with weights beside the base."""
    return {name for name, module in model.named_children() if name != model.base_model_prefix and any(True for _ in module.parameters())}


def _not_about_padding(record: logging.LogRecord) -> bool:
    return "passing in an `attention_mask`" not in record.getMessage()


def _without_dropout(config: Any) -> dict[str, float]:
    """Sets every dropout probability of a config to 0; returns what they were."""
    published = {}
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0:
            published[name] = value
            setattr(config, name, 0.0)
    return published


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and reports on stderr; what matters becomes an error of ours."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def save(foundation: Foundation, model: Any, folder: Path) -> None:
    """Writes ``model`` and the tokenizer in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    with foundation.as_published(model.config), _quiet():
        checkpointing = getattr(model.config, "use_cache", None)
        model.config.use_cache = True
        try:
            model.save_pretrained(folder, safe_serialization=True)
        finally:
            model.config.use_cache = checkpointing
        foundation.tokenizer.save_pretrained(folder)


def save_labels(foundation: Foundation, folder: Path) -> None:
    """Writes ``labels.json`` beside the adapter of a classifier: an adapter's own config has no place for class names.

    It is a list in the order of the indices, to be given when the base is loaded::

        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        model = AutoModelForSequenceClassification.from_pretrained(folder, id2label=dict(enumerate(labels)))

    A ``config.json`` would make ``transformers`` look for a whole model in the folder. Other models have no classes, and nothing is written.
    """
    if foundation.head == "sequence_classification":
        (folder / "labels.json").write_text(json.dumps(foundation.labels, ensure_ascii=False) + "\n", encoding="utf-8")


def flops_per_token(num_params: int, num_trainable: int) -> int:
    """Estimate of the arithmetic of one training token: ``4 N`` through the frozen base (forward, and backward to activations)
    and ``2 n`` for the gradients of the ``n`` trainable parameters."""
    return 4 * num_params + 2 * num_trainable

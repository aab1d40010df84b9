"""Functions that the tasks share: text to ids, ids to targets, sums to metrics."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np

from fedfm.core.batch import IGNORE, IntArray
from fedfm.core.errors import ConfigError, ModelError
from fedfm.core.task import Encoder, Example, RawRow
from fedfm.core.tree import Tree
from fedfm.data.records import text_in

LONG = 1 << 18
"""Characters of a text that is tokenized whole, and of all texts that are tokenized at once."""
OVERLAP = 1 << 12
"""Characters that two pieces of a longer text share."""
_AGREE = 16  # fewest tokens on which two pieces must agree
_SPARE = 512  # more tokens of a text's beginning than are used, so that its last words may be cut anywhere
_FEW = 1 << 15  # characters that are tokenized in one thread
_PARALLEL = "TOKENIZERS_PARALLELISM"


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
    return [text for text in (text_in(row, column) for row in rows) if text.strip()]


def tokenize(tokenizer: Any, texts: Sequence[str], special: bool = False, max_length: int | None = None) -> list[IntArray]:
    """Ids of each text, int32, cut to ``max_length``, with the model's own special tokens around them if ``special``.

    A text of at most :data:`LONG` characters is tokenized whole. A longer one is tokenized in pieces (:func:`long_ids`), of which a cut one
    needs only the first.
    """
    ids: list[IntArray] = []
    waiting: list[str] = []
    size = 0
    for text in texts:
        if len(text) > LONG and max_length is None:
            ids += [*_together(tokenizer, waiting, special, max_length), np.concatenate([*long_ids(tokenizer, text)])]
            waiting, size = [], 0
            continue
        if len(text) > LONG and max_length is not None:
            text = head(tokenizer, text, max_length)
        # What the tokenizer makes of a text takes some 100 bytes for each character, of all texts of a call at once.
        if size + len(text) > LONG:
            ids += _together(tokenizer, waiting, special, max_length)
            waiting, size = [], 0
        waiting.append(text)
        size += len(text)
    return ids + _together(tokenizer, waiting, special, max_length)


@dataclass(frozen=True)
class Texts:
    """Texts that an encoder wants as ids; the fields are arguments of :func:`tokenize`."""

    texts: Sequence[str]
    special: bool = False
    max_length: int | None = None


Steps = Generator[Texts, list[IntArray], list[Example]]


class TextEncoder(Encoder):
    """An encoder that says which texts it wants as ids, so that those of many owners are tokenized in one call.

    Where owners have few rows, a call of the tokenizer takes longer than their texts do.

    Attributes:
        tokenizer: A ``PreTrainedTokenizerFast``.
    """

    tokenizer: Any

    @abstractmethod
    def steps(self, rows: Sequence[RawRow]) -> Steps:
        """Yields texts, is sent the ids of each, and returns the examples that the rows complete.

        Raises:
            DataError: naming the column that is missing or has the wrong type.
        """

    def add(self, rows: Sequence[RawRow]) -> list[Example]:
        """Examples completed by these rows."""
        return self.add_all([(self, rows)])[0]

    @classmethod
    def add_all(cls, work: Sequence[tuple[Self, Sequence[RawRow]]]) -> list[list[Example]]:
        """What :meth:`add` gives for each encoder and its rows; their texts are tokenized together."""
        examples: list[list[Example]] = [[] for _ in work]
        steps = [encoder.steps(rows) for encoder, rows in work]
        ids: dict[int, list[IntArray] | None] = dict.fromkeys(range(len(work)))
        while ids:
            wanted: dict[int, Texts] = {}
            for i, own in ids.items():
                try:
                    wanted[i] = next(steps[i]) if own is None else steps[i].send(own)
                except StopIteration as end:
                    examples[i] = end.value
            ids = {**_all_ids(work[0][0].tokenizer, wanted)}
        return examples


def _all_ids(tokenizer: Any, wanted: Mapping[int, Texts]) -> dict[int, list[IntArray]]:
    """The ids of each list of texts. Lists that are tokenized alike go into one call."""
    ids: dict[int, list[IntArray]] = {}
    for special, max_length in {(own.special, own.max_length) for own in wanted.values()}:
        alike = {i: own.texts for i, own in wanted.items() if (own.special, own.max_length) == (special, max_length)}
        every = iter(tokenize(tokenizer, [text for texts in alike.values() for text in texts], special, max_length))
        ids |= {i: list(islice(every, len(texts))) for i, texts in alike.items()}
    return ids


def _together(tokenizer: Any, texts: Sequence[str], special: bool, max_length: int | None) -> list[IntArray]:
    if not texts:
        return []
    with _one_thread() if sum(map(len, texts)) < _FEW else nullcontext():
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
    return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tokenizes in this thread: to wake others takes longer than a few short texts do, and there is a call for each of many owners."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before


def long_ids(tokenizer: Any, text: str) -> Iterator[IntArray]:
    """The ids of a long text, without special tokens, a piece at a time: memory does not grow with the text.

    Pieces of :data:`LONG` characters overlap by :data:`OVERLAP`, and are joined in the middle of the longest stretch in which they agree token by
    token. The ids are those of the whole text wherever a tokenizer looks less than half an overlap far, as byte-level BPE, WordPiece,
    SentencePiece's BPE and Unigram do with text that has words. Where two pieces agree nowhere (a text without any word), the later one
    begins where the earlier one ends.
    """
    first, held = 0, _piece(tokenizer, text, 0)
    while first + LONG < len(text):
        following = first + LONG - OVERLAP
        later = _piece(tokenizer, text, following)
        joint = _joint(held, later)
        if joint is None and len(held):
            # The last token may be half of one.
            cut = max(len(held) - 1, 1)
            following = int(held[cut - 1, 2]) if held[cut - 1, 2] > first else first + LONG
            later = _piece(tokenizer, text, following)
            joint = cut, 0
        cut, begin = joint or (0, 0)
        yield held[:cut, 0].astype(np.int32)
        first, held = following, later[begin:]
    yield held[:, 0].astype(np.int32)


def _piece(tokenizer: Any, text: str, first: int) -> IntArray:
    """The tokens of the piece at ``first``: id, first character and the one after its last, ``(n, 3)``."""
    encoded = tokenizer(
        text[first : first + LONG],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    span_n2 = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2) + first
    return np.column_stack([np.array(encoded["input_ids"], dtype=np.int64), span_n2])


def _joint(earlier: IntArray, later: IntArray) -> tuple[int, int] | None:
    """Where to leave the earlier piece and to enter the later one: tokens before the first number, tokens from the second on.

    ``None`` where they agree nowhere.
    """
    if not len(earlier) or not len(later):
        return None
    skipped = int(np.searchsorted(earlier[:, 1], later[0, 1]))
    shared = later[: int(np.searchsorted(later[:, 1], earlier[-1, 2]))]
    # A token is known by its place; where both pieces agree, both go on by one.
    place = {tuple(token): i for i, token in enumerate(shared.tolist())}
    at_n = np.array([place.get(tuple(token), -2 * i - 2) for i, token in enumerate(earlier[skipped:].tolist())], dtype=np.int64)
    begins = np.flatnonzero(np.diff(at_n, prepend=-9) != 1)
    if not len(begins):
        return None
    lengths = np.diff(begins, append=len(at_n))
    longest = int(lengths.argmax())
    if lengths[longest] < _AGREE:
        return None
    middle = int(begins[longest] + lengths[longest] // 2)
    return skipped + middle, int(at_n[middle])


def head(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of a long text that holds so many tokens and some more; the whole text where it has fewer."""
    piece = _piece(tokenizer, text, 0)
    if len(piece) > tokens + _SPARE:
        return text[: int(piece[tokens + _SPARE, 2])]
    size, counted = LONG, 0
    for ids in long_ids(tokenizer, text):
        counted += len(ids)
        if counted > tokens + _SPARE:
            break
        size += LONG
    return text[:size]


def both_ends(tokenizer: Any, text: str, tokens: int) -> IntArray:
    """The first and the last ``tokens`` ids of a long text, or all that it has, without what is between them."""
    first, last = _piece(tokenizer, text, 0), _piece(tokenizer, text, len(text) - LONG)
    if min(len(first), len(last)) > tokens + _SPARE:
        return np.concatenate([first[:tokens, 0], last[-tokens:, 0]]).astype(np.int32)
    ids = np.concatenate([*long_ids(tokenizer, text)])
    return ids if len(ids) < 2 * tokens else np.concatenate([ids[:tokens], ids[-tokens:]])


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

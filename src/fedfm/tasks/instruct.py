"""Instruction tuning: the model learns the response, not the instruction.

The ``alpaca`` template is that of Taori et al., `Stanford Alpaca
<https://github.com/tatsu-lab/stanford_alpaca>`_, 2023.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedfm.core.batch import IntArray, Row
from fedfm.core.errors import ConfigError, DataError, ModelError
from fedfm.core.task import Encoder, Example, Examples, RawRow, Task, Writer
from fedfm.core.tree import Tree
from fedfm.data.records import is_nothing, no_text, text_in, value_in, where
from fedfm.tasks.sequences import LONG, Steps, TextEncoder, Texts, both_ends, ends, language_metrics, require_length, shifted, tokenize

_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


@dataclass(frozen=True)
class Instruct(Task):
    """Predicts the tokens of a response and its EOS, given the instruction: the loss is on the response alone.

    Rows without an instruction or a response are dropped. With the loss on every token it would be ``CausalLM(packed=False)``.

    Args:
        instruction: Column that holds the instruction.
        input: Column with context for it, which may be empty; ``None`` for none.
        response: Column that holds the response.
        max_length: Tokens of an example, at least 8.
        template: ``plain`` (paragraphs), ``alpaca``, or ``chat`` (the tokenizer's own).
        on_long: ``truncate`` cuts the middle of the prompt, keeping at least a quarter of ``max_length`` of it, and only then the end of the
            response; ``drop`` leaves the example out. Dropped ones are counted.

    Raises:
        ConfigError: if a value is out of range.
    """

    instruction: str = "instruction"
    input: str | None = None
    response: str = "response"
    max_length: int = 256
    template: Literal["plain", "chat", "alpaca"] = "plain"
    on_long: Literal["truncate", "drop"] = "truncate"

    def __post_init__(self) -> None:
        require_length(self, self.max_length, 8)
        if self.template not in ("plain", "chat", "alpaca"):
            raise ConfigError(f"{self!r}: template must be plain, chat or alpaca.")
        if self.on_long not in ("truncate", "drop"):
            raise ConfigError(f"{self!r}: on_long must be truncate or drop.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row must have."""
        return tuple(column for column in (self.instruction, self.input, self.response) if column is not None)

    def require(self, row: RawRow) -> None:
        """Refuses a row without an instruction or a response."""
        instruction, response = text_in(row, self.instruction), text_in(row, self.response)
        context = self.context(row)
        if not (instruction.strip() or context):
            raise no_text(row, *filter(None, (self.instruction, self.input)))
        if not response.strip():
            raise no_text(row, self.response)

    def context(self, row: RawRow) -> str:
        """The row's context without white space around it; empty where there is none.

        Raises:
            RowError: if the column is absent or not text.
        """
        if self.input is None or is_nothing(value_in(row, self.input)):
            return ""
        return text_in(row, self.input).strip()

    def encoder(self, tokenizer: Any) -> Encoder:
        """A fresh encoder for one owner."""
        return _Encoder(self, tokenizer)

    def prompt(self, tokenizer: Any, instruction: str, context: str = "") -> str:
        """What the model reads before it answers, as in training (BOS aside, which only the chat template writes itself).

        Raises:
            ModelError: if the template is ``chat`` and the tokenizer has none.
        """
        if self.template == "chat":
            return _chat(tokenizer, instruction, context, None)
        if self.template == "alpaca":
            asked = f"{_ALPACA_INPUT if context else _ALPACA}### Instruction:\n{instruction}\n\n"
            return asked + (f"### Input:\n{context}\n\n" if context else "") + "### Response:\n"
        return f"{instruction}\n\n{context}\n\n" if context else f"{instruction}\n\n"

    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[Row]:
        """Ids, and the next one at each position from the one before the response on."""
        pairs = [(examples.ids(i), examples.start(i)) for i in index.tolist()]
        return [Row(ids, shifted(ids, start)) for ids, start in pairs]

    def summarise(self, sums: Tree) -> dict[str, float]:
        """``loss``, ``perplexity``, ``token_accuracy``, of the responses."""
        return language_metrics(sums)

    def predictor(self, tokenizer: Any, labels: Sequence[str]) -> Writer:
        """The model's answer to a row's instruction; the column of the response is not needed."""
        return _Answerer(self, tokenizer)

    def opening(self, tokenizer: Any, text: str, context: str = "") -> IntArray:
        """The instruction in the template, opened as in training."""
        # A chat template writes the BOS itself.
        bos = [] if self.template == "chat" else ends(tokenizer, "Instruct")[0]
        return np.concatenate([np.array(bos, dtype=np.int32), *tokenize(tokenizer, [self.prompt(tokenizer, text, context)])])


def _chat(tokenizer: Any, instruction: str, context: str, response: str | None) -> str:
    if tokenizer.chat_template is None:
        raise ModelError("Instruct(template='chat') needs a chat template, but the tokenizer has none. Use template: plain or alpaca.")
    messages = [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    # The template gives text, which is tokenized here: the ids that apply_chat_template returns differ between versions.
    written: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)
    return written


def _without_middle(prompt: list[int], room: int) -> list[int]:
    """The two ends of a prompt that is longer than ``room``."""
    return prompt[: room // 2] + prompt[len(prompt) - (room - room // 2) :]


class _Encoder(TextEncoder):
    def __init__(self, task: Instruct, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.bos, self.eos = ends(tokenizer, "Instruct")
        if task.template == "chat":
            self.bos = []  # the template writes it

    def steps(self, rows: Sequence[RawRow]) -> Steps:
        prompts, responses = [], []
        for row in rows:
            instruction, response = text_in(row, self.task.instruction), text_in(row, self.task.response)
            context = self.task.context(row)
            if not response.strip() or not (instruction.strip() or context):
                self.dropped += 1
                continue
            prompts.append(self.task.prompt(self.tokenizer, instruction, context))
            responses.append(self._response(instruction, context, response, prompts[-1]))
        # The two are tokenized apart, because the prompt stands alone when the model is asked.
        prompt_ids = yield from self._ids(prompts)
        response_ids = yield from self._ids(responses)
        pairs = zip(prompt_ids, response_ids, strict=True)
        examples = [self._example([*self.bos, *prompt], self._closed(response)) for prompt, response in pairs]
        self.dropped += examples.count(None)
        return [example for example in examples if example is not None]

    def _ids(self, texts: Sequence[str]) -> Generator[Texts, list[IntArray], list[list[int]]]:
        """Ids of each text; of a long one only its two ends, which are more than an example takes of it."""
        short = yield Texts([text for text in texts if len(text) <= LONG])
        whole = iter(short)
        return [(next(whole) if len(text) <= LONG else both_ends(self.tokenizer, text, self.task.max_length)).tolist() for text in texts]

    def _response(self, instruction: str, context: str, response: str, prompt: str) -> str:
        if self.task.template != "chat":
            return response
        whole = _chat(self.tokenizer, instruction, context, response)
        # Some templates write more before an answer than within a conversation; then the answer follows the prompt as it is.
        return whole[len(prompt) :] if whole.startswith(prompt) else response

    def _closed(self, response: list[int]) -> list[int]:
        # A chat template closes its answers itself.
        return response if self.eos in response else [*response, self.eos]

    def _example(self, prompt: list[int], response: list[int]) -> Example | None:
        size = self.task.max_length
        if len(prompt) + len(response) > size:
            if self.task.on_long == "drop":
                return None
            prompt = _without_middle(prompt, min(len(prompt), max(size - len(response), size // 4)))
            response = response[: size - len(prompt)]
        return Example(np.array(prompt + response, dtype=np.int32), start=len(prompt))


class _Answerer(Writer):
    answers = ("answer",)

    def __init__(self, task: Instruct, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.columns = tuple(column for column in (task.instruction, task.input) if column is not None)

    def prompt(self, row: RawRow, room: int | None) -> IntArray:
        instruction, context = text_in(row, self.task.instruction), self.task.context(row)
        if not (instruction.strip() or context):
            return np.zeros(0, dtype=np.int32)
        ids = self.task.opening(self.tokenizer, instruction, context)
        if room is None or len(ids) <= room:
            return ids
        if self.task.on_long == "drop":
            raise DataError(f"{where(row)}: its prompt has {len(ids)} tokens, and the model takes {room} with room for an answer.")
        return np.array(_without_middle(ids.tolist(), room), dtype=np.int32)

    def answer(self, text: str) -> dict[str, Any]:
        return {"answer": text}

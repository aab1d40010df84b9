"""Text from a model, several prompts at a time, each as if it were alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedfm.core.batch import IntArray
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key

log = logging.getLogger(__name__)
# Logits over anything smaller overflow float32.
_COLDEST = 1e-3
_MAX_TOKENS, _MAX_PROMPTS = 16384, 64
# Largest difference of two logits that padding may make, as a part of the largest logit.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Drawing:
    """How text is drawn from a model.

    Args:
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token each time; otherwise at least 0.001.
        seed: Of the drawing, from 0 to 2**63 - 1; used when ``temperature`` is not 0.

    Raises:
        ConfigError: if a number is out of range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")
        if self.temperature != 0 and not _COLDEST <= self.temperature < math.inf:
            raise ConfigError(f"The temperature is {self.temperature}; it must be 0 (the likeliest token) or from {_COLDEST} up.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"The seed is {self.seed}; it must be a whole number from 0 to 2**63 - 1.")


class Generator:
    """A model that answers prompts. Shorter prompts of a batch are padded on the left.

    An answer does not depend on the other prompts, but for float rounding: each has random numbers of its own, and a model whose answers
    change with the padding, which is tried once, gets prompts of equal length together.

    Args:
        model: A plain ``transformers`` model that writes.
        max_context: The longest sequence that it takes.
    """

    def __init__(self, model: Any, tokenizer: Any, max_context: int | None) -> None:
        self.model, self.tokenizer, self.max_context = model, tokenizer, max_context
        ends = getattr(model.generation_config, "eos_token_id", None)
        # A model is taught to close its answers with the tokenizer's token, whatever its base was published with.
        known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        self.stops = sorted({token for token in known if token is not None})
        self._pads: bool | None = None

    def answers(
        self,
        prompts: Sequence[IntArray],
        drawing: Drawing,
        numbers: Sequence[int] | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> list[str]:
        """What the model writes after each prompt, in their order.

        Args:
            prompts: Ids of each ``(n,)``, at least one, and fewer than the model's context.
            numbers: A number for each prompt, from which with the seed its random numbers follow; by default all have those of a prompt alone.
            watch: Called with the number of prompts answered, after each batch.
        """
        texts = [""] * len(prompts)
        done = 0
        for index, new in self._batches(prompts, drawing):
            written = self._write([prompts[i] for i in index], new, drawing, [numbers[i] if numbers else 0 for i in index])
            for i, text in zip(index, written, strict=True):
                texts[i] = text
            done += len(index)
            if watch is not None:
                watch(done)
        return texts

    def _batches(self, prompts: Sequence[IntArray], drawing: Drawing) -> list[tuple[list[int], int]]:
        """Prompts that are answered together, and the most tokens of their answers: a prompt near the end of the context gets fewer."""
        room = math.inf if self.max_context is None else self.max_context
        new_i = [int(min(drawing.max_new_tokens, room - len(prompt))) for prompt in prompts]
        # Longest first, so that memory that does not suffice is known at once.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        batches: list[tuple[list[int], int]] = []
        for i in order:
            if batches and batches[-1][1] == new_i[i]:
                index, new = batches[-1]
                size = min(_MAX_PROMPTS, _MAX_TOKENS // (len(prompts[index[0]]) + new))
                equal = len(prompts[index[0]]) == len(prompts[i])
                if len(index) < size and (equal or self._takes_padding(prompts[i])):
                    index.append(i)
                    continue
            batches.append(([i], new_i[i]))
        return batches

    def _write(self, prompts: Sequence[IntArray], new: int, drawing: Drawing, numbers: Sequence[int]) -> list[str]:
        width = max(map(len, prompts))
        out = self._generate(prompts, width, new, _noise(drawing, numbers))[:, width:].tolist()
        ended = (next((n for n, token in enumerate(row) if token in self.stops), len(row)) for row in out)
        return [self.tokenizer.decode(row[:end], skip_special_tokens=True) for row, end in zip(out, ended, strict=True)]

    def _generate(self, prompts: Sequence[IntArray], width: int, new: int, noise: _Noise | None = None, **options: Any) -> Any:
        from transformers import LogitsProcessorList

        ids_nl = torch.full((len(prompts), width), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask_nl = torch.zeros_like(ids_nl)
        for n, prompt in enumerate(prompts):
            ids_nl[n, width - len(prompt) :] = torch.from_numpy(prompt.astype("int64"))
            mask_nl[n, width - len(prompt) :] = 1
        device = self.model.device
        with torch.inference_mode():
            return self.model.generate(
                ids_nl.to(device),
                attention_mask=mask_nl.to(device),
                max_new_tokens=new,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.stops,
                do_sample=False,
                num_beams=1,
                logits_processor=LogitsProcessorList([] if noise is None else [noise]),
                **options,
            )

    def _takes_padding(self, prompt: IntArray) -> bool:
        """Whether padding on the left leaves the model's logits as they are; tried once."""
        if self._pads is None:
            options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
            alone, padded = (self._generate([prompt], len(prompt) + more, 1, **options).logits[0].float() for more in (0, 3))
            bound = _ROUNDING.get(self.model.dtype, _ROUNDING[torch.bfloat16]) * max(float(alone.abs().max()), 1.0)
            # A model that diverged gives NaN either way.
            self._pads = not bool((alone - padded).abs().max() > bound)
            if not self._pads:
                log.warning(
                    "%s answers otherwise where its prompt is padded; prompts of equal length go together", type(self.model).__name__
                )
        return self._pads


@dataclass(frozen=True)
class _Noise:
    """Gumbel noise, with which the largest of ``logits / temperature`` is a draw from their softmax.

    Args:
        generators: One for each row, so that a row's draws are its own.
    """

    temperature: float
    generators: Sequence[torch.Generator]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform_nv = torch.stack([torch.rand(scores.shape[-1], generator=own, dtype=torch.float64) for own in self.generators])
        noise_nv = -torch.log(-torch.log(uniform_nv)).float()
        return scores.float() / self.temperature + noise_nv.to(scores.device)


def _noise(drawing: Drawing, numbers: Sequence[int]) -> _Noise | None:
    if drawing.temperature == 0:
        return None
    key = Key.root(drawing.seed).fold("generate")
    return _Noise(drawing.temperature, [key.fold(number).generator() for number in numbers])

"""The model that a run has made, to export it or to ask it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from fedfm.core.disk import cannot_write
from fedfm.core.errors import ConfigError, RunError
from fedfm.core.keys import Key
from fedfm.core.parts import ServerState
from fedfm.core.tree import Spec
from fedfm.federation import Federation
from fedfm.models import Foundation, load
from fedfm.models.foundation import save
from fedfm.recipe import read
from fedfm.run.base import require_base
from fedfm.run.folder import RECIPE, read_journal, state_after
from fedfm.tasks import Instruct

log = logging.getLogger(__name__)
# Logits over anything smaller overflow float32.
_COLDEST = 1e-3


@dataclass
class Result:
    """A run's base model and its tuning after a round. Reads the run's folder and changes nothing in it; needs no data."""

    federation: Federation
    foundation: Foundation
    state: ServerState

    @staticmethod
    def open(path: Path, round: int | Literal["last", "best"] = "last") -> Result:
        """The result of the run in ``path``, finished or not.

        Args:
            round: ``last``; ``best`` for the round with the best score; or the number of a round whose state is kept.

        Raises:
            RunError: if there is no run, no round was completed, the state of that round is not kept, or the base has changed since.
        """
        state = state_after(path, round)
        federation = read(path / RECIPE).resolved()
        known = read_journal(path).first
        # The model is merged and saved on the CPU: a result must open on machines that could not have trained it.
        labels, key = known.get("data", {}).get("labels", ()), Key.root(federation.seed)
        foundation = load(federation.model, federation.task.head, labels, "cpu", key)
        require_base(known.get("base"), foundation, path)
        return Result(federation, foundation, state)

    def export(self, to: Path, merge: bool = False) -> None:
        """Writes the adapter in PEFT's layout, or with ``merge`` a whole model in Hugging Face's, and the tokenizer.

        Raises:
            RunError: if ``to`` holds files already, or cannot be written.
        """
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise RunError(f"{to} holds files already, and an export does not overwrite. Choose another --to.")
        tuning = self.federation.tuning
        params = self.state.params
        home = sorted(set(params) - set(tuning.travels(Spec.of(params))))
        if home:
            log.warning("The export holds %d parameters that stay at home (%s, ...) as they were at the start.", len(home), home[0])
        whole = tuning.merge(self.foundation, self.state.params) if merge else None
        try:
            to.mkdir(parents=True, exist_ok=True)
            if whole is not None:
                save(self.foundation, whole, to)
            else:
                tuning.save(self.foundation, self.state.params, to)
                self.foundation.tokenizer.save_pretrained(to)
        except (OSError, SafetensorError) as error:
            raise cannot_write(to, error) from error

    def generate(self, prompt: str, max_new_tokens: int = 100, temperature: float = 0.0, seed: int = 0) -> str:
        """The model's answer to ``prompt``, which is put into the task's template where it has one.

        Args:
            temperature: 0 takes the likeliest token each time; otherwise at least 0.001.
            seed: Of the drawing, from 0 to 2**63 - 1; used when ``temperature`` is not 0.

        Raises:
            ConfigError: if the model does not write text, or a number is out of range.
        """
        if temperature != 0 and not _COLDEST <= temperature < math.inf:
            raise ConfigError(f"The temperature is {temperature}; it must be 0 (the likeliest token) or from {_COLDEST} up.")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"The seed is {seed}; it must be a whole number from 0 to 2**63 - 1.")
        if self.federation.task.head != "causal_lm":
            raise ConfigError(
                f"This run's task is {type(self.federation.task).__name__}, whose model does not write text; generate needs CausalLM or Instruct."
            )
        task, tokenizer = self.federation.task, self.foundation.tokenizer
        chat = isinstance(task, Instruct) and task.template == "chat"
        text = task.prompt(tokenizer, prompt) if isinstance(task, Instruct) else prompt
        bos = [] if chat or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = torch.tensor([[*bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        room = self.foundation.max_context
        if ids.shape[1] == 0 or (room is not None and ids.shape[1] >= room):
            raise ConfigError(
                f"The prompt has {ids.shape[1]} tokens; the model reads at least 1 and fewer than {room} with room for an answer."
            )
        new = max_new_tokens if room is None else min(max_new_tokens, room - ids.shape[1])
        model: Any = self.federation.tuning.merge(self.foundation, self.state.params).eval()
        model.config.use_cache = True
        drawing = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=tokenizer.pad_token_id, **drawing
            )
        answer: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return answer

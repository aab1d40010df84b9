"""The model that a run has made, to export it or to ask it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError

from fedfm.client.bank import Bank
from fedfm.core import display, words
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
from fedfm.run.generation import Drawing, Generator
from fedfm.tuning.base import Tuned

log = logging.getLogger(__name__)


@dataclass(repr=False)
class Result:
    """A run's base model and its tuning after a round. Reads the run's folder and changes nothing in it; needs no data."""

    federation: Federation
    foundation: Foundation
    state: ServerState

    def __repr__(self) -> str:
        return f"Result({', '.join(f'{name}: {text}' for name, text in self._said())})"

    def _repr_html_(self) -> str:
        """What it is, as a small table for a notebook."""
        return display.table(f"Result of {self.federation.name}", self._said())

    def _said(self) -> list[tuple[str, str]]:
        base = self.foundation
        model = f"{type(base.model).__name__}, {words.count(base.num_params)} parameters, on {base.device}"
        classes = [("classes", words.listed(base.labels, 8))] if base.labels else []
        plan = self.federation
        return [
            ("after round", str(self.state.round)),
            ("model", model),
            ("task", repr(plan.task)),
            ("tuning", repr(plan.tuning)),
            *classes,
        ]

    @staticmethod
    def open(path: Path, round: int | Literal["last", "best"] = "last", device: str = "cpu") -> Result:
        """The result of the run in ``path``, finished or not.

        Args:
            round: ``last``; ``best`` for the round with the best score; or the number of a round whose state is kept.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``. A result opens on machines that could not have trained it, so the
                recipe's own device does not matter.

        Raises:
            RunError: if there is no run, no round was completed, the state of that round is not kept, or the base has changed since.
            ModelError: if this machine has no such device.
        """
        state = state_after(path, round)
        federation = read(path / RECIPE).resolved()
        known = read_journal(path).first
        labels, key = tuple((known.get("data") or known.get("labels") or {}).get("labels", ())), Key.root(federation.seed)
        foundation = load(federation.model, federation.task.head, labels, device, key)
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
        self.tuned  # noqa: B018 (see ``model``)
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

    @cached_property
    def tuned(self) -> Tuned:
        """The base prepared for its tuning."""
        return self.federation.tuning.attach(self.foundation)

    @cached_property
    def bank(self) -> Bank:
        """What evaluates and answers as clients do in a run, with the run's key."""
        plan, pad_id = self.federation, self.foundation.tokenizer.pad_token_id
        return Bank(self.tuned, plan.task, plan.local, pad_id, self.foundation.device, Key.root(plan.seed))

    @cached_property
    def theta_1d(self) -> torch.Tensor:
        """The trained parameters as a row ``(1, D)``."""
        return self.tuned.spec.flatten(self.state.params).unsqueeze(0)

    @cached_property
    def model(self) -> Any:
        """A plain ``transformers`` model with the tuning merged in, on the base's device.

        Raises:
            ConfigError: if the tuning cannot be merged.
        """
        # A library that wraps the base must do so once: the bank uses the same wrapped base.
        self.tuned  # noqa: B018
        model: Any = self.federation.tuning.merge(self.foundation, self.state.params)
        model.config.use_cache = True
        return model.eval().to(self.foundation.device)

    @cached_property
    def generator(self) -> Generator:
        """What writes text."""
        return Generator(self.model, self.foundation.tokenizer, self.foundation.max_context)

    def warn_of_home(self) -> None:
        """Warns where some parameters stay with their owners, so that this model is nobody's own."""
        params = self.state.params
        if len(self.federation.tuning.travels(Spec.of(params))) < len(params):
            log.warning("Parameters that stay at home are as they were at the start; each owner's own are in its memory.")

    @overload
    def generate(self, prompt: str, max_new_tokens: int = 100, temperature: float = 0.0, seed: int = 0) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        seed: int = 0,
        watch: Callable[[int], None] | None = None,
    ) -> list[str]: ...
    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        seed: int = 0,
        watch: Callable[[int], None] | None = None,
    ) -> str | list[str]:
        """The model's answer to ``prompt``, or to each of several, put into the task's template where it has one.

        Several prompts are answered together; each answer is the one that its prompt gets alone, but for float rounding.

        Args:
            temperature: 0 takes the likeliest token each time; otherwise at least 0.001.
            seed: Of the drawing, from 0 to 2**63 - 1; used when ``temperature`` is not 0.
            watch: Called with the number of prompts answered, from time to time.

        Raises:
            ConfigError: if the model does not write text, a prompt is empty or too long, or a number is out of range.
        """
        drawing = Drawing(max_new_tokens, temperature, seed)
        task, tokenizer, room = self.federation.task, self.foundation.tokenizer, self.foundation.max_context
        prompts = [task.opening(tokenizer, text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        for ids in prompts:
            if len(ids) == 0 or (room is not None and len(ids) >= room):
                raise ConfigError(
                    f"The prompt has {len(ids)} tokens; the model reads at least 1 and fewer than {room} with room for an answer."
                )
        answers = self.generator.answers(prompts, drawing, watch=watch)
        return answers[0] if isinstance(prompt, str) else answers

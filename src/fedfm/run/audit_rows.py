"""An audit of a plan's promise to rows: an owner whose rows are canaries works as the plan's owners do, and what it would send is looked at.

The trainer that keeps the promise is the plan's own, in the same bank: batches by Poisson sampling from the house's coins, the gradient of each example by
itself, its clip, the noise. Three things are not: the rows (each asks the model to move far along numbers of its own), the model (as
many numbers as the canaries need, and a loss that is linear in them), and the trainer's optimizer, which works on what is noisy already, and is SGD here.

A row that is not in keeps its place with next to no gradient, so that how many rows the owner has does not tell who is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedfm.client.bank import Bank, Job
from fedfm.core.batch import Batch, IntArray, Row
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.privacy import Release
from fedfm.core.secret import Secret, coins
from fedfm.core.task import Encoder, Example, Examples, Head, Task, Vocabulary
from fedfm.core.tree import Spec, Tree
from fedfm.data.held import Held
from fedfm.federation import Federation
from fedfm.local import SGD, ExampleDP
from fedfm.privacy.audit import seen
from fedfm.privacy.canaries import LONG, Canaries, turn
from fedfm.tuning.base import Tuned

ROWS = 2000
_OWNER, _LEAF = "canaries", "canaries.vector"
_FAINT = 1e-12  # of a canary's gradient, where it is not in


def promise_to_rows(plan: Federation) -> ExampleDP | None:
    """The trainer that hides rows; ``None`` where the plan's trainer promises rows nothing.

    Raises:
        ConfigError: if it promises nothing that could be wrong.
    """
    if not isinstance(plan.local, ExampleDP):
        return None
    if plan.local.noise_multiplier == 0:
        raise ConfigError("ExampleDP has no noise: epsilon is infinite, and no audit can contradict it. Set epsilon or noise_multiplier.")
    return plan.local


@dataclass
class RowPlay:
    """The rounds of an owner with canary rows.

    Args:
        plan: Resolved.
        num_rows: Rows of the owner; those that are no canaries hardly move the model.
        release: What a round releases of a row.
    """

    plan: Federation
    num_rows: int
    release: Release
    canaries: Canaries
    progress: Callable[[str, int, int], None] | None = None
    name: str = "run"

    def observed(self, present_n: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Plays all rounds with the rows that are present.

        Returns:
            The logarithms of the likelihood ratios ``(n,)``, and the sums over rounds of each canary's part ``(n,)`` in units of the bound.
        """
        local = self.plan.local
        assert isinstance(local, ExampleDP)
        work = local.work
        plain = SGD(lr=1.0, steps=work.steps, epochs=work.epochs, batch_size=work.batch_size, accumulate=work.accumulate)
        local, key = replace(local, inner=plain), Key.root(int.from_bytes(Secret.system().stream("seed").bytes(8), "big"))
        examples = Held([Example(np.array([i], dtype=np.int32)) for i in range(self.num_rows)], Vocabulary(self.num_rows))
        model = _Linear(self.canaries, present_n, LONG * local.max_norm)
        best_n, steady_n = np.zeros(len(self.canaries)), np.zeros(len(self.canaries))
        bank = Bank(model, _Move(), local, 0, torch.device("cpu"), key)
        start: Tree = {_LEAF: torch.zeros(len(self.canaries.owner_d))}
        expected = work.size(self.num_rows)
        for number in range(1, self.plan.rounds + 1):
            model.way = turn(number)
            secret = coins((local,), key.fold("client", number, _OWNER))
            trained = bank.train(start, [Job(_OWNER, examples, secret=secret)], number)[0]
            sum_d = -expected * trained.delta[_LEAF].double().numpy() / local.max_norm
            part_n = self.canaries.seen(sum_d, number)
            best_n += seen(part_n, self.release)
            steady_n += part_n
            if self.progress is not None:
                self.progress(self.name, number, self.plan.rounds)
        return best_n, steady_n


class _Linear(Tuned):
    """Example ``i`` has the logit ``<g_i, theta>``, ``g_i`` its canary's direction.

    Args:
        length: Of a present canary's gradient.
    """

    banks = True

    def __init__(self, canaries: Canaries, present_n: NDArray[np.bool_], length: float) -> None:
        size = len(canaries.owner_d)
        self.spec = Spec((_LEAF,), ((size,),), (torch.float32,))
        self.model = torch.nn.Identity()
        self.way = 1.0
        slope_d = canaries.sign_d * length / np.sqrt(canaries.size_n[canaries.owner_d]) * np.where(present_n[canaries.owner_d], 1.0, _FAINT)
        self._slope_d = torch.from_numpy(slope_d).float()
        self._owner_d, self._num = torch.from_numpy(canaries.owner_d), len(canaries)

    def init(self, key: Key) -> Tree:
        return {_LEAF: torch.zeros(self.spec.size)}

    def bind(self, theta_kd: torch.Tensor, dropout: list[Key] | None = None) -> None:
        self._theta_kd = theta_kd

    def logits(self, batch: Batch) -> torch.Tensor:
        rows = batch.shape[0] // batch.num_clients
        example_p, client_p = batch.inputs["input_ids"][batch.pick_p, 0], batch.pick_p // rows
        # Rows that are no canaries are told apart from each other by nothing: a faint move along the first canary's direction.
        mine_pd = self._owner_d[None, :] == torch.where(example_p < self._num, example_p, 0)[:, None]
        faint_p = torch.where(example_p < self._num, 1.0, _FAINT)
        slope_pd = self.way * faint_p[:, None] * mine_pd * self._slope_d[None, :]
        return (slope_pd * self._theta_kd[client_p]).sum(1, keepdim=True)


@dataclass(frozen=True)
class _Move(Task):
    """The loss of an example is its logit."""

    head: ClassVar[Head] = "sequence_classification"
    max_length: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def encoder(self, tokenizer: Any) -> Encoder:
        raise AssertionError("canaries are made of no text")

    def rows(self, examples: Examples, index: IntArray, rng: np.random.Generator) -> list[Row]:
        return [Row(examples.ids(i), np.zeros(1, dtype=np.int64)) for i in index.tolist()]

    def losses(self, logits_pc: torch.Tensor, batch: Batch) -> torch.Tensor:
        return logits_pc[:, 0]

    def summarise(self, sums: Tree) -> dict[str, float]:
        return {"loss": math.nan}


def typical_rows(split: list[Mapping[str, Any]]) -> int:
    """The training examples of the owner in the middle, from a run's ``split.json``."""
    sizes = sorted(int(row["train"]) for row in split if row.get("train"))
    return sizes[len(sizes) // 2] if sizes else ROWS


def split_of(run: Path) -> list[Mapping[str, Any]]:
    """What owners had, as a run has noted it."""
    import json

    from fedfm.run.folder import SPLIT

    path = run / SPLIT
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []

"""Observers: they watch a run and never change it.

An :class:`Observer` is a part of the recipe; ``open`` gives the :class:`Watcher` that lives as long as
the run. The loop calls, in this order::

    stage*  start  (answer* round)*  stage*  close

``stage`` may come at any time; ``round`` comes after the round is committed, so that what a watcher
has seen is never undone by a crash.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm.core.parts import Part
from fedfm.core.words import LOSS, Metric

if TYPE_CHECKING:
    from fedfm.core.messages import Failure, Reply
    from fedfm.core.round import RoundRecord


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first round.

    Args:
        rounds: How many rounds there will be in all.
        num_clients: Owners with usable data.
        cohort_size: Clients asked in a round.
        model: The base model in a word or two, without its size (``num_params``).
        num_params: Parameters of the base.
        num_trainable: Parameters that train and travel.
        choices: What was chosen for the whole run (``bank``: clients in a batch; ``compile``: for how many the model is compiled).
        resumed_from: Rounds already done, where this run goes on with an earlier one.
        earlier: Records of the rounds already done, from round 0 on.
        metric: The metric that leads.
    """

    name: str
    rounds: int
    num_clients: int
    cohort_size: int
    model: str
    num_params: int
    num_trainable: int
    device: str = "cpu"
    threads: int = 1
    choices: Mapping[str, Any] = field(default_factory=dict)
    resumed_from: int | None = None
    earlier: Iterable[RoundRecord] = ()
    metric: Metric = LOSS


class Watcher:
    """Watches one run. By default every hook does nothing."""

    def stage(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Something long before or after the rounds, such as tokenizing; ``done`` of ``total`` where these are known."""

    def start(self, info: RunInfo) -> None:
        """Everything is ready; rounds follow."""

    def answer(self, round: int, answer: Reply | Failure) -> None:
        """A client answered, or failed to, in ``round``."""

    def round(self, record: RoundRecord) -> None:
        """A round is committed. Round 0 is the evaluation before training."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The run is over. ``summary`` is its ledger; ``None`` where it ended in an error."""


class Observer(Part, ABC):
    """Watches a run."""

    room = "observers"

    @abstractmethod
    def open(self, folder: Path | None) -> Watcher:
        """Starts to watch the run in ``folder`` (``None`` where the run leaves nothing on disk).

        Raises:
            MissingExtra: if it needs a package that is not installed.
        """

"""What a client knows of a federation: the parts that act in its house, and no others."""

from __future__ import annotations

from dataclasses import dataclass

from fedfm.core.parts import Channel, LocalTrainer, Transform
from fedfm.core.task import Task
from fedfm.models import Model
from fedfm.tuning.base import Tuning


@dataclass(frozen=True)
class ClientPlan:
    """The parts of a federation that act in an owner's house.

    Args:
        model: The base model.
        task: What is learned.
        tuning: Which parameters train and travel.
        local: How a client works.
        transforms: What is done to an update in flight.
        channel: How answers leave.
    """

    model: Model
    task: Task
    tuning: Tuning
    local: LocalTrainer
    transforms: tuple[Transform, ...]
    channel: Channel

    @property
    def is_silent(self) -> bool:
        """Whether a privacy promise keeps the numbers of a client's work and what it has at home."""
        return any("silent" in part.traits().is_ for part in (self.local, *self.transforms))

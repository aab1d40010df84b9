"""What a client gives before its channel seals it, with the declaration of all that is in it."""

from __future__ import annotations

from dataclasses import dataclass

from fedfm.core.leaves import Leaf
from fedfm.core.parts import Transform, Update


@dataclass(frozen=True)
class Contribution:
    """A client's answer before its channel seals it.

    Args:
        update: The answer; ``update.client`` is set.
        leaves: The declaration of everything in it.
        transforms: What has encoded it.
    """

    update: Update
    leaves: tuple[Leaf, ...]
    transforms: tuple[Transform, ...] = ()

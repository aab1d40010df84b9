"""What one update may reach in a round: set before the round, judged when all of an update is here and before it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedfm.core import leaves
from fedfm.core.errors import MessageError
from fedfm.core.leaves import Leaf
from fedfm.core.messages import ClientId
from fedfm.core.tree import Tree, pieces


@dataclass(frozen=True)
class Limit:
    """A bound, and where it comes from.

    Args:
        most: The largest value that is taken.
        reason: In words, for whoever is over it.
    """

    most: float
    reason: str


@dataclass(frozen=True)
class Size:
    """What the server measured of one update.

    Args:
        norms: Euclidean norm of each group of leaves.
        weight: What the client says it counts; ``None`` where all count alike.
    """

    norms: Mapping[str, float]
    weight: float | None


@dataclass
class Limits:
    """The bounds of one round, and the sizes of the updates that are within them.

    Args:
        norm: Of a group that has no bound of its own.
        norms: By group of leaves.
        weight: ``None`` where all count alike, so that no claim about it matters.
        sizes: Of each client whose update was judged and is within the bounds.
    """

    norm: Limit
    norms: Mapping[str, Limit] = field(default_factory=dict)
    weight: Limit | None = None
    sizes: dict[ClientId, Size] = field(default_factory=dict)

    def judge(self, client: ClientId, norms: Mapping[str, float], weight: float) -> None:
        """Notes the size of an update that is within the bounds.

        Args:
            norms: Of each group of the decoded update; see :func:`norms_of`.
            weight: As the client tells it.

        Raises:
            MessageError: with the value, the bound and where the bound comes from.
        """
        for group, norm in norms.items():
            limit = self.norms.get(group, self.norm)
            # NaN fails this comparison too.
            if not norm <= limit.most:
                raise MessageError(
                    f"the norm of its {group} is {norm:.6g}, and the bound is {limit.most:.6g} ({limit.reason}). "
                    "It is left out, not shortened: what is left of a lie is no honest update."
                )
        if self.weight is not None and not weight <= self.weight.most:
            raise MessageError(
                f"its weight is {weight:.6g}, and the bound is {self.weight.most:.6g} ({self.weight.reason}). "
                "Its update is left out, not counted with less: an owner that lies about its weight is not believed about its update."
            )
        self.sizes[client] = Size(dict(norms), None if self.weight is None else weight)


def norms_of(declared: Sequence[Leaf], tree: Tree) -> dict[str, float]:
    """The Euclidean norm of each group of a decoded update, accumulated in float64. What an owner tells is no part of it.

    Args:
        declared: What the update holds.
    """
    squares: dict[str, list[float]] = {}
    for leaf in leaves.payload(declared):
        if leaf.group != "told" and leaf.dtype.is_floating_point:
            # Cut at the same places on every engine, so that all have the same bits, and an answer that lies on disk is never in memory as a whole.
            squares.setdefault(leaf.group, []).extend(piece.double().square_().sum().item() for piece in pieces(tree, leaf.name))
    return {group: math.sqrt(math.fsum(parts)) for group, parts in squares.items()}

"""The weighted mean.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, `Communication-Efficient Learning of Deep Networks from Decentralized Data
<https://arxiv.org/abs/1602.05629>`_, 2016.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fedfm.core.errors import ConfigError
from fedfm.core.leaves import deltas
from fedfm.core.parts import Aggregator, Partial, RoundContext, Spec, Traits, Update, traits


@dataclass(frozen=True)
class Mean(Aggregator):
    """``sum_k w_k x_k / sum_k w_k``, the same bits in whatever order updates arrive. With equal weights it is the uniform mean.

    Streams: memory is one sum and one update. An empty cohort gives a zero update.

    Args:
        weights: ``examples`` weighs a client by the number of examples that it sends, ``uniform`` by 1.

    Raises:
        ConfigError: if ``weights`` is neither.

    Example:
        >>> Mean(weights="uniform")
        Mean(weights='uniform')
    """

    weights: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        if self.weights not in ("examples", "uniform"):
            raise ConfigError(f"Mean.weights is {self.weights!r}; it must be 'examples' or 'uniform'.")

    def traits(self) -> Traits:
        """With ``examples`` it needs the number of examples of each owner."""
        return traits(needs=["counts"], hides=["uniform-weights"]) if self.weights == "examples" else traits()

    def takes_sums(self) -> bool:
        """A sum is all that a mean needs."""
        return True

    def uniform(self) -> bool:
        """Whether ``weights`` is ``uniform``."""
        return self.weights == "uniform"

    def __call__(self, updates: Iterable[Update | Partial], ctx: RoundContext) -> Update:
        """Adds each update, or sum of updates, as it arrives; then divides by the weight."""
        total: Partial | None = None
        for item in updates:
            if isinstance(item, Partial):
                # The only sum of a round is used up; a copy would hold the model twice.
                total = item if total is None else _sum(total, item)
                continue
            if total is None:
                total = Partial(ctx.leaves or deltas(Spec.of(item.payload)), self.uniform())
            total.add(item.client or "*", item.payload, {"weight": item.weight, **item.metrics}, item.weight)
        total = total or Partial(ctx.leaves or deltas(Spec.of(ctx.params)), self.uniform())
        return Update(total.take_mean(), weight=total.weight, num_clients=total.num_clients)


def _sum(x: Partial, y: Partial) -> Partial:
    total = Partial(x.leaves, x.uniform)
    total.merge(x)
    total.merge(y)
    return total

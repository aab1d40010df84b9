"""The weighted mean.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, `Communication-Efficient Learning of Deep Networks from Decentralized Data
<https://arxiv.org/abs/1602.05629>`_, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from fedfm.core.errors import ConfigError
from fedfm.core.parts import Aggregator, RoundContext, Spec, Traits, Update, traits
from fedfm.core.sums import ExactSum


@dataclass(frozen=True)
class Mean(Aggregator):
    """``sum_k w_k x_k / sum_k w_k``, the same bits in whatever order updates arrive. With equal weights it is the uniform mean.

    Streams: memory is one sum and one update. An empty cohort gives a zero update.

    Args:
        weights: ``examples`` counts a client by the weight it told, ``uniform`` by one.

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
        """Whether all clients count the same."""
        return traits(hides=["uniform-weights"] if self.weights == "examples" else [])

    def __call__(self, updates: Iterable[Update], ctx: RoundContext) -> Update:
        """The mean so far grows with each update."""
        spec, total = Spec.of(ctx.params), ExactSum(0)
        weights: list[float] = []
        num_clients = 0
        for update in updates:
            if not weights:
                spec = Spec.of(update.payload)
                total = ExactSum(spec.size)
            weight = update.weight if self.weights == "examples" else float(update.num_clients)
            total.add(spec.flatten(update.payload), weight)
            weights.append(weight)
            num_clients += update.num_clients
        # fsum rounds once, whatever the order.
        weight = math.fsum(weights)
        mean_d = total.value() / weight if weights else torch.zeros(spec.size)
        as_float32 = Spec(spec.names, spec.shapes, (torch.float32,) * len(spec.names))
        return Update(as_float32.unflatten(mean_d.float()), weight=weight, num_clients=num_clients)

"""What every aggregator must do."""

from __future__ import annotations

import torch

from fedfm.core import tree
from fedfm.core.keys import Key
from fedfm.core.parts import Aggregator, Update
from fedfm.testing.parts import check_part, context, copied, like, parameters, same


def check_aggregator(aggregator: Aggregator, num_clients: int = 7) -> None:
    """One pass, any order, the same bits; what all agree on is the result; nothing that came in is changed.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(aggregator)
    name = type(aggregator).__name__
    num_clients = max(num_clients, aggregator.min_updates())
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype)
        ctx = context(params, num_clients=num_clients)
        # A method's leaf travels beside the deltas.
        payloads = [{**like(params, i), "method.extra": torch.arange(4.0) * i} for i in range(num_clients)]
        before = [copied(payload) for payload in payloads]
        updates = [Update(payload, weight=1.0 + i % 3, client=f"client-{i}") for i, payload in enumerate(payloads)]

        result = aggregator(iter(updates), ctx)
        assert all(same(x, y) for x, y in zip(payloads, before, strict=True)), f"{name} changed an update"
        assert result.num_clients == num_clients, f"{name} counts {result.num_clients} clients of {num_clients}"
        assert result.client is None and result.weight > 0, (
            f"{name} gives the cohort the weight {result.weight} and the name {result.client}"
        )
        assert all(leaf.dtype == torch.float32 for leaf in result.payload.values()), f"{name} does not aggregate in float32"
        shapes = {key: leaf.shape for key, leaf in payloads[0].items()}
        assert {key: leaf.shape for key, leaf in result.payload.items()} == shapes, f"{name} changed names or shapes"
        assert tree.first_not_finite(result.payload) is None, f"{name} made a value that is not finite"

        for seed in range(5):
            order = torch.randperm(num_clients, generator=Key.root(seed).generator()).tolist()
            again = aggregator((updates[i] for i in order), ctx)
            assert same(again.payload, result.payload) and again.weight == result.weight, f"{name} depends on the order of updates"

        agreed = aggregator([Update(payloads[1], weight=2.0) for _ in range(num_clients)], ctx)
        for key, leaf in payloads[1].items():
            assert torch.allclose(agreed.payload[key], leaf.float(), rtol=1e-6), f"{name}: clients agree on {key!r}, the result differs"
    if aggregator.min_updates() == 1:
        nothing = aggregator(iter(()), ctx)
        assert nothing.num_clients == 0 and set(nothing.payload) == set(params), f"{name}: an empty cohort must be an update of no clients"
        assert not any(leaf.any() for leaf in nothing.payload.values()), f"{name}: an empty cohort must change nothing"

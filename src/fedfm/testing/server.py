"""What every server optimizer must do."""

from __future__ import annotations

import torch

from fedfm.core.messages import Request, pack, unpack
from fedfm.core.parts import ServerOptimizer, Spec, Tree, Update
from fedfm.testing.parts import check_part, context, copied, fits, like, parameters, same


def check_server(server: ServerOptimizer, extra: Tree | None = None) -> None:
    """Parameters keep their shapes and types, state is tensors that survive a file, and the step is a function of what goes in.

    Args:
        extra: Leaves that the server's method adds to an update.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(server)
    name = type(server).__name__
    for dtype in (torch.float32, torch.bfloat16):
        params: Tree = parameters(dtype)
        state = server.init(params)
        assert set(server.broadcast(params, state)).isdisjoint(params), f"{name} broadcasts under a parameter's name"
        zero = {key: torch.zeros(leaf.shape) for key, leaf in params.items()}
        unmoved, _ = server.step(params, Update({**zero, **(extra or {})}, num_clients=4), state, context(params))
        assert same(unmoved, params), f"{name}: the first step moves without a delta"
        for round in range(1, 4):
            ctx = context(params, round)
            delta = like(zero, round)
            update = Update({**delta, **(extra or {}), "method.extra": torch.ones(3)}, num_clients=4)
            given = [copied(x) for x in (params, state, update.payload)]
            new_params, new_state = server.step(params, update, state, ctx)
            assert all(same(x, y) for x, y in zip((params, state, update.payload), given, strict=True)), f"{name} changed its input"
            fits(Spec.of(params), new_params, f"{name}, round {round}")
            assert not same(new_params, params), f"{name} does not move along a delta"
            assert {k: x.shape for k, x in new_state.items()} == {k: x.shape for k, x in state.items()}, (
                f"{name}: the state changed its shape"
            )
            stored = unpack(pack(Request.of("state", tensors={**params, **{f"state/{k}": x for k, x in state.items()}})))
            assert isinstance(stored, Request)
            again = server.step(
                {k: stored.tensors[k] for k in params}, update, {k: stored.tensors[f"state/{k}"] for k in state}, context(params, round)
            )
            assert same(again[0], new_params) and same(again[1], new_state), f"{name}: a state that was stored goes on differently"
            params, state = new_params, new_state
    few = server.step(params, Update({**zero}, weight=0.0, num_clients=0), state, context(params))[0]
    fits(Spec.of(params), few, f"{name}, a round without clients")

"""What every transform must do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fedfm.core.errors import MessageError
from fedfm.core.leaves import Leaf, deltas
from fedfm.core.messages import Reply, pack, unpack
from fedfm.core.parts import Secret, Spec, Transform, Tree, Update
from fedfm.testing.parts import check_part, context, copied, fits, like, parameters, same


def check_transform(transform: Transform, rounds: int = 3) -> None:
    """What is encoded crosses the wire and decodes to the shape it had; what is malformed is refused, never a crash.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(transform)
    for dtype in (torch.float32, torch.bfloat16):
        _round_trip(transform, parameters(dtype), rounds)
    _refusals(transform, parameters())


def _round_trip(transform: Transform, params: Tree, rounds: int) -> None:
    name = type(transform).__name__
    memory: Tree = {}
    state = transform.init(params)
    for round in range(1, rounds + 1):
        received = transform.broadcast(state)
        ctx = context(params, round, client="client-1")
        ctx = replace(ctx, received=received, rate=1.0, secret=Secret.simulated(ctx.draw("coins")))
        payload = {**like(params, round), "method.extra": torch.linspace(-1, 1, 11)}
        given, known = copied(payload), copied(memory)
        spec = Spec.of(payload)
        update = Update(payload, weight=3.0, client="client-1", metrics={"loss": 1.0})
        encoded, after = transform.encode(update, memory, ctx)
        assert same(payload, given) and same(memory, known), f"{name}.encode changed its input"
        assert all(isinstance(leaf, torch.Tensor) for leaf in after.values()), f"{name} remembers what is no tensor"
        declared = (Leaf("loss", (), torch.float64, "told"), *deltas(Spec.of(payload)))
        added = {leaf.name for leaf in transform.leaves(declared)} - {leaf.name for leaf in declared}
        numbers = {key: value for key, value in encoded.metrics.items() if key not in added}
        assert (encoded.weight, encoded.client, numbers) == (3.0, "client-1", {"loss": 1.0}), (
            f"{name}.encode changed more than the payload, and what it declares"
        )
        assert added <= encoded.metrics.keys() | encoded.payload.keys(), f"{name} declares {added}, and does not tell it"
        again, after_again = transform.encode(update, memory, replace(ctx, secret=Secret.simulated(ctx.draw("coins"))))
        assert same(encoded.payload, again.payload) and same(after, after_again), f"{name} is not decided by the key"
        arrived = unpack(pack(Reply("client-1", "train", round, encoded.payload)))
        assert isinstance(arrived, Reply)
        decoded = transform.decode(encoded.with_payload(arrived.tensors), ctx)
        assert same(decoded.payload, transform.decode(encoded, ctx).payload), f"{name} decodes differently what has crossed the wire"
        fits(spec, decoded.payload, f"{name}, decoded")
        _check_covers(transform, update, decoded)
        whole = Update({k: x.float() for k, x in decoded.payload.items()}, num_clients=1, metrics=decoded.metrics)
        before = copied(state)
        aggregate, state_after = transform.finish(whole, state, ctx)
        assert same(state, before), f"{name}.finish changed its state in place"
        assert {k: (x.shape, x.dtype) for k, x in state_after.items()} == {k: (x.shape, x.dtype) for k, x in state.items()}, (
            f"{name}: the state changed its shape"
        )
        assert {k: x.shape for k, x in aggregate.payload.items()} == dict(zip(spec.names, map(torch.Size, spec.shapes), strict=True)), (
            f"{name}.finish changed names or shapes"
        )
        memory, state = after, state_after


def _check_covers(transform: Transform, update: Update, decoded: Update) -> None:
    """What the transform does not cover passes whole."""
    name = type(transform).__name__
    if "control" not in transform.covers:
        assert torch.equal(decoded.payload["method.extra"], update.payload["method.extra"]), f"{name} changes a leaf that it does not cover"
    if "told" not in transform.covers:
        assert decoded.metrics.get("loss") == update.metrics["loss"], f"{name} changes a number that it does not cover"


def _refusals(transform: Transform, params: Tree) -> None:
    name, ctx = type(transform).__name__, context(params, client="client-1")
    payload = {**like(params, 1), "method.extra": torch.linspace(-1, 1, 11)}
    ctx = replace(ctx, received=transform.broadcast(transform.init(params)), secret=Secret.simulated(ctx.draw("coins")))
    encoded, _ = transform.encode(Update(payload, client="client-1"), {}, ctx)
    for what, broken in _mutations(encoded.payload):
        try:
            Spec.of(payload).require(transform.decode(encoded.with_payload(broken), ctx).payload, name)
        except MessageError:
            continue
        except Exception as error:
            raise AssertionError(f"{name}.decode meets {what} with {type(error).__name__}, not MessageError: {error}") from error


def _mutations(payload: Tree) -> Iterator[tuple[str, Tree]]:
    yield "an empty payload", {}
    yield "a strange tensor", {**payload, "strange": torch.ones(2)}
    yield "a strange tensor of integers", {**payload, "strange": torch.ones(2, dtype=torch.int64)}
    for name, leaf in payload.items():
        without = {key: x for key, x in payload.items() if key != name}
        yield f"a payload without {name!r}", without
        yield f"{name!r} under another name", {**without, name + "x": leaf}
        shapes = {
            "a scalar": leaf.new_zeros(()),
            "nothing": leaf.new_zeros(0),
            "one value": leaf.reshape(-1)[:1],
            "one value less": leaf.reshape(-1)[:-1],
            "one value more": torch.cat([leaf.reshape(-1), leaf.reshape(-1)[:1]]),
            "one axis more": leaf.unsqueeze(0),
            "no order": leaf.reshape(-1).flip(0).reshape(leaf.shape),
        }
        dtypes = {
            f"type {dtype}": leaf.to(dtype)
            for dtype in (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float64)
        }
        if leaf.is_floating_point():
            values = {f"the value {x}": torch.full_like(leaf, x) for x in (float("nan"), float("inf"), -float("inf"), 3e38, -1.0)}
        else:
            limit = torch.iinfo(leaf.dtype) if leaf.dtype != torch.bool else None
            values = {f"the value {x}": torch.full_like(leaf, x) for x in ((limit.min, limit.max, 0) if limit else (0, 1))}
        for what, other in {**shapes, **dtypes, **values}.items():
            yield f"{name!r} with {what}", {**payload, name: other}

"""What every part that bounds updates must do."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedfm.core.errors import MessageError
from fedfm.core.limits import Limits, Size
from fedfm.core.parts import Bounds
from fedfm.core.tree import Tree, num_bytes
from fedfm.testing.parts import check_part, same

_SIZES = [Size({"delta": 0.5 + 0.01 * k, "method": 2.0}, 10.0 + k) for k in range(7)]


def check_bounds(bounds: Bounds) -> None:
    """Whoever is like the others is taken, whoever is endless is not; what is remembered depends on no order and does not grow.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(bounds)
    name = type(bounds).__name__
    state: Tree = bounds.init([10, 12, 11])
    for round in range(3):
        for size in _SIZES:
            weight = size.weight or 1.0
            assert _takes(bounds.limits(state, False), size.norms, weight), f"{name}: round {round + 1} refuses who is like the others"
        for bad in (math.inf, math.nan):
            assert not _takes(bounds.limits(state, False), {"delta": bad}, 10.0), f"{name} takes a norm of {bad}"
            assert not _takes(bounds.limits(state, False), {"delta": 0.5}, bad), f"{name} takes a weight of {bad}"
        assert _takes(bounds.limits(state, True), {"delta": 0.5}, math.inf), f"{name} looks at weights where all count alike"
        after, again = bounds.learn(state, _SIZES), bounds.learn(state, list(reversed(_SIZES)))
        assert same(after, again), f"{name}: the order of answers changes what is remembered"
        state = after
    assert same(bounds.learn(state, []), state), f"{name}: a round without an update changes what is remembered"
    long = _after(bounds, state, 2000)
    assert num_bytes(long) == num_bytes(_after(bounds, long, 100)), f"{name}: what is remembered grows for ever"


def _after(bounds: Bounds, state: Tree, rounds: int) -> Tree:
    for _ in range(rounds):
        state = bounds.learn(state, _SIZES[:1])
    return state


def _takes(limits: Limits, norms: Mapping[str, float], weight: float) -> bool:
    try:
        limits.judge("client", norms, weight)
    except MessageError:
        assert "client" not in limits.sizes, "what is refused is remembered"
        return False
    return limits.sizes.pop("client", None) is not None

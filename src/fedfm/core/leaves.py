"""Everything that leaves a house is declared: a name, a shape, a type, a bound, and how many become one.

The boundary, an exact sum and the plan check read this one declaration; so can the ring of a secure sum and the sensitivity of a noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedfm.core.errors import MessageError
from fedfm.core.tree import LazyTree, Spec, Tree, ends

Reduce = Literal["mean", "sum", "each"]
# What a leaf can tell of its owner that the owner may keep to itself.
Kind = Literal["counts", "labels", "losses", "evaluation"]
# A 256th of the largest sum that an aggregate can hold. No client has more examples, and no honest delta is longer.
MOST = 2.0**30
# Values of an answer that are copied into one vector to be looked at together.
_TOGETHER = 1 << 20


@dataclass(frozen=True)
class Leaf:
    """One tensor of an answer.

    Args:
        name: Its name in the payload, or among an update's metrics.
        shape: Shape of one client's tensor.
        group: ``delta`` for changes of parameters, ``told`` for weights, losses and counts; a method may name a group of its own. A transform
            changes only the groups it covers.
        bound: No value is larger in magnitude.
        signed: Whether values may be negative.
        nan: Whether NaN is an honest value: a loss of a model that diverged, a count that its owner withholds.
        optional: Whether a number may be missing: its owner withholds it.
        silent: What stands in for the value where its owner withholds it.
        kinds: What it tells of its owner; see :attr:`tells`.
        reduce: How many become one: the weighted ``mean``, the ``sum``, or ``each`` by itself.
        grid: A power of two of which each value is a multiple, and must stay one on its way; 0 where it need not.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    group: str = "delta"
    bound: float = MOST
    reduce: Reduce = "mean"
    signed: bool = True
    nan: bool = False
    optional: bool = False
    silent: float = 0.0
    kinds: tuple[Kind, ...] | None = None
    grid: float = 0.0

    @property
    def tells(self) -> tuple[Kind, ...]:
        """What it tells of its owner beyond a change of parameters. A number whose maker says nothing is taken for a count."""
        if self.kinds is not None:
            return self.kinds
        return ("counts",) if self.group == "told" else ()

    @property
    def is_number(self) -> bool:
        """Whether it is a single number. Such leaves are an update's metrics, all others its payload."""
        return self.group == "told" and self.shape == ()

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def is_silent(self, value: torch.Tensor | float) -> bool:
        """Whether this is what stands in for a value that its owner withholds: NaN, or :attr:`silent`."""
        x = torch.as_tensor(value, dtype=torch.float64)
        return bool((x.isnan() | (x == self.silent)).all())

    def require(self, value: torch.Tensor | float, whose: str) -> None:
        """Refuses a value that is out of bounds.

        Raises:
            MessageError: with the value and the bound.
        """
        self.require_ends(*((value, value) if isinstance(value, float) else ends({self.name: value}, self.name)), whose)

    def require_ends(self, low: float, high: float, whose: str) -> None:
        """Refuses values of which the smallest or the largest is out of bounds.

        Raises:
            MessageError: with the value and the bound.
        """
        if self.nan and math.isnan(low):
            return
        if not (math.isfinite(low) and math.isfinite(high)):
            raise MessageError(f"{whose}: {self.name!r} holds NaN or infinity.")
        if max(-low, high) > self.bound or (low < 0 and not self.signed):
            least = -self.bound if self.signed else 0
            raise MessageError(
                f"{whose}: {self.name!r} reaches {high if high > self.bound else low:.4g}; it lies in {least:g}..{self.bound:g}."
            )


def number(name: str, reduce: Reduce = "sum", bound: float = MOST, signed: bool = False, nan: bool = False, **more: Any) -> Leaf:
    """A leaf that is a single number; a count unless said otherwise.

    Args:
        more: ``optional``, ``silent`` and ``kinds`` of :class:`Leaf`.
    """
    return Leaf(name, (), torch.float64, "told", bound, reduce, signed, nan, **more)


def deltas(spec: Spec) -> tuple[Leaf, ...]:
    """A change of each parameter in ``spec``."""
    return tuple(Leaf(name, shape, dtype) for name, shape, dtype in zip(spec.names, spec.shapes, spec.dtypes, strict=True))


def numbers(leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
    """The leaves that are single numbers."""
    return tuple(leaf for leaf in leaves if leaf.is_number)


def payload(leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
    """The leaves that are tensors of the payload."""
    return tuple(leaf for leaf in leaves if not leaf.is_number)


def spec_of(leaves: Iterable[Leaf]) -> Spec:
    """Names, shapes and types of the payload."""
    tensors = payload(leaves)
    return Spec(tuple(leaf.name for leaf in tensors), tuple(leaf.shape for leaf in tensors), tuple(leaf.dtype for leaf in tensors))


def require(leaves: Sequence[Leaf], tree: Tree, whose: str) -> None:
    """Refuses a payload that is not what was declared.

    Raises:
        MessageError: naming the first leaf that is wrong.
    """
    tensors = payload(leaves)
    spec = spec_of(tensors)
    spec.require_shapes(tree, whose)
    if _all_within(tensors, spec, tree):
        return
    for leaf in tensors:
        leaf.require_ends(*ends(tree, leaf.name), whose)


def _all_within(tensors: Sequence[Leaf], spec: Spec, tree: Tree) -> bool:
    """Whether one look at all values shows that each is finite and within the narrowest bound; many small leaves cost as little as a large one."""
    if not tensors or isinstance(tree, LazyTree) or spec.size > _TOGETHER:
        return False
    if len(set(spec.dtypes)) > 1 or not spec.dtypes[0].is_floating_point:
        return False
    low, high = ends({"all": spec.flatten(tree, spec.dtypes[0])}, "all")
    least = 0.0 if any(not leaf.signed for leaf in tensors) else -math.inf
    # NaN fails each of these comparisons.
    return max(-low, high) <= min(leaf.bound for leaf in tensors) and low >= least

"""Trees of tensors: flat mappings from a parameter's name to its value.

A tree is what travels: trainable parameters, updates, optimizer state. Names carry the
structure (``model.layers.0.self_attn.q_proj.lora_A.weight``), so a tree is also what is saved.
Order is part of a tree: ``flatten`` lays the leaves out in the order in which they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedfm.core.errors import MessageError

Tree = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """Names, shapes and dtypes of a tree: what a receiver expects.

    ``flatten`` and ``unflatten`` move between a tree and one vector of ``size`` float32 values.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(tree: Tree) -> Spec:
        """The spec that ``tree`` satisfies."""
        return Spec(tuple(tree), tuple(tuple(t.shape) for t in tree.values()), tuple(t.dtype for t in tree.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Number of elements in all."""
        return sum(self.sizes)

    def flatten(self, tree: Tree, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The leaves as one vector ``(size,)``."""
        if not self.names:
            return torch.zeros(0, dtype=dtype)
        return torch.cat([tree[name].reshape(-1).to(dtype) for name in self.names])

    def unflatten(self, x_d: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of ``x_d`` ``(size,)`` or ``(K, size)`` under their names, cast to their dtypes."""
        leaves = torch.split(x_d, list(self.sizes), dim=-1)
        lead = tuple(x_d.shape[:-1])
        return {
            name: leaf.view((*lead, *shape)).to(dtype)
            for name, shape, dtype, leaf in zip(self.names, self.shapes, self.dtypes, leaves, strict=True)
        }

    def require(self, tree: Tree, what: str) -> None:
        """Refuses a tree that does not satisfy this spec, or that is not finite.

        Raises:
            MessageError: naming the first leaf that is wrong.
        """
        self.require_shapes(tree, what)
        bad = first_not_finite(tree)
        if bad is not None:
            raise MessageError(f"{what}: tensor {bad!r} holds NaN or infinity.")

    def require_shapes(self, tree: Tree, what: str) -> None:
        """Refuses a tree with other names, shapes or types.

        Raises:
            MessageError: naming the first leaf that is wrong.
        """
        if set(tree) != set(self.names):
            missing, extra = sorted(set(self.names) - set(tree)), sorted(set(tree) - set(self.names))
            raise MessageError(f"{what}: wrong tensors; missing {missing[:3]}, unexpected {extra[:3]}.")
        for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True):
            leaf = tree[name]
            if tuple(leaf.shape) != shape or leaf.dtype != dtype:
                raise MessageError(
                    f"{what}: tensor {name!r} is {str(leaf.dtype)[6:]}{list(leaf.shape)}, expected {str(dtype)[6:]}{list(shape)}."
                )


def first_not_finite(tree: Tree) -> str | None:
    """The name of the first leaf with NaN or infinity, or None."""
    for name, leaf in tree.items():
        # A finite sum proves every element finite and is 20 times cheaper than isfinite; an overflowing sum proves nothing.
        if leaf.is_floating_point() and not math.isfinite(leaf.sum(dtype=torch.float64).item()) and not leaf.isfinite().all():
            return name
    return None


def sub(x: Tree, y: Tree) -> dict[str, torch.Tensor]:
    """``x - y``, leaf by leaf."""
    return {name: leaf - y[name] for name, leaf in x.items()}


def added(name: str, params: Tree) -> bool:
    """Whether a method added this leaf of a payload (SCAFFOLD's control variate).

    A parameter's delta is no such leaf, nor is one that a transform made of deltas, whose name holds ``::``. The method needs the exact value,
    so a lossy transform leaves it alone.
    """
    return name not in params and "::" not in name


def norm(tree: Tree) -> float:
    """Euclidean norm over all floating leaves, accumulated in float64."""
    return math.sqrt(math.fsum(leaf.double().square().sum().item() for leaf in tree.values() if leaf.is_floating_point()))


def raw(leaf: torch.Tensor) -> memoryview:
    """The bytes of a leaf, row by row, whatever its strides."""
    flat = leaf.detach().cpu().reshape(-1)
    if flat.stride(0) != 1:
        # A column of a matrix, or one value of it, keeps its stride when it is flattened.
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def num_bytes(tree: Tree) -> int:
    """Bytes of all leaves."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.values())


def equal(x: Tree, y: Tree) -> bool:
    """Same names, dtypes and bits."""
    return set(x) == set(y) and all(x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]) for name in x)

"""Trees of tensors: flat mappings from a parameter's name to its value.

A tree is what travels: trainable parameters, updates, optimizer state. Names carry the
structure (``model.layers.0.self_attn.q_proj.lora_A.weight``), so a tree is also what is saved.
Order is part of a tree: ``flatten`` lays the leaves out in the order in which they are stored.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch

from fedfm.core.errors import MessageError

Tree = Mapping[str, torch.Tensor]
# Values of a leaf that are worked on at a time, which keeps the temporaries of a large one in cache.
PIECE = 1 << 16


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
        """The spec that ``tree`` satisfies; nothing is read for it."""
        if isinstance(tree, LazyTree):
            return tree.spec
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
        arrived = Spec.of(tree).by_name
        for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True):
            if arrived[name] != (shape, dtype):
                its_shape, its_dtype = arrived[name]
                raise MessageError(
                    f"{what}: tensor {name!r} is {str(its_dtype)[6:]}{list(its_shape)}, expected {str(dtype)[6:]}{list(shape)}."
                )

    @property
    def by_name(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each leaf."""
        return dict(zip(self.names, zip(self.shapes, self.dtypes, strict=True), strict=True))


class LazyTree(Mapping[str, torch.Tensor]):
    """A tree that lies elsewhere and is read piece by piece, as often as it is asked for. A leaf is put together only where all of it is asked for.

    Args:
        spec: What it holds, known without reading it.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._by_name = spec.by_name
        self._ends: dict[str, tuple[float, float]] = {}

    @abstractmethod
    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The values of a leaf in their order, each piece but the last with :data:`PIECE` of them.

        Raises:
            RunError: if they cannot be read.
        """

    def ends(self, name: str) -> tuple[float, float]:
        """The smallest and the largest value of a leaf; read once, because a tree does not change."""
        if name not in self._ends:
            self._ends[name] = _ends(self.pieces(name))
        return self._ends[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        shape, dtype = self._by_name[name]
        leaf = torch.zeros(shape, dtype=dtype)
        x_n, start = leaf.view(-1), 0
        for piece in self.pieces(name):
            x_n[start : start + piece.numel()] = piece
            start += piece.numel()
        return leaf

    def __iter__(self) -> Iterator[str]:
        return iter(self.spec.names)

    def __len__(self) -> int:
        return len(self.spec.names)


def pieces(tree: Tree, name: str) -> Iterator[torch.Tensor]:
    """The values of a leaf in their order, cut at the same places wherever the tree lies: each piece but the last has :data:`PIECE` of them."""
    return tree.pieces(name) if isinstance(tree, LazyTree) else _cut(tree[name])


def ends(tree: Tree, name: str) -> tuple[float, float]:
    """The smallest and the largest value of a leaf: NaN if a value is NaN, 0 where there is none."""
    return tree.ends(name) if isinstance(tree, LazyTree) else _ends([tree[name]])


def _cut(leaf: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(torch.split(leaf.reshape(-1), PIECE) if leaf.numel() else ())


def _ends(pieces: Iterable[torch.Tensor]) -> tuple[float, float]:
    # Python's min and max would lose a NaN.
    both = [torch.stack(piece.aminmax()) for piece in pieces if piece.numel()]
    if not both:
        return 0.0, 0.0
    low, high = both[0] if len(both) == 1 else torch.stack(torch.cat(both).aminmax())
    return float(low), float(high)


def first_not_finite(tree: Tree) -> str | None:
    """The name of the first leaf with NaN or infinity, or None."""
    for name, dtype in zip(Spec.of(tree).names, Spec.of(tree).dtypes, strict=True):
        if dtype.is_floating_point and not all(_is_finite(piece) for piece in pieces(tree, name)):
            return name
    return None


def _is_finite(x_n: torch.Tensor) -> bool:
    # A finite sum proves every element finite and is 20 times cheaper than isfinite; an overflowing sum proves nothing.
    return math.isfinite(x_n.sum(dtype=torch.float64).item()) or bool(x_n.isfinite().all())


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
    spec = Spec.of(tree)
    floating = (name for name, dtype in zip(spec.names, spec.dtypes, strict=True) if dtype.is_floating_point)
    values = chain.from_iterable(pieces(tree, name) for name in floating)
    return math.sqrt(math.fsum(piece.double().square().sum().item() for piece in values))


def raw(leaf: torch.Tensor) -> memoryview:
    """The bytes of a leaf, row by row, whatever its strides."""
    flat = leaf.detach().cpu().reshape(-1)
    if flat.stride(0) != 1:
        # A column of a matrix, or one value of it, keeps its stride when it is flattened.
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def num_bytes(tree: Tree) -> int:
    """Bytes of all leaves."""
    spec = Spec.of(tree)
    return sum(size * dtype.itemsize for size, dtype in zip(spec.sizes, spec.dtypes, strict=True))


def equal(x: Tree, y: Tree) -> bool:
    """Same names, dtypes and bits."""
    return set(x) == set(y) and all(x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]) for name in x)

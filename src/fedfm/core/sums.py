"""A sum that does not depend on the order in which its terms arrive.

Each term is cut onto a fixed grid of 2^-80 in two signed 64-bit limbs; integers add exactly in any
order, so any two orders give the same bits. The cut is at most 2^-81 per term, far below what a
float32 delta can say; a sum that could reach 2^38 is refused rather than wrapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from fedfm.core.errors import MessageError
from fedfm.core.leaves import Leaf, Reduce, numbers, payload, spec_of
from fedfm.core.messages import ClientId
from fedfm.core.tree import Tree

GRID = 80
LIMIT = 2.0**38
_HIGH_GRID = 24
_HIGH = 2.0**_HIGH_GRID
_LOW = 2.0**GRID
_CARRY_EVERY = 64
_CHUNK = 1 << 16  # keeps the temporaries of a large vector in cache


class ExactSum:
    """``sum_k weight_k * x_k`` over vectors of one size, exact on its grid; memory is two such vectors of int64.

    Example:
        >>> total = ExactSum(2)
        >>> total.add(torch.tensor([1.0, 0.25]), 3.0)
        >>> total.value().tolist()
        [3.0, 0.75]
    """

    def __init__(self, size: int) -> None:
        self._high = torch.zeros(size, dtype=torch.int64)
        self._low = torch.zeros(size, dtype=torch.int64)
        self._since_carry = 0
        self._bound = 0.0

    @staticmethod
    def of_integers(limb_d: torch.Tensor, grid: int, bound: float) -> ExactSum:
        """The sum whose value is ``limb_d * 2^-grid``, as a secure ring gives it: with a bound known beforehand one limb is enough.

        Args:
            limb_d: int64 ``(size,)``.
            grid: From 24 to 80.
            bound: No value is larger in magnitude.

        Raises:
            MessageError: if the bound is beyond what a sum can hold.
        """
        assert _HIGH_GRID <= grid <= GRID and limb_d.dtype == torch.int64, (grid, limb_d.dtype)
        total = ExactSum(limb_d.numel())
        total._reserve(bound)
        shift = grid - _HIGH_GRID
        total._high = limb_d >> shift
        total._low = (limb_d - (total._high << shift)) << (GRID - grid)
        return total

    def add(self, x_d: torch.Tensor, weight: float = 1.0) -> None:
        """Adds ``weight * x_d``.

        Raises:
            MessageError: if a term is not finite, or with it the sum could reach 2^38; the sum is then what it was before.
        """
        x_d = x_d.detach().cpu()
        self._reserve(reach(x_d) * abs(weight))
        for x, high, low in zip(*(torch.split(v, _CHUNK) for v in (x_d, self._high, self._low)), strict=True):
            term = x.double() * weight
            cut = (term * _HIGH).round_()
            high += cut.to(torch.int64)
            low += term.sub_(cut.div_(_HIGH)).mul_(_LOW).round_().to(torch.int64)
        self._count()

    def merge(self, other: ExactSum) -> None:
        """Adds another sum.

        Raises:
            MessageError: if together they could reach 2^38; the sum is then what it was before.
        """
        other._carry()
        self._reserve(other._bound)
        self._high += other._high
        self._low += other._low
        self._count()

    def value(self) -> torch.Tensor:
        """The sum, float64 ``(size,)``."""
        self._carry()
        return self._high.double() / _HIGH + self._low.double() / _LOW

    def _reserve(self, amount: float) -> None:
        bound = self._bound + amount
        # NaN fails this comparison too.
        if not bound < LIMIT:
            raise MessageError("A weighted update holds a value that is not finite or too large; sums of 2^38 and more are refused.")
        self._bound = bound

    def _count(self) -> None:
        self._since_carry += 1
        if self._since_carry == _CARRY_EVERY:
            self._carry()

    def _carry(self) -> None:
        # The low limb's unit is 2^-80 and the high limb's 2^-24: 2^56 of the one make one of the other.
        carry = self._low >> (GRID - _HIGH_GRID)
        self._high += carry
        self._low -= carry << (GRID - _HIGH_GRID)
        self._since_carry = 0


def reach(x_d: torch.Tensor) -> float:
    """The largest magnitude; 0 for an empty vector, NaN if a value is NaN."""
    return max(abs(end.item()) for end in x_d.aminmax()) if x_d.numel() else 0.0


class Partial:
    """The sum of some clients' answers: the integers of ``sum w x``, of every leaf that adds up.

    Leaves that reduce by ``mean`` are multiplied by their client's weight, those that reduce by ``sum`` are not. The plain channel makes one, a
    secure ring makes one, and whoever holds several adds them, in any order, with the same bits.

    Args:
        leaves: What each answer holds; ``each`` leaves have no part in a sum.
        uniform: Whether every client counts as one, whatever its weight.

    Attributes:
        clients: The clients whose answers it holds.
        by_client: The numbers of each client, where the channel shows them.
        tickets: What each client remembers from its answer.

    Example:
        >>> total = Partial((Leaf("w", (1,)),), uniform=True)
        >>> for client, value in (("a", 1.0), ("b", 2.0)):
        ...     total.add(client, {"w": torch.tensor([value])}, {}, weight=5.0)
        >>> total.mean()["w"].tolist(), total.weight
        ([1.5], 2.0)
    """

    def __init__(self, leaves: Sequence[Leaf], uniform: bool = False) -> None:
        self.leaves, self.uniform = tuple(leaves), uniform
        self.clients: list[ClientId] = []
        self.by_client: dict[ClientId, Mapping[str, float]] = {}
        self.tickets: dict[ClientId, int] = {}
        self._weight = 0
        # Integers; NaN where a ring's sum is not known.
        self._numbers: dict[str, float] = {leaf.name: 0 for leaf in numbers(leaves) if leaf.reduce != "each"}
        self._parts = {reduce: tensors for reduce in ("mean", "sum") if (tensors := _of(leaves, reduce))}
        self._sums = {reduce: ExactSum(sum(leaf.size for leaf in tensors)) for reduce, tensors in self._parts.items()}

    @staticmethod
    def of_ring(
        leaves: Sequence[Leaf],
        ring_d: torch.Tensor,
        grid: int,
        bound: float,
        clients: Iterable[ClientId],
        uniform: bool = False,
        unknown: Sequence[str] = (),
    ) -> Partial:
        """The sum that a ring of integers holds.

        Args:
            ring_d: int64; the ``mean`` tensors in their order, the ``sum`` tensors, the numbers, and last the weight; unit ``2^-grid``.
            bound: No sum is larger in magnitude.
            clients: The clients whose answers it holds.
            unknown: Numbers that a client did not know; their sums are NaN.
        """
        total = Partial(leaves, uniform)
        total.clients = list(clients)
        sizes = [sum(leaf.size for leaf in tensors) for tensors in total._parts.values()]
        *parts, rest = torch.split(ring_d, [*sizes, len(total._numbers) + 1])
        total._sums = {reduce: ExactSum.of_integers(part, grid, bound) for reduce, part in zip(total._parts, parts, strict=True)}
        *values, weight = (value << (GRID - grid) for value in rest.tolist())
        total._numbers = dict(zip(total._numbers, values, strict=True))
        total._numbers.update({name: math.nan for name in unknown if name in total._numbers})
        total._weight = len(total.clients) << GRID if uniform else weight
        return total

    @property
    def num_clients(self) -> int:
        """How many clients' answers it holds."""
        return len(self.clients)

    @property
    def weight(self) -> float:
        """The sum of the weights; the number of clients where all count alike."""
        return self._weight / (1 << GRID)

    def add(self, client: ClientId, tensors: Tree, numbers: Mapping[str, float], weight: float) -> None:
        """Adds one client's answer; a number that its owner withholds adds nothing.

        Raises:
            MessageError: if a value is not finite, or the sum could become too large; the sum is then what it was before.
        """
        weight = 1.0 if self.uniform else weight
        spec = {reduce: spec_of(part) for reduce, part in self._parts.items()}
        vectors = {reduce: one.flatten(tensors, _wide(one.dtypes)) for reduce, one in spec.items()}
        if not math.isfinite(weight) or not all(math.isfinite(numbers.get(name, 0.0)) for name in self._numbers):
            raise MessageError("An answer holds a number that is not finite.")
        for reduce, x_d in vectors.items():
            require_summable(x_d, weight if reduce == "mean" else 1.0)
        for reduce, x_d in vectors.items():
            self._sums[reduce].add(x_d, weight if reduce == "mean" else 1.0)
        factors = {leaf.name: weight if leaf.reduce == "mean" else 1.0 for leaf in self.leaves}
        for name in self._numbers:
            self._numbers[name] += _integer(numbers.get(name, 0.0) * factors[name])
        self._weight += _integer(weight)
        self.clients.append(client)
        self.by_client[client] = numbers

    def merge(self, other: Partial) -> None:
        """Adds another sum of the same leaves.

        Raises:
            MessageError: if it is a sum of something else, or together they could become too large.
        """
        if (self.leaves, self.uniform) != (other.leaves, other.uniform):
            raise MessageError("Two sums of different leaves cannot be added.")
        for reduce, total in self._sums.items():
            total.merge(other._sums[reduce])
        for name in self._numbers:
            self._numbers[name] += other._numbers[name]
        self._weight += other._weight
        self.clients += other.clients
        self.by_client |= other.by_client
        self.tickets |= other.tickets

    def only_numbers(self) -> Partial:
        """The same sum without its tensors."""
        small = Partial([leaf for leaf in numbers(self.leaves) if not leaf.nan], self.uniform)
        small.clients, small.by_client, small.tickets = list(self.clients), self.by_client, self.tickets
        small._weight, small._numbers = self._weight, {name: self._numbers[name] for name in small._numbers}
        return small

    def mean(self) -> dict[str, torch.Tensor]:
        """The aggregate of the tensors, float32 in the leaves' order: the weighted mean or the sum. Zeros where there is no client."""
        return self._tensors(self.weight, torch.float32)

    def totals(self) -> dict[str, torch.Tensor]:
        """The sums themselves, float64, tensors and numbers."""
        return {**self._tensors(1.0, torch.float64), **{name: _scalar(value) for name, value in self._numbers.items()}}

    def mean_numbers(self) -> dict[str, float]:
        """The aggregate of the numbers: the weighted mean or the sum. Empty where there is no client."""
        if not self._weight:
            return {}
        rule = {leaf.name: leaf.reduce for leaf in self.leaves}
        return {name: value / (self._weight if rule[name] == "mean" else 1 << GRID) for name, value in self._numbers.items()}

    def _tensors(self, weight: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        flat: dict[str, torch.Tensor] = {}
        for reduce, leaves in self._parts.items():
            x_d = self._sums[reduce].value()
            if reduce == "mean" and self.clients:
                x_d = x_d / weight
            parts = torch.split(x_d, [leaf.size for leaf in leaves])
            # A leaf in float64 counts beyond what float32 can.
            wide = (torch.float64 if leaf.dtype == torch.float64 else dtype for leaf in leaves)
            flat.update({leaf.name: part.to(to).view(leaf.shape) for leaf, part, to in zip(leaves, parts, wide, strict=True)})
        return {leaf.name: flat[leaf.name] for leaf in self.leaves if leaf.name in flat}


def require_summable(x_d: torch.Tensor, weight: float) -> None:
    """Refuses a term so large that, with a few like it, no sum could hold it.

    Raises:
        MessageError: if a value times the weight reaches 1/256 of what an exact sum can hold.
    """
    largest, bound = reach(x_d), LIMIT / 256
    if not largest * abs(weight) < bound:
        raise MessageError(f"Its update reaches {largest:.3g} with weight {weight:g}; a sum takes products below {bound:.3g}.")


def _of(leaves: Sequence[Leaf], reduce: Reduce | str) -> list[Leaf]:
    return [leaf for leaf in payload(leaves) if leaf.reduce == reduce]


def _wide(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A type that holds all of them."""
    return torch.float32 if all(dtype in (torch.float32, torch.bfloat16, torch.float16) for dtype in dtypes) else torch.float64


def _integer(value: float) -> int:
    # A float is an integer times a power of two, so that only values below 2^-27 are rounded here.
    return round(math.ldexp(value, GRID))


def _scalar(integer: float) -> torch.Tensor:
    return torch.tensor(integer / (1 << GRID), dtype=torch.float64)

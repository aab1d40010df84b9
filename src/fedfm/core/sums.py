"""A sum that does not depend on the order in which its terms arrive.

Each term is cut onto a fixed grid; integers add exactly in any order, so any two orders give the same bits. The grid is part of the numbers and follows
from the plan alone. How the integers are held is not: one signed 64-bit limb for each value while ``sum_k |weight_k| max|x_k|`` stays below 2^62 units, and a
second one from then on. The value of a sum depends on its integers, not on its limbs.

=============================  =====  ====================================================  ============================
what                           grid   a cut, at most                                        one limb while the sum is below
=============================  =====  ====================================================  ============================
float32, bfloat16, float16     2^-44  2^-45: a float32 from 2^-21 on keeps all its bits     2^18
the same, times a weight       2^-40  2^-41: so divided by the weight, 16 examples or more  2^22
all else                       2^-80  2^-81                                                 2^-18
=============================  =====  ====================================================  ============================

A sum that could reach 2^38 is refused rather than wrapped. Where the values, the weights and the cohort have declared bounds whose product is below the last
column, the memory of a sum is one limb whatever clients send.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedfm.core.errors import MessageError
from fedfm.core.leaves import Leaf, Reduce, numbers, payload
from fedfm.core.messages import ClientId
from fedfm.core.tree import PIECE, LazyTree, Tree, ends, pieces

GRID, FLOAT_GRID, WEIGHTED_GRID = 80, 44, 40
LIMIT = 2.0**38
# The low limb of two holds this many bits, and the high limb the others.
_SPLIT = 56
_HALF, _MASK = 1 << (_SPLIT - 1), (1 << _SPLIT) - 1
_LOWEST_GRID = 24
# Half of what a limb can hold: the other half is for what the cuts add.
_ONE_LIMB = 2.0**62
_CARRY_EVERY = 64
_REDUCES: tuple[Reduce, ...] = ("mean", "sum")
# Values of a part of a large sum, which is let go by itself.
_PART = 1 << 20


class ExactSum:
    """``sum_k weight_k * x_k`` over vectors of one size, exact on its grid; memory is one or two such vectors of int64.

    Args:
        size: Of the vectors.
        grid: A unit is ``2^-grid``; from 24 to 80.

    Attributes:
        bound: No value is larger in magnitude.

    Example:
        >>> total = ExactSum(2)
        >>> total.add(torch.tensor([1.0, 0.25]), 3.0)
        >>> total.value().tolist()
        [3.0, 0.75]
    """

    def __init__(self, size: int, grid: int = GRID) -> None:
        assert _LOWEST_GRID <= grid <= GRID, grid
        self.grid = grid
        self._low = torch.zeros(size, dtype=torch.int64)
        self._high: torch.Tensor | None = None
        self._since_carry = 0
        self.bound = 0.0

    @staticmethod
    def of_integers(limb_d: torch.Tensor, grid: int, bound: float) -> ExactSum:
        """The sum whose value is ``limb_d * 2^-grid``, as a secure ring gives it.

        Args:
            limb_d: int64 ``(size,)``; it becomes the sum's own.
            grid: From 24 to 80.
            bound: No value is larger in magnitude.

        Raises:
            MessageError: if the bound is beyond what a sum can hold.
        """
        assert limb_d.dtype == torch.int64, limb_d.dtype
        total = ExactSum(0, grid)
        total._low = limb_d
        total._reserve(bound)
        return total

    @property
    def limbs(self) -> int:
        """Vectors of int64 that it holds: 1 or 2."""
        return 1 if self._high is None else 2

    def add(self, x_d: torch.Tensor, weight: float = 1.0) -> None:
        """Adds ``weight * x_d``.

        Raises:
            MessageError: if a term is not finite, or with it the sum could reach 2^38; the sum is then what it was before.
        """
        self.add_pieces([x_d], reach(x_d), weight)

    def add_pieces(self, x_pieces: Iterable[torch.Tensor], largest: float, weight: float = 1.0) -> None:
        """Adds ``weight * x``, of which one piece is in memory at a time.

        Args:
            x_pieces: The values of ``x`` in their order.
            largest: The largest magnitude among them.

        Raises:
            MessageError: as :meth:`add`.
        """
        self._reserve(largest * abs(weight))
        start = 0
        for piece in x_pieces:
            for x_n in torch.split(piece.detach().cpu().reshape(-1), PIECE):
                self._put(start, x_n.double() * weight)
                start += x_n.numel()
        assert start == self._low.numel(), (start, self._low.numel())
        self._count()

    def merge(self, other: ExactSum) -> None:
        """Adds another sum; the finer of the two grids holds from now on, and nothing is cut.

        Raises:
            MessageError: if together they could reach 2^38; the sum is then what it was before.
        """
        self.require_room(other.bound)
        if other.grid < self.grid:
            other = copy.deepcopy(other)
            other._refine(self.grid)
        self._refine(other.grid)
        self._reserve(other.bound)
        for start, stop in _steps(self._low.numel()):
            high, low = other._limbs(start, stop)
            if self._high is None:
                self._low[start:stop] += (high << _SPLIT) + low
            else:
                self._high[start:stop] += high
                self._low[start:stop] += low
        self._count()

    def value(self) -> torch.Tensor:
        """The sum, float64 ``(size,)``."""
        return self.quotient(0, self._low.numel())

    def quotient(self, start: int, stop: int, divisor: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The sum's values from ``start`` to ``stop``, divided in float64."""
        out = torch.empty(stop - start, dtype=dtype)
        for begin, end in _steps(stop - start):
            high, low = self._limbs(start + begin, start + end)
            out[begin:end] = (high.double() * 2.0 ** (_SPLIT - self.grid) + low.double() * 2.0**-self.grid) / divisor
        return out

    def require_room(self, amount: float) -> None:
        """Refuses a term of which the largest product is ``amount``, where the sum could not hold it.

        Raises:
            MessageError: if it is not finite, or with it the sum could reach 2^38.
        """
        # NaN fails this comparison too.
        if not self.bound + amount < LIMIT:
            raise MessageError("A weighted update holds a value that is not finite or too large; sums of 2^38 and more are refused.")

    def _reserve(self, amount: float) -> None:
        self.require_room(amount)
        self.bound += amount
        self._widen()

    def _widen(self) -> None:
        """Takes a second limb where one is not enough any more."""
        if self._high is None and self.bound >= _ONE_LIMB * 2.0**-self.grid:
            self._high = torch.zeros_like(self._low)
            self._carry()

    def _put(self, start: int, term_n: torch.Tensor) -> None:
        """Adds terms from ``start`` on; float64, and may be changed. Whether there are one or two limbs, the same integers are added."""
        stop = start + term_n.numel()
        if self._high is not None:
            cut = (term_n * 2.0 ** (self.grid - _SPLIT)).round_()
            self._high[start:stop] += cut.to(torch.int64)
            term_n = term_n.sub_(cut.mul_(2.0 ** (_SPLIT - self.grid)))
        self._low[start:stop] += term_n.mul_(2.0**self.grid).round_().to(torch.int64)

    def _limbs(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The integers from ``start`` to ``stop`` as ``high * 2^56 + low`` with ``-2^55 <= low < 2^55``, which is the same however they are held."""
        # With a low limb that is never negative, a small negative value would be the difference of two large ones.
        low = self._low[start:stop]
        high = (low + _HALF) >> _SPLIT
        low = low - (high << _SPLIT)
        return high if self._high is None else high.add_(self._high[start:stop]), low

    def _refine(self, grid: int) -> None:
        """Goes over to a finer grid. The integers stay what they are; their unit is smaller."""
        shift, self.grid = grid - self.grid, grid
        if not shift:
            return
        if self._high is None and self.bound < _ONE_LIMB * 2.0**-grid:
            self._low <<= shift
            return
        if self._high is None:
            self._high = torch.zeros_like(self._low)
        for start, stop in _steps(self._low.numel()):
            high, low = self._limbs(start, stop)
            self._high[start:stop] = (high << shift) + (low >> (_SPLIT - shift))
            self._low[start:stop] = (low << shift) & _MASK

    def _count(self) -> None:
        self._since_carry += 1
        if self._since_carry >= _CARRY_EVERY:
            self._carry()

    def _carry(self) -> None:
        """Moves what the low limb has too much of into the high one."""
        self._since_carry = 0
        if self._high is not None:
            for start, stop in _steps(self._low.numel()):
                self._high[start:stop], self._low[start:stop] = self._limbs(start, stop)


def _steps(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PIECE, size)) for start in range(0, size, PIECE))


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
        self._parts = [
            _Part(reduce, part, ExactSum(sum(leaf.size for leaf in part), _grid(tensors, reduce == "mean" and not uniform)))
            for reduce in _REDUCES
            if (tensors := [leaf for leaf in payload(leaves) if leaf.reduce == reduce])
            for part in _split(tensors)
        ]

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
            ring_d: int64; the ``mean`` tensors in their order, the ``sum`` tensors, the numbers, and last the weight; unit ``2^-grid``. It becomes
                the sum's own.
            bound: No sum is larger in magnitude.
            clients: The clients whose answers it holds.
            unknown: Numbers that a client did not know; their sums are NaN.
        """
        total = Partial(leaves, uniform)
        total.clients = list(clients)
        *limbs, rest = torch.split(ring_d, [*(part.size for part in total._parts), len(total._numbers) + 1])
        for part, limb_d in zip(total._parts, limbs, strict=True):
            part.total = ExactSum.of_integers(limb_d, grid, bound)
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
        """Adds one client's answer; a number that its owner withholds adds nothing. Of tensors that lie elsewhere one piece is in memory at a time.

        Raises:
            MessageError: if a value is not finite, or the sum could become too large; the sum is then what it was before.
            RunError: if tensors that lie elsewhere cannot be read; the sum is of no use then.
        """
        weight = 1.0 if self.uniform else weight
        if not math.isfinite(weight) or not all(math.isfinite(numbers.get(name, 0.0)) for name in self._numbers):
            raise MessageError("An answer holds a number that is not finite.")
        terms = [(part, _largest(tensors, part.leaves), weight if part.reduce == "mean" else 1.0) for part in self._parts]
        for part, largest, factor in terms:
            require_summable(largest, factor)
            part.total.require_room(largest * abs(factor))
        for part, largest, factor in terms:
            part.total.add_pieces(_joined(tensors, part.leaves), largest, factor)
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
        for part, theirs in zip(self._parts, other._parts, strict=True):
            part.total.require_room(theirs.total.bound)
        for part, theirs in zip(self._parts, other._parts, strict=True):
            part.total.merge(theirs.total)
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

    def take_mean(self) -> dict[str, torch.Tensor]:
        """:meth:`mean`, and the sum is used up: each part of it is let go as soon as its mean is made, so that a large one is not held beside it."""
        return self._tensors(self.weight, torch.float32, is_last=True)

    def totals(self) -> dict[str, torch.Tensor]:
        """The sums themselves, float64, tensors and numbers."""
        return {**self._tensors(1.0, torch.float64), **{name: _scalar(value) for name, value in self._numbers.items()}}

    def mean_numbers(self) -> dict[str, float]:
        """The aggregate of the numbers: the weighted mean or the sum. Empty where there is no client."""
        if not self._weight:
            return {}
        rule = {leaf.name: leaf.reduce for leaf in self.leaves}
        return {name: value / (self._weight if rule[name] == "mean" else 1 << GRID) for name, value in self._numbers.items()}

    def _tensors(self, weight: float, dtype: torch.dtype, is_last: bool = False) -> dict[str, torch.Tensor]:
        values: dict[str, torch.Tensor] = {}
        for part in self._parts:
            divisor, start = weight if part.reduce == "mean" and self.clients else 1.0, 0
            for leaf in part.leaves:
                # A leaf in float64 counts beyond what float32 can.
                wide = torch.float64 if leaf.dtype == torch.float64 else dtype
                values[leaf.name] = part.total.quotient(start, start + leaf.size, divisor, wide).view(leaf.shape)
                start += leaf.size
            if is_last:
                del part.total
        return {leaf.name: values[leaf.name] for leaf in self.leaves if leaf.name in values}


@dataclass
class _Part:
    """Some leaves that reduce alike, one after another, and their sum."""

    reduce: Reduce
    leaves: Sequence[Leaf]
    total: ExactSum

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(leaf.size for leaf in self.leaves)


def _split(leaves: Sequence[Leaf]) -> Iterator[list[Leaf]]:
    """The leaves in their order, in groups of at most :data:`_PART` values. A leaf is not divided."""
    group: list[Leaf] = []
    size = 0
    for leaf in leaves:
        if group and size + leaf.size > _PART:
            yield group
            group, size = [], 0
        group.append(leaf)
        size += leaf.size
    yield group


def require_summable(largest: float, weight: float) -> None:
    """Refuses a term so large that, with a few like it, no sum could hold it.

    Args:
        largest: The largest magnitude of its values.

    Raises:
        MessageError: if that times the weight reaches 1/256 of what an exact sum can hold.
    """
    bound = LIMIT / 256
    if not largest * abs(weight) < bound:
        raise MessageError(f"Its update reaches {largest:.3g} with weight {weight:g}; a sum takes products below {bound:.3g}.")


def _grid(leaves: Iterable[Leaf], is_weighted: bool) -> int:
    """The grid of a sum of these leaves: a property of the plan, so that every engine and every resumed run has the same."""
    if all(leaf.dtype in (torch.float32, torch.bfloat16, torch.float16) for leaf in leaves):
        return WEIGHTED_GRID if is_weighted else FLOAT_GRID
    return GRID


def _largest(tensors: Tree, leaves: Sequence[Leaf]) -> float:
    """The largest magnitude among the values of these leaves; NaN if one is NaN."""
    if not isinstance(tensors, LazyTree):
        reaches = [reach(piece) for piece in _joined(tensors, leaves)]
    else:
        reaches = [abs(end) for leaf in leaves for end in ends(tensors, leaf.name)]
    return math.nan if any(map(math.isnan, reaches)) else max(reaches, default=0.0)


def _joined(tensors: Tree, leaves: Sequence[Leaf]) -> Iterator[torch.Tensor]:
    """The values of these leaves, one after another, float64 where small ones are put together: a model has many small leaves, and each step has its price."""
    held: list[torch.Tensor] = []
    size = 0
    for leaf in leaves:
        for piece in pieces(tensors, leaf.name):
            if held and size + piece.numel() > PIECE:
                yield held[0] if len(held) == 1 else torch.cat(held)
                held, size = [], 0
            held.append(piece.double())
            size += piece.numel()
    if held:
        yield held[0] if len(held) == 1 else torch.cat(held)


def _integer(value: float) -> int:
    # A float is an integer times a power of two, so that only values below 2^-27 are rounded here.
    return round(math.ldexp(value, GRID))


def _scalar(integer: float) -> torch.Tensor:
    return torch.tensor(integer / (1 << GRID), dtype=torch.float64)

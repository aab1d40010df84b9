"""An answer as integers of a ring, and a sum of them as an answer.

A *narrow* value, one of a tensor in float32 or shorter that is no count, is a 32-bit integer ``round(w x 2^u)``, rounded up or down by chance so that it is
right on average. A *wide* value, a number, a count or a tensor in float64, is a 64-bit integer of 2^-24 units, rounded to the nearest. ``u`` is the
largest with which ``n`` clients cannot overflow 32 bits::

    n (reach W 2^u + 1) < 2^31        |x| <= reach, w <= W;   W = 1 where clients count alike, and for leaves that are not weighted

A value that is a multiple of the unit stays as it is, whatever the chance. So a leaf with a grid of its own (:attr:`fedfm.core.leaves.Leaf.grid`) comes out exactly, and
a ring with a coarser unit refuses it.

A value beyond ``reach`` is cut to it, and a weight beyond ``W`` counts as ``W``; how many were cut is itself a wide value, so that a run can tell.

With ``n = 1`` and weights of 1 a value comes back to 2^-24. Rounding is no secret, and is drawn from the run's key: masks cancel, so a resumed run
ends with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from fedfm.core.errors import MessageError
from fedfm.core.leaves import Leaf, numbers, payload
from fedfm.core.tree import Tree
from fedfm.secagg.masks import CHUNK, U32, U64, Stream

GRID = 24
"""A sum's integers count units of ``2^-24``."""
LIMIT = 2.0**37
"""No sum of wide values is larger in magnitude."""
F64 = npt.NDArray[np.float64]
_SHORT = (torch.float32, torch.bfloat16, torch.float16)
# Added to a float64 below 2^51, it leaves the nearest integer in the low bits.
_MAGIC = 1.5 * 2.0**52
# Coins end 2^-21 before a half: a float64 below 2^31 has steps of 2^-22, so that no coin moves an integer.
_COIN = 2.0**-32 * (1 - 2.0**-20)
_CUT, _CAPPED, _UNKNOWN = "cut", "capped", "unknown/"


@dataclass(frozen=True)
class Quantiser:
    """How an answer becomes integers; all clients of a sum and the server have the same one.

    Args:
        leaves: What an answer holds.
        n: Most clients in the sum.
        reach: No narrow value is larger in magnitude.
        max_weight: No weight is larger.
        uniform: Whether every client counts as one.

    Raises:
        MessageError: if the values do not fit, or a leaf's grid is finer than the unit.
    """

    leaves: tuple[Leaf, ...]
    n: int
    reach: float
    max_weight: float
    uniform: bool = False
    narrow: tuple[Leaf, ...] = field(init=False, compare=False)
    wide: tuple[Leaf, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        tensors = [leaf for reduce in ("mean", "sum") for leaf in payload(self.leaves) if leaf.reduce == reduce]
        object.__setattr__(self, "narrow", tuple(leaf for leaf in tensors if _is_narrow(leaf)))
        numbers_ = [leaf for leaf in numbers(self.leaves) if leaf.reduce != "each"]
        object.__setattr__(self, "wide", (*(leaf for leaf in tensors if not _is_narrow(leaf)), *numbers_))
        for leaf in tensors:
            unit = self.unit(leaf) if _is_narrow(leaf) else GRID
            if leaf.grid:
                self._require_on_grid(leaf, unit)

    def _require_on_grid(self, leaf: Leaf, unit: int) -> None:
        needed = -math.floor(math.log2(leaf.grid))
        if leaf.dtype in (torch.bfloat16, torch.float16):
            raise MessageError(f"{leaf.name!r} is {str(leaf.dtype)[6:]}, which is too short for values on a grid. Train in float32.")
        if self.most(leaf) != 1:
            raise MessageError(
                f"{leaf.name!r} holds multiples of 2^-{needed}, which weights would take off their grid. Let all clients count alike (Mean: {{weights: uniform}})."
            )
        if needed > unit:
            largest = (2.0**31 / self.n - 1) / 2.0**needed
            # Three digits of this are not above what fits.
            lower = "Put" if needed > GRID else f"Lower reach to {0.99 * largest:.3g} or less, ask fewer clients, or put"
            raise MessageError(
                f"{leaf.name!r} holds multiples of 2^-{needed}, and a secure sum of {self.n} clients with values up to {self.reach:g} is rounded to multiples of "
                f"2^-{unit}. {lower} the values on a coarser grid (a larger clip)."
            )

    @property
    def digest(self) -> str:
        """Names it: differs where a leaf, the ring or a bound does."""
        listed = [
            [leaf.name, list(leaf.shape), str(leaf.dtype), leaf.group, leaf.bound, leaf.reduce, leaf.nan, leaf.grid] for leaf in self.leaves
        ]
        text = json.dumps([listed, self.n, self.reach, self.max_weight, self.uniform])
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"fedfm quantiser").hexdigest()

    @property
    def num_narrow(self) -> int:
        """Values of 32 bits."""
        return sum(leaf.size for leaf in self.narrow)

    @property
    def num_wide(self) -> int:
        """Values of 64 bits: the wide leaves, the weight, who knows each that may be unknown, and how many values and weights were cut."""
        return sum(leaf.size for leaf in self.wide) + 1 + len(self._unknown) + 2

    @property
    def _unknown(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.wide if leaf.nan)

    def most(self, leaf: Leaf) -> float:
        """The largest weight that multiplies this leaf."""
        return self.max_weight if leaf.reduce == "mean" and not self.uniform else 1.0

    def unit(self, leaf: Leaf) -> int:
        """``u`` of a narrow leaf: its integers count ``2^-u``.

        Raises:
            MessageError: if not even a unit of 2^20 fits.
        """
        u = math.floor(math.log2((2.0**31 / self.n - 1) / (min(self.reach, leaf.bound) * self.most(leaf))))
        if u < -20:
            raise MessageError(
                f"{self.n} values up to {self.reach:g} with weights up to {self.max_weight:g} do not fit into 32 bits. Lower reach or max_weight."
            )
        return min(u, GRID)

    # --- a client's answer -------------------------------------------------------------------------------------------------

    def encode(self, tensors: Tree, values: Mapping[str, float], weight: float, seed: bytes) -> tuple[U32, U64]:
        """An answer's narrow and wide integers.

        Args:
            tensors: The payload.
            values: The numbers, the weight among them; one that its owner withholds is missing, and adds nothing.
            weight: How much it counts.
            seed: 32 bytes that the rounding is drawn from.

        Raises:
            MessageError: if a value is not finite or too large, or a tensor has another shape than was agreed.
        """
        counted = 1.0 if self.uniform else min(weight, self.max_weight)
        if not (math.isfinite(weight) and weight > 0):
            raise MessageError(f"its weight is {weight}; it must be a finite number above 0.")
        narrow, coins = np.empty(self.num_narrow, dtype="<u4"), Stream(seed)
        first = num_cut = 0
        for leaf in self.narrow:
            x_d = _flat(tensors, leaf)
            factor = counted if leaf.reduce == "mean" else 1.0
            num_cut += _rounded(x_d, min(self.reach, leaf.bound), factor, self.unit(leaf), coins, narrow[first : first + leaf.size])
            first += leaf.size
        return narrow, self._wide_integers(tensors, values, counted, num_cut, weight > counted and not self.uniform)

    def _wide_integers(self, tensors: Tree, values: Mapping[str, float], counted: float, num_cut: int, is_capped: bool) -> U64:
        parts, unknown = list[F64](), list[float]()
        for leaf in self.wide:
            x_d = np.array([values.get(leaf.name, 0.0)]) if leaf.is_number else _flat(tensors, leaf).astype(np.float64)
            if leaf.nan:
                unknown.append(float(np.isnan(x_d).any()))
                x_d = np.nan_to_num(x_d, nan=0.0, posinf=math.inf, neginf=-math.inf)
            parts.append(x_d * (counted if leaf.reduce == "mean" else 1.0))
            largest = float(np.abs(parts[-1]).max(initial=0.0))
            # NaN fails this comparison too.
            if not largest < LIMIT / self.n:
                raise MessageError(
                    f"its answer holds {leaf.name!r} up to {largest:.4g} with its weight; a secure sum of {self.n} clients takes finite values below {LIMIT / self.n:.4g}."
                )
        parts.append(np.array([counted, *unknown, num_cut, is_capped], dtype=np.float64))
        return np.rint(np.concatenate(parts) * 2.0**GRID).astype(np.int64).view(np.uint64)

    # --- a sum -------------------------------------------------------------------------------------------------------------

    def decode(self, narrow: U32, wide: U64) -> Opened:
        """A sum's integers as :meth:`fedfm.core.sums.Partial.of_ring` takes them.

        Raises:
            MessageError: if no honest clients could have made it.
        """
        signed, values = narrow.view(np.int32), wide.view(np.int64)
        pieces, first = dict[str, npt.NDArray[np.int64]](), 0
        for leaf in self.narrow:
            # A shift of a sum that fits by at most 24 + 20 bits stays within 64.
            pieces[leaf.name] = signed[first : first + leaf.size].astype(np.int64) << (GRID - self.unit(leaf))
            first += leaf.size
        first = 0
        for leaf in self.wide:
            pieces[leaf.name] = values[first : first + leaf.size]
            first += leaf.size
        weight, *more = (int(value) for value in values[first:])
        *unknown, num_cut, num_capped = (value >> GRID for value in more)
        if not 0 <= weight <= self.n * ((1.0 if self.uniform else self.max_weight) * 2**GRID + 1) or min(more) < 0:
            raise MessageError("the sum holds a weight or a count that no honest clients could have made.")
        tensors = [leaf for reduce in ("mean", "sum") for leaf in payload(self.leaves) if leaf.reduce == reduce]
        single = [leaf for leaf in numbers(self.leaves) if leaf.reduce != "each"]
        ring = np.concatenate([*(pieces[leaf.name] for leaf in (*tensors, *single)), np.array([weight], dtype=np.int64)])
        bound = float(max(-int(ring.min()), int(ring.max()), 1)) / 2**GRID
        names = tuple(leaf.name for leaf, count in zip(self._unknown, unknown, strict=True) if count)
        return Opened(torch.from_numpy(ring), bound, names, num_cut, num_capped)


@dataclass(frozen=True)
class Opened:
    """A sum.

    Args:
        ring_d: int64, in units of ``2^-24``: the ``mean`` tensors, the ``sum`` tensors, the numbers, and last the weight.
        bound: No value is larger in magnitude.
        unknown: Leaves of which a client did not know its value.
        num_cut: Values that were beyond the reach.
        num_capped: Clients whose weight was beyond the largest.
    """

    ring_d: torch.Tensor
    bound: float
    unknown: tuple[str, ...]
    num_cut: int
    num_capped: int


def _is_narrow(leaf: Leaf) -> bool:
    return leaf.group != "told" and leaf.dtype in _SHORT


def _flat(tensors: Tree, leaf: Leaf) -> npt.NDArray[np.float32]:
    """A leaf's values as one row, checked against what was agreed."""
    tensor = tensors.get(leaf.name)
    if tensor is None or tuple(tensor.shape) != leaf.shape:
        shape = "missing" if tensor is None else list(tensor.shape)
        raise MessageError(f"its answer's {leaf.name!r} is {shape}; the sum takes {list(leaf.shape)} of everybody.")
    flat = tensor.detach().cpu().reshape(-1)
    values: npt.NDArray[np.float32] = (flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat).contiguous().numpy()
    return values


def _rounded(x_d: npt.NDArray[np.float32], reach: float, factor: float, unit: int, coins: Stream, out: U32) -> int:
    """Writes ``round(factor x 2^unit)`` into ``out``; how many values were beyond the reach.

    Raises:
        MessageError: if a value is not finite.
    """
    num_cut, size = 0, min(CHUNK, len(x_d))
    # No float32 lies between these two, so comparing with either is the same, and the smaller does not overflow.
    most = np.float32(reach) if float(np.float32(reach)) <= reach else np.nextafter(np.float32(reach), np.float32(0))
    buffer, term, coin = bytearray(4 * CHUNK), np.empty(size), np.empty(size)
    drawn = np.frombuffer(buffer, dtype="<i4")
    for first in range(0, len(x_d), CHUNK):
        x = x_d[first : first + CHUNK]
        n = len(x)
        low, high = float(x.min()), float(x.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise MessageError("its answer holds NaN or infinity, which no sum can carry.")
        if max(-low, high) > most:
            num_cut += int(np.count_nonzero(np.abs(x) > most))
            x = np.clip(x, -most, most)
        coins.into(buffer, 4 * n)
        # The nearest to value + coin, with a coin between -1/2 and 1/2, is the value rounded by chance.
        np.multiply(drawn[:n], _COIN, out=coin[:n])
        np.multiply(x, factor * 2.0**unit, out=term[:n], dtype=np.float64)
        np.add(term[:n], coin[:n], out=term[:n])
        np.add(term[:n], _MAGIC, out=term[:n])
        out[first : first + n] = term[:n].view("<u4")[::2]
    return num_cut

"""A sum that does not depend on the order in which its terms arrive.

Each term is cut onto a fixed grid of 2^-80 in two signed 64-bit limbs; integers add exactly in any
order, so any two orders give the same bits. The cut is at most 2^-81 per term, far below what a
float32 delta can say; a sum that could reach 2^38 is refused rather than wrapped.
"""

from __future__ import annotations

import torch

from fedfm.core.errors import MessageError

_HIGH = 2.0**24
_LOW = 2.0**80
LIMIT = 2.0**38
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
        self.count = 0

    def add(self, x_d: torch.Tensor, weight: float = 1.0) -> None:
        """Adds ``weight * x_d``.

        Raises:
            MessageError: if a term is not finite, or with it the sum could reach 2^38; the sum is then what it was before.
        """
        x_d = x_d.detach().cpu()
        bound = self._bound + (max(abs(end.item()) for end in x_d.aminmax()) * abs(weight) if x_d.numel() else 0.0)
        # NaN fails this comparison too.
        if not bound < LIMIT:
            raise MessageError("A weighted update holds a value that is not finite or too large; sums of 2^38 and more are refused.")
        self._bound = bound
        for x, high, low in zip(*(torch.split(v, _CHUNK) for v in (x_d, self._high, self._low)), strict=True):
            term = x.double() * weight
            cut = (term * _HIGH).round_()
            high += cut.to(torch.int64)
            low += term.sub_(cut.div_(_HIGH)).mul_(_LOW).round_().to(torch.int64)
        self.count += 1
        self._since_carry += 1
        if self._since_carry == _CARRY_EVERY:
            self._carry()

    def _carry(self) -> None:
        # The low limb's unit is 2^-80 and the high limb's 2^-24: 2^56 of the one make one of the other.
        carry = self._low >> 56
        self._high += carry
        self._low -= carry << 56
        self._since_carry = 0

    def value(self) -> torch.Tensor:
        """The sum, float64 ``(size,)``."""
        self._carry()
        return self._high.double() / _HIGH + self._low.double() / _LOW

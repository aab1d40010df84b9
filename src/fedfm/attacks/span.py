"""Which token embeddings lie in the span of the first attention layer's gradient.

Petrov, Dimitrov, Baader, Müller, Vechev, `DAGER: Exact Gradient Inversion for Large Language Models <https://arxiv.org/abs/2405.15586>`_, 2024: a linear
layer ``y = W x`` has the gradient ``dW = sum_t dy_t x_t'``, so the rows of ``dW`` lie in the span of the inputs ``x_t``, and an input of a text with fewer
tokens than ``W`` has columns lies in the span of the rows. The paper then puts the tokens in order, layer by layer; this is its first half, the set of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedfm.attacks.base import Base, Seen, TokenAttack, named, row_space

_DIRECTIONS = 64
_CHUNK = 1 << 22  # values of candidates' inputs that are held at once


@dataclass(frozen=True)
class Span(TokenAttack):
    """Tokens whose input of the first attention layer lies in the row span of that layer's change.

    With LoRA, ``W = W_0 + s B A``: the rows of A's change lie in the span of the inputs ``x_t``, the rows of B's change in that of ``A x_t``. In the first step
    ``B = 0``, so A does not change, and B shows at most r dimensions: with more tokens than the rank every token fits.
    Where the change fills the whole space, by noise or by many tokens, its leading directions are looked at, half of them or 64.
    """

    concerns = ("privacy",)
    question = "Which words does my text have (span of the first layer's gradient)?"

    def guess(self, seen: Seen) -> torch.Tensor | None:
        """How much of each token's input lies in the span ``(V,)``, the most over positions; the sum of it where there are several spans."""
        spans = list(_spans(seen))
        if not spans:
            return None
        share_sv = torch.full((len(spans), seen.base.size), -torch.inf, dtype=torch.float64)
        for first, x_nld in _inputs(seen.base):
            for s, (map_od, basis_or) in enumerate(spans):
                y_nlo = x_nld if map_od is None else x_nld @ map_od.T
                inside_nl = (y_nlo @ basis_or).square().sum(-1) / y_nlo.square().sum(-1).clamp(min=1e-30)
                share_sv[s, first : first + len(x_nld)] = inside_nl.amax(dim=1)
        return share_sv.sum(dim=0)


def _spans(seen: Seen) -> Iterator[tuple[torch.Tensor | None, torch.Tensor]]:
    """Each span that the change shows: what maps an input to where the span is (``None`` for the input itself), and its orthonormal basis."""
    names, turned = seen.base.first, seen.base.turned
    whole = [leaf.T if turned else leaf for name in names if (leaf := named(seen.delta, f"{name}.weight")) is not None]
    factors = [leaf for name in names if (leaf := named(seen.delta, f"{name}.lora_A.weight")) is not None]
    for rows in (whole, factors):
        basis = _basis(torch.cat(rows)) if rows else None
        if basis is not None:
            yield None, basis
    for name in names:
        change, a_rd = named(seen.delta, f"{name}.lora_B.weight"), named(seen.params, f"{name}.lora_A.weight")
        basis = None if change is None else _basis(change)
        if basis is not None:
            yield None if a_rd is None else a_rd.float(), basis


def _basis(rows_nd: torch.Tensor) -> torch.Tensor | None:
    """An orthonormal basis ``(d, r)`` of the rows' span, or of its leading part where it is the whole space; ``None`` where all rows are zero."""
    basis_dr = row_space(rows_nd)
    width, rank = basis_dr.shape
    if rank >= width - 1:
        basis_dr = basis_dr[:, : min(max(width // 2, 1), _DIRECTIONS)]
    return basis_dr.float() if rank else None


def _inputs(base: Base) -> Iterator[tuple[int, torch.Tensor]]:
    """What the first layer reads of each token, at each position where that makes a difference: the first token of a part, and ``(n, L, d)``."""
    probe = base.inputs(torch.full((1, min(2, base.longest)), base.size - 1))
    moves = not torch.allclose(probe[:, 0], probe[:, -1], rtol=1e-4, atol=1e-6)
    length = base.longest if moves else 1
    part = max(_CHUNK // (length * probe.shape[-1]), 1)
    for first in range(0, base.size, part):
        tokens = torch.arange(first, min(first + part, base.size))
        yield first, base.inputs(tokens[:, None].expand(-1, length)).float()

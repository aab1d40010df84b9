"""Which rows of an embedding changed: the tokens of the text.

Melis, Song, De Cristofaro, Shmatikov, `Exploiting Unintended Feature Leakage in Collaborative Learning <https://arxiv.org/abs/1805.04049>`_, 2019;
Gupta et al., `Recovering Private Text in Federated Learning of Language Models <https://arxiv.org/abs/2205.08514>`_, 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedfm.attacks.base import ROUNDING, Seen, TokenAttack, directions, named, outstanding, without_decay

_DIRECTIONS = 64  # the most hidden states that are looked past


@dataclass(frozen=True)
class EmbeddingRows(TokenAttack):
    """Row v of the token embedding moves only if the text has token v; row v of the output layer moves most if v is to be predicted.

    Where both layers are one, a row is the sum of both. The output's part of every row lies in the span of the text's hidden states, which are the leading
    directions of all rows; what a row has beside the leading directions is the embedding's. Where the embedding is frozen (LoRA), there is nothing to read.
    """

    concerns = ("privacy",)
    question = "Which words does my text have (rows of the embedding)?"

    def guess(self, seen: Seen) -> torch.Tensor | None:
        """How much each token's rows stand out ``(V,)``."""
        base = seen.base
        pairs = [(named(seen.delta, name), named(seen.params, name)) for name in (base.embedding, base.output)]
        evidence = [_evidence(delta, param)[: base.size] for delta, param in pairs if delta is not None and bool(delta.any())]
        return torch.stack(evidence).amax(dim=0) if evidence else None


def _evidence(delta_vd: torch.Tensor, param_vd: torch.Tensor | None) -> torch.Tensor:
    """How much each row stands out by what it has beside the r leading directions, for the r with which it stands out most ``(V,)``."""
    delta_vd = without_decay(delta_vd, param_vd)
    basis_dd, _ = directions(delta_vd)
    leading_vr = (delta_vd @ basis_dd[:, : min(len(basis_dd) // 2, _DIRECTIONS)]).square()
    # Column r: the squared length beside the first r directions.
    square_v = delta_vd.square().sum(1, keepdim=True)
    beside_vr = torch.cat([square_v, square_v - leading_vr.cumsum(1)], dim=1).clamp(min=0).sqrt()
    longest_r = beside_vr.amax(dim=0)
    return outstanding(beside_vr[:, longest_r > 10 * ROUNDING * longest_r[0]]).amax(dim=1)

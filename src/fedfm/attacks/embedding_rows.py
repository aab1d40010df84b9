"""Which rows of an embedding changed: the tokens of the text.

Melis, Song, De Cristofaro, Shmatikov, `Exploiting Unintended Feature Leakage in Collaborative Learning <https://arxiv.org/abs/1805.04049>`_, 2019;
Gupta et al., `Recovering Private Text in Federated Learning of Language Models <https://arxiv.org/abs/2205.08514>`_, 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedfm.attacks.base import Seen, TokenAttack, named, outstanding


@dataclass(frozen=True)
class EmbeddingRows(TokenAttack):
    """Row v of the token embedding moves only if the text has token v; row v of the output layer moves most if v is to be predicted.

    Where both layers are one, its rows are the sum of both. Where the embedding is frozen (LoRA), there is nothing to read.
    """

    question = "Which words does my text have (rows of the embedding)?"

    def guess(self, seen: Seen) -> torch.Tensor | None:
        """How much each token's rows stand out ``(V,)``."""
        base = seen.base
        pairs = [(named(seen.delta, name), named(seen.params, name)) for name in (base.embedding, base.output)]
        evidence = [outstanding(delta, param)[: base.size] for delta, param in pairs if delta is not None and bool(delta.any())]
        return torch.stack(evidence).amax(dim=0) if evidence else None

"""The classes of the examples, from the last layer of a classifier.

Zhao, Mopuri, Bilen, `iDLG: Improved Deep Leakage from Gradients <https://arxiv.org/abs/2001.02610>`_, 2020: the gradient of the last layer's bias is
``mean_n (p_n - y_n)``, negative for a class only if an example has it. Yin et al., `See through Gradients <https://arxiv.org/abs/2104.07586>`_, 2021, for batches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from fedfm.attacks.base import Attack, Outcome, Secret, Seen, named


@dataclass(frozen=True)
class Labels(Attack):
    """How many examples have each class. Exact for one example; for more it takes the model's own guesses before training to be even.

    Scored by the share of examples whose class is in the guessed numbers; a guess without the update takes all classes for equally frequent.
    """

    concerns = ("privacy",)
    question = "Which classes do my examples have?"

    def guess(self, seen: Seen) -> torch.Tensor | None:
        """The guessed share of each class ``(C,)``."""
        leaves = [leaf for name in seen.base.classes if (leaf := named(seen.delta, name)) is not None]
        if not leaves:
            return None
        bias = next((leaf for leaf in leaves if leaf.dim() == 1), None)
        push_c = bias if bias is not None else _along_largest(leaves[0])
        lowest = -float(push_c.min())
        if not lowest > 0:
            return None
        if seen.num_texts == 1:
            return torch.nn.functional.one_hot(push_c.argmax(), len(push_c)).double()
        # A class that nobody has is pushed down by its probability, 1/C, times the rate. Where the rate is not known, the lowest is taken for such a class.
        rate = seen.rate if seen.rate is not None and bias is not None else lowest * len(push_c)
        share_c = (1 / len(push_c) + push_c / rate).clamp(min=0)
        return share_c / share_c.sum()

    def score(self, guess: torch.Tensor, seen: Seen, secret: Secret) -> Outcome | None:
        """The share of examples whose class was named."""
        if not secret.labels:
            return None
        num, num_classes = len(secret.labels), len(guess)
        true_c = torch.tensor([Counter(secret.labels)[c] for c in range(num_classes)], dtype=torch.float64)
        even_c = torch.full_like(true_c, num / num_classes)
        right, chance = (float(torch.minimum(counts_c, true_c).sum()) / num for counts_c in (_rounded(guess, num), even_c))
        return Outcome(right, chance)


def _along_largest(weight_cd: torch.Tensor) -> torch.Tensor:
    """Each row's part along the longest row: of one example that row is its class's."""
    longest = weight_cd[weight_cd.norm(dim=1).argmax()]
    return weight_cd @ longest


def _rounded(share_c: torch.Tensor, num: int) -> torch.Tensor:
    """Whole numbers in these shares whose sum is ``num``: the largest remainders are rounded up."""
    exact_c = share_c * num
    counts_c = exact_c.floor()
    missing = num - int(counts_c.sum())
    counts_c[(exact_c - counts_c).argsort(descending=True, stable=True)[:missing]] += 1
    return counts_c

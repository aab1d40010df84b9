"""Whether the owner has a text that the server holds already.

Li, Li, Ribeiro, `Effective Passive Membership Inference Attacks in Federated Learning against Overparameterized Models <https://openreview.net/forum?id=QsCSLPP55Ku>`_, 2023:
in a large model the gradients of different texts are almost at right angles, so the update points along the gradient of a text that is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedfm.attacks.base import Attack, Outcome, Secret, Seen
from fedfm.core.tree import Tree


@dataclass(frozen=True)
class Membership(Attack):
    """The cosine between the update and what a candidate text alone would make of the model.

    Scored by the chance that a text of the owner's is ranked above one that is not (area under the curve); a guess without the update gets one half.
    """

    concerns = ("privacy",)
    question = "Does my data hold a text that the server has already?"

    def guess(self, seen: Seen) -> torch.Tensor | None:
        """The cosine for each candidate ``(M,)``."""
        length = _dot(seen.delta, seen.delta) ** 0.5
        if not seen.num_candidates or not length > 0:
            return None
        cosines = []
        for i in range(seen.num_candidates):
            alone = seen.alone(i)
            cosines.append(_dot(alone, seen.delta) / max(length * _dot(alone, alone) ** 0.5, 1e-300))
        return torch.tensor(cosines, dtype=torch.float64)

    def score(self, guess: torch.Tensor, seen: Seen, secret: Secret) -> Outcome:
        """The area under the curve."""
        member = torch.tensor(secret.members)
        above = guess[member][:, None] - guess[~member][None, :]
        if not above.numel():
            return Outcome(0.5, 0.5)
        return Outcome(float(((above > 0).double() + 0.5 * (above == 0).double()).mean()), 0.5)


def _dot(x: Tree, y: Tree) -> float:
    return sum(float((leaf.double() * y[name].double()).sum()) for name, leaf in x.items() if name in y)

"""The length of the longest text: from the rows of a position embedding, or from the numbers that come with an update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedfm.attacks.base import Attack, Outcome, Secret, Seen, named

_MOVED = 1e-7  # of the row that moved most


@dataclass(frozen=True)
class Lengths(Attack):
    """How many tokens the longest text has: the last position whose embedding moved, or the number of tokens that the client itself tells.

    The number told is that of all steps, so with more than one text it gives their mean length. Scored 1 where the guess is within one token (the last
    token of a causal text is never read), else 0; a guess without the update takes the owner's most frequent length.
    """

    concerns = ("privacy",)
    question = "How long is my longest text?"

    def guess(self, seen: Seen) -> torch.Tensor | None:
        """The guessed number of tokens, a scalar."""
        rows = named(seen.delta, seen.base.positions)
        if rows is not None:
            length_p = rows.norm(dim=1)
            moved = (length_p > _MOVED * length_p.max()).nonzero().flatten()
            return (moved[-1] - moved[0] + 1).clamp(max=seen.base.longest).double() if len(moved) else None
        tokens, steps = seen.told.get("tokens", 0.0), seen.told.get("steps", 0.0)
        if not tokens or not steps:
            return None
        return torch.tensor(tokens / steps / seen.num_texts, dtype=torch.float64)

    def score(self, guess: torch.Tensor, seen: Seen, secret: Secret) -> Outcome:
        """Whether the length is right."""
        longest = max(len(ids) for ids in secret.texts)
        return Outcome(float(abs(float(guess) - longest) <= 1), secret.usual_length)

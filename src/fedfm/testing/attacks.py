"""What every attack must do."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedfm.attacks.base import Attack, Secret, Seen
from fedfm.testing.parts import check_part, copied, same


def check_attack(attack: Attack, seen: Seen, secret: Secret) -> None:
    """A guess is a function of what is seen, whatever its length; it changes nothing; an update that holds nothing gives no guess; scores are shares.

    Args:
        seen: An update in which this attack reads something.
        secret: What is behind it.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(attack)
    name = type(attack).__name__
    assert attack.question.endswith("?"), f"{name} asks nothing"
    delta, params = copied(seen.delta), copied(seen.params)
    guess = attack.guess(seen)
    assert guess is not None, f"{name} reads nothing in an update made for it"
    assert same(delta, seen.delta) and same(params, seen.params), f"{name} changed what it was given"
    again = attack.guess(replace(seen, delta=delta, params=params))
    assert again is not None and torch.equal(guess, again), f"{name}: the same update gave another guess"
    outcome = attack.score(guess, seen, secret)
    assert outcome is not None, f"{name} has no score for what it was made for"
    assert 0 <= outcome.right <= 1 and 0 <= outcome.chance <= 1, f"{name}: a score is a share, not {outcome}"
    # A power of two changes no digit.
    rate = None if seen.rate is None else 4 * seen.rate
    longer = attack.guess(replace(seen, delta={key: 4 * leaf for key, leaf in delta.items()}, rate=rate))
    assert longer is not None and attack.score(longer, seen, secret) == outcome, f"{name}: a longer update gave another outcome"
    nothing = attack.guess(replace(seen, delta={key: torch.zeros_like(leaf) for key, leaf in delta.items()}, told={}))
    assert nothing is None, f"{name} guesses from an update of zeros without numbers"
    assert attack.guess(replace(seen, delta={}, told={})) is None, f"{name} guesses from an empty update"

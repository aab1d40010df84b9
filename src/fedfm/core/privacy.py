"""What a privacy promise says, and what each release of it spends. The mathematics is in :mod:`fedfm.privacy`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from fedfm.core.errors import RunError

Unit = Literal["owner", "row"]
Noise = Literal["gaussian", "skellam"]
Accountant = Literal["pld", "rdp"]
_NAME = re.compile(r"(gaussian|skellam) noise (\S+), rate (\S+), one (owner|row)")


@dataclass(frozen=True)
class Release:
    """Releases of a sum with noise, in which one unit's part has a bounded length.

    Args:
        rate: The probability with which each unit is in a sum, independently of all others; 1 where all are.
        noise: Standard deviation of the noise on each value, in units of the bound.
        steps: How many such sums.
        unit: Whose presence is hidden: an ``owner`` with all rows, or one ``row``.
        kind: How the noise is distributed.
    """

    rate: float
    noise: float
    steps: int = 1
    unit: Unit = "owner"
    kind: Noise = "gaussian"

    @property
    def name(self) -> str:
        """What is spent, without how often: the name under which accounts add it up."""
        return f"{self.kind} noise {self.noise!r}, rate {self.rate!r}, one {self.unit}"

    @staticmethod
    def of(name: str, steps: float) -> Release | None:
        """The release of this name; ``None`` where it is another kind of expense.

        Raises:
            RunError: if it names a release and no such release exists.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        try:
            return Release(float(match[3]), float(match[2]), int(steps), match[4], match[1])  # type: ignore[arg-type]
        except (ValueError, OverflowError) as error:
            raise RunError(f"An account holds {name!r} {steps} times, which is no release.") from error


@dataclass(frozen=True)
class Guarantee:
    """A differential privacy guarantee in full: epsilon never stands alone.

    Args:
        epsilon: Of all releases together.
        delta: Of all releases together, with every chance that the guarantee fails.
        unit: Whose presence is hidden.
        adjacency: Which two collections of data are neighbours.
        sampling: Who is in each sum, and how that was drawn.
        noise_by: Who adds which noise, where.
        accountant: How epsilon was computed.
        simulated: Whether the coins came from the run's seed, so that nothing is protected.
        assumes: What must hold besides.
        budget: The epsilon at which the work ends; ``None`` where none is set.
        caution: What to know before it is relied on.
    """

    epsilon: float
    delta: float
    unit: str
    adjacency: str
    sampling: str
    noise_by: str
    accountant: str
    simulated: bool = False
    assumes: tuple[str, ...] = ()
    budget: float | None = None
    caution: str = ""

    def sentence(self) -> str:
        """All of it in one sentence or two."""
        kind = "simulated epsilon" if self.simulated else "epsilon"
        budget = "" if self.budget is None else f" (of at most {self.budget:g})"
        text = (
            f"{kind} {self.epsilon:.4g}{budget} at delta {self.delta:.3g} for {self.unit} ({self.adjacency}); {self.sampling}; "
            f"{self.noise_by}; computed with {self.accountant}."
        )
        if self.simulated:
            text += " The coins come from the recipe's seed, so this run protects nobody: it shows what such a run would give."
        if self.assumes:
            text += f" Assumes: {'; '.join(self.assumes)}."
        return text

    def to_json(self) -> dict[str, Any]:
        """As ``ledger.json`` holds it, with the sentence; an epsilon that is infinite is ``None`` there."""
        epsilon = self.epsilon if math.isfinite(self.epsilon) else None
        return {**asdict(self), "epsilon": epsilon, "assumes": list(self.assumes), "text": self.sentence()}

    @staticmethod
    def from_json(words: Mapping[str, Any]) -> Guarantee:
        """Undoes :meth:`to_json`."""
        epsilon = math.inf if words["epsilon"] is None else words["epsilon"]
        return Guarantee(
            **{**{name: words[name] for name in words if name != "text"}, "epsilon": epsilon, "assumes": tuple(words["assumes"])}
        )


class HasEntries(Protocol):
    """An account of expenses."""

    def entries(self) -> Sequence[tuple[str, float]]:
        """Every expense, oldest first."""
        ...


def released(account: HasEntries) -> list[Release]:
    """All releases in an account, those of one kind together."""
    steps: Counter[str] = Counter()
    for what, amount in account.entries():
        steps[what] += int(amount)
    return [release for what, number in steps.items() if (release := Release.of(what, number)) is not None]

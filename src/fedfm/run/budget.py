"""What a run has spent of its privacy: ``privacy.jsonl`` in the run's folder, a line for each release, on disk before its noise is drawn.

A release counts whether or not its round was committed: a process that was killed in between has lost its noise and not what it spent. A resumed
run reads the same file, in which no line can be changed, moved or taken out without a trace, and the journal names the last line that it has seen.

Not covered: somebody who puts back an older copy of the whole folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfm.client.house import House
from fedfm.core.chain import Chain, digest_of
from fedfm.core.errors import PrivacyError, RunError
from fedfm.core.messages import ClientId
from fedfm.core.parts import Guarantee, LocalTrainer, Plan, Release, Spent, Transform
from fedfm.core.privacy import released

PRIVACY = "privacy.jsonl"
# The last planned round must not be refused because of the last digit of an epsilon.
_SLACK = 1 + 1e-3
_LOOKED_AT = 3


class RunAccount(Spent):
    """What the server of a run has spent.

    Args:
        path: The file; ``None`` keeps it in this process.
    """

    def __init__(self, path: Path | None) -> None:
        self._chain = Chain(path, _changed, digest_of("", b"privacy of a run"))

    def add(self, what: str, amount: float) -> None:
        """Writes a release down; durable when this returns."""
        if not (amount >= 0 and math.isfinite(amount)):
            raise RunError(f"A run cannot spend {amount} of {what}; an expense is a finite number, 0 or more.")
        self._chain.add("release", what=what, amount=float(amount))

    def total(self, what: str) -> float:
        """All that was spent of ``what``."""
        return math.fsum(amount for name, amount in self.entries() if name == what)

    def entries(self) -> list[tuple[str, float]]:
        """Every release, oldest first."""
        return [(str(line.what.get("what")), float(line.what.get("amount", math.inf))) for line in self._chain.lines()]

    @property
    def head(self) -> str:
        """The digest of all of it; empty where nothing was spent."""
        return next((line.digest for line in reversed(list(self._chain.lines()))), "")

    def require(self, head: str) -> None:
        """Refuses an account that lacks what a run had spent when it noted ``head``.

        Raises:
            RunError: if the line is not there.
        """
        if head and all(line.digest != head for line in self._chain.lines()):
            raise RunError(
                f"{self._chain.path} lacks releases that this run has made, so nobody knows what it has spent, and it does not go on. "
                "Restore the file from a copy, or start again with another --out."
            )


@dataclass
class Budget:
    """The privacy promises of a run, what they have spent, and whether another round fits.

    Args:
        plan: The plan, with its noise solved.
        house: The clients that live here, whose own accounts can be read.
    """

    plan: Plan
    house: House
    account: RunAccount
    _transforms: list[Transform] = field(default_factory=list)

    @staticmethod
    def open(plan: Plan, house: House, folder: Path | None, head: str) -> Budget:
        """The budget of a run.

        Args:
            head: Of the account when the run last committed a round; empty in a new run.

        Raises:
            RunError: if the account was changed, or lacks what was spent.
        """
        account = RunAccount(None if folder is None else folder / PRIVACY)
        account.require(head)
        return Budget(plan, house, account, [transform for transform in plan.transforms if transform.release(plan) is not None])

    def refusal(self) -> str | None:
        """Why another round would spend too much; ``None`` where it fits."""
        for transform in self._transforms:
            release = transform.release(self.plan)
            assert release is not None
            after = self._of(transform, [*released(self.account), release])
            if after is not None and after.budget is not None and after.epsilon > after.budget * _SLACK:
                return f"another round would make epsilon {after.epsilon:.4g}, and the budget is {after.budget:g}"
        return self._owners_refusal()

    def guarantees(self) -> Iterator[Guarantee]:
        """What has been spent so far, of each promise."""
        for transform in self._transforms:
            if guarantee := self._of(transform, released(self.account)):
                yield guarantee
        for transform in self.plan.transforms:
            if transform not in self._transforms and (told := transform.guarantee(self.plan, len(self.house.clients))):
                yield told
        local = self.plan.local
        if not self._owners_promise:
            return
        spent = {client: own for client in self.house.shards if (own := released(self.house.spent.of(client)))}
        if not spent:
            planned = local.guarantee(self.plan, len(self.house.clients))
            yield from [] if planned is None else [planned]
            return
        # The longest step towards the central limit is nearly always the worst; the next ones are looked at too.
        first = sorted(spent.values(), key=_pull, reverse=True)[:_LOOKED_AT]
        worst = [guarantee for own in first if (guarantee := local.guarantee(self.plan, len(spent), own))]
        yield from sorted(worst, key=lambda guarantee: -guarantee.epsilon)[:1]

    def to_json(self) -> list[dict[str, Any]]:
        """As ``ledger.json`` holds it."""
        return [guarantee.to_json() for guarantee in self.guarantees()]

    @property
    def _owners_promise(self) -> bool:
        """Whether owners have accounts of their own, of whom there may be many."""
        return "private" in self.plan.local.traits().is_

    def _of(self, transform: Transform, spent: Sequence[Release]) -> Guarantee | None:
        return transform.guarantee(self.plan, len(self.house.clients), spent)

    def _owners_refusal(self) -> str | None:
        """Why no owner that lives here takes part in another round."""
        if not self._owners_promise:
            return None
        refusals = [why for client in self.house.shards if (why := _unaffordable(self.plan.local, self.house, client)) is not None]
        return refusals[0] if refusals and len(refusals) == len(self.house.clients) else None


def _unaffordable(local: LocalTrainer, house: House, client: ClientId) -> str | None:
    try:
        local.require_affordable(released(house.spent.of(client)), len(house.shard(client).train))
    except PrivacyError as error:
        return f"{client}: {error}"
    return None


def _pull(releases: Sequence[Release]) -> float:
    return math.fsum(one.steps * one.rate**2 * math.expm1(min(one.noise**-2, 700.0)) if one.noise else math.inf for one in releases)


def _changed(path: Path, line: int, why: str) -> RunError:
    return RunError(
        f"{path}, line {line}: this account was changed by something else than fedfm ({why}). What the run has spent is not known any more, "
        "so it does not go on. Restore the file from a copy."
    )

"""Faults of a differentially private sum, each of which looks well from outside: an audit must notice them.

=================  ==========================================================================
``no-clip``        nobody shortens updates
``clip-late``      the mean is shortened, instead of each update
``half-noise``     the noise is half of what is accounted for
``same-noise``     every round draws the same noise
``cohort-noise``   noise for one update is added to the sum before it is divided among the cohort, again
``fixed-seed``     every run draws the same noise
=================  ==========================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedfm.core.leaves import Leaf
from fedfm.core.parts import Finding, Guarantee, Plan, Release, RoundContext, Secret, Traits, Transform, Tree, Update
from fedfm.transforms.central_dp import CentralDP

Fault = Literal["no-clip", "clip-late", "half-noise", "same-noise", "cohort-noise", "fixed-seed"]
FAULTS: tuple[Fault, ...] = ("no-clip", "clip-late", "half-noise", "same-noise", "cohort-noise", "fixed-seed")


@dataclass(frozen=True)
class Faulty(Transform):
    """``CentralDP`` with one fault. It claims what ``inner`` claims.

    Args:
        inner: The sound one, with a fixed clip and with its noise given.
        fault: What is wrong.
    """

    covers = CentralDP.covers

    inner: CentralDP
    fault: Fault

    @property
    def clip(self) -> float:
        """The bound that is claimed."""
        return self.inner.clip

    def traits(self) -> Traits:
        """Those that are claimed."""
        return self.inner.traits()

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Nothing: nobody can see it in the plan."""
        yield from ()

    def release(self, plan: Plan) -> Release | None:
        """What is claimed."""
        return self.inner.release(plan)

    def guarantee(self, plan: Plan, num_clients: int | None = None, spent: Sequence[Release] | None = None) -> Guarantee:
        """What is claimed."""
        return self.inner.guarantee(plan, num_clients, spent)

    def leaves(self, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        """As without the fault."""
        return self.inner.leaves(leaves)

    @property
    def _shortens(self) -> bool:
        return self.fault not in ("no-clip", "clip-late")

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Shortens the update, unless that is the fault."""
        return self.inner.encode(update, memory, ctx) if self._shortens else (update, memory)

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """The same on the server."""
        return self.inner.decode(update, ctx) if self._shortens else update

    def finish(self, aggregate: Update, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Adds the noise, with the fault."""
        inner, noise = self.inner, self.inner.noise_multiplier
        assert noise is not None
        if self.fault == "clip-late":
            aggregate = inner.decode(aggregate, ctx)
        elif self.fault == "half-noise":
            inner = replace(inner, noise_multiplier=noise / 2)
        elif self.fault == "cohort-noise":
            inner = replace(inner, noise_multiplier=noise / max(1, aggregate.num_clients))
        elif self.fault == "same-noise":
            ctx = replace(ctx, secret=_fixed("a run", ctx.key.digest))
        elif self.fault == "fixed-seed":
            ctx = replace(ctx, secret=_fixed("all runs", ctx.round.to_bytes(8, "big")))
        return inner.finish(aggregate, state, ctx)


def _fixed(name: str, what: bytes) -> Secret:
    return Secret(hashlib.blake2b(name.encode() + what, digest_size=32).digest())

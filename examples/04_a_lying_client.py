"""Three owners lie: they answer with noise and claim a hundred thousand examples. What the aggregator makes of it.

A liar can send anything, so the lie happens where answers leave a client: in a session around the engine's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from course import base, loss, play

from fedfm.aggregators import CoordinateMedian, Mean, TrimmedMean
from fedfm.client.house import House
from fedfm.core.clock import Clock
from fedfm.core.keys import Key
from fedfm.core.messages import ClientId, Reply
from fedfm.core.session import Answer, Session, WrappedSession
from fedfm.engines import Engine
from fedfm.local import AdamW
from fedfm.samplers import All


@dataclass(frozen=True)
class Liars(Engine):
    """Runs ``inner``, but the clients in ``who`` replace their updates by noise. With nobody in ``who`` it is ``inner``.

    Args:
        inner: The engine that runs everybody.
        who: The liars.
        scale: Standard deviation of a false value.
        weight: The number of examples that a liar claims.
    """

    inner: Engine
    who: tuple[ClientId, ...] = ()
    scale: float = 1.0
    weight: float = 100_000.0

    def open(self, house: House, clock: Clock | None = None) -> Session:
        """The inner session, wrapped so that the liars' answers are replaced."""
        return _Lying(self, self.inner.open(house, clock), house.key)


class _Lying(WrappedSession):
    def __init__(self, liars: Liars, inner: Session, key: Key) -> None:
        super().__init__(inner)
        self.liars, self.key = liars, key.fold("liars")

    def receive(self) -> Answer | None:
        answer = self.inner.receive()
        is_lie = isinstance(answer, Reply) and answer.verb == "train" and answer.client in self.liars.who
        return self.lie(answer) if is_lie else answer

    def lie(self, reply: Reply) -> Reply:
        generator = self.key.fold(reply.round, reply.client).generator()
        noise = {name: self.liars.scale * torch.randn(leaf.shape, generator=generator) for name, leaf in reply.tensors.items()}
        return replace(reply, tensors=noise, meta={**reply.meta, "weight": self.liars.weight})


def main(quick: bool = False) -> dict[str, tuple[float, float]]:
    plan = replace(base(quick), sampler=All(), local=AdamW(lr=1e-2, steps=4, batch_size=4))
    lied_to = replace(plan, engine=Liars(plan.engine, who=("asyncio", "email", "tkinter")))
    losses = {}
    print(f"{'aggregator':<20} {'honest':>7} {'3 liars':>8}")
    for rule in (Mean(), CoordinateMedian(), TrimmedMean(trim=3)):
        honest, lied = (loss(play(replace(federation, aggregator=rule))) for federation in (plan, lied_to))
        losses[type(rule).__name__] = honest, lied
        print(f"{type(rule).__name__:<20} {honest:>7.3f} {lied:>8.3f}")
    return losses


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # 01 has shown what the plan check has to say
    main()

"""A secure sum played by hand: members and a collector, with somebody between them who may drop or change messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedfm.core import leaves as declare
from fedfm.core.errors import MessageError
from fedfm.core.leaves import Leaf
from fedfm.secagg.agreement import Identity, Session
from fedfm.secagg.collector import Collector
from fedfm.secagg.member import BOX, SEALED, Member
from fedfm.secagg.quantise import Quantiser
from fedfm.secagg.terms import Rules

PHASES = ("hello", "join", "pair", "deal", "mask", "sign", "reveal")
RULES = Rules(corrupt=0.1, dropout=0.1, min_clients=3, threshold=None, reach=1.0, max_weight=1.0)
JOB, ERRAND = "job", "train/1/0"
# Changes what a client is told in a phase: phase, client, arguments.
Cheat = Callable[[str, str, tuple[Any, ...]], tuple[Any, ...]]


def leaves(size: int) -> tuple[Leaf, ...]:
    return (Leaf("w", (size,)), declare.number("weight"))


@dataclass
class Play:
    """One sum of n clients.

    Args:
        drops: The phase in which a client says nothing any more.
        cheat: Changes what clients are told.
        garble: Changes what clients say: phase, client, message.
    """

    n: int
    rules: Rules = RULES
    size: int = 19
    drops: Mapping[str, str] = field(default_factory=dict)
    cheat: Cheat | None = None
    garble: Callable[[str, str, dict[str, Any]], None] | None = None
    sessions: dict[str, Session] = field(default_factory=dict, repr=False)
    errand: str = ERRAND
    known: Callable[[str, bytes], bool] | None = None

    def __post_init__(self) -> None:
        self.names = [f"client-{i:02}" for i in range(self.n)]
        for name in self.names:
            self.sessions.setdefault(name, Session(Identity()))
        self.collector = Collector(JOB, self.errand, self.rules)
        cards = {name: session.identity.public for name, session in self.sessions.items()}
        known = self.known or (lambda name, public: cards.get(name) == public)
        self.members = {name: Member(name, self.sessions[name], JOB, self.errand, self.rules, known) for name in self.names}
        rng = np.random.default_rng(self.n)
        # As large as they may be without an overflow of the sum.
        most = 2**31 // self.n
        self.narrow = {name: rng.integers(-most, most, self.size).astype("<i4").view("<u4") for name in self.names}
        self.refusals: dict[str, str] = {}
        self.leaked: list[str] = []
        self.said: dict[tuple[str, str], dict[str, Any]] = {}

    def wide(self, name: str, size: int) -> Any:
        return np.arange(size, dtype="<u8") * np.uint64(self.names.index(name) + 1) - np.uint64(7)

    def tell(
        self,
        phase: str,
        names: Iterable[str],
        step: Callable[[str], Callable[..., dict[str, Any]]],
        arguments: Callable[[str], tuple[Any, ...]],
        take: Callable[[str, dict[str, Any]], None],
    ) -> None:
        for name in names:
            if self.drops.get(name) is not None and PHASES.index(self.drops[name]) <= PHASES.index(phase):
                continue
            told = arguments(name)
            if self.cheat is not None:
                told = self.cheat(phase, name, told)
            try:
                said = step(name)(*told)
            except MessageError as error:
                self.refusals.setdefault(name, str(error))
                continue
            if phase == "reveal":
                self.leaked.append(name)
            if self.garble is not None:
                self.garble(phase, name, said)
            self.said[phase, name] = said
            try:
                take(name, said)
            except MessageError:
                # A server that cheats does not stop where an honest one would.
                if self.cheat is None:
                    raise

    def run(self) -> tuple[Any, Any]:
        """The opened sum."""
        c = self.collector
        self.tell("hello", self.names, lambda name: self.members[name].hello, lambda name: (), c.hello)
        terms, roster = c.begin("body", lambda n: Quantiser(leaves(self.size), n, 1.0, 1.0, True))
        self.tell("join", c.names, lambda name: self.members[name].join, lambda name: (terms, roster), c.join)
        lots = c.draw()
        self.tell("pair", c.names, lambda name: self.members[name].pair, lambda name: (lots,), c.pair)
        self.tell("deal", c.names, lambda name: self.members[name].deal, lambda name: rows(c.keys_for(name), SEALED), c.deal)
        c.close_shares()
        m = c.quantiser.num_wide

        def mask(name: str) -> tuple[Any, ...]:
            return (c.shared, *rows(c.boxes_for(name), BOX), self.narrow[name].copy(), self.wide(name, m))

        dealt = [c.names[place] for place in c.shared]
        self.tell("mask", dealt, lambda name: self.members[name].mask, mask, c.add)
        sets = c.close_vectors()
        alive = [c.names[place] for place in sets[0]]
        self.tell("sign", alive, lambda name: self.members[name].sign, lambda name: sets, c.sign)
        self.tell("reveal", alive, lambda name: self.members[name].reveal, lambda name: (*sets, *rows(c.signatures(), 64)), c.reveal)
        return c.open()

    def expected(self) -> tuple[Any, Any]:
        """The plain sum of those whose vectors arrived."""
        alive = [self.collector.names[place] for place in self.collector.survivors]
        narrow, wide = np.zeros(self.size, dtype="<u4"), np.zeros(self.collector.quantiser.num_wide, dtype="<u8")
        for name in alive:
            narrow += self.narrow[name]
            wide += self.wide(name, len(wide))
        return narrow, wide


def rows(pairs: tuple[list[int], list[bytes]], size: int) -> tuple[Any, Any]:
    places, data = pairs
    return np.array(places, dtype=np.int32), np.frombuffer(b"".join(data), dtype=np.uint8).reshape(len(data), size)

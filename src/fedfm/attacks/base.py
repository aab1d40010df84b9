"""What an attack sees, what it looks for, and how well it did.

An attack here is a curious server's: it keeps to the protocol, and reads what it is sent. It knows the plan, the base model and the parameters that it sent
out, and never the owner's rows. Whoever tests holds the :class:`Secret` and scores the guess.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedfm.core.batch import IntArray
from fedfm.core.parts import Part
from fedfm.core.tree import Tree

ROUNDING = 1e-5
"""A part of a change that is this small beside its largest is rounding: parameters are float32, and a change is their difference."""


@dataclass(frozen=True)
class Base:
    """What everybody knows of the base model.

    Args:
        size: Number of tokens of the vocabulary.
        special: Ids that are not text.
        embedding: Name of the token embedding's parameter ``(V, d)``.
        output: Name of the layer from hidden states to the vocabulary ``(V, d)``; ``None`` where there is none, or where it is the embedding.
        positions: Name of the position embedding's parameter ``(P, d)``; ``None`` where there is none.
        classes: Names of the last layer's parameters of a classifier, each ``(C, ...)``.
        first: The linear layers that read what the first attention layer reads.
        turned: Whether their weights are stored as ``(in, out)``.
        inputs: What these layers read when the model is called with token ids ``(N, L)``: ``(N, L, d)``.
        longest: Tokens of the owner's longest text.
    """

    size: int
    special: tuple[int, ...]
    embedding: str | None
    output: str | None
    positions: str | None
    classes: tuple[str, ...]
    first: tuple[str, ...]
    turned: bool
    inputs: Callable[[torch.Tensor], torch.Tensor]
    longest: int


@dataclass(frozen=True)
class Seen:
    """What a server has in its hands.

    Args:
        base: The base model.
        params: The parameters that it sent out.
        delta: The change that came back, of one owner or of a group; leaves that are no parameters are left out.
        told: The numbers that came with it.
        num_texts: How many examples of the owner are behind it. That the server knows them favours the attack.
        rate: The sum of the learning rates of its steps; ``None`` where a step is no gradient times a rate, or nobody told how many there were.
        alone: The change that one candidate text by itself would make, by its index.
        num_candidates: Texts of which the server asks whether the owner has them.
    """

    base: Base
    params: Tree
    delta: Tree
    told: Mapping[str, float]
    num_texts: int
    rate: float | None
    alone: Callable[[int], Tree]
    num_candidates: int


@dataclass(frozen=True)
class Secret:
    """What the owner has, and a server must not learn.

    Args:
        texts: Token ids of each example ``(n,)``.
        labels: Class of each example; empty where there are none.
        num_classes: How many classes there are.
        members: Whether the owner has each candidate text.
        usual_length: Share of the owner's texts that are as long as most are: how often a guess without the update is right.
        group: Token ids of all texts of the group whose sum the server sees; empty where it sees the owner's own update.
    """

    texts: tuple[IntArray, ...]
    labels: tuple[int, ...] = ()
    num_classes: int = 0
    members: tuple[bool, ...] = ()
    usual_length: float = 0.0
    group: tuple[IntArray, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How well an attack did.

    Args:
        right: Share of what was asked that it got right, from 0 to 1.
        chance: The share that a guess without the update gets right on average.
        tokens: Token ids that it says the owner has, where it reads tokens.
        in_group: Share of the owner's tokens among as many guesses as the whole group has tokens; ``None`` where there is no group.
    """

    right: float
    chance: float
    tokens: tuple[int, ...] = field(default=(), repr=False)
    in_group: float | None = None


class Attack(Part, ABC):
    """Reads an update.

    Attributes:
        question: What it asks, as its owner would.
    """

    room = "attacks"
    question: ClassVar[str]

    @abstractmethod
    def guess(self, seen: Seen) -> torch.Tensor | None:
        """What the server concludes from the update alone; ``None`` where the update holds nothing of this kind."""

    @abstractmethod
    def score(self, guess: torch.Tensor, seen: Seen, secret: Secret) -> Outcome | None:
        """How good a guess is; ``None`` where the owner has nothing of this kind. It does not change with the length of the update and the rate."""


class TokenAttack(Attack, ABC):
    """Ranks the tokens of the vocabulary by how sure the server is that the owner's text has them: ``guess`` gives ``(V,)``.

    It is scored by recall: of the owner's k different tokens, how many are among the k it is surest of. That it is told k favours it. Special tokens do not
    count. A guess without the update gets ``k / V`` right on average.
    """

    def score(self, guess: torch.Tensor, seen: Seen, secret: Secret) -> Outcome:
        """The recall of the tokens."""
        own, special = different(secret.texts, seen.base), list(seen.base.special)
        ranked = guess.clone()
        ranked[special] = -torch.inf
        order = ranked.argsort(descending=True, stable=True).tolist()
        guessed = order[: len(own)]
        chance = min(len(own) / max(seen.base.size - len(special), 1), 1.0)
        in_group = recall(order[: len(different(secret.group, seen.base))], own) if secret.group else None
        return Outcome(recall(guessed, own), chance, tuple(guessed), in_group)


def different(texts: Sequence[IntArray], base: Base) -> set[int]:
    """The different tokens of some texts, without special ones."""
    return {int(token) for ids in texts for token in ids} - set(base.special)


def recall(guessed: Sequence[int], own: set[int]) -> float:
    """Share of ``own`` among ``guessed``; 0 where there is nothing to find."""
    return len(own.intersection(guessed)) / len(own) if own else 0.0


def named(tree: Tree, name: str | None) -> torch.Tensor | None:
    """The leaf of a parameter, in double precision, under its own name or below an adapter's; ``None`` where the tree has none."""
    if name is None:
        return None
    leaf = next((leaf for key, leaf in tree.items() if key == name or key.endswith("." + name)), None)
    return None if leaf is None else leaf.double()


def without_decay(delta_vd: torch.Tensor, param_vd: torch.Tensor | None) -> torch.Tensor:
    """A change without what a decay of weights does, which shortens all rows of the parameter alike."""
    if param_vd is None:
        return delta_vd
    shrinking_v = (delta_vd * param_vd).sum(1) / param_vd.square().sum(1).clamp(min=1e-30)
    return delta_vd - shrinking_v.median() * param_vd


def outstanding(length_vr: torch.Tensor) -> torch.Tensor:
    """How much longer each row of a change is than rows usually are, in units of how much rows differ.

    Args:
        length_vr: Lengths of the rows ``(V, R)``, measured in R ways.
    """
    usual_r = length_vr.median(dim=0).values
    spread_r = (length_vr - usual_r).abs().median(dim=0).values
    return (length_vr - usual_r) / torch.maximum(spread_r, 1e-6 * length_vr.amax(dim=0)).clamp(min=1e-300)


def directions(rows_nd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions in which the rows are longest, first ones first, as columns ``(d, d)``, and how long they are there ``(d,)``.

    By the eigenvectors of ``(d, d)`` products, which is cheap where there are many rows. Lengths below 1e-8 of the first are rounding.
    """
    values, vectors = torch.linalg.eigh(rows_nd.T @ rows_nd)
    return vectors.flip(1), values.flip(0).clamp(min=0).sqrt()


def row_space(rows_nd: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis ``(d, r)`` of what the rows span, without what is only rounding; the directions in which they are longest first."""
    basis_dd, length_d = directions(rows_nd)
    return basis_dd[:, length_d > ROUNDING * length_d[:1]]

"""Who shares a mask with whom, and how many shares open a secret.

Up to 32 clients everybody does with everybody. Above, each client has ``k`` neighbours: the clients stand on a ring in an order that is drawn from
lots, to which all are committed before one is told, and each is a neighbour of the ``k/2`` on either side (a Harary graph, of which no ``k - 1`` clients cut a part off). ``(k, t)`` are
computed, not configured: the smallest for which, each but for a chance of 2^-40 (2^-30 for the third),

- no client's secrets are open to the colluders among its neighbours, who must be fewer than ``t``;
- a server that colludes with them cannot get both of a client's secrets by telling neighbours different things: ``2t > k + colluders``;
- enough neighbours stay: at most ``k - t`` of them drop out;
- those who are honest and stay are connected, so that no part of the sum can be opened by itself.

Chances are tails of the hypergeometric distribution, summed over clients (for the last: over pairs of cuts).

Bell, Bonawitz, Gascon, Lepoint, Raykova, `Secure Single-Server Aggregation with (Poly)Logarithmic Overhead <https://eprint.iacr.org/2020/704>`_, 2020.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

COMPLETE = 32
"""Up to this many clients the graph is complete."""
SECURITY, CORRECTNESS = 40.0, 30.0
"""Bits: chances of a leak and of a sum that cannot be opened are below 2^-40 and 2^-30."""


@dataclass(frozen=True)
class Graph:
    """The numbers of a graph.

    Args:
        n: Clients.
        k: Neighbours of each.
        t: Shares that open a secret.
        colluders: Clients that may share all they know with the server.
        dropouts: Clients that may drop out.
        security: Bits: the chance that colluders learn more than the sum is below ``2^-security``; infinite where it cannot happen.
        correctness: Bits: the same for a sum that cannot be opened.
    """

    n: int
    k: int
    t: int
    colluders: int
    dropouts: int
    security: float
    correctness: float


def complete(n: int, corrupt: float, threshold: int | None = None) -> Graph:
    """Everybody is a neighbour of everybody.

    Args:
        corrupt: Share of the clients that may collude with the server; rounded down, as one of four is a quarter.
        threshold: Shares that open a secret; ``None`` for the fewest with which the server cannot tell clients different things.

    Raises:
        ValueError: if the threshold is out of range, with the range.
    """
    k, colluders = n - 1, math.floor(corrupt * n)
    least = (k + colluders) // 2 + 1
    t = least if threshold is None else threshold
    if not least <= t <= k:
        raise ValueError(
            f"a threshold of {t} does not fit {n} clients of which {colluders} may collude with the server: it must be from {least} to {k}"
            if least <= k
            else f"{n} clients of which {colluders} may collude with the server are too few for any threshold"
        )
    return Graph(n, k, t, colluders, k - t, math.inf, math.inf)


@lru_cache(maxsize=256)
def choose(n: int, corrupt: float, dropout: float, collude: bool = True) -> Graph:
    """The smallest ``(k, t)`` that keeps the four conditions.

    Args:
        corrupt: Share of the clients that may collude with the server, rounded up.
        dropout: Share of the clients that may drop out, rounded up.
        collude: Whether a server that tells clients different things may collude with them; without, ``2t > k`` is enough.

    Raises:
        ValueError: if there is none.
    """
    colluders, dropouts = math.ceil(corrupt * n - 1e-9), math.ceil(dropout * n - 1e-9)
    leak, stuck = 2.0**-SECURITY / n, 2.0**-CORRECTNESS / n
    for k in range(2, n):
        if k * n % 2:
            continue
        bad, gone = _tails(n - 1, colluders, k), _tails(n - 1, dropouts, k)
        least = next((t for t in range(k // 2 + 1, k + 1) if bad[2 * t - k if collude else t] <= leak), None)
        if least is None or gone[k - least + 1] > stuck:
            continue
        cut = _tails(n - 1, min(colluders + dropouts, n - 1), k)[k]
        if cut * (n - 1) / 2 <= leak:
            worst = max(bad[2 * least - k if collude else least], cut * (n - 1) / 2)
            return Graph(n, k, least, colluders, dropouts, _bits(worst * n), _bits(gone[k - least + 1] * n))
    raise ValueError(
        f"no graph of {n} clients holds {colluders} that collude with the server and {dropouts} that drop out; assume fewer of either"
    )


def design(n: int, corrupt: float, dropout: float, threshold: int | None = None) -> Graph:
    """The graph of ``n`` clients: complete up to 32, with computed ``(k, t)`` above.

    Raises:
        ValueError: if there is none that keeps the conditions, or a threshold is given where it is computed.
    """
    if n <= COMPLETE:
        return complete(n, corrupt, threshold)
    if threshold is not None:
        raise ValueError(f"the threshold of {n} clients is computed; leave it out")
    return choose(n, corrupt, dropout)


def neighbours(graph: Graph, seed: bytes) -> list[tuple[int, ...]]:
    """The neighbours of each client, sorted.

    Args:
        seed: What the order on the ring is drawn from.
    """
    n, k = graph.n, graph.k
    if k == n - 1:
        return [tuple(j for j in range(n) if j != i) for i in range(n)]
    order = sorted(range(n), key=lambda i: hashlib.blake2b(seed + i.to_bytes(4, "big"), digest_size=16).digest())
    steps = [*range(1, k // 2 + 1), *(-step for step in range(1, k // 2 + 1)), *([n // 2] if k % 2 else [])]
    around: list[tuple[int, ...]] = [()] * n
    for place, i in enumerate(order):
        around[i] = tuple(sorted(order[(place + step) % n] for step in steps))
    return around


def _tails(total: int, marked: int, drawn: int) -> list[float]:
    """``P[at least x marked among the drawn]`` for x from 0 to ``drawn + 1``."""
    low, high = max(0, drawn - (total - marked)), min(drawn, marked)
    tails = [0.0] * (drawn + 2)
    whole = _log_choose(total, drawn)
    for x in range(high, low - 1, -1):
        tails[x] = tails[x + 1] + math.exp(_log_choose(marked, x) + _log_choose(total - marked, drawn - x) - whole)
    for x in range(low + 1):
        tails[x] = 1.0
    return tails


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _bits(chance: float) -> float:
    return math.inf if chance <= 0 else -math.log2(chance)

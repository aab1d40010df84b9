"""Which examples a client takes in which step."""

from __future__ import annotations

import numpy as np

from fedfm.core.batch import IntArray
from fedfm.core.keys import Key
from fedfm.core.parts import Work
from fedfm.core.secret import Stream
from fedfm.core.task import Examples


def plan(examples: Examples, work: Work, key_client: Key, key_round: Key) -> list[IntArray]:
    """The examples of each optimizer step of one client in one round, ``batch_size * accumulate`` of them.

    A shuffle is cut into steps, of which one may be short; ``epochs`` takes whole shuffles, ``steps`` as much of the next shuffle as it
    needs. With examples of unequal length each shuffle is sorted by length before it is cut, and the steps are put in an order drawn
    from ``key_round``: in any one step all clients of the round are at about the same quantile of their own lengths, so a bank pads little.
    With equal lengths it is plain shuffling. Depends on nothing but the client's own examples, ``work`` and the two keys.

    Args:
        key_client: Names the client and the round; draws the shuffles.
        key_round: Names the round; the same for all its clients.
    """
    n = len(examples)
    if n == 0:
        return []
    size, steps = work.size(n), work.num_steps(n)
    per_shuffle = -(-n // size)
    if size == n:
        return [np.arange(n)] * steps
    lengths = examples.lengths
    ragged = bool((lengths != lengths[0]).any())
    rng, quantile_s = key_client.numpy(), key_round.numpy().random(steps)
    planned: list[IntArray] = []
    while len(planned) < steps:
        num = min(per_shuffle, steps - len(planned))
        drawn = rng.permutation(n)[: num * size]
        sizes = np.full(num, size)
        # Where the cut leaves a short step, it falls on any length, not always on the longest.
        sizes[rng.integers(num)] -= num * size - len(drawn)
        if ragged:
            drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        cut = np.split(drawn, np.cumsum(sizes)[:-1])
        rank_s = np.argsort(np.argsort(quantile_s[len(planned) : len(planned) + num]))
        planned += [cut[rank] for rank in rank_s]
    return planned


def poisson(num_examples: int, work: Work, stream: Stream) -> list[IntArray]:
    """The examples of each step: each example on its own with one probability, so that ``work.size`` of them are expected; a step may be empty.

    Args:
        stream: The client's own coins for this round's batches.
    """
    if num_examples == 0:
        return []
    size = work.size(num_examples)
    if size == num_examples:
        return [np.arange(num_examples)] * work.num_steps(num_examples)
    return [np.flatnonzero(stream.uniform(num_examples) < size / num_examples) for _ in range(work.num_steps(num_examples))]

"""What every sampler must do."""

from __future__ import annotations

from fedfm.core.parts import Sampler
from fedfm.testing.parts import check_part, context, same


def check_sampler(sampler: Sampler, num_clients: int = 12, rounds: int = 300) -> None:
    """A cohort is a subset in the order of the clients, drawn from the key alone, of the size that was promised.

    Args:
        num_clients: How many are registered; the sampler must be able to serve them.
        rounds: Over how many the mean size of a random cohort is taken.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(sampler)
    name = type(sampler).__name__
    clients = [f"client-{(7 * i) % num_clients}" for i in range(num_clients)]
    sizes, states = [], [sampler.init()]
    for round in range(1, rounds + 1):
        cohort, state = sampler.sample(clients, states[-1], context({}, round, num_clients))
        states.append(state)
        assert cohort == [client for client in clients if client in set(cohort)], (
            f"{name}: not a subset in the order of the clients: {cohort}"
        )
        sizes.append(len(cohort))
    for round in (rounds, 1):
        again, _ = sampler.sample(tuple(clients), states[round - 1], context({}, round, num_clients))
        assert len(again) == sizes[round - 1], f"{name}: round {round} was not the same a second time"
        once_more, state = sampler.sample(clients, states[round - 1], context({}, round, num_clients))
        assert again == once_more and same(state, states[round]), f"{name}: round {round} was not the same a second time"
    promised = sampler.cohort_size(num_clients)
    assert 0 <= promised <= num_clients, f"{name}: promises {promised} of {num_clients}"
    # A sum of independent draws strays from its mean by less than five standard deviations of the widest kind.
    slack = 1 + 2.5 * (num_clients / rounds) ** 0.5
    assert abs(sum(sizes) / rounds - promised) <= slack, f"{name}: promises cohorts of {promised}, gives {sum(sizes) / rounds} on average"

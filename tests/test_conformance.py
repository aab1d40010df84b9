"""The public suites catch what they are there to catch: each broken part here fails with the law's name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fedfm.core.parts import Aggregator, Sampler, ServerOptimizer, Transform, Update
from fedfm.server import FedAvg
from fedfm.testing import check_aggregator, check_part, check_sampler, check_server, check_transform, examples


@dataclass(frozen=True)
class FloatMean(Aggregator):
    """Adds in the order of arrival."""

    def __call__(self, updates, ctx):
        us = list(updates)
        total = {name: leaf.float() for name, leaf in us[0].payload.items()}
        for u in us[1:]:
            total = {name: leaf + u.payload[name].float() for name, leaf in total.items()}
        return Update({name: leaf / len(us) for name, leaf in total.items()}, weight=float(len(us)), num_clients=len(us))


@dataclass(frozen=True)
class Trusting(Transform):
    """Believes what arrives."""

    def encode(self, update, memory, ctx):
        return update.with_payload({f"half::{name}": leaf.half() for name, leaf in update.payload.items()}), memory

    def decode(self, update, ctx):
        return update.with_payload({n: update.payload[f"half::{n}"].to(w.dtype).view(w.shape) for n, w in {**ctx.params}.items()})


@dataclass(frozen=True)
class Unkeyed(Transform):
    """Draws from the global generator."""

    def encode(self, update, memory, ctx):
        return update.with_payload({name: leaf + torch.randn(leaf.shape).to(leaf.dtype) for name, leaf in update.payload.items()}), memory


@dataclass(frozen=True)
class Crashing(Transform):
    """Meets a missing leaf with a KeyError."""

    def decode(self, update, ctx):
        return update.with_payload({name: update.payload[name] for name in [*ctx.params, "method.extra"]})


@dataclass(frozen=True)
class InPlace(ServerOptimizer):
    """Changes the parameters it was given."""

    def step(self, params, update, state, ctx):
        for name, w in params.items():
            w.add_(update.payload[name])
        return params, state


@dataclass(frozen=True)
class Shuffled(Sampler):
    """A cohort in an order of its own."""

    def sample(self, clients, ctx):
        return list(clients)[::-1]

    def cohort_size(self, num_clients):
        return num_clients


@dataclass(frozen=True)
class Boastful(Sampler):
    """Promises more than it gives."""

    def sample(self, clients, ctx):
        return list(clients)[:3]

    def cohort_size(self, num_clients):
        return num_clients


@dataclass
class Thawed(Transform):
    """Not frozen."""

    rate: float = 0.1


@dataclass(frozen=True)
class Steeper(FedAvg):
    """A part that inherits a part."""


@pytest.mark.parametrize(
    ("suite", "part", "law"),
    [
        (check_aggregator, FloatMean(), "order of updates"),
        (check_transform, Trusting(), "wrong tensors"),
        (check_transform, Unkeyed(), "not decided by the key"),
        (check_transform, Crashing(), "KeyError, not MessageError"),
        (check_server, InPlace(), "changed its input"),
        (check_sampler, Shuffled(), "in the order of the clients"),
        (check_sampler, Boastful(), "promises"),
        (check_part, Thawed(), "not frozen"),
        (check_part, Steeper(), "inherits"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else x,
)
def test_a_broken_part_fails(suite, part, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        suite(part)


def test_a_part_without_an_example_fails() -> None:
    with pytest.raises(AssertionError, match=r"transforms\.ClipByNorm"):
        examples("transforms", {})

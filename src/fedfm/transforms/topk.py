"""Top-k sparsification with error feedback.

Aji, Heafield, `Sparse Communication for Distributed Gradient Descent <https://arxiv.org/abs/1704.05021>`_, 2017; the feedback after
Karimireddy, Rebjock, Stich, Jaggi, `Error Feedback Fixes SignSGD and other Gradient Compression Schemes <https://arxiv.org/abs/1901.09847>`_, 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedfm.core.errors import ConfigError, MessageError, RunError
from fedfm.core.parts import Finding, Plan, RoundContext, Spec, Traits, Transform, Tree, Update, refuse, traits, transform_place, warn

_VALUES, _INDICES, _RESIDUAL = "topk::values", "topk::indices", "topk.residual"


@dataclass(frozen=True)
class TopK(Transform):
    """Sends the ``k`` values of largest magnitude among all parameters' deltas together; the client keeps the rest and adds it next time.

    What was sent and what is kept telescope: after any number of rounds, all that was sent plus the residual is all that was given.
    With ``fraction=1`` it is the identity. Leaves that a method adds (SCAFFOLD's control variates) pass whole.

    Args:
        fraction: Part of all values to send, in ``(0, 1]``, rounded up; exactly one of ``fraction`` and ``k`` is given.
        k: Number of values to send.
        error_feedback: Whether the client remembers what it did not send.

    Raises:
        ConfigError: if neither or both are given, or one is out of range.
    """

    concerns = ("compression",)

    fraction: float | None = None
    k: int | None = None
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.k is None):
            raise ConfigError(f"TopK has fraction={self.fraction} and k={self.k}; give exactly one of the two.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"TopK.fraction is {self.fraction}; it must be more than 0 and at most 1.")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"TopK.k is {self.k}; at least 1 value must be sent.")

    def traits(self) -> Traits:
        """Compares values across parameters, and leaves one vector of a few values in their place."""
        needs = ["float-leaves", "named-leaves", *(["stateful-clients"] if self.error_feedback else [])]
        return traits(needs=needs, hides=["named-leaves", "every-value"])

    def check(self, plan: Plan) -> Iterator[Finding]:
        """Refuses a bound before it, because the feedback adds to the bounded update. Warns of changes after it, which the feedback cannot see;
        a quantiser, which is unbiased, can stand nowhere else."""
        place = plan.transforms.index(self)
        before, after = plan.transforms[:place], plan.transforms[place + 1 :]
        bounds = [type(part).__name__ for part in before if "bounds" in part.traits().is_]
        if self.error_feedback and bounds:
            yield refuse(
                transform_place(place),
                f"TopK adds what the client kept from earlier rounds to an update that {' and '.join(bounds)} has bounded, so what leaves has no "
                f"bound. Put {' and '.join(bounds)} after TopK (what it cuts off is lost), or set TopK's error_feedback to false.",
            )
        later = [type(part).__name__ for part in after if "float-leaves" not in part.traits().hides]
        if self.error_feedback and later:
            yield warn(
                "transforms", f"what {' and '.join(later)} change after TopK is lost, for its error feedback cannot see it. Put TopK after."
            )

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Encodes deltas as values and indices.

        Raises:
            RunError: if what the client remembers belongs to other parameters.
        """
        spec = Spec.of(ctx.params)
        x_d = spec.flatten(update.payload)
        if self.error_feedback and _RESIDUAL in memory:
            if memory[_RESIDUAL].shape != x_d.shape:
                raise RunError(
                    f"The client remembers a residual of {memory[_RESIDUAL].numel()} values, but {spec.size} train now. "
                    "Changed parameters need a new run folder."
                )
            x_d = x_d + memory[_RESIDUAL]
        index_k = x_d.abs().topk(self._k(spec.size), sorted=False).indices.sort().values
        extra = {name: leaf for name, leaf in update.payload.items() if name not in ctx.params}
        sent = _spread(x_d[index_k], index_k, spec)
        # Flattened again, because a parameter of less precision than float32 rounds the values.
        sent_d = spec.flatten(sent)
        payload = {_VALUES: sent_d[index_k], _INDICES: index_k.to(_index_dtype(spec.size)), **extra}
        if self.error_feedback:
            memory = {**memory, _RESIDUAL: x_d - sent_d}
        return update.with_payload(payload), memory

    def decode(self, update: Update, ctx: RoundContext) -> Update:
        """Decodes to a delta for each parameter, zero where nothing was sent."""
        spec, payload = Spec.of(ctx.params), dict(update.payload)
        value_k, index_k = payload.pop(_VALUES, None), payload.pop(_INDICES, None)
        if value_k is None or index_k is None:
            raise MessageError(f"A sparse update needs the tensors {_VALUES!r} and {_INDICES!r}; it has {sorted(update.payload)[:5]}.")
        k, dtype = self._k(spec.size), _index_dtype(spec.size)
        if value_k.dtype != torch.float32 or index_k.dtype != dtype or not value_k.shape == index_k.shape == (k,):
            raise MessageError(
                f"A sparse update holds {list(value_k.shape)} values of {value_k.dtype} and {list(index_k.shape)} indices of {index_k.dtype}; "
                f"expected {k} of {torch.float32} and {k} of {dtype}."
            )
        if k and (int(index_k[0]) < 0 or int(index_k[-1]) >= spec.size or bool((index_k[1:] <= index_k[:-1]).any())):
            raise MessageError(f"A sparse update's indices must rise and lie in 0..{spec.size - 1}.")
        known = sorted(payload.keys() & set(spec.names))
        if known:
            raise MessageError(f"A sparse update also holds the tensors {known[:3]}, whose values it has sent already.")
        return update.with_payload({**_spread(value_k, index_k.long(), spec), **payload})

    def _k(self, size: int) -> int:
        return min(size, math.ceil(self.fraction * size) if self.fraction is not None else self.k or 0)


def _spread(value_k: torch.Tensor, index_k: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
    return spec.unflatten(torch.zeros(spec.size).index_put_((index_k,), value_k))


def _index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64

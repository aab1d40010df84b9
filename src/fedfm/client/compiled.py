"""The base's forward and backward pass, and the task's losses, compiled by torch, once, before the first round.

The model is compiled with one batch that follows from the plan alone, so a resumed run gets the same machine code as an unbroken one.
Lengths may differ from batch to batch. Whatever that code does not cover (fewer clients, because some have fewer steps or the last bank is
smaller; fewer rows; evaluation) runs eagerly: nothing is compiled later, because code that is compiled for a later batch may round otherwise.

Covered here: a compiler that fails, and code that computes something else; both leave the model eager. Not covered: a machine with other
instructions; the journal tells where a run began.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch

from fedfm.client.house import House
from fedfm.core.batch import Batch
from fedfm.core.keys import Key
from fedfm.core.task import Examples
from fedfm.models.foundation import flops_per_token
from fedfm.tuning.sites import BankedModel

Call = Callable[[torch.Tensor, dict[str, torch.Tensor], Batch], torch.Tensor]

# Twice the seconds that compiling a small Llama takes on a quiet machine, and about the share of a round that it saves.
SECONDS, SAVED = 90.0, 0.1
# Operations in a second of the machine that the choice is made for. The clock must not decide, so it is a constant: a small CPU.
SPEED = 1e11
# Owners whose rows tell the usual number of tokens.
_SAMPLE = 64
# How far trainable tensors are moved before gradients are compared, so that nothing is zero.
_SCALE = 0.02
# Settings of torch with which it compiles: a tensor that hooks reach may change its size, and no code is taken from a cache, where other sizes
# may have shaped it.
_SETTINGS = (
    ("torch._dynamo.config", {"force_nn_module_property_static_shapes": False}),
    ("torch._inductor.config", {"fx_graph_cache": False}),
    ("torch._functorch.config", {"enable_autograd_cache": False}),
)
BACKEND = "inductor"


def supported(house: House) -> str | None:
    """Why this model should not be compiled here; ``None`` where it may be."""
    if not isinstance(house.tuned, BankedModel):
        return f"{type(house.plan.tuning).__name__} replaces the model's own parameters in each call"
    if house.plan.local.work.poisson:
        return "batches drawn by Poisson sampling differ in size"
    if house.foundation.device.type == "mps":
        return "torch does not compile for MPS well enough"
    if house.foundation.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler (g++, or what CXX names)"
    if getattr(house.plan.tuning, "dropout", 0.0):
        return "dropout draws each client's mask outside the graph"
    return None


def pays(house: House, bank: int) -> bool:
    """Whether the planned steps would save more seconds than compiling takes, by arithmetic alone."""
    work, sample = house.plan.local.work, list(islice(_sets(house), _SAMPLE))
    if house.num_rounds == 0 or not sample:
        return False
    rows = work.batch_size or float(np.mean([len(examples) for examples in sample]))
    passes = [math.ceil(len(examples) / (work.batch_size or len(examples))) for examples in sample]
    steps = work.steps if work.steps is not None else (work.epochs or 0) * float(np.mean(passes))
    tokens = rows * work.accumulate * float(np.mean([examples.lengths.mean() for examples in sample]))
    each = flops_per_token(house.foundation.num_params, house.tuned.spec.size)
    seconds = house.num_rounds * max(house.cohort_size, 1) * steps * tokens * each / SPEED
    return bank > 1 and SAVED * seconds > SECONDS


def compile_base(house: House, clients: int) -> str | None:
    """Compiles the model for training with a bank of ``clients``; leaves it eager and says why where that fails."""
    reason = supported(house)
    if reason is not None:
        return reason
    tuned, trial = house.tuned, _Trial.of(house, clients)
    assert isinstance(tuned, BankedModel)
    if trial is None:
        return "no owner has training examples"
    usual = trial.gradient(house)
    try:
        with warnings.catch_warnings(action="ignore"), _settings():
            call = partial(tuned.call, of=house.plan.task.losses)
            compiled = torch.compile(call, dynamic=False, fullgraph=True, backend=BACKEND)
            tuned.compiled = partial(_marked, compiled)
            changed = trial.gradient(house)
    except Exception as error:  # a compiler raises what it likes
        tuned.compiled = None
        return f"the compiler failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    difference = float((changed - usual).norm() / usual.norm().clamp(min=1e-30))
    tolerance = 1e-3 if house.foundation.model.dtype == torch.float32 else 0.1
    # Written so that NaN is refused.
    if not difference <= tolerance:
        tuned.compiled = None
        return f"the compiled model's gradient differs from the eager one's by {difference:.1e} of its norm"
    tuned.compiled = partial(_covered, compiled)
    return None


def _marked(compiled: Call, theta_kd: torch.Tensor, inputs: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """The first call, which compiles: says that lengths change from step to step. A size of 1 is taken for fixed.

    Clients and rows stay numbers: with their product unknown the code divides indices for each value, and takes longer than eager.
    """
    for x in inputs.values():
        torch._dynamo.maybe_mark_dynamic(x, 2)
    for x in (batch.pick_p, batch.row_q, batch.owner_q, *batch.targets.values()):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return compiled(theta_kd, inputs, batch)


def _covered(compiled: Call, theta_kd: torch.Tensor, inputs: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Every later call: what the compiled code does not cover runs eagerly."""
    with torch.compiler.set_stance("eager_on_recompile"):
        return compiled(theta_kd, inputs, batch)


@dataclass(frozen=True)
class _Trial:
    """A training step that is the same in an unbroken run and in a resumed one."""

    theta_kd: torch.Tensor
    batch: Batch
    dropout: list[Key]

    @staticmethod
    def of(house: House, clients: int) -> _Trial | None:
        """The first owners' first rows, and trainable tensors that are moved a little; ``None`` where nobody has rows."""
        sets = list(islice(_sets(house), clients))
        if not sets:
            return None
        bank, key, work = house.bank, house.key.fold("compile"), house.plan.local.work
        chosen = [sets[i % len(sets)] for i in range(clients)]
        rows = [
            house.plan.task.rows(examples, np.arange(min(len(examples), work.batch_size or len(examples))), key.fold("rows").numpy())
            for examples in chosen
        ]
        start_d = bank.tuned.spec.flatten(house.start)
        noise_kd = torch.randn(clients, len(start_d), generator=key.fold("move").generator())
        theta_kd = (start_d + _SCALE * noise_kd).to(bank.device)
        return _Trial(theta_kd, bank.learner.batch(rows), [key.fold("dropout", i) for i in range(clients)])

    def gradient(self, house: House) -> torch.Tensor:
        """The gradient of the sum of the losses ``(K, D)``."""
        theta_kd = self.theta_kd.clone().requires_grad_(True)
        with torch.enable_grad():
            loss = house.bank.learner.losses(theta_kd, self.batch, self.dropout).sum()
            (grad_kd,) = torch.autograd.grad(loss, theta_kd)
        return grad_kd.float()


def _sets(house: House) -> Iterator[Examples]:
    """The owners' training examples, without those who have none."""
    return (examples for examples in house.training_sets() if len(examples))


@contextmanager
def _settings() -> Iterator[None]:
    with ExitStack() as stack:
        for name, values in _SETTINGS:
            module = importlib.import_module(name)
            known = {option: value for option, value in values.items() if hasattr(module, option)}
            stack.enter_context(module.patch(known))
        yield

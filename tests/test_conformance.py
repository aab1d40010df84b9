"""The public suites catch what they are there to catch: each broken part here fails with the law's name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fedfm.core.parts import Aggregator, GradientTrainer, Sampler, ServerOptimizer, Transform, Update, Work
from fedfm.core.task import Task
from fedfm.models.tokenizer import load_tokenizer
from fedfm.server import FedAvg
from fedfm.tasks import CausalLM
from fedfm.testing import (
    check_aggregator,
    check_local,
    check_part,
    check_sampler,
    check_server,
    check_task,
    check_transform,
    check_tuning,
    examples,
    tiny,
)
from fedfm.tuning import LoRA
from fedfm.tuning.base import Tuning, WrappedTuning
from fedfm.tuning.sites import BankedModel


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

    def sample(self, clients, state, ctx):
        return list(clients)[::-1], state

    def cohort_size(self, num_clients):
        return num_clients


@dataclass(frozen=True)
class Boastful(Sampler):
    """Promises more than it gives."""

    def sample(self, clients, state, ctx):
        return list(clients)[:3], state

    def cohort_size(self, num_clients):
        return num_clients


class Worker:
    """What the broken trainers share."""

    work = Work(4, 10, None)

    def lr_at(self, step, num_steps, round):
        return 0.1


@dataclass(frozen=True)
class Sociable(GradientTrainer):
    """Steps along the mean of the cohort's gradients."""

    lr_at, work = Worker.lr_at, Worker.work

    def step(self, cohort, grad_kd, lr_k, step):
        cohort.theta_kd.sub_(lr_k * grad_kd.mean(dim=0))


@dataclass(frozen=True)
class Uphill(GradientTrainer):
    """Steps along the gradient, not against it."""

    lr_at, work = Worker.lr_at, Worker.work

    def step(self, cohort, grad_kd, lr_k, step):
        cohort.theta_kd.add_(lr_k * grad_kd)


@dataclass(frozen=True)
class Smuggler(GradientTrainer):
    """Adds a leaf that it does not declare."""

    lr_at, work = Worker.lr_at, Worker.work

    def step(self, cohort, grad_kd, lr_k, step):
        cohort.theta_kd.sub_(lr_k * grad_kd)

    def finish(self, cohort, lr_sum_k, steps_k):
        return {"extra": torch.ones(len(steps_k))}


class FirstForAll(BankedModel):
    """Rows of every client meet the first one's tensors."""

    def bind(self, theta_kd, dropout=None):
        super().bind(theta_kd[:1].expand_as(theta_kd), dropout)


@dataclass(frozen=True)
class Crowded(Tuning):
    """LoRA in a bank that is none."""

    def attach(self, foundation):
        tuned = LoRA().attach(foundation)
        tuned.__class__ = FirstForAll
        return tuned

    def save(self, foundation, params, folder):
        LoRA().save(foundation, params, folder)

    def merge(self, foundation, params):
        return LoRA().merge(foundation, params)


@dataclass(frozen=True)
class Forgetful(Tuning):
    """Saves what it began with."""

    def attach(self, foundation):
        return LoRA().attach(foundation)

    def save(self, foundation, params, folder):
        LoRA().save(foundation, {name: 0 * leaf for name, leaf in params.items()}, folder)

    def merge(self, foundation, params):
        return LoRA().merge(foundation, params)


@dataclass(frozen=True)
class Wearing(Tuning):
    """Folds what was trained into the base itself."""

    def attach(self, foundation):
        return LoRA().attach(foundation)

    def save(self, foundation, params, folder):
        LoRA().save(foundation, params, folder)

    def merge(self, foundation, params):
        merged = LoRA().merge(foundation, params)
        foundation.model.load_state_dict(merged.state_dict())
        return merged


@dataclass(frozen=True)
class Wandering(WrappedTuning):
    """Sends leaves that do not train."""

    inner: Tuning

    def travels(self, spec):
        return (*spec.names, "model.embed_tokens.weight")


def first_row(tree):
    """``A`` of rank 1; ``B`` as it is."""
    return {name: leaf[:1] if "lora_A" in name else leaf for name, leaf in tree.items()}


def second_row(tree, value):
    return {name: torch.nn.functional.pad(leaf, (0, 0, 0, 1), value=value) if "lora_A" in name else leaf for name, leaf in tree.items()}


@dataclass(frozen=True)
class Halved(WrappedTuning):
    """Cuts one factor alone, so that the rest of it trains."""

    inner: Tuning

    def cut(self, tree, own):
        return first_row(tree)

    def pad(self, tree, spec, own):
        return second_row(tree, 0.0)


@dataclass(frozen=True)
class Noisy(WrappedTuning):
    """Pads with ones."""

    inner: Tuning

    def cut(self, tree, own):
        return first_row(tree)

    def pad(self, tree, spec, own):
        return second_row(tree, 1.0)


@dataclass(frozen=True)
class Shrinking(WrappedTuning):
    """Does not pad what it cut."""

    inner: Tuning

    def cut(self, tree, own):
        return first_row(tree)


@dataclass(frozen=True)
class Scribbling(Task):
    """Masks the examples themselves."""

    max_length: int = 16
    columns = CausalLM().columns

    def encoder(self, tokenizer):
        return CausalLM(max_length=self.max_length).encoder(tokenizer)

    def rows(self, examples, index, rng):
        rows = CausalLM().rows(examples, index, rng)
        for i in index:
            examples.ids(int(i))[0] = 0
        return rows

    def summarise(self, sums):
        return CausalLM().summarise(sums)


@dataclass(frozen=True)
class Averaging(Task):
    """Gives means instead of sums."""

    max_length: int = 16
    columns = CausalLM().columns

    def encoder(self, tokenizer):
        return CausalLM(max_length=self.max_length).encoder(tokenizer)

    def rows(self, examples, index, rng):
        return CausalLM().rows(examples, index, rng)

    def stats(self, logits_pc, batch, owner_q, num_clients):
        sums = super().stats(logits_pc, batch, owner_q, num_clients)
        return {name: x / sums["targets"].clamp(min=1) for name, x in sums.items()}

    def summarise(self, sums):
        return CausalLM().summarise(sums)


@dataclass(frozen=True)
class Mingling(Task):
    """Gives an owner's examples to the next one where several are encoded at once."""

    max_length: int = 16
    columns = CausalLM().columns

    def encoder(self, tokenizer):
        encoder = CausalLM(max_length=self.max_length).encoder(tokenizer)

        class Mingled(type(encoder)):
            @classmethod
            def add_all(cls, work):
                examples = super().add_all(work)
                return [*examples[1:], *examples[:1]]

        encoder.__class__ = Mingled
        return encoder

    def rows(self, examples, index, rng):
        return CausalLM().rows(examples, index, rng)

    def summarise(self, sums):
        return CausalLM().summarise(sums)


def check_tiny_task(task: Task) -> None:
    check_task(task, [{"text": text} for text in tiny.TEXT[:9]], load_tokenizer(tiny.tokenizer_folder()))


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
        (check_local, Sociable(), "depend on who shares its bank"),
        (check_local, Uphill(), "downhill"),
        (check_local, Smuggler(), "other leaves than are declared"),
        (check_tuning, Crowded(), "client 0.s gradient depends on who shares its bank"),
        (check_tuning, Forgetful(), "what was saved says something else"),
        (check_tuning, Wearing(), "changed the base"),
        (check_tuning, Wandering(LoRA(r=2)), "names leaves that do not train"),
        (check_tuning, Halved(LoRA(r=2)), "does not hold would train"),
        (check_tuning, Noisy(LoRA(r=2)), "not zero beyond"),
        (check_tuning, Shrinking(LoRA(r=2)), r"pad: tensor .* expected"),
        (check_tiny_task, Scribbling(), "changed the examples"),
        (check_tiny_task, Averaging(), "do not add up"),
        (check_tiny_task, Mingling(), "whose rows are encoded with them"),
        (check_part, Thawed(), "not frozen"),
        (check_part, Steeper(), "inherits"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else x,
)
def test_a_broken_part_fails(suite, part, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        suite(part)


def test_a_part_without_an_example_fails() -> None:
    with pytest.raises(AssertionError, match=r"transforms\.CentralDP"):
        examples("transforms", {})

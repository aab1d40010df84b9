"""What every tuning must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedfm.core.batch import Batch
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.messages import Scalar
from fedfm.core.parts import ClientId
from fedfm.core.tree import Spec, Tree
from fedfm.models import Foundation, Model, load
from fedfm.testing import tiny
from fedfm.testing.parts import check_part, fits, same
from fedfm.tuning.base import Tuned, Tuning


def check_tuning(
    tuning: Tuning, make: Callable[[], Foundation] = tiny.foundation, tolerance: float = 1e-5, clients: tuple[ClientId, ...] = ("client0",)
) -> None:
    """The key alone decides the start; each client's rows meet its own tensors and nobody else's; the base stays as it was; what is saved and
    what is merged computes the same outside; what travels is part of what trains; what a client holds of it is what it trains.

    Args:
        make: A fresh base with the same weights each time, on the CPU; one that the tuning fits.
        tolerance: Of logits, relative to the largest.
        clients: Clients of every size that the tuning knows.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(tuning)
    name, foundation = type(tuning).__name__, make()
    published = {leaf: p.clone() for leaf, p in foundation.model.state_dict().items()}
    tuned = tuning.attach(foundation)
    assert tuned.spec.names and len(set(tuned.spec.names)) == len(tuned.spec.names), f"{name} trains {tuned.spec.names}"
    params = dict(tuned.init(Key.root(0)))
    fits(tuned.spec, params, f"{name}.init")
    assert same(params, tuned.init(Key.root(0))) and same(params, tuning.attach(make()).init(Key.root(0))), (
        f"{name}.init is not decided by the key"
    )

    params = tiny.disturbed(params)
    theta_d = tuned.spec.flatten(params)
    batch = tiny.batch_of(foundation)
    said = _say(tuned, theta_d.unsqueeze(0), batch)
    assert said.shape[0] == len(batch.pick_p) and said.isfinite().all(), (
        f"{name}: logits {tuple(said.shape)}, finite: {said.isfinite().all()}"
    )
    assert torch.equal(said, _say(tuned, theta_d.unsqueeze(0), batch)), f"{name}: the same tensors and rows give other logits a second time"
    _check_gradients(name, tuned, theta_d, batch)
    _check_travels(name, tuning.travels(tuned.spec), tuned.spec)
    for client in clients:
        _check_size(name, tuning, tuned, params, tuning.own(client), batch)
    if tuned.banks:
        _check_bank(name, tuned, foundation, params, tolerance)

    def agrees(model: Any, what: str) -> None:
        difference = float((tiny.logits_of(model.eval(), batch) - said).abs().max() / said.abs().max())
        assert difference <= tolerance, f"{name}: {what} says something else, by {difference:.1e}"

    with TemporaryDirectory() as folder:
        tuning.save(foundation, params, Path(folder, "saved"))
        agrees(_open(Path(folder, "saved"), make()), "what was saved")
    try:
        merged = tuning.merge(foundation, params)
    except ConfigError:
        merged = None  # It lives in the input, and says so.
    if merged is not None:
        agrees(merged, "the merged model")
        assert not any("lora" in leaf or "base_layer" in leaf for leaf in merged.state_dict()), f"{name}: the merged model is no plain one"
    after = foundation.model.state_dict()
    common = published.keys() & after.keys()
    assert common and all(torch.equal(published[leaf], after[leaf]) for leaf in common), f"{name} changed the base"
    assert torch.equal(said, _say(tuned, theta_d.unsqueeze(0), batch)), f"{name}: saving or merging changed what the tuned model says"


@torch.no_grad()
def _say(tuned: Tuned, theta_kd: torch.Tensor, batch: Batch) -> torch.Tensor:
    tuned.bind(theta_kd)
    return tuned.logits(batch).float()


def _gradient(tuned: Tuned, theta_kd: torch.Tensor, batch: Batch) -> torch.Tensor:
    theta_kd = theta_kd.clone().requires_grad_(True)
    tuned.bind(theta_kd)
    loss = torch.nn.functional.cross_entropy(tuned.logits(batch).float(), batch.targets["labels"], reduction="sum")
    (grad_kd,) = torch.autograd.grad(loss, theta_kd)
    return grad_kd


def _check_gradients(name: str, tuned: Tuned, theta_d: torch.Tensor, batch: Batch) -> None:
    (grad_d,) = _gradient(tuned, theta_d.unsqueeze(0), batch)
    assert grad_d.isfinite().all(), f"{name}: a gradient that is not finite"
    idle = [leaf for leaf, g in tuned.spec.unflatten(grad_d).items() if not g.any()]
    assert not idle, f"{name}: {idle} do not train"


def _check_travels(name: str, names: tuple[str, ...], spec: Spec) -> None:
    chosen = set(names)
    assert names and names == tuple(leaf for leaf in spec.names if leaf in chosen), (
        f"{name}.travels names leaves that do not train, or not in their order: {names}"
    )


def _check_size(name: str, tuning: Tuning, tuned: Tuned, params: Tree, own: Mapping[str, Scalar], batch: Batch) -> None:
    """What a client holds comes back as it was cut, with zeros beyond that stay zero in training."""
    assert all(isinstance(value, Scalar) for value in own.values()), f"{name}.own gives what is neither text nor a number: {dict(own)}"
    held = tuning.cut(params, own)
    full = tuning.pad(held, tuned.spec, own)
    fits(tuned.spec, full, f"{name}.pad")
    assert same(tuning.cut(full, own), held), f"{name}: cut does not undo pad, for a client with {dict(own)}"
    ones = tuning.pad({leaf: torch.ones_like(x) for leaf, x in held.items()}, tuned.spec, own)
    assert sum(int(x.count_nonzero()) for x in ones.values()) == sum(x.numel() for x in held.values()), f"{name}.pad is not zero beyond"
    beyond_d = tuned.spec.flatten(ones) == 0
    (grad_d,) = _gradient(tuned, tuned.spec.flatten(full).unsqueeze(0), batch)
    assert not grad_d[beyond_d].any(), f"{name}: what a client with {dict(own)} does not hold would train"
    one, *_ = held
    assert same(tuning.pad({one: held[one]}, tuned.spec, own), {one: full[one]}), f"{name}.pad needs leaves that may stay at home"


def _check_bank(name: str, tuned: Tuned, foundation: Foundation, params: Tree, tolerance: float) -> None:
    """Logits and gradients of three clients in one batch are those of each alone."""
    num = 3
    theta_kd = torch.stack([tuned.spec.flatten(tiny.disturbed(dict(params), seed)) for seed in range(num)])
    together = tiny.batch_of(foundation, clients=num)
    ids = together.inputs["input_ids"].chunk(num)
    said, grad_kd = _say(tuned, theta_kd, together), _gradient(tuned, theta_kd, together)
    for k in range(num):
        alone = replace(tiny.batch_of(foundation), inputs={"input_ids": ids[k]})
        said_alone, grad_1d = _say(tuned, theta_kd[k : k + 1], alone), _gradient(tuned, theta_kd[k : k + 1], alone)
        assert (said[together.owner_q == k] - said_alone).abs().max() <= tolerance * said_alone.abs().max(), (
            f"{name}: row block {k} is not computed with client {k}"
        )
        assert (grad_kd[k] - grad_1d[0]).norm() <= 10 * tolerance * grad_1d.norm(), (
            f"{name}: client {k}'s gradient depends on who shares its bank"
        )


def _open(folder: Path, base: Foundation) -> Any:
    """What is saved, as the rest of the world opens it: an adapter with ``peft``, a model with ``transformers``."""
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(base.model, str(folder))
    return load(Model(str(folder)), base.head, base.labels, "cpu").model

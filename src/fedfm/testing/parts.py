"""What every part must do, and examples of parts for the suites."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import torch

from fedfm.core import registry
from fedfm.core.errors import MessageError
from fedfm.core.keys import Key
from fedfm.core.parts import Part, RoundContext, Spec, Tree


def examples(room: str, made: Mapping[str, list[Part]]) -> list[Any]:
    """At least one example of every part in the index: from ``made`` by name, else built without arguments.

    Raises:
        AssertionError: naming a part that has no example and cannot be built without arguments.
    """
    parts: list[Any] = []
    for name, entry in registry.entries(room).items():
        if entry.load().room != room:
            continue  # A method's own trainer or server step is under the method's tests.
        if name not in made:
            try:
                parts.append(entry.load()())
            except Exception as error:
                raise AssertionError(f"{room}.{name} cannot be built without arguments; give the suite an example of it.") from error
        parts.extend(made.get(name, []))
    return parts


def check_part(part: Part) -> None:
    """A part is a frozen, final dataclass that says what it is.

    Raises:
        AssertionError: naming the law that is broken.
    """
    cls = type(part)
    assert is_dataclass(part), f"{cls.__name__} is no dataclass"
    assert cls.room in registry.ROOMS, f"{cls.__name__} belongs to no room"
    assert len(cls.__mro__) > 2 and not is_dataclass(cls.__bases__[0]), f"{cls.__name__} inherits from more than its room's ABC"
    assert (cls.__doc__ or "").strip() and not (cls.__doc__ or "").startswith(f"{cls.__name__}("), f"{cls.__name__} has no docstring"
    for item in fields(part):
        try:
            setattr(part, item.name, getattr(part, item.name))
        except FrozenInstanceError:
            continue
        raise AssertionError(f"{cls.__name__} is not frozen: {item.name} could be set")
    assert eval(repr(part), _names(part)) == part, f"{cls.__name__}: the repr does not build the part again: {part!r}"
    assert copy.deepcopy(part) == part == pickle.loads(pickle.dumps(part)), f"{cls.__name__} does not survive a copy"


def context(params: Tree, round: int = 1, num_clients: int = 10, client: str | None = None, seed: int = 0) -> RoundContext:
    """The context of a round."""
    return RoundContext(round, Key.root(seed), params, num_clients, client)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A small tree with awkward shapes: a scalar, a single value, an odd length, a stack of matrices."""
    generator = Key.root(0).fold("parameters").generator()
    shapes = {"model.b.weight": (3, 5), "model.a.bias": (7,), "scale": (), "one": (1,), "stack": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def like(params: Tree, *names: str | int) -> dict[str, torch.Tensor]:
    """A tree of the same shapes, drawn for ``names``."""
    generator = Key.root(0).fold("like", *names).generator()
    return {name: torch.randn(leaf.shape, generator=generator).to(leaf.dtype) for name, leaf in params.items()}


def fits(spec: Spec, tree: Tree, what: str) -> None:
    """``spec.require`` as a law."""
    try:
        spec.require(tree, what)
    except MessageError as error:
        raise AssertionError(str(error)) from error


def same(x: Tree, y: Tree) -> bool:
    """Same names in the same order, same dtypes and bits."""
    return list(x) == list(y) and all(x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]) for name in x)


def copied(tree: Tree) -> dict[str, torch.Tensor]:
    """The tree in other memory."""
    return {name: leaf.clone() for name, leaf in tree.items()}


def _names(value: Any) -> dict[str, type]:
    classes = {type(value).__name__: type(value)}
    for item in fields(value):
        inner = getattr(value, item.name)
        if isinstance(inner, Part):
            classes.update(_names(inner))
    return classes

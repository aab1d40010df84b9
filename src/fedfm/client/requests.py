"""What a client makes of a request: its own numbers, and the parameters that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fedfm.client.house import House
from fedfm.core.errors import MessageError
from fedfm.core.messages import Body, ClientId, Request, Scalar
from fedfm.core.parts import COUNTED, ServerState
from fedfm.core.tree import Spec, Tree

# Where a client's memory keeps the parameters that stay at home.
HOME = "home/"


class Start(NamedTuple):
    """A client's parameters before its work.

    Args:
        params: Those that travel, as the client holds them.
        all: All that train, at full size: what travelled, and what stays at home.
        is_own: Whether this start is not everybody's.
    """

    params: Tree
    all: Tree
    is_own: bool


def counted(state: ServerState, client: ClientId) -> dict[str, Scalar]:
    """The part of a request that says which of the client's tickets was counted last."""
    return {COUNTED: state.counted[client]} if client in state.counted else {}


def number(own: Mapping[str, Scalar], name: str) -> int | None:
    """A count in a request's own part.

    Raises:
        MessageError: if it is something else.
    """
    value = own.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise MessageError(f"a request's {name} is {value!r:.20}, not a count.")
    return value


def remembered(client: ClientId, request: Request, house: House) -> Tree:
    """What the client remembered when the server last counted it.

    Raises:
        FedfmError: if that is damaged or gone, or the request names no ticket of its.
    """
    return house.memory.load(client, number(request.own, COUNTED))


def stays_home(house: House) -> bool:
    """Whether some parameters never leave their client."""
    spec = house.tuned.spec
    return set(house.plan.tuning.travels(spec)) != set(spec.names)


def require_parameters(body: Body, house: House) -> None:
    """Refuses a body that does not hold the parameters that travel, with the model's shapes and types, and finite.

    Raises:
        MessageError: naming the first that is missing or wrong.
    """
    spec = house.tuned.spec
    travelling = set(house.plan.tuning.travels(spec))
    missing = [name for name in spec.names if name in travelling and name not in body.tensors]
    if missing:
        raise MessageError(f"a request to {body.verb} must hold the parameters; {missing[:3]} are missing.")
    rows = [row for row in zip(spec.names, spec.shapes, spec.dtypes, strict=True) if row[0] in travelling]
    names, shapes, dtypes = zip(*rows, strict=True) if rows else ((), (), ())
    Spec(names, shapes, dtypes).require({name: body.tensors[name] for name in names}, f"a request to {body.verb}")


def start_of(sent: Tree, own: Mapping[str, Scalar], memory: Tree, house: House) -> Start:
    """What a client starts from.

    Args:
        sent: The parameters that travel, at full size, as :func:`require_parameters` lets them pass.
        own: The client's own numbers.
        memory: What it remembers.
    """
    tuning, spec = house.plan.tuning, house.tuned.spec
    sent = {name: sent[name] for name in tuning.travels(spec)}
    params = tuning.cut(sent, own)
    full = tuning.pad(params, spec, own)
    if not stays_home(house):
        return Start(params, full, params.keys() != sent.keys() or any(params[name] is not sent[name] for name in sent))
    kept = under(HOME, memory)
    # The order is the specification's, which is how a row of the bank is laid out.
    return Start(params, {name: full[name] if name in full else kept.get(name, house.start[name]) for name in spec.names}, True)


def under(prefix: str, tree: Tree) -> dict[str, torch.Tensor]:
    """The leaves of a tree whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): leaf for name, leaf in tree.items() if name.startswith(prefix)}

"""What all clients of one sum agree on before a mask is made, and its digest: the *context*.

Every mask, share and signature is bound to the context, so masks of clients that were told different things do not cancel, and shares of one sum open
nothing of another. It holds: the job, the verb with its round and attempt, the digest of what all are asked (model and settings), the order of the clients with their
identities, session keys and nonces, the graph's numbers, and the quantiser. Each client draws a new nonce for each sum, so no context comes twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fedfm.core.errors import MessageError
from fedfm.secagg.graph import Graph, design

VERSION = 1
U8 = npt.NDArray[np.uint8]
# A message of a protocol: arrays by name.
Arrays = Mapping[str, npt.NDArray[Any]]


class Abort(MessageError):
    """A client gives a sum up: the server, or somebody through it, does what no honest one would."""


@dataclass(frozen=True)
class Rules:
    """What a client itself knows of how sums are made: the numbers of its own plan.

    Args:
        corrupt: Share of the clients that may collude with the server.
        dropout: Share of the clients that may drop out.
        min_clients: No sum of fewer is made.
        threshold: Shares that open a secret, where the graph is complete; ``None`` for as many as are needed.
        reach: See :class:`fedfm.secagg.quantise.Quantiser`.
        max_weight: The same.
    """

    corrupt: float
    dropout: float
    min_clients: int
    threshold: int | None
    reach: float
    max_weight: float

    def graph(self, n: int) -> Graph:
        """The graph of ``n`` clients.

        Raises:
            Abort: if there is none.
        """
        if n < max(3, self.min_clients):
            raise Abort(f"a secure sum of {n} clients is refused; the plan wants {max(3, self.min_clients)} or more.")
        try:
            return design(n, self.corrupt, self.dropout, self.threshold)
        except ValueError as error:
            raise Abort(f"{error}.") from error


@dataclass(frozen=True)
class Terms:
    """What the server proposes for a sum.

    Args:
        job: Which run.
        errand: Which of its errands: verb, round, attempt.
        names: The clients, sorted.
        k: Neighbours of each.
        t: Shares that open a secret.
        min_clients: No sum of fewer is opened.
        reach: Of the quantiser.
        max_weight: Of the quantiser.
        body: Digest of what all are asked.
        quantiser: Digest of the quantiser.
        uniform: Whether every client counts as one.
        version: Of the protocol.
    """

    job: str
    errand: str
    names: tuple[str, ...]
    k: int
    t: int
    min_clients: int
    reach: float
    max_weight: float
    body: str
    quantiser: str
    uniform: bool
    version: int = VERSION

    def to_json(self) -> str:
        """As text; the same for the same terms."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: object) -> Terms:
        """Undoes :meth:`to_json`.

        Raises:
            MessageError: if it is not what that could have made.
        """
        try:
            values = json.loads(text) if isinstance(text, str) else None
            if not isinstance(values, dict) or values.keys() != {item.name for item in fields(Terms)}:
                raise ValueError("other fields are expected")
            values["names"] = tuple(values["names"])
            kinds = {"k": int, "t": int, "min_clients": int, "version": int, "uniform": bool, "reach": float, "max_weight": float}
            for name, value in values.items():
                if name != "names" and type(value) is not kinds.get(name, str):
                    raise ValueError(f"{name} is of another kind")
            if not all(isinstance(name, str) for name in values["names"]):
                raise ValueError("a name is no text")
            return Terms(**values)
        except (ValueError, TypeError, RecursionError) as error:
            raise MessageError(f"the terms of a secure sum cannot be read: {error}.") from error


# A client's first message: bytes of each field.
HELLO = {"key": 1216, "nonce": 32, "lot": 32, "identity": 32, "signature": 64}
LOT = 32
"""Bytes of a client's lot."""


def hello_message(job: str, errand: str, name: str, key: bytes, nonce: bytes, lot: bytes) -> bytes:
    """What a client signs when it says which key it has in this sum, and commits to its lot."""
    return packed(b"fedfm secagg hello 1", job.encode(), errand.encode(), name.encode(), key, nonce, lot)


def lot_commitment(lot: bytes) -> bytes:
    """Binds a client to its lot before it knows the others', 32 bytes."""
    return hashlib.blake2b(lot, digest_size=32, person=b"fedfm lot").digest()


def context_of(terms: Terms, roster: Arrays) -> bytes:
    """The context, 32 bytes.

    Args:
        roster: The clients' first messages, an array with a row for each client.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"fedfm secagg 1")
    digest.update(packed(terms.to_json().encode(), *(np.ascontiguousarray(roster[name]).tobytes() for name in HELLO)))
    return digest.digest()


def order_seed(context: bytes, lots: npt.NDArray[Any]) -> bytes:
    """What the order of the clients on the graph's ring is drawn from: their lots, to which all were committed before one was told.

    Args:
        lots: A row for each client.
    """
    return hashlib.blake2b(packed(b"fedfm secagg order 1", context, np.ascontiguousarray(lots).tobytes()), digest_size=32).digest()


def survivors_message(context: bytes, shared: Sequence[int], survivors: Sequence[int]) -> bytes:
    """What a client signs when it is told over whom the sum is."""
    return packed(b"fedfm secagg survivors 1", context, _indices(shared), _indices(survivors))


def commitment(context: bytes, kind: bytes, owner: int, holder: int, share: bytes) -> bytes:
    """Binds a client to a share that it deals, 32 bytes; the share is random, so this hides it."""
    return hashlib.blake2b(
        packed(b"share 1", context, kind, owner.to_bytes(4, "big"), (holder + 1).to_bytes(4, "big"), share), digest_size=32
    ).digest()


def packed(*parts: bytes) -> bytes:
    """Parts, each with its length, so that no two lists of parts read the same."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def index_set(values: Sequence[int], n: int, what: str) -> tuple[int, ...]:
    """Places in the order of the clients, checked.

    Raises:
        Abort: if they are not sorted, come twice, or name nobody.
    """
    places = tuple(int(value) for value in values)
    if any(a >= b for a, b in pairwise(places)) or any(not 0 <= place < n for place in places):
        raise Abort(f"{what} names a client twice, out of order, or one that is not in the roster.")
    return places


def _indices(values: Sequence[int]) -> bytes:
    return np.asarray(values, dtype=">u4").tobytes()

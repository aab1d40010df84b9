"""Randomness is an argument with a name.

A :class:`Key` is a point in a tree of names. ``key.fold("noise", round, client)`` is the same
key on any engine, in any order, after any restart, so whatever is drawn from it is too.
Keys are for simulation and sampling; secrets and privacy noise never come from here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Key:
    """A named stream of randomness.

    Example:
        >>> Key.root(0).fold("sampler", 3) == Key.root(0).fold("sampler").fold(3)
        True
    """

    digest: bytes

    @staticmethod
    def root(seed: int) -> Key:
        """The key from which a run derives every other."""
        return Key(hashlib.blake2b(b"fedfm" + str(int(seed)).encode(), digest_size=32).digest())

    def fold(self, *names: str | int) -> Key:
        """The key one or more names further down the tree."""
        digest = self.digest
        for name in names:
            # The type tag keeps fold(1) and fold("1") apart.
            tag = b"i" if isinstance(name, int) else b"s"
            digest = hashlib.blake2b(digest + tag + str(name).encode(), digest_size=32).digest()
        return Key(digest)

    def seed(self) -> int:
        """63 bits, for generators that take an integer."""
        return int.from_bytes(self.digest[:8], "little") >> 1

    def uniform(self) -> float:
        """One number in ``[0, 1)``."""
        return (self.seed() >> 10) / 2.0**53

    def generator(self, device: str | torch.device = "cpu") -> torch.Generator:
        """A torch generator at the start of this key's stream."""
        import torch

        return torch.Generator(device=device).manual_seed(self.seed())

    def numpy(self) -> np.random.Generator:
        """A NumPy generator at the start of this key's stream."""
        import numpy as np

        return np.random.Generator(np.random.PCG64(int.from_bytes(self.digest, "little")))

"""Examples held in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedfm.core.batch import IntArray
from fedfm.core.task import Example, Vocabulary


class Held:
    """A few examples whose classes are not known. Satisfies :class:`fedfm.core.task.Examples`."""

    def __init__(self, examples: Sequence[Example], vocabulary: Vocabulary) -> None:
        self.examples, self.vocabulary = examples, vocabulary

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> IntArray:
        """Number of tokens of each example ``(N,)``."""
        return np.array([len(example.ids) for example in self.examples], dtype=np.int64)

    def ids(self, i: int) -> IntArray:
        """Token ids of example ``i``."""
        return self.examples[i].ids

    def start(self, i: int) -> int:
        """Index of the first target of example ``i``."""
        return self.examples[i].start

    def label(self, i: int) -> int:
        """No class."""
        return -1

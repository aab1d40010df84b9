"""A part of an owner's examples."""

from __future__ import annotations

import numpy as np

from fedfm.core.batch import IntArray
from fedfm.core.task import Examples


class Sample:
    """At most ``most`` of some examples, evenly spread. Satisfies :class:`fedfm.core.task.Examples`."""

    def __init__(self, examples: Examples, most: int) -> None:
        self.examples, self.vocabulary = examples, examples.vocabulary
        self.index: IntArray = np.unique(np.linspace(0, len(examples) - 1, min(most, len(examples))).astype(np.int64))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> IntArray:
        """Number of tokens of each example."""
        return np.asarray(self.examples.lengths)[self.index]

    def ids(self, i: int) -> IntArray:
        """Token ids of example ``i``."""
        return self.examples.ids(int(self.index[i]))

    def start(self, i: int) -> int:
        """Index of the first target of example ``i``."""
        return self.examples.start(int(self.index[i]))

    def label(self, i: int) -> int:
        """Class of example ``i``."""
        return self.examples.label(int(self.index[i]))

"""Prepared data: a folder per owner, read through memory maps.

::

    <fingerprint>/
      owners.json             who there is, who was left out and why, the classes, rows that could not be used
      <slug of the owner>/
        shard.json            what a process that may see this owner alone has to know
        train.ids.npy         int32 token ids of all examples, one after the other
        train.index.npy       int64 (N, 3): where each example ends, its first target, its class
        test.ids.npy, test.index.npy
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fedfm.core import disk
from fedfm.core.bad_rows import BadRows
from fedfm.core.batch import IntArray
from fedfm.core.errors import DataError
from fedfm.core.task import Examples, Vocabulary

VERSION = 3
POOLED = "all"
_MAX_OPEN_FILES = 256


class Encoded:
    """Examples on disk, of one owner or of several one after the other, without copying. Satisfies :class:`fedfm.core.task.Examples`."""

    def __init__(self, stems: Sequence[tuple[str, int]], vocabulary: Vocabulary) -> None:
        # Splits without examples have no files.
        self._stems = [stem for stem, count in stems if count]
        self._starts = np.array([0, *accumulate(count for _, count in stems if count)])
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> IntArray:
        """Number of tokens of each example ``(N,)``."""
        empty = np.zeros(0, dtype=np.int64)
        return np.concatenate([empty, *(np.diff(_mapped(f"{stem}.index.npy")[:, 0], prepend=0) for stem in self._stems)])

    def ids(self, i: int) -> IntArray:
        """Token ids of example ``i``, ``(n,)``."""
        stem, j = self._find(i)
        index = _mapped(f"{stem}.index.npy")
        return _mapped(f"{stem}.ids.npy")[index[j - 1, 0] if j else 0 : index[j, 0]]

    def start(self, i: int) -> int:
        """Index of the first target of example ``i``."""
        stem, j = self._find(i)
        return int(_mapped(f"{stem}.index.npy")[j, 1])

    def label(self, i: int) -> int:
        """Class of example ``i``; -1 where there is none."""
        stem, j = self._find(i)
        return int(_mapped(f"{stem}.index.npy")[j, 2])

    def _find(self, i: int) -> tuple[str, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"There is no example {i}; there are {len(self)}.")
        part = 0 if len(self._stems) == 1 else int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._stems[part], i - int(self._starts[part])


class Shard:
    """What one owner has.

    Attributes:
        owner: Its name.
        labels: The classes of the whole federation, in the order of their indices.
        vocabulary: Vocabulary of the tokenizer that made the ids.
        train: Its training examples.
        test: Its held-out examples.
        tokens: Tokens of its training examples.
    """

    def __init__(
        self, owner: str, labels: tuple[str, ...], vocabulary: Vocabulary, folders: Sequence[tuple[Path, Mapping[str, Any]]]
    ) -> None:
        self.owner, self.labels, self.vocabulary = owner, labels, vocabulary
        self.train = Encoded([(f"{folder}/train", head["train"]) for folder, head in folders], vocabulary)
        self.test = Encoded([(f"{folder}/test", head["test"]) for folder, head in folders], vocabulary)
        self.tokens: int = sum(head["tokens"] for _, head in folders)
        self._histogram = _total(head["histogram"] for _, head in folders)

    @staticmethod
    def open(*folders: Path, owner: str | None = None) -> Shard:
        """The shard in an owner's folder; nothing outside of it is read.

        Args:
            folders: More than one gives their examples one after the other, under the name ``owner``.

        Raises:
            DataError: if it is not an owner's folder.
        """
        heads = [(folder, _read(folder / "shard.json")) for folder in folders]
        first = heads[0][1]
        known = first["vocabulary"]
        vocabulary = Vocabulary(known["size"], tuple(known["special"]), known["mask"])
        return Shard(owner or first["owner"], tuple(first["labels"]), vocabulary, heads)

    def histogram(self) -> dict[str, int]:
        """Training examples of each class; empty where there are no classes."""
        return dict(self._histogram)


class Owners:
    """Everybody's prepared data, without holding any of it.

    Attributes:
        ids: Owners with usable data, sorted.
        left_out: The others, and why.
        labels: Classes, in the order of their indices; empty where there are none.
        folder: The folder that holds all of it.
        fingerprint: Changes when the data, the task, the tokenizer or the seed does.
        dropped: Rows that gave nothing to learn from once they were tokenized.
        bad_rows: Rows that could not be used.
        read_as: How ``source`` and ``test`` were read, where that was looked for.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any], members: Mapping[str, tuple[str, ...]]) -> None:
        self._head, self._members, self.folder = head, members, folder
        self.ids = tuple(sorted(members))
        self.left_out: dict[str, str] = dict(head["left_out"])
        self.labels: tuple[str, ...] = tuple(head["labels"])
        self.fingerprint: str = head["fingerprint"]
        self.dropped: int = head["dropped"]
        self.bad_rows = BadRows.from_json(head["bad_rows"])
        self.read_as: dict[str, str] = dict(head["read_as"])

    @staticmethod
    def open(folder: Path) -> Owners:
        """What :func:`fedfm.data.prepare` left in ``folder``.

        Raises:
            DataError: if it is something else.
        """
        head = _read(folder / "owners.json")
        return Owners(folder, head, {owner: (owner,) for owner in head["owners"]})

    def path(self, owner: str) -> Path:
        """The folder of one owner: all that its own process needs, for :meth:`Shard.open`."""
        self._require(owner)
        return self.folder / disk.slug(owner)

    def shard(self, owner: str) -> Shard:
        """What ``owner`` has.

        Raises:
            DataError: if there is no such owner.
        """
        self._require(owner)
        return Shard.open(*(self.folder / disk.slug(member) for member in self._members[owner]), owner=owner)

    def only(self, owner: str) -> Owners:
        """A view in which this owner is the only one."""
        self._require(owner)
        return Owners(self.folder, self._head, {owner: self._members[owner]})

    def pooled(self) -> Owners:
        """A view in which a single owner, ``all``, holds everybody's examples: what centralised training sees."""
        return Owners(self.folder, self._head, {POOLED: tuple(member for owner in self.ids for member in self._members[owner])})

    def picture(self) -> list[dict[str, Any]]:
        """The split as rows to print or plot: ``owner``, ``train`` and ``test`` examples, training ``tokens``, ``labels`` (a histogram),
        ``bad_rows`` (a count of each kind, of those that name their owner)."""
        rows = []
        for owner in self.ids:
            heads = [self._head["owners"][member] for member in self._members[owner]]
            counts = {key: sum(head[key] for head in heads) for key in ("train", "test", "tokens")}
            bad = _total(self.bad_rows.owners.get(member, {}) for member in self._members[owner])
            rows.append({"owner": owner, **counts, "labels": _total(head["histogram"] for head in heads), "bad_rows": bad})
        return rows

    def _require(self, owner: str) -> None:
        if owner not in self._members:
            why = f" It was left out: {self.left_out[owner]}" if owner in self.left_out else ""
            raise DataError(f"There is no owner {owner!r} among the {len(self.ids)} with usable data.{why}")


def opened(examples: Examples) -> Examples:
    """The examples, their files opened, so that damaged ones are named before a bank begins."""
    lengths = examples.lengths
    if len(lengths) != len(examples):
        raise DataError(
            f"{len(lengths)} examples are there, and {len(examples)} were prepared. Clear the cache and prepare the data again."
        )
    # A truncated file lacks its end.
    if len(examples) and len(examples.ids(len(examples) - 1)) != lengths[-1]:
        raise DataError("its prepared token ids are fewer than its index says. Clear the cache and prepare the data again.")
    return examples


def write(path: Path, head: Mapping[str, Any]) -> None:
    """Writes an ``owners.json`` or ``shard.json``."""
    path.write_text(json.dumps({"version": VERSION, **head}, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path.parent} does not hold prepared data ({error}). Delete it to have it prepared again.") from error
    if not isinstance(head, dict) or head.get("version") != VERSION:
        raise DataError(f"{path} was prepared by another version of fedfm. Delete {path.parent} to have it prepared again.")
    return head


def _total(histograms: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return dict(sorted(total.items()))


# Every map holds a file descriptor, and there may be thousands of owners: the least recently used are let go.
# Prepared folders never change, so a map never goes stale.
@lru_cache(maxsize=_MAX_OPEN_FILES)
def _mapped(path: str) -> IntArray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Delete {Path(path).parent.parent} to have the data prepared again.") from error

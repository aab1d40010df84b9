"""Rows to examples on disk, once: one streaming pass (and one before it, where a partitioner must see all labels).

Memory stays bounded however large the files and however many the owners: rows wait in small groups
for the tokenizer, which takes those of many owners at once. What it makes waits too, and is appended to the owners' files, of which one is open at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from fedfm.core import disk
from fedfm.core.bad_rows import BadRows
from fedfm.core.batch import IntArray
from fedfm.core.errors import ConfigError, DataError
from fedfm.core.keys import Key
from fedfm.core.task import Encoder, Example, Task, tokenizer_words
from fedfm.data import owners as layout
from fedfm.data.owners import Owners
from fedfm.data.records import Record, name_in, unknown_label
from fedfm.data.row_check import RowCheck
from fedfm.data.sources import Source, open_source
from fedfm.data.spec import Data

log = logging.getLogger(__name__)

_GROUP = 256  # rows of one owner that are tokenized without waiting for others
_TOGETHER, _CHARACTERS = 1024, 1 << 18  # rows and characters of many owners that are tokenized together
_WAITING = 8_000_000  # characters that may wait for the tokenizer over all owners
_KEPT = 32_000_000  # bytes of examples that may wait to be written over all owners
_PART = 400  # bytes that Python takes for two arrays
_WRITTEN = 8192  # examples that become arrays at once
_REPORT = 1000
_NAMED = 20  # owners left out who are named in a warning

OwnerOf = Callable[[Record], str]


def prepare(
    data: Data,
    task: Task,
    tokenizer: Any,
    *,
    key: Key,
    max_context: int | None = None,
    classes: tuple[str, ...] = (),
    cache: Path | None = None,
    progress: Callable[[str, int], None] | None = None,
    columns: Mapping[str, Mapping[str, str]] | None = None,
    sole: str | None = None,
) -> Owners:
    """Everybody's examples, from the cache where nothing has changed.

    Args:
        tokenizer: A ``PreTrainedTokenizerFast``.
        key: Draws the partition and what is held out.
        max_context: The longest sequence that the model takes.
        classes: Classes of the base's own head, in its order. The order is kept where the owners' rows have the same classes.
        cache: Where prepared data is kept; default ``$FEDFM_CACHE/data``, else ``~/.cache/fedfm/data``.
        progress: Called with what is being done, and the number of rows so far.
        columns: For owners who name their columns otherwise: the owner's own name of each of the task's columns.
        sole: Whose all rows are, in a house of one owner; ``data.by`` and ``data.partition`` are not read then.

    Raises:
        DataError: if a file, row or column is unusable, as far as ``data.bad_rows`` lets rows stop it, or no owner is left.
        ConfigError: if the recipe does not say who owns a row, or asks for more than the model's context.
        RunError: if the cache cannot be written.
    """
    source = open_source(data.source, data.delimiter, data.encoding)
    test = open_source(data.test, data.delimiter, data.encoding) if data.test is not None else None
    if sole is not None:
        data = replace(data, by=None, partition=None)
    elif data.by is None and data.partition is None and source.owner is None:
        raise ConfigError(
            f"data does not say who owns the rows of {data.source}. Set 'by' to the column that names the owner, "
            "or 'partition' to simulate owners (for example IID(clients=8))."
        )
    if max_context is not None and task.max_length > max_context:
        raise ConfigError(
            f"The task's max_length is {task.max_length} tokens, but the model's context is {max_context}. Set max_length to at most {max_context}."
        )
    fingerprint = _fingerprint(data, task, tokenizer, key, source, test, classes, columns or {}, sole)
    folder = (cache or disk.cache() / "data") / fingerprint
    if not (folder / "owners.json").exists():

        def build(temporary: Path) -> None:
            tell = progress or (lambda stage, rows: None)
            _Build(data, task, tokenizer, key, temporary, fingerprint, tell, classes, columns or {}, sole).run(source, test)

        _make(folder, build)
    owners = Owners.open(folder)
    _tell(owners)
    return owners


def _make(folder: Path, build: Callable[[Path], None]) -> None:
    """Calls ``build`` to fill the folder. The folder appears whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(temporary)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        # Another process may have built the same folder meanwhile; its result is as good.
        if not (folder / "owners.json").exists():
            raise disk.cannot_write(folder, error) from error


def _tell(owners: Owners) -> None:
    for owner, reason in islice(owners.left_out.items(), _NAMED):
        log.warning("owner %s is left out: %s", owner, reason)
    if len(owners.left_out) > _NAMED:
        log.warning("%d more owners are left out; the journal names them all", len(owners.left_out) - _NAMED)
    if owners.bad_rows.counts:
        log.warning("%s", owners.bad_rows.sentence())
    if owners.dropped:
        log.info("%d rows gave nothing to learn from", owners.dropped)


def _fingerprint(
    data: Data,
    task: Task,
    tokenizer: Any,
    key: Key,
    source: Source,
    test: Source | None,
    classes: tuple[str, ...],
    columns: Mapping[str, Mapping[str, str]],
    sole: str | None = None,
) -> str:
    # Where the files lie does not change what they hold.
    rules = {part.name: repr(getattr(data, part.name)) for part in fields(data) if part.name not in ("source", "test")}
    stamps = [source.stamp, test.stamp if test else None]
    known: list[Any] = [layout.VERSION, rules, repr(task), stamps, tokenizer_words(tokenizer), key.digest.hex(), *classes]
    if columns:
        known.append({owner: dict(names) for owner, names in columns.items()})
    if sole is not None:
        known.append(["sole", sole])
    return hashlib.blake2b(json.dumps(known, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


@dataclass
class _Split:
    """Training or test examples of one owner while they are written."""

    stem: Path
    encoder: Encoder
    rows: list[Record] = field(default_factory=list)
    characters: int = 0
    parts: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    written: tuple[int, int] = (0, 0)

    def keep(self, examples: list[Example], codes: dict[str, int]) -> int:
        """Keeps examples until they are written, and says how many bytes they take; ``codes`` numbers the labels in the order in which they appear."""
        labels = [example.label for example in examples if example.label is not None]
        self.labels.update(labels)
        ends = self.tokens + np.cumsum([len(example.ids) for example in examples])
        classes = [-1 if example.label is None else codes.setdefault(example.label, len(codes)) for example in examples]
        index = np.column_stack([ends, [example.start for example in examples], classes]).astype("<i8")
        ids = np.concatenate([example.ids for example in examples]).astype("<i4")
        self.parts.append((ids, index))
        self.examples += len(examples)
        self.tokens = int(ends[-1])
        return ids.nbytes + index.nbytes + _PART

    def write(self) -> None:
        """Adds the examples that were kept to the files."""
        if not self.parts:
            return
        ids, index = zip(*self.parts, strict=True)
        _append(Path(f"{self.stem}.ids.npy"), ids, self.written[0])
        _append(Path(f"{self.stem}.index.npy"), index, self.written[1])
        self.parts, self.written = [], (self.tokens, self.examples)


@dataclass
class _Owner:
    """One owner while its rows stream by."""

    folder: Path
    train: _Split
    test: _Split
    held_out: Iterator[int]
    next_test: int
    rows: int = 0
    train_rows: int = 0
    labels: set[str] = field(default_factory=set)


class _Build:
    def __init__(
        self,
        data: Data,
        task: Task,
        tokenizer: Any,
        key: Key,
        folder: Path,
        fingerprint: str,
        progress: Callable[[str, int], None],
        classes: tuple[str, ...],
        columns: Mapping[str, Mapping[str, str]],
        sole: str | None = None,
    ) -> None:
        self.data, self.task, self.tokenizer, self.key, self.classes = data, task, tokenizer, key, classes
        self.columns, self.sole = columns, sole
        self.folder, self.fingerprint, self.progress = folder, fingerprint, progress
        self.owners: dict[str, _Owner] = {}
        self.bad = BadRows()
        self.codes: dict[str, int] = {}
        self.waiting = self.kept = 0

    def run(self, source: Source, test: Source | None) -> None:
        """Fills the folder.

        Raises:
            DataError: with all bad rows, if they may not be left out.
        """
        train_owner, test_owner = self._owners_of(source)
        # Where rows were divided first, the bad ones are counted already.
        bad = self.bad if self.data.partition is None else BadRows()
        for record in self._watched(source, bad):
            self._train(record, train_owner(record))
        if test is not None:
            classes = frozenset(label for owner in self.owners.values() if self._trains(owner) for label in owner.labels)
            for record in self._watched(test, self.bad):
                self._test(record, test_owner, classes)
        if self._stops:
            raise DataError(self.bad.refusal())
        self._drain(end=True)
        self.read_as = {name: where.about for name, where in (("source", source), ("test", test)) if where is not None and where.about}
        self._finish()

    @property
    def _stops(self) -> bool:
        return self.data.bad_rows == "stop" and self.bad.stops

    @property
    def _counts_labels(self) -> bool:
        """Whether the classes of a test file are those that training has."""
        return self.data.test is not None and self.task.label_column is not None and self.task.labels is None

    def _watched(self, source: Source, bad: BadRows, stage: str = "Tokenizing rows") -> Iterator[Record]:
        """The rows that can be used, their number told to whoever looks on."""
        number = 0
        for number, record in enumerate(self.check.rows(source, bad), 1):
            yield record
            if number % _REPORT == 0:
                self.progress(stage, number)
        self.progress(stage, number)

    def _owners_of(self, source: Source) -> tuple[OwnerOf, OwnerOf]:
        """How to tell the owner of a training row and of a test row."""
        partition, sole = self.data.partition, self.sole
        if sole is not None:
            self.check = RowCheck(self.task, sole=sole, names=self.columns)
            return (lambda record: sole), (lambda record: sole)
        if partition is None:
            column = self.data.by or source.owner
            assert column is not None
            self.check = RowCheck(self.task, owner=column, names=self.columns)
            return (lambda record: name_in(record, column, "owner")), (lambda record: name_in(record, column, "owner"))
        if self.columns:
            raise ConfigError(
                f"{partition!r} divides rows among clients that are not in the data, so none of them can have columns of its own."
            )
        label = partition.label or self.task.label_column
        if partition.needs_label and label is None:
            raise ConfigError(f"{partition!r} divides rows by label, but the task {self.task!r} has none. Set its 'label' to a column.")
        use = label if partition.needs_label else None
        self.check = RowCheck(self.task, label=use)
        label_n, known = _labels(self._watched(source, self.bad, "Dividing rows among owners"), use)
        rng = self.key.fold("partition").numpy()
        # Where bad rows stop everything, nobody gets anything, and there may be too few good ones to divide.
        client_n = np.zeros(len(label_n), dtype=np.int32) if self._stops else partition.assign(label_n, rng).astype(np.int32)
        names = [f"client{k:0{len(str(partition.clients - 1))}d}" for k in range(partition.clients)]
        for client in names:
            self._owner(client)
        # A test row goes to a client with the probability with which a training row of its label did, so both have one distribution.
        counts_lk = np.zeros((len(known), partition.clients), dtype=np.int64)
        np.add.at(counts_lk, (label_n, client_n), 1)
        rng, rows = self.key.fold("partition", "test").numpy(), iter(client_n)

        def of_test(record: Record) -> str:
            code = known.get(name_in(record, use) if use else "")
            share_k = counts_lk.sum(0) if code is None else counts_lk[code]
            return names[int(rng.choice(partition.clients, p=share_k / share_k.sum()))]

        return (lambda record: names[next(rows)]), of_test

    def _owner(self, owner: str) -> _Owner:
        if owner not in self.owners:
            folder = self.folder / disk.slug(owner)
            folder.mkdir()
            fraction = self.data.test_fraction if self.data.test is None else 0.0
            held_out = _held_out(self.key.fold("held out", owner).numpy(), fraction)
            train, test = (_Split(folder / split, self.task.encoder(self.tokenizer)) for split in ("train", "test"))
            self.owners[owner] = _Owner(folder, train, test, held_out, next(held_out))
        return self.owners[owner]

    def _train(self, record: Record, name: str) -> None:
        owner = self._owner(name)
        if owner.train_rows == self.data.limit:
            return
        while owner.next_test < owner.rows:
            owner.next_test = next(owner.held_out)
        tested = owner.rows == owner.next_test and owner.rows >= self.data.min_examples
        owner.rows += 1
        owner.train_rows += not tested
        if self._counts_labels:
            owner.labels.add(name_in(record, self.task.label_column or ""))
        self._wait(owner.test if tested else owner.train, record)

    def _test(self, record: Record, owner_of: OwnerOf, classes: frozenset[str]) -> None:
        """Takes a row of the test file, if training has its label. Which owners are left out is said elsewhere, so their labels do not matter."""
        if self._counts_labels:
            name = name_in(record, self.check.owner, "owner") if self.check.owner is not None else None
            trains = name is None or (name in self.owners and self._trains(self.owners[name]))
            label = name_in(record, self.task.label_column or "")
            if trains and label not in classes:
                self.bad.add(unknown_label(record, label, classes, "the training data"), name)
                return
        if not self._stops:
            self._wait(self._owner(owner_of(record)).test, record)

    def _trains(self, owner: _Owner) -> bool:
        return owner.train_rows >= self.data.min_examples

    def _wait(self, split: _Split, record: Record) -> None:
        if self._stops:
            return  # The others are still counted, and what was made of them is not kept.
        kept = Record({column: record[column] for column in self.task.columns if column in record}, record.where)
        characters = sum(len(entry) for entry in kept.values() if isinstance(entry, str))
        split.rows.append(kept)
        split.characters += characters
        self.waiting += characters
        if len(split.rows) == _GROUP:
            self._encode([split])
        if self.waiting > _WAITING:
            self._drain()

    def _drain(self, end: bool = False) -> None:
        """Encodes all rows that wait, those of many owners at once, and at the end writes every example."""
        for group in _groups(split for split in self._splits() if split.rows):
            self._encode(group)
        if end:
            for split in self._splits():
                self._keep(split, split.encoder.flush())
            self._write()

    def _splits(self) -> Iterator[_Split]:
        return (split for owner in self.owners.values() for split in (owner.train, owner.test))

    def _encode(self, splits: list[_Split]) -> None:
        encoded = type(splits[0].encoder).add_all([(split.encoder, split.rows) for split in splits])
        for split, examples in zip(splits, encoded, strict=True):
            self.waiting -= split.characters
            split.rows, split.characters = [], 0
            self._keep(split, examples)

    def _keep(self, split: _Split, examples: list[Example]) -> None:
        # A long row gives so many examples that they are kept in parts.
        for first in range(0, len(examples), _WRITTEN):
            self.kept += split.keep(examples[first : first + _WRITTEN], self.codes)
            if self.kept > _KEPT:
                self._write()

    def _write(self) -> None:
        """Writes all examples that are kept: an owner's files are opened once where everybody's fit into memory."""
        self.kept = 0
        for split in self._splits():
            split.write()

    def _finish(self) -> None:
        usable: dict[str, _Owner] = {}
        left_out: dict[str, str] = {}
        for name in sorted(self.bad.owners.keys() - self.owners.keys()):
            left_out[name] = f"none of its rows can be used ({self.bad.of(name)})"
        for name, owner in sorted(self.owners.items()):
            reason = self._unusable(name, owner)
            if reason is None:
                usable[name] = owner
            else:
                left_out[name] = reason
                shutil.rmtree(owner.folder)
        if not usable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
            text = f"No owner in {self.data.source} has usable data ({reasons}). Check the columns and min_examples."
            raise DataError(f"{text} {self.bad.sentence()}".rstrip())
        labels = self._labels(usable)
        self._number(usable, labels)
        heads = {}
        special = sorted(self.tokenizer.all_special_ids)
        vocabulary = {"size": len(self.tokenizer), "special": special, "mask": self.tokenizer.mask_token_id}
        for name, owner in usable.items():
            histogram = dict(sorted(owner.train.labels.items()))
            head = {"train": owner.train.examples, "test": owner.test.examples, "tokens": owner.train.tokens, "histogram": histogram}
            heads[name] = head
            layout.write(owner.folder / "shard.json", {"owner": name, "labels": labels, "vocabulary": vocabulary, **head})
        dropped = sum(split.encoder.dropped for owner in self.owners.values() for split in (owner.train, owner.test))
        known = {"fingerprint": self.fingerprint, "dropped": dropped, "labels": labels, "left_out": dict(sorted(left_out.items()))}
        known |= {"bad_rows": self.bad.to_json(), "read_as": self.read_as, "owners": heads}
        layout.write(self.folder / "owners.json", known)

    def _unusable(self, name: str, owner: _Owner) -> str | None:
        if owner.train.examples >= self.data.min_examples:
            return None
        bad = self.bad.of(name)
        besides = f"; besides it has rows that cannot be used ({bad})" if bad else ""
        if owner.train_rows == 0:
            return ("it has test rows but no training rows" if owner.test.examples else "it has no rows") + besides
        if owner.train.examples == 0:
            return f"none of its {owner.train_rows} training rows holds usable text{besides}"
        return f"it has {owner.train.examples} usable training example(s), fewer than min_examples={self.data.min_examples}{besides}"

    def _labels(self, usable: dict[str, _Owner]) -> list[str]:
        # Rows held out of the same source are as much a sign of a class as those that train; a test file is not.
        training = [owner.train.labels for owner in usable.values()]
        if self.data.test is None:
            training += [owner.test.labels for owner in usable.values()]
        in_training = {label for labels in training for label in labels}
        known = list(self.task.labels) if self.task.labels is not None else self._in_order(in_training)
        expected = set(known)
        for name, owner in usable.items():
            unknown = sorted((owner.train.labels.keys() | owner.test.labels.keys()) - expected)
            if unknown:
                what = "test label" if unknown[0] not in in_training else "label"
                source = "the task's labels" if self.task.labels is not None else "the training data"
                raise DataError(
                    f"Owner {name!r} has the {what} {unknown[0]!r}, which is not in {source} ({len(known)} classes: {', '.join(known[:8])}"
                    f"{', ...' if len(known) > 8 else ''}). Remove these rows or add the class."
                )
        return known

    def _in_order(self, labels: set[str]) -> list[str]:
        """The labels in the order of the base's own head where it has the same classes, else sorted."""
        return list(self.classes) if set(self.classes) == labels else sorted(labels)

    def _number(self, usable: dict[str, _Owner], labels: list[str]) -> None:
        """Replaces the numbers given to labels as they appeared by their places in ``labels``."""
        if not self.codes:
            return
        place = {label: i for i, label in enumerate(labels)}
        place_c = np.array([place.get(label, -1) for label in self.codes])
        for owner in usable.values():
            for split in (owner.train, owner.test):
                if split.examples:
                    index = np.load(f"{split.stem}.index.npy", mmap_mode="r+", allow_pickle=False)
                    index[:, 2] = place_c[index[:, 2]]
                    index.flush()


def _labels(rows: Iterator[Record], column: str | None) -> tuple[IntArray, dict[str, int]]:
    """The label of each row as a number, int32, and the number of each label, in the order in which they sort."""
    code_of: dict[str, int] = {}
    codes = array("i")
    for record in rows:
        codes.append(code_of.setdefault(name_in(record, column) if column else "", len(code_of)))
    place_of = {label: i for i, label in enumerate(sorted(code_of))}
    place_c = np.array([place_of[label] for label in code_of], dtype=np.int32)
    return place_c[np.frombuffer(codes, dtype=np.int32)], place_of


def _held_out(rng: np.random.Generator, fraction: float) -> Iterator[int]:
    """Rows to hold out: one in each stretch of ``1 / fraction`` rows, so that small owners get their share too."""
    if fraction == 0:
        yield sys.maxsize
    for stretch in count():
        yield int((stretch + rng.random()) / fraction)


def _groups(splits: Iterable[_Split]) -> Iterator[list[_Split]]:
    """Splits in groups whose rows are tokenized together, of many owners where they have few rows each."""
    group: list[_Split] = []
    rows = characters = 0
    for split in splits:
        group.append(split)
        rows += len(split.rows)
        characters += split.characters
        if rows >= _TOGETHER or characters >= _CHARACTERS:
            yield group
            group, rows, characters = [], 0, 0
    if group:
        yield group


def _append(path: Path, parts: Sequence[IntArray], before: int) -> None:
    """Adds rows to an ``.npy`` file that has ``before``; NumPy pads headers so that the growing axis can be written anew in place."""
    with path.open("r+b" if before else "wb") as file:
        file.write(_header(parts[0].dtype.str, (before + sum(map(len, parts)), *parts[0].shape[1:])))
        if before:
            file.seek(0, os.SEEK_END)
        file.writelines(part.tobytes() for part in parts)


@lru_cache(maxsize=1024)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()

"""Where rows come from, read one at a time; every row knows the file and line it was read at."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedfm.core.errors import ConfigError, DataError, MissingExtra, RowError
from fedfm.core.paths import usable
from fedfm.core.registry import suggest
from fedfm.data import csv_file
from fedfm.data.records import Record, Refuse, pieces, shown

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
_HASHED = 256_000_000  # bytes of the largest file that is read for its stamp


@dataclass(frozen=True)
class Source:
    """Rows that can be read more than once.

    Args:
        location: As the user gave it.
        read: Starts reading; told what to do with a line that cannot be read where the others can.
        stamp: Changes when the rows do.
        owner: The column that names a row's owner, where the source provides one.
        about: How it is read, where that was looked for.
    """

    location: str
    read: Callable[[Refuse], Iterator[Record]]
    stamp: str
    owner: str | None = None
    about: str = ""

    def rows(self, refuse: Refuse | None = None) -> Iterator[Record]:
        """Every row.

        Args:
            refuse: Told of each line that cannot be read, which is left out then; ``None`` raises.

        Raises:
            DataError: naming the file and line that cannot be read, or if there is no row at all.
        """
        empty = True

        def refused(error: RowError) -> None:
            nonlocal empty
            if refuse is None:
                raise error
            empty = False
            refuse(error)

        for row in self.read(refused):
            empty = False
            yield row
        if empty:
            raise DataError(f"{self.location} has no rows.")


def open_source(location: str, delimiter: str | None = None, encoding: str | None = None) -> Source:
    """The source that ``location`` names; :class:`fedfm.data.Data` lists what it may name.

    Args:
        delimiter: What stands between the values of a csv file; ``None`` looks for it.
        encoding: How the characters of a csv file are written; ``None`` looks for it.

    Raises:
        DataError: if it does not exist.
        ConfigError: if it is of no known kind, cannot be a path, or is a pipe or a device.
        MissingExtra: if reading it needs a package that is not installed.
    """
    if not location:
        raise ConfigError("The source of rows is empty; give a file, a folder, 'hf:name' or 'stdlib'.")
    if location == "stdlib":
        from fedfm.data import stdlib

        return Source(location, lambda refuse: stdlib.rows(), stamp(stdlib.files(), stdlib.root()), owner="owner")
    if location.startswith("hf:"):
        return _hub(location)
    path = usable(location, "The source of rows")
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _hub(f"hf:{path}")
        files = text_files(path)
        return Source(location, lambda refuse: _texts(path, files, refuse), stamp(files, path), owner="owner")
    if not path.exists():
        near = suggest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else f" Nor does {path.parent}."
        raise DataError(f"{location} does not exist.{near} A data set of the Hugging Face hub is written hf:NAME.")
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind in ("csv", "tsv"):
        form = csv_file.find_format(path, delimiter, encoding)
        return Source(location, lambda refuse: csv_file.read(path, form, refuse), stamp([path], path.parent), about=form.words())
    readers = {"jsonl": _jsonl, "parquet": _parquet}
    if kind not in readers or (kind == "parquet" and path.suffix == ".gz"):
        raise ConfigError(
            f"{location} is of no kind that can be read; known are .jsonl, .csv and .tsv (also .gz), .parquet and folders of text."
        )
    return Source(location, lambda refuse: readers[kind](path, refuse), stamp([path], path.parent))


def stamp(files: Iterable[Path], folder: Path) -> str:
    """A digest of the files' names below ``folder`` and their contents, so that a copy is the same data; of size and time where they are large.

    Raises:
        DataError: if one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            state = path.stat()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{state.st_size}\0".encode())
            if state.st_size > _HASHED:
                digest.update(str(state.st_mtime_ns).encode())
            else:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def text_files(folder: Path) -> list[Path]:
    """The text files below ``folder``, sorted; hidden ones are not data.

    Raises:
        DataError: if there are none.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in TEXT_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"{folder} holds no text files ({', '.join(TEXT_SUFFIXES)}). To read one data file, name the file itself.")
    return files


def _texts(folder: Path, files: list[Path], refuse: Refuse) -> Iterator[Record]:
    for path in files:
        relative = path.relative_to(folder)
        owner = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        try:
            with path.open(encoding="utf-8-sig") as file:
                for line, piece in pieces(file):
                    yield Record({"text": piece, "owner": owner, "path": str(relative)}, f"{path}:{line}")
        except UnicodeDecodeError as error:
            refuse(RowError(f"{path} cannot be read as UTF-8 text: {error}.", "unreadable", str(path)))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}.") from error


def _jsonl(path: Path, refuse: Refuse) -> Iterator[Record]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    refuse(
                        RowError(
                            f"{place} is not valid JSON: {error}. A .jsonl file has one JSON object on each line.", "unreadable", place
                        )
                    )
                    continue
                if not isinstance(row, dict):
                    refuse(RowError(f"{place} holds {shown(row)}, not a JSON object with columns.", "unreadable", place))
                    continue
                yield Record(row, place)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read beyond line {number}: {error}.") from error


def _parquet(path: Path, refuse: Refuse) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", f"Reading {path}") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path}:{number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read beyond row {number}: {error}") from error


def _hub(location: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data", f"Reading {location}") from error
    dataset_name, _, split = location.removeprefix("hf:").partition(":")
    try:
        if Path(dataset_name).expanduser().is_dir():
            saved = datasets.load_from_disk(str(Path(dataset_name).expanduser()))
            dataset = saved[split or "train"] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            dataset = datasets.load_dataset(dataset_name, split=split or "train")
    except Exception as error:  # the package raises errors of many kinds: network, hub, missing configuration, builder
        raise DataError(f"{location} could not be loaded: {error}") from error
    classes = {column: kind for column, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}

    def read(refuse: Refuse) -> Iterator[Record]:
        number = 0
        try:
            for number, row in enumerate(dataset, 1):
                # Classes are stored as numbers; their names are what a person reads. A label that is withheld is -1.
                known = {column: kind for column, kind in classes.items() if row[column] is not None and row[column] >= 0}
                yield Record({**row, **{column: kind.int2str(row[column]) for column, kind in known.items()}}, f"{location}:{number}")
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise DataError(f"{location} cannot be read beyond row {number}: {error}") from error

    return Source(location, read, dataset._fingerprint)

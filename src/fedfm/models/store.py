"""Bases that a machine keeps, each set of files in a folder that is named by its digest::

    <folder>/<digest>/     the files of one set, complete and verified
    <folder>/.<digest>/    a set that is being put together; what is there already is used when it goes on

A file is taken from wherever it lies on this machine, by its digest, and fetched only where it lies nowhere.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fedfm.core import disk, words
from fedfm.core.errors import MessageError, ModelError
from fedfm.models.files import MODEL, TOKENIZER, FileSets, ModelFile, set_digest
from fedfm.models.spec import Model
from fedfm.models.tokenizer import locate

log = logging.getLogger(__name__)
_SPARE = 100_000_000  # bytes of the disk that stay free
Fetch = Callable[[ModelFile, Path], None]
"""Writes a file to a path, going on with what is there."""


@dataclass(frozen=True)
class ModelStore:
    """A machine's bases.

    Args:
        folder: Where sets are put together.
        more: A folder of models of the owner's own, where files are looked for too.
    """

    folder: Path
    more: Path | None = None

    def placed(self, spec: Model, sets: FileSets, allow: Callable[[int], None], fetch: Fetch) -> Model:
        """The model with its files on this machine.

        Args:
            sets: The files that it must have.
            allow: Told how many bytes would be fetched, before the first one is; raises where that is too many.

        Raises:
            MessageError: if what was fetched is not what was named.
            ModelError: if the disk has no room.
        """
        sources = {MODEL: spec.source, TOKENIZER: spec.tokenizer}
        sets = {name: files for name, files in sets.items() if sources.get(name) is not None}
        places = {name: self._local(str(sources[name]), files) for name, files in sets.items()}
        homes = {name: self._home(files, sources[name], places[name]) for name, files in sets.items()}
        size = sum(
            file.size for name, home in homes.items() if home is None for file in sets[name] if self._lies(file, places[name]) is None
        )
        if size:
            allow(size)
            self._require_room(size)
        for name, home in homes.items():
            sources[name] = home or str(self._assembled(sets[name], places[name], fetch))
        return replace(spec, source=sources[MODEL], tokenizer=sources[TOKENIZER])

    def _home(self, files: Iterable[ModelFile], source: str | None, place: Path | None) -> str | None:
        """A source of this machine that has the whole set: the store, or what the plan says."""
        kept = self.folder / set_digest(files)
        if all(file.is_at(kept / file.name) for file in files):
            return str(kept)
        return source if place is not None and all(file.is_at(place / file.name) for file in files) else None

    def _local(self, source: str, files: Iterable[ModelFile]) -> Path | None:
        """The folder of this machine that a source names, the hub's copy included; ``None`` where there is none."""
        try:
            folder = Path(locate(source))
        except ModelError:
            return None
        if folder.is_dir():
            return folder
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(source, allow_patterns=[file.name for file in files]))
        except Exception as error:  # the network fails in many ways, each with an error of its own
            log.info("the hub gives no %s: %s", source, words.clean(error, 200))
            return None

    def _lies(self, file: ModelFile, place: Path | None) -> Path | None:
        """Where a file lies on this machine."""
        own = [] if self.more is None else [self.more, *sorted(self.more.glob("*/"))]
        folders = [place, *own, *sorted(self.folder.glob("*/"))]
        return next((folder / file.name for folder in folders if folder is not None and file.is_at(folder / file.name)), None)

    def _require_room(self, size: int) -> None:
        disk.make_folder(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < size + _SPARE:
            raise ModelError(f"The base needs {words.size(size)} more, and the disk of this machine's models has {words.size(free)} left.")

    def _assembled(self, files: tuple[ModelFile, ...], place: Path | None, fetch: Fetch) -> Path:
        digest = set_digest(files)
        made = self.folder / f".{digest}"
        disk.make_folder(made)
        for file in files:
            path = made / file.name
            if file.is_at(path):
                continue
            found = self._lies(file, place)
            if found is not None:
                path.unlink(missing_ok=True)
                _link(found, path)
                continue
            log.info("fetching %s (%s)", file.name, words.size(file.size))
            fetch(file, path)
            if not file.is_at(path):
                path.unlink(missing_ok=True)
                raise MessageError(f"The file {file.name} of the base, as the coordinator sent it, is not the one that it named.")
            disk.sync(path)
        kept = self.folder / digest
        shutil.rmtree(kept, ignore_errors=True)
        made.rename(kept)
        disk.sync(self.folder)
        return kept


def _link(source: Path, path: Path) -> None:
    try:
        # Resolved: the hub's cache holds links.
        os.link(source.resolve(), path)
    except OSError:
        shutil.copyfile(source, path)

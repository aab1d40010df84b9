"""Scalars of each round, for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm.core import disk
from fedfm.core.errors import ConfigError, MissingExtra
from fedfm.core.words import Metric, number
from fedfm.observers.base import Observer, RunInfo, Watcher
from fedfm.observers.progress import failures, tokens_per_second

if TYPE_CHECKING:
    from fedfm.core.round import RoundRecord


@dataclass(frozen=True)
class TensorBoard(Observer):
    """Training loss, held-out metrics (all of them pooled, the task's headline per owner), update norm, bytes and speed of each round as TensorBoard scalars.

    A resumed run takes back what was written after the round it goes on from, so that curves stay single-valued.

    Args:
        dir: Folder of the event files; by default ``tensorboard`` in the run's folder.

    Raises:
        MissingExtra: if the package ``tensorboard`` is absent.
        ConfigError: if there is neither ``dir`` nor a run folder.
    """

    dir: str | None = None

    def open(self, folder: Path | None) -> Watcher:
        """The watcher that writes the event files."""
        try:
            import tensorboard as tensorboard
        except ImportError as error:
            raise MissingExtra("tensorboard", "track", "The observer TensorBoard") from error
        if self.dir is None and folder is None:
            raise ConfigError(
                "TensorBoard(dir=None) writes into the run's folder, but this run has none. Give dir, or run with a folder (out)."
            )
        return _Writer(Path(self.dir) if self.dir is not None else Path(str(folder), "tensorboard"))


class _Writer(Watcher):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def start(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if info.resumed_from is None else info.resumed_from + 1
        try:
            self.writer = SummaryWriter(str(self.folder), purge_step=purge)
        except OSError as error:
            raise disk.cannot_write(self.folder, error) from error

    def round(self, record: RoundRecord) -> None:
        for tag, value in scalars(record):
            self.writer.add_scalar(tag, value, record.round)
        self.writer.flush()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if self.writer is not None:
            self.writer.close()


def scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    """The points that a round adds to the curves; numbers that are not finite are left out."""
    report = record.metrics.get("eval") or {}
    headline = Metric.from_json(report.get("headline")).name
    curves: dict[str, Any] = {
        "loss/train": record.metrics.get("train_loss"),
        **{f"pooled/{name}": value for name, value in report.get("pooled", {}).items()},
        "owners/mean": report.get("mean"),
        "owners/worst": report.get("worst", {}).get(headline),
        "owners/spread": report.get("spread"),
        **{f"owner/{owner}": metrics.get(headline) for owner, metrics in report.get("owners", {}).items()},
        "update/norm": record.metrics.get("update_norm"),
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "speed/tokens_per_second": tokens_per_second(record),
        "clients/answered": len(record.clients),
        "clients/failed": len(failures(record)),
    }
    for tag, value in curves.items():
        x = number(value)
        if x is not None:
            yield tag, x

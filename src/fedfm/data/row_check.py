"""Which rows of a source can be used: looked at as they are read, before an owner gets them, so that all that follows sees the good ones alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedfm.core.bad_rows import BadRows
from fedfm.core.errors import RowError
from fedfm.core.task import Task
from fedfm.data.records import Record, name_in, value_in
from fedfm.data.sources import Source

# Rows after which a column that none of them has is taken for a mistake in the recipe.
_PATIENCE = 1000


@dataclass(frozen=True)
class RowCheck:
    """What a row must have.

    Args:
        task: Says what it needs of a row.
        owner: The column that names a row's owner; ``None`` where owners are simulated.
        label: The column by whose label rows are divided; ``None`` where they are not.
    """

    task: Task
    owner: str | None = None
    label: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that some row must have."""
        return tuple(dict.fromkeys([*filter(None, (self.owner, self.label)), *self.task.columns]))

    def rows(self, source: Source, bad: BadRows) -> Iterator[Record]:
        """The rows that can be used. The others are counted in ``bad``, as all rows are.

        Raises:
            DataError: if a line cannot be read and those after it neither, there is no row, or no row has a column that is needed.
        """
        missing, first, number = set(self.columns), None, 0

        def refuse(error: RowError) -> None:
            bad.num_rows += 1
            bad.add(error)

        for record in source.rows(refuse):
            first, number = first or record, number + 1
            bad.num_rows += 1
            missing.difference_update(record)
            if missing and number == _PATIENCE:
                break
            owner = None
            try:
                owner = name_in(record, self.owner, "owner") if self.owner is not None else None
                if self.label is not None:
                    name_in(record, self.label)
                self.task.require(record)
            except RowError as error:
                bad.add(error, owner)
                continue
            yield record
        if missing and first is not None:
            # No row has it, so it is the recipe that is wrong and not the rows.
            value_in(first, next(column for column in self.columns if column in missing))

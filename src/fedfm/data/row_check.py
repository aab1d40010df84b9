"""Which rows of a source can be used: looked at as they are read, before an owner gets them, so that all that follows sees the good ones alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

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
        sole: Whose all rows are, in a house of one owner.
        names: For owners who name their columns otherwise: the owner's own name of each of the task's columns.
    """

    task: Task
    owner: str | None = None
    label: str | None = None
    sole: str | None = None
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

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

        for row in source.rows(refuse):
            bad.num_rows += 1
            record, owner, fault = row, None, None
            try:
                if self.owner is not None:
                    owner = name_in(row, self.owner, "owner")
                    record = self._renamed(row, owner)
                elif self.sole is not None:
                    owner, record = self.sole, self._renamed(row, self.sole)
                if self.label is not None:
                    name_in(record, self.label)
                self.task.require(record)
            except RowError as error:
                fault = error
            first, number = first or record, number + 1
            missing.difference_update(record)
            if missing and number == _PATIENCE:
                break
            if fault is None:
                yield record
            else:
                bad.add(fault, owner)
        if missing and first is not None:
            # No row has it, so it is the recipe that is wrong and not the rows.
            value_in(first, next(column for column in self.columns if column in missing))

    def _renamed(self, row: Record, owner: str) -> Record:
        """The row under the task's names."""
        own = self.names.get(owner, {})
        if not own:
            return row
        others = {column: value for column, value in row.items() if column not in own}
        return Record({**others, **{column: row[name] for column, name in own.items() if name in row}}, row.where)

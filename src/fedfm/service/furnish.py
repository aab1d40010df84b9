"""Puts the owner's prepared data and the base into a member's house, and refuses what is not what the run is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfm.core.errors import ColumnError, DataError, MessageError, ModelError, RowError
from fedfm.models.files import FileSets, base_of
from fedfm.models.store import Fetch, ModelStore

if TYPE_CHECKING:
    from fedfm.client.house import House
    from fedfm.data import Data, Owners
    from fedfm.models import Model


@dataclass(frozen=True)
class Furniture:
    """What an owner brings.

    Args:
        name: The member's.
        data: Its own rows.
        test: Its own test rows; ``None`` holds out some of ``data``.
        columns: Its own name of each of the task's columns; ``None`` where they have the same names.
        cache: Where its prepared rows are kept.
    """

    name: str
    data: str
    test: str | None
    columns: Mapping[str, str] | None
    cache: Path


@dataclass(frozen=True)
class Base:
    """What the coordinator says of the base, and where a member has or gets it.

    Args:
        digest: Of the weights.
        files: All that a member must have; empty where the coordinator names none.
        store: The member's own bases.
        fetch: Fetches what lies nowhere on this machine.
    """

    digest: str
    files: FileSets
    store: ModelStore
    fetch: Fetch

    def placed(self, house: House, name: str) -> Model:
        """The plan's model with its files on this machine, held to the owner's policy before a byte is fetched.

        Raises:
            FedfmError: if the policy refuses it, or its files cannot be had.
        """
        guard, weights = house.guard(name), base_of(self.files)
        assert guard is not None
        if weights is not None:
            if weights != self.digest:
                raise MessageError("The files of the base that the coordinator names do not have the digest that it names.")
            guard.admit_base(weights)
        return self.store.placed(house.plan.model, self.files, guard.admit_bytes, self.fetch)


def furnish(house: House, owner: Furniture, rules: Mapping[str, Any], base: Base) -> None:
    """Prepares the rows and loads the tokenizer and the config. Where nobody has named the classes yet, there is no base to compare.

    Args:
        rules: How rows become examples, as the coordinator says.
        base: The coordinator's.

    Raises:
        FedfmError: if data or model cannot be used, or is not what the run is about.
    """
    from fedfm.data import Data
    from fedfm.models import load_tokenizer
    from fedfm.models.foundation import configured

    plan = house.plan = replace(house.plan, model=base.placed(house, owner.name))
    tokenizer = load_tokenizer(plan.model.tokenizer or plan.model.source or "")
    config = configured(plan.model, plan.task.head, tokenizer)
    data = Data(source=owner.data, test=owner.test, **known_rules(rules))
    if house.lacks_classes and owner.test is not None:
        # Classes are those that training has; rows of a test file follow when the classes of all are known.
        data = replace(data, test=None, test_fraction=0.0)
    owners = _prepared(house, owner, data, tokenizer, config)
    house.shards, house.outline = {owner.name: owners.path(owner.name)}, (tokenizer, config)
    if house.lacks_classes:
        return
    if owners.labels != house.labels:
        raise DataError("its classes are not those of the run, or are in another order.")
    if house.base != base.digest:
        raise ModelError(f"its base has the digest {house.base}, and the coordinator's has {base.digest}. Both must have the same files.")


def _prepared(house: House, owner: Furniture, data: Data, tokenizer: Any, config: Any) -> Owners:
    from fedfm.data import prepare
    from fedfm.models import unchanged
    from fedfm.models.foundation import classes_of, max_context

    columns = owner.columns or {}
    try:
        with unchanged(tokenizer):
            return prepare(
                data,
                house.plan.task.with_labels(house.labels),
                tokenizer,
                key=house.key.fold("data"),
                max_context=max_context(config),
                cache=owner.cache,
                classes=classes_of(config),
                columns={owner.name: columns} if columns else None,
                sole=owner.name,
            )
    except RowError as error:
        if error.column is None:
            raise
        place = (
            "the column that its policy names for it is not there"
            if error.column in columns
            else "its policy can name another column for it"
        )
        raise ColumnError(
            f"its rows have no column {error.column!r}, which the task reads; {place} (columns: {{{error.column}: OWN_NAME}})."
        ) from error


def known_rules(rules: Mapping[str, Any]) -> dict[str, Any]:
    """What the coordinator may say of how rows are prepared; nothing else is taken from it.

    Raises:
        MessageError: if a value is of the wrong kind.
    """
    kinds: dict[str, Any] = {"test_fraction": float | int, "min_examples": int, "limit": int | None, "bad_rows": str}
    for name, value in rules.items():
        if name not in kinds or isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise MessageError(f"The rule {name!r:.40} for preparing rows is not known here, or is not of its kind.")
    return dict(rules)

"""What a client has spent for good: never rolled back, never changed without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfm.client.memory import home
from fedfm.client.spent import SpentStore
from fedfm.core.errors import RunError

EXPENSES = st.lists(st.tuples(st.sampled_from(["epsilon", "masks"]), st.floats(0, 1e6)), max_size=8)


def path_of(folder: Path) -> Path:
    return home(folder, "a") / "spent.jsonl"


@settings(max_examples=30)
@given(EXPENSES, EXPENSES)
def test_what_is_spent_stays_spent_on_disk_and_in_process(tmp_path_factory: pytest.TempPathFactory, before, after) -> None:
    folder = tmp_path_factory.mktemp("run")
    stores = [SpentStore(folder), SpentStore(None)]
    for store in stores:
        for what, amount in before:
            store.of("a").add(what, amount)
    # A restart of the house.
    stores[0] = SpentStore(folder)
    for store in stores:
        for what, amount in after:
            store.of("a").add(what, amount)
        assert store.entries("a") == [*before, *after] and store.entries("b") == []
        for what in ("epsilon", "masks"):
            assert store.of("a").total(what) == pytest.approx(sum(amount for name, amount in [*before, *after] if name == what))


def test_a_line_that_a_crash_cut_short_was_never_spent(tmp_path: Path) -> None:
    store = SpentStore(tmp_path)
    store.of("a").add("epsilon", 1.0)
    whole = path_of(tmp_path).read_bytes()
    path_of(tmp_path).write_bytes(whole + b'{"what": "eps')
    assert store.of("a").total("epsilon") == 1.0
    store.of("a").add("epsilon", 2.0)
    assert SpentStore(tmp_path).of("a").total("epsilon") == 3.0


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    store = SpentStore(tmp_path)
    for amount in (1.0, 0.5):
        store.of("a").add("epsilon", amount)
    whole = path_of(tmp_path).read_bytes()
    for bit in range(8 * (len(whole) - 1)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path_of(tmp_path).write_bytes(flipped)
        try:
            entries = store.entries("a")
        except RunError as error:
            assert "changed by something else" in str(error)
        else:
            assert entries == [("epsilon", 1.0), ("epsilon", 0.5)]


@pytest.mark.parametrize("order", [[1, 0], [0, 0, 1], [1]])
def test_lines_that_were_moved_copied_or_taken_out_are_refused(tmp_path: Path, order: list[int]) -> None:
    store = SpentStore(tmp_path)
    for amount in (1.0, 0.5):
        store.of("a").add("epsilon", amount)
    lines = path_of(tmp_path).read_bytes().splitlines(keepends=True)
    path_of(tmp_path).write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(RunError, match="nothing leaves this house"):
        store.of("a").total("epsilon")


@pytest.mark.parametrize("amount", [-1.0, float("nan"), float("inf")])
def test_an_expense_is_a_number(amount: float) -> None:
    with pytest.raises(RunError, match="cannot spend"):
        SpentStore(None).of("a").add("epsilon", amount)

"""What preparing costs with many owners: calls of the tokenizer and openings of files, not seconds."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedfm.core.keys import Key
from fedfm.core.task import Task
from fedfm.data import Data, Owners
from fedfm.tasks import CausalLM, Classification, Instruct, MaskedLM
from fedfm.testing.tiny import tokenizer_folder

module = importlib.import_module("fedfm.data.prepare")  # the package has a function of this name
TASKS: list[Task] = [
    CausalLM(max_length=8),
    CausalLM(max_length=8, packed=False),
    MaskedLM(max_length=8),
    Classification(max_length=8),
    Instruct(max_length=16),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder())


def interleaved(path: Path, owners: int, rows: int) -> Data:
    """So many rows of each owner, everybody's first row before anybody's second."""
    with path.open("w") as file:
        for i in range(rows):
            for k in range(owners):
                text = f"king {k} " + "cat " * (i % 5)
                row = {"who": f"owner {k}", "text": text, "label": "ab"[(i + k) % 2], "instruction": text, "response": f"{i}"}
                file.write(json.dumps(row) + "\n")
    return Data(str(path), by="who", test_fraction=0.25)


def contents(owners: Owners) -> dict[str, str]:
    """A digest of each file."""
    files = sorted(path for path in owners.folder.rglob("*") if path.is_file())
    return {str(path.relative_to(owners.folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_limits_on_what_waits_do_not_change_a_byte(tmp_path: Path, tokenizer: Any, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    data = interleaved(tmp_path / "rows.jsonl", 12, 9)

    def made(name: str, **limits: int) -> dict[str, str]:
        with monkeypatch.context() as patch:
            for limit, value in limits.items():
                patch.setattr(module, limit, value)
            return contents(module.prepare(data, task, tokenizer, key=Key.root(0), cache=tmp_path / name))

    usual = made("usual")
    assert len([name for name in usual if name.endswith("train.ids.npy")]) == 12
    assert made("each row", _GROUP=1, _KEPT=0) == usual
    assert made("few characters", _WAITING=100, _CHARACTERS=20, _KEPT=2000) == usual
    assert made("few rows", _TOGETHER=2, _WRITTEN=1) == usual


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_rows_of_many_owners_go_to_the_tokenizer_together(
    tmp_path: Path, tokenizer: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: Any, texts: list[str], *args: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return call(self, texts, *args, **options)

    data = interleaved(tmp_path / "rows.jsonl", 300, 4)
    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    owners = module.prepare(data, task, tokenizer, key=Key.root(0), cache=tmp_path / "cache")
    assert len(owners.ids) == 300
    # Two groups of at most 1024 rows and a few more; prompts and responses are tokenized apart.
    most = 4 if isinstance(task, Instruct) else 2
    assert len(calls) <= most and sum(calls) == 1200 * most // 2


def test_a_file_is_opened_once_where_what_is_made_fits_into_memory(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[Path] = Counter()
    append = module._append

    def counted(path: Path, *args: Any) -> None:
        opened[path] += 1
        append(path, *args)

    data = interleaved(tmp_path / "rows.jsonl", 20, 40)
    # The rows wait for the tokenizer many times, and each owner's are then tokenized a few at a time.
    monkeypatch.setattr(module, "_WAITING", 1000)
    monkeypatch.setattr(module, "_append", counted)
    module.prepare(data, CausalLM(), tokenizer, key=Key.root(0), cache=tmp_path / "cache")
    assert len(opened) == 20 * 4 and set(opened.values()) == {1}
    opened.clear()
    monkeypatch.setattr(module, "_KEPT", 10_000)
    module.prepare(data, CausalLM(), tokenizer, key=Key.root(1), cache=tmp_path / "cache")
    assert max(opened.values()) > 1

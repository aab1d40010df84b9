"""A member has the base's very files, from wherever they lie; what lies nowhere is fetched in parts, and nothing is used that was not named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedfm.core.errors import MessageError, ModelError, PolicyError
from fedfm.models import Model, load
from fedfm.models.digest import weights_digest
from fedfm.models.files import MODEL, TOKENIZER, ModelFile, base_of, paths_of, read_sets, set_digest, sets_of, write_sets
from fedfm.models.store import ModelStore
from fedfm.testing import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    foundation = tiny.foundation("Llama")
    foundation.model.save_pretrained(folder)
    foundation.tokenizer.save_pretrained(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def test_the_files_of_a_base_are_its_weights_config_and_tokenizer_and_nothing_else(base: Path) -> None:
    sets = sets_of(paths_of(Model(str(base))))
    assert set(sets) == {MODEL} and read_sets(write_sets(sets)) == sets
    names = {file.name for file in sets[MODEL]}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not {"modeling_evil.py", "pytorch_model.bin"} & names
    assert base_of(sets) == weights_digest(load(Model(str(base)), "causal_lm", device="cpu"))
    drawn = sets_of(paths_of(Model(architecture="Llama", tokenizer=str(base))))
    assert set(drawn) == {TOKENIZER} and base_of(drawn) is None


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".hidden.safetensors", "model.bin", "code.py", "x.json", "con\0.safetensors", "", 5, None, "a" * 300 + ".safetensors"],
)  # fmt: skip
def test_names_that_lead_elsewhere_or_hold_code_are_refused(name: object) -> None:
    with pytest.raises(MessageError):
        read_sets(json.dumps({"model": [[name, 10, "0" * 32]]}))


ZERO = "0" * 32


def listed(name: str, *files: list[object]) -> str:
    return json.dumps({name: files})


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", "[" * 5000, '{"model": []}', '{"model": 5}', '{"model": [["config.json", 1, "x"]]}',
        listed("other", ["config.json", 1, ZERO]), listed("model", ["config.json", 0, ZERO]), listed("model", ["config.json", True, ZERO]),
        listed("model", ["config.json", 1e3, ZERO]), listed("model", ["config.json", 1 << 40, ZERO]),
        listed("model", ["a.safetensors", 1, ZERO], ["A.safetensors", 1, "1" * 32]),
        listed("model", *([f"m{i}.safetensors", 1, ZERO] for i in range(300))),
    ],
)  # fmt: skip
def test_lists_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(MessageError):
        read_sets(text)


class Counting:
    """Copies what is fetched from a folder.

    Attributes:
        fetched: Names, in order.
    """

    def __init__(self, source: Path) -> None:
        self.source, self.fetched, self.allowed = source, list[str](), list[int]()

    def __call__(self, file: ModelFile, path: Path) -> None:
        self.fetched.append(file.name)
        shutil.copyfile(self.source / file.name, path)


def test_what_lies_anywhere_on_the_machine_is_not_fetched(base: Path, tmp_path: Path) -> None:
    sets, fetch = sets_of(paths_of(Model(str(base)))), Counting(base)
    spec = Model(str(base))
    store = ModelStore(tmp_path / "store")
    assert store.placed(spec, sets, fetch.allowed.append, fetch) == spec and not (tmp_path / "store").exists()
    elsewhere = Model("nowhere/at/all")
    owner = tmp_path / "own"
    (owner / "some").mkdir(parents=True)
    shutil.copyfile(base / "model.safetensors", owner / "some" / "model.safetensors")
    placed = ModelStore(tmp_path / "store", owner).placed(elsewhere, sets, fetch.allowed.append, fetch)
    assert placed.source == str(tmp_path / "store" / set_digest(sets[MODEL]))
    small = [file for file in sets[MODEL] if file.name != "model.safetensors"]
    assert sorted(fetch.fetched) == sorted(file.name for file in small) and fetch.allowed == [sum(file.size for file in small)]
    assert (owner / "some" / "model.safetensors").samefile(Path(placed.source) / "model.safetensors"), "it is linked, not copied"
    fetch.fetched.clear()
    assert store.placed(elsewhere, sets, fetch.allowed.append, fetch) == placed and not fetch.fetched
    assert weights_digest(load(placed, "causal_lm", device="cpu")) == base_of(sets)


def test_a_file_that_is_not_the_one_that_was_named_is_refused(base: Path, tmp_path: Path) -> None:
    sets, wrong = sets_of(paths_of(Model(str(base)))), tmp_path / "wrong"
    shutil.copytree(base, wrong)
    data = bytearray((wrong / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (wrong / "model.safetensors").write_bytes(data)
    store, elsewhere = ModelStore(tmp_path / "store"), Model("nowhere/at/all")
    with pytest.raises(MessageError, match=r"model.safetensors .* is not the one that it named"):
        store.placed(elsewhere, sets, lambda size: None, Counting(wrong))
    assert not list((tmp_path / "store").glob("[!.]*")) and not list((tmp_path / "store").glob(".*/model.safetensors"))
    # What was right is kept, and what the plan names is not taken because it has the right name.
    again = Counting(base)
    placed = store.placed(Model(str(wrong)), sets, lambda size: None, again)
    assert placed.source != str(wrong) and again.fetched == ["model.safetensors"]


def test_before_a_byte_is_fetched_somebody_allows_it_and_the_disk_has_room(base: Path, tmp_path: Path) -> None:
    sets, fetch = sets_of(paths_of(Model(str(base)))), Counting(base)

    def refuse(size: int) -> None:
        raise PolicyError("model_bytes", str(size))

    with pytest.raises(PolicyError, match=str(sum(file.size for file in sets[MODEL]))):
        ModelStore(tmp_path).placed(Model("nowhere/at/all"), sets, refuse, fetch)
    huge = {MODEL: (ModelFile("model.safetensors", 1 << 41, "0" * 32),)}
    with pytest.raises(ModelError, match=r"has .* left"):
        ModelStore(tmp_path).placed(Model("nowhere/at/all"), huge, lambda size: None, fetch)
    assert not fetch.fetched

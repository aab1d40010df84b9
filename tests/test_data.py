import csv
import gzip
import json
import os
import resource
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedfm.core import disk, registry
from fedfm.core.errors import ConfigError, DataError, MissingExtra, RunError
from fedfm.core.keys import Key
from fedfm.data import IID, Data, Dirichlet, Owners, QuantitySkew, Shard, Shards, prepare, public_text, stdlib
from fedfm.data import owners as layout
from fedfm.data.records import PIECE
from fedfm.data.sources import open_source, stamp
from fedfm.tasks import CausalLM, Classification, Instruct, MaskedLM
from fedfm.testing.tiny import tokenizer_folder

KEY = Key.root(0)
quick = settings(deadline=None, max_examples=40)
SHARED = Path(os.environ.get("FEDFM_SHARED_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tokenizer_folder())


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepares data below ``tmp_path``, with the defaults of these tests."""

    def make(data, task=None, key=KEY, **options):
        return prepare(data, task or Instruct(), options.pop("tokenizer", tokenizer), key=key, cache=tmp_path / "cache", **options)

    return make


def codes(labels):
    """Labels as numbers, in the order in which they sort."""
    return np.unique(np.array(labels, dtype=str), return_inverse=True)[1]


def jsonl(path, rows):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def answers(counts, label="ab"):
    """Rows of owners, interleaved, each with a text that tells whose and which it is."""
    rows = [
        {"who": who, "instruction": f"{who} {i}?", "response": f"{who}.{i}.", "text": f"{who} {i}", "label": label[i % len(label)]}
        for who, n in counts.items()
        for i in range(n)
    ]
    return sorted(rows, key=lambda row: int(row["text"].split()[-1]))


def decoded(tokenizer, examples):
    return [tokenizer.decode(examples.ids(i), skip_special_tokens=True) for i in range(len(examples))]


# --- partitioners ----------------------------------------------------------------------------------------------------

labels = st.lists(st.sampled_from("abcde"), min_size=24, max_size=200)
PARTITIONERS = [IID(6), Dirichlet(0.5, 6), Dirichlet(0.05, 3, min_size=0), QuantitySkew(0.3, 6), Shards(6, 3)]


@quick
@given(labels, st.sampled_from(PARTITIONERS), st.integers(0, 9))
def test_every_row_has_exactly_one_client(labels, partition, seed):
    client_n = partition.assign(codes(labels), np.random.default_rng(seed))
    assert client_n.shape == (len(labels),)
    assert client_n.min() >= 0 and client_n.max() < partition.clients
    assert (client_n == partition.assign(codes(labels), np.random.default_rng(seed))).all()


@quick
@given(labels, st.integers(1, 20))
def test_iid_sizes_are_equal(labels, clients):
    sizes = np.bincount(IID(clients).assign(codes(labels), np.random.default_rng(0)), minlength=clients)
    assert sizes.max() - sizes.min() <= 1


def shares(partition, labels, seed=0):
    """The distribution of labels of each client."""
    client_n = partition.assign(codes(labels), np.random.default_rng(seed))
    names = sorted(set(labels))
    counts = np.array(
        [[sum(c == k and label == name for c, label in zip(client_n, labels)) for name in names] for k in range(partition.clients)]
    )
    return counts / counts.sum(1, keepdims=True)


def test_dirichlet_reaches_iid_and_one_client_per_label():
    labels = ["a", "b", "c", "d"] * 300
    assert shares(Dirichlet(1e6, 6), labels) == pytest.approx(np.full((6, 4), 0.25), abs=0.01)
    skewed = [np.abs(shares(Dirichlet(alpha, 6), labels) - 0.25).mean() for alpha in (100.0, 1.0, 0.1)]
    assert skewed[0] < skewed[1] < skewed[2]
    client_n = Dirichlet(1e-3, 6, min_size=0).assign(codes(labels), np.random.default_rng(0))
    assert all(Counter(client_n[i::4].tolist()).most_common(1)[0][1] > 295 for i in range(4))


@quick
@given(labels, st.integers(1, 4))
def test_dirichlet_keeps_its_smallest_size(labels, min_size):
    client_n = Dirichlet(0.5, 5, min_size=min_size).assign(codes(labels), np.random.default_rng(0))
    assert np.bincount(client_n, minlength=5).min() >= min_size


def test_quantity_skew_reaches_equal_sizes_and_leaves_labels_alone():
    labels = ["a", "b"] * 600
    sizes = np.bincount(QuantitySkew(1e7, 6).assign(codes(labels), np.random.default_rng(0)))
    assert sizes == pytest.approx(np.full(6, 200), abs=2)
    sizes = np.bincount(QuantitySkew(0.5, 6).assign(codes(labels), np.random.default_rng(0)), minlength=6)
    assert sizes.max() > 3 * max(sizes.min(), 1)
    assert shares(QuantitySkew(10.0, 4), labels) == pytest.approx(np.full((4, 2), 0.5), abs=0.1)


def test_shards_bound_the_labels_of_a_client():
    labels = [str(i % 10) for i in range(1000)]
    client_n = Shards(10, 2).assign(codes(labels), np.random.default_rng(0))
    assert (np.bincount(client_n) == 100).all()
    assert max(len({label for label, c in zip(labels, client_n) if c == k}) for k in range(10)) <= 4


@pytest.mark.parametrize(
    "build",
    [
        lambda: IID(0),
        lambda: Dirichlet(0.0, 3),
        lambda: Dirichlet(float("inf"), 3),
        lambda: Dirichlet(1.0, 3, min_size=-1),
        lambda: QuantitySkew(-1.0, 3),
        lambda: Shards(3, 0),
        lambda: IID(9).assign(codes(["a"] * 8), np.random.default_rng(0)),
        lambda: Shards(3, 3).assign(codes(["a"] * 8), np.random.default_rng(0)),
        lambda: Dirichlet(1.0, 3, min_size=3).assign(codes(["a"] * 8), np.random.default_rng(0)),
        lambda: Dirichlet(1e-4, 5, min_size=2).assign(codes(["a"] * 20), np.random.default_rng(0)),
        lambda: Data(""),
        lambda: Data("x.csv", by="a", partition=IID(3)),
        lambda: Data("x.csv", by="a", test_fraction=0.6),
        lambda: Data("x.csv", by="a", min_examples=0),
        lambda: Data("x.csv", by="a", limit=0),
    ],
)
def test_values_that_cannot_be(build):
    with pytest.raises(ConfigError):
        build()


def test_the_room_lists_its_parts():
    assert set(registry.entries("data")) == {"Data", "IID", "Dirichlet", "QuantitySkew", "Shards"}


# --- sources ---------------------------------------------------------------------------------------------------------

ROWS = [{"text": 'a "b",\nc', "who": "x"}, {"text": "ü", "who": "y"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    locations = [jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "a.jsonl.gz", ROWS), str(tmp_path / "a.csv")]
    with Path(locations[2]).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "who"])
        writer.writeheader()
        writer.writerows(ROWS)
    for location in locations:
        assert list(open_source(location).rows()) == ROWS
    assert [row.where for row in open_source(locations[0]).rows()] == [f"{locations[0]}:1", f"{locations[0]}:2"]
    assert [row.where for row in open_source(locations[2]).rows()] == [f"{locations[2]}:3", f"{locations[2]}:4"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'data' is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(open_source(str(path)).rows()) == ROWS
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        list(open_source(str(path)).rows())


def test_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})

    def data_set(**columns):
        # Named here, as its own naming of tables in memory fails with some versions of pyarrow.
        table = datasets.table.InMemoryTable.from_pydict(columns, schema=features.arrow_schema)
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint=f"rows{len(columns['text'])}")

    one = data_set(text=["a", "b"], label=[1, 0])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": data_set(text=["b"], label=[0])}).save_to_disk(str(tmp_path / "two"))
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert list(open_source(str(tmp_path / "one")).rows()) == list(open_source(str(tmp_path / "two")).rows()) == rows
    assert list(open_source(f"hf:{tmp_path / 'two'}:test").rows()) == rows[1:]
    with pytest.raises(DataError, match="could not be loaded"):
        open_source(f"hf:{tmp_path / 'two'}:validation")


def test_extras_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(MissingExtra, match=r"needs the package 'pyarrow'.*fedfm\[data\]"):
        list(open_source(str(tmp_path / "a.parquet")).rows())
    with pytest.raises(MissingExtra, match="'datasets'"):
        open_source("hf:someone/something")


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "ann" / "deep").mkdir(parents=True)
    (tmp_path / "ann" / "deep" / "a.txt").write_text("x\n" * PIECE)
    (tmp_path / "bob.md").write_text("y" * (2 * PIECE + 1))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "b.txt").write_text("hidden")
    (tmp_path / "c.pdf").write_bytes(b"\xff")
    rows = list(open_source(str(tmp_path)).rows())
    assert {row["owner"] for row in rows} == {"ann", "bob"}
    assert "".join(row["text"] for row in rows if row["owner"] == "ann") == "x\n" * PIECE
    assert [len(row["text"]) for row in rows if row["owner"] == "bob"] == [PIECE, PIECE, 1]
    assert [row.where.rpartition(":")[2] for row in rows if row["owner"] == "ann"] == ["1", str(PIECE // 2 + 1)]


def test_the_standard_library_has_unequal_owners():
    sizes = Counter(row["owner"] for row in stdlib.rows())
    assert len(sizes) >= 8 and max(sizes.values()) > 5 * min(sizes.values())
    assert not {"test", "site-packages", "pydoc_data"} & set(sizes)
    assert sum(len(words) for words in public_text()) > 100_000
    row = next(stdlib.rows())
    path, _, line = row.where.rpartition(":")
    assert Path(path).name in row["path"] and line == "1" and set(row) == {"text", "owner", "path"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"who": "x"}\n\n{"who": \n', r"a\.jsonl:3 is not valid JSON"),
        ("a.jsonl", b'{"who": "x"}\n[1, 2]\n', r"a\.jsonl:2 holds list \[1, 2\], not a JSON object"),
        ("a.jsonl", b'{"who": "\xff"}\n', r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.jsonl.gz", gzip.compress(b'{"who": "x"}\n' * 1000, mtime=0)[:-12], "cannot be read beyond line"),
        ("a.jsonl.gz", b'{"who": "x"}\n', "cannot be read beyond line 0"),
        ("a.csv", b"who,text\nx\n", r"a\.csv:2 has 1 values for 2 columns"),
        ("a.csv", b"who,who\nx,y\n", "names a column twice"),
        ("a.csv", b'who,text\nx,"y\n', "cannot be read beyond line"),
        ("a.csv", b"who,text\nx,\x81\n", r"a\.csv:2: how characters are written cannot be told"),
        ("a.csv", b"who,text\n", "has no rows"),
        ("a.csv", b"", "has no rows"),
    ],
)
def test_files_that_are_broken(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_source(str(tmp_path / name)).rows())


def test_files_that_are_not_there_or_of_no_kind(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"does not exist\. Did you mean 'train\.jsonl'"):
        open_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / "nowhere" / "train.jsonl"))
    (tmp_path / "a.xls").touch()
    with pytest.raises(ConfigError, match="of no kind that can be read"):
        open_source(str(tmp_path / "a.xls"))
    with pytest.raises(DataError, match="cannot be read"):
        stamp([tmp_path / "gone"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text files"):
        open_source(str(tmp_path / "empty"))


# --- preparation -----------------------------------------------------------------------------------------------------


def test_each_owner_has_its_own_rows_and_nothing_is_lost(tmp_path, prepared, tokenizer):
    counts = {"ann": 41, "bob": 7, "cy/../é": 23}
    source = jsonl(tmp_path / "a.jsonl", answers(counts))
    owners = prepared(Data(source, by="who"))
    assert owners.ids == tuple(sorted(counts)) and owners.left_out == {} and owners.dropped == 0
    for owner, n in counts.items():
        shard = owners.shard(owner)
        texts = [*decoded(tokenizer, shard.train), *decoded(tokenizer, shard.test)]
        assert sorted(texts) == sorted(f"{owner} {i}?\n\n{owner}.{i}." for i in range(n))
        # A tenth is held out, but none of the first two rows.
        assert n // 10 - 1 <= len(shard.test) <= n / 10 + 1
        assert f"{owner} 0?\n\n{owner}.0." in decoded(tokenizer, shard.train)
        assert shard.train.lengths.tolist() == [len(shard.train.ids(i)) for i in range(len(shard.train))]
        assert shard.train.ids(0).dtype == np.int32 and 0 < shard.train.start(0) < shard.train.lengths[0]
        with pytest.raises(IndexError):
            shard.train.ids(len(shard.train))


def test_preparing_again_finds_the_same(tmp_path, prepared, tokenizer):
    rows = answers({"ann": 30, "bob": 30})
    source = jsonl(tmp_path / "a.jsonl", rows)
    data, stages = Data(source, by="who"), []
    first = prepared(data, progress=lambda stage, n: stages.append((stage, n)))
    assert stages[-1] == ("Tokenizing rows", 60)
    again = prepared(data, progress=lambda stage, n: pytest.fail("it was read again"))
    assert again.folder == first.folder and again.picture() == first.picture()
    copied = tmp_path / "copy"
    copied.mkdir()
    assert prepared(replace(data, source=jsonl(copied / "a.jsonl", rows))).fingerprint == first.fingerprint
    changed = [
        prepared(replace(data, limit=20)),
        prepared(data, CausalLM()),
        prepared(data, key=Key.root(1)),
        prepared(replace(data, source=jsonl(tmp_path / "a.jsonl", rows[:-1]))),
    ]
    other = AutoTokenizer.from_pretrained(tokenizer_folder())
    other.add_tokens(["king?"])
    changed.append(prepared(data, tokenizer=other))
    assert len({owners.fingerprint for owners in [first, *changed]}) == 6
    # Calls in between leave their mark on a tokenizer, but it is the same one.
    tokenizer("a b c", truncation=True, max_length=2)
    jsonl(tmp_path / "a.jsonl", rows)
    assert prepared(data).fingerprint == first.fingerprint
    assert not list((tmp_path / "cache").glob(".*"))


def test_what_is_held_out_depends_on_the_owner_alone(tmp_path, prepared, tokenizer):
    alone = prepared(Data(jsonl(tmp_path / "a.jsonl", answers({"ann": 40})), by="who"))
    among = prepared(Data(jsonl(tmp_path / "b.jsonl", answers({"ann": 40, "bob": 55})), by="who"))
    assert decoded(tokenizer, alone.shard("ann").test) == decoded(tokenizer, among.shard("ann").test)
    none = prepared(Data(str(tmp_path / "a.jsonl"), by="who", test_fraction=0.0))
    assert len(none.shard("ann").test) == 0 and len(none.shard("ann").train) == 40
    half = prepared(Data(str(tmp_path / "a.jsonl"), by="who", test_fraction=0.5))
    assert 17 <= len(half.shard("ann").test) <= 20


def test_a_test_file_and_a_limit(tmp_path, prepared, tokenizer):
    train = jsonl(tmp_path / "train.jsonl", answers({"ann": 30, "bob": 12}))
    test = jsonl(tmp_path / "test.jsonl", answers({"ann": 4, "eve": 3}))
    owners = prepared(Data(train, test=test, by="who", limit=20))
    assert [(row["owner"], row["train"], row["test"]) for row in owners.picture()] == [("ann", 20, 4), ("bob", 12, 0)]
    assert owners.left_out == {"eve": "it has test rows but no training rows"}
    limited = prepared(Data(train, by="who", limit=20)).shard("ann")
    assert len(limited.train) == 20 and len(limited.test) <= 3


def test_owners_without_usable_data_are_named(tmp_path, prepared, caplog):
    rows = [*answers({"ann": 5, "one": 1}), *({"who": "mute", "instruction": "a", "response": " "} for _ in range(3))]
    owners = prepared(Data(jsonl(tmp_path / "a.jsonl", rows), by="who"))
    assert owners.ids == ("ann",) and owners.dropped == 0 and owners.bad_rows.counts == {"text": 3}
    assert owners.left_out == {
        "mute": "none of its rows can be used (3 without text)",
        "one": "it has 1 usable training example(s), fewer than min_examples=2",
    }
    assert "owner mute is left out" in caplog.text
    with pytest.raises(DataError, match=r"no owner 'one'.*left out: it has 1 usable"):
        owners.shard("one")
    with pytest.raises(DataError, match=r"No owner in .* has usable data"):
        prepared(Data(jsonl(tmp_path / "b.jsonl", rows[5:]), by="who", min_examples=9))
    assert [path.name for path in owners.folder.iterdir() if path.is_dir()] == [disk.slug("ann")]


def test_labels_are_those_of_training_sorted(tmp_path, prepared):
    rows = answers({"ann": 30, "bob": 30}, label="dacb")
    source, task = jsonl(tmp_path / "a.jsonl", rows), Classification()
    owners = prepared(Data(source, by="who"), task)
    assert owners.labels == ("a", "b", "c", "d")
    where = {row["text"]: row["label"] for row in rows}
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    for owner in owners.ids:
        shard = owners.shard(owner)
        for examples in (shard.train, shard.test):
            for i, words in enumerate(decoded(tokenizer, examples)):
                assert owners.labels[examples.label(i)] == where[words]
        assert sum(shard.histogram().values()) == len(shard.train) and shard.labels == owners.labels
    named = prepared(Data(source, by="who"), Classification(labels=("d", "c", "b", "a", "z")))
    assert named.labels == ("d", "c", "b", "a", "z")
    label = named.shard("ann").train.label(0)
    assert named.labels[label] == where[decoded(tokenizer, named.shard("ann").train)[0]]
    with pytest.raises(DataError, match="has the label 'c', which is not in the task's labels"):
        prepared(Data(source, by="who"), Classification(labels=("a", "b", "d")))
    test = jsonl(tmp_path / "test.jsonl", [{**rows[0], "label": "new"}])
    with pytest.raises(DataError, match=r"test\.jsonl:1 has the label 'new', which is not in the training data"):
        prepared(Data(source, test=test, by="who"), task)


def test_simulated_owners(tmp_path, prepared, tokenizer):
    rows = answers({"ann": 300}, label="abcd")
    source = jsonl(tmp_path / "a.jsonl", rows)
    test = jsonl(tmp_path / "test.jsonl", rows[:100])
    for partition in (IID(12), Dirichlet(0.3, 12), QuantitySkew(0.5, 12), Shards(12, 2)):
        owners = prepared(Data(source, partition=partition), Classification())
        assert set(owners.ids) | set(owners.left_out) == {f"client{k:02d}" for k in range(12)}
        texts = [
            words for owner in owners.ids for part in ("train", "test") for words in decoded(tokenizer, getattr(owners.shard(owner), part))
        ]
        assert len(texts) == len(set(texts)) >= 290
    skewed = prepared(Data(source, test=test, partition=Dirichlet(0.1, 4)), Classification())
    assert sum(row["test"] for row in skewed.picture()) == 100
    # Test rows follow their client's own labels: they never have one that it does not train on.
    for owner in skewed.ids:
        shard = skewed.shard(owner)
        assert {skewed.labels[shard.test.label(i)] for i in range(len(shard.test))} <= set(shard.histogram())
    labelled = prepared(Data(source, partition=Dirichlet(0.1, 4, label="label")), CausalLM())
    assert len(labelled.ids) >= 2 and labelled.labels == ()
    with pytest.raises(ConfigError, match=r"divides rows by label, but the task .* has none"):
        prepared(Data(source, partition=Dirichlet(0.1, 4)), CausalLM())


def test_packed_and_masked_examples_on_disk(tmp_path, prepared, tokenizer):
    rows = answers({"ann": 700, "bob": 3})
    source = jsonl(tmp_path / "a.jsonl", rows)
    owners = prepared(Data(source, by="who", test_fraction=0.0), CausalLM(max_length=16))
    train = owners.shard("ann").train
    assert set(train.lengths[:-1].tolist()) == {16}
    packed = tokenizer.decode(np.concatenate([train.ids(i) for i in range(len(train))]))
    assert packed.replace(tokenizer.bos_token or "", "").split(tokenizer.eos_token)[:700] == [f"ann {i}" for i in range(700)]
    assert owners.picture()[0]["tokens"] == train.lengths.sum()
    task = MaskedLM()
    masked = prepared(Data(source, by="who"), task).shard("ann").train
    assert masked.vocabulary.mask == tokenizer.mask_token_id and masked.vocabulary.size == len(tokenizer)
    assert len(task.rows(masked, np.arange(5), np.random.default_rng(0))) == 5


def test_everybody_as_one_without_a_copy(tmp_path, prepared, tokenizer):
    counts = {"ann": 12, "bob": 31, "cy": 5}
    owners = prepared(Data(jsonl(tmp_path / "a.jsonl", answers(counts)), by="who"), Classification())
    pooled = owners.pooled()
    assert pooled.ids == ("all",) and pooled.labels == owners.labels
    everyone, shards = pooled.shard("all"), [owners.shard(owner) for owner in owners.ids]
    for split in ("train", "test"):
        parts, whole = [getattr(shard, split) for shard in shards], getattr(everyone, split)
        assert len(whole) == sum(map(len, parts))
        assert whole.lengths.tolist() == [n for part in parts for n in part.lengths.tolist()]
        assert decoded(tokenizer, whole) == [words for part in parts for words in decoded(tokenizer, part)]
        assert [whole.label(i) for i in range(len(whole))] == [part.label(i) for part in parts for i in range(len(part))]
    assert everyone.histogram() == dict(sum((Counter(shard.histogram()) for shard in shards), Counter()))
    assert pooled.picture()[0]["train"] == sum(row["train"] for row in owners.picture())
    assert owners.only("bob").ids == ("bob",)
    assert len(owners.only("bob").pooled().shard("all").train) == len(owners.shard("bob").train)


def test_an_owners_folder_is_all_its_process_needs(tmp_path, prepared, tokenizer):
    owners = prepared(Data(jsonl(tmp_path / "a.jsonl", answers({"ann": 12, "bob": 31})), by="who"), Classification())
    away = tmp_path / "elsewhere"
    owners.path("bob").rename(away)
    alone = Shard.open(away)
    assert alone.owner == "bob" and alone.labels == owners.labels and len(alone.train) + len(alone.test) == 31
    assert all(words.startswith("bob") for words in decoded(tokenizer, alone.train))
    assert alone.vocabulary.size == len(tokenizer)


def test_a_thousand_owners_hold_few_files_open(tmp_path, prepared):
    source = jsonl(tmp_path / "a.jsonl", answers({f"owner {k}": 4 for k in range(1000)}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    layout._mapped.cache_clear()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 300, hard))
    try:
        owners = prepared(Data(source, by="who"))
        shards = [owners.shard(owner) for owner in owners.ids]
        assert sum(len(shard.train.ids(0)) > 0 for shard in shards) == 1000
        pooled = owners.pooled().shard("all").train
        assert sum(len(pooled.ids(i)) for i in range(len(pooled))) == pooled.lengths.sum()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        layout._mapped.cache_clear()


def test_what_the_recipe_must_say(tmp_path, prepared):
    source = jsonl(tmp_path / "a.jsonl", answers({"ann": 5}))
    with pytest.raises(ConfigError, match=r"does not say who owns the rows.*'by'.*'partition'"):
        prepared(Data(source))
    with pytest.raises(DataError, match=r"a\.jsonl:1 has no column 'wo'\. Did you mean 'who'\?"):
        prepared(Data(source, by="wo"))
    with pytest.raises(DataError, match=r"a\.jsonl:1 has no column 'txt'\. Did you mean 'text'\?"):
        prepared(Data(source, by="who"), CausalLM(text="txt"))
    with pytest.raises(ConfigError, match="max_length is 256 tokens, but the model's context is 64"):
        prepared(Data(source, by="who"), max_context=64)
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'who' holds NoneType None"):
        prepared(Data(jsonl(tmp_path / "a.jsonl", [{"who": 1, "text": "a"}, {"who": None, "text": "a"}]), by="who"), CausalLM())
    assert not list((tmp_path / "cache").glob("*")) or not list((tmp_path / "cache").glob(".*"))


def test_a_cache_that_cannot_be_written_or_read(tmp_path, tokenizer, prepared, monkeypatch):
    data = Data(jsonl(tmp_path / "a.jsonl", answers({"ann": 5})), by="who")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"could not be written|cannot be written"):
        prepare(data, Instruct(), tokenizer, key=KEY, cache=tmp_path / "file" / "cache")
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "home"))
    owners = prepare(data, Instruct(), tokenizer, key=KEY)
    assert owners.folder.parent == tmp_path / "home" / "data"
    with pytest.raises(DataError, match="does not hold prepared data"):
        Owners.open(tmp_path)
    head = json.loads((owners.folder / "owners.json").read_text())
    layout.write(owners.folder / "owners.json", {**head, "version": 0})
    with pytest.raises(DataError, match="another version"):
        Owners.open(owners.folder)


def test_memory_does_not_grow_with_the_file(tmp_path, prepared):
    rows = ({"who": str(i % 7), "text": f"cat {i} " * 20, "else": "x" * 20_000} for i in range(3000))
    source = jsonl(tmp_path / "a.jsonl", rows)
    assert Path(source).stat().st_size > 60e6
    tracemalloc.start()
    try:
        prepared(Data(source, by="who"), CausalLM())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6


def test_the_shared_sets(tmp_path, prepared):
    folder = SHARED / "banking77"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set FEDFM_SHARED_DATA")
    owners = prepared(Data(str(folder / "train.jsonl.gz"), test=str(folder / "test.jsonl.gz"), by="client"), Classification())
    assert len(owners.ids) == 10 and len(owners.labels) == 77
    pooled = owners.pooled().shard("all")
    assert (len(pooled.train), len(pooled.test)) == (8978, 1025)


def test_the_standard_library_is_prepared(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(stdlib, "rows", lambda rows=stdlib.rows: islice(rows(), 150))
    owners = prepared(Data("stdlib"), CausalLM())
    assert len(owners.ids) >= 1 and owners.picture()[0]["tokens"] > 10_000


def test_prepared_rows_are_their_users_alone(tmp_path, prepared):
    before = os.umask(0o000)
    try:
        owners = prepared(Data(jsonl(tmp_path / "rows.jsonl", answers({"ann": 4})), by="who"))
    finally:
        os.umask(before)
    assert owners.folder.stat().st_mode & 0o777 == 0o700

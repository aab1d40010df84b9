"""Recipes: what is written is what is read, and an error names its place."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfm.aggregators import CoordinateMedian, Mean, TrimmedMean
from fedfm.core.errors import ConfigError
from fedfm.data import IID, Data, Dirichlet, Shards
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.local import SGD, AdamW, FedProx
from fedfm.methods import Scaffold
from fedfm.models import Model
from fedfm.notation import build
from fedfm.observers import Evaluate, TensorBoard
from fedfm.recipe import dump, load, located, read
from fedfm.samplers import All, Poisson, Uniform, Weighted
from fedfm.server import FedAdam, FedAvg
from fedfm.tasks import CausalLM, Classification, Instruct
from fedfm.transforms import ClipByNorm, Int8, TopK
from fedfm.tuning import BitFit, LoRA, Peft

BASE = "model: gpt2\ndata: {source: stdlib}\n"

# Names that one YAML or another reads as something else, and names with what YAML is made of.
names = st.one_of(
    st.sampled_from(
        ["no", "on", "null", "~", "1e-3", "010", "0x1f", "1_000", "12:30", "2020-01-01", ".inf", "<<", "=", "a: b", "- x", "#", "{", "*a"]
    ),
    st.text(min_size=1),
)
positive = st.floats(1e-9, 1e6)
sizes = st.integers(1, 1 << 20)
trainers = st.one_of(
    st.builds(AdamW, lr=positive, steps=sizes, batch_size=st.none() | sizes, schedule=st.sampled_from(["constant", "cosine"])),
    st.builds(SGD, lr=positive, epochs=sizes, steps=st.none()),
)
configs = st.dictionaries(
    names,
    st.one_of(
        st.booleans(),
        st.none(),
        st.integers(-(1 << 62), 1 << 62),
        st.floats(allow_nan=False),
        names,
        st.lists(st.integers(-(1 << 62), 1 << 62)),
    ),
)
federations = st.builds(
    Federation,
    model=st.builds(Model, source=names, tokenizer=st.none() | names, dtype=st.sampled_from(["float32", "bfloat16"]))
    | st.builds(Model, architecture=names, config=configs, tokenizer=names, gradient_checkpointing=st.booleans()),
    data=st.builds(Data, source=names, test=st.none() | names, by=names, limit=st.none() | sizes)
    | st.builds(Data, source=names, partition=st.builds(Dirichlet, alpha=positive, clients=sizes) | st.builds(Shards, clients=sizes)),
    name=names,
    task=st.builds(CausalLM, text=names) | st.builds(Instruct, input=st.none() | names) | st.builds(Classification, label=names),
    tuning=st.builds(LoRA, r=sizes, alpha=positive, targets=st.none() | st.lists(names, min_size=1).map(tuple)) | st.builds(BitFit),
    local=trainers | st.builds(FedProx, inner=trainers, mu=positive),
    sampler=st.builds(All)
    | st.builds(Uniform, clients=sizes)
    | st.builds(Weighted, clients=sizes, weights=st.dictionaries(names, positive)),
    transforms=st.lists(
        st.builds(ClipByNorm, max_norm=positive) | st.builds(Int8) | st.builds(TopK, fraction=st.floats(0.01, 1)), max_size=3
    ).map(tuple),
    aggregator=st.builds(Mean) | st.builds(CoordinateMedian) | st.builds(TrimmedMean, trim=sizes),
    server=st.builds(FedAvg, lr=positive) | st.builds(FedAdam, lr=positive),
    method=st.none() | st.builds(Scaffold, lr=positive),
    engine=st.builds(Embedded, bank=st.just("auto") | sizes),
    evaluate=st.builds(Evaluate, every=st.integers(0, 9)),
    observers=st.just(()) | st.just((TensorBoard(),)),
    rounds=st.integers(0, 1 << 40),
    seed=st.integers(-(1 << 62), 1 << 62),
    deadline=st.none() | positive,
)


@settings(max_examples=60, deadline=None)
@given(federations)
def test_what_is_dumped_is_what_is_loaded(federation: Federation) -> None:
    text = dump(federation)
    assert load(text) == federation
    assert dump(load(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_written_it_loads_or_is_refused(data: st.DataObject) -> None:
    text = "model: {Llama: {hidden_size: 8, tokenizer: t}}\ndata: {source: s, by: o}\ntuning: {LoRA: {r: 8, targets: [q]}}\ntransforms: [Int8]\n"
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        new = data.draw(st.sampled_from(["{", "}", "[", "]", ": ", ", ", "\n", "  ", "- ", "null", "1e9", "!!timestamp x", "!!binary a", "!!int x", "9" * 5000, "'", "#", "<<", "? ", "|", "\t", "%", "@", "\0"]))  # fmt: skip
        text = text[:start] + new + text[start + data.draw(st.integers(0, 9)) :]
    with contextlib.suppress(ConfigError):
        build(
            Federation,
            text,
            "recipe",
            data.draw(st.lists(st.sampled_from(["tuning.r=1", "model.x.y=2", "transforms.0.z={", "data.by="]), max_size=2)),
        )


def test_nothing_is_nested_without_end() -> None:
    with pytest.raises(ConfigError, match="recursion"):
        load(BASE + "name: " + "[" * 3000)


def test_the_readme_recipe() -> None:
    federation = load("""
name: dolly-lora
model: ../models/tiny
data: {source: train.jsonl.gz, test: test.jsonl.gz, by: client}
task: {Instruct: {instruction: instruction, input: context, response: response, max_length: 256}}
tuning: {LoRA: {r: 8, alpha: 16, targets: [q_proj, v_proj]}}
local: {AdamW: {lr: 1.0e-3, steps: 10, batch_size: 4}}
sampler: {Uniform: {clients: 4}}
transforms: [{ClipByNorm: {max_norm: 1.0}}]
aggregator: {Mean: {}}
server: {FedAvg: {lr: 1.0}}
engine: {Embedded: {}}
rounds: 10
seed: 0
""")
    assert federation == Federation(
        name="dolly-lora",
        model=Model("../models/tiny"),
        data=Data("train.jsonl.gz", test="test.jsonl.gz", by="client"),
        task=Instruct(input="context", max_length=256),
        tuning=LoRA(r=8, alpha=16.0, targets=("q_proj", "v_proj")),
        local=AdamW(lr=1e-3, steps=10, batch_size=4),
        sampler=Uniform(clients=4),
        transforms=(ClipByNorm(max_norm=1.0),),
    )
    assert isinstance(federation.tuning.alpha, float), "a whole number where a number is wanted"  # type: ignore[attr-defined]


def test_short_forms_mean_the_long_ones() -> None:
    assert load(BASE + "tuning: BitFit") == load(BASE + "tuning: {BitFit: {}}") == load(BASE + "tuning: {BitFit: }")
    assert load("model: {source: gpt2}\ndata: {source: stdlib}") == load(BASE)
    scratch = load("model: {Llama: {hidden_size: 64, tokenizer: tok, dtype: bfloat16}}\ndata: {source: stdlib}")
    assert scratch.model == Model(architecture="Llama", config={"hidden_size": 64}, tokenizer="tok", dtype="bfloat16")  # type: ignore[arg-type]
    assert load(BASE + "local: {FedProx: {inner: {SGD: {lr: 1e-2}}}}").local == FedProx(SGD(lr=0.01))
    prompts = load(BASE + "tuning: {Peft: {type: PROMPT_TUNING, config: {num_virtual_tokens: 4, layers: [1, 2]}}}", ["tuning.config.x=1"])
    assert (
        prompts.tuning == Peft("PROMPT_TUNING", (("layers", (1, 2)), ("num_virtual_tokens", 4), ("x", 1)))
        and load(dump(prompts)) == prompts
    )


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.5E+2", 150.0), (".5", 0.5), ("1.", 1.0), ("3", 3.0), ("1.0e-3", 1e-3)])
def test_every_way_to_write_a_number(text: str, value: float) -> None:
    assert load(BASE + f"local: {{AdamW: {{lr: {text}}}}}").local == AdamW(lr=value)


def test_plain_words_are_text() -> None:
    assert load("model: on\ndata: {source: 2020-01-01, by: no}").data == Data("2020-01-01", by="no")


@pytest.mark.parametrize(
    ("override", "variant"),
    [
        ("rounds=20", lambda f: replace(f, rounds=20)),
        ("tuning.LoRA.r=16", lambda f: replace(f, tuning=LoRA(r=16, alpha=32.0))),
        ("tuning.r=16", lambda f: replace(f, tuning=LoRA(r=16, alpha=32.0))),
        ("tuning={BitFit: {}}", lambda f: replace(f, tuning=BitFit())),
        ("tuning=BitFit", lambda f: replace(f, tuning=BitFit())),
        ("tuning.LoRA={r: 2}", lambda f: replace(f, tuning=LoRA(r=2))),
        ("tuning.targets=[q_proj]", lambda f: replace(f, tuning=LoRA(alpha=32.0, targets=("q_proj",)))),
        ("data.by=shepherd_client", lambda f: replace(f, data=Data("stdlib", by="shepherd_client"))),
        ("data.partition={IID: {clients: 3}}", lambda f: replace(f, data=Data("stdlib", partition=IID(3)))),
        ("transforms.0.max_norm=2", lambda f: replace(f, transforms=(ClipByNorm(2.0), Int8()))),
        ("transforms.1=CastBF16", None),
        ("transforms=[]", lambda f: replace(f, transforms=())),
        ("server.lr=0.5", lambda f: replace(f, server=FedAvg(lr=0.5))),
        ("local.lr=1e-2", lambda f: replace(f, local=AdamW(lr=0.01))),
        ("evaluate.every=5", lambda f: replace(f, evaluate=Evaluate(every=5))),
        ("model.dtype=bfloat16", lambda f: replace(f, model=Model("gpt2", dtype="bfloat16"))),
        ("model={Llama: {hidden_size: 8, tokenizer: t}}", None),
        ("deadline=", lambda f: f),
        ("name=a=b", lambda f: replace(f, name="a=b")),
    ],
)
def test_any_field_can_be_overridden(override: str, variant) -> None:  # type: ignore[no-untyped-def]
    text = BASE + "tuning: {LoRA: {alpha: 32}}\ntransforms: [{ClipByNorm: {max_norm: 1.0}}, Int8]\n"
    federation = load(text, [override])
    assert variant is None or federation == variant(load(text))
    assert load(dump(federation)) == federation


def test_overrides_of_a_nested_part_and_of_a_config() -> None:
    text = "model: {Llama: {hidden_size: 8, tokenizer: t}}\ndata: {source: s, partition: {IID: {clients: 3}}}\nlocal: {FedProx: {inner: SGD}}\n"
    federation = load(text, ["model.hidden_size=16", "model.Llama.rope_theta=1e4", "data.partition.clients=5", "local.inner.lr=0.5"])
    assert dict(federation.model.config) == {"hidden_size": 16, "rope_theta": 1e4}
    assert federation.data.partition == IID(5) and federation.local == FedProx(SGD(lr=0.5))
    assert load(dump(federation), ["model.hidden_size=32", "model.config.x=1"]).model.config == (
        ("hidden_size", 32),
        ("rope_theta", 1e4),
        ("x", 1),
    )


REFUSED = {
    "an unknown key": (BASE + "tunning: LoRA", ["recipe:3", "'tunning'", "Did you mean 'tuning'?"]),
    "an unknown part": (BASE + "tuning: {Lora: {r: 8}}", ["recipe:3", "'Lora'", "Did you mean 'LoRA'?", "BitFit"]),
    "an unknown field": (BASE + "tuning:\n  LoRA:\n    rank: 8", ["recipe:5", "tuning.LoRA", "'rank'", "alpha"]),
    "a wrong type": (BASE + "tuning: {LoRA: {r: eight}}", ["recipe:3", "tuning.LoRA.r", "'eight'", "a whole number"]),
    "a fraction of a rank": (BASE + "tuning: {LoRA: {r: 1.5}}", ["tuning.LoRA.r", "1.5", "a whole number"]),
    "a truth for a number": (BASE + "rounds: true", ["rounds", "True", "a whole number"]),
    "a number for a text": (BASE + "name: 3", ["name", "3", "text"]),
    "a negative rank": (BASE + "\n\ntuning: {LoRA: {alpha: 1,\n  r: -1}}", ["recipe:6", "tuning.LoRA", "-1"]),
    "negative rounds": (BASE + "rounds: -1", ["recipe:3", "rounds is -1", "0 or more"]),
    "a choice that is none": (BASE + "on_failure: ignore", ["recipe:3", "on_failure", "'ignore'", "leave_out, retry, stop"]),
    "two parts under one key": (BASE + "server: {FedAvg: {}, FedAdam: {}}", ["recipe:3", "server", "a part"]),
    "a list for a part": (BASE + "server: [FedAvg]", ["recipe:3", "server", "FedAdam"]),
    "a part for a list": (BASE + "transforms: {ClipByNorm: {max_norm: 1}}", ["recipe:3", "transforms", "a list of parts"]),
    "a part of another room": (BASE + "data: {source: s, partition: Data}".replace("data:", "task:"), ["recipe:3", "task"]),
    "not a partitioner": ("model: m\ndata: {source: s, partition: {Data: {source: s}}}", ["recipe:2", "data.partition", "Dirichlet"]),
    "a field left out": (BASE + "transforms: [ClipByNorm]", ["recipe:3", "transforms.0.ClipByNorm", "max_norm", "a number"]),
    "no data": ("model: gpt2\n", ["recipe:1", "data"]),
    "a key twice": (BASE + "rounds: 1\nrounds: 2", ["recipe:4", "'rounds'", "recipe:3"]),
    "a nested key twice": (BASE + "tuning: {LoRA: {r: 1, r: 2}}", ["recipe:3", "'r'"]),
    "no YAML": ("model: [\ndata: }", ["recipe:2", "not YAML"]),
    "an alias": (BASE + "tuning: &a LoRA\nlocal: *a", ["recipe:4", "aliases"]),
    "a tag": (BASE + "name: !!python/object:os.system x", ["recipe:3"]),
    "nothing": ("\n", ["empty"]),
    "a list": ("\n- model", ["mapping"]),
    "a model that is a list": ("model: [a]\ndata: {source: s}", ["recipe:1", "model"]),
    "a model of two kinds": (
        "model: {source: a, architecture: Llama, tokenizer: t}\ndata: {source: s}",
        ["recipe:1", "model", "one of the two"],
    ),
    "a scratch model without tokenizer": ("model: {Llama: {hidden_size: 8}}\ndata: {source: s}", ["recipe:1", "tokenizer"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_with_its_place(case: str) -> None:
    text, words = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load(text)
    for part in words:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("round=3", "Did you mean 'rounds'?"),
        ("rounds", "key=value"),
        ("tuning.rr=3", "tuning.LoRA has no 'rr'"),
        ("tuning.BitFit.bias=3", "tuning is LoRA here"),
        ("tuning.LoRA.r=x", "a whole number"),
        ("transforms.0.max_norm=1", "a list of 0"),
        ("method.lr=1", "has no method"),
        ("rounds.x=1", "nothing named 'x'"),
        ("tuning={", "not YAML"),
        ("data.sorce=x", "Did you mean 'source'?"),
    ],
)
def test_overrides_that_name_nothing(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load(BASE + "tuning: LoRA", [override])
    assert "override" in str(caught.value)


def test_paths_are_taken_from_the_recipe_then_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "recipes", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    for path in (home / "near.jsonl", here / "near.jsonl", here / "far.jsonl"):
        path.touch()
    (home / "r.yaml").write_text("model: hub/name\ndata: {source: near.jsonl, test: far.jsonl, by: client}\n")
    monkeypatch.chdir(here)
    federation = read(home / "r.yaml")
    assert (
        federation.data.source == str(home / "near.jsonl") and federation.data.test == "far.jsonl" and federation.model.source == "hub/name"
    )
    assert located(federation).data.test == str(here / "far.jsonl")
    assert load(home / "r.yaml") == load(str(home / "r.yaml")) == federation
    (home / "stdlib").touch()
    (home / "s.yaml").write_text("model: m\ndata: {source: stdlib}\n")
    assert read(home / "s.yaml").data.source == "stdlib", "a source by name is no path"


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "dolly-lora.yaml").touch()
    with pytest.raises(ConfigError, match=r"no recipe at .*Did you mean 'dolly-lora.yaml'"):
        read(tmp_path / "doly-lora.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


def test_the_file_and_line_are_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BASE + "tuning: {LoRA: {r: x}}\n")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'r.yaml'}:3: tuning.LoRA.r is 'x'")):
        read(tmp_path / "r.yaml")


def test_sampling_rates_stay_what_they_are() -> None:
    assert load(BASE + "sampler: {Poisson: {rate: 0.1}}").sampler == Poisson(rate=0.1)

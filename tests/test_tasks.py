import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import Pairs
from transformers import AutoTokenizer

from fedfm.core import registry
from fedfm.core.batch import IGNORE, Row, Shaping, collate
from fedfm.core.errors import ConfigError, DataError, ModelError
from fedfm.core.keys import Key
from fedfm.core.task import Task
from fedfm.data import Data, prepare
from fedfm.data.records import Record
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.models import Model, load_tokenizer
from fedfm.models.foundation import save
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM, Classification, Instruct, MaskedLM
from fedfm.testing import check_task, examples, tiny
from fedfm.testing.tasks import Encoded
from fedfm.testing.tiny import tokenizer_folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tokenizer_folder())


# Long enough that every task has something to cut.
ROWS = [
    {"text": text * 3, "label": text.split()[2], "instruction": text, "response": text * 2, "context": text} for text in tiny.TEXT[::29]
]
EXAMPLES = {
    "CausalLM": [CausalLM(max_length=16), CausalLM(max_length=24, packed=False)],
    "Instruct": [Instruct(max_length=32), Instruct(max_length=32, input="context", template="alpaca")],
    "MaskedLM": [MaskedLM(max_length=24)],
    "Classification": [Classification(max_length=16)],
}


@pytest.mark.parametrize("task", examples("tasks", EXAMPLES), ids=repr)
def test_conformance(task, tokenizer):
    check_task(task, ROWS, tokenizer)


def test_a_task_with_a_loss_and_an_input_of_its_own_conforms(tokenizer):
    check_task(Pairs(better="text", worse="context"), ROWS, tokenizer)


def encode(task, tokenizer, rows, chunk=3):
    encoder = task.encoder(tokenizer)
    examples = [example for i in range(0, len(rows), chunk) for example in encoder.add(rows[i : i + chunk])]
    return examples + encoder.flush(), encoder.dropped


def rows_of(task, tokenizer, rows, seed=0):
    examples, _ = encode(task, tokenizer, rows)
    labels = tuple(sorted({example.label for example in examples} - {None}))
    return task.rows(Encoded(examples, tokenizer, labels), np.arange(len(examples)), np.random.default_rng(seed))


texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=12)


# --- causal ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(texts, st.integers(2, 20), st.integers(1, 5))
def test_packed_blocks_are_the_texts_one_after_the_other(tokenizer, texts, max_length, chunk):
    examples, dropped = encode(CausalLM(max_length=max_length), tokenizer, [{"text": words} for words in texts], chunk)
    used = [words for words in texts if words.strip()]
    opens = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    whole = [i for words in used for i in (*opens, *tokenizer(words, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)]
    packed = [i for example in examples for i in example.ids.tolist()]
    # A last block of one token has nothing to predict.
    assert packed == (whole[:-1] if len(whole) % max_length == 1 else whole)
    assert all(len(example.ids) == max_length for example in examples[:-1])
    assert dropped == len(texts) - len(used)


def test_causal_targets_are_the_next_tokens(tokenizer):
    for ids, targets, _ in rows_of(CausalLM(max_length=8), tokenizer, [{"text": "the small cat saw the house."}] * 5):
        assert targets[:-1].tolist() == ids[1:].tolist() and targets[-1] == IGNORE


def test_unpacked_is_a_text_per_example(tokenizer):
    rows = [{"text": "the cat"}, {"text": "the small old dog took the book. " * 20}]
    examples, _ = encode(CausalLM(max_length=16, packed=False), tokenizer, rows)
    assert len(examples) == 2 and examples[0].ids[-1] == tokenizer.eos_token_id and len(examples[1].ids) == 16


# --- instruct --------------------------------------------------------------------------------------------------------

ASKED = {"instruction": "the old king?", "context": "the red bird found the tree.", "response": "the quiet dog."}


@pytest.mark.parametrize("template", ["plain", "alpaca"])
@pytest.mark.parametrize("column", [None, "context"])
def test_the_loss_is_on_the_response_and_its_end(tokenizer, template, column):
    task = Instruct(input=column, template=template)
    ((ids, targets, _),) = rows_of(task, tokenizer, [ASKED])
    asked = targets != IGNORE
    assert tokenizer.decode(targets[asked]) == ASKED["response"] + tokenizer.eos_token
    prompt = tokenizer.decode(ids[: np.flatnonzero(asked)[0] + 1], skip_special_tokens=True)
    assert prompt == task.prompt(tokenizer, ASKED["instruction"], ASKED["context"] if column else "")
    assert (ASKED["context"] in prompt) == (column is not None) and ASKED["instruction"] in prompt


def test_chat_uses_the_tokenizers_template():
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    task = Instruct(template="chat", input="context")
    ((ids, targets, _),) = rows_of(task, tokenizer, [ASKED])
    assert tokenizer.decode(targets[targets != IGNORE]) == ASKED["response"] + tokenizer.eos_token
    assert tokenizer.decode(ids).startswith(f"<user>{ASKED['instruction']}\n\n{ASKED['context']}\n<assistant>")
    # A template that writes more before an answer than within a conversation: the answer follows the prompt as it is.
    tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>{% endif %}", "<assistant><think></think>{% endif %}")
    ((ids, targets, _),) = rows_of(task, tokenizer, [ASKED])
    assert tokenizer.decode(targets[targets != IGNORE]) == ASKED["response"] + tokenizer.eos_token
    assert "<think></think>" + ASKED["response"] in tokenizer.decode(ids)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(8, 64))
def test_a_long_example_keeps_its_response_as_far_as_a_prompt_allows(tokenizer, asked, answered, max_length):
    row = {"instruction": "the " * asked, "response": "dog " * answered}
    (example,), dropped = encode(Instruct(max_length=max_length), tokenizer, [row])
    (whole,), _ = encode(Instruct(max_length=10_000), tokenizer, [row])
    response = whole.ids[whole.start :].tolist()
    assert len(example.ids) == min(max_length, len(whole.ids)) and dropped == 0
    assert 0 < example.start < len(example.ids)
    kept = example.ids[example.start :].tolist()
    assert kept == response[: len(kept)]
    assert len(kept) == len(response) or example.start == max_length // 4 or example.start == whole.start
    # The prompt's two ends stay: what opens it, and what asks for the answer.
    assert example.ids[0] == whole.ids[0] and example.ids[example.start - 1] == whole.ids[whole.start - 1]
    none, dropped = encode(Instruct(max_length=max_length, on_long="drop"), tokenizer, [row])
    assert (len(none), dropped) == ((1, 0) if len(whole.ids) <= max_length else (0, 1))


def test_empty_answers_are_dropped_and_counted(tokenizer):
    examples, dropped = encode(Instruct(), tokenizer, [ASKED, {**ASKED, "response": " "}, {**ASKED, "instruction": ""}])
    assert len(examples) == 1 and dropped == 2
    examples, dropped = encode(Instruct(input="context"), tokenizer, [{**ASKED, "context": None}, {**ASKED, "instruction": ""}])
    assert len(examples) == 2 and dropped == 0


# --- masked ----------------------------------------------------------------------------------------------------------


def test_eighty_ten_ten(tokenizer):
    task = MaskedLM(max_length=128, mask_probability=0.2)
    examples, _ = encode(task, tokenizer, [{"text": "the small cat saw the house and the red bird found the tree. " * 8}] * 40)
    encoded = Encoded(examples, tokenizer)
    rows = task.rows(encoded, np.arange(len(examples)), np.random.default_rng(0))
    ids, inputs, targets = (
        np.concatenate(x) for x in ([example.ids for example in examples], [row.ids for row in rows], [row.targets for row in rows])
    )
    asked = targets != IGNORE
    assert (targets[asked] == ids[asked]).all() and (inputs[~asked] == ids[~asked]).all()
    words = ~np.isin(ids, tokenizer.all_special_ids)
    assert not asked[~words].any()
    assert asked[words].mean() == pytest.approx(0.2, abs=0.02)
    assert (inputs[asked] == tokenizer.mask_token_id).mean() == pytest.approx(0.8, abs=0.05)
    assert (inputs[asked] == ids[asked]).mean() == pytest.approx(0.1, abs=0.04)


def test_masks_are_drawn_from_the_rng_alone(tokenizer):
    rows = [{"text": "the small cat saw the house."}] * 3
    one, same, other = (rows_of(MaskedLM(), tokenizer, rows, seed) for seed in (0, 0, 1))
    assert all((a.ids == b.ids).all() and (a.targets == b.targets).all() for a, b in zip(one, same))
    assert any((a.targets != b.targets).any() for a, b in zip(one, other))


def test_every_masked_example_has_a_target(tokenizer):
    rows = rows_of(MaskedLM(mask_probability=1e-9), tokenizer, [{"text": "cat"}] * 5)
    assert all((row.targets != IGNORE).sum() == 1 for row in rows)
    rows = rows_of(MaskedLM(mask_probability=1.0), tokenizer, [{"text": "the cat saw."}])
    words = ~np.isin(tokenizer("the cat saw.")["input_ids"], tokenizer.all_special_ids)
    assert ((rows[0].targets != IGNORE) == words).all()


# --- classification and metrics --------------------------------------------------------------------------------------


def test_a_text_has_one_class(tokenizer):
    task = Classification(max_length=6)
    rows = [{"text": "the cat " * 9, "label": "b"}, {"text": "a dog", "label": 3}, {"text": "", "label": "b"}]
    examples, dropped = encode(task, tokenizer, rows)
    assert [example.label for example in examples] == ["b", "3"] and dropped == 1
    assert [row.targets.tolist() for row in rows_of(task, tokenizer, rows)] == [[1], [0]]
    assert len(examples[0].ids) == 6 and task.label_column == "label"


def asked(label):
    """A batch of one row for each of these classes."""
    return collate([[Row(np.array([5]), np.array([int(i)])) for i in label]], Shaping(per_row=True))


def by_hand(logits, target):
    guess, f1 = logits.argmax(1), []
    for c in range(logits.shape[1]):
        tp, fp, fn = (guess == c) & (target == c), (guess == c) & (target != c), (guess != c) & (target == c)
        if tp.sum() + fp.sum() + fn.sum():
            f1.append(float(2 * tp.sum() / (2 * tp.sum() + fp.sum() + fn.sum())))
    loss = -torch.log_softmax(logits, 1)[torch.arange(len(target)), target].mean()
    return {"loss": float(loss), "accuracy": float((guess == target).double().mean()), "macro_f1": sum(f1) / len(f1)}


def test_metrics_of_each_client_and_of_all():
    torch.manual_seed(0)
    logits, target, owner = torch.randn(50, 4), torch.randint(0, 4, (50,)), torch.randint(0, 3, (50,))
    task = Classification()
    sums = task.stats(logits, asked(target), owner, 4)
    for k in range(3):
        is_client = owner == k
        assert task.summarise({name: x[k] for name, x in sums.items()}) == pytest.approx(
            by_hand(logits[is_client], target[is_client]), rel=1e-5
        )
    assert task.summarise({name: x.sum(0) for name, x in sums.items()}) == pytest.approx(by_hand(logits, target), rel=1e-5)
    assert all(math.isnan(x) for x in task.summarise({name: x[3] for name, x in sums.items()}).values())


@pytest.mark.parametrize("task", [CausalLM(), Instruct(), MaskedLM()])
def test_language_metrics(task):
    logits = torch.full((4, 10), -1e9)
    logits[:, :5] = 0.0
    sums = task.stats(logits, asked(torch.tensor([0, 1, 2, 3])), torch.tensor([0, 0, 0, 1]), 3)
    first = task.summarise({name: x[0] for name, x in sums.items()})
    assert first == pytest.approx({"loss": math.log(5), "perplexity": 5.0, "token_accuracy": 1 / 3})
    assert all(math.isnan(x) for x in task.summarise({name: x[2] for name, x in sums.items()}).values())
    huge = {"loss": torch.tensor(1e4), "hits": torch.tensor(0.0), "targets": torch.tensor(1.0)}
    assert task.summarise(huge)["perplexity"] == math.inf


# --- refusals --------------------------------------------------------------------------------------------------------


def test_columns_that_are_not_there(tokenizer):
    row = Record({"txt": "the cat", "label": "a"}, "rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows\.jsonl:7 has no column 'text'\. Did you mean 'txt'\? Its columns: txt, label"):
        CausalLM().encoder(tokenizer).add([row])
    with pytest.raises(DataError, match=r"rows\.jsonl:7: column 'text' holds int 3, which is not text"):
        MaskedLM().encoder(tokenizer).add([Record({"text": 3}, "rows.jsonl:7")])
    with pytest.raises(DataError, match="'label' holds NoneType None"):
        Classification().encoder(tokenizer).add([{"text": "a", "label": None}])
    with pytest.raises(DataError, match="'context' holds list"):
        Instruct(input="context").encoder(tokenizer).add([{**ASKED, "context": ["a"]}])


def test_tokenizers_that_do_not_fit(tokenizer):
    bare = AutoTokenizer.from_pretrained(tokenizer_folder())
    with pytest.raises(ModelError, match="the tokenizer has none"):
        encode(Instruct(template="chat"), bare, [ASKED])
    bare.mask_token = None
    with pytest.raises(ModelError, match="no mask_token"):
        MaskedLM().encoder(bare)
    bare.eos_token = None
    for task in (CausalLM(), Instruct()):
        with pytest.raises(ModelError, match="no eos_token"):
            task.encoder(bare)


@pytest.mark.parametrize(
    "build",
    [
        lambda: CausalLM(max_length=1),
        lambda: Instruct(max_length=7),
        lambda: Instruct(template="none"),
        lambda: Instruct(on_long="cry"),
        lambda: MaskedLM(mask_probability=0.0),
        lambda: MaskedLM(mask_probability=1.5),
        lambda: Classification(labels=("a", "a")),
        lambda: Classification(labels=("a",)),
    ],
)
def test_hyperparameters_out_of_range(build):
    with pytest.raises(ConfigError):
        build()


def test_the_room_lists_its_parts():
    assert set(registry.entries("tasks")) == {"CausalLM", "Classification", "Instruct", "MaskedLM"}
    for task in (CausalLM(), Instruct(), MaskedLM(), Classification()):
        assert eval(repr(task)) == task and {part.name for part in fields(task)} >= {"max_length"}


@pytest.mark.parametrize("labels", [None, ("b", "a")], ids=str)
def test_a_trained_classifier_keeps_its_accuracy_before_the_first_round(
    labels: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes are not in the order of the alphabet."""
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    base = tiny.foundation("Roberta", labels=("b", "a"))
    with torch.no_grad():
        base.model.classifier.out_proj.weight *= 50
        logits = [base.model.eval()(**base.tokenizer(text, return_tensors="pt")).logits[0] for text in tiny.TEXT[:24]]
        # Half of the texts are of each class.
        middle = torch.stack(logits).diff(dim=1).median()
        base.model.classifier.out_proj.bias[0] += middle
        kinds = ["a" if x[1] > x[0] + middle else "b" for x in logits]
    save(base, base.model, tmp_path / "base")
    rows = [{"owner": "xy"[i % 2], "text": text, "label": kind} for i, (text, kind) in enumerate(zip(tiny.TEXT, kinds))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = Federation(
        model=Model(str(tmp_path / "base")),
        data=Data(str(tmp_path / "rows.jsonl"), by="owner", test_fraction=0.0),
        task=Classification(max_length=24, labels=labels),
        engine=Embedded(bank=1, device="cpu"),
    )
    house = Simulation.build(plan).house
    assert house.labels == ("b", "a") and set(kinds) == {"a", "b"}
    sums = house.bank.evaluate(house.tuned.spec.flatten(house.start).unsqueeze(0), [house.shard("x").train, house.shard("y").train])
    assert plan.task.summarise({name: x.sum(0) for name, x in sums.items()})["accuracy"] == 1.0


def test_classes_are_sorted_where_the_base_tells_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"who": "x", "text": text, "label": "ab"[i % 2]}) for i, text in enumerate(tiny.TEXT[:8])))
    tokenizer = load_tokenizer(tiny.tokenizer_folder())

    def labels(task: Task, *classes: str) -> tuple[str, ...]:
        return prepare(Data(str(path), by="who"), task, tokenizer, key=Key.root(0), classes=classes, cache=tmp_path / "cache").labels

    assert labels(Classification()) == labels(Classification(), "b", "c") == labels(Classification(), "b", "a", "c") == ("a", "b")
    assert labels(Classification(), "b", "a") == ("b", "a")
    assert labels(Classification(labels=("a", "b", "c")), "c", "b", "a") == ("a", "b", "c")

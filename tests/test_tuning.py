"""Our tunings equal PEFT's on the same weights, save in PEFT's layout, and merge into plain models."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import parts
import pytest
import torch
from parts import Hadamard, Personal, Ranks
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from fedfm.client.bank import Bank, Job
from fedfm.core import registry
from fedfm.core.batch import Batch
from fedfm.core.errors import ConfigError, ModelError
from fedfm.core.keys import Key
from fedfm.core.parts import LocalTrainer
from fedfm.core.tree import equal
from fedfm.local import SGD, AdamW
from fedfm.models import Foundation, Model, load
from fedfm.models.foundation import classes_of, device_of, read_config, save
from fedfm.tasks import CausalLM
from fedfm.testing import check_tuning, examples, tiny
from fedfm.testing.parts import same
from fedfm.tuning import IA3, BitFit, Full, Head, LoRA, Peft, attach_adapter, load_adapter
from fedfm.tuning.base import Tuning
from fedfm.tuning.layout import plain_copy

TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
SHAPES = list(tiny.CONFIGS)


def ours(tuning: Tuning, foundation: Foundation, batch: Batch, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tuned = tuning.attach(foundation)
    params = tiny.disturbed(dict(tuned.init(Key.root(0))), seed)
    tuned.bind(tuned.spec.flatten(params).unsqueeze(0))
    with torch.no_grad():
        return tuned.logits(batch), params


EXAMPLES = {
    "LoRA": [LoRA(r=3, rslora=True), LoRA(r=2, targets=("all-linear",), dropout=0.2)],
    "BitFit": [BitFit()],
    "Head": [Head()],
    "Peft": [Peft("LOHA", {"r": 2, "target_modules": ["q_proj"]}), Peft("PROMPT_TUNING", {"num_virtual_tokens": 3})],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("tuning", examples("tuning", EXAMPLES), ids=repr)
def test_conformance(tuning: Tuning) -> None:
    # Llama has no biases, and only a classifier has a head that is new.
    make = {
        "BitFit": lambda: tiny.foundation("GPT2"),
        "Head": lambda: tiny.foundation("Bert", "sequence_classification", ("a", "b", "c")),
    }
    check_tuning(tuning, make.get(type(tuning).__name__, tiny.foundation))


@pytest.mark.parametrize("tuning", [LoRA(r=2, targets=("all-linear",)), IA3(), BitFit(), Head(), Full()], ids=repr)
def test_conformance_with_a_head_of_two_layers(tuning: Tuning) -> None:
    check_tuning(tuning, lambda: tiny.foundation("Roberta"))


@pytest.mark.parametrize(
    "tuning",
    [
        Personal(LoRA(r=2), home=("*lora_B*",)),
        Ranks(LoRA(r=4), ranks=(("small", 2),)),
        Personal(Ranks(LoRA(), (("small", 1),)), ("*lora_A*",)),
    ],
    ids=repr,
)
def test_conformance_of_wrapped_tunings(tuning: Tuning) -> None:
    check_tuning(tuning, clients=("small", "large"))


def test_by_default_everybody_holds_everything_and_all_of_it_travels() -> None:
    tuning = LoRA(r=2)
    tuned = tuning.attach(tiny.foundation())
    params = tuned.init(Key.root(0))
    assert tuning.travels(tuned.spec) == tuned.spec.names and not tuning.own("alice")
    assert same(tuning.cut(params, {"rank": 1}), params) and same(tuning.pad(params, tuned.spec, {"rank": 1}), params)


def test_a_wrapped_tuning_is_its_inner_one_but_for_what_it_says() -> None:
    inner = LoRA(r=4)
    spec = inner.attach(tiny.foundation()).spec
    assert Personal(inner).travels(spec) == spec.names
    both = Personal(Ranks(inner, (("alice", 2),)), home=("*lora_B*",))
    assert both.travels(spec) == tuple(name for name in spec.names if "lora_A" in name)
    assert both.own("alice") == {"rank": 2} and both.own("bob") == {}
    held = both.cut(inner.attach(tiny.foundation()).init(Key.root(0)), both.own("alice"))
    assert {tuple(leaf.shape) for name, leaf in held.items() if "lora_A" in name} == {(2, 32)}


@pytest.mark.parametrize(
    "local",
    [
        SGD(lr=0.3, momentum=0.9, weight_decay=0.01, steps=6, batch_size=2, max_grad_norm=0.5),
        AdamW(lr=1e-2, eps=1e-4, weight_decay=0.01, steps=6, batch_size=2),
    ],
    ids=lambda local: type(local).__name__,
)
def test_clients_of_two_ranks_share_a_bank(local: LocalTrainer) -> None:
    """A client of rank 4, padded to rank 8, trains as it does at rank 4 with the same scale; what is beyond stays zero."""
    ranks = Ranks(LoRA(r=8, alpha=16.0, dropout=0.1), (("client0", 4),))

    def bank_of(tuning: Tuning) -> Bank:
        foundation = tiny.foundation("Llama")
        return Bank(tuning.attach(foundation), CausalLM(), local, foundation.tokenizer.pad_token_id, torch.device("cpu"), Key.root(1))

    large, small = bank_of(ranks), bank_of(LoRA(r=4, alpha=8.0, dropout=0.1))
    spec, jobs = large.tuned.spec, [Job(f"client{i}", tiny.examples(i, 7, 4, 11)) for i in range(2)]
    start = tiny.disturbed(dict(large.tuned.init(Key.root(2))), scale=0.05)
    held = {job.client: ranks.cut(start, ranks.own(job.client)) for job in jobs}
    padded = {client: ranks.pad(tree, spec, ranks.own(client)) for client, tree in held.items()}
    starts_kd = torch.stack([spec.flatten(tree) for tree in padded.values()])
    together = large.train(start, jobs, 1, starts_kd=starts_kd)[0]
    (alone,) = small.train(held["client0"], jobs[:1], 1)
    after = ranks.cut(spec.unflatten(together.params_d), {"rank": 4})
    moved = small.tuned.spec.flatten(after) - small.tuned.spec.flatten(held["client0"])
    expected = alone.params_d - small.tuned.spec.flatten(held["client0"])
    assert expected.norm() > 0 and (moved - expected).norm() < 1e-4 * expected.norm()
    assert equal(ranks.pad(after, spec, {"rank": 4}), spec.unflatten(together.params_d))
    assert equal(ranks.pad(ranks.cut(together.delta, {"rank": 4}), spec, {"rank": 4}), together.delta)


def test_a_foreign_adapter_is_drawn_from_the_runs_key() -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        foundation = load(tiny.spec("Llama"), "causal_lm", (), "cpu", Key.root(seed))
        return dict(Peft("LOHA", {"r": 2, "target_modules": ["q_proj"]}).attach(foundation).init(Key.root(seed)))  # type: ignore[arg-type]

    assert equal(start(1), start(1)) and not equal(start(1), start(2))


BANKED = {
    "lora": lambda shape: LoRA(r=3, alpha=5.0, targets=("all-linear",), rslora=True),
    "ia3": lambda shape: IA3(),
    "bitfit": lambda shape: BitFit(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_peft_loads_what_we_save_and_gives_the_same_logits(shape: str, kind: str, tmp_path: Path) -> None:
    foundation = tiny.foundation(shape)
    batch, tuning = tiny.batch_of(foundation), BANKED[kind](shape)
    our_logits, params = ours(tuning, foundation, batch)
    tuning.save(foundation, params, tmp_path / "adapter")
    peft_model = PeftModel.from_pretrained(plain_copy(foundation), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(our_logits, tiny.logits_of(peft_model, batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_we_load_what_peft_saves_and_give_the_same_logits(shape: str, kind: str, tmp_path: Path) -> None:
    foundation = tiny.foundation(shape)
    batch = tiny.batch_of(foundation)
    config = (
        LoraConfig(r=4, lora_alpha=7, target_modules=["c_attn" if shape == "GPT2" else "q_proj" if shape == "Llama" else "query"])
        if kind == "lora"
        else IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
        if shape == "GPT2"
        else IA3Config(target_modules=["key", "intermediate.dense"], feedforward_modules=[])
        if shape != "Llama"
        else IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    config.fan_in_fan_out = shape == "GPT2"
    peft_model = get_peft_model(plain_copy(foundation), config).eval()
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    peft_model.save_pretrained(str(tmp_path))
    tuning, params = load_adapter(tmp_path)
    tuned = tuning.attach(foundation)
    tuned.bind(tuned.spec.flatten(params).unsqueeze(0))
    with torch.no_grad():
        our_logits = tuned.logits(batch)
    torch.testing.assert_close(our_logits, tiny.logits_of(peft_model, batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", list(BANKED))
def test_merged_model_gives_the_same_logits(shape: str, kind: str) -> None:
    foundation = tiny.foundation(shape)
    if shape == "Llama" and kind == "bitfit":
        with pytest.raises(ConfigError, match="no biases"):
            BitFit().attach(foundation)
        return
    batch, tuning = tiny.batch_of(foundation), BANKED[kind](shape)
    our_logits, params = ours(tuning, foundation, batch)
    torch.testing.assert_close(our_logits, tiny.logits_of(tuning.merge(foundation, params), batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*BANKED, "head", "lora+head"])
def test_row_block_k_is_computed_with_client_k(shape: str, kind: str) -> None:
    sequence = "head" in kind
    make = {"head": lambda shape: Head(), "lora+head": lambda shape: LoRA(r=2)}.get(kind) or BANKED[kind]
    foundation = tiny.foundation(shape, "sequence_classification" if sequence else None, ("a", "b", "c") if sequence else ())
    if shape == "Llama" and kind == "bitfit":
        pytest.skip("Llama has no biases")
    tuned = make(shape).attach(foundation)
    batch = tiny.batch_of(foundation, clients=3)
    start = dict(tuned.init(Key.root(0)))
    theta_kd = torch.stack([tuned.spec.flatten(tiny.disturbed(start, seed)) for seed in range(3)])
    tuned.bind(theta_kd)
    with torch.no_grad():
        together = tuned.logits(batch)
        for k in range(3):
            tuned.bind(theta_kd[k : k + 1])
            rows = slice(2 * k, 2 * k + 2)
            alone = tiny.batch_of(foundation)
            alone.inputs = {"input_ids": batch.inputs["input_ids"][rows]}
            torch.testing.assert_close(together[batch.owner_q == k], tuned.logits(alone), **TOLERANCE)


def test_a_new_head_is_saved_with_the_adapter_and_loads_in_peft(tmp_path: Path) -> None:
    foundation = tiny.foundation("Bert", "sequence_classification", ("a", "b", "c"))
    batch, tuning = tiny.batch_of(foundation), LoRA(r=2)
    our_logits, params = ours(tuning, foundation, batch)
    assert any("classifier" in name for name in params)
    tuning.save(foundation, params, tmp_path)
    peft_model = PeftModel.from_pretrained(plain_copy(foundation), str(tmp_path)).eval()
    torch.testing.assert_close(our_logits, tiny.logits_of(peft_model, batch), **TOLERANCE)


def test_a_classifiers_adapter_brings_its_labels(tmp_path: Path) -> None:

    base = tiny.foundation("Bert", "masked_lm")
    save(base, base.model, tmp_path / "base")
    foundation = load(Model(str(tmp_path / "base")), "sequence_classification", ("neg", "neu", "pos"), "cpu", Key.root(0))
    batch, tuning = tiny.batch_of(foundation), LoRA(r=2)
    mine, params = ours(tuning, foundation, batch)
    tuning.save(foundation, params, tmp_path / "adapter")
    labels = json.loads((tmp_path / "adapter" / "labels.json").read_text(encoding="utf-8"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", id2label=dict(enumerate(labels))).eval()
    assert theirs.config.id2label == {0: "neg", 1: "neu", 2: "pos"}
    torch.testing.assert_close(mine, tiny.logits_of(theirs, batch), **TOLERANCE)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("architecture", ["Roberta", "XLMRoberta", "Electra", "DistilBert"])
def test_a_head_of_several_layers_is_saved_with_the_adapter_and_loads_in_peft(architecture: str, kind: str, tmp_path: Path) -> None:
    config = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4} if architecture == "DistilBert" else tiny.CONFIGS["Bert"]
    spec = Model(architecture=architecture, config=tuple(config.items()), tokenizer=tiny.tokenizer_folder())
    foundation = load(spec, "sequence_classification", ("a", "b", "c"), "cpu", Key.root(0))
    tuning = LoRA(r=2) if kind == "lora" else IA3()
    batch = tiny.batch_of(foundation)
    our_logits, params = ours(tuning, foundation, batch)
    # DistilBERT's are two modules side by side.
    head = {name for name in params if "classifier" in name}
    assert len(head) == 4
    tuning.save(foundation, params, tmp_path)
    peft_model = PeftModel.from_pretrained(plain_copy(foundation), str(tmp_path)).eval()
    torch.testing.assert_close(our_logits, tiny.logits_of(peft_model, batch), **TOLERANCE)
    again, tuned, loaded = attach_adapter(tmp_path, load(spec, "sequence_classification", ("a", "b", "c"), "cpu", Key.root(0)))
    tuned.bind(tuned.spec.flatten(loaded).unsqueeze(0))
    with torch.no_grad():
        assert torch.equal(our_logits, tuned.logits(batch)), again


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_starts_from_the_base(shape: str) -> None:
    foundation = tiny.foundation(shape)
    batch, tuned = tiny.batch_of(foundation), LoRA().attach(foundation)
    tuned.bind(tuned.spec.flatten(tuned.init(Key.root(3))).unsqueeze(0))
    with torch.no_grad():
        torch.testing.assert_close(tuned.logits(batch), tiny.logits_of(plain_copy(foundation), batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_is_the_model_itself(shape: str, tmp_path: Path) -> None:
    import transformers

    foundation = tiny.foundation(shape)
    batch = tiny.batch_of(foundation)
    our_logits, params = ours(Full(), foundation, batch)
    Full().save(foundation, params, tmp_path)
    auto = getattr(
        transformers, {"Bert": "AutoModelForMaskedLM", "Roberta": "AutoModelForSequenceClassification"}.get(shape, "AutoModelForCausalLM")
    )
    torch.testing.assert_close(our_logits, tiny.logits_of(auto.from_pretrained(tmp_path).eval(), batch), **TOLERANCE)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "Roberta"])
@pytest.mark.parametrize("kind", ["lora", "head"])
def test_what_an_output_layer_learned_does_not_move_the_embeddings_tied_to_it(shape: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    foundation = tiny.foundation(shape, tie_word_embeddings=True)
    batch, output = tiny.batch_of(foundation), ("decoder" if shape == "Bert" else "lm_head",)
    tuning = LoRA(r=2, targets=output) if kind == "lora" else Head(modules=output)
    our_logits, params = ours(tuning, foundation, batch)
    model = tuning.merge(foundation, params)
    torch.testing.assert_close(our_logits, tiny.logits_of(model, batch), **TOLERANCE)
    save(foundation, model, tmp_path)
    auto = AutoModelForMaskedLM if shape == "Bert" else AutoModelForCausalLM
    torch.testing.assert_close(our_logits, tiny.logits_of(auto.from_pretrained(tmp_path).eval(), batch), **TOLERANCE)


def test_a_copy_keeps_what_the_base_was_published_with() -> None:
    foundation = tiny.foundation("Bert")
    assert foundation.model.config.hidden_dropout_prob == 0 and plain_copy(foundation).config.hidden_dropout_prob == 0.1
    foundation = tiny.foundation("Llama")
    foundation.model.generation_config.eos_token_id = [2, 7]
    assert plain_copy(foundation).generation_config.eos_token_id == [2, 7]


def test_a_base_of_less_precision_turns_by_the_same_angles() -> None:
    exact = tiny.foundation("Llama").model.model.rotary_emb.inv_freq
    foundation = load(replace(tiny.spec("Llama"), dtype="bfloat16"), "causal_lm", (), "cpu", Key.root(0))
    assert foundation.model.dtype == torch.bfloat16
    for model in (foundation.model, plain_copy(foundation)):
        assert torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_a_causal_classifier_reads_the_last_token_whatever_the_checkpoint_pads_with(tmp_path: Path) -> None:
    base = tiny.foundation("Llama", pad_token_id=5)
    save(base, base.model, tmp_path)
    foundation = load(Model(str(tmp_path)), "sequence_classification", ("a", "b"), "cpu", Key.root(0))
    assert foundation.model.config.pad_token_id == foundation.tokenizer.pad_token_id != 5
    tuned, batch = LoRA().attach(foundation), tiny.batch_of(foundation)
    tuned.bind(tuned.spec.flatten(tuned.init(Key.root(0))).unsqueeze(0))
    with torch.no_grad():
        alone = tuned.logits(batch)
        ids = torch.nn.functional.pad(batch.inputs["input_ids"], (0, 4), value=foundation.tokenizer.pad_token_id)
        batch.inputs = {"input_ids": ids}
        torch.testing.assert_close(alone, tuned.logits(batch), **TOLERANCE)


@pytest.mark.parametrize("architecture", ["Roberta", "XLMRoberta", "Longformer", "MPNet"])
@pytest.mark.parametrize("pad", [1, 5])
def test_positions_counted_from_the_padding_token_stay_where_they_were(architecture: str, pad: int, tmp_path: Path) -> None:
    config = {**tiny.CONFIGS["Roberta"], "pad_token_id": pad, **({"attention_window": 4} if architecture == "Longformer" else {})}
    spec = Model(architecture=architecture, config=tuple(config.items()), tokenizer=tiny.tokenizer_folder())
    base = load(spec, "sequence_classification", ("a", "b"), "cpu", Key.root(0))
    assert base.tokenizer.pad_token_id == 0
    batch = tiny.batch_of(base)
    expected = tiny.logits_of(base.model.eval(), batch)
    torch.testing.assert_close(tiny.logits_of(plain_copy(base), batch), expected, **TOLERANCE)
    save(base, base.model, tmp_path)
    again = load(Model(str(tmp_path)), "sequence_classification", ("a", "b"), "cpu", Key.root(0))
    assert again.model.config.pad_token_id == pad
    torch.testing.assert_close(tiny.logits_of(again.model.eval(), batch), expected, **TOLERANCE)
    torch.testing.assert_close(tiny.logits_of(plain_copy(again), batch), expected, **TOLERANCE)


def test_a_model_from_scratch_pads_with_its_tokenizers_token() -> None:
    foundation = tiny.foundation("Roberta")
    assert foundation.model.config.pad_token_id == foundation.tokenizer.pad_token_id == 0
    assert foundation.model.roberta.embeddings.padding_idx == 0


@pytest.mark.parametrize("architecture", ["Roberta", "MPNet"])
@pytest.mark.parametrize("pad", [None, 1, 5])
def test_a_model_takes_rows_as_long_as_it_says(architecture: str, pad: int | None) -> None:
    config = {**tiny.CONFIGS["Roberta"], "max_position_embeddings": 20, **({} if pad is None else {"pad_token_id": pad})}
    spec = Model(architecture=architecture, config=tuple(config.items()), tokenizer=tiny.tokenizer_folder())
    foundation = load(spec, "sequence_classification", ("a", "b"), "cpu", Key.root(0))
    longest = foundation.max_context
    assert longest is not None and 14 <= longest <= 18
    assert tiny.logits_of(foundation.model, tiny.batch_of(foundation, length=longest)).isfinite().all()


def test_an_encoder_is_no_causal_base() -> None:
    for architecture in ("Bert", "Roberta"):
        with pytest.raises(ModelError, match=f"{architecture} is an encoder .*is_decoder: false.*Use the task MaskedLM"):
            tiny.foundation(architecture, "causal_lm")
        assert tiny.foundation(architecture, "causal_lm", is_decoder=True).model.config.is_decoder


@pytest.mark.parametrize("shape", ["Roberta", "Llama"])
def test_a_trained_head_keeps_its_classes_or_is_a_new_one(shape: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny.foundation(shape, "sequence_classification", ("b", "a"))
    save(base, base.model, tmp_path)
    (head,) = base.fresh
    assert classes_of(read_config(Model(str(tmp_path)))) == ("b", "a")

    def opened(*labels: str, seed: int = 1) -> tuple[Foundation, bool]:
        again = load(Model(str(tmp_path)), "sequence_classification", labels, "cpu", Key.root(seed))
        assert list(again.model.config.label2id) == list(labels)
        before, weights = base.model.state_dict(), again.model.state_dict()
        assert all(torch.equal(weights[name], before[name]) for name in weights if not name.startswith(head))
        return again, all(name in before and weights[name].equal(before[name]) for name in weights if name.startswith(head))

    kept, same_head = opened("b", "a")
    assert same_head and kept.fresh == () and not caplog.records
    for labels in (("no", "yes"), ("a", "b", "c")):
        renewed, same_head = opened(*labels)
        assert not same_head and renewed.fresh == (head,) and LoRA().attach(renewed).spec.names
        assert "tells the classes b, a, and the owners have " + ", ".join(labels) in caplog.text
        again, other = opened(*labels)[0], opened(*labels, seed=2)[0]
        weights = [model.model.get_submodule(head).state_dict() for model in (renewed, again, other)]
        assert equal(weights[0], weights[1]) and not equal(weights[0], weights[2])
    with pytest.raises(ModelError, match=r"names the classes a, b, but the head of .* in the order b, a\. Leave out"):
        opened("a", "b")


def test_a_padding_token_that_also_ends_a_text_still_trains(tmp_path: Path) -> None:
    base = tiny.foundation("Llama")
    base.model.config.pad_token_id, base.tokenizer.pad_token = None, base.tokenizer.eos_token
    save(base, base.model, tmp_path)
    foundation = load(Model(str(tmp_path)), "causal_lm", (), "cpu", Key.root(0))
    assert foundation.model.model.embed_tokens.padding_idx is None
    assert foundation.model.config.pad_token_id == foundation.tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_we_load_what_peft_names_by_its_own_habits(kind: str, tmp_path: Path) -> None:
    # A classifier's head under every name it may have; BERT's two layers called output.dense.
    foundation = tiny.foundation("Bert", "sequence_classification", ("a", "b", "c"))
    batch = tiny.batch_of(foundation)
    config = (
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
        if kind == "lora"
        else IA3Config(task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
    )
    peft_model = get_peft_model(plain_copy(foundation), config).eval()
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    peft_model.save_pretrained(str(tmp_path))
    tuning, params = load_adapter(tmp_path)
    tuned = tuning.attach(foundation)
    assert set(tuned.spec.names) == set(params)
    tuned.bind(tuned.spec.flatten(params).unsqueeze(0))
    with torch.no_grad():
        torch.testing.assert_close(tuned.logits(batch), tiny.logits_of(peft_model, batch), **TOLERANCE)


def saved_by_peft(config: PeftConfig, folder: Path) -> None:
    with warnings.catch_warnings():
        # That embeddings are saved too where they are targets.
        warnings.simplefilter("ignore", UserWarning)
        get_peft_model(plain_copy(tiny.foundation("Llama")), config).save_pretrained(str(folder))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"lora_bias": True}, r"would not make: .*lora_B.bias"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "uses layer_replication"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "uses exclude_modules"),
        ({"use_dora": True}, "uses use_dora"),
        ({"bias": "all"}, "uses bias"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights=pissa"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"would not make: .*lora_embedding_A"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_would_compute_something_else_is_refused(config: dict[str, object], reason: str, tmp_path: Path) -> None:
    saved_by_peft(LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **config}), tmp_path)
    with pytest.raises(ModelError, match=reason):
        load_adapter(tmp_path)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    saved_by_peft(LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    tuning, tuned, params = attach_adapter(tmp_path, tiny.foundation("Llama"))
    assert tuning == LoRA(r=2, alpha=8.0, targets=("q_proj",), modules_to_save=()) and set(tuned.spec.names) == set(params)
    with pytest.raises(ModelError, match=r"does not fit.*unexpected .*layers\.1"):
        attach_adapter(tmp_path, tiny.foundation("Llama", num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"does not fit.*expected"):
        attach_adapter(tmp_path, tiny.foundation("Llama", hidden_size=64))


def test_a_saved_module_with_more_than_linear_layers_is_refused(tmp_path: Path) -> None:
    foundation = tiny.foundation("Bert")
    get_peft_model(plain_copy(foundation), LoraConfig(target_modules=["query"], modules_to_save=["transform"])).save_pretrained(
        str(tmp_path)
    )
    with pytest.raises(ModelError, match=r"does not fit.*unexpected .*LayerNorm"):
        attach_adapter(tmp_path, foundation)


def test_what_no_tuning_loads_is_refused_with_what_can_be_loaded(tmp_path: Path) -> None:
    saved_by_peft(LoHaConfig(r=2, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(ModelError, match=r"is a LOHA; IA3 and LORA can be loaded here"):
        load_adapter(tmp_path)
    with pytest.raises(ModelError, match="No adapter could be loaded"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": "two"}, "r is 'two'"),
        ({"r": 0}, r"LoRA.r is 0"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": None}, r"LoRA.targets is empty"),
    ],
    ids=str,
)
def test_a_config_that_is_not_valid_is_refused(config: dict[str, object], reason: str, tmp_path: Path) -> None:
    saved_by_peft(LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(ModelError, match=reason):
        load_adapter(tmp_path)


def test_a_tuning_of_another_package_loads_its_own_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = registry.Entry("tuning", "Hadamard", "parts", "", ())
    monkeypatch.setattr(registry, "entries", lambda room, known=registry.entries: {**known(room), "Hadamard": entry})
    saved_by_peft(LoHaConfig(r=2, target_modules=["q_proj"]), tmp_path)
    tuning, params = load_adapter(tmp_path)
    assert tuning == Hadamard(r=2) and len(params) == 8


def test_a_package_that_is_broken_or_claims_our_kind_does_not_stand_in_the_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = {
        "Broken": registry.Entry("tuning", "Broken", "nowhere.at.all", "from broken", ()),
        "Claims": registry.Entry("tuning", "Claims", "parts", "from greedy", ()),
    }
    monkeypatch.setattr(parts, "Claims", type("Claims", (Hadamard,), {"peft_type": "LORA"}), raising=False)
    monkeypatch.setattr(registry, "entries", lambda room, known=registry.entries: {**foreign, **known(room)})
    saved_by_peft(LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    tuning, _ = load_adapter(tmp_path)
    assert type(tuning) is LoRA
    assert (
        "Broken (from broken) is left out" in caplog.text
        and "LoRA and Claims both load adapters of the kind LORA; LoRA is taken" in caplog.text
    )


MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
STATE_SPACE = {"Mamba": MAMBA, "FalconMamba": MAMBA, "Mamba2": {**MAMBA, "head_dim": 8, "num_heads": 8, "n_groups": 1}}


@pytest.mark.parametrize("architecture", list(STATE_SPACE))
def test_an_adapter_that_peft_would_not_load_is_refused_before_training(architecture: str, tmp_path: Path) -> None:
    def base() -> Foundation:
        config = tuple(STATE_SPACE[architecture].items())
        return load(Model(architecture=architecture, config=config, tokenizer=tiny.tokenizer_folder()), "causal_lm", (), "cpu", Key.root(0))

    for targets in (("all-linear",), ("in_proj", "out_proj")):
        with pytest.raises(ConfigError, match=r"targets: peft would not load an adapter.*'out_proj' is incompatible"):
            LoRA(targets=targets).attach(base())
    foundation = base()
    tuning, batch = LoRA(r=2, targets=("in_proj",)), tiny.batch_of(foundation)
    our_logits, params = ours(tuning, foundation, batch)
    tuning.save(foundation, params, tmp_path)
    peft_model = PeftModel.from_pretrained(plain_copy(foundation), str(tmp_path)).eval()
    torch.testing.assert_close(our_logits, tiny.logits_of(peft_model, batch), **TOLERANCE)


@pytest.mark.parametrize("kind", ["LOHA", "PROMPT_TUNING"])
@pytest.mark.parametrize("shape", ["Llama", "Bert"])
def test_a_foreign_adapter_brings_the_base_that_exists_nowhere_else(shape: str, kind: str, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    classify = shape == "Bert"
    foundation = tiny.foundation(shape, "sequence_classification" if classify else None, ("a", "b", "c") if classify else ())
    batch, target = tiny.batch_of(foundation), "query" if classify else "q_proj"
    tuning = Peft(kind, {"r": 2, "target_modules": [target]} if kind == "LOHA" else {"num_virtual_tokens": 3})  # type: ignore[arg-type]
    our_logits, params = ours(tuning, foundation, batch)
    tuning.save(foundation, params, tmp_path)
    auto = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    base = auto.from_pretrained(peft.PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path)
    peft_model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        out = peft_model(**batch.inputs).logits
    torch.testing.assert_close(our_logits, out if classify else out[:, -7:].reshape(-1, out.shape[-1]), **TOLERANCE)


@pytest.mark.parametrize("kind", ["LOHA", "PROMPT_TUNING"])
def test_any_other_method_of_peft_runs_and_saves(kind: str, tmp_path: Path) -> None:
    foundation = tiny.foundation("Llama")
    plain, batch = plain_copy(foundation), tiny.batch_of(foundation)
    tuning = Peft(kind, {"r": 2, "target_modules": ["q_proj"]} if kind == "LOHA" else {"num_virtual_tokens": 3})  # type: ignore[arg-type]
    our_logits, params = ours(tuning, foundation, batch)
    tuning.save(foundation, params, tmp_path)
    peft_model = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        out = peft_model(**batch.inputs).logits[:, -7:]
    torch.testing.assert_close(our_logits, out.reshape(-1, out.shape[-1]), **TOLERANCE)


def test_refusals() -> None:
    foundation = tiny.foundation("Llama")
    with pytest.raises(ConfigError, match=r"LoRA.r is -1"):
        LoRA(r=-1)
    with pytest.raises(ConfigError, match=r"'q_prj' matches no linear layer.*Did you mean 'q_proj'"):
        LoRA(targets=("q_prj",)).attach(foundation)
    with pytest.raises(ConfigError, match=r"no 'VERRA'.*Did you mean 'VERA'"):
        Peft("VERRA").attach(foundation)
    with pytest.raises(ConfigError, match=r"ADALORA moves its ranks between layers.* never allocate\. Use LoRA"):
        Peft("ADALORA", {"target_modules": ["q_proj"], "total_step": 10})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="PROMPT_TUNING does not fit a masked lm model"):
        Peft("PROMPT_TUNING", {"num_virtual_tokens": 3}).attach(tiny.foundation("Bert"))  # type: ignore[arg-type]
    for device in ("gpu", "cuda:99", "meta"):
        with pytest.raises(ModelError, match=f"device '{device}'"):
            device_of(device)
    with pytest.raises(ConfigError, match="no new head"):
        Head().attach(foundation)

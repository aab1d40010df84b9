"""Our tunings equal PEFT's on the same weights, save in PEFT's layout, and merge into plain models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from fedfm.core.batch import Batch
from fedfm.core.errors import ConfigError, ModelError
from fedfm.core.keys import Key
from fedfm.core.tree import equal
from fedfm.core.tuning import Tuning
from fedfm.models import Foundation, Model, load
from fedfm.models.foundation import device_of, save
from fedfm.testing import check_tuning, examples, tiny
from fedfm.tuning import IA3, BitFit, Full, Head, LoRA, Peft, load_adapter
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
    mine, params = ours(tuning, foundation, batch)
    tuning.save(foundation, params, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(plain_copy(foundation), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(mine, tiny.logits_of(theirs, batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_we_load_what_peft_saves_and_give_the_same_logits(shape: str, kind: str, tmp_path: Path) -> None:
    foundation = tiny.foundation(shape)
    batch = tiny.batch_of(foundation)
    config = (
        LoraConfig(r=4, lora_alpha=7, target_modules=["c_attn" if shape == "GPT2" else "query" if shape == "Bert" else "q_proj"])
        if kind == "lora"
        else IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
        if shape == "GPT2"
        else IA3Config(target_modules=["key", "intermediate.dense"], feedforward_modules=[])
        if shape == "Bert"
        else IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    config.fan_in_fan_out = shape == "GPT2"
    theirs = get_peft_model(plain_copy(foundation), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name or "ia3_" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(str(tmp_path))
    tuning, params = load_adapter(tmp_path)
    tuned = tuning.attach(foundation)
    tuned.bind(tuned.spec.flatten(params).unsqueeze(0))
    with torch.no_grad():
        mine = tuned.logits(batch)
    torch.testing.assert_close(mine, tiny.logits_of(theirs, batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", list(BANKED))
def test_merged_model_gives_the_same_logits(shape: str, kind: str) -> None:
    foundation = tiny.foundation(shape)
    if shape == "Llama" and kind == "bitfit":
        with pytest.raises(ConfigError, match="no biases"):
            BitFit().attach(foundation)
        return
    batch, tuning = tiny.batch_of(foundation), BANKED[kind](shape)
    mine, params = ours(tuning, foundation, batch)
    torch.testing.assert_close(mine, tiny.logits_of(tuning.merge(foundation, params), batch), **TOLERANCE)


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
    mine, params = ours(tuning, foundation, batch)
    assert any("classifier" in name for name in params)
    tuning.save(foundation, params, tmp_path)
    theirs = PeftModel.from_pretrained(plain_copy(foundation), str(tmp_path)).eval()
    torch.testing.assert_close(mine, tiny.logits_of(theirs, batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_starts_from_the_base(shape: str) -> None:
    foundation = tiny.foundation(shape)
    batch, tuned = tiny.batch_of(foundation), LoRA().attach(foundation)
    tuned.bind(tuned.spec.flatten(tuned.init(Key.root(3))).unsqueeze(0))
    with torch.no_grad():
        torch.testing.assert_close(tuned.logits(batch), tiny.logits_of(plain_copy(foundation), batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_is_the_model_itself(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    foundation = tiny.foundation(shape)
    batch = tiny.batch_of(foundation)
    mine, params = ours(Full(), foundation, batch)
    Full().save(foundation, params, tmp_path)
    auto = AutoModelForMaskedLM if shape == "Bert" else AutoModelForCausalLM
    torch.testing.assert_close(mine, tiny.logits_of(auto.from_pretrained(tmp_path).eval(), batch), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["lora", "head"])
def test_what_an_output_layer_learned_does_not_move_the_embeddings_tied_to_it(shape: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    foundation = tiny.foundation(shape, tie_word_embeddings=True)
    batch, output = tiny.batch_of(foundation), ("decoder" if shape == "Bert" else "lm_head",)
    tuning = LoRA(r=2, targets=output) if kind == "lora" else Head(modules=output)
    mine, params = ours(tuning, foundation, batch)
    model = tuning.merge(foundation, params)
    torch.testing.assert_close(mine, tiny.logits_of(model, batch), **TOLERANCE)
    save(foundation, model, tmp_path)
    auto = AutoModelForMaskedLM if shape == "Bert" else AutoModelForCausalLM
    torch.testing.assert_close(mine, tiny.logits_of(auto.from_pretrained(tmp_path).eval(), batch), **TOLERANCE)


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
    theirs = get_peft_model(plain_copy(foundation), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    theirs.save_pretrained(str(tmp_path))
    tuning, params = load_adapter(tmp_path)
    tuned = tuning.attach(foundation)
    assert set(tuned.spec.names) == set(params)
    tuned.bind(tuned.spec.flatten(params).unsqueeze(0))
    with torch.no_grad():
        torch.testing.assert_close(tuned.logits(batch), tiny.logits_of(theirs, batch), **TOLERANCE)


@pytest.mark.parametrize("kind", ["LOHA", "PROMPT_TUNING"])
@pytest.mark.parametrize("shape", ["Llama", "Bert"])
def test_a_foreign_adapter_brings_the_base_that_exists_nowhere_else(shape: str, kind: str, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classify = shape == "Bert"
    foundation = tiny.foundation(shape, "sequence_classification" if classify else None, ("a", "b", "c") if classify else ())
    batch, target = tiny.batch_of(foundation), "query" if classify else "q_proj"
    tuning = Peft(kind, {"r": 2, "target_modules": [target]} if kind == "LOHA" else {"num_virtual_tokens": 3})  # type: ignore[arg-type]
    mine, params = ours(tuning, foundation, batch)
    tuning.save(foundation, params, tmp_path)
    auto = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    base = auto.from_pretrained(peft.PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path)
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        out = theirs(**batch.inputs).logits
    torch.testing.assert_close(mine, out if classify else out[:, -7:].reshape(-1, out.shape[-1]), **TOLERANCE)


@pytest.mark.parametrize("kind", ["LOHA", "PROMPT_TUNING"])
def test_any_other_method_of_peft_runs_and_saves(kind: str, tmp_path: Path) -> None:
    foundation = tiny.foundation("Llama")
    plain, batch = plain_copy(foundation), tiny.batch_of(foundation)
    tuning = Peft(kind, {"r": 2, "target_modules": ["q_proj"]} if kind == "LOHA" else {"num_virtual_tokens": 3})  # type: ignore[arg-type]
    mine, params = ours(tuning, foundation, batch)
    tuning.save(foundation, params, tmp_path)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        out = theirs(**batch.inputs).logits[:, -7:]
    torch.testing.assert_close(mine, out.reshape(-1, out.shape[-1]), **TOLERANCE)


def test_refusals() -> None:
    foundation = tiny.foundation("Llama")
    with pytest.raises(ConfigError, match=r"LoRA.r is -1"):
        LoRA(r=-1)
    with pytest.raises(ConfigError, match=r"'q_prj' matches no linear layer.*Did you mean 'q_proj'"):
        LoRA(targets=("q_prj",)).attach(foundation)
    with pytest.raises(ConfigError, match=r"no 'VERRA'.*Did you mean 'VERA'"):
        Peft("VERRA").attach(foundation)
    with pytest.raises(ConfigError, match="PROMPT_TUNING does not fit a masked lm model"):
        Peft("PROMPT_TUNING", {"num_virtual_tokens": 3}).attach(tiny.foundation("Bert"))  # type: ignore[arg-type]
    for device in ("gpu", "cuda:99", "meta"):
        with pytest.raises(ModelError, match=f"device '{device}'"):
            device_of(device)
    with pytest.raises(ConfigError, match="no new head"):
        Head().attach(foundation)

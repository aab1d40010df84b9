"""A bank checks what it relies on: a base that mixes rows runs one client at a time, and a causal task needs a base that is causal."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedfm.client.bank import Bank, Job
from fedfm.core.errors import ModelError
from fedfm.core.keys import Key
from fedfm.core.task import Head as Kind
from fedfm.core.task import Task
from fedfm.data import Data
from fedfm.engines import Embedded
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.models import Model, load
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM, Classification, MaskedLM
from fedfm.testing import tiny
from fedfm.tuning import IA3, BitFit, Full, LoRA, Peft
from fedfm.tuning.base import Tuning
from fedfm.tuning.sites import BankedModel

CONFIGS: dict[str, dict[str, object]] = {
    # Its layers lay activations out as (positions, rows, width).
    "longformer": {**tiny.CONFIGS["Bert"], "attention_window": 4, "max_position_embeddings": 64},
    # Its feed-forward layers see (rows * positions, width).
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "llama": tiny.CONFIGS["Llama"],
    "gpt2": tiny.CONFIGS["GPT2"],
    "bert": tiny.CONFIGS["Bert"],
}
TASKS: dict[Kind, Task] = {"causal_lm": CausalLM(), "masked_lm": MaskedLM(), "sequence_classification": Classification()}


def bank_of(architecture: str, head: Kind, tuning: Tuning, dtype: str = "float32", **config: object) -> Bank:
    spec = Model(
        architecture=architecture,
        config=tuple({**CONFIGS[architecture], **config}.items()),
        tokenizer=tiny.tokenizer_folder(),
        dtype=dtype,  # type: ignore[arg-type]
    )
    foundation = load(spec, head, ("a", "b", "c") if head == "sequence_classification" else (), "cpu", Key.root(0))
    local = SGD(lr=0.1, steps=2, batch_size=2)
    return Bank(tuning.attach(foundation), TASKS[head], local, foundation.tokenizer.pad_token_id, torch.device("cpu"), Key.root(1))


def looking_ahead(tuning: Tuning, dtype: str = "float32") -> Bank:
    """A bank whose base looks ahead, though its config has not said so when it was loaded."""
    bank = bank_of("bert", "causal_lm", tuning, dtype, is_decoder=True)
    for module in bank.tuned.model.modules():
        for name in ("is_decoder", "is_causal"):
            if hasattr(module, name):
                setattr(module, name, False)
    bank.tuned.model.config.is_decoder = False  # type: ignore[union-attr]
    return bank


def jobs_of(classes: int = 3) -> list[Job]:
    return [Job(f"client{i}", tiny.examples(i, count, 6, 11, classes)) for i, count in enumerate([5, 3, 4])]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fedfm")]


def start_of(bank: Bank) -> dict[str, torch.Tensor]:
    return tiny.disturbed(dict(bank.tuned.init(Key.root(2))), scale=0.05)


@pytest.mark.parametrize("head", ["masked_lm", "sequence_classification"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_mixes_rows_runs_one_client_at_a_time(head: Kind, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    bank = bank_of("longformer", head, LoRA(r=2), dtype)
    jobs, start = jobs_of(), start_of(bank)
    alone = [bank.train(start, [job], 1)[0] for job in jobs]
    with caplog.at_level(logging.WARNING, "fedfm"):
        together = bank.train(start, jobs, 1)
        bank.train(start, jobs, 2)
    assert all(torch.equal(x.params_d, y.params_d) and x.metrics == y.metrics for x, y in zip(together, alone, strict=True))
    (warning,) = warnings_of(caplog)
    assert "mixes the rows of a batch" in warning and "Longformer" in warning
    theta_kd = torch.stack([trained.params_d for trained in alone])
    sums = bank.evaluate(theta_kd, [job.examples for job in jobs])
    for k, job in enumerate(jobs):
        sums_alone = bank.evaluate(theta_kd[k : k + 1], [job.examples])
        assert all(torch.equal(sums[name][k], value[0]) for name, value in sums_alone.items())
    if (head, dtype) == ("masked_lm", "float32"):
        # What the probe prevents: in one batch clients would train each other's tensors.
        bank._shares = True
        mixed = bank.train(start, jobs, 1)
        assert any(
            (x.params_d - y.params_d).norm() > 0.01 * (y.params_d - bank.tuned.spec.flatten(start)).norm() for x, y in zip(mixed, alone)
        )


@pytest.mark.parametrize(
    ("architecture", "head", "tuning"),
    [
        ("opt", "causal_lm", LoRA(r=2, targets=("all-linear",))),
        ("llama", "causal_lm", IA3()),
        ("gpt2", "causal_lm", BitFit()),
        ("llama", "sequence_classification", LoRA(r=2)),
        ("bert", "masked_lm", LoRA(r=2)),
        ("bert", "sequence_classification", LoRA(r=2)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_keeps_rows_apart_banks(architecture: str, head: Kind, tuning: Tuning, dtype: str) -> None:
    bank = bank_of(architecture, head, tuning, dtype)
    jobs, start = jobs_of(), start_of(bank)
    bank.look(start, [job.examples for job in jobs])
    assert bank.shares(start, [job.examples for job in jobs])
    if dtype == "float32":
        for in_bank, job in zip(bank.train(start, jobs, 1), jobs, strict=True):
            (alone,) = bank.train(start, [job], 1)
            assert (in_bank.params_d - alone.params_d).norm() <= 1e-4 * (alone.params_d - bank.tuned.spec.flatten(start)).norm()


class FirstForAll(BankedModel):
    """Rows of every client meet the first one's tensors."""

    def bind(self, theta_kd, dropout=None):  # type: ignore[no-untyped-def]
        super().bind(theta_kd[:1].expand_as(theta_kd), dropout)


class Indivisible(BankedModel):
    """Cannot divide its activations among clients."""

    def logits(self, batch):  # type: ignore[no-untyped-def]
        if batch.num_clients > 1:
            raise RuntimeError("shape '[2, -1, 32]' is invalid for input of size 480")
        return super().logits(batch)


@pytest.mark.parametrize(
    ("kind", "reason"), [(FirstForAll, "another client's trainable tensors"), (Indivisible, "do not fit into one batch")]
)
def test_a_tuning_that_is_no_bank_is_seen(kind: type[BankedModel], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    bank = bank_of("llama", "causal_lm", LoRA(r=2))
    bank.tuned.__class__ = kind
    with caplog.at_level(logging.WARNING, "fedfm"):
        assert not bank.shares(start_of(bank), [tiny.examples(0, 1)])
    assert reason in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", [LoRA(r=2), Full()])
def test_a_causal_task_refuses_a_base_that_looks_ahead(tuning: Tuning, dtype: str) -> None:
    bank = looking_ahead(tuning, dtype)
    jobs, start = jobs_of()[:1], start_of(bank)
    with pytest.raises(ModelError, match=r"BertLMHeadModel looks ahead.*MaskedLM.*is_decoder"):
        bank.train(start, jobs, 1)
    with pytest.raises(ModelError, match="looks ahead"):
        bank.evaluate(bank.tuned.spec.flatten(start).unsqueeze(0), [jobs[0].examples])
    causal = bank_of("bert", "causal_lm", tuning, dtype, is_decoder=True)
    causal.train(start, jobs, 1)


def test_virtual_tokens_in_front_are_not_looked_ahead_at() -> None:
    bank = bank_of("llama", "causal_lm", Peft("PROMPT_TUNING", {"num_virtual_tokens": 3}))  # type: ignore[arg-type]
    bank.train(bank.tuned.init(Key.root(2)), jobs_of()[:1], 1)


def test_nothing_to_look_with_is_looked_at_later() -> None:
    bank = looking_ahead(LoRA(r=2))
    start = start_of(bank)
    assert [trained.metrics["steps"] for trained in bank.train(start, [Job("nobody", tiny.examples(0, 0))], 1)] == [0.0]
    with pytest.raises(ModelError, match="looks ahead"):
        bank.train(start, jobs_of()[:1], 1)


def test_the_embedded_engine_respects_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    rows = [{"owner": f"owner{i % 3}", "text": text} for i, text in enumerate(tiny.TEXT[:24])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = Model(architecture="longformer", config=tuple(CONFIGS["longformer"].items()), tokenizer=tiny.tokenizer_folder())
    plan = Federation(
        model=model,
        data=Data(str(tmp_path / "rows.jsonl"), by="owner"),
        task=MaskedLM(max_length=16),
        tuning=LoRA(r=2),
        local=SGD(lr=0.1, steps=1, batch_size=2),
    )
    for size in (1, 3, "auto"):
        simulation = Simulation.build(replace(plan, engine=Embedded(bank=size, device="cpu")))  # type: ignore[arg-type]
        with simulation.open() as session, caplog.at_level(logging.WARNING, "fedfm"):
            caplog.clear()
            assert session.bank_size() == session.bank_size() == 1  # type: ignore[attr-defined]
            assert any("mixes the rows" in text for text in warnings_of(caplog)) == (size != 1)
    looking = replace(plan, model=tiny.spec("Bert"), task=CausalLM(max_length=16), engine=Embedded(bank=3, device="cpu"))
    with pytest.raises(ModelError, match="Bert is an encoder"):
        Simulation.build(looking)


def test_dropout_draws_for_every_token_where_a_layer_sees_tokens_as_rows() -> None:
    """With a probability that never drops anything, dropout changes nothing."""
    params = []
    for dropout in (0.0, 1e-12):
        bank = bank_of("opt", "causal_lm", LoRA(r=2, targets=("all-linear",), dropout=dropout))
        params += [trained.params_d for trained in bank.train(start_of(bank), jobs_of(), 1)]
    assert all(torch.equal(x, y) for x, y in zip(params[:3], params[3:], strict=True))

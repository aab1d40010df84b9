"""The bank equals one client at a time, and centralised training in the limits where it must."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from parts import Pairs

from fedfm.client.bank import Bank, Course, Job, Trained
from fedfm.client.objective import StepObjective, Tally
from fedfm.core.batch import Batch
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.parts import Cohort, LocalTrainer, Objective, Work
from fedfm.core.task import Task
from fedfm.local import SGD, AdamW, FedProx
from fedfm.tasks import CausalLM, Classification, MaskedLM
from fedfm.testing import check_local, tiny
from fedfm.tuning import IA3, BitFit, Full, Head, LoRA, Peft
from fedfm.tuning.base import Tuned, Tuning
from fedfm.tuning.sites import Site

TASKS: dict[str, Task] = {"Llama": CausalLM(), "GPT2": CausalLM(), "Bert": MaskedLM(), "Roberta": Classification()}
TUNINGS: dict[str, Tuning] = {
    "lora": LoRA(r=2),
    "lora-dropout": LoRA(r=2, dropout=0.3, targets=("all-linear",)),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "head": Head(),
    "lora-head": LoRA(r=2),
    # The pooler of a BERT sees rows without positions.
    "lora-dropout-head": LoRA(r=2, dropout=0.3, targets=("all-linear",)),
}


def bank_of(shape: str, tuning: Tuning, local: LocalTrainer, classify: bool = False) -> Bank:
    labels = ("a", "b", "c") if classify else ()
    foundation = tiny.foundation(shape, "sequence_classification" if classify else None, labels)
    task: Task = Classification() if classify else TASKS[shape]
    return Bank(tuning.attach(foundation), task, local, foundation.tokenizer.pad_token_id, torch.device("cpu"), Key.root(1))


def jobs_of(counts: list[int], shortest: int, longest: int, classify: bool = False) -> list[Job]:
    return [Job(f"client{i}", tiny.examples(i, count, shortest, longest, 3 if classify else 0)) for i, count in enumerate(counts)]


def start_of(tuned: Tuned) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: p + 0.05 * torch.randn(p.shape, generator=generator) for name, p in tuned.init(Key.root(2)).items()}


def relative(a: list[Trained], b: list[Trained], of: str = "update") -> float:
    """The largest distance between two clients' parameters, relative to the norm of the parameters or of their update."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.client == y.client
        assert x.metrics["steps"] == y.metrics["steps"]
        assert x.metrics["tokens"] == y.metrics["tokens"]
        update = torch.cat([leaf.reshape(-1).double() for leaf in y.delta.values()])
        assert update.norm() > 0
        worst = max(worst, float((x.params_d.double() - y.params_d).norm() / (update if of == "update" else y.params_d.double()).norm()))
    return worst


@pytest.mark.parametrize("shape", list(tiny.CONFIGS))
@pytest.mark.parametrize("kind", list(TUNINGS))
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_bank_equals_one_client_at_a_time(shape: str, kind: str, optimizer: str) -> None:
    if shape == "Llama" and kind == "bitfit":
        pytest.skip("Llama has no biases")
    classify = "head" in kind or shape == "Roberta"
    # Epochs over unequal owners: unequal steps. Partial batches, two micro-batches a step, ragged lengths.
    local: LocalTrainer = (
        SGD(lr=0.02, momentum=0.9, epochs=1, batch_size=2, accumulate=2)
        if optimizer == "sgd"
        else AdamW(lr=1e-3, eps=1e-4, epochs=1, batch_size=2, accumulate=2, schedule="cosine", warmup=1, weight_decay=0.01)
    )
    bank = bank_of(shape, TUNINGS[kind], local, classify)
    jobs = jobs_of([5, 12, 3, 8], 4, 11, classify)
    start = start_of(bank.tuned)
    together = bank.train(start, jobs, round=3)
    alone = [bank.train(start, [job], round=3)[0] for job in jobs]
    assert len({t.metrics["steps"] for t in together}) > 1
    if optimizer == "sgd":
        assert relative(together, alone, of="parameters") < 1e-6
    assert relative(together, alone) < 1e-4
    assert all(t.finite for t in together)


# Layers that get the positions of all rows one after the other, and a base that puts positions before rows.
FLAT: dict[str, dict[str, object]] = {
    "OPT": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "Qwen2Moe": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", list(FLAT))
def test_dropout_in_a_bank_equals_one_client_at_a_time_where_rows_are_flattened(architecture: str) -> None:
    from fedfm.models import Model, load

    spec = Model(architecture=architecture, config=tuple(FLAT[architecture].items()), tokenizer=tiny.tokenizer_folder())
    foundation = load(spec, "causal_lm", (), "cpu", Key.root(0))
    tuned = LoRA(r=2, dropout=0.3, targets=("all-linear",)).attach(foundation)
    bank = Bank(tuned, CausalLM(), SGD(lr=0.02, epochs=1, batch_size=2), 0, torch.device("cpu"), Key.root(1))
    jobs, start = jobs_of([5, 12, 3, 8], 4, 11), start_of(bank.tuned)
    assert bank.shares(start, [job.examples for job in jobs])
    together = bank.train(start, jobs, round=3)
    assert relative(together, [bank.train(start, [job], round=3)[0] for job in jobs]) < 1e-4


def site_in(batch: Batch) -> Site:
    """A LoRA site that trains on ``batch`` with a dropout of 0.3."""
    tuned = LoRA(r=2, dropout=0.3).attach(tiny.foundation("Llama"))
    site = tuned.sites[0]
    site.batch, site.dropout = batch, [Key.root(k) for k in range(batch.num_clients)]
    return site


def test_a_mask_lies_on_the_same_tokens_however_they_are_laid_out() -> None:
    batch = tiny.batch_of(tiny.foundation("Llama"), clients=3, rows=2, length=7)
    batch.lengths, batch.real_rows = np.array([7, 3, 5]), np.array([2, 1, 2])
    site, x = site_in(batch), torch.ones(6, 7, 32)
    dropped = site._drop(x)
    assert torch.equal(site._drop(x.flatten(0, 1)), dropped.flatten(0, 1))
    assert torch.equal(site._drop(x.unsqueeze(2)), dropped.unsqueeze(2))
    seen = torch.zeros(6, 7, dtype=torch.bool)
    for row, length in enumerate((7, 7, 3, 0, 5, 5)):
        seen[row, :length] = True
    assert not dropped[~seen].any() and 0.6 < (dropped[seen] > 0).float().mean() < 0.8
    for other in (x.transpose(0, 1), torch.ones(9, 32)):
        with pytest.raises(RuntimeError, match="dropout sees no rows of 6 x 7 tokens"):
            site._drop(other)


@pytest.mark.parametrize("shape", [(7, 2, 32), (9, 32), (2, 4, 7, 8)], ids=str)
def test_one_client_alone_drops_whatever_the_layout(shape: tuple[int, ...]) -> None:
    site = site_in(tiny.batch_of(tiny.foundation("Llama"), clients=1, rows=2, length=7))
    assert 0.55 < (site._drop(torch.ones(shape)) > 0).float().mean() < 0.85


def test_who_shares_the_bank_does_not_matter() -> None:
    bank = bank_of("Llama", LoRA(r=2, dropout=0.2), SGD(lr=0.3, steps=4, batch_size=2))
    jobs, start = jobs_of([6, 9, 4], 4, 12), start_of(bank.tuned)
    forth, back = bank.train(start, jobs, 1), bank.train(start, jobs[::-1], 1)[::-1]
    assert relative(forth, back, of="parameters") < 1e-6


def test_a_client_whose_loss_is_nan_does_not_touch_the_others() -> None:
    bank = bank_of("Llama", LoRA(r=2), SGD(lr=0.3, steps=3, batch_size=2))
    jobs, start = jobs_of([6, 6, 6], 9, 9), start_of(bank.tuned)
    good = bank.train(start, jobs, 1)

    class Exploding(SGD):
        def step(self, cohort, grad_kd, lr_k, step):  # type: ignore[no-untyped-def]
            super().step(cohort, grad_kd, lr_k, step)
            cohort.theta_kd[1] = float("nan")

    bank.local = Exploding(lr=0.3, steps=3, batch_size=2)
    bad = bank.train(start, jobs, 1)
    assert [t.finite for t in bad] == [True, False, True]
    assert torch.equal(bad[0].params_d, good[0].params_d)
    assert torch.equal(bad[2].params_d, good[2].params_d)


@pytest.mark.parametrize("shape", list(tiny.CONFIGS))
@pytest.mark.parametrize("tuning", [LoRA(r=2), Full()])
def test_one_full_batch_step_per_client_is_one_central_step(shape: str, tuning: Tuning) -> None:
    """Equal example counts and lengths make the mean of the clients' gradients the pooled gradient."""
    if shape == "Bert":
        pytest.skip("a masked model draws different masks for different owners")
    bank = bank_of(shape, tuning, SGD(lr=0.5, steps=1, batch_size=None))
    jobs, start = jobs_of([4, 4, 4], 9, 9, shape == "Roberta"), start_of(bank.tuned)
    places = [(job.examples, i) for job in jobs for i in range(4)]
    pooled = tiny.Memory([own.ids(i) for own, i in places], labels=[own.label(i) for own, i in places])
    clients = [bank.train(start, [job], 1)[0] for job in jobs]
    (central,) = bank.train(start, [Job("all", pooled)], 1)
    mean = torch.stack([t.params_d for t in clients]).double().mean(0)
    moved = (central.params_d - bank.tuned.spec.flatten(start)).double()
    assert ((mean - central.params_d.double()).norm() / moved.norm()) < 1e-5


@pytest.mark.parametrize("shape", ["Llama", "GPT2"])
def test_training_equals_a_plain_loop_over_peft(shape: str) -> None:
    from peft import LoraConfig, get_peft_model

    from fedfm.data import plan
    from fedfm.tuning.layout import plain_copy

    local = AdamW(lr=1e-2, eps=1e-4, steps=4, batch_size=3, max_grad_norm=0.05, weight_decay=0.1)
    bank = bank_of(shape, LoRA(r=2, alpha=4.0), local)
    (job,), start = jobs_of([7], 9, 9), start_of(bank.tuned)
    (ours,) = bank.train(start, [job], 1)

    targets = ["c_attn"] if shape == "GPT2" else ["q_proj", "v_proj"]
    theirs = get_peft_model(
        plain_copy(bank.tuned.foundation), LoraConfig(r=2, lora_alpha=4, target_modules=targets, fan_in_fan_out=shape == "GPT2")
    )
    names = {name: name.replace(".default", "") for name, p in theirs.named_parameters() if p.requires_grad}
    own = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, saved in names.items():
            own[name].copy_(start[saved])
    optimizer = torch.optim.AdamW([own[name] for name in names], lr=1e-2, eps=1e-4, weight_decay=0.1)
    for index in plan(job.examples, local.work, bank.key.fold("batches", 1, job.client), bank.key.fold("buckets", 1)):
        ids = torch.stack([torch.as_tensor(job.examples.ids(int(i))) for i in index])
        loss = torch.nn.functional.cross_entropy(theirs(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([own[name] for name in names], 0.05)
        optimizer.step()
    flat = bank.tuned.spec.flatten({saved: own[name].detach() for name, saved in names.items()})
    moved = (ours.params_d - bank.tuned.spec.flatten(start)).norm()
    assert (ours.params_d - flat).norm() / moved < 1e-4


def test_fedprox_without_pull_is_its_inner_trainer_and_with_it_stays_nearer() -> None:
    inner = SGD(lr=0.3, steps=6, batch_size=2)
    bank = bank_of("Llama", LoRA(r=2), inner)
    jobs, start = jobs_of([6, 9], 9, 9), start_of(bank.tuned)
    plain = bank.train(start, jobs, 1)
    bank.local = FedProx(inner, mu=0.0)
    assert relative(bank.train(start, jobs, 1), plain) == 0
    bank.local = FedProx(inner, mu=1.0)
    start_d = bank.tuned.spec.flatten(start)
    for near, far in zip(bank.train(start, jobs, 1), plain, strict=True):
        assert (near.params_d - start_d).norm() < (far.params_d - start_d).norm()


@pytest.mark.parametrize(
    "tuning",
    [LoRA(r=2, dropout=0.2), Full(), Peft("LORA", {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.2})],  # type: ignore[arg-type]
    ids=["LoRA", "Full", "Peft"],
)
def test_gradient_checkpointing_changes_nothing(tuning: Tuning) -> None:
    from fedfm.models import load

    def trained(checkpointing: bool) -> Trained:
        foundation = load(replace(tiny.spec("Llama"), gradient_checkpointing=checkpointing), "causal_lm", (), "cpu", Key.root(0))
        local = SGD(lr=0.3, steps=2, batch_size=2)
        bank = Bank(tuning.attach(foundation), CausalLM(), local, 0, torch.device("cpu"), Key.root(1))
        return bank.train(start_of(bank.tuned), jobs_of([6], 9, 9), 1)[0]

    assert torch.equal(trained(True).params_d, trained(False).params_d)


def test_a_large_vocabulary_is_evaluated_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, sets = bank_of("Llama", LoRA(r=2), SGD()), [tiny.examples(0, 9)]
    theta_kd = bank.tuned.spec.flatten(start_of(bank.tuned)).unsqueeze(0)
    whole, sizes = bank.evaluate(theta_kd, sets), []
    monkeypatch.setattr("fedfm.client.bank.MAX_LOGITS", 20 * sets[0].vocabulary.size)
    monkeypatch.setattr(bank.task.__class__, "stats", lambda task, x, *rest: sizes.append(len(x)) or Task.stats(task, x, *rest))
    for name, value in bank.evaluate(theta_kd, sets).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)
    assert 0 < max(sizes) <= 20


def test_evaluation_in_a_bank_equals_evaluation_one_by_one() -> None:
    bank = bank_of("Llama", LoRA(r=2), SGD())
    sets = [tiny.examples(i, count, 4, 11) for i, count in enumerate([5, 9, 2])]
    theta_kd = torch.stack([bank.tuned.spec.flatten(start_of(bank.tuned)) * (1 + k) for k in range(3)])
    together = bank.evaluate(theta_kd, sets, max_tokens=60)
    shared = bank.evaluate(theta_kd[:1], sets, max_tokens=60)
    for k in range(3):
        alone = bank.evaluate(theta_kd[k : k + 1], [sets[k]])
        for name, value in alone.items():
            torch.testing.assert_close(together[name][k], value[0], rtol=1e-5, atol=1e-5)
    for name, value in bank.evaluate(theta_kd[:1], [sets[1]]).items():
        torch.testing.assert_close(shared[name][1], value[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tuning", [LoRA(r=2, dropout=0.1), IA3(), Full()])
def test_a_base_in_bfloat16_trains_much_like_one_in_float32(tuning: Tuning) -> None:
    from fedfm.models import load

    losses = []
    for dtype in ("float32", "bfloat16"):
        foundation = load(replace(tiny.spec("Llama"), dtype=dtype), "causal_lm", (), "cpu", Key.root(0))  # type: ignore[arg-type]
        bank = Bank(tuning.attach(foundation), CausalLM(), AdamW(lr=1e-2, steps=3, batch_size=2), 0, torch.device("cpu"), Key.root(1))
        (trained,) = bank.train(bank.tuned.init(Key.root(2)), jobs_of([6], 5, 9), 1)
        losses.append(trained.metrics["loss"])
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.01


# What a trainer is offered: losses, gradients, gradients of single examples.


@dataclass(frozen=True)
class SPSA(LocalTrainer):
    """``w -= lr (f(w + c z) - f(w - c z)) / 2c z`` with random signs ``z``: forward passes only."""

    lr: float = 0.01
    c: float = 0.01
    steps: int = 40

    @property
    def work(self) -> Work:
        return Work(batch_size=2, steps=self.steps, epochs=None, accumulate=2)

    def lr_at(self, step: int, num_steps: int, round: int) -> float:
        return self.lr

    def descend(self, cohort: Cohort, objective: Objective, lr_k: torch.Tensor, step: int) -> None:
        draws = [torch.randint(2, cohort.theta_kd.shape[1:], generator=key.generator()) for key in objective.keys("spsa")]
        z_kd = torch.stack(draws).float() * 2 - 1
        slope_k = (objective.losses(cohort.theta_kd + self.c * z_kd) - objective.losses(cohort.theta_kd - self.c * z_kd)) / (2 * self.c)
        cohort.theta_kd.sub_(lr_k * slope_k.unsqueeze(1) * z_kd)


def test_a_trainer_may_use_forward_passes_only() -> None:
    check_local(SPSA(lr=0.1))
    bank = bank_of("Llama", LoRA(r=2, dropout=0.1), SPSA())
    jobs, start = jobs_of([5, 9, 3], 4, 11), start_of(bank.tuned)
    together = bank.train(start, jobs, 1)
    alone = [bank.train(start, [job], 1)[0] for job in jobs]
    # Differences of losses over 2c: what is rounded in a loss counts 1/c-fold in a step.
    assert relative(together, alone) < 1e-2
    sets = [job.examples for job in jobs]
    before = bank.evaluate(bank.tuned.spec.flatten(start).unsqueeze(0), sets)["loss"]
    after = bank.evaluate(torch.stack([own.params_d for own in together]), sets)["loss"]
    assert (after < before).all()
    # The first call of a step reports: the loss a little beside the parameters, near the loss at them.
    gradient = bank_of("Llama", LoRA(r=2), SGD(lr=0.0, steps=1, batch_size=2, accumulate=2))
    for own, plain in zip(bank.train(start, jobs, 1, Work(2, 1, None, 2)), gradient.train(start, jobs, 1), strict=True):
        assert own.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=0.05)
        assert own.metrics["tokens"] == plain.metrics["tokens"] and own.metrics["padding"] == plain.metrics["padding"]


def objective_of(bank: Bank, jobs: list[Job], work: Work) -> tuple[StepObjective, torch.Tensor]:
    """The first step's objective, and somewhere for each client to be."""
    course = Course.of(jobs, work, 1, bank.key)
    start_d = bank.tuned.spec.flatten(start_of(bank.tuned))
    theta_kd = torch.stack([start_d * (1 + 0.1 * int(job.client[-1])) for job in course.jobs])
    objective = StepObjective(bank.learner, course.step(0), Tally.zeros(len(jobs), bank.learner), lambda: True)
    return objective, theta_kd


@pytest.mark.parametrize(("shape", "shortest"), [("Llama", 9), ("Llama", 4), ("GPT2", 4), ("Bert", 4)])
def test_gradients_of_examples_make_the_gradient_of_their_client(shape: str, shortest: int) -> None:
    bank, jobs = bank_of(shape, LoRA(r=2), SGD()), jobs_of([5, 3], shortest, 9)
    objective, theta_kd = objective_of(bank, jobs, Work(2, 1, None, 2))
    grad_nd, owner_n = objective.per_example(theta_kd)
    reported_k = objective.tally.loss_k.clone()
    grad_kd = objective.gradient(theta_kd)
    assert owner_n.bincount().tolist() == [4, 3] and torch.equal(objective.tally.loss_k, reported_k)
    assert torch.allclose(reported_k.float(), objective.losses(theta_kd), rtol=1e-5)
    step = objective.step
    targets_n = torch.zeros(len(owner_n))
    for k, key in enumerate(step.keys("rows")):
        rows = bank.task.rows(step.examples[k], step.index[k], key.numpy())
        targets_n[owner_n == k] = torch.tensor([float((row.targets >= 0).sum()) for row in rows])
    for k in range(2):
        mine = owner_n == k
        weighted_d = (grad_nd[mine] * (targets_n[mine] / targets_n[mine].sum()).unsqueeze(1)).sum(0)
        assert (weighted_d - grad_kd[k]).norm() < 1e-5 * grad_kd[k].norm()
        if shape == "Llama" and shortest == 9:
            assert (grad_nd[mine].mean(0) - grad_kd[k]).norm() < 1e-5 * grad_kd[k].norm()


def test_each_examples_gradient_is_that_of_a_bank_of_one() -> None:
    bank, jobs = bank_of("Llama", LoRA(r=2), SGD()), jobs_of([4, 3], 4, 9)
    objective, theta_kd = objective_of(bank, jobs, Work(None, 1, None))
    grad_nd, owner_n = objective.per_example(theta_kd)
    taken = [(k, int(i)) for k, index in enumerate(objective.step.index) for i in index]
    assert owner_n.tolist() == [k for k, _ in taken]
    for (k, i), grad_d in zip(taken, grad_nd, strict=True):
        one = Job("alone0", tiny.Memory([objective.step.examples[k].ids(i)]))
        alone, _ = objective_of(bank, [one], Work(None, 1, None))
        (own_d,) = alone.gradient(theta_kd[k : k + 1])
        assert (grad_d - own_d).norm() < 1e-5 * own_d.norm()


def test_gradients_of_examples_need_a_bank() -> None:
    @dataclass(frozen=True)
    class Private(SPSA):
        def descend(self, cohort: Cohort, objective: Objective, lr_k: torch.Tensor, step: int) -> None:
            objective.per_example(cohort.theta_kd)

    bank = bank_of("Llama", Full(), Private())
    with pytest.raises(ConfigError, match="one client at a time"):
        bank.train(bank.tuned.init(Key.root(2)), jobs_of([3], 9, 9), 1)


# A task with a loss of its own: two rows make one loss.


def pairs_of(seed: int, count: int) -> tiny.Memory:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(tiny.FIRST, tiny.LAST, rng.integers(6, 13)) for _ in range(count)]
    return tiny.Memory(ids, starts=[int(rng.integers(2, len(own) - 2)) for own in ids])


def test_a_task_with_its_own_loss_and_inputs_banks_and_evaluates() -> None:
    foundation = tiny.foundation("Bert", "sequence_classification", Pairs.labels)
    local = SGD(lr=0.5, epochs=4, batch_size=2, accumulate=2)
    bank = Bank(LoRA(r=2).attach(foundation), Pairs(), local, foundation.tokenizer.pad_token_id, torch.device("cpu"), Key.root(1))
    jobs, start = [Job(f"client{i}", pairs_of(i, count)) for i, count in enumerate([7, 3, 5])], start_of(bank.tuned)
    together = bank.train(start, jobs, 1)
    alone = [bank.train(start, [job], 1)[0] for job in jobs]
    assert relative(together, alone, of="parameters") < 1e-6
    assert [own.metrics["tokens"] for own in together] == [4 * float(job.examples.lengths.sum()) for job in jobs]
    sets, theta_kd = [job.examples for job in jobs], torch.stack([own.params_d for own in together])
    sums, before = bank.evaluate(theta_kd, sets, max_tokens=60), bank.evaluate(bank.tuned.spec.flatten(start).unsqueeze(0), sets)
    assert sums["targets"].tolist() == [7, 3, 5] and (sums["loss"] < before["loss"]).all()
    for k, own in enumerate(sets):
        for name, value in bank.evaluate(theta_kd[k : k + 1], [own]).items():
            torch.testing.assert_close(sums[name][k], value[0], rtol=1e-5, atol=1e-5)
    # A micro-batch is cut between examples, never between the two rows of one.
    objective, theta_kd = objective_of(bank, jobs, Work(1, 1, None, 3))
    whole, _ = objective_of(bank, jobs, Work(3, 1, None))
    assert [batch.shape[0] for batch in objective._batches] == [6, 6, 6]
    torch.testing.assert_close(objective.gradient(theta_kd), whole.gradient(theta_kd), rtol=1e-4, atol=1e-6)
    # Other inputs reach the model.
    batch = objective._batches[0]
    blind = replace(batch, inputs={**batch.inputs, "token_type_ids": 0 * batch.inputs["token_type_ids"]})
    assert not torch.equal(bank.learner.losses(theta_kd, batch), bank.learner.losses(theta_kd, blind))

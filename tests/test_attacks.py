"""Attacks read what is there: each against what is known of the model, in its own limits."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfm.attacks import EmbeddingRows, Labels, Lengths, Membership, Span
from fedfm.attacks.base import Secret, Seen, TokenAttack, different, outstanding, without_decay
from fedfm.core.errors import ConfigError
from fedfm.core.keys import Key
from fedfm.core.tree import norm
from fedfm.data import Data
from fedfm.federation import Federation
from fedfm.run.gaussian import noise_multiplier, noisy
from fedfm.run.leak_cases import RATE, Bench, Owner, Trial, mean_of, secret_of
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM, Classification, MaskedLM
from fedfm.testing import check_attack, examples, tiny
from fedfm.tuning import Full, LoRA
from fedfm.tuning.base import Tuning

HEADS: dict[str, Any] = {
    "Llama": CausalLM(max_length=16, packed=False),
    "GPT2": CausalLM(max_length=16, packed=False),
    "Bert": MaskedLM(max_length=16),
    "Roberta": Classification(max_length=16),
}

# A classifier reads the text at one position: with one layer its gradient has few dimensions.
LAYERS: dict[str, dict[str, int]] = {
    "Llama": {"num_hidden_layers": 1},
    "GPT2": {"n_layer": 1},
    "Bert": {"num_hidden_layers": 1},
    "Roberta": {"num_hidden_layers": 2},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def owner_of(tmp_path: Path) -> Any:
    """An owner of 20 texts or so, with a model of this architecture."""

    def make(architecture: str, group: int = 1, rows: int = 120) -> Owner:
        # Owners and labels go round with different periods, so an owner has every label.
        changes = {"model": tiny.spec(architecture, **LAYERS[architecture]), "task": HEADS[architecture], "tuning": Full()}
        plan: Federation = tiny.federation(tmp_path, "abcd", rows, **changes)
        return Owner(Simulation.build(plan), "a", group)

    return make


def seen_in(owner: Owner, bench: Bench, trial: Trial, in_sum: bool = False) -> tuple[Seen, Secret]:
    """What the server has after one step, and what is behind it."""
    delta, told = bench.update("a", trial.texts)
    if in_sum:
        delta, told = mean_of([delta, *(bench.update(client, texts)[0] for client, texts in trial.others.items())]), {}
    seen = bench.seen(owner.base, "a", trial, delta, told, RATE)
    return seen, secret_of(trial, owner.train, len(owner.site.house.labels), in_sum)


def right(attack: Any, seen: Seen, secret: Secret) -> float:
    guess = attack.guess(seen)
    assert guess is not None
    outcome = attack.score(guess, seen, secret)
    assert outcome is not None
    return float(outcome.right)


def noised(seen: Seen, epsilon: float, draw: int) -> Seen:
    multiplier = noise_multiplier(epsilon, 1e-5)
    return replace(seen, delta=noisy(seen.delta, norm(seen.delta), multiplier, Key.root(draw)), told={})


READS = {EmbeddingRows: "Llama", Span: "Llama", Labels: "Roberta", Lengths: "GPT2", Membership: "Llama"}
ATTACKS = examples("attacks", {})


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_every_attack_keeps_the_laws(attack: Any, owner_of: Any) -> None:
    owner = owner_of(READS[type(attack)])
    (trial,) = owner.trials(2, 1)
    check_attack(attack, *seen_in(owner, owner.full, trial))


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Bert", "Roberta"])
def test_all_words_of_one_example_are_read_from_a_full_update(architecture: str, owner_of: Any) -> None:
    owner = owner_of(architecture)
    for trial in owner.trials(1, 4):
        seen, secret = seen_in(owner, owner.full, trial)
        assert right(EmbeddingRows(), seen, secret) == 1.0


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Roberta"])
def test_the_span_of_the_first_layer_holds_the_words_of_one_example(architecture: str, owner_of: Any) -> None:
    owner = owner_of(architecture)
    scores = [right(Span(), *seen_in(owner, owner.full, trial)) for trial in owner.trials(1, 4)]
    # Of a classifier's gradient the faintest directions are lost in rounding.
    assert min(scores) >= (0.9 if architecture == "Roberta" else 1.0)


@pytest.mark.parametrize("attack", [EmbeddingRows(), Span()], ids=["rows", "span"])
def test_words_are_near_chance_under_noise_for_epsilon_8(attack: Any, owner_of: Any) -> None:
    owner = owner_of("Llama")
    scores: list[float] = []
    chances: list[float] = []
    for trial in owner.trials(1, 6):
        seen, secret = seen_in(owner, owner.full, trial)
        scores += [right(attack, noised(seen, 8.0, draw), secret) for draw in range(8)]
        chances.append(len(different(secret.texts, seen.base)) / (seen.base.size - len(seen.base.special)))
    assert np.mean(scores) <= np.mean(chances) + 0.05


def test_without_enough_noise_words_are_read_all_the_same(owner_of: Any) -> None:
    """The noise is what hides: with a ten-thousandth of it most words are read."""
    owner = owner_of("Llama")
    (trial,) = owner.trials(1, 1)
    seen, secret = seen_in(owner, owner.full, trial)
    little = replace(seen, delta=noisy(seen.delta, norm(seen.delta), noise_multiplier(8.0, 1e-5) / 1e4, Key.root(0)))
    assert right(EmbeddingRows(), little, secret) >= 0.9


def test_a_group_hides_whose_the_words_are_and_not_the_words(tmp_path: Path) -> None:
    """Each owner writes with letters of its own."""
    draw = np.random.default_rng(0)
    letters = {"a": "aeimquy", "b": "bfjnrvz", "c": "cgkosw1", "d": "dhlptx2"}
    rows = [{"owner": owner, "text": " ".join(draw.permutation(list(own))[:5])} for _ in range(20) for owner, own in letters.items()]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan: Federation = tiny.federation(tmp_path, data=Data(str(tmp_path / "letters.jsonl"), by="owner"), tuning=Full())
    recalls: dict[int, float] = {}
    for size in (1, 2, 4):
        owner = Owner(Simulation.build(plan), "a", size)
        outcomes = []
        for trial in owner.trials(1, 8):
            seen, secret = seen_in(owner, owner.full, trial, in_sum=size > 1)
            outcomes.append(EmbeddingRows().score(EmbeddingRows().guess(seen), seen, secret))
        recalls[size] = float(np.mean([outcome.right for outcome in outcomes]))
        assert size == 1 or min(outcome.in_group for outcome in outcomes) >= 0.9
    assert recalls[1] == 1.0 and recalls[2] < 0.8 and recalls[4] < 0.5


def test_lora_shows_no_rows_and_at_most_as_many_words_as_its_rank(owner_of: Any) -> None:
    owner = owner_of("Llama")
    scores: dict[int, list[float]] = {2: [], 24: []}
    for rank, own in scores.items():
        bench = owner.bench(LoRA(r=rank))
        for trial in owner.trials(1, 6):
            seen, secret = seen_in(owner, bench, trial)
            assert EmbeddingRows().guess(seen) is None
            assert all(not leaf.any() for name, leaf in seen.delta.items() if "lora_A" in name), "B is zero, so A does not move"
            own.append(right(Span(), seen, secret))
    assert np.mean(scores[2]) < 0.3 and np.mean(scores[24]) == 1.0


def test_a_decay_of_weights_hides_no_row() -> None:
    param, delta = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(50, 8)
    delta[[3, 41]] = 1e-3
    lengths = without_decay((delta - 0.01 * param).double(), param.double()).norm(dim=1)
    top = outstanding(lengths).topk(2).indices
    assert set(top.tolist()) == {3, 41}


# --- classes, lengths, membership ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [Full(), LoRA(r=2, targets=("query",))], ids=["full", "lora"])
def test_the_class_of_one_example_is_exact_with_lora_too(tuning: Tuning, owner_of: Any) -> None:
    owner = owner_of("Roberta")
    bench, labels = owner.bench(tuning), set()
    for trial in owner.trials(1, 6):
        seen, secret = seen_in(owner, bench, trial)
        assert right(Labels(), seen, secret) == 1.0
        without_bias = replace(seen, base=replace(seen.base, classes=seen.base.classes[:1]))
        assert right(Labels(), without_bias, secret) == 1.0
        labels |= set(secret.labels)
    assert len(labels) > 1, "a guess that is always the same class would pass"


def test_the_classes_of_a_batch_are_counted(owner_of: Any) -> None:
    owner = owner_of("Roberta")
    scores = [right(Labels(), *seen_in(owner, owner.full, trial)) for trial in owner.trials(4, 4)]
    assert np.mean(scores) >= 0.9


def test_positions_and_told_numbers_give_the_length_away(owner_of: Any) -> None:
    for architecture in ("GPT2", "Llama"):
        owner = owner_of(architecture)
        for trial in owner.trials(1, 3):
            seen, secret = seen_in(owner, owner.full, trial)
            assert right(Lengths(), seen, secret) == 1.0
            silent = Lengths().guess(replace(seen, told={}))
            assert (silent is None) == (architecture == "Llama"), "rotary positions have no rows"


def test_a_text_that_was_used_is_told_apart(owner_of: Any) -> None:
    owner = owner_of("Llama")
    scores = [right(Membership(), *seen_in(owner, owner.full, trial)) for trial in owner.trials(2, 3)]
    assert np.mean(scores) > 0.9
    lost = []
    for trial in owner.trials(2, 3):
        seen, secret = seen_in(owner, owner.full, trial)
        lost += [right(Membership(), noised(seen, 0.1, draw), secret) for draw in range(10)]
    assert abs(np.mean(lost) - 0.5) < 0.2


# --- noise and conformance -----------------------------------------------------------------------------------------


def test_the_noise_is_that_of_the_analytic_gaussian_mechanism() -> None:
    assert noise_multiplier(1.0, 1e-5) == pytest.approx(3.73063163, abs=1e-6)
    assert noise_multiplier(4.37717810, 1e-5) == pytest.approx(1.0, abs=1e-6)
    assert noise_multiplier(800.0, 1e-5) < 0.1, "a large epsilon does not overflow"
    for epsilon, delta in ((0.0, 1e-5), (float("inf"), 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(ConfigError, match=r"(epsilon|delta) is"):
            noise_multiplier(epsilon, delta)


def test_noise_is_added_to_an_update_that_is_no_longer_than_its_bound() -> None:
    update = {"w": torch.full((1000,), 3.0)}
    assert norm(noisy(update, 2.0, 0.0, Key.root(0))) == pytest.approx(2.0, abs=1e-5)
    loud = noisy(update, 2.0, 0.5, Key.root(0))["w"]
    assert float(loud.std()) == pytest.approx(1.0, rel=0.1) and not torch.equal(loud, noisy(update, 2.0, 0.5, Key.root(1))["w"])


@dataclass(frozen=True)
class Boastful(TokenAttack):
    """Guesses whatever comes."""

    question = "Which words?"

    def guess(self, seen: Seen) -> torch.Tensor:
        return torch.arange(seen.base.size).double()


def test_the_suite_catches_an_attack_that_guesses_from_nothing(owner_of: Any) -> None:
    owner = owner_of("Llama")
    (trial,) = owner.trials(2, 1)
    with pytest.raises(AssertionError, match="guesses from an update of zeros"):
        check_attack(Boastful(), *seen_in(owner, owner.full, trial))

"""``fedfm leak``: what an owner is shown of its own update, in each case, from a recipe, a run, and rows of its own."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from parts import Masks
from test_cli import Fedfm, call, refused  # noqa: F401 (a fixture)

from fedfm.aggregators import Mean
from fedfm.attacks.base import Outcome
from fedfm.core.errors import ConfigError, DataError, RunError
from fedfm.core.parts import RoundContext, Transform, Tree, Update
from fedfm.federation import Federation
from fedfm.local import SGD, ExampleDP
from fedfm.reports import leak as pages
from fedfm.run.gaussian import noise_multiplier, noisy
from fedfm.run.leak import Finding, Leak, Question, _mean, leak, site_of
from fedfm.run.leak_cases import Owner
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM, Classification
from fedfm.testing import tiny
from fedfm.transforms import ClipByNorm
from fedfm.tuning import BitFit, Full, LoRA

WORDS = ("EmbeddingRows", "Span")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def looked(folder: Path, question: Question | None = None, **changes: Any) -> Leak:
    plan: Federation = tiny.federation(folder, rows=90, **changes)
    return leak(site_of(plan), question or Question(trials=3, group=3))


@dataclass(frozen=True)
class Noise(Transform):
    """Gaussian noise of ``std`` on each value, on the client."""

    std: float = 1.0

    def encode(self, update: Update, memory: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        return update.with_payload(noisy(update.payload, 1e9, self.std / 1e9, ctx.draw("noise"))), memory


@dataclass(frozen=True)
class Late(Transform):
    """Gaussian noise of ``std`` on each value, on the server, once."""

    std: float = 1.0

    def finish(self, aggregate: Update, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        return aggregate.with_payload(noisy(aggregate.payload, 1e9, self.std / 1e9, ctx.draw("noise"))), state


def test_each_case_says_what_is_read(tmp_path: Path) -> None:
    shown = looked(tmp_path)
    assert [case.name for case in shown.cases] == ["raw", "lora", "group", "noise", "plan"] and not any(
        case.why_not for case in shown.cases
    )
    raw, lora, group, noise = (shown.case(name).findings for name in ("raw", "lora", "group", "noise"))
    assert raw["EmbeddingRows"].right == raw["Span"].right == 1.0 and raw["EmbeddingRows"].word == "all"
    assert lora["EmbeddingRows"] == Finding(None, None) and lora["EmbeddingRows"].word == "nothing"
    assert group["EmbeddingRows"].right is not None and group["EmbeddingRows"].right < 1.0 and group["EmbeddingRows"].in_group == 1.0
    for name in WORDS:
        right, chance = noise[name].right, noise[name].chance
        assert right is not None and chance is not None and right <= chance + 0.05 and noise[name].word == "near chance"
    assert shown.noise == pytest.approx(noise_multiplier(8.0, 1e-5)) and shown.group == 3 and shown.trials == 3
    assert all(shown.case("raw").marks) and len(shown.words) == len(shown.case("raw").marks)
    assert "".join(shown.words) in tiny.TEXT
    said = "\n".join(pages.sentences(json.loads(json.dumps(shown.to_json()))))
    assert "the server reads all different words of the text (100.0 %" in said and "That is near chance" in said
    assert "Among the words of the whole sum, 100.0 % of this owner's show" in said


def test_chance_is_what_noise_alone_gives_where_that_is_more(tmp_path: Path) -> None:
    """Texts of the tokens that the attack on spans ranks first whatever it is given: it reads them from nothing."""
    shown = looked(tmp_path, Question(trials=2))
    even = 8 / 296  # the fewest different tokens of a text over those that are text
    for case in ("raw", "lora", "noise"):
        finding = shown.case(case).findings["Span"]
        assert finding.chance is not None and even < finding.chance < 0.2
    rigged = Finding(0.2, 0.18)
    assert rigged.word == "near chance" and _mean([Outcome(0.2, 0.09)], [0.16, 0.2]) == rigged
    assert _mean([Outcome(0.2, 0.09)], []) == Finding(0.2, 0.09) and _mean([Outcome(0.2, 0.09)], [0.01]).chance == 0.09


def test_less_noise_reads_more(tmp_path: Path) -> None:
    loud = looked(tmp_path, Question(trials=2, epsilon=8.0)).case("noise").findings["Membership"].right
    quiet = looked(tmp_path, Question(trials=2, epsilon=0.01)).case("noise").findings["Membership"].right
    assert loud is not None and quiet is not None and loud > quiet + 0.1


def test_the_plan_case_is_what_the_plan_sends(tmp_path: Path) -> None:
    """Full parameters in one step: the same update as the raw one but for its length. Noise of the plan's own hides its words."""
    one_step = SGD(lr=0.5, steps=1, batch_size=None)
    shown = looked(tmp_path, tuning=Full(), local=one_step, transforms=(ClipByNorm(0.1),))
    for name in WORDS:
        assert shown.case("plan").findings[name].right == 1.0
    hidden = looked(tmp_path, Question(trials=6), tuning=Full(), local=one_step, transforms=(ClipByNorm(0.1), Noise()))
    for name in WORDS:
        assert hidden.case("raw").findings[name].right == 1.0 and hidden.case("plan").findings[name].word == "near chance"
    advice = [pages.advice(one.to_json())[0] for one in (shown, hidden)]
    assert "gives words away" in advice[0] and "gives words away" not in advice[1]


def test_noise_of_the_server_hides_from_others_and_not_from_the_server(tmp_path: Path) -> None:
    one_step = SGD(lr=0.5, steps=1, batch_size=None)
    shown = looked(tmp_path, Question(trials=6, group=3), tuning=Full(), local=one_step, transforms=(Late(),))
    assert shown.case("plan").findings["EmbeddingRows"].right == 1.0
    assert shown.case("released").findings["EmbeddingRows"].word == "near chance"


def test_a_channel_that_shows_sums_alone_shows_the_sum(tmp_path: Path) -> None:
    one_step = SGD(lr=0.5, steps=1, batch_size=None)
    shown = looked(tmp_path, tuning=Full(), local=one_step, channel=Masks())
    plan = shown.case("plan").findings["EmbeddingRows"]
    assert plan.in_group == 1.0 and plan.right is not None and plan.right < 1.0
    assert shown.case("plan").findings["Lengths"].right is None, "the numbers of one owner are in the sum"


def test_noise_is_that_of_the_owners_real_number_of_rows(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
    trainer = ExampleDP(SGD(lr=0.1, steps=2, batch_size=4), max_norm=0.5, delta=1e-3, epsilon=8.0)
    changes: dict[str, Any] = {"task": CausalLM(max_length=16, packed=False), "aggregator": Mean(weights="uniform")}
    plan: Federation = tiny.federation(tmp_path, rows=90, local=trainer, **changes)
    owner = Owner(Simulation.build(plan), "a", 1)
    local, solved = owner.client_plan().local, owner.plan.local
    assert isinstance(local, ExampleDP) and isinstance(solved, ExampleDP) and local.epsilon is None
    assert local.noise_multiplier == solved.noise_of(len(owner.train)) < solved.noise_of(1)
    (trial,) = owner.trials(1, 1)
    assert len(trial.texts) == 1 and owner.round(trial).delta


def test_a_policy_that_withholds_counts_hides_the_length(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "a.yaml").write_text("may_leave: [losses, evaluation]\n")
    silent = looked(tmp_path, Question(trials=1), policies=str(tmp_path / "policies"))
    assert silent.case("lora").findings["Lengths"].right == 1.0 and silent.case("plan").findings["Lengths"].right is None
    other = looked(tmp_path, Question(trials=1, owner="b"), policies=str(tmp_path / "policies"))
    assert other.case("plan").findings["Lengths"].right == 1.0


def test_a_classifier_gives_its_class_away_with_lora_too(tmp_path: Path) -> None:
    changes = {
        "model": tiny.spec("Roberta", num_hidden_layers=1),
        "task": Classification(max_length=16),
        "tuning": LoRA(r=2, targets=("query",)),
    }
    shown = looked(tmp_path, **changes)
    assert shown.case("lora").findings["Labels"].right == shown.case("plan").findings["Labels"].right == 1.0
    assert "classes away" in " ".join(pages.advice(shown.to_json()))


def test_a_case_that_is_not_there_says_why(tmp_path: Path) -> None:
    shown = looked(tmp_path, tuning=BitFit(), model=tiny.spec("GPT2", n_layer=1), local=SGD(lr=1e30, steps=3, batch_size=None))
    assert "NaN or infinite" in shown.case("plan").why_not and not shown.case("plan").findings
    assert shown.case("raw").findings["EmbeddingRows"].right == 1.0
    assert "is not there" in pages.html(shown.to_json()) and "not looked at, because" in "\n".join(pages.lines(shown.to_json()))


def test_trials_take_different_examples_and_never_more_than_there_are(tmp_path: Path) -> None:
    plan: Federation = tiny.federation(tmp_path, rows=90)
    owner = Owner(Simulation.build(plan), "a", 2)
    taken = [tuple(trial.index["a"]) for trial in owner.trials(4, 100)]
    assert len(taken) == len(owner.train) // 4 and len({i for index in taken for i in index}) == 4 * len(taken)
    assert [len(list(owner.trials(len(owner.train), 5)))] == [1]


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    site = site_of(tiny.federation(tmp_path))
    for question, told in (
        ({"num_texts": 0}, "examples is 0"),
        ({"trials": 0}, "trials is 0"),
        ({"group": 1}, "group is 1"),
        ({"epsilon": -1.0}, "epsilon is -1"),
    ):
        with pytest.raises(ConfigError, match=told):
            Question(**question)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no owner 'd'"):
        leak(site, Question(owner="d"))
    with pytest.raises(DataError, match="fewer than the 999"):
        leak(site, Question(num_texts=999))


def test_text_from_data_is_escaped_and_the_page_loads_nothing(tmp_path: Path) -> None:
    shown = looked(tmp_path).to_json()
    shown = {**shown, "owner": "<b>ann</b>", "words": ["<script>"] * len(shown["words"])}
    page = pages.html(shown)
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>ann" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert "keep it at home" in page and "no proof" in page


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_recipe_is_looked_at(call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = call("leak", "recipe.yaml", "--trials", 1, "--owner", "bob", "tuning.r=1")
    assert code == 0, err
    assert "update of bob" in out and "Everything trains, sent as it is" in out and "a guess without the update gets" in out
    assert {path.name for path in tmp_path.iterdir()} - before == {"small-leak.html"}, "nothing else is written"
    page = Path("small-leak.html").read_text()
    assert "What a server could read from an update of bob" in page


def test_a_run_is_looked_at_where_it_is(call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    assert call("run", "recipe.yaml", "--out", "out", "--quiet")[0] == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    code, out, err = call("leak", "out", "--trials", 1, "--json", "--quiet")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["page"] == "out/leak.html" and answer["owner"] == "ann" and answer["num_texts"] == 1
    cases = {case["name"]: case for case in answer["cases"]}
    assert cases["raw"]["attacks"]["EmbeddingRows"]["right"] == 1.0 and cases["lora"]["attacks"]["EmbeddingRows"]["right"] is None
    assert {path: path.read_bytes() for path in before} == before
    refused(call("leak", "out", "rounds=3"), "is a run, whose recipe is fixed")


def test_a_member_looks_at_rows_of_its_own(call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    Path("mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.TEXT[100:120]))
    code, out, err = call("leak", "recipe.yaml", "--data", "mine.jsonl", "--trials", 2, "--out", "mine.html", "--json", "--quiet")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["owner"] == "me" and answer["page"] == "mine.html" and Path("mine.html").is_file()
    cases = {case["name"]: case for case in answer["cases"]}
    assert cases["raw"]["attacks"]["EmbeddingRows"]["right"] == 1.0 and "one owner here" in cases["group"]["why_not"]
    refused(call("leak", "recipe.yaml", "--data", "mine.jsonl", "--owner", "ann"), "Leave one of them out")
    refused(call("leak", "recipe.yaml", "--data", "nowhere.jsonl"), "nowhere.jsonl")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["empty"], "holds no run"),
        (["recipe.yaml", "--owner", "an"], "Did you mean 'ann'?"),
        (["recipe.yaml", "--examples", "500"], "fewer than the 500"),
        (["recipe.yaml", "--epsilon", "0"], "epsilon is 0"),
        (["recipe.yaml", "--delta", "2"], "delta is 2"),
        (["recipe.yaml", "tuning.r=-1"], "-1"),
    ],
)
def test_bad_questions_are_one_message(words: list[str], told: str, call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    Path("empty").mkdir()
    refused(call("leak", *words), told)
    assert not list(tmp_path.glob("*leak.html"))


def test_a_run_of_all_parameters_is_read_where_it_is(tmp_path: Path) -> None:
    """The span is that of the run's own embeddings, which two rounds of long steps have moved."""
    from fedfm.run.loop import run

    plan: Federation = tiny.federation(tmp_path, rows=90, rounds=2, tuning=Full(), local=SGD(lr=2.0, steps=3, batch_size=4))
    for _ in run(plan, out=tmp_path / "out"):
        pass
    shown = leak(site_of(plan), Question(trials=2, group=2), run=tmp_path / "out")
    for name in WORDS:
        assert shown.case("raw").findings[name].right == 1.0


def test_a_base_that_changed_under_a_run_is_refused(tmp_path: Path) -> None:
    from fedfm.run.loop import run

    plan: Federation = tiny.federation(tmp_path, rounds=1)
    for _ in run(plan, out=tmp_path / "out"):
        pass
    with pytest.raises(RunError, match="is not the one that"):
        leak(site_of(replace(plan, model=tiny.spec("Llama", num_hidden_layers=2))), Question(trials=1), run=tmp_path / "out")

"""An owner's policy: each rule against a coordinator that asks for more, refused before data is read, with the rule's name; and what leaves, held to it again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import Masks, Private

from fedfm.client import asking
from fedfm.client.house import House
from fedfm.client.log import OwnerLog, read
from fedfm.client.memory import home
from fedfm.client.policy import KINDS, Policy, parse_policy, read_policies, read_policy, require_known, write_policy
from fedfm.client.runtime import Runtime
from fedfm.core import disk, registry
from fedfm.core.errors import ConfigError, RunError
from fedfm.core.messages import Failure, Reply, Request, pack
from fedfm.core.parts import ERRAND, RoundContext
from fedfm.core.round import play, start
from fedfm.core.tree import equal
from fedfm.data import Data
from fedfm.engines import Embedded, Process
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.models.digest import weights_digest
from fedfm.recipe import dump, load
from fedfm.run.loop import run
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing.tiny import TEXT, spec
from fedfm.transforms import ClipByNorm
from fedfm.tuning import LoRA
from fedfm.verbs import Describe, Evaluation, Train
from fedfm.verbs import describe as describe_file

SATURDAY = datetime(2026, 7, 4, 12, 30)
MONDAY = datetime(2026, 7, 6, 12, 30)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three owners."""
    folder = tmp_path_factory.mktemp("policy")
    rows = [{"owner": "abc"[i % 3], "text": text} for i, text in enumerate(TEXT[:30])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(folder / "cache"))
        yield Federation(
            model=spec("Llama", num_hidden_layers=1),
            data=Data(str(folder / "rows.jsonl"), by="owner", test_fraction=0.3),
            name="small",
            task=CausalLM(max_length=16, packed=False),
            tuning=LoRA(r=2),
            local=SGD(lr=0.1, steps=1, batch_size=2),
            engine=Embedded(bank=1, device="cpu"),
            rounds=2,
        )


@dataclass
class Site:
    """The house of one owner with a policy, and what a server may ask it."""

    plan: Federation
    house: House

    def __post_init__(self) -> None:
        self.runtime = Runtime(self.house)
        self.state = start(self.plan, self.house.start)

    @staticmethod
    def of(plan: Federation, policy: Policy, folder: Path | None = None, **house: Any) -> Site:
        simulation = Simulation.build(plan, folder, policies={"a": policy})
        return Site(simulation.federation, replace(simulation.house, now=lambda: MONDAY, **house))

    def train(self, round: int = 1) -> Request:
        ctx = RoundContext(round, self.house.key, self.state.params, len(self.house.clients))
        return self.plan.work(self.state, self.house.clients, ctx).request("a")

    def evaluate(self) -> Request:
        return Evaluation().errand(self.plan, self.state, self.house.clients, 2).request("a")

    def ask(self, request: Request, client: str = "a") -> Reply | Failure:
        (answer,) = self.runtime.handle({client: request})
        return answer

    def log(self) -> list[Mapping[str, Any]]:
        guard = self.house.guard("a")
        assert guard is not None
        return [line.what for line in guard.log.lines()]


def refused(site: Site, request: Request, rule: str, monkeypatch: pytest.MonkeyPatch) -> Failure:
    """The refusal, which names the rule, reads no data, releases nothing and is in the log."""

    def shard(self: House, client: str) -> None:
        raise AssertionError(f"the data of {client} was read")

    with monkeypatch.context() as patch:
        patch.setattr(House, "shard", shard)
        answer = site.ask(request)
    assert isinstance(answer, Failure) and answer.stage == "policy", answer
    assert f"rule {rule!r}" in answer.reason
    events = [line["event"] for line in site.log()]
    assert events[-2:] in (["request", "refusal"], ["question", "refusal"]) and site.log()[-1]["rule"] == rule
    assert "release" not in events
    return answer


# --- each rule, with a coordinator that asks for more ------------------------------------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "coordinators": {"coordinators": ("0f" * 16,)},
    "tasks": {"tasks": ("Classification", "MaskedLM")},
    "columns": {"columns": {"note": "text"}},
    "min_cohort": {"min_cohort": 4},
    "verbs": {"verbs": ("describe",)},
    "hours": {"hours": ("sat 08:00-18:00",)},
    "models": {"models": ("0" * 32,)},
    "ask": {"ask": "run"},
    "may_leave": {"may_leave": ("losses",)},
}
DEMANDS = ("sums", "private", "bounded", "ClipByNorm", "Masks", "NoSuchPart")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_each_rule_refuses_before_data_is_read(base: Federation, rule: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site.of(base, Policy.open(**RULES[rule]))
    refused(site, getattr(site, verb)(), rule, monkeypatch)
    # Another owner of the same house has no policy, and answers.
    assert isinstance(site.ask(getattr(site, verb)(), "b"), Reply)


@pytest.mark.parametrize("demand", DEMANDS)
def test_nothing_leaves_before_what_is_demanded_stands(base: Federation, demand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site.of(base, Policy.open(demand=(demand,)))
    for request in (Request.of("describe"), site.train(), site.evaluate()):
        assert repr(demand) in refused(site, request, "demand", monkeypatch).reason


def test_what_is_demanded_and_stands_is_answered(base: Federation) -> None:
    clipped = replace(base, transforms=(ClipByNorm(1.0),))
    for demand in ("bounded", "ClipByNorm", "Plain"):
        site = Site.of(clipped, Policy.open(demand=(demand,)))
        for request in (Request.of("describe"), site.train(), site.evaluate()):
            assert isinstance(site.ask(request), Reply), demand


def test_a_promise_that_leaves_a_leaf_uncovered_is_refused_as_it_leaves(base: Federation) -> None:
    # Private covers deltas alone, and the answer has counts and a loss beside them.
    site = Site.of(replace(base, transforms=(Private(),)), Policy.open(demand=("private",)))
    answer = site.ask(site.train())
    assert isinstance(answer, Failure) and "rule 'demand'" in answer.reason and "told" in answer.reason
    assert [line["event"] for line in site.log()][1:] == ["request", "refusal"]


def test_a_model_is_known_by_its_weights(base: Federation) -> None:
    site = Site.of(base, Policy.open(models=("0" * 32,)))
    answer = site.ask(site.train())
    digest = weights_digest(site.house.foundation)
    # The refusal says which model was asked for, so that the owner can look at it.
    assert isinstance(answer, Failure) and digest in answer.reason
    other = Site.of(base, Policy.open(models=(digest,)))
    assert isinstance(other.ask(other.train()), Reply)
    with torch.no_grad():
        next(other.house.foundation.model.parameters()).add_(1)
    fresh = Runtime(replace(other.house))
    fresh.house.__dict__["foundation"] = other.house.foundation
    (answer,) = fresh.handle({"a": other.train()})
    assert isinstance(answer, Failure) and "rule 'models'" in answer.reason


def test_a_quota_counts_what_is_different_and_survives_a_restart(base: Federation, tmp_path: Path) -> None:
    policy = Policy.open(rounds=2)
    site = Site.of(base, policy, tmp_path)
    first, second, third = (site.train(round) for round in (1, 2, 3))
    assert all(isinstance(site.ask(request), Reply) for request in (first, second, second, first))
    again = Site.of(base, policy, tmp_path)
    for request in (third, replace(first, body=replace(first.body, tensors={k: v + 1 for k, v in first.tensors.items()}))):
        answer = again.ask(request)
        assert isinstance(answer, Failure) and "rule 'rounds'" in answer.reason
    # The same request has the same answer, and is no new one; other verbs have their own count.
    assert isinstance(again.ask(first), Reply) and isinstance(again.ask(again.evaluate()), Reply)
    entries = again.house.spent.entries("a")
    assert len({what for what, _ in entries if what.startswith("answer/train/")}) == 2


def test_bytes_are_counted_as_they_leave(base: Federation) -> None:
    free = Site.of(base, Policy.open())
    answer = free.ask(free.train())
    assert isinstance(answer, Reply)
    size = len(pack(answer))
    for rule, most, fits in (
        ("max_bytes", size - 1, False),
        ("max_bytes", size, True),
        ("total_bytes", size - 1, False),
        ("total_bytes", size, True),
    ):
        site = Site.of(base, Policy.open(**{rule: most}))
        answer = site.ask(site.train())
        assert isinstance(answer, Reply) == fits
        assert fits or (isinstance(answer, Failure) and f"rule {rule!r}" in answer.reason)
    answer = site.ask(site.train())
    assert isinstance(answer, Failure) and "rule 'total_bytes'" in answer.reason, "all that the owner gives has left"


def test_every_lie_is_refused_and_logged(base: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.robustness.servers import lies

    site = Site.of(base, Policy.open(min_cohort=4), tmp_path)
    monkeypatch.setattr(House, "shard", lambda self, client: pytest.fail(f"the data of {client} was read"))
    count = 0
    for kind, what, request in lies(site.train(), site.evaluate()):
        assert isinstance(site.ask(request), Failure), (kind, what)
        count += 1
    events = [line["event"] for line in site.log()]
    assert count > 50 and events.count("request") == count == events.count("refusal") + events.count("failure") and "release" not in events


def test_an_exchange_of_the_channel_is_held_to_the_rules_of_its_verb(base: Federation) -> None:
    def masks(**rules: Any) -> Site:
        return Site.of(replace(base, channel=Masks()), Policy.open(**rules))

    (hello,) = Masks.verbs
    for rules, verb, answered in (
        ({"verbs": ("train",)}, "train", True),
        ({"verbs": ("train",)}, "evaluate", False),
        ({"hours": ("sat 08:00-18:00",)}, "train", False),
        ({"demand": ("sums",)}, "train", True),
        ({"max_bytes": 20}, "train", False),
    ):
        answer = masks(**rules).ask(Request.of(hello, 1, **{ERRAND: f"{verb}/1/0"}))
        assert isinstance(answer, Reply) == answered, (rules, verb, answer)


# --- what leaves ----------------------------------------------------------------------------------------------------------------------


def test_what_may_not_leave_is_left_out(base: Federation) -> None:
    from fedfm.aggregators import Mean

    uniform = replace(base, aggregator=Mean(weights="uniform"))
    site, free = Site.of(uniform, Policy.open(may_leave=())), Site.of(uniform, Policy.open())
    silent, told = site.ask(site.train()), free.ask(free.train())
    assert isinstance(silent, Reply) and isinstance(told, Reply)
    assert equal(silent.tensors, told.tensors), "the update is what it was"
    assert dict(silent.meta) == {"weight": 1.0, "steps": 0.0, "examples": 0.0, "tokens": 0.0, "padding": 0.0}
    described = site.ask(Request.of("describe"))
    assert isinstance(described, Reply) and all(math.isnan(float(value)) for value in described.meta.values())  # type: ignore[arg-type]
    for request, kind in ((site.evaluate(), "evaluation"), (Site.of(base, Policy.open(may_leave=())).train(), "counts")):
        answer = Site.of(base, Policy.open(may_leave=())).ask(request)
        assert isinstance(answer, Failure) and "rule 'may_leave'" in answer.reason and kind in answer.reason


def test_a_round_goes_on_without_a_loss_that_is_withheld(base: Federation) -> None:
    told = [kind for kind in KINDS if kind != "losses"]
    records = []
    for policies in ({}, {"a": Policy.open(may_leave=tuple(told))}, {name: Policy.open(may_leave=tuple(told)) for name in "abc"}):
        simulation = Simulation.build(base, policies=policies)
        with simulation.open() as session:
            state, record = play(base, start(base, simulation.house.start), session, simulation.clients, simulation.key)
        records.append((state, record))
    (free, all_tell), (one, some_tell), (none, nobody_tells) = records
    assert equal(free.params, one.params) and equal(free.params, none.params) and not some_tell.failures
    assert "loss" not in some_tell.clients["a"] and "train_loss" not in nobody_tells.metrics
    numbers = [all_tell.clients[name] for name in "bc"]
    mean = sum(n["weight"] * n["loss"] for n in numbers) / sum(n["weight"] for n in numbers)
    assert some_tell.metrics["train_loss"] == pytest.approx(mean)


def test_a_verb_that_tells_what_may_not_leave_is_stopped_at_the_door(base: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site.of(base, Policy.open(may_leave=()))
    honest = describe_file._answer
    monkeypatch.setattr(
        describe_file, "_answer", lambda client, house: honest("b", house).__class__({}, client=client, metrics=honest("b", house).metrics)
    )
    answer = site.ask(Request.of("describe"))
    assert isinstance(answer, Failure) and "rule 'may_leave'" in answer.reason and "'train' tells counts" in answer.reason
    monkeypatch.setattr(describe_file, "_answer", lambda client, house: replace(honest(client, house), metrics={"secret": 7.0}))
    answer = site.ask(Request.of("describe"))
    assert isinstance(answer, Failure) and "secret, which its verb does not declare" in answer.reason


def test_why_a_request_failed_stays_in_the_house(base: Federation) -> None:
    for may_leave, leaves in (((), False), (("reasons",), True)):
        site = Site.of(base, Policy.open(may_leave=may_leave))
        answer = site.ask(Request.of("dance"))
        assert isinstance(answer, Failure) and ("'dance' is not known" in answer.reason) == leaves
        assert "'dance' is not known" in site.log()[-1]["why"] and site.log()[-1]["told"] == answer.reason


@pytest.mark.parametrize("breaks", ["log", "spent"])
def test_nothing_leaves_unless_it_is_written_down(base: Federation, tmp_path: Path, breaks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site, append = Site.of(base, Policy.open(), tmp_path), disk.append

    def full(path: Path, line: str) -> None:
        if ('"release"' if breaks == "log" else '"spent"') in line:
            raise RunError("The disk is full.")
        append(path, line)

    monkeypatch.setattr(disk, "append", full)
    answer = site.ask(site.train())
    assert isinstance(answer, Failure) and "release" not in [line["event"] for line in site.log()]
    monkeypatch.undo()
    assert isinstance(site.ask(site.train()), Reply)


@pytest.mark.parametrize("name", ["log.jsonl", "spent.jsonl"])
def test_a_house_whose_records_were_edited_answers_nothing(base: Federation, tmp_path: Path, name: str) -> None:
    policy = Policy.open(rounds=5)
    site = Site.of(base, policy, tmp_path)
    assert isinstance(site.ask(site.train()), Reply)
    path = home(tmp_path, "a") / name
    path.write_bytes(path.read_bytes().replace(b'"a', b'"b', 1))
    answer = Site.of(base, policy, tmp_path).ask(site.train(2))
    assert isinstance(answer, Failure) and answer.stage in ("exchange", "log")


def test_a_policy_that_allows_it_changes_no_bit(base: Federation, tmp_path: Path) -> None:
    free = list(run(base, out=tmp_path / "free"))
    guarded = Simulation.build(base, tmp_path / "guarded", policies=dict.fromkeys("abc", Policy.open()))
    state = start(base, guarded.house.start)
    with guarded.open() as session:
        for _ in range(2):
            state, _ = play(base, state, session, guarded.clients, guarded.key)
    assert equal(state.params, free[-1][0].params)
    assert not list((tmp_path / "free").rglob("log.jsonl")), "an owner without a policy keeps no log"
    assert len(list((tmp_path / "guarded").rglob("log.jsonl"))) == 3


# --- a person ----------------------------------------------------------------------------------------------------------------------------


def answer_all(folder: Path, verdict: asking.Verdict) -> list[str]:
    """Answers every question that waits; their texts."""
    texts = []
    for path in asking.questions_in(folder):
        question, answer = asking.read(path)
        if answer is None:
            asking.write(path, question, verdict)
            texts.append(question.text)
    return texts


def test_a_person_is_asked_once_for_a_run_and_a_yes_is_for_that_run_alone(base: Federation, tmp_path: Path) -> None:
    policy = Policy.open(ask="run")
    site = Site.of(base, policy, tmp_path)
    guard = site.house.guard("a")
    assert guard is not None and guard.is_waiting(site.train())
    for request in (Request.of("describe"), site.train()):
        answer = site.ask(request)
        assert isinstance(answer, Failure) and "rule 'ask'" in answer.reason and "is asked" in answer.reason
    (text,) = answer_all(tmp_path, "yes")
    assert "CausalLM" in text and weights_digest(site.house.foundation) in text and "sees this owner's answer by itself" in text
    assert not guard.is_waiting(site.train())
    for request in (Request.of("describe"), site.train(), site.train(2)):
        assert isinstance(site.ask(request), Reply)
    assert [line["event"] for line in site.log()].count("answer") == 1
    # Another run, another plan, another coordinator, more rounds: each is another question.
    others: list[Site] = [
        Site.of(base, policy, tmp_path, run="another"),
        Site.of(replace(base, local=SGD(lr=0.2, steps=1, batch_size=2)), policy, tmp_path),
        Site.of(base, policy, tmp_path, coordinator="0f" * 16),
        Site.of(replace(base, rounds=9), policy, tmp_path),
    ]
    for other in others:
        assert isinstance(other.ask(other.train()), Failure)
    assert len(answer_all(tmp_path, "no")) == len(others)
    answer = others[0].ask(others[0].train())
    assert isinstance(answer, Failure) and "said no" in answer.reason
    assert isinstance(Site.of(base, policy, tmp_path).ask(site.train()), Reply), "the first yes still holds"


def test_a_person_is_asked_for_each_round(base: Federation, tmp_path: Path) -> None:
    site = Site.of(base, Policy.open(ask="round"), tmp_path)
    for round in (1, 2):
        assert isinstance(site.ask(site.train(round)), Failure)
        (text,) = answer_all(tmp_path, "yes")
        assert f"to train in round {round}" in text and isinstance(site.ask(site.train(round)), Reply)


def test_another_door_than_files(base: Federation) -> None:
    asked = []
    site = Site.of(base, Policy.open(ask="run"), door=lambda client, question: asked.append((client, question.id)) or "yes")
    assert isinstance(site.ask(site.train()), Reply) and asked[0][0] == "a"
    assert [line["event"] for line in site.log()] == ["policy", "request", "question", "answer", "release"]


# --- processes ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_holds_its_owner_s_policy_and_keeps_its_log(base: Federation, tmp_path: Path) -> None:
    policies = {
        "a": Policy.open(min_cohort=4),
        "b": Policy.open(verbs=("describe", "train"), rounds=1, columns={"text": "text"}, hours=("mon-sun 00:00-24:00",)),
    }
    simulation = Simulation.build(replace(base, engine=Process(device="cpu")), tmp_path, policies=policies)
    plan, house = simulation.federation, simulation.house
    state = start(plan, house.start)

    def requests(round: int) -> dict[str, Request]:
        errand = plan.work(state, house.clients, RoundContext(round, house.key, state.params, 3))
        return {client: errand.request(client) for client in house.clients}

    for round, refusals in ((1, {"a": "min_cohort"}), (2, {"a": "min_cohort", "b": "rounds"})):
        # A session of its own each: what was answered is known to the next process too.
        with simulation.open() as session:
            answers = {answer.client: answer for answer in session.exchange(requests(round))}
            evaluation = next(iter(session.exchange({"b": Evaluation().errand(plan, state, house.clients, 2).request("b")})))
        assert isinstance(evaluation, Failure) and "rule 'verbs'" in evaluation.reason
        for client, answer in answers.items():
            assert isinstance(answer, Failure) == (client in refusals), answer
            assert not isinstance(answer, Failure) or f"rule {refusals[client]!r}" in answer.reason
    events = [line.what["event"] for line in read(home(tmp_path, "b") / "log.jsonl")]
    assert events == ["policy", "request", "release", "request", "refusal", "request", "refusal", "request", "refusal"]
    assert not (home(tmp_path, "c") / "log.jsonl").exists()


# --- files -------------------------------------------------------------------------------------------------------------------------------


def test_without_a_file_a_person_is_asked_and_the_update_alone_leaves(base: Federation, tmp_path: Path) -> None:
    strict = Policy()
    assert strict.ask == "run" and strict.may_leave == () and strict.min_cohort == 3 and strict.rounds == 100
    assert strict.verbs == ("describe", "train", "evaluate")
    site = Site.of(base, strict, tmp_path)
    assert all(isinstance(site.ask(request), Failure) for request in (Request.of("describe"), site.train(), site.evaluate()))


def test_a_policy_survives_being_written(tmp_path: Path) -> None:
    policies = [
        Policy(),
        Policy.open(),
        Policy(
            coordinators=("0f" * 16,),
            models=("12" * 16,),
            tasks=("CausalLM",),
            verbs=None,
            columns={"text": "note_text"},
            min_cohort=8,
            demand=("sums",),
            may_leave=("counts", "reasons"),
            rounds=20,
            hours=("mon-fri 08:00-18:00",),
            max_bytes=10**6,
            total_bytes=10**8,
            ask="round",
        ),
    ]
    for policy in policies:
        assert parse_policy(write_policy(policy)) == policy
        (tmp_path / "policy.yaml").write_text(write_policy(policy))
        assert read_policy(tmp_path / "policy.yaml") == policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"policy\.yaml: a policy is a mapping"),
        ("rounds: 20\nverb: [train]", r"policy\.yaml:2: a policy has no 'verb'.*'verbs'"),
        ("rounds: 20\nrounds: 30", r"policy\.yaml:2: the key 'rounds' stands here and at"),
        ("ask: run\nrounds: 0", r"policy\.yaml:2: rounds is 0; it must be 1 or more"),
        ("rounds: many", r"policy\.yaml:1: rounds is 'many'; it must be a whole number or null"),
        ("ask: sometimes", r"policy\.yaml:1: ask is 'sometimes'; it must be one of never, run, round"),
        ("may_leave: [loss]", r"policy\.yaml:1: may_leave is .*it must be a list, each one of counts"),
        ("\nmodels: [gpt2]", r"policy\.yaml:2: models holds 'gpt2', which is no digest"),
        ("hours: [mon-fri 8-18]", r"policy\.yaml:1: hours holds 'mon-fri 8-18'"),
        ("hours: [mun 08:00-18:00]", r"policy\.yaml:1: hours holds"),
        ("hours: [08:00-25:00]", r"policy\.yaml:1: hours holds"),
        ("columns: [text]", r"policy\.yaml:1: columns is .*it must be a mapping of names to text or null"),
        ("min_cohort: [3", r"policy\.yaml:\d: this is not YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_policy(tmp_path / "policy.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no policy at .*policy\.yaml"):
        read_policy(tmp_path / "policy.yaml")


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("mon-fri 08:00-18:00", (6, 8, 0), (4, 12, 0)),
        ("mon-fri 08:00-18:00", (6, 17, 59), (6, 18, 0)),
        ("sat 10:00-12:00", (4, 11, 0), (5, 11, 0)),
        ("22:00-06:00", (4, 23, 0), (4, 6, 0)),
        ("fri 22:00-06:00", (4, 5, 59), (5, 5, 59)),
        ("sun-mon 00:00-24:00", (5, 23, 59), (7, 0, 0)),
    ],
)
def test_windows(window: str, inside: tuple[int, int, int], outside: tuple[int, int, int]) -> None:
    # The 4th of July 2026 is a Saturday.
    policy = Policy(hours=(window,))
    assert policy.is_open(datetime(2026, 7, *inside)) and not policy.is_open(datetime(2026, 7, *outside))


def test_a_recipe_names_the_policies_of_simulated_owners(base: Federation, tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "b.yaml").write_text(write_policy(Policy.open(may_leave=("counts", "evaluation"))))
    plan = replace(base, policies=str(folder), rounds=1)
    assert load(dump(plan)) == plan
    ((_, before), (_, record)) = run(plan, out=tmp_path / "run")
    assert before.round == 0 and "loss" in record.clients["a"] and "loss" not in record.clients["b"]
    assert (home(tmp_path / "run", "b") / "log.jsonl").is_file() and not (home(tmp_path / "run", "a") / "log.jsonl").exists()
    (folder / "bob.yaml").write_text(write_policy(Policy.open()))
    with pytest.raises(ConfigError, match=r"policy of 'bob', and no owner of that name. The owners are a, b and c"):
        Simulation.build(plan)
    assert read_policies(folder).keys() == {"b", "bob"}
    require_known(["a"], "abc")


def test_an_owner_names_its_columns_otherwise(base: Federation, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(base.data.source).read_text().splitlines()]
    renamed = [{("note" if row["owner"] == "a" and name == "text" else name): value for name, value in row.items()} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    plan = replace(base, data=replace(base.data, source=str(tmp_path / "rows.jsonl")))
    assert set(Simulation.build(plan).owners.left_out) == {"a"}
    site = Site.of(plan, Policy.open(columns={"text": "note"}))
    free = Site.of(base, Policy.open())
    answer, expected = site.ask(site.train()), free.ask(free.train())
    assert isinstance(answer, Reply) and isinstance(expected, Reply) and equal(answer.tensors, expected.tensors)


def test_what_a_verb_tells_is_said_by_the_verb(base: Federation) -> None:
    site = Site.of(base, Policy.open())
    assert set(Train().tells(site.train(), site.house)) == {"counts"}
    assert set(Evaluation().tells(site.evaluate(), site.house)) == {"counts", "evaluation"}
    assert not Describe().tells(Request.of("describe"), site.house)
    masked = Site.of(replace(base, channel=Masks()), Policy.open())
    assert set(Train().tells(masked.train(), masked.house)) == {"counts", "losses"}
    assert set(Describe().tells(Request.of("describe"), masked.house)) == {"counts"}


def test_a_log_without_a_folder_is_in_this_process(base: Federation) -> None:
    log = OwnerLog(None, "a")
    log.add("request", MONDAY, verb="train")
    assert [line.what["verb"] for line in log.lines()] == ["train"] and SATURDAY < MONDAY


@pytest.fixture(scope="module", autouse=True)
def index() -> Iterator[None]:
    """The index of parts is read once in a process; other tests add to it."""
    yield
    registry.entries.cache_clear()


def test_the_page_for_owners_shows_every_rule_and_a_policy_that_reads() -> None:
    page = (Path(__file__).parent.parent / "docs" / "owners.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert block is not None
    rules = [item.name for item in fields(Policy)]
    shown = parse_policy(block.group(1))
    assert [line.partition(":")[0] for line in block.group(1).splitlines()[1:]] == rules and shown.columns == {"text": "note_text"}
    table = page[page.index("| rule | default |") : page.index("`demand` may name")]
    assert all(f"`{rule}`" in table for rule in rules)

"""The channel of secure sums: in rounds, over a wire, after restarts, and in a plan that cannot mean what it says."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfm.aggregators import CoordinateMedian, Mean, TrimmedMean
from fedfm.channels import Plain, SecureAggregation
from fedfm.client.memory import home
from fedfm.client.peers import Peers
from fedfm.client.spent import SpentStore
from fedfm.core import leaves as declare
from fedfm.core.check import check
from fedfm.core.errors import ConfigError, MessageError, MissingExtra, RunError
from fedfm.core.keys import Key
from fedfm.core.leaves import Leaf
from fedfm.core.messages import Body, ClientId, Failure, Reply, Request, pack
from fedfm.core.parts import Errand, Part, Partial, Scratch, Session, Update, Vault, traits
from fedfm.core.round import play, start
from fedfm.core.session import Answer, WrappedSession
from fedfm.core.words import Metric
from fedfm.engines import Process
from fedfm.federation import Federation
from fedfm.observers import Evaluate, Observer, owners
from fedfm.recipe import read
from fedfm.run.loop import resume, run
from fedfm.samplers import Poisson, Uniform
from fedfm.simulation import Simulation
from fedfm.testing import tiny
from fedfm.testing.channels import halves, vault_of
from fedfm.testing.parts import context, same
from fedfm.transforms import ClipByNorm, Int8, TopK
from fedfm.tuning import Full
from fedfm.verbs import Describe, Evaluation

RECIPES = Path(__file__).parent.parent / "recipes"
LEAVES = (Leaf("w", (2,)), declare.number("weight"), declare.number("loss", "mean", signed=True))
SUMS = SecureAggregation(min_clients=3, reach=8.0, max_weight=16.0, dropout=0.3)
NAMES = tuple("abcdef")
Outcomes = list[Update | Partial | Failure]


def errand(w: float = 0.0, round: int = 3, attempt: int = 0) -> Errand:
    params = {"w": torch.full((2,), w)}
    return Errand(Body("train", round, params), LEAVES, params=params, own={"b": {"ticket": 7}}, sums=True, attempt=attempt)


def updates(names: Iterable[str] = NAMES) -> dict[ClientId, Update]:
    return {
        name: Update(
            {"w": torch.tensor([i + 0.5, -1.0])}, 2.0, client=name, metrics={"weight": 2.0, "loss": 1.0}, ticket=7 if name == "b" else None
        )
        for i, name in enumerate(names)
    }


def collect(
    asked: Errand,
    tamper: Any = None,
    vaults: Mapping[ClientId, Vault] | None = None,
    channel: SecureAggregation = SUMS,
    names: Iterable[str] = NAMES,
) -> Outcomes:
    own = updates(names)
    return list(channel.collect(halves(channel, own, LEAVES, tamper, vaults), asked, list(own), None, context(asked.params, 3)))


def vaults_of(names: Iterable[str] = NAMES) -> dict[ClientId, Vault]:
    return {name: vault_of(name) for name in names}


def silent(who: str, verb: str = "train") -> Any:
    return lambda exchange, answers: [answer for answer in answers if exchange != verb or answer.client not in who]


def total_of(outcomes: Outcomes) -> Partial:
    (total,) = (outcome for outcome in outcomes if isinstance(outcome, Partial))
    return total


# --- one sum ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["secagg.keys", "secagg.pairs", "secagg.shares", "train"])
def test_a_dropout_before_its_answer_arrives_is_left_out(verb: str) -> None:
    outcomes = collect(errand(), silent("c", verb))
    total = total_of(outcomes)
    assert [outcome.client for outcome in outcomes if isinstance(outcome, Failure)] == ["c"]
    assert total.clients == list("abdef") and total.weight == 10 and total.by_client == {} and total.tickets == {"b": 7}
    assert torch.allclose(total.mean()["w"], torch.tensor([(0.5 + 1.5 + 3.5 + 4.5 + 5.5) / 5, -1.0]), atol=1e-5)


@pytest.mark.parametrize("verb", ["secagg.sign", "secagg.reveal"])
def test_a_dropout_after_its_answer_arrived_is_in_the_sum(verb: str) -> None:
    (total,) = collect(errand(), silent("c", verb))
    assert isinstance(total, Partial) and total.clients == list(NAMES)


def test_nothing_of_one_client_is_told_in_the_clear() -> None:
    replies: list[Reply] = []

    def note(exchange: str, answers: list[Answer]) -> list[Answer]:
        replies.extend(answer for answer in answers if isinstance(answer, Reply))
        return answers

    collect(errand(), note)
    assert {(reply.verb, *reply.meta) for reply in replies if reply.client != "b"} == {
        (verb,) for verb in ("secagg.keys", "secagg.pairs", "secagg.shares", "train", "secagg.sign", "secagg.reveal")
    }
    narrow = [reply.tensors["narrow"] for reply in replies if reply.verb == "train"]
    assert all(not torch.equal(x, y) for i, x in enumerate(narrow) for y in narrow[:i])


def test_a_value_travels_in_four_bytes_and_a_little() -> None:
    """All that a client sends for a sum, as bytes of whole messages, over its values."""
    size, sent = 200_000, dict.fromkeys(NAMES, 0)
    leaves = (Leaf("w", (size,)), declare.number("weight"))
    own = {name: Update({"w": torch.full((size,), 0.5)}, 1.0, client=name, metrics={"weight": 1.0}) for name in NAMES}

    def weigh(exchange: str, answers: list[Answer]) -> list[Answer]:
        for answer in answers:
            sent[answer.client] += len(pack(answer))
        return answers

    asked = replace(errand(), leaves=leaves, own={})
    (total,) = SUMS.collect(halves(SUMS, own, leaves, weigh), asked, list(own), None, context({}, 3))
    assert isinstance(total, Partial) and max(sent.values()) <= 4.1 * size


def garbled(who: str, part: str) -> Any:
    def tamper(exchange: str, answers: list[Answer]) -> list[Answer]:
        for answer in answers:
            if exchange == "train" and isinstance(answer, Reply) and answer.client in who:
                answer.tensors[part][0] ^= 1
        return answers

    return tamper


def test_a_garbled_answer_is_its_senders_failure_and_the_others_are_summed() -> None:
    failure, total = collect(errand(), garbled("d", "narrow"))
    assert isinstance(failure, Failure) and failure.client == "d" and "garbled" in failure.reason
    assert isinstance(total, Partial) and total.clients == list("abcef")


def test_a_sum_that_is_not_what_was_meant_is_thrown_away_and_names_whose_answer_it_is() -> None:
    outcomes = collect(errand(), garbled("d", "inner"))
    assert len(outcomes) == 6 and all(isinstance(outcome, Failure) and "It is the answer of d." in outcome.reason for outcome in outcomes)


def test_too_many_dropouts_fail_all_and_say_so() -> None:
    outcomes = collect(errand(), silent("abcd"))
    assert {outcome.client for outcome in outcomes if isinstance(outcome, Failure)} == set(NAMES)
    assert any(isinstance(outcome, Failure) and "2 of 6 clients have sent their vector" in outcome.reason for outcome in outcomes)


def test_two_clients_are_refused() -> None:
    outcomes = collect(errand(), names="ab")
    assert (
        all(isinstance(outcome, Failure) and "sum of 2 clients is refused" in outcome.reason for outcome in outcomes) and len(outcomes) == 2
    )
    with pytest.raises(ConfigError, match="must be 3 or more"):
        SecureAggregation(min_clients=2)


def test_values_and_weights_beyond_what_was_agreed_are_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    total = total_of(collect(errand(), channel=replace(SUMS, reach=2.0, max_weight=1.0)))
    assert torch.allclose(total.mean()["w"], torch.tensor([(0.5 + 1.5 + 4 * 2.0) / 6, -1.0]), atol=1e-4) and total.weight == 6
    assert "4 values" in caplog.text and "6 owners" in caplog.text


def test_a_lot_that_is_withheld_begins_the_sum_anew_without_its_client() -> None:
    names = [f"{i:02}" for i in range(36)]
    outcomes = collect(errand(), silent(["07"], "secagg.lots"), names=names, channel=replace(SUMS, reach=64.0))
    failure, total = outcomes
    assert isinstance(failure, Failure) and failure.client == "07"
    assert isinstance(total, Partial) and total.clients == [name for name in names if name != "07"]


# --- what is used up -------------------------------------------------------------------------------------------------------


class Failing(SpentStore):
    """An account that cannot be written any more."""

    def add(self, client: ClientId, what: str, amount: float) -> None:
        raise RunError("the disk is full")


def test_no_vector_leaves_before_its_context_is_written() -> None:
    vaults = vaults_of()
    vaults["e"] = replace(vaults["e"], spent=Failing(None).of("e"))
    failure, total = collect(errand(), vaults=vaults)
    assert isinstance(failure, Failure) and failure.client == "e" and "the disk is full" in failure.reason
    assert isinstance(total, Partial) and "e" not in total.clients


def test_a_context_is_refused_a_second_time() -> None:
    """The same sum again, at a client whose scratch was put back to before its upload: a rolled back machine with an honest account."""
    vaults = vaults_of()
    requests: dict[str, Request] = {}
    scratch = {name: Scratch(vault) for name, vault in vaults.items()}
    own = updates()

    class Noted(WrappedSession):
        def send(self, asked: Mapping[ClientId, Request], deadline: float | None = None) -> None:
            requests.update({request.verb: request for client, request in asked.items() if client == "a"})
            self.inner.send(asked, deadline)

    session = Noted(halves(SUMS, own, LEAVES, vaults=vaults))
    list(SUMS.collect(session, errand(), list(own), None, context(errand().params, 3)))
    contexts = [name for name in vaults["a"].spent.names() if name.startswith("secagg/context/")]
    assert len(contexts) == 1
    # A client that draws its nonce anew never meets the old context; one whose memory is put back does.
    member_of = scratch["a"]
    SUMS.answer("a", Request.of("secagg.keys", 3), member_of)
    member_of["member"].context = bytes.fromhex(contexts[0].rpartition("/")[2])  # type: ignore[attr-defined]
    with pytest.raises(MessageError, match="no client uses a mask twice"):
        SUMS._spend(member_of["member"], vaults["a"])  # type: ignore[arg-type]
    # After a restart the account says so too.
    vaults["a"].memory.clear()
    with pytest.raises(MessageError, match="no client uses a mask twice"):
        SUMS._spend(member_of["member"], vaults["a"])  # type: ignore[arg-type]
    # And a client that was started anew knows nothing of a sum that it was in.
    with pytest.raises(MessageError, match="knows nothing of"):
        SUMS.seal(own["a"], LEAVES, requests["train"], Scratch(vaults["a"]))


def test_the_same_errand_again_has_another_context() -> None:
    vaults = vaults_of()
    for _ in range(2):
        assert total_of(collect(errand(), vaults=vaults)).num_clients == 6
    contexts = [name for name in vaults["a"].spent.names() if name.startswith("secagg/context/")]
    assert len(set(contexts)) == 2


def test_sums_at_one_model_that_differ_by_too_few_are_refused() -> None:
    vaults = vaults_of()
    assert total_of(collect(errand(), vaults=vaults)).num_clients == 6
    again = collect(errand(round=4, attempt=1), silent("c"), vaults)
    assert all(isinstance(outcome, Failure) for outcome in again) and len(again) == 6
    assert any("would show a sum of 1, and 3 is the fewest" in outcome.reason for outcome in again if isinstance(outcome, Failure))
    # Also after a restart of the houses, and also where the first sum was the smaller one.
    for vault in vaults.values():
        vault.memory.clear()
    assert not [outcome for outcome in collect(errand(), silent("ab"), vaults) if isinstance(outcome, Partial)]
    # Another model, the same members, or members that differ by enough.
    assert total_of(collect(errand(w=1.0), silent("c"), vaults)).num_clients == 5
    assert total_of(collect(errand(), vaults=vaults)).num_clients == 6
    assert total_of(collect(errand(), vaults={name: vaults[name] for name in "abc"}, names="abc")).num_clients == 3


def test_several_sums_at_one_model_show_no_sum_of_few_together() -> None:
    """Any two of these sets differ by many; the sums over all three would show that of two clients."""
    names = "abcdefghijkl"
    vaults = vaults_of(names)
    wide = replace(SUMS, reach=16.0)

    def over(some: str) -> int:
        return sum(o.num_clients for o in collect(errand(), names=some, vaults=vaults, channel=wide) if isinstance(o, Partial))

    assert over(names) == 12 and over("abcdef") == 6
    # The two refuse before their vectors leave; of the others each knows no more than one sum that it was in.
    outcomes = collect(errand(), names="efghij", vaults=vaults, channel=wide)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert {failure.client for failure in refused} == {"e", "f"} and all("would show a sum of 2" in failure.reason for failure in refused)
    assert total_of(outcomes).clients == list("ghij")


def test_counts_are_kept_apart_within_a_run_and_not_between_runs() -> None:
    vaults = vaults_of()
    counting = replace(errand(), body=Body("describe", 0), params={})
    assert total_of(collect(counting, vaults=vaults)).num_clients == 6
    assert not [outcome for outcome in collect(counting, silent("c", "secagg.keys"), vaults) if isinstance(outcome, Partial)]
    key = Key.root(1)
    other = {name: replace(vault, job=Vault.job_of(key), key=key, memory={}) for name, vault in vaults.items()}
    session = halves(SUMS, updates(), LEAVES, silent("c", "secagg.keys"), other)
    outcomes = list(SUMS.collect(session, counting, list(NAMES), None, replace(context({}, 0), key=key)))
    assert total_of(outcomes).num_clients == 5


def test_another_model_for_some_is_refused_before_anything_leaves() -> None:
    class Lying(WrappedSession):
        def send(self, asked: Mapping[ClientId, Request], deadline: float | None = None) -> None:
            other = Body("train", 3, {"w": torch.ones(2)})
            self.inner.send({c: replace(r, body=other) if r.verb == "train" and c in "ab" else r for c, r in asked.items()}, deadline)

    own = updates()
    outcomes = list(SUMS.collect(Lying(halves(SUMS, own, LEAVES)), errand(), list(own), None, context({}, 3)))
    lied = [outcome for outcome in outcomes if isinstance(outcome, Failure) and outcome.client in "ab"]
    assert len(lied) == 2 and all("another model" in failure.reason for failure in lied)


def test_a_quantiser_that_is_not_the_clients_own_is_refused() -> None:
    own = updates()
    others = halves(SUMS, own, LEAVES)
    outcomes = list(replace(SUMS, reach=1e-6).collect(others, errand(), list(own), None, context({}, 3)))
    assert len(outcomes) == 6 and all(isinstance(outcome, Failure) and "quantiser" in outcome.reason for outcome in outcomes)


def test_keys_of_others_are_kept_and_no_other_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    assert Peers(path).known("bob", bytes(32)) and Peers(path).known("bob", bytes(32)) and not Peers(path).known("bob", b"x" * 32)
    # Two runs of one owner at a time do not forget each other's.
    one, other = Peers(path), Peers(path)
    assert one.known("dora", b"d" * 32) and other.known("emil", b"e" * 32) and not Peers(path).known("dora", b"x" * 32)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "strict": True}))
    assert Peers(path).known("bob", bytes(32)) and not Peers(path).known("carol", bytes(32))
    path.write_text("[]")
    with pytest.raises(RunError, match="keys of the other members"):
        Peers(path)


def test_a_client_that_is_known_by_another_key_ends_the_sum() -> None:
    vaults = vaults_of()
    peers = Peers()
    assert peers.known("c", b"x" * 32)
    outcomes = collect(errand(), vaults={name: replace(vault, known=peers.known) for name, vault in vaults.items()})
    assert all(isinstance(outcome, Failure) and "'c' is not known here" in outcome.reason for outcome in outcomes if outcome.client != "c")  # type: ignore[union-attr]


# --- rounds ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("secure")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(folder / "cache"))
        yield tiny.federation(folder, owners="abcdef", rows=60, rounds=3, channel=SecureAggregation())


def test_a_run_in_secret_is_the_run_in_the_open_but_for_rounding(plan: Federation, tmp_path: Path) -> None:
    *_, (secret, record) = run(plan, out=tmp_path / "secret")
    *_, (open_, in_the_open) = run(replace(plan, channel=Plain()), out=tmp_path / "open")
    for name, leaf in open_.params.items():
        assert torch.allclose(secret.params[name], leaf, atol=1e-4), name
    assert not record.clients and in_the_open.clients and record.metrics["num_clients"] == 6 and not record.failures
    assert record.metrics["weight"] == in_the_open.metrics["weight"]
    assert abs(record.metrics["train_loss"] - in_the_open.metrics["train_loss"]) < 1e-4
    ours, theirs = record.metrics["eval"], in_the_open.metrics["eval"]
    assert not ours["owners"] and abs(ours["pooled"]["loss"] - theirs["pooled"]["loss"]) < 1e-4
    for owner in "abcdef":
        spent = [json.loads(line)["what"] for line in (home(tmp_path / "secret", owner) / "spent.jsonl").read_text().splitlines()]
        assert (
            sum(what.startswith("secagg/context/") for what in spent)
            == len({what for what in spent if what.startswith("secagg/context/")})
            > 6
        )


def test_a_resumed_run_ends_with_the_same_bits(plan: Federation, tmp_path: Path) -> None:
    *_, (whole, _) = run(plan, out=tmp_path / "whole")
    *_, (_, _) = run(plan, 1, out=tmp_path / "parts")
    *_, (parts, _) = resume(tmp_path / "parts", 3)
    assert same(whole.params, parts.params)


def test_counts_stay_at_home(plan: Federation) -> None:
    simulation = Simulation.build(plan)
    with simulation.open() as session:
        roster = Describe().roster(plan.channel, session, simulation.clients, (), simulation.key)
        report = Evaluation().report(plan, start(plan, simulation.house.start), session, simulation.clients, simulation.key)
    assert not roster.holdings and roster.totals.train == sum(len(simulation.house.shard(client).train) for client in "abcdef")
    assert report["pooled"]["loss"] > 0 and not report["owners"]


class Deaf(WrappedSession):
    """One client's answers to a verb are lost."""

    def __init__(self, inner: Session, client: ClientId, verb: str) -> None:
        super().__init__(inner)
        self.client, self.verb = client, verb

    def receive(self) -> Answer | None:
        answer = self.inner.receive()
        while isinstance(answer, Reply) and (answer.client, answer.verb) == (self.client, self.verb):
            answer = self.inner.receive()
        return answer


def test_a_round_goes_on_without_a_client_whose_answer_is_lost(plan: Federation) -> None:
    simulation = Simulation.build(plan)
    with simulation.open() as session:
        state, record = play(plan, start(plan, simulation.house.start), Deaf(session, "c", "train"), simulation.clients, simulation.key)
    assert [failure.client for failure in record.failures] == ["c"] and record.metrics["num_clients"] == 5 and state.round == 1


# --- the plan --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watching(Observer):
    """Looks at each client's update."""

    def traits(self):  # type: ignore[no-untyped-def]
        return traits(needs=["single-updates"])

    def open(self, folder: Path | None):  # type: ignore[no-untyped-def]
        raise NotImplementedError


SECRET = SecureAggregation()
REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"aggregator": CoordinateMedian()}, 6, "aggregator", "single-updates"),
    ({"aggregator": TrimmedMean(trim=1)}, 6, "aggregator", "shows sums alone"),
    ({"transforms": (TopK(fraction=0.5),)}, 6, "transforms.0", "cannot be decoded from a sum"),
    ({"transforms": (Int8(),)}, 6, "transforms.0", "cannot be decoded from a sum"),
    ({"observers": (Watching(),)}, 6, "observers.0", "single-updates, which SecureAggregation"),
    ({"on_failure": "retry"}, 6, "on_failure", "few clients once more"),
    ({}, 2, "channel", "4 clients or more, and 2 would be asked to train"),
    ({"channel": replace(SECRET, min_clients=3)}, 2, "channel", "3 clients or more, and 2"),
    ({"sampler": Uniform(3)}, 10, "channel", "and 3 would be asked to train"),
    ({"evaluate": Evaluate(owners=2)}, 10, "channel", "2 would be asked to evaluate"),
    ({"channel": replace(SECRET, threshold=2)}, 10, "channel", "must be from 6 to 9"),
    ({"channel": replace(SECRET, threshold=20)}, 40, "channel", "is computed"),
    ({"channel": replace(SECRET, corrupt=0.45, dropout=0.45)}, 40, "channel", "no graph of 40 clients"),
]


@pytest.mark.parametrize(("changes", "num_clients", "where", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_plan_that_secure_sums_cannot_keep_is_refused(
    plan: Federation, changes: dict[str, Any], num_clients: int, where: str, words: str
) -> None:
    findings = check(replace(plan, **changes), num_clients)
    assert [f for f in findings if f.level == "refusal" and f.where == where and words in f.text], findings
    assert not [f for f in check(plan, 6) if f.level == "refusal"]


WARNED: list[tuple[dict[str, Any], str, str]] = [
    ({"channel": replace(SECRET, min_clients=3)}, "channel", "two of them who compare notes"),
    ({"tuning": Full()}, "tuning", "rows show which tokens"),
    ({"on_failure": "stop"}, "on_failure", "could do without"),
    ({"tuning": Full()}, "channel", "one owner alone has changed"),
    ({"sampler": Poisson(0.9)}, "channel", "by chance have fewer than 4"),
]


@pytest.mark.parametrize(("changes", "where", "words"), WARNED, ids=lambda value: str(value)[:40])
def test_a_plan_that_secure_sums_do_not_make_safe_is_warned_of(plan: Federation, changes: dict[str, Any], where: str, words: str) -> None:
    assert [f for f in check(replace(plan, **changes), 6) if f.level == "warning" and f.where == where and words in f.text]


def test_the_check_says_what_is_guaranteed_and_with_which_numbers(plan: Federation) -> None:
    promises = " ".join(f.text for f in check(plan, 100) if f.level == "promise")
    assert "sums of 4 or more owners" in promises and "no differential privacy" in promises
    assert "31 neighbours each, threshold 21; holds against 10 colluding with the server, and 10 dropouts" in promises
    assert not [f for f in check(replace(plan, transforms=(ClipByNorm(max_norm=1.0),), aggregator=Mean()), 6) if f.level == "refusal"]


@pytest.mark.parametrize(("name", "num_clients"), [("private-quickstart", 6), ("private-medquad", 7)])
def test_the_private_recipes_promise_secure_sums_and_rows_that_are_hidden(name: str, num_clients: int) -> None:
    pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
    findings = check(read(RECIPES / f"{name}.yaml").resolved(), num_clients)
    promises = " ".join(f.text for f in findings if f.level == "promise")
    assert not [f for f in findings if f.level == "refusal"]
    assert any(f.level == "warning" and "sums over owners tell the loss" in f.text for f in findings)
    assert "the server learns sums of 4 or more owners" in promises and "for one row of an owner's training data" in promises


@dataclass(frozen=True)
class Buffered(Part):
    """A pacing that does not wait for all."""

    room = "pacing"

    def traits(self):  # type: ignore[no-untyped-def]
        return traits(hides=["barrier"])


def test_a_pacing_without_a_barrier_is_refused(plan: Federation) -> None:
    findings = check(replace(plan, pacing=Buffered()), 6)  # type: ignore[arg-type]
    assert [f for f in findings if f.level == "refusal" and f.where == "channel" and "barrier" in f.text]


def test_the_package_that_is_missing_is_named(plan: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *more: Any, **kwargs: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return whole(name, *more, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"Secure aggregation needs the package 'cryptography'.*fedfm\[privacy\]"):
        check(plan, 6)


# --- what is told instead --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(plan: Federation, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A run in secret, and the evaluation of the same rounds in the open."""
    folder = tmp_path_factory.mktemp("told")
    *_, (_, secret) = run(plan, out=folder / "secret")
    *_, (_, in_the_open) = run(replace(plan, channel=Plain()), out=folder / "open")
    return folder / "secret", secret, in_the_open


def test_mean_spread_and_counts_of_owners_come_from_secure_sums(ran: tuple[Path, Any, Any]) -> None:
    folder, secret, in_the_open = ran
    ours, theirs = secret.metrics["eval"], in_the_open.metrics["eval"]
    losses = [metrics["loss"] for metrics in theirs["owners"].values()]
    assert abs(ours["mean"] - theirs["mean"]) < 1e-4 and abs(ours["spread"] - theirs["spread"]) < 1e-3
    assert ours["sums"]["owners"] == ours["sums"]["compared"] == 6
    # Nine in ten of six owners are all of them: the bin's end is at most a quarter above the worst.
    assert max(losses) <= ours["sums"]["most_reach"] <= 1.25 * max(losses)
    before = json.loads((folder.parent / "open" / "metrics.jsonl").read_text().splitlines()[0])["metrics"]["eval"]["owners"]
    assert ours["sums"]["gained"] == sum(metrics["loss"] < before[owner]["loss"] for owner, metrics in theirs["owners"].items())
    assert "worst" not in ours and "stay at home" in ours["missing"]


def test_the_report_says_what_is_missing_and_why(ran: tuple[Path, Any, Any]) -> None:
    folder, _, _ = ran
    page = (folder / "report.html").read_text()
    assert (
        "Of 6 owners nine in ten reach a loss of" in page
        and "because the channel shows sums alone" in page
        and "Owner by owner" not in page
    )
    ledger = json.loads((folder / "ledger.json").read_text())
    theirs = json.loads((folder.parent / "open" / "ledger.json").read_text())
    assert {name: ledger[name] for name in ("client_rounds", "steps", "examples", "tokens")} == {
        name: theirs[name] for name in ("client_rounds", "steps", "examples", "tokens")
    }
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))["answered"] == "6"


def test_a_comparison_counts_owners_and_names_none(plan: Federation, ran: tuple[Path, Any, Any]) -> None:
    from fedfm.reports import comparison_lines
    from fedfm.run.compare import compare

    table = compare(plan, ran[0])
    assert not table.owners and table.sums["owners"] == 6 and table.sums["gain"] + table.sums["lose"] <= 6
    text = "\n".join(comparison_lines(table.to_json()))
    assert "of 6 owners gain by federating" in text and "because the channel shows sums alone" in text
    assert table.pooled["federated"] and "of 6 owners gain by federating" in (ran[0] / "report.html").read_text()


@pytest.mark.parametrize("metric", [Metric("loss"), Metric("accuracy", False)], ids=["loss", "accuracy"])
def test_the_worst_tenth_is_found_to_within_a_bin(metric: Metric) -> None:
    values = [0.02 + i / 41 for i in range(40)]
    sums: dict[str, torch.Tensor] = {}
    for value in [*values, None]:
        for name, item in owners.told(metric, value, None).items():
            sums[name] = sums.get(name, torch.zeros_like(item)) + item
    report = owners.report(metric, sums)
    tenth = sorted(values, reverse=not metric.lower_is_better)[35]
    reached = report["sums"]["most_reach"]
    assert report["sums"]["owners"] == 40 and report["sums"]["compared"] == 0
    assert (tenth <= reached <= 1.25 * tenth) if metric.lower_is_better else (tenth - 1 / 40 <= reached <= tenth)


@pytest.mark.slow
def test_processes_sum_in_secret_and_know_each_other_by_what_is_relayed(plan: Federation, tmp_path: Path) -> None:
    *_, (expected, _) = run(plan, 1, out=tmp_path / "embedded")
    *_, (state, record) = run(replace(plan, engine=Process(device="cpu")), 1, out=tmp_path / "process")
    assert same(state.params, expected.params) and not record.clients and record.metrics["num_clients"] == 6

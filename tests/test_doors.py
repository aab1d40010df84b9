"""Each door is real: a small part of another package goes through run, resume, evaluate and export, banked and in processes."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import parts
import pytest
import torch
from parts import AdaptiveClip, Count, Masks, Metered, Pairs, Personal, Private, Ranks, Scalars, ScalarsServer

import fedfm
from fedfm.aggregators import Mean, TrimmedMean
from fedfm.client.house import House
from fedfm.client.memory import home
from fedfm.client.policy import KINDS, Policy
from fedfm.client.runtime import Runtime
from fedfm.client.spent import SpentStore
from fedfm.client.verb import verbs
from fedfm.core import registry
from fedfm.core.check import check, require
from fedfm.core.clock import Virtual
from fedfm.core.errors import PlanError, RoundError
from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.round import RoundRecord, ServerState, play, start
from fedfm.core.tree import Tree
from fedfm.data import Data
from fedfm.engines import Embedded, Process
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.observers.base import Watcher
from fedfm.run.folder import latest_state, read_lines
from fedfm.run.loop import resume, run
from fedfm.run.result import Result
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing import check_part, check_verb
from fedfm.testing.tiny import TEXT, spec
from fedfm.transforms import Int8
from fedfm.tuning import LoRA
from fedfm.verbs import Describe, Evaluation

OWNERS = ("ann", "bob", "cid")
NAMES = {
    "tuning": (Personal, Ranks),
    "channels": (Masks,),
    "transforms": (AdaptiveClip, Metered, Private),
    "local": (Scalars,),
    "server": (ScalarsServer,),
    "tasks": (Pairs,),
    "verbs": (Count,),
}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The test parts as an installed package: what a distribution says of itself, on the path of this process and of its clients'."""
    site = tmp_path_factory.mktemp("site")
    info = site / "doors-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: doors\nVersion: 1.0\n")
    points = [f"{room}.{part.__name__} = parts" for room, own in NAMES.items() for part in own]
    info.joinpath("entry_points.txt").write_text("\n".join(["[fedfm.parts]", *points]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(Path(parts.__file__).parent), os.environ.get("PYTHONPATH", "")]))
        forget()
        yield
    forget()


def forget() -> None:
    """The index is read once in a process."""
    registry.entries.cache_clear()
    verbs.cache_clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Three unequal owners and a model of one layer, which ends after three rounds."""
    source = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"owner": OWNERS[i % 3 if i < 24 else i % 2], "text": text, "worse": "a a a"} for i, text in enumerate(TEXT[:40])]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Federation(
        model=spec("Llama", num_hidden_layers=1),
        data=Data(str(source), by="owner", test_fraction=0.3),
        task=CausalLM(max_length=16, packed=False),
        tuning=LoRA(r=2),
        local=SGD(lr=0.1, steps=2, batch_size=2),
        engine=Embedded(bank=3, device="cpu"),
        rounds=3,
        min_clients=3,
    )


@pytest.fixture(scope="module")
def pair(base: Federation) -> Federation:
    """The base federation with two of its owners, because a process takes seconds to start."""
    rows = Path(base.data.source)
    two = rows.with_name("pair.jsonl")
    two.write_text("".join(line for line in rows.read_text().splitlines(keepends=True) if '"cid"' not in line))
    return replace(base, data=replace(base.data, source=str(two)), min_clients=2, rounds=2)


MASKS = Masks()
PERSONAL = Personal(LoRA(r=2), ("*lora_B*",))
DOORS: dict[str, dict[str, Any]] = {
    "scalars": {"local": Scalars(), "server": ScalarsServer(seed=5)},
    "a leaf at home": {"tuning": PERSONAL},
    "two ranks": {"tuning": Ranks(LoRA(r=4), (("ann", 1), ("bob", 2)))},
    "masks": {"channel": MASKS},
    "adaptive clip": {"transforms": (AdaptiveClip(),)},
    "adaptive clip under masks": {"transforms": (AdaptiveClip(),), "channel": MASKS},
    "pairs": {"task": Pairs(better="text", worse="worse", max_length=24), "model": spec("Bert", num_hidden_layers=1)},
    "metered": {"transforms": (Metered(),)},
}
door = pytest.mark.parametrize("name", DOORS)


def with_bank(plan: Federation, bank: int) -> Federation:
    return replace(plan, engine=Embedded(bank=bank, device="cpu"))


def last(rounds: Iterator[tuple[ServerState, RoundRecord]]) -> ServerState:
    *_, (state, _) = rounds
    return state


def stop_after(round: int, rounds: Iterator[tuple[ServerState, RoundRecord]]) -> None:
    assert any(state.round == round for state, _ in rounds)
    rounds.close()  # type: ignore[attr-defined]


def flat(state: ServerState) -> dict[str, torch.Tensor]:
    """All that a state holds."""
    return {**state.params, **{f"{place}/{name}": leaf for place, tree in state.parts.items() for name, leaf in tree.items()}}


def require_same(x: ServerState, y: ServerState) -> None:
    mine, theirs = flat(x), flat(y)
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert x.counted == y.counted and x.round == y.round


def metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics without seconds."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_lines(folder / "metrics.jsonl")]


@door
def test_a_door_goes_through_run_resume_evaluate_and_export(base: Federation, name: str, tmp_path: Path) -> None:
    plan = replace(base, **DOORS[name])
    unbroken = last(run(plan, out=tmp_path / "unbroken"))
    # Each part of the run keeps nothing but what is in the folder.
    stop_after(1, run(plan, out=tmp_path / "broken"))
    stop_after(2, resume(tmp_path / "broken"))
    resumed = last(resume(tmp_path / "broken"))
    require_same(unbroken, resumed)
    assert metrics(tmp_path / "unbroken") == metrics(tmp_path / "broken")
    losses = [line["metrics"]["eval"]["pooled"]["loss"] for line in metrics(tmp_path / "broken")]
    assert len(losses) == 4 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    Result.open(tmp_path / "broken").export(tmp_path / "adapter")
    Result.open(tmp_path / "broken").export(tmp_path / "merged", merge=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() and (tmp_path / "merged" / "config.json").exists()


@door
def test_a_bank_gives_the_numbers_of_one_by_one(base: Federation, name: str) -> None:
    plan = replace(base, **DOORS[name], rounds=2)
    alone, banked = (last(run(with_bank(plan, bank))) for bank in (1, 3))
    mine, theirs = flat(banked), flat(alone)
    assert list(mine) == list(theirs) and banked.counted == alone.counted
    for leaf in mine:
        assert torch.allclose(mine[leaf], theirs[leaf], rtol=1e-3, atol=1e-6), leaf


TOGETHER: dict[str, dict[str, Any]] = {
    "a leaf at home, clipped, metered, summed under masks": {
        "tuning": PERSONAL,
        "transforms": (Metered(), AdaptiveClip()),
        "channel": MASKS,
    },
    "pairs answered with scalars": {**DOORS["pairs"], **DOORS["scalars"]},
    "two ranks": DOORS["two ranks"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_processes_give_the_bits_of_one_by_one(pair: Federation, name: str, tmp_path: Path) -> None:
    plan = replace(pair, **TOGETHER[name])
    alone = last(run(with_bank(plan, 1), out=tmp_path / "alone"))
    apart = last(run(replace(plan, engine=Process(device="cpu")), out=tmp_path / "apart"))
    require_same(alone, apart)
    # Evaluations share a batch in one process, so they agree to rounding.
    for mine, theirs in zip(metrics(tmp_path / "apart"), metrics(tmp_path / "alone"), strict=True):
        assert mine["metrics"]["eval"].pop("pooled")["loss"] == pytest.approx(theirs["metrics"]["eval"].pop("pooled")["loss"], rel=1e-5)
        assert mine["clients"] == theirs["clients"] and mine["bytes_up"] == theirs["bytes_up"]


# A payload of scalars


def test_scalars_rebuild_the_mean_of_the_clients_parameters(base: Federation) -> None:
    simulation = Simulation.build(replace(base, **DOORS["scalars"]))
    plan, spec = simulation.federation, simulation.house.tuned.spec
    state = start(plan, simulation.house.start)
    received = plan.server.broadcast(state.params, state.of("server"))
    with simulation.open() as session:
        after, record = play(plan, state, session, simulation.clients, simulation.key)
    jobs = [fedfm.client.bank.Job(client, simulation.house.shard(client).train) for client in simulation.clients]
    trained = simulation.house.bank.train({**state.params, **received}, jobs, 1)
    weights = torch.tensor([record.clients[own.client]["weight"] for own in trained])
    mean_d = (torch.stack([own.params_d for own in trained]) * weights[:, None]).sum(dim=0) / weights.sum()
    assert len(weights.unique()) > 1
    assert torch.allclose(spec.flatten(after.params), mean_d, atol=1e-6)
    # Three numbers a client, beside the numbers of any update.
    assert record.bytes_up < 3 * 400
    assert plan.local.leaves(spec, spec)[0].size == 3 < spec.size


def test_scalars_need_a_server_that_reads_them(base: Federation) -> None:
    with pytest.raises(PlanError, match="FedAvg needs deltas, which Scalars"):
        require(replace(base, local=Scalars()))
    require(replace(base, **DOORS["scalars"]))


# A leaf that stays at home


def test_each_owner_keeps_its_own_leaf_and_is_evaluated_with_it(base: Federation, tmp_path: Path) -> None:
    plan = replace(base, tuning=PERSONAL)
    state = last(run(plan, out=tmp_path / "run"))
    simulation = Simulation.build(plan, tmp_path / "run")
    house = simulation.house
    at_home = [name for name in house.start if "lora_B" in name]
    travelling = [name for name in house.start if name not in at_home]
    assert at_home and all(torch.equal(state.params[name], house.start[name]) for name in at_home)
    assert not any(torch.equal(state.params[name], house.start[name]) for name in travelling)
    kept = {client: house.memory.load(client, state.counted[client]) for client in OWNERS}
    own = {client: {**state.params, **{leaf: tree[f"home/{leaf}"] for leaf in at_home}} for client, tree in kept.items()}
    assert not any(torch.equal(own["ann"][leaf], own["bob"][leaf]) or not own["ann"][leaf].any() for leaf in at_home)
    with simulation.open() as session:
        report = Evaluation().report(plan, state, session, OWNERS, house.key)
    expected = {client: by_hand(house, client, params) for client, params in own.items()}
    assert {client: numbers["loss"] for client, numbers in report["owners"].items()} == pytest.approx(expected, rel=1e-5)
    # With anybody else's leaf the numbers are others.
    assert all(abs(by_hand(house, client, state.params) - loss) > 1e-4 for client, loss in expected.items())


def by_hand(house: House, client: str, params: Tree) -> float:
    """The mean loss of an owner's test examples, by the model that its parameters merge into."""
    model = house.plan.tuning.merge(house.foundation, params).eval()
    losses = []
    with torch.no_grad():
        test = house.shard(client).test
        for i in range(len(test)):
            ids = torch.from_numpy(test.ids(i).astype("int64"))[None]
            logits = model(input_ids=ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(losses).double().mean().item()


def test_an_owner_whose_leaf_is_gone_does_not_begin_anew(base: Federation, tmp_path: Path) -> None:
    plan = replace(base, tuning=PERSONAL)
    stop_after(2, run(plan, out=tmp_path))
    for path in home(tmp_path, "bob").glob("memory-*"):
        path.unlink()
    with pytest.raises(RoundError, match=r"bob: Client 'bob' no longer has what it remembered with ticket 2"):
        last(resume(tmp_path))


# Clients of two ranks


def test_a_client_holds_and_sends_its_own_rank_alone(base: Federation) -> None:
    plan = replace(base, **DOORS["two ranks"])
    simulation = Simulation.build(plan)
    state = start(plan, simulation.house.start)
    shapes: dict[str, set[tuple[int, ...]]] = {}

    def watch(answer: Reply | Failure) -> None:
        assert isinstance(answer, Reply), answer
        shapes[answer.client] = {tuple(leaf.shape) for leaf in answer.tensors.values()}

    with simulation.open() as session:
        after, _ = play(plan, state, session, simulation.clients, simulation.key, watch)
    assert {client: min(min(shape) for shape in own) for client, own in shapes.items()} == {"ann": 1, "bob": 2, "cid": 4}
    a = next(name for name in state.params if name.endswith("q_proj.lora_A.weight"))
    b = a.replace("lora_A", "lora_B")
    moved = (after.params[b] - state.params[b]).abs().sum(dim=0)
    assert (moved > 0).all() and after.params[a].shape == (4, 32)


# A channel with two exchanges that gives one sum


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_masks_show_a_sum_alone_and_it_is_the_plain_one(base: Federation, weights: Any, tmp_path: Path) -> None:
    states, lines = {}, {}
    for name, channel in (("plain", fedfm.channels.Plain()), ("masks", MASKS)):
        plan = replace(base, channel=channel, aggregator=Mean(weights=weights), rounds=2)
        states[name] = last(run(plan, out=tmp_path / name))
        lines[name] = metrics(tmp_path / name)
    for leaf, value in states["plain"].params.items():
        assert torch.allclose(states["masks"].params[leaf], value, atol=1e-7), leaf
    for plain, masked in zip(lines["plain"], lines["masks"], strict=True):
        assert masked["clients"] == {} and masked["metrics"]["eval"]["owners"] == {} and not masked["failures"]
        assert masked["metrics"]["eval"]["pooled"] == pytest.approx(plain["metrics"]["eval"]["pooled"], rel=1e-5)
        if plain["round"]:
            # A channel that shows each client weights the losses by examples even where the clients count alike.
            for what in ("weight", "num_clients", "update_norm", *(["train_loss"] if weights == "examples" else [])):
                assert masked["metrics"][what] == pytest.approx(plain["metrics"][what], rel=1e-5), what
    for name, shown in (("plain", True), ("masks", False)):
        rows = json.loads((tmp_path / name / "split.json").read_text())
        assert [row["owner"] for row in rows] == list(OWNERS)
        assert all((row["train"] is not None) == shown for row in rows)
    notes = {name: next(line for line in read_lines(tmp_path / name / "journal.jsonl") if line["event"] == "roster") for name in states}
    assert notes["plain"]["totals"] == notes["masks"]["totals"] and notes["masks"]["totals"]["train"] > 20


def test_what_the_server_sees_of_a_masked_client_is_a_ring_of_integers_that_never_repeats(base: Federation) -> None:
    plan = replace(base, channel=MASKS)
    simulation, seen = Simulation.build(plan), []
    state = start(plan, simulation.house.start)
    with simulation.open() as session:
        for _ in range(2):
            play(plan, state, session, simulation.clients, simulation.key, lambda answer: seen.append(answer))
    rings = [answer.tensors[parts.RING] for answer in seen if parts.RING in answer.tensors]
    assert len(rings) == 6 and all(set(answer.meta) <= {"public", "ticket"} for answer in seen)
    # The same round twice: the same answers, and no mask twice. High bits of a ring are as good as random.
    assert all((x != y).float().mean() > 0.99 for i, x in enumerate(rings) for y in rings[:i])
    assert all(((ring >> 62) & 1).double().mean().item() == pytest.approx(0.5, abs=0.1) for ring in rings)
    assert torch.allclose(sum(rings[:3]).double(), sum(rings[3:]).double())


# A transform with state on the server


def test_the_clip_adapts_to_the_clients_norms(base: Federation, tmp_path: Path) -> None:
    norms = []
    for channel in (fedfm.channels.Plain(), MASKS):
        plan = replace(base, channel=channel, transforms=(AdaptiveClip(norm=1e-3, lr=0.5),), rounds=3)
        norms.append([state.of("transforms.0")["norm"].item() for state, _ in run(plan)])
    # Nobody is below a norm that small, so it grows by exp(lr / 2) each round.
    assert norms[0] == pytest.approx([1e-3 * math.exp(0.25 * round) for round in range(4)])
    assert norms[0] == norms[1]


# What is spent for good


class Crash(Watcher):
    """Breaks the server in the middle of a round, when an update has arrived."""

    def __init__(self, round: int) -> None:
        self.at = round

    def answer(self, round: int, answer: Reply | Failure) -> None:
        if round == self.at:
            raise KeyboardInterrupt


def test_what_was_spent_in_a_round_that_never_counted_stays_spent(base: Federation, tmp_path: Path) -> None:
    plan = with_bank(replace(base, transforms=(Metered(limit=4),)), 3)
    with pytest.raises(KeyboardInterrupt):
        last(run(plan, out=tmp_path, watchers=[Crash(2)]))
    assert latest_state(tmp_path).round == 1
    store = SpentStore(tmp_path)
    spent = {client: store.of(client).total("updates") for client in OWNERS}
    assert max(spent.values()) == 2
    state = last(resume(tmp_path))
    after = {client: SpentStore(tmp_path).of(client).total("updates") for client in OWNERS}
    assert state.round == 3 and after == {client: spent[client] + 2 for client in OWNERS}
    first = max(after, key=lambda client: after[client])
    with pytest.raises(RoundError, match=f"{first}: its owner gives 4 updates, and all of them are spent"):
        last(resume(tmp_path, rounds=5))


# A verb of another package


@pytest.mark.parametrize("channel", [fedfm.channels.Plain(), MASKS], ids=repr)
def test_a_verb_of_another_package_is_asked_through_the_channel(base: Federation, channel: Any) -> None:
    simulation = Simulation.build(replace(base, channel=channel))
    house = simulation.house
    lengths = torch.cat([torch.tensor(house.shard(client).train.lengths) for client in OWNERS])
    with simulation.open() as session:
        for more_than in (0, 9, 10**6):
            total = Count().total(channel, session, OWNERS, more_than, house.key)
            assert total == (lengths > more_than).sum().item()


@pytest.mark.slow
def test_a_verb_of_another_package_is_asked_in_processes(pair: Federation) -> None:
    simulation = Simulation.build(replace(pair, channel=MASKS, engine=Process(device="cpu")))
    with simulation.open() as session:
        total = Count().total(MASKS, session, simulation.clients, 9, simulation.key)
    assert total == sum(int((simulation.house.shard(client).train.lengths > 9).sum()) for client in simulation.clients)


def test_a_verb_of_another_package_conforms(base: Federation) -> None:
    check_verb(Count(), Simulation.build(base).house, Count().errand(9))


# What cannot mean what it says


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregator": TrimmedMean(trim=1)}, "TrimmedMean needs"),
        ({"transforms": (Int8(),)}, "Int8 cannot be decoded from a sum"),
        ({"channel": fedfm.channels.Plain(), "transforms": (Private(),)}, "of the group told leave uncovered"),
    ],
)
def test_refusals(base: Federation, changes: dict[str, Any], words: str) -> None:
    plan = replace(base, **{"channel": MASKS, **changes})
    assert any(words in finding.text for finding in check(plan) if finding.level == "refusal")
    with pytest.raises(PlanError):
        next(run(plan))


def test_an_owner_may_withhold_what_the_round_does_not_need(base: Federation) -> None:
    policies = {"bob": Policy.open(may_leave=tuple(set(KINDS) - {"counts"}))}
    for weights in ("examples", "uniform"):
        plan = replace(base, aggregator=Mean(weights=weights))  # type: ignore[arg-type]
        simulation = Simulation.build(plan, policies=policies)
        with simulation.open() as session:
            roster = Describe().roster(plan.channel, session, simulation.clients, simulation.house.labels, simulation.key)
            assert roster.holdings["bob"].train is None and roster.holdings["ann"].train and roster.totals.train is None
            refusals = [finding for finding in check(plan, 3, roster) if finding.level == "refusal"]
            assert [finding.where for finding in refusals] == (["aggregator"] if weights == "examples" else [])
            assert not refusals or "which bob withhold" in refusals[0].text
            state = start(plan, simulation.house.start)
            if weights == "examples":
                with pytest.raises(
                    RoundError, match=r"bob: its owner's policy refuses .rule 'may_leave'.: the answer to train tells its counts"
                ):
                    play(plan, state, session, simulation.clients, simulation.key)
            else:
                _, record = play(plan, state, session, simulation.clients, simulation.key)
                assert record.clients["bob"]["weight"] == 1 and record.clients["bob"]["examples"] == 0


# A clock that is moved


def test_a_virtual_clock_honours_deadlines_without_sleeping(base: Federation) -> None:
    clock = Virtual()
    plan = replace(with_bank(base, 1), deadline=10.0, min_clients=1)
    simulation = Simulation.build(plan)
    state = start(plan, simulation.house.start)
    with simulation.open(clock) as session:
        # Each answer takes six seconds: the third bank begins too late.
        _, record = play(plan, state, session, simulation.clients, simulation.key, lambda answer: clock.advance(6))
        assert [(failure.stage, failure.reason) for failure in record.failures] == [("deadline", "no answer after 10 s")]
        assert record.seconds == {"train": 18.0, "aggregate": 0.0} and record.metrics["num_clients"] == 2
        _, record = play(plan, state, session, simulation.clients, simulation.key)
        assert not record.failures and record.seconds == {"train": 0.0, "aggregate": 0.0}


# What a client does not believe


def wrong(params: Tree) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    return {
        "transposed": lambda leaf: leaf.T.contiguous(),
        "flat": lambda leaf: leaf.reshape(-1),
        "integers": lambda leaf: leaf.to(torch.int32),
        "booleans": lambda leaf: leaf.bool(),
        "halves": lambda leaf: leaf.half(),
        "doubles": lambda leaf: leaf.double(),
        "not finite": lambda leaf: torch.full_like(leaf, math.nan),
    }


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_client_refuses_parameters_that_are_not_its_models(base: Federation, verb: str) -> None:
    simulation = Simulation.build(base)
    house, runtime = simulation.house, Runtime(simulation.house)
    for name in list(house.start)[:2]:
        for what, change in wrong(house.start).items():
            params = {**house.start, name: change(house.start[name])}
            (answer,) = runtime.handle({"ann": Request.of(verb, 1, params, ticket=1)})
            assert isinstance(answer, Failure) and name in answer.reason, (what, answer)
    (answer,) = runtime.handle({"ann": Request.of(verb, 1, house.start, ticket=1)})
    assert isinstance(answer, Reply)


@pytest.mark.parametrize(
    "part", [MASKS, AdaptiveClip(), Metered(), Scalars(), ScalarsServer(), Pairs(), Count(), PERSONAL, Ranks(LoRA(r=2))], ids=repr
)
def test_each_is_a_part(part: Any) -> None:
    check_part(part)


def test_the_package_is_found(base: Federation) -> None:
    for room, own in NAMES.items():
        assert {part.__name__ for part in own} <= registry.entries(room).keys()
    assert "count" in verbs() and sys.modules["parts"] is parts

"""A liar with a long update or a large weight is named and never added; what bounds it is known before the round and survives a restart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from parts import Masks

from fedfm import notation
from fedfm.aggregators import CoordinateMedian, Mean
from fedfm.bounds import MedianBounds
from fedfm.core import leaves as declare
from fedfm.core.check import check
from fedfm.core.errors import ConfigError, MessageError
from fedfm.core.leaves import Leaf
from fedfm.core.limits import Limit, Limits, Size, norms_of
from fedfm.core.messages import Failure, Reply
from fedfm.core.parts import Bounds, ServerState, Session
from fedfm.core.round import RoundRecord, play, start
from fedfm.core.session import Answer, WrappedSession
from fedfm.data import Data
from fedfm.engines import Embedded, Nats
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.methods import Scaffold
from fedfm.models import Model
from fedfm.recipe import dump, load
from fedfm.run.folder import latest_state
from fedfm.run.loop import resume, run
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing import check_bounds, examples, tiny
from fedfm.testing.parts import same
from fedfm.transforms import CentralDP

PLAN = Federation(model=Model(source="none"), data=Data("none.jsonl"))
LIAR = "a"


@pytest.mark.parametrize("bounds", examples("bounds", {"MedianBounds": [MedianBounds(memory=1, norm_factor=None)]}), ids=repr)
def test_conformance(bounds: Bounds) -> None:
    check_bounds(bounds)


@dataclass(frozen=True)
class Hoarder(Bounds):
    """Keeps every norm."""

    def limits(self, state, uniform):
        return Limits(Limit(10.0, "ten"), weight=None if uniform else Limit(100.0, "a hundred"))

    def learn(self, state, sizes):
        norms = [size.norms["delta"] for size in sizes]
        return {"all": torch.cat([state.get("all", torch.zeros(0)), torch.tensor(sorted(norms))])} if norms else state


def test_the_suite_catches_what_grows() -> None:
    with pytest.raises(AssertionError, match="grows for ever"):
        check_bounds(Hoarder())


def test_fixed_at_first_then_a_multiple_of_the_median_of_earlier_rounds() -> None:
    bounds = MedianBounds(norm=50.0, weight=1000.0, norm_factor=4.0, weight_factor=3.0, memory=3)
    limits = bounds.limits({}, False)
    assert limits.norm.most == 50.0 and limits.weight is not None and limits.weight.most == 1000.0
    state = bounds.learn({}, [Size({"delta": norm}, weight) for norm, weight in ((1.0, 10.0), (2.0, 20.0), (40.0, 900.0), (3.0, 30.0))])
    limits = bounds.limits(state, False)
    # Of an even number the lower middle one, so that half of the clients lift nothing.
    assert limits.norms["delta"].most == 4 * 2.0 and limits.weight is not None and limits.weight.most == 3 * 20.0
    for norm in (4.0, 6.0, 5.0):
        state = bounds.learn(state, [Size({"delta": norm}, None)])
    assert state["norm.delta"].tolist() == [4.0, 6.0, 5.0] and state["weight"].tolist() == [20.0]
    assert bounds.limits(state, False).norms["delta"].most == 4 * 5.0
    assert bounds.limits(bounds.learn(state, [Size({"delta": 49.0}, None)] * 3), False).norms["delta"].most == 4 * 6.0
    assert MedianBounds(norm=7.0).limits(state, False).norms["delta"].most == 7.0, "a multiple loosens no fixed bound"


def test_a_round_of_zeros_is_no_measure() -> None:
    bounds = MedianBounds()
    assert bounds.learn({}, [Size({"delta": 0.0}, None)] * 3) == {}


def test_before_the_first_round_weights_are_measured_by_what_owners_say_they_have() -> None:
    state = MedianBounds(weight_factor=5.0).init([10, 12, 4000])
    weight = MedianBounds(weight_factor=5.0).limits(state, False).weight
    assert weight is not None and weight.most == 60.0 and "5 times 12" in weight.reason


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"norm": 0.0}, "norm is 0.0"),
        ({"norm": float("inf")}, "norm is inf"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"norm_factor": 1.0}, "norm_factor is 1.0"),
        ({"weight_factor": float("nan")}, "weight_factor is nan"),
        ({"memory": 0}, "memory is 0"),
    ],
)
def test_numbers_out_of_range(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MedianBounds(**wrong)  # type: ignore[arg-type]


def test_a_norm_is_of_each_group_in_float64_and_of_nothing_that_is_told() -> None:
    declared = (
        Leaf("w", (2,)),
        Leaf("v", (3,), torch.bfloat16),
        Leaf("c", (1,), torch.float64, "control"),
        Leaf("histogram", (2,), torch.float64, "told"),
        Leaf("index", (2,), torch.int64),
        declare.number("weight"),
    )
    tree = {
        "w": torch.tensor([3e20, 0.0]),
        "v": torch.tensor([4e20, 0, 0], dtype=torch.bfloat16),
        "c": torch.tensor([-2.0], dtype=torch.float64),
        "histogram": torch.full((2,), 1e9, dtype=torch.float64),
        "index": torch.tensor([5, 6]),
    }
    norms = norms_of(declared, tree)
    assert norms == {"delta": pytest.approx(5e20, rel=1e-2), "control": 2.0}
    long = torch.linspace(-1, 1, 200_001)
    assert norms_of((Leaf("w", (200_001,)),), {"w": long})["delta"] == pytest.approx(long.double().norm().item(), rel=1e-12)
    limits = Limits(Limit(3.0, "bounds.norm"), {"delta": Limit(1e21, "far")})
    limits.judge("x", norms, 1e300)
    with pytest.raises(MessageError, match=r"the norm of its control is 4, and the bound is 3 \(bounds.norm\)"):
        limits.judge("x", {"delta": 1.0, "control": 4.0}, 1.0)


# In a round


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setenv("FEDFM_CACHE", str(tmp_path / "cache"))
    rows = [{"owner": "abcd"[i % 4], "text": text} for i, text in enumerate(tiny.TEXT[:64])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Federation(
        tiny.spec("Llama"),
        Data(str(tmp_path / "rows.jsonl"), by="owner", test_fraction=0.2),
        task=CausalLM(max_length=16),
        local=SGD(lr=0.1, steps=1, batch_size=2),
        engine=Embedded(bank=1, device="cpu"),
        bounds=MedianBounds(norm_factor=5.0),
    )


class Lying(WrappedSession):
    """Multiplies what one client sends.

    Args:
        length: Factor of its tensors; ``None`` where it says nothing at all.
        weight: Factor of its weight.
    """

    def __init__(self, inner: Session, length: float | None = 1.0, weight: float = 1.0) -> None:
        super().__init__(inner)
        self.length, self.weight = length, weight

    def receive(self) -> Answer | None:
        answer = self.inner.receive()
        if not isinstance(answer, Reply) or answer.client != LIAR or answer.verb != "train":
            return answer
        if self.length is None:
            return Failure(LIAR, "bounds", "silent")
        weight = answer.meta["weight"]
        assert isinstance(weight, float)
        tensors = {name: leaf * self.length for name, leaf in answer.tensors.items()}
        return replace(answer, tensors=tensors, meta={**answer.meta, "weight": weight * self.weight})


def rounds(federation: Federation, lies: Iterable[Mapping[str, float | None]]) -> Iterator[tuple[ServerState, RoundRecord]]:
    simulation = Simulation.build(federation)
    plan, state = simulation.federation, start(simulation.federation, simulation.house.start)
    with simulation.open() as session:
        for lie in lies:
            state, record = play(plan, state, Lying(session, **lie), simulation.clients, simulation.key)  # type: ignore[arg-type]
            yield state, record


@pytest.mark.parametrize("aggregator", [Mean(), CoordinateMedian()], ids=repr)
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"length": 20.0}, "bounds.norm_factor: 5 times"),
        ({"length": 1e5}, "the norm of its delta is"),
        ({"weight": 1e4}, "bounds.weight_factor: 100 times"),
    ],
)
def test_a_liar_is_named_and_the_round_is_that_of_the_others(
    federation: Federation, lie: dict[str, float], words: str, aggregator: Mean | CoordinateMedian
) -> None:
    federation = replace(federation, aggregator=aggregator)
    (_, honest), (state, record) = rounds(federation, [{}, lie])
    assert not honest.failures
    if isinstance(aggregator, CoordinateMedian) and "weight" in lie:
        assert not record.failures, "a rule that weighs nobody needs no bound on weights"
        return
    (failure,) = record.failures
    assert (failure.client, failure.stage) == (LIAR, "bounds") and words in failure.reason
    assert LIAR not in record.clients
    _, (silent, _) = rounds(federation, [{}, {"length": None}])
    assert same(state.params, silent.params) and same(state.of("bounds"), silent.of("bounds"))


def test_in_the_first_round_the_fixed_norm_holds(federation: Federation) -> None:
    ((_, record),) = rounds(federation, [{"length": 1e6}])
    (failure,) = record.failures
    assert failure.client == LIAR and "and the bound is 1000 (bounds.norm)" in failure.reason


def test_without_bounds_the_liar_decides(federation: Federation) -> None:
    plan = replace(federation, bounds=None)
    (state, record), (honest, _) = (*rounds(plan, [{"length": 1e5}]), *rounds(plan, [{}]))
    assert not record.failures and "bounds" not in state.parts
    assert max((state.params[name] - honest.params[name]).abs().max().item() for name in state.params) > 1.0


def test_honest_clients_are_not_touched(federation: Federation) -> None:
    """Neither their weights nor their records change by being measured."""
    for plan in (federation, replace(federation, method=Scaffold())):
        bounded, free = list(rounds(plan, [{}] * 3)), list(rounds(replace(plan, bounds=None), [{}] * 3))
        for (state, record), (other, alone) in zip(bounded, free, strict=True):
            assert same(state.params, other.params) and replace(record, seconds={}) == replace(alone, seconds={})
        groups = {"norm.delta", "norm.control"} if plan.method else {"norm.delta", "weight"}
        assert set(bounded[-1][0].of("bounds")) == groups


def test_what_was_learned_is_saved_and_resumed(federation: Federation, tmp_path: Path) -> None:
    *_, (unbroken, _) = run(replace(federation, rounds=4), out=tmp_path / "unbroken")
    *_, (half, _) = run(replace(federation, rounds=2), out=tmp_path / "half")
    assert same(latest_state(tmp_path / "half").of("bounds"), half.of("bounds"))
    assert len(half.of("bounds")["norm.delta"]) == 2 and len(half.of("bounds")["weight"]) == 3, "the owners' own counts come first"
    *_, (resumed, _) = resume(tmp_path / "half", rounds=4)
    assert same(resumed.of("bounds"), unbroken.of("bounds")) and same(resumed.params, unbroken.params)


# In a plan


def test_on_by_default_where_clients_are_others() -> None:
    assert PLAN.bounding() is None and replace(PLAN, engine=Nats()).bounding() == MedianBounds()
    assert replace(PLAN, engine=Nats(), bounds=None).bounding() is None
    mine = MedianBounds(norm=3.0)
    assert replace(PLAN, bounds=mine).bounding() is mine
    with pytest.raises(ConfigError, match="bounds is 'some'"):
        replace(PLAN, bounds="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("auto", "auto"),
        ("null", None),
        ("MedianBounds", MedianBounds()),
        ("{MedianBounds: {norm: 5, norm_factor: null}}", MedianBounds(norm=5, norm_factor=None)),
    ],
)
def test_recipes_name_it(text: str, bounds: object) -> None:
    plan = load(f"{{model: gpt2, data: {{source: stdlib}}, bounds: {text}}}")
    assert plan.bounds == bounds and load(dump(plan)) == plan
    with pytest.raises(ConfigError, match="bounds is 'many'"):
        load("{model: gpt2, data: {source: stdlib}, bounds: many}")
    assert notation.write(plan.client_plan()).find("bounds") == -1, "a client has no use for it"


def findings(plan: Federation, where: str = "bounds") -> list[tuple[str, str]]:
    return [(finding.level, finding.text) for finding in check(plan) if finding.where == where]


def test_the_check_says_what_is_guaranteed() -> None:
    ((level, text),) = findings(replace(PLAN, engine=Nats()))
    assert level == "promise" and "10 times the median" in text and "weight above" in text and "fewer than half" in text
    ((_, text),) = findings(replace(PLAN, engine=Nats(), aggregator=CoordinateMedian()))
    assert "weight" not in text
    ((level, text),) = findings(replace(PLAN, engine=Nats(), bounds=None))
    assert level == "warning" and "one member decide" in text
    assert not findings(PLAN)


def test_under_sums_alone_the_check_says_whose_word_the_norm_is() -> None:
    ((level, text),) = findings(replace(PLAN, engine=Nats(), channel=Masks()))
    assert level == "note" and "the ring of the sum bounds each value" in text and "client's word" in text


def test_what_noise_does_not_cover_is_no_bound() -> None:
    """Medians of earlier rounds tell of every owner; the fixed bounds of one update tell of nobody else."""
    plan = replace(PLAN, engine=Nats(), transforms=(CentralDP(clip=0.5, delta=1e-5, noise_multiplier=1.0),))
    assert plan.bounding() == MedianBounds(norm_factor=None, weight_factor=None)
    assert not [level for level, _ in findings(plan) if level == "refusal"]
    refused = [text for level, text in findings(replace(plan, bounds=MedianBounds())) if level == "refusal"]
    assert len(refused) == 1 and "noise of CentralDP does not cover" in refused[0] and "bounds.norm_factor" in refused[0]

"""Clients that lie, each as a process that writes its lie to a real pipe: it is named, the others count, and the round ends in time.

What the honest ones answer was made once by an honest house. A round with a liar must end with the bits of the round in which the liar is silent.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness.ground import LIAR, OWNERS, Tally, small
from fedfm.aggregators import CoordinateMedian
from fedfm.core import tree
from fedfm.core.errors import DataError
from fedfm.core.messages import Failure, Message, Reply, Request, pack
from fedfm.core.parts import ClientId, ServerState
from fedfm.core.round import play, start
from fedfm.core.tree import Tree
from fedfm.engines import Process
from fedfm.engines.process import ProcessSession
from fedfm.federation import Federation
from fedfm.simulation import Simulation
from fedfm.transforms import Int8, TopK
from fedfm.verbs import Describe, Evaluation

PLANS: Mapping[str, dict[str, Any]] = {
    "Mean": {},
    "CoordinateMedian": {"aggregator": CoordinateMedian()},
    "Int8": {"transforms": (Int8(),)},
    "TopK": {"transforms": (TopK(fraction=0.5),)},
}
# Seconds that a client has to answer, and those that a round with a liar may take: starting four processes, the deadline, and some of ours.
DEADLINE, LIMIT = 8.0, 20.0
CLIENT = """
import json, os, signal, subprocess, sys, time
def receive():
    size = sys.stdin.buffer.read(8)
    if len(size) < 8:
        sys.exit(0)
    data = sys.stdin.buffer.read(int.from_bytes(size, "little"))
    return json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")])
def write(name):
    with open(os.path.join(folder, name), "rb") as file:
        sys.stdout.buffer.write(file.read())
    sys.stdout.buffer.flush()
folder = receive()["meta"]["answers"]
write("hello")
while True:
    verb = receive()["verb"]
    exec(open(os.path.join(folder, verb + ".py")).read())
    write(verb)
"""


@dataclass(frozen=True)
class Lie:
    """What a client says instead of its answer.

    Args:
        stream: All bytes that it writes.
        act: Python that it runs before it writes.
        is_heard: Whether the round may count what it says: it looks right, or its first answer was.
    """

    kind: str
    what: str
    stream: bytes = b""
    act: str = ""
    is_heard: bool = False


def frame(data: bytes) -> bytes:
    """As it goes through a pipe."""
    return len(data).to_bytes(8, "little") + data


def said(message: Message) -> bytes:
    """A message as a frame, whatever it holds."""
    return frame(pack(message))


def crafted(reply: Reply, index: Mapping[str, object] | None = None, body: bytes = b"", **head: object) -> bytes:
    """A frame of a reply whose header or index of tensors could not be packed."""
    told = {"v": 2, "kind": "reply", "verb": reply.verb, "round": reply.round, "client": reply.client, "meta": dict(reply.meta), **head}
    text = json.dumps(told).encode()
    names = json.dumps(index or {}).encode()
    return frame(struct.pack("<I", len(text)) + text + struct.pack("<Q", len(names)) + names + body)


# --- lies -----------------------------------------------------------------------------------------------------------


def lies(reply: Reply, is_plain: bool) -> Iterator[Lie]:
    """Every lie about one honest reply.

    Args:
        is_plain: Whether its tensors are deltas as they are, so that each wrong value is known to be wrong.
    """
    yield from _tensor_lies(reply, is_plain)
    yield from _number_lies(reply)
    if is_plain and reply.verb == "train":
        yield from _crafted_lies(reply)
        yield from _protocol_lies(reply)


def _tensor_lies(reply: Reply, is_plain: bool) -> Iterator[Lie]:
    def lie(kind: str, what: str, tensors: Tree, is_heard: bool = False) -> Lie:
        return Lie(kind, what, said(replace(reply, tensors=tensors)), is_heard=is_heard)

    yield lie("names", "one tensor too many", {**reply.tensors, "note": torch.ones(1)})
    for name, leaf in list(reply.tensors.items())[: 2 if is_plain else None]:
        rest = {other: value for other, value in reply.tensors.items() if other != name}
        yield lie("names", f"no {name}", rest)
        yield lie("names", f"{name} under another name", {**rest, name + "\x1b[2J": leaf})
        shapes = {
            "an axis more": leaf.unsqueeze(0),
            "a value more": torch.cat([leaf.reshape(-1), leaf.reshape(-1)[:1]]),
            "nothing": leaf.new_zeros(0),
        }
        if leaf.dim() == 2 and leaf.shape[0] != leaf.shape[1]:
            shapes["transposed"] = leaf.T.contiguous()
        for what, wrong in shapes.items():
            yield lie("shapes", f"{name}: {what}", {**rest, name: wrong})
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool):
            if dtype != leaf.dtype:
                yield lie("types", f"{name} as {dtype}", {**rest, name: leaf.to(dtype)})
        if leaf.is_floating_point():
            for value in (math.nan, math.inf, -math.inf, 1e38, -(2.0**31)):
                yield lie(
                    "values",
                    f"{name} of {value}",
                    {**rest, name: torch.full_like(leaf, value)},
                    is_heard=not is_plain and abs(value) < math.inf,
                )
        else:
            info = torch.iinfo(leaf.dtype)
            is_index = leaf.dtype in (torch.int32, torch.int64)
            for number in (0, info.max, info.min):
                yield lie(
                    "duplicates, indices", f"{name} of {number}", {**rest, name: torch.full_like(leaf, number)}, is_heard=not is_index
                )
            if is_index:
                yield lie("duplicates, indices", f"{name} falling", {**rest, name: leaf.flip(0)})


def _number_lies(reply: Reply) -> Iterator[Lie]:
    def lie(kind: str, what: str, **meta: Any) -> Lie:
        told = {name: value for name, value in {**reply.meta, **meta}.items() if value != "left out"}
        return Lie(kind, what, said(replace(reply, meta=told)))

    for name, value in reply.meta.items():
        if not isinstance(value, float):
            continue
        # A loss that is NaN is an honest evaluation of a model that diverged.
        odd = [True, None, "many", math.inf, -math.inf, 10**400, 1.8e308, 1e300]
        # An owner may withhold the loss of its training.
        odd += [] if name == "loss" and reply.verb == "train" else ["left out"]
        odd += [] if reply.verb != "train" else [math.nan]
        odd += [] if name == "loss" else [-1.0]
        for wrong in odd:
            yield lie("numbers", f"{name} of {wrong!r:.20}", **{name: wrong})
    yield lie("unknown numbers", "one", note=1.0)
    yield lie("unknown numbers", "10,000", **{f"note-{i}": 1.0 for i in range(10_000)})
    yield lie("unknown numbers", "a text with escapes", **{"\x1b[2J\nWARNING": "\x1b]0;owned\x07"})
    if reply.verb == "train":
        yield lie("numbers", "weight of 0", weight=0.0)
        for ticket in (-1, 0.5, True, "seven", 10**400):
            yield lie("tickets", f"{ticket!r:.20}", ticket=ticket)
        zero = {name: torch.zeros_like(leaf) for name, leaf in reply.tensors.items()}
        yield Lie("numbers", "a zero update of weight 1e300", said(replace(reply, tensors=zero, meta={**reply.meta, "weight": 1e300})))


def _crafted_lies(reply: Reply) -> Iterator[Lie]:
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    shapes: tuple[object, ...] = ([0, 2**63], [2**62, 4], [-1], [1] * 40, [True], ["2"], [10**400], {})
    for shape in shapes:
        yield Lie("claimed shapes", str(shape)[:20], crafted(reply, {"w": {**nothing, "shape": shape}}))
    for dtype in ("C64", "F8_E4M3", "U64", "pickle", 7):
        yield Lie("claimed types", str(dtype), crafted(reply, {"w": {**nothing, "dtype": dtype}}))
    for offsets in ([0, 2**62], [8, 0], [-4, 0], [4, 4], [0], "all"):
        yield Lie("claimed places", str(offsets), crafted(reply, {"w": {**nothing, "shape": [1], "data_offsets": offsets}}, bytes(4)))
    overlap = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    yield Lie("claimed places", "two tensors in one place", crafted(reply, {"a": overlap, "b": overlap}, bytes(8)))
    yield Lie("very many", "290,000 empty tensors", crafted(reply, {f"t{i}": nothing for i in range(290_000)}))
    yield Lie("very many", "150,000 tensors of one value", crafted(reply, _singles(150_000), bytes(600_000)))
    odd: dict[str, Any] = {"round": 10**12, "client": ["ann"], "meta": [], "v": 1, "kind": "pickle", "verb": None}
    for name, value in odd.items():
        yield Lie("header", f"{name} is {value!r}", crafted(reply, **{name: value}))
    yield Lie("header", "lists within lists", frame(struct.pack("<I", 200_000) + b"[" * 200_000))
    yield Lie("header", "half of a surrogate pair", crafted(reply, verb="\ud800"))


def _singles(count: int) -> dict[str, object]:
    return {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(count)}


def _protocol_lies(reply: Reply) -> Iterator[Lie]:
    honest = said(reply)
    for other in (OWNERS[1], "mallory", ""):
        yield Lie("another's name", other or "none", said(replace(reply, client=other)))
    yield Lie("out of turn", "another round", said(replace(reply, round=7)))
    yield Lie("out of turn", "another verb", said(replace(reply, verb="evaluate")))
    yield Lie("out of turn", "a request", said(Request.of("train", 1)))
    yield Lie("out of turn", "a second answer", honest + honest, is_heard=True)
    yield Lie("out of turn", "a thousand answers", honest + said(replace(reply, meta={})) * 1000, is_heard=True)
    reason = "\x1b[2J\x1b]0;owned\x07" + "WARNING: all is lost\n" * 40_000
    yield Lie("text in reasons", "escapes and 840 kB", said(Failure(LIAR, "\x1b[31mtrain" * 100, reason)))
    yield Lie("bytes", "no message", frame(b"hello"))
    yield Lie("bytes", "nothing", frame(b""))
    yield Lie("bytes", "a pickle", frame(b"cos\nsystem\n(S'true'\ntR."))
    yield Lie("bytes", "announced: 2^60", (1 << 60).to_bytes(8, "little"))
    yield Lie("bytes", "announced: one more than is allowed", ((64 << 20) + 1).to_bytes(8, "little"))
    yield Lie("bytes", "zeros", bytes(1 << 20))
    yield Lie("bytes", "half of an answer, then the end", honest[: len(honest) // 2], "write('train'); os._exit(0)")
    yield Lie("silence", "dies", b"", "os.kill(os.getpid(), signal.SIGKILL)")
    yield Lie("silence", "no answer", b"", "time.sleep(60)")
    yield Lie("silence", "closes its pipe", b"", "os.close(1); time.sleep(60)")
    yield Lie(
        "silence",
        "leaves a child that holds its pipe",
        b"",
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); os._exit(0)",
    )
    yield Lie("silence", "writes 20 MB to its log", b"", "sys.stderr.write('x' * (20 << 20)); os._exit(1)")


# --- rounds with a liar -----------------------------------------------------------------------------------------------


class Table:
    """Four owners at one plan, what each honestly answers, and rounds in which one of them lies."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / name, name
        self.folder.mkdir()
        (self.folder / "client.py").write_text(CLIENT)
        plan = small(folder, deadline=DEADLINE, **PLANS[name])
        self.simulation = Simulation.build(plan)
        self.plan: Federation = self.simulation.federation
        self.state = start(self.plan, self.simulation.house.start)
        self.honest: dict[str, dict[ClientId, Reply]] = {}
        house, clients = self.simulation.house, self.simulation.clients
        errand = self.plan.work(self.state, clients, self._context())
        asked = {
            "train": errand,
            "evaluate": Evaluation().errand(self.plan, self.state, clients, 2),
            "describe": Describe().errand(house.labels),
        }
        with self.simulation.open() as session:
            for verb, errand in asked.items():
                replies = list(session.exchange({client: errand.request(client) for client in clients}))
                self.honest[verb] = {reply.client: reply for reply in replies if isinstance(reply, Reply)}
        silent = self._played(Lie("silence", "no answer", said(Failure(LIAR, "train", "no memory"))))
        self.without = silent[0]

    def _context(self) -> Any:
        from fedfm.core.parts import RoundContext

        return RoundContext(1, self.simulation.key, self.state.params, len(self.simulation.clients))

    def open(self, verb: str, lie: Lie) -> ProcessSession:
        """A session whose clients answer what is laid ready for them."""
        for client, honest in self.honest[verb].items():
            own = self.folder / client
            own.mkdir(exist_ok=True)
            is_liar = client == LIAR
            (own / "hello").write_bytes(said(Reply(client, "hello", 0)))
            (own / verb).write_bytes(lie.stream if is_liar else said(honest))
            (own / f"{verb}.py").write_text(lie.act if is_liar else "")

        def hello(client: ClientId, _: Path) -> Request:
            return Request.of("hello", meta={"client": client, "answers": str(self.folder / client)})

        # The bounds of the real engine, its processes replaced.
        with Process(device="cpu").open(self.simulation.house) as real:
            assert isinstance(real, ProcessSession)
            max_bytes, max_tensors = real._max_bytes, real._max_tensors
        command = (sys.executable, "-SEP", str(self.folder / "client.py"))
        return ProcessSession(self.simulation.clients, hello, command, self.folder / "run", max_bytes, None, 60.0, None, max_tensors)

    def _played(self, lie: Lie) -> tuple[ServerState, list[Failure]]:
        with self.open("train", lie) as session:
            state, record = play(self.plan, self.state, session, self.simulation.clients, self.simulation.key)
        return state, list(record.failures)

    def train(self, lie: Lie) -> str:
        """A round with this lie; what came of it."""
        state, failures = self._played(lie)
        named = [failure.client for failure in failures]
        if named == [LIAR]:
            reason = failures[0].reason
            assert len(reason) <= 1000 and reason.isprintable(), f"its reason is {reason[:80]!r}"
            assert tree.equal(state.params, self.without.params), "the others' update is another than without the liar"
            return "liar named"
        assert not named and lie.is_heard, f"named {named or 'nobody'}"
        assert all(bool(leaf.isfinite().all()) for leaf in state.params.values()), "parameters are not finite"
        return "counted: it looks right"

    def evaluate(self, lie: Lie) -> str:
        """An evaluation with this lie."""
        house = self.simulation.house
        with self.open("evaluate", lie) as session:
            report = Evaluation().report(self.plan, self.state, session, house.clients, house.key)
        named = list(report.get("failed", {}))
        if named == [LIAR]:
            assert sorted(report["owners"]) == sorted(OWNERS[1:]), f"evaluated are {sorted(report['owners'])}"
            return "liar named"
        assert not named and lie.is_heard, f"named {named or 'nobody'}"
        return "counted: it looks right"

    def describe(self, lie: Lie) -> str:
        """The first question of a run with this lie: the run does not start, and says who is to blame."""
        house = self.simulation.house
        try:
            with self.open("describe", lie) as session:
                Describe().roster(self.plan.channel, session, house.clients, house.labels, house.key)
        except DataError as error:
            assert str(error).startswith(LIAR), f"blamed is another: {error}"
            return "liar named"
        raise AssertionError("nobody is named")


def run(folder: Path, quick: bool) -> Iterator[Tally]:
    """Every lie in every plan, a row for each kind; ``quick`` takes each kind's first, in two plans."""
    tallies: dict[str, Tally] = {}
    for name in ("Mean", "TopK") if quick else PLANS:
        table = Table(folder, name)
        verbs: dict[str, Callable[[Lie], str]] = {"train": table.train}
        if name == "Mean":
            verbs |= {"evaluate": table.evaluate, "describe": table.describe}
        for verb, case in verbs.items():
            for lie in lies(table.honest[verb][LIAR], name in ("Mean", "CoordinateMedian")):
                tally = tallies.setdefault(lie.kind, Tally("clients", lie.kind))
                if quick and tally.cases >= 1:
                    continue
                what = f"{name}, {verb}: {lie.what}"
                tally.slowest, before = 0.0, tally.slowest
                tally.try_out(what, lambda case=case, lie=lie: case(lie))  # type: ignore[misc]
                tally.require(tally.slowest < LIMIT, f"{what}: took {tally.slowest:.1f} s")
                tally.slowest = max(tally.slowest, before)
    for tally in tallies.values():
        unknown = set(tally.outcomes) - {"liar named", "counted: it looks right"}
        tally.require(not unknown, f"came out as {sorted(unknown)}")
        yield tally

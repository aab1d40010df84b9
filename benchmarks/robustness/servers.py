"""Servers that lie to a house: each lie is met with a failure, what the client remembers stays as it is, and an honest server is answered as before."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness.clients import crafted
from benchmarks.robustness.ground import LIAR, Tally, small
from fedfm.client.frames import Inbox, Outbox
from fedfm.client.runtime import Runtime
from fedfm.core import tree
from fedfm.core.messages import Body, Failure, Message, Reply, Request, pack, unpack
from fedfm.core.parts import RoundContext, ServerState
from fedfm.core.round import play, start
from fedfm.core.tree import Tree
from fedfm.engines import Embedded, Process
from fedfm.engines.process import ProcessSession
from fedfm.simulation import Simulation
from fedfm.transforms import TopK
from fedfm.verbs import Evaluation

CLIENT = "ann"
assert CLIENT == LIAR


class Site:
    """A house whose clients remember something, after one honest round."""

    def __init__(self, folder: Path, out: Path) -> None:
        # One by one, which are the numbers of a process too.
        plan = small(folder, transforms=(TopK(fraction=0.5),), engine=Embedded(bank=1, device="cpu"))
        self.simulation = Simulation.build(plan, out)
        self.plan, self.out = self.simulation.federation, out
        self.runtime = Runtime(self.simulation.house)
        clients, key = self.simulation.clients, self.simulation.key
        with self.simulation.open() as session:
            self.state, _ = play(self.plan, start(self.plan, self.simulation.house.start), session, clients, key)

    def honest(self, verb: str = "train") -> Request:
        """What an honest server asks after the first round."""
        clients, state = self.simulation.clients, self.state
        if verb == "evaluate":
            return Evaluation().errand(self.plan, state, clients, 2).request(CLIENT)
        return self.plan.work(state, clients, RoundContext(2, self.simulation.key, state.params, len(clients))).request(CLIENT)

    def answer(self, request: Request, client: str = CLIENT) -> Reply | Failure:
        """The house's answer."""
        (answer,) = self.runtime.handle({client: request})
        return answer

    def memories(self) -> dict[str, bytes]:
        """All that clients keep on disk."""
        return {
            str(path): path.read_bytes() for path in sorted((self.out / "clients").rglob("*")) if path.suffix in (".safetensors", ".jsonl")
        }


def lies(train: Request, evaluate: Request) -> Iterator[tuple[str, str, Request]]:
    """Kind, what, and the request."""
    for request in (train, evaluate):
        yield from _parameter_lies(request)
    for verb in ("", "dance", "__init__", "hello", "\x1b[2J", "train " * 1000):
        yield "unknown verbs", verb[:20], replace(train, body=replace(train.body, verb=verb))
    for round in (10**12, 2**31, 2**63, 10**300):
        for request in (train, evaluate):
            yield "rounds", f"{request.verb}: {round:.0e}", replace(request, body=replace(request.body, round=round))
    for name in ("counted", "ticket"):
        for value in (-1, True, "three", 0.5, math.nan, 2**31, 10**300):
            yield "tickets", f"{name} is {value!r:.20}", replace(train, own={**train.own, name: value})
    # An evaluation reads no memory here, because no parameter stays at home.
    yield "tickets", "counted is one that does not exist", replace(train, own={**train.own, "counted": 77})
    for value in (-1, 0, True, "all", 1.5, math.nan, math.inf):
        yield "max_examples", repr(value), _with_meta(evaluate, max_examples=value)
    for split in ("", "everything", "../train", 7, True):
        yield "split", repr(split), _with_meta(evaluate, split=split)


def _parameter_lies(request: Request) -> Iterator[tuple[str, str, Request]]:
    (name, leaf), verb = next(iter(request.tensors.items())), request.verb
    rest = {other: value for other, value in request.tensors.items() if other != name}

    def ask(tensors: Tree) -> Request:
        return replace(request, body=Body(verb, request.round, tensors, request.meta))

    yield "missing parameters", f"{verb}: no {name}", ask(rest)
    yield "missing parameters", f"{verb}: none", ask({})
    yield "missing parameters", f"{verb}: under another name", ask({**rest, name.upper(): leaf})
    shapes: Mapping[str, torch.Tensor] = {
        "transposed": leaf.T.contiguous(),
        "flat": leaf.reshape(-1),
        "an axis more": leaf.unsqueeze(0),
        "nothing": leaf.new_zeros(0),
        "twice as long": torch.cat([leaf, leaf]),
    }
    for what, wrong in shapes.items():
        yield "shapes of parameters", f"{verb}: {what}", ask({**rest, name: wrong})
    for dtype in (torch.int64, torch.int8, torch.bool, torch.float64, torch.float16, torch.uint8):
        yield "types of parameters", f"{verb}: {dtype}", ask({**rest, name: leaf.to(dtype)})
    for value in (math.nan, math.inf, -math.inf):
        yield "values of parameters", f"{verb}: {value}", ask({**rest, name: torch.full_like(leaf, value)})
        one = leaf.clone()
        one.view(-1)[-1] = value
        yield "values of parameters", f"{verb}: one is {value}", ask({**rest, name: one})


def _with_meta(request: Request, **meta: Any) -> Request:
    return replace(request, body=replace(request.body, meta={**request.meta, **meta}))


def run(folder: Path, quick: bool) -> Iterator[Tally]:
    """Every lie, a row for each kind, and at last what an honest server is answered."""
    site, twin = Site(folder, folder / "lied-to"), Site(folder, folder / "twin")
    kept, tallies = site.memories(), dict[str, Tally]()
    assert kept, "the clients remember nothing"
    for kind, what, request in lies(site.honest(), site.honest("evaluate")):
        tally = tallies.setdefault(kind, Tally("servers", kind))
        if quick and tally.cases >= 3:
            continue

        def case(request: Request = request) -> str:
            assert isinstance(site.answer(request), Failure), "it was answered"
            assert site.memories() == kept, "what clients remember has changed"
            return "failure"

        tally.try_out(what, case)
    strangers = tallies["another client"] = Tally("servers", "another client")
    for name in ("mallory", "", "../ann"):
        strangers.try_out(name, lambda name=name: "failure" if isinstance(site.answer(site.honest(), name), Failure) else "answered")  # type: ignore[misc]
        strangers.require(set(strangers.outcomes) == {"failure"}, f"{name!r} is answered")
    yield from tallies.values()
    yield _afterwards(site, twin)
    yield _worker(site, twin.state)


def _afterwards(site: Site, twin: Site) -> Tally:
    """After all the lies: the answers of a house that was never lied to."""
    tally = Tally("servers", "honest rounds after all lies")

    def case() -> str:
        assert tree.equal(site.state.params, twin.state.params), "the first round differed"
        for verb in ("evaluate", "train"):
            answer, expected = site.answer(site.honest(verb)), twin.answer(twin.honest(verb))
            assert isinstance(answer, Reply) and isinstance(expected, Reply), f"{verb}: {answer}"
            assert tree.equal(answer.tensors, expected.tensors) and same_numbers(answer, expected), f"{verb} is answered otherwise"
        return "as without lies"

    tally.try_out("round 2", case)
    return tally


def same_numbers(x: Reply, y: Reply) -> bool:
    """Whether two replies tell the same numbers."""
    return json.dumps(dict(x.meta)) == json.dumps(dict(y.meta))


# --- a real worker at the end of a pipe ---------------------------------------------------------------------------------


def frames(request: Request) -> Iterator[tuple[str, bytes]]:
    """What is no request, as it could be sent to a worker."""
    data = pack(request)
    reply = Reply(CLIENT, "train", 2)
    yield "nothing", b""
    yield "no message", b"hello"
    yield "random bytes", bytes(range(256))
    yield "half a request", data[: len(data) // 2]
    yield "a request and a byte", data + b"x"
    yield "a reply", pack(reply)
    yield "a failure", pack(Failure(CLIENT, "train", "no"))
    yield "a pickle", b"cos\nsystem\n(S'true'\ntR."
    yield "lists within lists", struct.pack("<I", 200_000) + b"[" * 200_000
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "150,000 empty tensors", crafted(reply, {f"t{i}": empty for i in range(150_000)}, kind="request", own={})[8:]
    odd: dict[str, Any] = {"round": -1, "v": 9, "meta": [], "own": {"ticket": []}, "verb": 7, "own_bytes": -1}
    for field, value in odd.items():
        yield f"{field} is {value!r}", crafted(reply, **{"kind": "request", "own": {}, field: value})[8:]


def _worker(site: Site, state: ServerState) -> Tally:
    tally = Tally("servers", "malformed frames to a worker")
    simulation = Simulation.build(replace(site.plan, engine=Process(device="cpu")), site.out.with_name("worker"))
    with simulation.open() as session:
        assert isinstance(session, ProcessSession)
        hello = session._hello(CLIENT, site.out.with_name("worker"))
        command = (sys.executable, "-P", "-m", "fedfm.client.worker")
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdin is not None and child.stdout is not None
    inbox, outbox = Inbox(child.stdout.fileno(), 1 << 30), Outbox(child.stdin.fileno())

    def ask(data: bytes) -> Message:
        outbox.send(data)
        outbox.flush()
        return unpack(memoryview(inbox.receive() or b""))

    try:
        assert isinstance(ask(pack(hello)), Reply), "the worker did not start"
        fresh = start(site.plan, simulation.house.start)
        request = Evaluation().errand(site.plan, fresh, simulation.clients, 2).request(CLIENT)
        before = ask(pack(request))
        for what, data in frames(site.honest()):
            tally.try_out(what, lambda data=data: "failure" if isinstance(ask(data), Failure) else "answered")  # type: ignore[misc]
            tally.require(set(tally.outcomes) == {"failure"}, f"{what}: {dict(tally.outcomes)}")
        after = ask(pack(request))
        same = (
            isinstance(before, Reply)
            and isinstance(after, Reply)
            and tree.equal(before.tensors, after.tensors)
            and same_numbers(before, after)
        )
        tally.require(same, "an honest request is answered otherwise afterwards")
    finally:
        child.kill()
        child.wait()
    return tally

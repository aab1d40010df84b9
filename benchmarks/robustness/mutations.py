"""Messages, states, journals, memories, accounts and recipes with bits, bytes and fields changed: read as they were, or refused by name."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.robustness.ground import LIAR, Tally, small
from fedfm import notation
from fedfm.client.memory import Memory, home
from fedfm.client.spent import SpentStore
from fedfm.core import tree
from fedfm.core.messages import Failure, Message, Reply, Request, pack, unpack
from fedfm.core.parts import Errand, RoundContext, ServerState
from fedfm.core.round import start
from fedfm.federation import Federation
from fedfm.run.folder import JOURNAL, METRICS, latest_state, read_journal
from fedfm.run.loop import run as play_run
from fedfm.simulation import Simulation
from fedfm.testing.mutations import ODD, changed
from fedfm.testing.sessions import Scripted
from fedfm.transforms import TopK
from fedfm.verbs import Evaluation

# Cases of each kind; together more than 200,000.
MESSAGES, JOURNALS, STATES, MEMORIES, ACCOUNTS, RECIPES = 44_000, 12_000, 4000, 8000, 8000, 3000
YAML = (
    "{", "}", "[", "]", ": ", ", ", "\n", "  ", "- ", "null", "1e9", "!!timestamp x", "!!binary a", "!!int x", "9" * 5000, "'", "#", "<<", "? ", "|",
    "\t", "%", "@", "\0", "&a ", "*a", "-1", ".nan", ".inf", "true",
)  # fmt: skip


def run(folder: Path, quick: bool) -> Iterator[Tally]:
    """Every kind; ``quick`` tries few of the cases."""
    part = 200 if quick else 1
    draw = random.Random(0)
    for name, message, read in _messages(folder):
        yield _messages_tally(name, message, read, MESSAGES // part, draw)
    out = folder / "played"
    plan = small(folder, transforms=(TopK(fraction=0.5),), rounds=2)
    list(play_run(plan, out=out))
    yield _journals(out, JOURNALS // part, draw)
    yield _states(out, STATES // part, draw)
    yield _memories(folder / "memories", MEMORIES // part, draw)
    yield _accounts(folder / "accounts", ACCOUNTS // part, draw)
    yield _recipes(RECIPES // part, draw)


# --- how something is changed ---------------------------------------------------------------------------------------


def changed_fields(data: bytes, draw: random.Random) -> bytes:
    """A packed message with one to three fields of its header, or of its index of tensors, changed, left out or added."""
    (head_bytes,) = struct.unpack("<I", data[:4])
    head, rest = json.loads(data[4 : 4 + head_bytes]), data[4 + head_bytes :]
    (index_bytes,) = struct.unpack("<Q", rest[:8]) if len(rest) >= 8 else (0,)
    index, body = json.loads(rest[8 : 8 + index_bytes] or b"{}"), rest[8 + index_bytes :]
    for _ in range(draw.randrange(1, 4)):
        places = [place for place in (head, head.get("meta"), head.get("own"), index, *index.values()) if isinstance(place, dict) and place]
        place = draw.choice(places)
        name, value = draw.choice(sorted(place)), draw.choice(ODD)
        match draw.randrange(4):
            case 0:
                del place[name]
            case 1:
                place[draw.choice(["x", "__metadata__", "\ud800", "ticket", "weight"])] = value
            case _:
                place[name] = value
    raw_head, raw_index = json.dumps(head).encode(), json.dumps(index).encode()
    length = draw.choice([len(raw_index), len(raw_index), len(raw_index), 0, 2**63, len(raw_index) - 1])
    return struct.pack("<I", len(raw_head)) + raw_head + struct.pack("<Q", length) + raw_index + body


# --- messages -------------------------------------------------------------------------------------------------------

Read = Callable[[Message], str]


def _messages(folder: Path) -> Iterator[tuple[str, Message, Read]]:
    """What passes in a round: each kind of message, and what its receiver does with it."""
    simulation = Simulation.build(small(folder, transforms=(TopK(fraction=0.5),)))
    plan, clients = simulation.federation, simulation.clients
    state = start(plan, simulation.house.start)
    ctx = RoundContext(1, simulation.key, state.params, len(clients))
    errand = plan.work(state, clients, ctx)
    ctx = replace(ctx, params=errand.params, leaves=errand.leaves)
    asked = Evaluation().errand(plan, state, clients, 2)
    with simulation.open() as session:
        (trained,) = session.exchange({LIAR: errand.request(LIAR)})
        (evaluated,) = session.exchange({LIAR: asked.request(LIAR)})
        assert isinstance(trained, Reply) and isinstance(evaluated, Reply)
        yield "reply to train", trained, _collected(plan, errand, ctx)
        yield "reply to evaluate", evaluated, _collected(plan, asked, replace(ctx, round=0, leaves=asked.leaves))
        yield "request to train", errand.request(LIAR), lambda message: "read"
        yield "failure", Failure(LIAR, "train", "no memory"), _collected(plan, errand, ctx)


def _collected(plan: Federation, errand: Errand, ctx: RoundContext) -> Read:
    def read(message: Message) -> str:
        """The one outcome of the client that was asked, through the channel."""
        if isinstance(message, Request):
            return "read"
        # An engine knows whose pipe it reads.
        answer = replace(message, client=LIAR)
        outcomes = list(plan.channel.collect(Scripted(lambda requests: [answer]), errand, [LIAR], None, ctx))
        assert len(outcomes) == 1, f"{len(outcomes)} outcomes of one client"
        return "Failure of its client" if isinstance(outcomes[0], Failure) else "taken"

    return read


def _messages_tally(name: str, message: Message, read: Read, cases: int, draw: random.Random) -> Tally:
    tally, good = Tally("mutations", f"message: {name}"), pack(message)
    for number in range(cases):
        data = (changed if number % 2 else changed_fields)(good, draw)
        tally.try_out(f"case {number}", lambda data=data: read(unpack(data)))  # type: ignore[misc]
    unknown = set(tally.outcomes) - {"MessageError", "Failure of its client", "taken", "read"}
    tally.require(not unknown, f"refused by {sorted(unknown)}")
    return tally


# --- files ----------------------------------------------------------------------------------------------------------


def _files(tally: Tally, path: Path, cases: int, draw: random.Random, read: Callable[[bytes], str], *allowed: str) -> Tally:
    """Reads a file that was changed; what is read must be what was written, or one of the ``allowed`` outcomes."""
    whole = path.read_bytes()
    for number in range(cases):
        data = changed(whole, draw)
        path.write_bytes(data)
        tally.try_out(f"case {number}", lambda data=data: read(data))  # type: ignore[misc]
    path.write_bytes(whole)
    unknown = set(tally.outcomes) - {"as it was", *allowed}
    tally.require(not unknown, f"came out as {sorted(unknown)}")
    return tally


def _journals(out: Path, cases: int, draw: random.Random) -> Tally:
    path = out / JOURNAL
    intact = read_journal(out)
    assert intact.num_lines > 3 and (out / METRICS).is_file()

    def read(data: bytes) -> str:
        journal = read_journal(out)
        same = journal.rounds == intact.rounds and journal.first == intact.first and journal.choices == intact.choices
        # A journal that lost its last line for good goes on, and writes that line again.
        return "as it was" if same else "something else"

    return _files(Tally("mutations", "journal"), path, cases, draw, read, "RunError")


def _states(out: Path, cases: int, draw: random.Random) -> Tally:
    path = max((out / "state").glob("*.safetensors"))
    last, whole = latest_state(out), path.read_bytes()
    path.unlink()
    before = latest_state(out)
    path.write_bytes(whole)

    def read(data: bytes) -> str:
        state = latest_state(out)
        return "as it was" if _same(state, last) else "the state before" if _same(state, before) else "something else"

    return _files(Tally("mutations", "state"), path, cases, draw, read, "the state before")


def _same(x: ServerState, y: ServerState) -> bool:
    parts = x.parts.keys() == y.parts.keys() and all(tree.equal(x.parts[place], y.parts[place]) for place in x.parts)
    return x.round == y.round and x.counted == y.counted and tree.equal(x.params, y.params) and parts


def _memories(folder: Path, cases: int, draw: random.Random) -> Tally:
    memory = Memory(folder)
    kept = {"transforms.0/error": torch.randn(6, generator=torch.Generator().manual_seed(0)), "step": torch.tensor([3])}
    memory.save(LIAR, 1, None, kept)
    path = next(home(folder, LIAR).glob("memory-*.safetensors"))

    def read(data: bytes) -> str:
        return "as it was" if tree.equal(memory.load(LIAR, 1), kept) else "something else"

    return _files(Tally("mutations", "memory of a client"), path, cases, draw, read, "RunError")


def _accounts(folder: Path, cases: int, draw: random.Random) -> Tally:
    store = SpentStore(folder)
    for amount in (1.0, 0.5, 2.0):
        store.of(LIAR).add("epsilon", amount)
    path, entries = home(folder, LIAR) / "spent.jsonl", store.entries(LIAR)
    whole = path.read_bytes()

    def read(data: bytes) -> str:
        left = store.entries(LIAR)
        # An account that was cut cannot know how long it was.
        is_cut = whole.startswith(data[: data.rfind(b"\n") + 1]) and left == entries[: len(left)]
        return "as it was" if left == entries else "cut off its end" if is_cut else "something else"

    return _files(Tally("mutations", "account of what was spent"), path, cases, draw, read, "RunError", "cut off its end")


def _recipes(cases: int, draw: random.Random) -> Tally:
    tally = Tally("mutations", "recipe")
    texts = [path.read_text() for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))]
    for number in range(cases):
        text = draw.choice(texts)
        for _ in range(draw.choice([1, 1, 2, 3])):
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(YAML) + text[at + draw.randrange(10) :]
        tally.try_out(f"case {number}", lambda text=text: _built(text))  # type: ignore[misc]
    unknown = set(tally.outcomes) - {"ConfigError", "PlanError", "a federation"}
    tally.require(not unknown, f"refused by {sorted(unknown)}")
    return tally


def _built(text: str) -> str:
    notation.build(Federation, text, "recipe")
    return "a federation"

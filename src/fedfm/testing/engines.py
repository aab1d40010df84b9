"""What every engine must do: give the numbers of a client on a machine of its own, and one outcome for each request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedfm.core.messages import Failure, Reply, Request
from fedfm.core.parts import ClientId, RoundContext, ServerState, Session, Tree
from fedfm.core.round import RoundRecord, play, start
from fedfm.engines import Embedded, Engine
from fedfm.federation import Federation
from fedfm.simulation import Simulation
from fedfm.testing.parts import check_part, same


def check_engine(engine: Engine, federation: Federation, folder: Path, exact: bool = True) -> None:
    """The recipe's numbers are those of ``Embedded(bank=1)``, whatever the order and however often the engine is closed and opened again.

    Args:
        federation: At least two clients, two rounds of them; best with transforms that draw and remember. Its own engine is not used.
        folder: An empty folder for the clients' memory.
        exact: Bit for bit; else to float rounding, for engines that put clients into one batch.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(engine)
    # What an engine bounds by itself is a part of the recipe.
    federation = replace(federation, bounds=replace(federation, engine=engine).bounding())
    name = type(engine).__name__
    reference = Simulation.build(replace(federation, engine=Embedded(bank=1)))
    plan = reference.federation
    first, *others = clients = reference.clients
    assert others, "the suite needs at least two clients"
    state = expected = start(plan, reference.house.start)

    with reference.open() as alone:
        for round in (1, 2):
            # Each round has a session of its own, because a memory is the client's, not the session's.
            simulation = Simulation.build(replace(federation, engine=engine), folder, owners=reference.owners)
            with simulation.open() as session:
                if round == 1:
                    _check_verbs(name, session, alone, expected.params, clients)
                state, record = play(simulation.federation, state, session, clients, simulation.key)
                expected, record_alone = play(plan, expected, alone, clients, reference.key)
                _check_round(name, state, record, expected, record_alone, exact)
                if round == 2:
                    ctx = RoundContext(3, simulation.key, state.params, len(clients))
                    errand = simulation.federation.work(state, clients, ctx)
                    _check_again(name, session, {client: errand.request(client) for client in clients})
                    _check_send(name, session, clients)
                    _check_deadline(name, session, first)
            session.close()


def ask(session: Session, requests: Mapping[ClientId, Request], deadline: float | None = None) -> dict[ClientId, Reply | Failure]:
    """The answers by client.

    Raises:
        AssertionError: unless there is exactly one for each request.
    """
    answers = list(session.exchange(requests, deadline))
    asked, answered = sorted(requests), sorted(answer.client for answer in answers)
    assert answered == asked, f"{asked} were asked and {answered} answered; each request has exactly one outcome"
    for answer in answers:
        request = requests[answer.client]
        assert isinstance(answer, Failure) or (answer.verb, answer.round) == (request.verb, request.round), (
            f"{answer} does not answer {request}"
        )
    return {answer.client: answer for answer in answers}


def _check_verbs(name: str, session: Session, alone: Session, params: Tree, clients: tuple[ClientId, ...]) -> None:
    assert ask(session, {}) == {}, f"{name} answers when nobody is asked"
    describe = dict.fromkeys(clients, Request.of("describe"))
    assert ask(session, describe) == ask(alone, describe), f"{name}: clients describe themselves differently"
    evaluate = dict.fromkeys(clients, Request.of("evaluate", 0, params, {"split": "test"}))
    answers, expected = ask(session, evaluate), ask(alone, evaluate)
    for client in clients:
        reply, reference = answers[client], expected[client]
        assert isinstance(reply, Reply) and isinstance(reference, Reply), f"{name}: {client} could not evaluate: {reply}"
        # Evaluations may share a batch on any engine, so they agree to rounding.
        _require_close(_sums(reply), _sums(reference), f"{name}, evaluation of {client}")
    mixed = {clients[0]: Request.of("no-such-verb"), "no such client": Request.of("describe"), clients[1]: Request.of("describe")}
    outcome = {client: type(answer) for client, answer in ask(session, mixed).items()}
    assert outcome == {clients[0]: Failure, "no such client": Failure, clients[1]: Reply}, (
        f"{name}: what is unknown must fail alone, got {outcome}"
    )


def _check_round(name: str, state: ServerState, record: RoundRecord, expected: ServerState, alone: RoundRecord, exact: bool) -> None:
    assert not record.failures, f"{name}: {record.failures}"
    what = f"{name}, round {state.round}"
    if exact:
        assert same(state.params, expected.params) and same(_flat(state), _flat(expected)) and state.counted == expected.counted, (
            f"{what}: weights differ from those of clients run one by one"
        )
        assert replace(record, seconds={}) == replace(alone, seconds={}), f"{what}: the records differ:\n{record}\n{alone}"
    _require_close(state.params, expected.params, what)


def _check_again(name: str, session: Session, requests: Mapping[ClientId, Request]) -> None:
    """A server that crashed before it could commit asks again, in whatever order."""
    once, again = ask(session, requests), ask(session, dict(reversed(list(requests.items()))))
    for client in requests:
        x, y = once[client], again[client]
        assert isinstance(x, Reply) and isinstance(y, Reply), f"{name}: {client} failed: {x}, {y}"
        assert x.meta == y.meta and same(x.tensors, y.tensors), f"{name}: {client}, asked again for the same round, answers differently"


def _check_send(name: str, session: Session, clients: Sequence[ClientId]) -> None:
    """Requests may go out while others are still owed an answer, and nothing is lost."""
    assert session.receive() is None, f"{name} has an answer that nobody asked for"
    for client in clients:
        session.send({client: Request.of("describe")})
    answers = [session.receive() for _ in clients]
    assert sorted(answer.client for answer in answers if answer is not None) == sorted(clients), f"{name} lost an answer: {answers}"
    assert session.receive() is None, f"{name} answers twice"
    session.send(dict.fromkeys(clients, Request.of("describe")))
    session.abandon()
    assert session.receive() is None, f"{name} still waits for those who were abandoned"


def _check_deadline(name: str, session: Session, client: ClientId) -> None:
    late = ask(session, {client: Request.of("describe")}, deadline=1e-9)[client]
    assert isinstance(late, Reply) or late.stage == "deadline", f"{name}: {client} was late, and is said to have failed in {late.stage}"
    answer = ask(session, {client: Request.of("describe")})[client]
    assert isinstance(answer, Reply), f"{name}: {client} does not come back after a deadline: {answer}"


def _sums(reply: Reply) -> Tree:
    numbers = {key: torch.tensor(value, dtype=torch.float64) for key, value in reply.meta.items() if isinstance(value, float)}
    return {**reply.tensors, **numbers}


def _flat(state: ServerState) -> Tree:
    return {f"{place}/{name}": leaf for place, tree in state.parts.items() for name, leaf in tree.items()}


def _require_close(x: Tree, y: Tree, what: str) -> None:
    assert list(x) == list(y), f"{what}: {list(x)} instead of {list(y)}"
    for leaf in x:
        difference = (x[leaf].double() - y[leaf].double()).norm().item()
        assert difference <= 1e-4 * y[leaf].double().norm().item() + 1e-7 * math.sqrt(y[leaf].numel()), (
            f"{what}: {leaf} differs by {difference}"
        )


__all__ = ["ask", "check_engine"]

"""Members in processes of their own, over a real broker: the numbers are those of the embedded engine, and nobody is counted twice."""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedfm.core.errors import MessageError, MissingExtra, WireError
from fedfm.core.messages import Body, Failure, Reply, Request, pack_parts

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm import notation
from fedfm.client.asking import questions_in, read, write
from fedfm.client.memory import home
from fedfm.client.policy import Policy
from fedfm.coordination import Coordination
from fedfm.core.clock import Virtual
from fedfm.core.disk import slug
from fedfm.core.parts import ClientId
from fedfm.core.round import play, start
from fedfm.core.session import WrappedSession
from fedfm.data import Data
from fedfm.engines import Embedded, Nats
from fedfm.engines.nats import TALK, NatsSession
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.methods import Scaffold
from fedfm.run.folder import SPLIT
from fedfm.run.loop import resume, run
from fedfm.service.member import Greeting
from fedfm.silos import certificates
from fedfm.simulation import Simulation
from fedfm.tasks import CausalLM
from fedfm.testing import check_engine, tiny
from fedfm.testing.broker import server
from fedfm.testing.engines import ask
from fedfm.testing.parts import same
from fedfm.testing.silos import Silos
from fedfm.transforms import ClipByNorm, TopK
from fedfm.tuning import Full, LoRA
from fedfm.wire.envelope import Header, seal

try:
    server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow
OWNERS = ("anna", "bela")


def rows(owner: str) -> list[dict[str, str]]:
    k = OWNERS.index(owner)
    return [{"text": f"{tiny.TEXT[(17 * i + 5 * k) % 256]} {tiny.TEXT[(i * k) % 256]}"} for i in range(5 + 2 * k)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"owner": owner, **row}) + "\n" for owner in OWNERS for row in rows(owner)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(folder / "cache"))
        yield Federation(
            model=tiny.spec("Llama"),
            data=Data(str(path), by="owner", test_fraction=0.3),
            task=CausalLM(max_length=16),
            tuning=LoRA(r=4, dropout=0.1),
            local=SGD(lr=0.1, steps=3, batch_size=2),
            transforms=(TopK(fraction=0.5), ClipByNorm(max_norm=0.5)),
            engine=Embedded(bank=1, device="cpu"),
        )


@pytest.fixture
def consortium(tmp_path: Path, federation: Federation) -> Iterator[Silos]:
    import torch

    with Silos(tmp_path / "consortium", {owner: rows(owner) for owner in OWNERS}, threads=torch.get_num_threads()) as consortium:
        yield consortium


def test_members_give_the_numbers_of_clients_run_one_by_one(federation: Federation, consortium: Silos, tmp_path: Path) -> None:
    """Bit for bit, with control variates, error feedback and dropout; each member has its own rows alone."""
    consortium.start()
    check_engine(Nats(str(consortium.home("coordinator")), device="cpu"), replace(federation, method=Scaffold()), tmp_path / "run")
    job = json.loads((tmp_path / "run" / "job.json").read_text())
    assert job["session"] == 2
    for owner in OWNERS:
        folder = home(consortium.home(owner) / "jobs" / slug(job["name"]), owner)
        assert [path.name for path in sorted(folder.iterdir())] == [f"memory-{ticket:06d}.safetensors" for ticket in (1, 2, 3)]


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory, federation: Federation) -> Iterator[Silos]:
    """Two members that are up, and a third that works on no such task."""
    import torch

    every = {owner: rows(owner) for owner in OWNERS} | {"cleo": rows("anna")}
    policies = {"cleo": Policy.open(tasks=("Classification",))}
    with Silos(tmp_path_factory.mktemp("silos"), every, policies, torch.get_num_threads()) as consortium:
        consortium.start()
        yield consortium


def nats(silos: Silos) -> Nats:
    return Nats(str(silos.home("coordinator")), device="cpu")


def opened(federation: Federation, silos: Silos) -> NatsSession:
    site = Coordination.build(replace(federation, engine=nats(silos)), OWNERS)
    session = site.open()
    assert isinstance(session, NatsSession)
    return session


def test_a_run_begins_where_no_data_is(federation: Federation, consortium: Silos, tmp_path: Path) -> None:
    """The coordinator's recipe names no file that exists, and its run ends with the embedded engine's weights and split."""
    consortium.start()
    plan = replace(federation, rounds=2)
    *_, (expected, _) = run(plan, out=tmp_path / "embedded")
    nowhere = replace(plan.data, source=str(tmp_path / "nowhere.jsonl"))
    remote = replace(plan, data=nowhere, engine=nats(consortium))
    *_, (state, record) = run(remote, out=tmp_path / "remote")
    assert state.round == 2 and not record.failures
    assert same(state.params, expected.params)
    assert (tmp_path / "remote" / SPLIT).read_text() == (tmp_path / "embedded" / SPLIT).read_text()
    assert (tmp_path / "remote" / "report.html").exists()
    assert not list((tmp_path / "remote").glob("clients/*"))
    # Resumed, it goes on with the members that remember it, and without who joined since.
    consortium.add("dora", rows("anna"), Policy.open())
    consortium.start("dora")
    *_, (further, _) = resume(tmp_path / "remote", rounds=3)
    *_, (unbroken, _) = resume(tmp_path / "embedded", rounds=3)
    assert same(further.params, unbroken.params)


def test_a_policy_refuses_before_data_is_read(federation: Federation, silos: Silos) -> None:
    with opened(federation, silos) as session:
        answer = ask(session, {"cleo": Request.of("describe")})["cleo"]
    assert isinstance(answer, Failure) and answer.stage == "policy" and "'tasks'" in answer.reason
    log = [json.loads(line) for line in (home(silos.home("cleo"), "cleo") / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in log if line["event"] in ("request", "refusal", "release")] == ["request", "refusal"]


def test_a_member_names_both_versions(federation: Federation, silos: Silos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfm.engines.nats.TALK", 7)
    with opened(federation, silos) as session:
        answer = ask(session, {"anna": Request.of("describe")})["anna"]
    assert isinstance(answer, Failure) and answer.stage == "start"
    assert "speaks version 7" in answer.reason and "speaks version 1" in answer.reason


def test_what_nobody_asked_for_is_dropped_and_counted(federation: Federation, silos: Silos) -> None:
    """Forged, foreign, unasked and repeated messages change no answer."""
    with opened(federation, silos) as session, silos.connect("bela") as bela:
        job, coordinator = session._job.name, silos.identity("coordinator").card
        up = silos.names.up("bela").of(job).message

        def publish(sender: str, job: str, sequence: int = 5, times: int = 1) -> None:
            answer = Reply("bela", "describe", 0)
            header = Header.now("test", job, 0, sequence, "reply")
            data = seal(pack_parts(answer), silos.identity(sender), [coordinator], header).message()
            for _ in range(times):
                bela.publish(up, data)

        bela.publish(up, b"no envelope")
        publish("bela", "another-run")
        publish("anna", job)
        publish("bela", job)
        answers = ask(session, dict.fromkeys(OWNERS, Request(Body("describe"))))
        assert all(isinstance(answer, Reply) for answer in answers.values())
        assert dict(session.dropped) == {"malformed": 1, "job": 1, "sender": 1, "late": 1}


def test_nobody_is_late_because_anothers_answer_is_long(federation: Federation, silos: Silos, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator spends 8 seconds on each answer, and each member has 10 to give its own."""
    with opened(federation, silos) as session:
        clock, take = Virtual(), session._take

        def slowly(delivery: Any) -> Any:
            answer = take(delivery)
            clock.advance(8.0)
            return answer

        session.clock = clock
        monkeypatch.setattr(session, "_take", slowly)
        session.send(dict.fromkeys(OWNERS, Request.of("describe")), deadline=10.0)
        answers = [session.receive() for _ in OWNERS]
        assert all(isinstance(answer, Reply) for answer in answers), answers


def test_a_member_killed_at_work_comes_back_and_is_counted_once(federation: Federation, silos: Silos) -> None:
    plan = replace(federation, method=Scaffold(), deadline=120.0)
    reference = Simulation.build(plan)
    with reference.open() as session:
        expected, _ = play(
            reference.federation, start(reference.federation, reference.house.start), session, reference.clients, reference.key
        )
    with opened(plan, silos) as session:
        site = Coordination.build(plan, OWNERS)
        silos.kill("anna")
        began = threading.Timer(1.0, silos.start, ["anna"])
        began.start()
        state, record = play(site.federation, start(site.federation, site.house.start), Killing(session, silos), OWNERS, site.key)
        began.join()
        assert not record.failures and same(state.params, expected.params) and state.counted == expected.counted
        assert session.receive() is None


class Killing(WrappedSession):
    """Kills bela, once, as soon as its work was sent to it, and starts it again."""

    def __init__(self, inner: NatsSession, silos: Silos) -> None:
        super().__init__(inner)
        self.silos, self.killed = silos, False

    def send(self, requests: Mapping[ClientId, Request], deadline: float | None = None) -> None:
        super().send(requests, deadline)
        if not self.killed:
            self.killed = True
            path = home(self.silos.home("bela"), "bela") / "log.jsonl"
            before = path.stat().st_size if path.exists() else 0
            until = time.monotonic() + 30.0
            # Its log tells that it has begun.
            while (path.stat().st_size if path.exists() else 0) == before and time.monotonic() < until:
                time.sleep(0.005)
            self.silos.kill("bela")
            self.silos.start("bela")


# A broker that dies in the middle of a handshake leaves an asyncio transport that nats-py does not close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_killed_between_question_and_answer_loses_nothing(federation: Federation, silos: Silos) -> None:
    with opened(federation, silos) as session:
        ask(session, dict.fromkeys(OWNERS, Request.of("describe")))
        session.send(dict.fromkeys(OWNERS, Request.of("describe")), deadline=90.0)
        silos.kill_broker()
        time.sleep(0.5)
        silos.broker.start()
        answers = [session.receive() for _ in OWNERS]
        assert sorted(answer.client for answer in answers if isinstance(answer, Reply)) == sorted(OWNERS)
        assert session.receive() is None
    gc.collect()


# As above.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_that_is_away_is_no_members_failure(federation: Federation, silos: Silos) -> None:
    """Neither when members are asked nor when their deadline passes: the run waits, and plays the round again."""
    describe = dict.fromkeys(OWNERS, Request.of("describe"))
    with opened(federation, silos) as session:
        ask(session, describe)
        silos.kill_broker()
        try:
            session._connection.patience = 0.5
            with pytest.raises(WireError, match="could not be used in time"):
                session.send(describe)
        finally:
            silos.broker.start()
    with opened(federation, silos) as session:
        session.send({"anna": Request.of("describe"), "nobody": Request.of("describe")}, deadline=60.0)
        session._owed[next(iter(session._owed))].expires = session.clock.now() + 1.0
        silos.kill_broker()
        try:
            assert [answer.client for answer in (session.receive(),) if isinstance(answer, Failure)] == ["nobody"]
            with pytest.raises(WireError, match="while the broker was away"):
                session.receive()
        finally:
            silos.broker.start()
    with opened(federation, silos) as session:
        assert all(isinstance(answer, Reply) for answer in ask(session, describe).values())
    gc.collect()


def test_an_answer_to_an_earlier_session_is_late(federation: Federation, silos: Silos, tmp_path: Path) -> None:
    """A coordinator that was killed asks again; what was answered to its former self counts for nothing."""
    site = Coordination.build(replace(federation, engine=nats(silos)), OWNERS, tmp_path)
    with site.open() as session:
        session.send({"anna": Request.of("describe")})
        assert isinstance(session, NatsSession)
        with silos.connect("coordinator") as connection:
            until = time.monotonic() + 60.0
            while connection.stored(silos.names.up("anna"))[0] == 0 and time.monotonic() < until:
                time.sleep(0.05)
    with site.open() as session:
        answers = ask(session, {"anna": Request.of("describe")})
        assert isinstance(answers["anna"], Reply) and isinstance(session, NatsSession)
        assert dict(session.dropped) == {"late": 1}


def test_who_joins_and_who_is_revoked_between_rounds_is_noticed(federation: Federation, consortium: Silos) -> None:
    """Also while an answer is waited for; and a name that entered again with new keys is greeted anew."""
    describe = Request.of("describe")
    with opened(federation, consortium) as session:
        consortium.start("anna")
        session.send(dict.fromkeys(OWNERS, describe))
        # bela was asked, is not there, and is put out.
        consortium.consortium.revoke("bela", certificates.now())
        answers = {answer.client: answer for answer in (session.receive(), session.receive()) if answer is not None}
        assert isinstance(answers["anna"], Reply)
        assert isinstance(bela := answers["bela"], Failure) and "does not belong" in bela.reason
        assert isinstance(ask(session, {"bela": describe})["bela"], Failure)
        shutil.rmtree(consortium.home("bela"))
        for name in ("bela", "dora"):
            consortium.add(name, rows("bela"), Policy.open())
        consortium.start("bela", "dora")
        again = ask(session, dict.fromkeys((*OWNERS, "dora"), describe))
        assert all(isinstance(answer, Reply) for answer in again.values())


def test_a_request_waits_until_a_person_says_yes(federation: Federation, tmp_path: Path) -> None:
    with Silos(tmp_path, {"anna": rows("anna")}, {"anna": Policy.open(ask="run")}) as consortium:
        consortium.start()
        with opened(federation, consortium) as session:
            session.send({"anna": Request.of("describe")}, deadline=90.0)
            folder, until = consortium.home("anna"), time.monotonic() + 60.0
            while not (waiting := questions_in(folder)) and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(1.0)
            assert not consortium_has_answered(consortium)
            (path,) = waiting
            write(path, read(path)[0], "yes")
            assert isinstance(session.receive(), Reply)


def consortium_has_answered(consortium: Silos) -> bool:
    with consortium.connect("coordinator") as connection:
        return connection.stored(consortium.names.up("anna"))[0] > 0


def test_what_is_long_travels_in_chunks_both_ways(federation: Federation, silos: Silos) -> None:
    """Parameters and updates of several megabytes: the body is stored once, and nothing of it is left when the round is over."""
    plan = replace(
        federation, model=tiny.spec("Llama", hidden_size=256, intermediate_size=512), tuning=Full(), transforms=(), deadline=120.0
    )
    reference = Simulation.build(plan)
    with reference.open() as session:
        expected, _ = play(
            reference.federation, start(reference.federation, reference.house.start), session, reference.clients, reference.key
        )
    with opened(plan, silos) as session:
        site = Coordination.build(replace(plan, engine=nats(silos)), OWNERS)
        assert isinstance(session, NatsSession)
        state, record = play(site.federation, start(site.federation, site.house.start), session, OWNERS, site.key)
        assert not record.failures and same(state.params, expected.params)
        size = sum(leaf.nbytes for leaf in state.params.values())
        with silos.connect("coordinator") as connection:
            messages, stored = connection.stored(silos.names.bodies)
            assert messages > 3 and size < stored < 1.1 * size + 1e5, f"two members share a body of {size} bytes, and {stored} are stored"
            session.close()
            assert connection.stored(silos.names.bodies)[0] == 0
            assert all(connection.stored(silos.names.up(owner))[0] == 0 for owner in OWNERS)


def test_a_greeting_that_is_none_is_a_message_error(federation: Federation) -> None:
    """Whatever stands in a field: any scalar that a message can carry, or the field's own text, cut and changed."""
    plan = federation.client_plan()
    good: dict[str, Any] = {
        "talk": TALK, "release": "0", "plan": notation.write(plan), "base": "0" * 32, "files": "{}", "labels": "[]", "key": "00" * 32, "choices": "{}",
        "num_clients": 2, "cohort_size": 2, "num_rounds": 1, "run": "r", "data_rules": json.dumps(federation.data.rules()),
    }  # fmt: skip
    assert Greeting.of(good).plan == plan
    rng, outcomes = random.Random(0), Counter[str]()
    junk = [
        None,
        True,
        -1,
        1 << 80,
        0.5,
        math.inf,
        math.nan,
        "",
        "[",
        "null",
        "[[]]",
        '{"a": "b"}',
        "\ud800",
        "{" * 5000,
        "a: &x [*x]",
        "- 1",
    ]
    for _ in range(1500):
        field = rng.choice(list(good))
        text = str(good[field])
        cut, put = rng.randrange(len(text) + 1), rng.choice(["", "}", ": ", "\0", "é", "!!python/object:os.system", "9" * 30])
        value = rng.choice([*junk, text[:cut] + put + text[cut + rng.randrange(4) :]])
        try:
            Greeting.of({**good, field: value})
            outcomes["taken"] += 1
        except MessageError:
            outcomes["refused"] += 1
    for missing in good.keys() - {"release"}:
        with pytest.raises(MessageError):
            Greeting.of({name: item for name, item in good.items() if name != missing})
    assert outcomes["refused"] > 500, outcomes


def test_members_sum_in_secret_over_the_wire(federation: Federation, tmp_path: Path) -> None:
    """Four houses, a broker, the real protocol: the bits of the embedded engine; each house knows the others, and has spent its contexts."""
    import torch

    from fedfm.channels import SecureAggregation

    owners = ("anna", "bela", "cleo", "dora")
    own = {owner: rows(OWNERS[i % 2])[i // 2 :] for i, owner in enumerate(owners)}
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"owner": owner, **row}) + "\n" for owner in owners for row in own[owner]))
    secret = replace(
        federation,
        data=replace(federation.data, source=str(source)),
        transforms=(ClipByNorm(max_norm=0.5),),
        channel=SecureAggregation(),
        rounds=2,
    )
    *_, (expected, _) = run(secret, out=tmp_path / "embedded")
    with Silos(tmp_path / "consortium", own, threads=torch.get_num_threads()) as consortium:
        consortium.start()
        *_, (state, record) = run(replace(secret, engine=nats(consortium)), out=tmp_path / "remote")
        identities = {owner: consortium.identity(owner).card.sign.hex() for owner in owners}
        peers = [json.loads((consortium.home(owner) / "peers.json").read_text())["keys"] for owner in owners]
        spent = [(home(consortium.home(owner), owner) / "spent.jsonl").read_text() for owner in owners]
    assert same(state.params, expected.params) and not record.failures and not record.clients
    assert record.metrics["num_clients"] == 4 and not record.metrics["eval"]["owners"]
    assert peers == [identities] * 4
    assert all(account.count('"secagg/context/') >= 5 and account.count('"secagg/sum/train/') == 2 for account in spent)

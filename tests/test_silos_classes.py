"""Classes that nobody has named are asked of the members, and the numbers are those of the embedded engine; who cannot say is named before round 1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedfm.core.errors import ConfigError, DataError, MissingExtra

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nats", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from parts import Masks

from fedfm.client.memory import home
from fedfm.client.policy import KINDS, Policy
from fedfm.coordination import Coordination
from fedfm.data import Data
from fedfm.engines import Embedded, Nats
from fedfm.federation import Federation
from fedfm.local import SGD
from fedfm.run.folder import SPLIT
from fedfm.run.loop import resume, run
from fedfm.run.result import Result
from fedfm.tasks import Classification
from fedfm.testing import tiny
from fedfm.testing.broker import server
from fedfm.testing.parts import same
from fedfm.testing.silos import Silos
from fedfm.tuning import LoRA
from fedfm.verbs import Describe

try:
    server()
except MissingExtra as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.slow
OWNERS = ("anna", "bela")
# In the order in which they appear, which is not the one in which they sort; none has all of them.
LABELS = {"anna": ("sore", "fit"), "bela": ("fit", "ill", "ähnlich")}


def rows(owner: str, text: str = "text", label: str = "label") -> list[dict[str, str]]:
    labels = LABELS[owner]
    return [{text: tiny.TEXT[(7 * i + len(labels)) % 256], label: labels[i % len(labels)]} for i in range(9 + len(labels))]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"owner": owner, **row}) + "\n" for owner in OWNERS for row in rows(owner)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(folder / "cache"))
        yield Federation(
            model=tiny.spec("Bert", num_hidden_layers=1),
            data=Data(str(path), by="owner", test_fraction=0.3),
            task=Classification(max_length=16),
            tuning=LoRA(r=2),
            local=SGD(lr=0.1, steps=2, batch_size=2),
            engine=Embedded(bank=1, device="cpu"),
            rounds=2,
        )


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory, federation: Federation) -> Iterator[Silos]:
    """Two members, of whom one has columns of its own."""
    every = {"anna": rows("anna"), "bela": rows("bela", "remark", "kind")}
    policies = {"bela": Policy.open(columns={"text": "remark", "label": "kind"})}
    with Silos(tmp_path_factory.mktemp("silos"), every, policies, torch.get_num_threads()) as consortium:
        consortium.start()
        yield consortium


def over(federation: Federation, silos: Silos, tmp_path: Path) -> Federation:
    """The recipe at the coordinator, where no data is."""
    engine = Nats(str(silos.home("coordinator")), device="cpu")
    return replace(federation, engine=engine, data=replace(federation.data, source=str(tmp_path / "nowhere.jsonl")))


def test_a_run_whose_classes_the_members_tell_has_the_numbers_of_the_embedded_engine(
    federation: Federation, silos: Silos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, (expected, _) = run(federation, out=tmp_path / "embedded")
    remote = over(federation, silos, tmp_path)
    *_, (state, record) = run(remote, out=tmp_path / "remote")
    assert not record.failures and same(state.params, expected.params)
    assert (tmp_path / "remote" / SPLIT).read_text() == (tmp_path / "embedded" / SPLIT).read_text()
    notes = [json.loads(line) for line in (tmp_path / "remote" / "journal.jsonl").read_text().splitlines()]
    assert [note["labels"] for note in notes if note["event"] == "labels"] == [["fit", "ill", "sore", "ähnlich"]]
    assert Result.open(tmp_path / "remote", device="cpu").foundation.labels == ("fit", "ill", "sore", "ähnlich")
    page = (tmp_path / "remote" / "report.html").read_text()
    assert all(word in page for word in (*OWNERS, "ähnlich")), "the split picture is drawn from what the members told"

    def never(*_: object) -> None:
        raise AssertionError("a run that goes on asks nobody for its classes")

    monkeypatch.setattr(Describe, "classes", never)
    *_, (further, _) = resume(tmp_path / "remote", rounds=3)
    *_, (unbroken, _) = resume(tmp_path / "embedded", rounds=3)
    assert same(further.params, unbroken.params)


def test_classes_that_the_recipe_names_are_not_asked(federation: Federation, silos: Silos, tmp_path: Path) -> None:
    """In the recipe's own order, with one that nobody has."""
    named = replace(federation, task=Classification(max_length=16, labels=("ähnlich", "sore", "none", "ill", "fit")), rounds=1)
    *_, (expected, _) = run(named, out=tmp_path / "embedded")
    before = names_released(silos)
    *_, (state, _) = run(over(named, silos, tmp_path), out=tmp_path / "remote")
    assert same(state.params, expected.params)
    assert (tmp_path / "remote" / SPLIT).read_text() == (tmp_path / "embedded" / SPLIT).read_text()
    assert names_released(silos) == before
    asked(federation, silos, *OWNERS)
    assert names_released(silos) == before + 1, "whoever is asked has it in the log"


def names_released(silos: Silos) -> int:
    """How often anna told the names of her classes."""
    log = [json.loads(line) for line in (home(silos.home("anna"), "anna") / "log.jsonl").read_text().splitlines()]
    return sum(
        line["event"] == "release" and "told" in line["leaves"]["tensors"] and "classes" in line["leaves"]["tensors"]["told"]["names"]
        for line in log
    )


def test_a_channel_that_shows_sums_alone_carries_no_names(federation: Federation, silos: Silos, tmp_path: Path) -> None:
    site = Coordination.build(over(replace(federation, channel=Masks()), silos, tmp_path), OWNERS)
    with site.open() as session, pytest.raises(ConfigError, match=r"names of classes cannot be added.*labels"):
        Describe().classes(site.federation.channel, session, OWNERS, site.key)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, federation: Federation) -> Iterator[Silos]:
    """Members who withhold labels, have no such column, name a wrong one, or have one class alone."""
    kept = tuple(kind for kind in KINDS if kind not in ("labels", "reasons"))
    one = [{**row, "label": "fit"} for row in rows("anna")]
    every = {
        "cleo": rows("anna"),
        "dora": [{"secret note": row["text"], "label": row["label"]} for row in rows("anna")],
        "emil": rows("anna"),
        "fred": one,
    }
    policies = {
        "cleo": Policy.open(may_leave=kept),
        "dora": Policy.open(may_leave=kept),
        "emil": Policy.open(columns={"text": "text", "label": "diagnosis"}, may_leave=kept),
    }
    with Silos(tmp_path_factory.mktemp("odd"), every, policies, torch.get_num_threads()) as consortium:
        consortium.start()
        yield consortium


def asked(federation: Federation, silos: Silos, *members: str) -> tuple[str, ...]:
    engine = Nats(str(silos.home("coordinator")), device="cpu")
    return Coordination.build(replace(federation, engine=engine), members).ask_classes()


def test_a_member_that_withholds_its_labels_is_named_with_the_remedy(federation: Federation, odd: Silos) -> None:
    with pytest.raises(ConfigError, match=r"cleo may not tell those of its rows.*Name all classes in the recipe.*labels: \["):
        asked(federation, odd, "cleo", "fred")
    log = (home(odd.home("cleo"), "cleo") / "log.jsonl").read_text()
    assert "sore" not in log and '"withheld":["classes"]' in log.replace(" ", "")


def test_members_without_a_column_are_named_each_with_its_own_message(federation: Federation, odd: Silos) -> None:
    """Though their policies keep reasons; the message holds the task's word for the column and not the owners'."""
    with pytest.raises(DataError) as caught:
        asked(federation, odd, "dora", "emil", "fred")
    text = str(caught.value)
    assert "dora does not say what it has (start): its rows have no column 'text'" in text and "its policy can name another column" in text
    assert "emil does not say what it has (start): its rows have no column 'label'" in text and "names for it is not there" in text
    assert "secret" not in text and "diagnosis" not in text and "fred does" not in text
    log = (home(odd.home("dora"), "dora") / "log.jsonl").read_text()
    assert '"event":"failure"' in log.replace(" ", "") and "no column 'text'" in log


def test_one_class_is_none(federation: Federation, odd: Silos) -> None:
    with pytest.raises(ConfigError, match=r"the same class \(fit\)"):
        asked(federation, odd, "fred")

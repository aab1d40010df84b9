"""Every example of the course runs, and its numbers show what its text says."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
COURSE = sorted(path.stem for path in FOLDER.glob("0*.py"))


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each test has an empty cache, as a newcomer has."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(FOLDER)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def play(name: str) -> Any:
    return importlib.import_module(name).main(quick=True)


def test_the_first_round_and_the_next_learn() -> None:
    before, after_one, after_two = play("01_first_round")
    assert before > after_one > after_two


def test_your_own_data_is_seen_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    table = play("02_your_own_data")
    assert {row["owner"] for row in table.owners} == {"argparse", "datetime", "decimal", "logging", "threading"}
    assert table.pooled["federated"]["loss"] < table.pooled["before"]["loss"]
    iid, _, skewed, _ = re.split(r"^(?:Dirichlet|by ).*\n", capsys.readouterr().out.partition("IID(clients=5)\n")[2], flags=re.M)
    assert kinds(iid) == [3] * 5, "every owner has all of them"
    assert len(kinds(skewed)) == 5 and min(kinds(skewed)) == 1, "some owner has one"


def kinds(picture: str) -> list[int]:
    """How many different kinds of rows each owner in a picture has."""
    return [len(set(line.split()[-1])) for line in picture.splitlines() if " rows " in line]


def test_variants_differ_in_one_part() -> None:
    losses = play("03_variants")
    assert list(losses) == ["FedAvg", "FedAvgM", "FedAdam", "FedProx"]
    assert losses["FedAvgM"] == losses["FedAvg"], "in the first round there is no momentum yet"
    assert all(map(math.isfinite, losses.values())) and len(set(losses.values())) == 3


def test_liars_spoil_the_mean_and_not_the_robust_rules() -> None:
    losses = play("04_a_lying_client")
    honest, lied = losses.pop("Mean")
    assert lied > honest + 0.1
    assert all(abs(lied - honest) < 0.02 for honest, lied in losses.values())


def test_nobody_lies_unless_asked_to() -> None:
    course, liars = (importlib.import_module(name) for name in ("course", "04_a_lying_client"))
    plan = course.base(quick=True)
    assert course.loss(course.play(plan)) == course.loss(course.play(liars.replace(plan, engine=liars.Liars(plan.engine))))


def test_fewer_bytes_cost_little() -> None:
    weighed = play("05_fewer_bytes")
    weights = [weight for _, weight in weighed.values()]
    assert weights == sorted(weights, reverse=True) and weights[0] > 10 * weights[-1]
    whole, _ = weighed.pop("float32")
    assert all(abs(weighed[name][0] - whole) < 0.02 for name in ("bfloat16", "int8", "int4"))


def test_scaffold_goes_further_than_fedavg() -> None:
    losses = play("06_drift")
    assert losses["SCAFFOLD"][0] == losses["FedAvg"][0], "they start from the same model"
    assert losses["SCAFFOLD"][-1] < losses["FedAvg"][-1] - 0.02


def test_a_technique_of_ten_lines_is_a_part_like_any_other() -> None:
    (whole, all_bytes), (held, half) = play("07_your_own_technique").values()
    assert 0.4 < half / all_bytes < 0.7
    assert abs(held - whole) < 0.1


def test_the_result_is_at_home_elsewhere() -> None:
    apart, text = play("08_take_it_home")
    assert apart < 1e-4
    assert len(text) > len("def __init__(self, ")


def test_the_course_lists_its_files() -> None:
    listed = re.findall(r"\]\((0\d_\w+)\.py\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert listed == COURSE

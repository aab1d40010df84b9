"""Reports: a run as a page, and its comparison as a table."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfm.core.errors import RunError
from fedfm.core.journal import Journal
from fedfm.reports import comparison_lines, comparison_table, render, svg, table

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)  # fmt: skip
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The page's elements and visible text; fails where a tag is left open, closed twice, or loads something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"
        assert not {"script", "img", "link", "iframe", "object", "embed"} & set(self.tags)
        assert not [
            item for item in self.attributes if item[0] in ("src", "href", "xlink:href", "srcset", "action") or item[0].startswith("on")
        ]
        assert "url(" not in text and "@import" not in text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


def line(round: int, losses: dict[str, Any], failures: list[Any] | None = None) -> dict[str, Any]:
    seen = [x for x in losses.values() if isinstance(x, float)]
    report = {
        "pooled": {"loss": sum(seen) / len(seen) if seen else None, "accuracy": 0.5 + 0.1 * round},
        "owners": {owner: {"loss": x} for owner, x in losses.items()},
    }
    return {
        "round": round, "cohort": list(losses) if round else [], "failures": failures or [], "clients": {owner: {"tokens": 500.0, "weight": 1.0} for owner in losses},
        "metrics": {"train_loss": 2.0, "eval": report}, "bytes_up": 1000 * round, "bytes_down": 2000 * round, "seconds": {"train": 1.5, "evaluate": 0.5},
    }  # fmt: skip


def write(folder: Path, rounds: list[dict[str, Any]] | None = None, **files: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "recipe.yaml").write_text("# ours\nname: quick\nrounds: 3\ntuning:\n  LoRA: {r: 8}\n")
    if rounds is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rounds))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def begun(folder: Path, **told: Any) -> Journal:
    """A journal with its first line."""
    journal = Journal(folder / "journal.jsonl")
    journal.add("start", time="2026-01-01", fedfm="1", torch="2", threads=2, recipe="0", **told)
    return journal


def page(folder: Path) -> Page:
    return Page(render(folder).read_text(encoding="utf-8"))


def table_row(owner: str, **losses: float) -> dict[str, Any]:
    ways = {"before": 4.0, "local": 3.0, "federated": 3.5, "centralised": 2.5, **losses}
    return {"owner": owner, **{way: {"loss": x} for way, x in ways.items()}}


def comparison(owners: int = 2) -> dict[str, Any]:
    rows = [table_row(f"o{i}", local=3.0 + i) for i in range(owners)]
    pooled = {key: {"loss": x} for key, x in {"before": 4.0, "local": 3.0, "federated": 2.6, "centralised": 2.5}.items()}
    return {
        "owners": rows,
        "pooled": pooled,
        "travelled": {"bytes_up": 1_000_000, "bytes_down": 1_000_000, "bytes_if_full_model": 200_000_000},
        "seconds": {},
    }


# --- the page


def test_a_whole_run_reads_from_the_headline_to_the_recipe(tmp_path: Path) -> None:
    failure = {"client": "bob", "stage": "train", "reason": "out of memory"}
    rounds = [line(k, {"ana": 4.0 - k, "bob": 5.0 - k}, [failure] if k == 2 else None) for k in range(3)]
    rounds[1]["metrics"]["eval"]["failed"] = {"ana": "test data unreadable"}
    split = [
        {"owner": "ana", "train": 90, "test": 10, "tokens": 12345, "labels": {"yes": 60, "no": 30}},
        {"owner": "bob", "train": 9, "test": 1, "tokens": 99, "labels": {"no": 9}},
    ]
    ledger = {
        "bytes_up": 3000,
        "bytes_down": 6000,
        "tokens": 2000,
        "flops": 3 * 10**12,
        "peak_memory": 5 * 10**8,
        "seconds": 6.0,
        "privacy": [{"epsilon": 1.5, "text": "epsilon 1.5 at delta 1e-05 for one row"}],
    }
    folder = write(tmp_path / "run", rounds, split=split, ledger=ledger, compare=comparison())
    journal = begun(folder, versions={"torch": "2.13.0"})
    journal.add("plan", bank=16)
    with journal.path.open("a") as file:
        file.write('{"event": "rou')
    found = page(folder)
    for part in (
        "2 rounds across 2 owners brought the held\u2011out loss down from 4.500 to 2.500 (-44.4 %).", "federating closes 80 % of the gap", "from 50.0 %", "Worst owner", "2 answers failed; 4 updates were asked for", "test data unreadable",
        "1 of 2 owners gains by federating; o0 loses", "100 times as much", "12.3 k tokens", "out of memory", "3.00 TFLOP", "500 MB", "epsilon 1.5 at delta 1e-05 for one row", "versions.torch", "2.13.0", "16", "LoRA", "local-only",
    ):  # fmt: skip
        assert part in found.text, part
    assert found.tags.count("svg") >= 1 + 2 + 2  # the curves, an owner each, a comparison each
    assert any(name == "aria-label" and "pooled from 4.500 to 2.500" in value for name, value in found.attributes)


def test_all_text_from_data_is_escaped(tmp_path: Path) -> None:
    evil = '</svg><script>alert("1")</script><b x="\'{{ 7*7 }}\x1b[31m'
    rows = comparison(1)
    rows["owners"][0]["owner"] = evil
    folder = write(
        tmp_path, [line(k, {evil: 4.0 - k, "b": 2.0}, [{"client": evil, "stage": evil, "reason": evil}]) for k in range(3)],
        split=[{"owner": evil, "train": 1, "test": 1, "tokens": 5, "labels": {evil: 1, "other": 2}}], compare=rows, ledger={evil: evil},
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(f"name: {json.dumps(evil)}\n{evil}: {evil}\n# {evil}\n")
    begun(folder, **{evil: {evil: evil}})
    found = page(folder)
    assert found.text.count('<script>alert("1")</script>') >= 6 and "{{ 7*7 }}" in found.text
    assert "\x1b[31m" not in found.text.split("The recipe")[0]


@pytest.mark.parametrize(
    ("rounds", "headline"),
    [
        (None, "Nothing has been trained yet."),
        ([], "Nothing has been trained yet."),
        ([line(0, {"ana": 3.0})], "Before training, the held\u2011out loss across 1 owner is 3.000."),
        ([line(0, {"ana": 3.0}), line(1, {"ana": 3.5})], "1 round across 1 owner took the held\u2011out loss up from 3.000 to 3.500 (+16.7 %)."),
        ([line(0, {"ana": 3.0}), line(1, {"ana": 3.0})], "1 round across 1 owner left the held\u2011out loss at 3.000."),
        ([line(0, {"ana": 3.0}), line(1, {})], "After 1 round across 1 owner there is no finite held\u2011out loss"),
        ([line(0, {"ana": 3.0}), line(1, {"ana": None})], "After 1 round across 1 owner there is no finite held\u2011out loss: the model has diverged"),
        ([line(1, {"ana": 3.0})], "After 1 round across 1 owner the held\u2011out loss is 3.000."),
        ([{"round": 1, "cohort": ["a", "b"], "metrics": {"train_loss": 2.0}}], "1 round across 2 owners: training loss from 2.000 to 2.000, nothing evaluated."),
        ([{"round": 1}], "1 round: no loss was recorded."),
    ],
)  # fmt: skip
def test_the_headline_says_what_happened(tmp_path: Path, rounds: list[dict[str, Any]] | None, headline: str) -> None:
    assert headline in page(write(tmp_path, rounds)).text


def test_a_thousand_owners_are_summarised(tmp_path: Path) -> None:
    names = [f"owner-{i:04}" for i in range(1000)]
    rounds = [line(k, {name: 5.0 - k + i / 1000 for i, name in enumerate(names)}) for k in range(2)]
    split = [{"owner": name, "train": 10, "test": 1, "tokens": 1000 - i, "labels": {}} for i, name in enumerate(names)]
    found = page(write(tmp_path, rounds, split=split, compare=comparison(1000)))
    assert "24 of 1000 owners" in found.text and "middle 80 %" in found.text and "smallest of 1000" in found.text
    assert "owner-0000" in found.text and "owner-0999" in found.text  # the largest and the worst
    assert (tmp_path / "report.html").stat().st_size < 200_000


def test_losses_that_are_not_numbers_are_gaps(tmp_path: Path) -> None:
    losses = [3.0, None, float("nan"), float("inf"), "x", 2.0]
    found = page(write(tmp_path, [line(k, {"ana": x, "bob": 2.5}) for k, x in enumerate(losses)]))
    assert "2 owners" in found.text and not any(
        "nan" in value or "inf" in value for name, value in found.attributes if name in ("d", "points", "cx", "cy", "x", "y")
    )


def test_a_resumed_round_counts_once_and_a_torn_line_not_at_all(tmp_path: Path) -> None:
    folder = write(tmp_path, [line(0, {"ana": 4.0}), line(1, {"ana": 9.0}), line(1, {"ana": 3.0})])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "coh')
    assert "from 4.000 to 3.000" in page(folder).text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        JSON
        | st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("round", "cohort", "failures", "clients", "metrics", "seconds", "bytes_up"), JSON)
        ),
        max_size=3,
    ),
    JSON,
    JSON,
    JSON,
    JSON,
)
def test_any_json_makes_a_page(lines: list[Any], split: Any, ledger: Any, compare: Any, journal: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), lines, split=split, ledger=ledger, compare=compare)
        begun(path, told=json.loads(json.dumps(journal), parse_constant=str))
        page(path)


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))), st.lists(st.floats(), min_size=1, max_size=4))
def test_any_owner_and_any_losses_make_a_page(owner: str, losses: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            "owners": [{"owner": owner, "before": {"loss": losses[0]}, "local": {"loss": losses[-1]}}],
            "pooled": {"before": {"loss": losses[0]}, "local": {"loss": losses[-1]}},
        }
        split = [{"owner": owner, "train": 1, "test": 1, "tokens": losses[0], "labels": {owner: losses[0]}}]
        page(write(Path(folder), [line(k, {owner: x, "b": 1.0}) for k, x in enumerate(losses)], compare=rows, split=split))


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run's folder"):
        render(tmp_path / "absent")
    folder = write(tmp_path, [line(0, {"ana": 3.0})])
    (folder / "metrics.jsonl").write_text('{"round": 0}\n{oops\n{"round": 1}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2, is not JSON"):
        render(folder)
    (folder / "metrics.jsonl").write_text('{"round": 0}\n')
    (folder / "journal.jsonl").write_text('{"event":"start"}\n')
    with pytest.raises(RunError, match=r"journal.jsonl:1 is damaged"):
        render(folder)


def test_the_module_renders_without_torch(tmp_path: Path) -> None:
    folder = write(tmp_path, [line(0, {"ana": 3.0})])
    code = f"import sys, runpy; sys.argv = ['fedfm.reports', {str(folder)!r}]; runpy.run_module('fedfm.reports', run_name='__main__'); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(Path(svg.__file__).parents[2])}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.html")


# --- pictures


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 12))
def test_ticks_are_round_few_and_inside(low: float, span: float, at_most: int) -> None:
    found = svg.ticks(low, low + span, at_most)
    assert 1 <= len(found) <= at_most + 1
    assert found == sorted(set(found))
    assert all(low - 0.01 * span <= x <= low + 1.01 * span for x in found)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=8))
def test_labels_at_the_ends_do_not_overlap(values: list[float]) -> None:
    drawn = svg.chart([svg.Line(f"line {i}", "federated", [(0.0, 1.0), (1.0, y)]) for i, y in enumerate(values)])
    parser = Labels()
    parser.feed(drawn)
    places = sorted(parser.places)
    assert len(places) == len(values)
    assert all(b - a > 15 for a, b in zip(places, places[1:]))  # noqa: RUF007


class Labels(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.places: list[float] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if (found.get("class") or "").startswith("label"):
            self.places.append(float(found["y"] or 0))


# --- the comparison


def test_the_comparison_as_lines() -> None:
    assert comparison_lines(comparison()) == [
        "loss                 before   local-only    federated  centralised",
        "o0                    4.000        3.000        3.500        2.500",
        "o1                    4.000        4.000        3.500        2.500",
        "------------------------------------------------------------------",
        "mean of owners        4.000        3.500        3.500        2.500",
        "pooled test           4.000        3.000        2.600        2.500",
        f"On own test data 1 of 2 owners gains by federating; o0 loses (loss 3.500 alone, 3.500 federated, in the mean over owners). {table.REMEDY}",
        "On everybody's test data, models tuned alone reach loss 3.000 on average, the federated one 2.600, one tuned on all data in one place 2.500: federating closes 80 % of the gap.",
        "Travelled: 1.00 MB up and 1.00 MB down; sending the whole model would have been 200 MB (100 times as much).",
    ]


def test_a_federation_that_beats_pooled_data_closes_no_share_of_a_gap() -> None:
    ways = {"before": {"loss": 4.0}, "local": {"loss": 3.0}, "federated": {"loss": 2.0}, "centralised": {"loss": 2.8}}
    assert table.pooled_verdict({"pooled": ways}).endswith("federating does better than both.")


def test_the_comparison_on_a_terminal_names_what_it_leaves_out() -> None:
    from rich.console import Console

    file = io.StringIO()
    rows = comparison(30)
    rows["owners"][0]["owner"] = "[red]o\x1b[31m"
    Console(file=file, width=140).print(comparison_table(rows))
    assert "and 10 more owners" in file.getvalue() and "[red]o" in file.getvalue() and "\x1b" not in file.getvalue()
    assert any("and 10 more owners" in text for text in comparison_lines(rows))


def test_an_unfinished_comparison_is_shown_as_far_as_it_goes() -> None:
    assert comparison_lines({}) == []
    assert comparison_lines({"owners": [{"owner": "a", "before": None}], "pooled": None}) == [
        "loss       before   local-only    federated  centralised",
        "a               -            -            -            -",
    ]


def test_a_federation_that_does_not_pay_is_told_so() -> None:
    compare = comparison()
    compare["pooled"]["federated"]["loss"] = 3.2
    assert table.verdict(compare).endswith("federating did not pay there.")
    assert table.gap_closed(table.Row("x", 4.0, 2.0, 1.0, 2.5)) is None  # nothing to close where pooling does not help
    assert table.gap_closed(table.Row("x", 4.0, 3.0, 2.5, 2.5)) == 1.0


# --- the verdict and the table say the same ------------------------------------------------------------------------


def medical() -> dict[str, Any]:
    """Nine institutes, eight of which do better alone on their own test, while on everybody's data the federated model is better."""
    rows = [table_row(f"institute {i}", local=2.45, federated=3.0) for i in range(8)] + [table_row("registry", local=3.0, federated=2.6)]
    pooled = {key: {"loss": x} for key, x in {"before": 5.0, "local": 4.0, "federated": 2.9, "centralised": 2.5}.items()}
    return {"owners": rows, "pooled": pooled}


def test_where_owners_do_better_alone_the_verdict_says_so_first_and_what_to_try() -> None:
    text = table.verdict(medical())
    assert text.startswith("On own test data 8 of 9 owners do better alone; registry gains (loss 2.511 alone, 2.956 federated"), text
    assert text.index(table.REMEDY) < text.index("On everybody's test data")
    assert "federating closes 73 % of the gap" in text.partition("On everybody's test data")[2]


@given(st.lists(st.tuples(st.floats(0.5, 9), st.floats(0.5, 9)), min_size=1, max_size=6), st.booleans())
def test_the_verdict_never_contradicts_the_table(losses: list[tuple[float, float]], lower_is_better: bool) -> None:
    compare = {
        "owners": [table_row(f"o{i}", local=local, federated=federated) for i, (local, federated) in enumerate(losses)],
        "headline": {"name": "loss", "lower_is_better": lower_is_better},
    }
    rows, text = table.owner_rows(compare), table.verdict(compare)
    gain, lose, mean = sum(row.pays for row in rows), sum(row.loses for row in rows), table.mean_row(rows)
    assert ("better alone" in text) == (lose > gain) and (table.REMEDY in text) == (lose > 0)
    assert ("by federating" in text) == (gain > 0 and gain >= lose)
    assert ("but the mean is worse" in text) == (gain >= lose and gain > 0 and mean.loses)
    if len(losses) > 1 and gain != lose:
        assert f"{max(gain, lose)} of {len(losses)} owners" in text


def test_accuracy_leads_where_the_task_says_so_and_higher_is_better(tmp_path: Path) -> None:
    headline = {"name": "accuracy", "lower_is_better": False}
    ways = {"before": 0.5, "local": 0.8, "federated": 0.7, "centralised": 0.9}
    compare = {
        "owners": [{"owner": name, **{way: {"loss": 9 - 9 * x, "accuracy": x} for way, x in ways.items()}} for name in ("ana", "bob")],
        "pooled": {way: {"loss": 9 - 9 * x, "accuracy": x, "macro_f1": x / 2} for way, x in ways.items()},
        "headline": headline,
        "everybody": {"examples": 512, "of": 20_000, "error": {"federated": 0.02}},
    }
    lines = comparison_lines(compare)
    assert lines[0].split()[0] == "accuracy" and lines[1].split() == ["ana", "50.0", "%", "80.0", "%", "70.0", "%", "90.0", "%"]
    assert any("2 of 2 owners do better alone (accuracy 80.0 % alone, 70.0 % federated" in text for text in lines)
    assert any("512 of 20.0 k examples" in text and "federated 2.0 %" in text for text in lines)
    rounds = [line(k, {"ana": 3.0 - k, "bob": 4.0 - k}) for k in range(3)]
    for k, item in enumerate(rounds):
        item["metrics"]["eval"] |= {"headline": headline, "owners": {"ana": {"accuracy": 0.4 + k / 10}, "bob": {"accuracy": 0.9}}}
    found = page(write(tmp_path, rounds, compare=compare))
    for part in (
        "brought the held\u2011out accuracy up from 50.0 % to 70.0 % (+20.0 points)",
        "Accuracy by round",
        "Loss by round",
        "macro F1",
    ):
        assert part in found.text, part
    assert found.text.index("Held-out accuracy") < found.text.index("Held-out loss")

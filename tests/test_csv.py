"""Excel's csv and others': what divides the values and how characters are written is found, or given, and never guessed behind one's back."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import Fedfm, call, refused  # noqa: F401 (a fixture)

from fedfm.core.check import check
from fedfm.core.errors import ConfigError, DataError, RowError
from fedfm.data import Data
from fedfm.data.csv_file import SAMPLE, find_format
from fedfm.data.sources import open_source
from fedfm.federation import Federation
from fedfm.recipe import dump, load
from fedfm.testing.tiny import spec

ROWS = [
    {"who": "Zoë", "text": 'He said "no",\nthen left; for 3,5 km | or so', "label": "1,5"},
    {"who": "Jürgen Müller", "text": "Straße, Äpfel; Öl", "label": "2,25"},
    {"who": "Renée", "text": "ça va, déjà vu", "label": "0,5"},
    {"who": "bob", "text": "plain", "label": "3"},
]


def written(rows: list[dict[str, str]], delimiter: str, newline: str = "\r\n") -> str:
    """As Excel writes: quotes only where they are needed."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read(path: Path, **given: str) -> list[dict[str, str]]:
    return [dict(row) for row in open_source(str(path), **given).rows()]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_rows_are_the_same_however_they_are_written(delimiter: str, encoding: str, newline: str, tmp_path: Path) -> None:
    text = written(ROWS, delimiter, newline)
    for name in ("rows.csv", "rows.csv.gz", "ROWS.CSV"):
        data = text.encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        assert read(tmp_path / name) == ROWS
        form = find_format(tmp_path / name)
        assert form.delimiter == delimiter and form.encoding == encoding.removesuffix("-sig")


def test_a_big_endian_file_and_one_of_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xfe\xff" + written(ROWS, ";").encode("utf-16-be"))
    (tmp_path / "a.tsv").write_text(written(ROWS, "\t"), newline="")
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(written(ROWS, "\t").encode()))
    assert read(tmp_path / "a.csv") == read(tmp_path / "a.tsv") == read(tmp_path / "a.tsv.gz") == ROWS
    assert "tab between values (as .tsv has it), encoding utf-8" in open_source(str(tmp_path / "a.tsv")).about


words = st.text(st.characters(codec="cp1252", exclude_categories=["Cc", "Cf", "Cs"]), max_size=12)


@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=12), st.sampled_from(",;\t|"))
def test_what_was_found_reads_what_was_written(values: list[tuple[str, str, str]], delimiter: str) -> None:
    import tempfile

    rows = [{"who": f"w{a}", "text": b, "label": c} for a, b, c in values]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        path.write_text(written(rows, delimiter), encoding="utf-8", newline="")
        assert read(path) == rows


def test_commas_in_numbers_and_in_prose_divide_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("wer;wert;text\n" + "ann;1,5;Ja, gut, schön\n" * 50 + "bob;2,5;Nein\n")
    assert read(path)[0] == {"wer": "ann", "wert": "1,5", "text": "Ja, gut, schön"}
    path.write_text("text\nHello, world\nGood; or bad\nOne | two\n")
    assert [row["text"] for row in read(path)] == ["Hello, world", "Good; or bad", "One | two"]
    path.write_text("who,text\nann,one\nbob\ncy,three\ndan,four\n")
    assert find_format(path).delimiter == ",", "a row with a value too few does not make it a file of one column"


def test_what_excel_leaves_behind(tmp_path: Path) -> None:
    """Its own first line, columns that once were, and rows that were emptied."""
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfsep=|\r\nwho|text||\r\nann|a||\r\n|||\r\nbob|b||\r\n\r\n")
    assert read(tmp_path / "a.csv") == [{"who": "ann", "text": "a"}, {"who": "bob", "text": "b"}]
    rows = list(open_source(str(tmp_path / "a.csv")).rows())
    assert [row.where.rpartition(":")[2] for row in rows] == ["3", "5"]
    assert "pipe between values (found: the file says so)" in open_source(str(tmp_path / "a.csv")).about


def test_what_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("who,more;text\nann,x;a\nbob,y;b\n")
    with pytest.raises(DataError, match=r"comma and semicolon do equally well.*Tried: comma, semicolon, tab, pipe.*data\.delimiter="):
        open_source(str(path))
    assert read(path, delimiter=";")[0] == {"who,more": "ann,x", "text": "a"}
    path.write_text("who^text\nann^a,b\n")
    assert read(path, delimiter="^") == [{"who": "ann", "text": "a,b"}]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("cp1251", "Привет, как дела? Хорошо."), ("shift_jis", "日本語のテキストです"), ("cp1253", "Καλημέρα κόσμε, τι κάνεις")],
)
def test_an_encoding_that_is_not_western_is_not_taken_for_it(encoding: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"who;text\nann;fine\nann;{text}\n".encode(encoding))
    with pytest.raises(
        DataError, match=r"a\.csv:3: .*Tried: utf-8, in which byte 0x.*; cp1252, in which this line would read.*data\.encoding="
    ):
        open_source(str(path))
    assert read(path, encoding=encoding)[1]["text"] == text


def test_utf16_without_its_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(written(ROWS, ";").encode("utf-16-le"))
    with pytest.raises(DataError, match=r"NUL bytes, as UTF-16 is.*data\.encoding=utf-16-le"):
        open_source(str(tmp_path / "a.csv"))
    assert read(tmp_path / "a.csv", encoding="utf-16-le") == ROWS


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_western_byte_far_down_is_named_and_not_read_as_garbage(packed: bool, tmp_path: Path) -> None:
    plain = b"who;text\r\n" + b"ann;the cat saw the dog\r\n" * (SAMPLE // 20)
    assert len(plain) > SAMPLE
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    data = plain + "bob;ein Café in Köln\r\nann;end\r\n".encode("cp1252")
    path.write_bytes(gzip.compress(data) if packed else data)
    source = open_source(str(path))
    assert "encoding utf-8 (found)" in source.about
    bad_rows: list[RowError] = []
    assert [row["text"] for row in source.rows(bad_rows.append)][-1] == "end"
    (text,) = map(str, bad_rows)
    assert f"{path.name}:{len(plain.splitlines()) + 1}: byte 0xe9 cannot stand here in utf-8" in text
    assert "1,048,576" in text and "'bob;ein Café in Köln'" in text and text.endswith("data.encoding=cp1252")
    assert [row["text"] for row in read(path, encoding="cp1252")][-2:] == ["ein Café in Köln", "end"]


def test_finding_reads_a_bounded_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w") as file:
        file.write("who;text\n")
        file.writelines(f"ann;{'the cat ' * 12}\n" for _ in range(400_000))
    assert path.stat().st_size > 38e6
    tracemalloc.start()
    try:
        assert find_format(path).delimiter == ";"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * SAMPLE


def test_a_character_on_the_edge_of_the_piece_is_not_torn(tmp_path: Path) -> None:
    head = b"who;text\nann;"
    for shift in range(3):
        body = b"x" * (SAMPLE - len(head) - shift) + "€".encode() * 5
        (tmp_path / "a.csv").write_bytes(head + body + b"\n")
        assert find_format(tmp_path / "a.csv").encoding == "utf-8"
        assert read(tmp_path / "a.csv")[0]["text"].endswith("€€€€€")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'who;text\nann;"a" b\n', r"beyond line 1?.*It was read with semicolon between values \(found\), encoding utf-8 \(found\)"),
        (b'who;text\nann;"open\n', r"cannot be read beyond line"),
        (b"who;who\nann;b\n", r"a\.csv:1 names a column twice.*semicolon"),
        (b"who,text\nx,\x81\n", r"a\.csv:2: .*Tried: utf-8.*cp1252"),
    ],
)
def test_messages_name_what_was_tried(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "given", [{"delimiter": ""}, {"delimiter": ";;"}, {"delimiter": '"'}, {"encoding": "klingon"}, {"encoding": "base64"}]
)
def test_values_that_cannot_be(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(given))} is"):
        Data("a.csv", by="who", **given)  # type: ignore[arg-type]


def test_tab_can_be_said_in_words() -> None:
    assert Data("a.csv", delimiter="tab").delimiter == Data("a.csv", delimiter="\\t").delimiter == "\t"


def test_check_shows_what_was_found_and_what_is_of_no_use(call: Fedfm, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"owner": row["owner"], "text": row["text"]} for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())]
    (tmp_path / "rows.csv").write_bytes(written([*rows, {"owner": "ann", "text": "Zoë"}], ";").encode("cp1252"))
    code, out, err = call("check", "recipe.yaml", "data.source=rows.csv", "--data")
    assert code == 0, err
    assert "data.source is read with semicolon between values (found), encoding cp1252 (found: it is not UTF-8)" in out
    _, out, _ = call("check", "recipe.yaml", "data.source=rows.csv", "data.encoding=cp1252", "--data", "--json")
    assert json.loads(out)["read_as"] == {"source": "semicolon between values (found), encoding cp1252 (given)"}
    refused(call("check", "recipe.yaml", "data.source=rows.csv", "data.encoding=utf-8", "--data"), "data.encoding=cp1252")
    plan = Federation(model=spec("Llama"), data=Data("rows.jsonl", by="owner", delimiter=";"))
    assert any("delimiter change nothing" in finding.text for finding in check(plan))


def test_a_damaged_place_does_not_turn_a_file_into_another_encoding(tmp_path: Path) -> None:
    """All that is not ASCII would read as nonsense, as in 'MÃ¼ller'."""
    path = tmp_path / "a.csv"
    path.write_bytes("who;text\nann;Müller, Köln\nbob;schön\n".encode() + b"cy;caf\xe9\n" + "dan;Grüße\n".encode())
    bad_rows: list[RowError] = []
    assert [row["text"] for row in open_source(str(path)).rows(bad_rows.append)] == ["Müller, Köln", "schön", "Grüße"]
    assert re.search(r"a\.csv:4: byte 0xe9 cannot stand here in utf-8.*found, with damaged places", str(bad_rows[0]))


def test_a_tab_survives_being_written() -> None:
    plan = Federation(model=spec("Llama"), data=Data("rows.csv", by="owner", delimiter="tab", encoding="cp1252", bad_rows="skip"))
    assert load(dump(plan)) == plan and plan.data.delimiter == "\t"

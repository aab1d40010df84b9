"""Values in lines (``.csv``, ``.tsv``), as Excel and others write them: what divides the values and how characters are written is found, or given.

What is looked at is the beginning of a file, :data:`SAMPLE` bytes. Nothing is guessed silently afterwards: a byte further down that does not fit
ends the reading, with its place.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedfm.core.errors import DataError, RowError
from fedfm.data.records import Record, Refuse

SAMPLE = 1 << 20
"""Bytes of a file that are looked at, after unpacking."""
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
_WESTERN = "cp1252"
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Signs that stand in Western text beside its letters.
_SIGNS = frozenset("‘’‚‹›“”„–—…•†‡€£¥¢§©®™°±²³¹µ·º ª«»¼½¾¿¡×÷´¨\xa0\xad")
# Rows of the sample that must have as many values as the header.
_AGREE = 0.5
# Characters of a text that an error shows.
_SHOWN = 60


@dataclass(frozen=True)
class Format:
    """How the lines of a file are read.

    Args:
        delimiter: What stands between two values.
        encoding: How characters are written.
        skipped: Lines before the header.
        why: How the delimiter and the encoding are known, for people.
    """

    delimiter: str
    encoding: str
    skipped: int = 0
    why: tuple[str, str] = ("given", "given")

    def words(self) -> str:
        """``semicolon between values (found), encoding cp1252 (found: it is not UTF-8)``."""
        return f"{_name(self.delimiter)} between values ({self.why[0]}), encoding {self.encoding} ({self.why[1]})"

    @property
    def written(self) -> tuple[str, str]:
        """How characters are written, and how that is known."""
        return self.encoding, self.why[1]


def find_format(path: Path, delimiter: str | None = None, encoding: str | None = None) -> Format:
    """The format of a file, from its beginning.

    Args:
        delimiter: Instead of looking for it.
        encoding: Instead of looking for it.

    Raises:
        DataError: if the file cannot be read, or its encoding or delimiter cannot be told, naming what was tried.
    """
    try:
        with _open(path) as file:
            sample = file.read(SAMPLE)
            is_whole = not file.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read beyond line 0: {error}.") from error
    why_encoding = "given"
    if encoding is None:
        encoding, why_encoding = _encoding(path, sample, is_whole)
    try:
        text = _decoded(sample, encoding, is_whole, _errors(encoding))
    except UnicodeError as error:
        raise _undecodable(path, encoding, why_encoding) from error
    hint = re.match(r"sep=(.)\r?(\n|$)", text.removeprefix("\ufeff"))
    if hint is not None:
        # Excel's own line, which tells Excel what divides the values.
        return Format(delimiter or hint[1], encoding, 1, ("given" if delimiter else "found: the file says so", why_encoding))
    if delimiter is None:
        tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
        return Format(
            "\t" if tabs else _delimiter(path, text, is_whole), encoding, 0, ("as .tsv has it" if tabs else "found", why_encoding)
        )
    return Format(delimiter, encoding, 0, ("given", why_encoding))


def read(path: Path, form: Format, refuse: Refuse) -> Iterator[Record]:
    """The rows of a file. Lines without any value are no rows.

    Args:
        refuse: Called with a row that has another number of values than the header, or a byte that cannot stand in the file's encoding.

    Raises:
        DataError: naming the line that cannot be read, and what was tried.
    """
    # The module's default bound of 131,072 characters refuses ordinary documents.
    csv.field_size_limit(2**31 - 1)
    number, is_damaged = 0, False
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding=_codec(form.encoding), errors=_errors(form.encoding), newline="") as file:
            for _ in range(form.skipped):
                file.readline()
            reader = csv.reader(file, delimiter=form.delimiter, strict=True)
            header = next(reader, [])
            if any(map(_is_escaped, header)):
                raise _undecodable(path, *form.written)
            names = _names(path, header, form)
            for values in reader:
                number = reader.line_num + form.skipped
                if not any(values):
                    continue
                if any(map(_is_escaped, values)):
                    place = f"{path}:{number}"
                    # The first one says how the file was read, and what it may be instead.
                    text = (
                        f"{place} holds a byte that cannot stand in {form.encoding}."
                        if is_damaged
                        else str(_undecodable(path, *form.written))
                    )
                    is_damaged = True
                    refuse(RowError(text, "unreadable", place))
                    continue
                if len(values) != len(header):
                    place = f"{path}:{number}"
                    text = f"{place} has {len(values)} values for {len(header)} columns ({', '.join(names)}), with {_name(form.delimiter)} between values."
                    refuse(RowError(text, "unreadable", place))
                    continue
                # An empty name at the end is a column that a spreadsheet once had.
                yield Record(zip(names, values), f"{path}:{number}")
    except UnicodeError as error:
        raise _undecodable(path, *form.written) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read beyond line {number}: {error}.") from error
    except csv.Error as error:
        raise DataError(
            f"{path} cannot be read beyond line {number}: {error}. It was read with {form.words()}. "
            "A value with quotes in it stands in quotes, and each of its own is doubled. If something else divides the values, set data.delimiter."
        ) from error


def _open(path: Path) -> IO[bytes]:
    # The file object that gzip gives reads as one of the others does.
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _names(path: Path, header: list[str], form: Format) -> list[str]:
    names = [name.removeprefix("\ufeff") if i == 0 else name for i, name in enumerate(header)]
    while names and not names[-1].strip():
        names.pop()
    if len(set(names)) < len(names):
        raise DataError(f"{path}:{1 + form.skipped} names a column twice: {', '.join(names)}. It was read with {form.words()}.")
    return names


def _name(delimiter: str) -> str:
    return DELIMITERS.get(delimiter, repr(delimiter))


# --- encoding ------------------------------------------------------------------------------------------------------


def _codec(encoding: str) -> str:
    """The encoding's name for reading: UTF-8 with or without a mark at its beginning."""
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def _errors(encoding: str) -> str:
    """How a byte that cannot stand in an encoding is read: kept as half of a surrogate pair, which no text has. In UTF-16 the rest would be out of step."""
    return "strict" if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")) else "surrogateescape"


def _is_escaped(text: str) -> bool:
    """Whether a byte was kept as half of a surrogate pair."""
    return not text.isascii() and re.search("[\udc80-\udcff]", text) is not None


def _decoded(sample: bytes, encoding: str, is_whole: bool, errors: str = "strict") -> str:
    """The sample as text; half a character at its end is left out where the file goes on."""
    return codecs.getincrementaldecoder(_codec(encoding))(errors).decode(sample, final=is_whole)


def _encoding(path: Path, sample: bytes, is_whole: bool) -> tuple[str, str]:
    for mark, name in _MARKS.items():
        if sample.startswith(mark):
            return name, "found: its mark stands at the beginning"
    if sample.count(0) * 10 > len(sample):
        raise DataError(
            f"{path} is full of NUL bytes, as UTF-16 is, but has no mark at its beginning that says so. "
            "Save it as UTF-8, or say how it is written: data.encoding=utf-16-le"
        )
    try:
        _decoded(sample, "utf-8", is_whole)
    except UnicodeDecodeError as error:
        not_utf8 = error
    else:
        return "utf-8", "found"
    if _reads_western(sample):
        return _WESTERN, "found: it is not UTF-8"
    if _is_damaged(sample):
        return "utf-8", "found, with damaged places"
    number = sample.count(b"\n", 0, not_utf8.start) + 1
    raise DataError(
        f"{path}:{number}: how characters are written cannot be told. Tried: utf-8, in which byte 0x{sample[not_utf8.start]:02x} cannot stand here; "
        f"{_WESTERN}, in which this line would read {_as(sample, not_utf8.start, _WESTERN)}. "
        "Save the file as UTF-8, or say how it is written, such as data.encoding=cp1250 (Central Europe), cp1251 (Cyrillic), shift_jis or gbk."
    )


def _reads_western(sample: bytes) -> bool:
    """Whether a sample makes sense as Windows' Western encoding, in which nearly any bytes are some text: words must be mostly plain letters."""
    try:
        text = sample.decode(_WESTERN)
    except UnicodeDecodeError:
        return False
    if _is_damaged(sample):
        return False
    other = [c for c in text if c > "\x7f"]
    if sum(c.isalpha() or c in _SIGNS for c in other) < 0.9 * len(other):
        return False
    accented = [word for word in re.findall(r"[^\W\d_]+", text) if not word.isascii()]
    letters = sum(map(len, accented))
    return bool(sum(c > "\x7f" for word in accented for c in word) <= 0.6 * letters)


def _is_damaged(sample: bytes) -> bool:
    """Whether it is UTF-8 with damaged places: in another encoding it would read as nonsense everywhere else."""
    return sum(c > "\x7f" for c in sample.decode("utf-8", "ignore")) >= sample.decode("utf-8", "replace").count("\ufffd")


def _undecodable(path: Path, encoding: str, why: str) -> DataError:
    """The error of a file with a byte that cannot stand in its encoding."""
    tried = f"It was read as {encoding} ({why}; the first {SAMPLE:,} bytes are looked at)."
    if encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32")):
        return DataError(f"{path} cannot be read as {encoding}. {tried} Save it as UTF-8, or say how it is written with data.encoding.")
    number, at, line = _first_wrong(path, encoding)
    place = f"{path}:{number}: byte 0x{line[at]:02x} cannot stand here in {encoding}. {tried}"
    if codecs.lookup(encoding).name == _WESTERN or not _reads_western(line):
        return DataError(f"{place} Save the file as UTF-8, or say how it is written with data.encoding, such as data.encoding=cp1250.")
    return DataError(
        f"{place} In {_WESTERN}, which Excel writes, the line would read {_as(line, at, _WESTERN)}. If that is right: data.encoding={_WESTERN}"
    )


def _first_wrong(path: Path, encoding: str) -> tuple[int, int, bytes]:
    """The number of the first line that is not text in ``encoding``, which of its bytes is wrong, and the line, at most a sample's bytes of it."""
    # Not the codec that takes the mark away: it counts bytes from behind the mark.
    name = "utf-8" if codecs.lookup(encoding).name.startswith("utf-8") else encoding
    decoder, number = codecs.getincrementaldecoder(name)(), 1
    with _open(path) as file:
        while True:
            line, held = file.readline(SAMPLE), decoder.getstate()[0]
            try:
                decoder.decode(line, final=not line)
            except UnicodeDecodeError as error:
                return number, error.start, held + line
            assert line, "what could not be read before can be read now"
            number += line.endswith(b"\n")


def _as(data: bytes, at: int, encoding: str) -> str:
    """The text around a byte, in quotes."""
    first = data.rfind(b"\n", 0, at) + 1
    last = data.find(b"\n", at)
    line = data[first : last if last >= 0 else len(data)]
    begin = max(at - first - _SHOWN // 2, 0)
    return repr(line[begin : begin + _SHOWN].decode(encoding, "replace").strip())


# --- delimiter -----------------------------------------------------------------------------------------------------


def _delimiter(path: Path, text: str, is_whole: bool) -> str:
    """What divides the values: the sign with which most rows have as many values as the header.

    Raises:
        DataError: if two signs do equally well.
    """
    shares = {delimiter: _share(text, delimiter, is_whole) for delimiter in DELIMITERS}
    dividing = {delimiter: score for delimiter, score in shares.items() if score[1] > 1 and score[0] >= _AGREE}
    if not dividing:
        # What divides the header is more likely what was meant than a part of a name, and then the rows are told to be wrong.
        dividing = {delimiter: (0.0, score[1]) for delimiter, score in shares.items() if score[1] > 1}
    if not dividing:
        # One column: a sign that divides no row.
        whole = {delimiter: share for delimiter, (share, columns) in shares.items() if columns == 1}
        return max(whole, key=lambda delimiter: whole[delimiter]) if whole else ","
    best = max(dividing.values())
    delimiters = [delimiter for delimiter, score in dividing.items() if score == best]
    if len(delimiters) > 1:
        names = " and ".join(map(_name, delimiters))
        raise DataError(
            f"{path}: what divides the values cannot be told, because {names} do equally well ({best[1]} columns). "
            f"Tried: {', '.join(DELIMITERS.values())}. Say which: data.delimiter={delimiters[0]!r}"
        )
    return delimiters[0]


def _share(text: str, delimiter: str, is_whole: bool) -> tuple[float, int]:
    """The share of rows with as many values as the header, and that number."""
    csv.field_size_limit(2**31 - 1)
    try:
        rows = [values for values in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(values)]
    except csv.Error:
        return 0.0, 0
    # The last row of a sample may be cut.
    rows = rows if is_whole or len(rows) < 3 else rows[:-1]
    if not rows:
        return 1.0, 1
    header, body = len(rows[0]), rows[1:]
    return (sum(len(values) == header for values in body) / len(body) if body else 1.0), header

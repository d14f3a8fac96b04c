"""Rows and values in files of text as they stand: JSON Lines, JSON arrays, tables with a header, plain or gzipped.

What cannot be read comes as a `RejectedRow` in its place, so that every row of a file is accounted for.
"""

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from anchorvec.errors import AnchorvecError
from anchorvec.files import open_bytes

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}

STRAY_QUOTE = "with a stray quote"
"""How a row of a table was mended: its quotes are taken as they stand."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""What Python reads for bytes that are not UTF-8, or for half of a surrogate pair in JSON, such as "\\ud800"."""

_RECORD_LINES = 10_000
"""A record of a table that runs over more lines has a quote that is never closed."""
_CHUNK = 2**20
"""Characters of a JSON array that are read at a time."""
_BETWEEN_MEMBERS = re.compile(r"[\s,]*")


class RejectedRow(Exception):  # noqa: N818 - it never leaves the readers
    """A row that cannot be used: its kind for the counts, and what was found for people."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def text_suffix(path: Path) -> str:
    """The suffix of the name of `path` in small letters, of the one before `.gz` where the file is gzipped."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def open_text(path: Path, newline: str) -> TextIO:
    """The file `path` as text, unzipped, without a byte order mark; a byte that is not UTF-8 becomes a surrogate.

    `newline` is that of `open`. Reading raises AnchorvecError as `open_bytes` says.
    """
    file = open_bytes(path, lines=text_suffix(path) != ".json")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


# JSON


def json_values(path: Path) -> Iterator[tuple[int, object, str]]:
    """Each value of the JSON Lines `path`, or of the array in a file called .json: its line, itself, its own text.

    Raises AnchorvecError where an array breaks off, or has something behind it.
    """
    is_lines = text_suffix(path) != ".json"
    with open_text(path, newline="\n") as file:
        text = "" if is_lines else file.read(_CHUNK)
        yield from _members(file, text) if text.lstrip().startswith("[") else _lines(file, text)


def one_json_object(path: Path) -> Mapping[str, object] | RejectedRow | None:
    """The object that the .json file `path` is, where it stands on several lines; None: the file is something else."""
    if text_suffix(path) != ".json":
        return None
    with open_text(path, newline="\n") as file:
        text = file.read(_CHUNK).lstrip()
        if not text.startswith("{") or _is_json(text.partition("\n")[0]):
            return None
        text += file.read()
    return json_object(json.loads(text, object_pairs_hook=_object), text) if _is_json(text) else None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(file: TextIO, begin: str) -> Iterator[tuple[int, object, str]]:
    """Each line of the text `begin` and the rest of `file`: its number, what it says in JSON, and the line itself."""
    begin += file.readline() if begin and not begin.endswith("\n") else ""
    for line, text in enumerate(itertools.chain(io.StringIO(begin, newline="\n"), file), start=1):
        try:
            yield line, json.loads(text, object_pairs_hook=_object), text
        except (ValueError, RecursionError) as error:
            what = f"not one JSON object on one line ({error})"
            kind = "unparsable" if text.strip() else "empty"
            yield line, RejectedRow(kind, what if text.strip() else "a blank line"), text


def _members(file: TextIO, text: str) -> Iterator[tuple[int, object, str]]:
    """Each member of the JSON array in `text` and the rest of `file`, in the form of `_lines`, read a part at a time.

    Raises AnchorvecError where the array breaks off, for it cannot be resumed, and where something stands behind it.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    before, at, line, size = 0, text.index("[") + 1, 1, _CHUNK
    while True:
        at = _BETWEEN_MEMBERS.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        line += text.count("\n", before, at)
        before = at
        if text.startswith("]", at):
            if (text[at + 1 :] + file.read()).strip():
                raise AnchorvecError(f"{file.name}:{line}: something stands behind the array; write one array alone")
            return
        try:
            member, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            more = file.read(size)
            if not more:
                raise AnchorvecError(f"{file.name}:{line}: this is no JSON array of objects ({error})") from error
            text, before, at, size = text[at:] + more, 0, 0, 2 * size  # so that no member is read over and over
            continue
        yield line, member, text[at:end]
        line += text.count("\n", at, end)
        before = at = end


class _NameTwice(dict[str, object]):
    """An object of JSON with two members of one name, of which `json` keeps the last."""


def _object(members: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(members)
    return row if len(row) == len(members) else _NameTwice(row, **{"": twice([name for name, _ in members])})


def json_object(row: object, text: str) -> Mapping[str, object] | RejectedRow:
    """`row` if it can be a row; `text` is what it was read from."""
    if SURROGATE.search(text):
        return RejectedRow("not UTF-8", "bytes that are not UTF-8")
    if not isinstance(row, dict):
        return RejectedRow("unparsable", f"a JSON {type(row).__name__}, not an object; write one object for each row")
    if isinstance(row, _NameTwice):
        return RejectedRow("unparsable", f'the name "{row[""]}" is there twice')
    return row


# Tables


@contextmanager
def open_table(path: Path) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str] | RejectedRow, str]]]]:
    """The header of the CSV or TSV file `path` and, one by one, its records: first line, fields, how it was mended."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    delimiter = next(DELIMITERS[suffix] for suffix in reversed(suffixes) if suffix in DELIMITERS)
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    try:
        with open_text(path, newline="") as file:
            header = next(csv.reader(iter(file.readline, ""), delimiter=delimiter, strict=True), [])
            yield header, _records(file, delimiter, len(header))
    finally:
        csv.field_size_limit(limit)


class _LinesAhead:
    """The lines of a file that are left; the `taken` first ones were read for a record, and may be given back."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.lines, self.taken = file, [file.readline()], 0

    def __iter__(self) -> Iterator[str]:
        for self.taken in range(_RECORD_LINES):
            if self.taken == len(self.lines):
                self.lines.append(self.file.readline())
            if not self.lines[self.taken]:
                return
            yield self.lines[self.taken]
        self.taken = _RECORD_LINES

    def drop(self, lines: int) -> None:
        self.lines = self.lines[lines:] or [self.file.readline()]


def _records(file: TextIO, delimiter: str, width: int) -> Iterator[tuple[int, list[str] | RejectedRow, str]]:
    """Each record of a table of `width` columns, after its header, with its first line and how it was mended.

    A quote that is never closed, or only by one of a later record, would take all records between into one. What
    spans lines and is no record is therefore its first line alone, read with its quotes as they stand.
    """
    ahead, number = _LinesAhead(file), 2
    while ahead.lines[0]:
        found, what = _fields(iter(ahead), delimiter, strict=True)
        taken = ahead.taken + 1
        mended = ""
        if found is None or (len(found) != width and taken > 1):
            taken = 1
            plain, _ = _fields(iter(ahead.lines[:1]), delimiter, quoting=csv.QUOTE_NONE)
            if plain is not None and len(plain) == width:
                found, mended = plain, STRAY_QUOTE
        if found is not None and len(found) == width:
            yield number, found, mended
        elif not ahead.lines[0].strip():
            yield number, RejectedRow("empty", "a blank line"), ""
        else:
            what = what or f"{len(found or [])} fields where the header has {width}"
            yield number, RejectedRow("unparsable", what), ""
        ahead.drop(taken)
        number += taken


def _fields(lines: Iterator[str], delimiter: str, **options: Any) -> tuple[list[str] | None, str]:
    """The fields of the first record in `lines`, or None and what is wrong with it."""
    try:
        return next(csv.reader(lines, delimiter=delimiter, **options), []), ""
    except csv.Error as error:
        return None, str(error)


def twice(names: Sequence[str]) -> str | None:
    """The first of `names` that is there more than once."""
    return next((name for name, times in Counter(names).items() if times > 1), None)

"""The rows of a source as they stand there: files of several formats, folders, data sets of the hub.

Each row comes with its place, `file:line`, or its number from 1 where there are no lines. One that cannot be read is a
`RejectedRow` in its place, so that every row of a source is accounted for.
"""

import csv
import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from anchorvec.data.builtin import PREFIX, builtin_rows
from anchorvec.errors import AnchorvecError

REQUIRED = ("query", "positive")
COLUMNS = (*REQUIRED, "negative", "negatives")

STRAY_QUOTE = "with a stray quote"
"""How a row of a table was mended: its quotes are taken as they stand."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""What Python reads for bytes that are not UTF-8, or for half of a surrogate pair in JSON, such as "\\ud800"."""

_JSON_SUFFIXES = (".jsonl", ".json")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ROWS_PER_BATCH = 1_000
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


class SourceRow(NamedTuple):
    """A row, where it stands, and how it was mended: empty if it was not."""

    place: str
    content: Mapping[str, object] | RejectedRow
    mended: str = ""


Rows = Iterator[SourceRow]


def source_rows(source: str, split: str, subset: str | None, columns: set[str]) -> Rows:
    """Each row of `source`, of the `split` and `subset` of a data set; the names of its columns are added to `columns`.

    Raises AnchorvecError for a source that is not there, breaks off or cannot be opened, for a table without the
    columns that are needed, or with two of one name.
    """
    try:
        yield from _rows(source, split, subset, columns)
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise AnchorvecError(f"{source} cannot be read: {error}") from error


def _rows(source: str, split: str, subset: str | None, columns: set[str]) -> Rows:
    path = Path(source)
    if (source.startswith(PREFIX) or path.is_file()) and (split != "train" or subset is not None):
        raise AnchorvecError(f"{source} has no splits or subsets, data sets of the hub have them; leave them out")
    if source.startswith(PREFIX):
        return _numbered(source, builtin_rows(source))
    if path.is_dir():
        return _folder(path, split, subset, columns)
    if path.exists():
        return _file(path, columns)
    if _reader(path) is not None or not _HUB_NAME.fullmatch(source):
        raise AnchorvecError(f"{source} does not exist; name a file, a folder or a data set on the hub")
    return _dataset(source, lambda: datasets.load_dataset(source, subset, split=split), columns)


def _numbered(source: str | Path, rows: Iterator[Mapping[str, object]]) -> Rows:
    return (SourceRow(f"{source}:{number}", row) for number, row in enumerate(rows, start=1))


def _file(path: Path, columns: set[str]) -> Rows:
    reader = _reader(path)
    if reader is None:
        raise AnchorvecError(
            f"{path} has an unknown extension; known are .jsonl (one object a line), .json (the same, or an array), "
            ".csv and .tsv, each also with .gz, and .parquet"
        )
    return reader(path, columns)


def _reader(path: Path) -> Callable[[Path, set[str]], Rows] | None:
    """What reads a file of that name; None: nothing does."""
    suffix = path.suffix.lower()
    text_suffix = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
    if suffix == ".parquet":
        return _parquet
    if text_suffix in _JSON_SUFFIXES:
        return _json
    return _table if text_suffix in _DELIMITERS else None


# Data sets


def _folder(path: Path, split: str, subset: str | None, columns: set[str]) -> Rows:
    """The rows of a data set's folder: one of `save_to_disk`, or with files, whatever columns each of them has."""
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _dataset(str(path), lambda: _saved(path, split, subset), columns)
    files = _files_of(path, split, subset)
    if not files or any(_reader(file) is None for file in files):
        return _dataset(str(path), lambda: datasets.load_dataset(str(path), subset, split=split), columns)
    return itertools.chain.from_iterable(_file(file, columns) for file in files)


def _saved(path: Path, split: str, subset: str | None) -> datasets.Dataset:
    """The split of a data set that `save_to_disk` wrote."""
    if subset is not None:
        raise AnchorvecError(f"{path} was written by save_to_disk and has no subsets; leave {subset} out")
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        if split != "train":
            raise AnchorvecError(f"{path} was written by save_to_disk as one split; leave {split} out")
        return saved
    if split not in saved:
        raise AnchorvecError(f"{path} has no split {split}; it has {', '.join(saved)}")
    return saved[split]


def _files_of(path: Path, split: str, subset: str | None) -> list[Path]:
    """The local files of a split in the folder of a data set, as `datasets` finds them; empty: it knows better."""
    try:
        builder = datasets.load_dataset_builder(str(path), subset)
    except (OSError, ValueError, datasets.exceptions.DatasetsError):
        return []  # loading says what is wrong
    found = builder.config.data_files or {}
    files = [Path(file) for file in found.get(split, [])]
    others = {file.name for file in path.iterdir() if file.is_file() and _is_data(file)}
    others -= {Path(file).name for of_split in found.values() for file in of_split}
    if files and others and subset is None:
        raise AnchorvecError(
            f"{path}: {', '.join(sorted(others))} would not be read beside {files[0].name}: of one folder files of one "
            "format are; name each file, as a data set of its own"
        )
    return files


def _is_data(file: Path) -> bool:
    names = [suffix.lower() for suffix in file.suffixes]
    return file.name != "dataset_infos.json" and any(
        name in (*_JSON_SUFFIXES, *_DELIMITERS, ".parquet") for name in names[-2:]
    )


def _dataset(name: str, load: Callable[[], datasets.Dataset], columns: set[str]) -> Rows:
    try:
        dataset = load()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        found = " ".join(str(error.__cause__ or error).splitlines()[:2])  # after that come lines of code
        hint = "; it goes into the key `subset`" if "available configs" in found else ""
        raise AnchorvecError(f"{name} is no file here, and no data set to load: {found}{hint}") from error
    _check_columns(name, dataset.column_names)
    columns.update(dataset.column_names)
    used = [column for column in COLUMNS if column in dataset.column_names]
    yield from _numbered(name, iter(dataset.select_columns(used)))


# JSON


def _open(path: Path, newline: str) -> TextIO:
    """The file as text, unzipped, without a byte order mark; a byte that is not UTF-8 becomes a surrogate."""
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    file: TextIO = opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    return file


def _json(path: Path, columns: set[str]) -> Rows:
    """The rows of JSON Lines, or of an array in a file that is called .json."""
    is_lines = ".jsonl" in (suffix.lower() for suffix in path.suffixes)
    with _open(path, newline="\n") as file:
        text = "" if is_lines else file.read(_CHUNK)
        found = _members(file, text) if text.lstrip().startswith("[") else _lines(file, text)
        for line, row, raw in found:
            content = row if isinstance(row, RejectedRow) else _json_object(row, raw)
            if not isinstance(content, RejectedRow):
                columns.update(content)
            yield SourceRow(f"{path}:{line}", content)


def _lines(file: TextIO, begin: str) -> Iterator[tuple[int, object, str]]:
    """Each line of the text `begin` and the rest of `file`: its number, what it says in JSON, and the line itself."""
    begin += file.readline() if begin and not begin.endswith("\n") else ""
    for line, text in enumerate(itertools.chain(begin.splitlines(keepends=True), file), start=1):
        try:
            yield line, json.loads(text, object_pairs_hook=_object), text
        except (ValueError, RecursionError) as error:
            what = f"not one JSON object on one line ({error})"
            kind = "unparsable" if text.strip() else "empty"
            yield line, RejectedRow(kind, what if text.strip() else "a blank line"), text


def _members(file: TextIO, text: str) -> Iterator[tuple[int, object, str]]:
    """Each member of the JSON array in `text` and the rest of `file`, in the form of `_lines`, read a part at a time.

    Raises AnchorvecError where the array breaks off, for it cannot be resumed.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    before, at, line, size = 0, text.index("[") + 1, 1, _CHUNK
    while True:
        at = _BETWEEN_MEMBERS.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        line += text.count("\n", before, at)
        before = at
        if text.startswith("]", at):
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
    return row if len(row) == len(members) else _NameTwice(row, **{"": _twice([name for name, _ in members])})


def _json_object(row: object, text: str) -> Mapping[str, object] | RejectedRow:
    """`row` if it can be a row; `text` is what it was read from."""
    if SURROGATE.search(text):
        return RejectedRow("not UTF-8", "bytes that are not UTF-8")
    if not isinstance(row, dict):
        return RejectedRow("unparsable", f"a JSON {type(row).__name__}, not an object; write one object for each row")
    if isinstance(row, _NameTwice):
        return RejectedRow("unparsable", f'the name "{row[""]}" is there twice')
    return row


# Tables


def _table(path: Path, columns: set[str]) -> Rows:
    """The rows of a CSV or TSV file with a header."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    delimiter = next(_DELIMITERS[suffix] for suffix in reversed(suffixes) if suffix in _DELIMITERS)
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    try:
        with _open(path, newline="") as file:
            header = next(csv.reader(iter(file.readline, ""), delimiter=delimiter, strict=True), [])
            _check_columns(path, header)
            columns.update(header)
            for line, fields, mended in _records(file, delimiter, len(header)):
                row = fields if isinstance(fields, RejectedRow) else _table_row(header, fields)
                yield SourceRow(f"{path}:{line}", row, mended)
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


def _table_row(header: Sequence[str], fields: Sequence[str]) -> Mapping[str, object] | RejectedRow:
    if SURROGATE.search("".join(fields)):
        return RejectedRow("not UTF-8", "bytes that are not UTF-8")
    texts = dict(zip(header, fields, strict=True))
    row: dict[str, object] = {column: texts[column] for column in REQUIRED}
    if texts.get("negative"):  # an empty cell says that there is none
        row["negative"] = texts["negative"]
    if texts.get("negatives"):
        try:
            row["negatives"] = json.loads(texts["negatives"])
        except ValueError:
            return RejectedRow("unparsable", 'negatives is no JSON list of texts such as ["one", "two"]')
    return row


def _parquet(path: Path, columns: set[str]) -> Rows:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        _check_columns(path, names)
        columns.update(names)
        used = [column for column in COLUMNS if column in names]
        line = 0
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=used):
            for i in range(batch.num_rows):
                line += 1
                content: Mapping[str, object] | RejectedRow
                try:
                    content = batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    content = RejectedRow("not UTF-8", "bytes that are not UTF-8")
                yield SourceRow(f"{path}:{line}", content)


# Columns


def _check_columns(source: str | Path, found: Sequence[str]) -> None:
    """Raise AnchorvecError where a column that is needed is not there, or where one is there twice."""
    if (name := _twice([column for column in found if column])) is not None:
        raise AnchorvecError(f'{source} has two columns "{name}"; rename one, or take it out')
    for column in REQUIRED:
        if column not in found:
            raise AnchorvecError(f"{source} has {missing(column, found)}")


def _twice(names: Sequence[str]) -> str | None:
    """The first of `names` that is there more than once."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def missing(column: str, found: Sequence[str]) -> str:
    """What to say of a row or a table without `column`, where the columns `found` are."""
    columns = ", ".join(found) or "none"
    return f'no column "{column}"; found: {columns}. The columns to name are "query" and "positive"'

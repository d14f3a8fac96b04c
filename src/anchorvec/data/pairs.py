"""Training pairs from files and data sets: checked row by row, kept in an Arrow file that processes share.

A row has `query` and `positive` and, for hard negatives, `negative` (a text) or `negatives` (a list).
"""

import csv
import gzip
import hashlib
import itertools
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from anchorvec.data.builtin import PREFIX, builtin_rows
from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path

EXAMPLES_PER_KIND = 3
_REQUIRED = ("query", "positive")
_COLUMNS = (*_REQUIRED, "negative", "negatives")
_JSON_SUFFIXES = (".jsonl", ".json")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")  # what Python reads for bytes that are not UTF-8, or a lone "\ud800"
_SCHEMA = pa.schema({"query": pa.string(), "positive": pa.string(), "negatives": pa.list_(pa.string())})
_ROWS_PER_BATCH = 1_000


@dataclass(frozen=True)
class ReadReport:
    """What reading a source kept and left out; `str()` of it is a paragraph for people."""

    path: str
    rows: int  # kept
    rejected: dict[str, int]  # rows left out, by kind
    examples: list[str]  # "file:line: what", the first ones of each kind
    dropped_negatives: int  # empty, repeated, or equal to their row's query or positive; the rows are kept
    ignored_columns: list[str]  # sorted names of columns that have no meaning here

    def summary(self) -> str:
        """One paragraph: how many pairs there are, what was left out, and the first places."""
        text = f"{self.path}: {self.rows:,} pairs"
        if self.rejected:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.rejected.items()))
            text += f"; rows left out: {sum(self.rejected.values()):,} ({kinds})"
        if self.dropped_negatives:
            text += (
                f"; negatives dropped: {self.dropped_negatives:,} "
                "(empty, repeated, or their row's own query or positive)"
            )
        if self.ignored_columns:
            text += f"; columns without a meaning here: {', '.join(self.ignored_columns)}"
        if self.examples:
            text += "; for example " + "; ".join(self.examples)
        return text + "."

    __str__ = summary


@dataclass(frozen=True)
class Pairs:
    """A memory-mapped data set of query, positive and negatives (a list, often empty), and its report."""

    dataset: datasets.Dataset
    report: ReadReport


class _RejectedRow(Exception):  # noqa: N818 - it never leaves this module
    """A row that cannot be used: its kind for the counts, and what was found for people."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


_Row = Mapping[str, object] | _RejectedRow
_Rows = Iterator[tuple[int, _Row]]
_Pair = tuple[str, str, list[str]]


def read_pairs(path: str | Path, *, strict: bool = False, split: str = "train", subset: str | None = None) -> Pairs:
    """The usable pairs of a file, a data set's folder, a hub data set or a `builtin:` one, with a report.

    Files are JSON Lines (.jsonl, .json), CSV or TSV with a header line (`negatives` is a JSON list there),
    each plain or .gz, and Parquet. A path that exists wins over a hub name; `split` and `subset` (also called
    configuration) are for data sets alone, and refused elsewhere.
    Texts are kept as they are. Rows that are empty, duplicate (same query and positive), no strings, without
    a column, unparsable or not UTF-8 are left out and counted, as are negatives equal to their row's
    query or positive.

    The source is read again at every call and never changed. The pairs go to an Arrow file in the cache
    folder of `datasets`, named by its content, so that none stands for another one or for an older state.

    Raises AnchorvecError when no row is usable, and with `strict` at the first row that is not.
    """
    source = str(user_path(path)) if str(path).startswith("~") else str(path)
    seen: set[int] = set()  # hashes: texts would be the whole file in memory
    rejected: Counter[str] = Counter()
    examples: list[str] = []
    dropped_negatives = 0
    columns: set[str] = set()

    def usable() -> Iterator[_Pair]:
        nonlocal dropped_negatives
        for line, row in _read(source, split, subset, columns):
            try:
                query, positive, negatives, dropped = _checked(row)
                key = hash((query, positive))
                if key in seen:
                    raise _RejectedRow("duplicate", "the query and positive of an earlier row again")
            except _RejectedRow as fault:
                example = f"{source}:{line}: {fault}"
                if strict:
                    raise AnchorvecError(f"{example}; mend the row, or read without strict") from None
                if rejected[fault.kind] < EXAMPLES_PER_KIND:
                    examples.append(example)
                rejected[fault.kind] += 1
                continue
            seen.add(key)
            dropped_negatives += dropped
            yield query, positive, negatives

    file = _write_arrow(usable())
    if not seen:
        found = f"{rejected.total():,} left out, the first: {examples[0]}" if examples else "it is empty"
        raise AnchorvecError(f"{source} has no usable row: {found}")
    ignored = sorted(columns.difference(_COLUMNS))
    report = ReadReport(source, len(seen), dict(rejected), examples, dropped_negatives, ignored)
    return Pairs(datasets.Dataset.from_file(str(file)), report)


def drawn_rows(rows: int, weight: float, seed: int) -> NDArray[np.int64]:
    """The numbers of `rows` rows as often as an epoch draws each: 2 = twice, 0.1 = a tenth, 1.5 = each, and half again.

    The part is a sample without replacement that `seed` decides; a weight below 1 leaves one row at least. Raises
    AnchorvecError unless the weight is a number above 0.
    """
    if not 0 < weight < float("inf"):
        raise AnchorvecError(f"a weight is how often an epoch draws each row, a number above 0; found {weight}")
    times = int(weight)
    part = max(round((weight - times) * rows), 0 if times else 1)
    sample = np.random.default_rng(seed).choice(rows, size=part, replace=False)
    return np.concatenate([np.tile(np.arange(rows), times), np.sort(sample)])


def _read(source: str, split: str, subset: str | None, columns: set[str]) -> _Rows:
    """The rows of a source, whose columns are added to `columns`.

    A file that breaks off or cannot be opened is an AnchorvecError.
    """
    try:
        yield from _rows(source, split, subset, columns)
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise AnchorvecError(f"{source} cannot be read: {error}") from error


def _rows(source: str, split: str, subset: str | None, columns: set[str]) -> _Rows:
    """Each row of a source with its line, or with its number from 1 where there are no lines."""
    path = Path(source)
    if (source.startswith(PREFIX) or path.is_file()) and (split != "train" or subset is not None):
        raise AnchorvecError(f"{source} has no splits or subsets, data sets of the hub have them; leave them out")
    if source.startswith(PREFIX):
        return enumerate(builtin_rows(source), start=1)
    suffix = path.suffix.lower()
    text_suffix = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
    if path.is_dir():
        return _dataset(source, split, subset, columns)
    if not path.exists():
        is_file_name = text_suffix in (*_JSON_SUFFIXES, *_DELIMITERS, ".parquet")
        if is_file_name or not _HUB_NAME.fullmatch(source):
            raise AnchorvecError(f"{source} does not exist; name a file, a folder or a data set on the hub")
        return _dataset(source, split, subset, columns)
    if suffix == ".parquet":
        return _parquet(path, columns)
    if text_suffix in _JSON_SUFFIXES:
        return _json_lines(path, columns)
    if text_suffix in _DELIMITERS:
        return _table(path, _DELIMITERS[text_suffix], columns)
    raise AnchorvecError(
        f"{source} has an unknown extension; known are .jsonl, .json (one object a line), .csv and .tsv, "
        "each also with .gz, and .parquet"
    )


def _open(path: Path, newline: str) -> TextIO:
    """The file as text, unzipped, without a byte order mark; a byte that is not UTF-8 becomes a surrogate."""
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    file: TextIO = opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    return file


def _json_lines(path: Path, columns: set[str]) -> _Rows:
    with _open(path, newline="\n") as file:
        for line, text in enumerate(file, start=1):
            row = _json_row(text)
            if not isinstance(row, _RejectedRow):
                columns.update(row)
            yield line, row


def _json_row(text: str) -> _Row:
    if not text.strip():
        return _RejectedRow("empty", "a blank line")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _SURROGATE.search(text):
            return _RejectedRow("not UTF-8", "bytes that are not UTF-8")
        return _RejectedRow("unparsable", f"not one JSON object on one line ({error})")
    if not isinstance(row, dict):
        return _RejectedRow("unparsable", f"a JSON {type(row).__name__}, not an object; write one object a line")
    return row


def _table(path: Path, delimiter: str, columns: set[str]) -> _Rows:
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    try:
        with _open(path, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            _require_columns(path, header)
            columns.update(header)
            while True:
                line = reader.line_num + 1  # where the row begins: a quoted text may run over several lines
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield line, _RejectedRow("unparsable", str(error))
                else:
                    yield line, _table_row(header, fields)
    finally:
        csv.field_size_limit(limit)


def _table_row(header: Sequence[str], fields: Sequence[str]) -> _Row:
    if not fields:
        return _RejectedRow("empty", "a blank line")
    if len(fields) != len(header):
        return _RejectedRow("unparsable", f"{len(fields)} fields where the header has {len(header)}")
    texts = dict(zip(header, fields, strict=True))
    row: dict[str, object] = {column: texts[column] for column in _REQUIRED}
    if texts.get("negative"):  # an empty cell says that there is none
        row["negative"] = texts["negative"]
    if texts.get("negatives"):
        try:
            row["negatives"] = json.loads(texts["negatives"])
        except ValueError:
            return _RejectedRow("unparsable", 'negatives is no JSON list of texts such as ["one", "two"]')
    return row


def _parquet(path: Path, columns: set[str]) -> _Rows:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        _require_columns(path, names)
        columns.update(names)
        used = [column for column in _COLUMNS if column in names]
        line = 0
        for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=used):
            for i in range(batch.num_rows):
                line += 1
                try:
                    yield line, batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield line, _RejectedRow("not UTF-8", "bytes that are not UTF-8")


def _dataset(name: str, split: str, subset: str | None, columns: set[str]) -> _Rows:
    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        found = " ".join(str(error.__cause__ or error).splitlines()[:2])  # after that come lines of code
        hint = "; it goes into the key `subset`" if "available configs" in found else ""
        raise AnchorvecError(f"{name} is no file here, and no data set to load: {found}{hint}") from error
    _require_columns(name, dataset.column_names)
    columns.update(dataset.column_names)
    used = [column for column in _COLUMNS if column in dataset.column_names]
    yield from enumerate(dataset.select_columns(used), start=1)


def _require_columns(source: str | Path, found: Sequence[str]) -> None:
    for column in _REQUIRED:
        if column not in found:
            raise AnchorvecError(f"{source} has {_missing(column, found)}")


def _missing(column: str, found: Sequence[str]) -> str:
    columns = ", ".join(found) or "none"
    return f'no column "{column}"; found: {columns}. The columns to name are "query" and "positive"'


def _checked(row: _Row) -> tuple[str, str, list[str], int]:
    """The row's query, positive and negatives, and how many negatives were dropped."""
    if isinstance(row, _RejectedRow):
        raise row
    texts = []
    for column in _REQUIRED:
        if column not in row:
            raise _RejectedRow("missing column", _missing(column, list(row)))
        texts.append(_text(column, row[column]))
        if not texts[-1].strip():
            raise _RejectedRow("empty", f"{column} is empty")
    query, positive = texts

    listed = row.get("negatives") or []
    if not isinstance(listed, list):
        raise _RejectedRow("not a string", f"negatives is of type {type(listed).__name__}, not a list of texts")
    single = row.get("negative")
    given = [_text("a negative", text) for text in ([] if single is None else [single]) + listed]
    own = {"", query.strip(), positive.strip()}
    negatives = [text for text in dict.fromkeys(given) if text.strip() not in own]
    return query, positive, negatives, len(given) - len(negatives)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"of type {type(value).__name__}"
        raise _RejectedRow("not a string", f"{name} is {found}, not a string")
    if _SURROGATE.search(value):
        raise _RejectedRow("not UTF-8", f"{name} has bytes that are not UTF-8")
    return value


def _write_arrow(pairs: Iterator[_Pair]) -> Path:
    """The Arrow file with these pairs, written a batch at a time."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "anchorvec"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
            while batch := list(itertools.islice(pairs, _ROWS_PER_BATCH)):
                columns = zip(*batch, strict=True)
                arrays = [pa.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        with scratch.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        file = folder / f"{digest[:32]}.arrow"
        if not file.exists():  # one that another process may have mapped stays as it is
            scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
    return file

"""The rows of a source as they stand there: files of several formats, folders, data sets of the hub.

Each row comes with its place, `file:line`, or its number from 1 where there are no lines. One that cannot be read is a
`RejectedRow` in its place, so that every row of a source is accounted for.
"""

import csv
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from anchorvec.data.builtin import PREFIX, builtin_rows
from anchorvec.data.formats import (
    DELIMITERS,
    JSON_SUFFIXES,
    SURROGATE,
    RejectedRow,
    json_object,
    json_values,
    open_table,
    text_suffix,
    twice,
)
from anchorvec.errors import AnchorvecError
from anchorvec.files import check_unpacked_size

REQUIRED = ("query", "positive")
COLUMNS = (*REQUIRED, "negative", "negatives")

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ROWS_PER_BATCH = 1_000


class SourceRow(NamedTuple):
    """A row, where it stands, and how it was mended: empty if it was not."""

    place: str
    content: Mapping[str, object] | RejectedRow
    mended: str = ""


Rows = Iterator[SourceRow]


def source_rows(source: str, split: str, subset: str | None, columns: set[str], *, revision: str | None = None) -> Rows:
    """Each row of `source`, of the `split` and `subset` of a data set; the names of its columns are added to `columns`.

    `revision`: the branch, tag or commit of a data set on the hub.

    Raises AnchorvecError for a source that is not there, breaks off or cannot be opened, for a table without the
    columns that are needed, or with two of one name.
    """
    try:
        yield from _rows(source, split, subset, columns, revision)
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise AnchorvecError(f"{source} cannot be read: {error}") from error


def is_on_hub(source: str) -> bool:
    """Whether `source` names a data set on the hub, and no file or folder here."""
    path = Path(source)
    return not path.exists() and _reader(path) is None and _HUB_NAME.fullmatch(source) is not None


def _rows(source: str, split: str, subset: str | None, columns: set[str], revision: str | None) -> Rows:
    path = Path(source)
    if (source.startswith(PREFIX) or path.is_file()) and (split != "train" or subset is not None):
        raise AnchorvecError(f"{source} has no splits or subsets, data sets of the hub have them; leave them out")
    if revision is not None and not is_on_hub(source):
        raise AnchorvecError(f"{source} has no revisions, data sets of the hub have them; leave it out")
    if source.startswith(PREFIX):
        return _numbered(source, builtin_rows(source))
    if path.is_dir():
        return _folder(path, split, subset, columns)
    if path.exists():
        return _file(path, columns)
    if not is_on_hub(source):
        raise AnchorvecError(f"{source} does not exist; name a file, a folder or a data set on the hub")
    return _dataset(source, lambda: datasets.load_dataset(source, subset, split=split, revision=revision), columns)


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
    suffix = text_suffix(path)
    if path.suffix.lower() == ".parquet":
        return _parquet
    if suffix in JSON_SUFFIXES:
        return _json
    return _table if suffix in DELIMITERS else None


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
        name in (*JSON_SUFFIXES, *DELIMITERS, ".parquet") for name in names[-2:]
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


def _json(path: Path, columns: set[str]) -> Rows:
    """The rows of JSON Lines, or of an array in a file that is called .json."""
    for line, value, raw in json_values(path):
        content = value if isinstance(value, RejectedRow) else json_object(value, raw)
        if not isinstance(content, RejectedRow):
            columns.update(content)
        yield SourceRow(f"{path}:{line}", content)


# Tables


def _table(path: Path, columns: set[str]) -> Rows:
    """The rows of a CSV or TSV file with a header."""
    with open_table(path) as (header, records):
        _check_columns(path, header)
        columns.update(header)
        for line, fields, mended in records:
            row = fields if isinstance(fields, RejectedRow) else _table_row(header, fields)
            yield SourceRow(f"{path}:{line}", row, mended)


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
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        check_unpacked_size(path, sum(group.total_byte_size for group in groups))
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
    if (name := twice([column for column in found if column])) is not None:
        raise AnchorvecError(f'{source} has two columns "{name}"; rename one, or take it out')
    for column in REQUIRED:
        if column not in found:
            raise AnchorvecError(f"{source} has {missing(column, found)}")


def missing(column: str, found: Sequence[str]) -> str:
    """What to say of a row or a table without `column`, where the columns `found` are."""
    columns = ", ".join(found) or "none"
    return f'no column "{column}"; found: {columns}. The columns to name are "query" and "positive"'

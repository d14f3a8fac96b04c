"""Training pairs from files and data sets: checked row by row, kept in an Arrow file that processes share.

A row has `query` and `positive` and, for hard negatives, `negative` (a text) or `negatives` (a list).
"""

import hashlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from anchorvec.data.formats import SURROGATE, RejectedRow
from anchorvec.data.rows import COLUMNS, REQUIRED, SourceRow, missing, source_rows
from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path, without_surrogates

EXAMPLES_PER_KIND = 3
HALF_PAIR = "with half of a surrogate pair, now U+FFFD"
_SCHEMA = pa.schema({"query": pa.string(), "positive": pa.string(), "negatives": pa.list_(pa.string())})
_ROWS_PER_BATCH = 1_000


@dataclass(frozen=True)
class ReadReport:
    """What reading a source kept, mended and left out; `str()` of it is a paragraph for people.

    Of `read` rows `rows` were kept, and `rejected`, by kind, were left out. `mended` counts, by kind, those of the kept
    ones that were changed. `examples`: "file:line: what", the first ones of each kind. `dropped_negatives` were no
    text, empty, repeated, or equal to their row's query or positive; the rows are kept. `ignored_columns`: sorted names
    of columns that have no meaning here. `fingerprint`: a hash of the pairs, in their order.
    """

    path: str
    read: int
    rows: int
    rejected: dict[str, int]
    mended: dict[str, int]
    examples: list[str]
    dropped_negatives: int
    ignored_columns: list[str]
    fingerprint: str = ""

    def summary(self) -> str:
        """One paragraph: how many pairs there are, what was mended or left out, and the first places."""
        text = f"{self.path}: {self.rows:,} pairs"
        if self.rejected:
            text += (
                f" of {self.read:,} rows; rows left out: {sum(self.rejected.values()):,} ({_by_kind(self.rejected)})"
            )
        if self.mended:
            text += f"; rows mended: {_by_kind(self.mended)}"
        if self.dropped_negatives:
            text += (
                f"; negatives dropped: {self.dropped_negatives:,} "
                "(no text, empty, repeated, or their row's own query or positive)"
            )
        if self.ignored_columns:
            text += f"; columns without a meaning here: {', '.join(self.ignored_columns)}"
        if self.examples:
            text += "; for example " + "; ".join(self.examples)
        return text + "."

    __str__ = summary


def _by_kind(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))


@dataclass(frozen=True)
class Pairs:
    """A memory-mapped data set of query, positive and negatives (a list, often empty), and its report."""

    dataset: datasets.Dataset
    report: ReadReport


_Pair = tuple[str, str, list[str]]


def read_pairs(
    path: str | Path,
    *,
    strict: bool = False,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
) -> Pairs:
    """The usable pairs of a file, a data set's folder, a hub data set or a `builtin:` one, with a report.

    Files are JSON Lines (.jsonl, .json), an array of objects (.json), CSV or TSV with a header line (`negatives` is a
    JSON list there), each plain or .gz, and Parquet. A folder is one that `save_to_disk` wrote, or a data set with
    files, each with its own columns. A path that exists wins over a hub name; `split` and `subset` (also called
    configuration) are for data sets alone, and refused elsewhere; so is `revision`, for those on the hub.
    Texts are kept as they are, but for halves of surrogate pairs, which become U+FFFD. Rows that are empty, duplicate
    (same query and positive), no strings, without a column, unparsable or not UTF-8 are left out and counted. So are
    negatives that are no text, or equal to their row's query or positive, without their rows.

    The source is read again at every call and never changed. The pairs go to an Arrow file in the cache
    folder of `datasets`, named by its content, so that none stands for another one or for an older state.

    Raises AnchorvecError when no row is usable, and with `strict` at the first row that is not, or that must be mended.
    """
    source = str(user_path(path)) if str(path).startswith("~") else str(path)
    columns: set[str] = set()
    reading = _Reading(strict)
    file = _write_arrow(reading.usable(source_rows(source, split, subset, columns, revision=revision)))
    report = replace(reading.report(source, columns), fingerprint=file.stem)
    return Pairs(datasets.Dataset.from_file(str(file)), report)


def places_of(
    pairs: Collection[tuple[str, str]],
    path: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
) -> dict[tuple[str, str], str]:
    """Where each of `pairs`, a query and its positive, stands in the source `path`, which is read again: `file:line`.

    `split`, `subset` and `revision` as in `read_pairs`. A pair that is not found is left out; so are all of a source
    that is gone.
    """
    places: dict[tuple[str, str], str] = {}
    source = str(user_path(path)) if path.startswith("~") else path
    with suppress(AnchorvecError):
        for row in source_rows(source, split, subset, set(), revision=revision):
            with suppress(RejectedRow):
                checked = _checked(row)
                if (checked.query, checked.positive) in pairs:
                    places.setdefault((checked.query, checked.positive), row.place)
    return places


class _Reading:
    """What one reading of a source has found so far."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.seen: set[int] = set()  # hashes: texts would be the whole file in memory
        self.rejected: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.examples: list[str] = []
        self.dropped_negatives = self.read = 0

    def usable(self, rows: Iterator[SourceRow]) -> Iterator[_Pair]:
        """The pairs of `rows` that can be used; the others are counted."""
        for row in rows:
            self.read += 1
            try:
                checked = _checked(row)
                key = hash((checked.query, checked.positive))
                if key in self.seen:
                    raise RejectedRow("duplicate", "the query and positive of an earlier row again")
            except RejectedRow as fault:
                self._note(self.rejected, fault.kind, row.place, str(fault))
                continue
            self.seen.add(key)
            for kind in checked.mended:
                self._note(self.mended, kind, row.place, kind)
            self.dropped_negatives += checked.dropped
            yield checked.query, checked.positive, checked.negatives

    def _note(self, counts: Counter[str], kind: str, place: str, what: str) -> None:
        example = f"{place}: {what}"
        if self.strict:
            raise AnchorvecError(f"{example}; mend the row, or read without strict")
        if counts[kind] < EXAMPLES_PER_KIND:
            self.examples.append(example)
        counts[kind] += 1

    def report(self, source: str, columns: set[str]) -> ReadReport:
        """Of all that was read of `source`, which has these `columns`; AnchorvecError if nothing can be used."""
        if not self.seen:
            left_out = f"{self.rejected.total():,} left out, the first: {self.examples[0]}" if self.examples else ""
            raise AnchorvecError(f"{source} has no usable row: {left_out or 'it is empty'}")
        return ReadReport(
            source,
            self.read,
            len(self.seen),
            dict(self.rejected),
            dict(self.mended),
            self.examples,
            self.dropped_negatives,
            sorted(columns.difference(COLUMNS)),
        )


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


class _Checked(NamedTuple):
    """A row that can be used: its texts, how many negatives were dropped, and in which ways it was mended."""

    query: str
    positive: str
    negatives: list[str]
    dropped: int
    mended: list[str]


def _checked(row: SourceRow) -> _Checked:
    """What can be used of `row`; raises RejectedRow where nothing can."""
    content = row.content
    if isinstance(content, RejectedRow):
        raise content
    texts = []
    for column in REQUIRED:
        if column not in content:
            raise RejectedRow("missing column", missing(column, list(content)))
        value = content[column]
        if not isinstance(value, str):
            found = "null" if value is None else f"of type {type(value).__name__}"
            raise RejectedRow("not a string", f"{column} is {found}, not a string")
        texts.append(without_surrogates(value))
        if not texts[-1].strip():
            raise RejectedRow("empty", f"{column} is empty")
    query, positive = texts

    listed = content.get("negatives") or []
    if not isinstance(listed, list):
        raise RejectedRow("not a string", f"negatives is of type {type(listed).__name__}, not a list of texts")
    single = content.get("negative")
    given = ([] if single is None else [single]) + listed
    wanted = [without_surrogates(text) for text in given if isinstance(text, str)]
    own = {"", query.strip(), positive.strip()}
    negatives = [text for text in dict.fromkeys(wanted) if text.strip() not in own]
    halves = any(isinstance(text, str) and SURROGATE.search(text) for text in (*map(content.get, REQUIRED), *given))
    mended = [kind for kind in (row.mended, HALF_PAIR if halves else "") if kind]
    return _Checked(query, positive, negatives, len(given) - len(negatives), mended)


def _write_arrow(pairs: Iterator[_Pair]) -> Path:
    """The Arrow file with these pairs, written a batch at a time."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "anchorvec"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    except OSError as error:
        raise AnchorvecError(
            f"{folder}: pairs are kept there, and it cannot be written ({error.strerror}); the environment variable "
            "HF_DATASETS_CACHE names another folder"
        ) from error
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

"""Files to search, read as what they are.

A file of text is one document. JSON Lines, JSON arrays and tables with a header hold one in each row: a text, or an
object with a text under one of `TEXT_COLUMNS`, its `title` before it. What cannot be used is counted, by reason.
"""

import csv
import gzip
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from anchorvec.data.formats import (
    DELIMITERS,
    JSON_SUFFIXES,
    SURROGATE,
    RejectedRow,
    json_object,
    json_values,
    one_json_object,
    open_table,
    text_suffix,
    twice,
)
from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path, without_surrogates

TEXT_COLUMNS = ("text", "document", "content", "contents", "body", "passage", "paragraph", "abstract")
"""Where the text of a row is looked for, in this order, in large or small letters."""

_SNIFFED_BYTES = 65_536
_SHOWN_NAMES = 10
_HALF_PAIR = "texts with half of a surrogate pair, now U+FFFD"


@dataclass(frozen=True)
class Document:
    """A text and where it stands: its `file`, the `line` there that it begins in and, of data, the number of its row.

    `record` counts from 1, and is None for a file of text, whose lines are those of the file. `id` is what the row has
    as `_id` or `id`.
    """

    text: str
    file: str = ""
    line: int = 1
    record: int | None = None
    id: str | None = None


@dataclass(frozen=True)
class Corpus:
    """The documents in a file or a folder, of `files` files; reason -> how many were left out or mended, and where.

    A place is that of the first one.
    """

    path: str
    documents: list[Document]
    files: int
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    mended: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def characters(self) -> int:
        """In all documents together."""
        return sum(len(document.text) for document in self.documents)

    def losses(self) -> str:
        """One line: what was left out and what was mended; empty if all was read as it stands."""
        kinds = {"left out": self.left_out, "mended": self.mended}
        return "; ".join(f"{what}: {_by_reason(counts)}" for what, counts in kinds.items() if counts)


class _UnusableError(Exception):
    """A file without a document: the reason for the counts, and what was found for people."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason


def read_documents(path: str | Path) -> Corpus:
    """The documents in the file or, at any depth, the folder `path`, in the order of their names and rows.

    - `.jsonl`, `.ndjson`, `.json`: an object or a text in each line, or one array of them;
    - `.csv`, `.tsv`: a row for each record, with a header;
    - any other file is text in UTF-8, such as `.txt` and `.md`.

    Each of them may be gzipped. Of a folder in BEIR layout the queries and the judgements are left out, of any folder
    what is hidden, empty, binary or has no text, of data the rows without a text. Halves of surrogate pairs are read as
    U+FFFD.

    Raises AnchorvecError if there is no such path, for a single file that cannot be used, and where no document is.
    """
    path = user_path(path)
    name = _shown(path)
    corpus = Corpus(name, [], 0)
    if not path.is_dir():
        if not path.exists():
            raise AnchorvecError(f"{name}: there is no such file")
        try:
            documents = list(_documents(path, corpus))
        except _UnusableError as error:
            raise AnchorvecError(_said(name, error)) from error
        return Corpus(name, documents, 1, corpus.left_out, corpus.mended)
    files = 0
    for file in _files(path, corpus.left_out):
        of_file = Corpus(str(file), [], 1)
        try:
            corpus.documents.extend(_documents(file, of_file))
        except _UnusableError as error:
            _count(corpus.left_out, error.reason, _shown(file))
            continue
        files += 1
        for counts, more in ((corpus.left_out, of_file.left_out), (corpus.mended, of_file.mended)):
            for reason, (number, place) in more.items():
                _count(counts, reason, place, number)
    if not files:
        reasons = f"; left out: {_by_reason(corpus.left_out)}" if corpus.left_out else ""
        raise AnchorvecError(f"{name}: there is no document in it{reasons}")
    return Corpus(name, corpus.documents, files, corpus.left_out, corpus.mended)


def _shown(path: str | Path) -> str:
    """The name of `path`, which is bytes, with U+FFFD for those that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _said(file: str, error: Exception) -> str:
    """What is wrong with `file`, which its own line may be said of."""
    return without_surrogates(str(error)) if str(error).startswith(f"{file}:") else f"{file}: {error}"


def _count(counts: dict[str, tuple[int, str]], reason: str, place: str, number: int = 1) -> None:
    before, first = counts.get(reason, (0, place))
    counts[reason] = (before + number, first)


def _by_reason(counts: Mapping[str, tuple[int, str]]) -> str:
    return ", ".join(f"{reason}: {number:,} (first: {place})" for reason, (number, place) in counts.items())


def _files(folder: Path, left_out: dict[str, tuple[int, str]]) -> Iterator[Path]:
    """The files that are to be read, in the order of their names; the others are counted."""

    def unreadable(error: OSError) -> None:
        _count(left_out, "files or folders that cannot be read", _shown(error.filename))

    of_collection = {"queries.jsonl", "queries.jsonl.gz", "qrels"} if _is_collection(folder) else set()
    for place, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(place)
        for name in sorted([*folders, *files]):
            entry = here / name
            reason = ""
            if name.startswith("."):
                reason = "hidden files or folders"
            elif here == folder and name in of_collection:
                reason = "queries and judgements"
            elif name in folders and entry.is_symlink():
                reason = "links to folders"
            elif name in files and not entry.is_file():
                reason = "neither a file nor a folder"
            if reason:
                _count(left_out, reason, _shown(entry))
                folders[:] = [other for other in folders if other != name]
            elif name in files:
                yield entry
        folders.sort()


def _is_collection(folder: Path) -> bool:
    """Whether the folder is in BEIR layout."""
    names = {entry.name.removesuffix(".gz") for entry in folder.iterdir()}
    return {"corpus.jsonl", "queries.jsonl"} <= names


def _documents(path: Path, corpus: Corpus) -> Iterator[Document]:
    """The documents of one file, one at least; rows without are counted in `corpus`.

    Raises _UnusableError if there is none.
    """
    suffix = text_suffix(path)
    try:
        if suffix in JSON_SUFFIXES or suffix in DELIMITERS:
            rows = _json_rows(path) if suffix in JSON_SUFFIXES else _table_rows(path, corpus)
            return iter(_of_rows(path, rows, corpus))
        return iter([Document(_text(path), _shown(path))])
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise _UnusableError("files or folders that cannot be read", f"the file cannot be read ({error})") from error
    except AnchorvecError as error:
        raise _UnusableError("data files that break off", str(error)) from error


# Text


def _text(path: Path) -> str:
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    file: IO[bytes]
    with opened(path, "rb") as file:
        content = file.read(_SNIFFED_BYTES)
        if b"\0" in content:
            raise _UnusableError("binary files", "a binary file; name text, Markdown, JSON or CSV in UTF-8")
        content += file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _UnusableError("files not in UTF-8", f"line {line} is not UTF-8; save the file as UTF-8") from error
    if not text.strip():
        raise _UnusableError("empty files", "the file is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# Data


_Found = Iterator[tuple[int, Mapping[str, object] | str | RejectedRow]]


def _json_rows(path: Path) -> _Found:
    if (row := one_json_object(path)) is not None:
        yield 1, row
        return
    for line, value, raw in json_values(path):
        if isinstance(value, str):
            yield line, RejectedRow("not UTF-8", "bytes that are not UTF-8") if SURROGATE.search(raw) else value
        else:
            yield line, value if isinstance(value, RejectedRow) else json_object(value, raw)


def _table_rows(path: Path, corpus: Corpus) -> _Found:
    with open_table(path) as (header, records):
        if (name := twice([column for column in header if column])) is not None:
            raise _UnusableError("tables with two columns of one name", f'two columns are called "{name}"; rename one')
        if header and not _texts(dict.fromkeys(header)):
            raise _UnusableError("data files without a text", _no_text(dict.fromkeys(header)))
        for line, fields, mended in records:
            if mended:
                _count(corpus.mended, f"rows {mended}", f"{_shown(path)}:{line}")
            if isinstance(fields, RejectedRow):
                yield line, fields
            elif SURROGATE.search("".join(fields)):
                yield line, RejectedRow("not UTF-8", "bytes that are not UTF-8")
            else:
                yield line, dict(zip(header, fields, strict=True))


def _of_rows(path: Path, rows: _Found, corpus: Corpus) -> list[Document]:
    """A document for each row with a text."""
    file = _shown(path)
    documents: list[Document] = []
    found: dict[str, object] = {}
    for record, (line, row) in enumerate(rows, start=1):
        place = f"{file}:{line}"
        if isinstance(row, RejectedRow):
            reason = "rows that cannot be parsed" if row.kind == "unparsable" else f"rows that are {row.kind}"
            _count(corpus.left_out, reason, f"{place}: {row}")
            continue
        fields = {"text": row} if isinstance(row, str) else row
        found = {**fields, **found}
        text = _title_and_text(fields)
        if not text:
            _count(corpus.left_out, "rows without a text", place)
            continue
        whole = without_surrogates(text)
        if whole != text:
            _count(corpus.mended, _HALF_PAIR, place)
        documents.append(Document(whole, file, line, record, _id(fields)))
    if documents:
        return documents
    if found and not _texts(found):
        raise _UnusableError("data files without a text", _no_text(found))
    losses = _by_reason(corpus.left_out)
    raise _UnusableError(*("data files without a text", losses) if losses else ("empty files", "the file is empty"))


def _texts(row: Mapping[str, object]) -> list[object]:
    """What stands under the names for texts, the first name first."""
    by_name = {name.strip().casefold(): value for name, value in row.items()}
    return [by_name[name] for name in TEXT_COLUMNS if name in by_name]


def _title_and_text(row: Mapping[str, object]) -> str:
    """Both, joined by a space, where the row has a column for a text; else nothing."""
    texts = _texts(row)
    text = next((text for text in texts if isinstance(text, str) and text.strip()), "")
    titles = [value for name, value in row.items() if name.strip().casefold() == "title" and isinstance(value, str)]
    return " ".join([*titles, text]).strip() if texts else ""


def _id(row: Mapping[str, object]) -> str | None:
    found = row.get("_id", row.get("id"))
    return without_surrogates(str(found)) if isinstance(found, str | int) else None


def _no_text(found: Mapping[str, object]) -> str:
    """What to say of a file whose rows have the fields `found`, none of them for a text."""
    lists = [name for name, value in found.items() if isinstance(value, list)]
    names = ", ".join(f'"{name}"' for name in list(found)[:_SHOWN_NAMES])
    more = f" and {len(found) - _SHOWN_NAMES:,} more" if len(found) > _SHOWN_NAMES else ""
    return f"no column has the texts; found: {names}{more}. Name the one with them {' or '.join(TEXT_COLUMNS[:2])}" + (
        f', or write the list in "{lists[0]}" as a file of its own' if lists else ""
    )

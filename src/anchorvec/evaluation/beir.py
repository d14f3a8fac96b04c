"""Reads test collections in BEIR layout, plain or gzipped.

A folder holds `corpus.jsonl`, `queries.jsonl` and `qrels/test.tsv`.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path

QRELS_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class BeirData:
    """A test collection: documents, judged queries, and which document answers which query how well."""

    corpus: dict[str, dict[str, str]]
    """Document id -> `{"title": ..., "text": ...}`."""
    queries: dict[str, str]
    """Query id -> text. Every query has a judgement."""
    qrels: dict[str, dict[str, int]]
    """Query id -> document id -> grade; above 0 is relevant."""
    name: str = "beir"


def load_beir(folder: str | Path) -> BeirData:
    """The test collection in `folder`, named after it; queries without a judgement are dropped.

    Raises AnchorvecError with `file:line` for a row that cannot be used, a repeated id, or a judgement of a
    query or document that does not exist.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise AnchorvecError(f"{folder}: there is no such folder; name one in BEIR layout")

    corpus: dict[str, dict[str, str]] = {}
    for place, row in read_json_lines(plain_or_gzipped(folder / "corpus.jsonl")):
        document = _text(row, "_id", place)
        if document in corpus:
            raise AnchorvecError(f"{place}: the document id {document!r} was used before; ids must differ")
        corpus[document] = {
            "title": _text(row, "title", place, default=""),
            "text": _text(row, "text", place),
        }

    queries: dict[str, str] = {}
    for place, row in read_json_lines(plain_or_gzipped(folder / "queries.jsonl")):
        query = _text(row, "_id", place)
        if query in queries:
            raise AnchorvecError(f"{place}: the query id {query!r} was used before; ids must differ")
        queries[query] = _text(row, "text", place)

    path = plain_or_gzipped(folder / "qrels" / "test.tsv")
    qrels: dict[str, dict[str, int]] = {}
    rows = read_lines(path)
    place, header = next(rows, (f"{path}:1", ""))
    if header.split("\t") != QRELS_HEADER:
        expected = "\\t".join(QRELS_HEADER)
        raise AnchorvecError(f"{place}: found {header[:60]!r}; the first line must be `{expected}`")
    for place, line in rows:
        query, document, grade = _judgement(line, place)
        if query not in queries:
            raise AnchorvecError(f"{place}: no query in queries.jsonl has the id {query!r}")
        if document not in corpus:
            raise AnchorvecError(f"{place}: no document in corpus.jsonl has the id {document!r}")
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise AnchorvecError(f"{place}: query {query!r} and document {document!r} already have another score")
    if not qrels:
        raise AnchorvecError(f"{path}: there is no judgement; write rows of query-id, corpus-id and score")

    judged = {query: text for query, text in queries.items() if query in qrels}
    return BeirData(corpus, judged, qrels, name=folder.resolve().name)


def document_text(document: dict[str, str]) -> str:
    """Title and text as mteb joins them for an encoder."""
    return f"{document['title']} {document['text']}".strip()


def plain_or_gzipped(path: Path) -> Path:
    """`path`, or `path` with `.gz` behind it, whichever exists."""
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise AnchorvecError(f"{path}: there is no such file, nor {path.name}.gz")


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a JSON Lines file, plain or gzipped, with its place `file:line`."""
    for place, line in read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise AnchorvecError(f"{place}: this is no JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise AnchorvecError(f"{place}: found {line[:60]!r}; each line must be one JSON object")
        yield place, row


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of a UTF-8 file, plain or gzipped, with its place `file:line`; blank lines are left out."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                place = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise AnchorvecError(f"{place}: this is not UTF-8; save the file as UTF-8") from error
                if line.strip():
                    yield place, line
    except FileNotFoundError as error:
        raise AnchorvecError(f"{path}: there is no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise AnchorvecError(f"{path}: the file cannot be read ({error})") from error


def _judgement(line: str, place: str) -> tuple[str, str, int]:
    try:
        query, document, grade = line.split("\t")
        return query, document, int(grade)
    except ValueError as error:
        raise AnchorvecError(
            f"{place}: found {line[:60]!r}; write a query id, a document id and a whole number, split by tabs"
        ) from error


def _text(row: dict[str, Any], key: str, place: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise AnchorvecError(f"{place}: `{key}` is {json.dumps(value)[:60]}; it must be a string")
    return value

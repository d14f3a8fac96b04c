"""Test collections for retrieval in BEIR layout, read plain or gzipped, and written.

A folder holds `corpus.jsonl`, `queries.jsonl` and `qrels/test.tsv`.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorvec.errors import AnchorvecError
from anchorvec.files import (
    plain_or_gzipped,
    read_json_lines,
    read_lines,
    user_path,
    without_surrogates,
    write_json_lines,
    write_text,
)

if TYPE_CHECKING:
    from anchorvec.data.docstrings import DocstringData

QRELS_HEADER = ["query-id", "corpus-id", "score"]
_GRADE = re.compile(r"([+-]?[0-9]{1,9})(?:\.0*)?")  # of nine digits, for trec_eval holds it in 32 bits


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

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all texts and judgements in the order of their ids, as hexadecimal digits; not of the name."""
        digest = hashlib.sha256()
        for part in (self.corpus, self.queries, self.qrels):
            for key in sorted(part):
                digest.update(json.dumps([key, part[key]], sort_keys=True).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    @cached_property
    def own_documents(self) -> frozenset[str]:
        """Ids of the queries that are documents as well: the same id and, white space aside, the same text.

        A document's text is its title and text joined. Equal ids alone mean nothing, for many collections number their
        queries and their documents independently. Such a document is left out of the ranking of its own query.
        """
        return frozenset(
            query
            for query, text in self.queries.items()
            if query in self.corpus and document_text(self.corpus[query]).split() == text.split()
        )


def load_beir(folder: str | Path) -> BeirData:
    """The test collection in `folder`, named after it; queries without a judgement are dropped.

    - `folder`: holds the three files, each plain or with `.gz` behind its name; a leading `~` is the home folder.

    Whole numbers are ids as texts are, a missing or null title is empty, and a grade may be written `1.0`. Judgements
    of a query or a document that is not there are left out, and so is that of `own_documents`; lone surrogates are
    replaced. Warnings count all this.
    Raises AnchorvecError with `file:line` for a row that cannot be used and a repeated id, and where no judgement is
    left.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise AnchorvecError(f"{folder}: there is no such folder; name one in BEIR layout")
    name = without_surrogates(folder.resolve().name)
    mended: list[str] = []
    corpus = {
        document: {"title": _text(row, "title", place, default=""), "text": _text(row, "text", place)}
        for document, place, row in _rows_by_id(folder / "corpus.jsonl", "document", mended)
    }
    queries = {
        query: _text(row, "text", place) for query, place, row in _rows_by_id(folder / "queries.jsonl", "query", mended)
    }
    if mended:
        _warn(f"{name}: texts with half a surrogate pair, read as U+FFFD: {len(mended):,} (first: {mended[0]})")
    qrels = _qrels(folder, BeirData(corpus, queries, {}, name=name))
    judged = {query: text for query, text in queries.items() if query in qrels}
    data = BeirData(corpus, judged, qrels, name=name)
    if data.own_documents:
        _warn(
            f"{name}: queries that stand in the corpus, by id and text: {len(data.own_documents):,}; "
            "each is left out of its own ranking"
        )
    return data


def write_beir(data: BeirData, folder: str | Path) -> None:
    """Write `data` in BEIR layout into `folder`, which is made if need be; its name is not kept.

    Raises AnchorvecError for a file that cannot be written.
    """
    folder = user_path(folder)
    corpus = ({"_id": document, **fields} for document, fields in data.corpus.items())
    write_json_lines(folder / "corpus.jsonl", corpus)
    queries = ({"_id": query, "title": "", "text": text} for query, text in data.queries.items())
    write_json_lines(folder / "queries.jsonl", queries)
    rows = [QRELS_HEADER] + [[q, d, str(grade)] for q, row in data.qrels.items() for d, grade in row.items()]
    write_text(folder / "qrels" / "test.tsv", "".join("\t".join(row) + "\n" for row in rows))


def docstring_collection(data: "DocstringData") -> BeirData:
    """The score set of `data` as a test collection: each query is answered by the document of the same dotted name."""
    return BeirData(
        corpus={pair.name: {"title": "", "text": pair.document} for pair in data.score},
        queries={pair.name: pair.query for pair in data.queries},
        qrels={pair.name: {pair.name: 1} for pair in data.queries},
        name="docstrings",
    )


def document_text(document: dict[str, str]) -> str:
    """`title` and `text` of `document` as mteb joins them for an encoder: by a space, without one at the ends."""
    return f"{document['title']} {document['text']}".strip()


def _rows_by_id(path: Path, what: str, mended: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The id, place and row of each line of a JSON Lines file, plain or gzipped; ids must differ.

    Lone surrogates are replaced; the place of each such text is added to `mended`.
    """
    seen: set[str] = set()
    for place, read in read_json_lines(plain_or_gzipped(path)):
        texts = {name: read[name] for name in ("_id", "title", "text") if isinstance(read.get(name), str)}
        whole = {name: without_surrogates(text) for name, text in texts.items()}
        mended += [place] * sum(whole[name] != text for name, text in texts.items())
        row = read | whole
        key = row.get("_id")
        key = str(key) if type(key) is int else _text(row, "_id", place)
        if key in seen:
            raise AnchorvecError(f"{place}: the {what} id {key!r} was used before; ids must differ")
        seen.add(key)
        yield key, place, row


def _qrels(folder: Path, data: BeirData) -> dict[str, dict[str, int]]:
    """The judgements in `folder` of what is in `data`; a warning counts the others."""
    path = plain_or_gzipped(folder / "qrels" / "test.tsv")
    rows = read_lines(path)
    place, header = next(rows, (f"{path}:1", ""))
    if header.split("\t") != QRELS_HEADER:
        expected = "\\t".join(QRELS_HEADER)
        raise AnchorvecError(f"{place}: found {header[:60]!r}; the first line must be `{expected}`")
    qrels: dict[str, dict[str, int]] = {}
    left_out: dict[str, list[str]] = {}  # reason -> places
    for place, line in rows:
        query, document, grade = _judgement(line, place)
        if query not in data.queries:
            left_out.setdefault("of a query that is not in queries.jsonl", []).append(place)
        elif document not in data.corpus:
            left_out.setdefault("of a document that is not in corpus.jsonl", []).append(place)
        elif query == document and query in data.own_documents:
            left_out.setdefault("of a document that is the query itself", []).append(place)
        elif qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise AnchorvecError(f"{place}: query {query!r} and document {document!r} already have another score")
    reasons = ", ".join(f"{len(places):,} {reason} (first: {places[0]})" for reason, places in left_out.items())
    if not qrels:
        rest = f"no judgement is left: {reasons}" if reasons else "there is no judgement"
        raise AnchorvecError(f"{path}: {rest}; write rows of query-id, corpus-id and score")
    if left_out:
        _warn(f"{data.name}: judgements left out: {reasons}")
    return qrels


def _judgement(line: str, place: str) -> tuple[str, str, int]:
    """The ids and the grade of a line; the grade is a whole number, with or without a decimal point."""
    fields = line.split("\t")
    number = _GRADE.fullmatch(fields[2].strip()) if len(fields) == 3 else None
    if number is None:
        raise AnchorvecError(
            f"{place}: found {line[:60]!r}; write a query id, a document id and a whole number, split by tabs"
        )
    return fields[0], fields[1], int(number[1])


def _text(row: dict[str, Any], key: str, place: str, default: str | None = None) -> str:
    """The text of `key`, or `default` where it is missing, null, or the NaN that pandas writes for that."""
    value = row.get(key)
    if default is not None and (value is None or value != value):
        return default
    if not isinstance(value, str):
        raise AnchorvecError(f"{place}: `{key}` is {json.dumps(value)[:60]}; it must be a string")
    return value


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=4)

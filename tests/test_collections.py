"""Test collections as folders: what is read, written and refused."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData, bm25_scores, load_beir
from anchorvec.evaluation import write_beir as write_collection
from anchorvec.files import without_surrogates

ANIMALS = ["cat", "dog", "horse", "sheep", "goat", "cow", "duck", "goose"]  # each answers a query
ANIMALS += ["hen", "fox", "wolf", "bear", "deer", "mouse", "owl", "crow"]
CORPUS = {f"d{i}": {"title": name.title(), "text": f"The {name} sleeps."} for i, name in enumerate(ANIMALS)}
QUERIES = {f"q{i}": f"where does a {name} rest" for i, name in enumerate(ANIMALS[:8])}
QRELS = {f"q{i}": {f"d{i}": 1} for i in range(8)}
PROMPTS = {"query": "Find the animal of this question: ", "document": "An animal: "}


@pytest.fixture
def collection() -> BeirData:
    """Sixteen documents and eight queries, each answered by one document."""
    return BeirData(CORPUS, QUERIES, QRELS, name="animals")


def write_beir(
    folder: Path, *, corpus: str | None = None, queries: str | None = None, qrels: str | None = None
) -> Path:
    """Write the collection above in BEIR layout, with some file replaced by other text."""
    documents = "".join(json.dumps({"_id": i, **fields}) + "\n" for i, fields in CORPUS.items())
    questions = "".join(json.dumps({"_id": i, "text": text}) + "\n" for i, text in QUERIES.items())
    grades = "".join(f"{q}\t{d}\t{grade}\n" for q, row in QRELS.items() for d, grade in row.items())
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(documents if corpus is None else corpus)
    (folder / "queries.jsonl").write_text(questions if queries is None else queries)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + grades if qrels is None else qrels)
    return folder


def test_load_beir_reads_plain_and_gzipped_files_alike(tmp_path: Path) -> None:
    """A folder gives the same collection whether its files are gzipped or not."""
    plain, zipped = write_beir(tmp_path / "animals"), tmp_path / "zipped" / "animals"
    for path in plain.rglob("*.*"):
        copy = zipped / path.relative_to(plain).with_name(f"{path.name}.gz")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(gzip.compress(path.read_bytes()))
    assert load_beir(plain) == load_beir(zipped) == BeirData(CORPUS, QUERIES, QRELS, name="animals")


def test_what_is_written_is_what_is_read(tmp_path: Path, collection: BeirData) -> None:
    """A collection that was written to a folder is read back, grades and all, under the folder's name."""
    graded = replace(collection, qrels={**QRELS, "q0": {"d0": 2, "d1": 0, "d2": 1}})
    write_collection(graded, tmp_path / "animals")
    assert load_beir(tmp_path / "animals") == graded


def test_the_fingerprint_is_that_of_the_content(collection: BeirData) -> None:
    """Neither name nor order counts; a text, an id, a query, a grade or a judgement does."""
    shuffled = BeirData(dict(reversed(CORPUS.items())), dict(reversed(QUERIES.items())), dict(reversed(QRELS.items())))
    assert shuffled.fingerprint == collection.fingerprint
    others = [
        replace(collection, corpus=CORPUS | {"d0": {"title": "Cat", "text": "The cat sleeps"}}),
        replace(collection, corpus=CORPUS | {"d16": {"title": "", "text": ""}}),
        replace(collection, queries=QUERIES | {"q0": "where"}),
        replace(collection, qrels=QRELS | {"q0": {"d0": 2}}),
        replace(collection, qrels=QRELS | {"q0": {"d0": 1, "d1": 1}}),
    ]
    assert len({collection.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_load_beir_drops_queries_without_judgement(tmp_path: Path) -> None:
    """A query that no row of the judgements names is not kept."""
    folder = write_beir(tmp_path / "animals", qrels="query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    assert load_beir(folder).queries == {"q1": QUERIES["q1"]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\t0.5\n"}, "test.tsv:2: found 'q1.td1.t0.5'; .* a whole number"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\tnan\n"}, "test.tsv:2: .* a whole number"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1e30\n"}, "test.tsv:2: .* a whole number"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1\tx\n"}, "test.tsv:2: .*split by tabs"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1 d1 1\n"}, "test.tsv:2: .*split by tabs"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t2\n"}, "test.tsv:3: .*another score"),
        ({"qrels": "q1\td1\t1\n"}, "test.tsv:1: .*the first line must be"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "test.tsv: there is no judgement"),
        (
            {"corpus": '{"_id": "d0", "text": "a"}\n{"_id": "d0", "text": "b"}\n'},
            "corpus.jsonl:2: .*used before",
        ),
        ({"corpus": '{"_id": 7, "text": "a"}\n{"_id": "7", "text": "b"}\n'}, "corpus.jsonl:2: .*'7' was used before"),
        ({"corpus": '{"_id": 7.5, "text": "a"}\n'}, "corpus.jsonl:1: `_id` is 7.5"),
        ({"corpus": '{"_id": true, "text": "a"}\n'}, "corpus.jsonl:1: `_id` is true"),
        ({"corpus": '{"_id": null, "text": "a"}\n'}, "corpus.jsonl:1: `_id` is null"),
        ({"corpus": '{"_id": "d0", "title": ["a"], "text": "a"}\n'}, "corpus.jsonl:1: `title` is "),
        ({"corpus": '{"_id": "d0"}\n'}, "corpus.jsonl:1: `text` is null"),
        ({"queries": '\n{"_id": "q0", "text": \n'}, "queries.jsonl:2: this is no JSON"),
        ({"queries": "[1]\n"}, "queries.jsonl:1: .*one JSON object"),
    ],
)
def test_load_beir_names_file_and_line_of_a_bad_row(tmp_path: Path, files: dict[str, str], message: str) -> None:
    """A row that cannot be used is reported with its file and line."""
    with pytest.raises(AnchorvecError, match=message):
        load_beir(write_beir(tmp_path / "animals", **files))


def test_load_beir_reports_a_row_that_is_not_utf8(tmp_path: Path) -> None:
    """A line in another encoding is reported with its file and line."""
    folder = write_beir(tmp_path / "animals")
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "d0", "text": "a"}\n{"_id": "d1", "text": "\xe9"}\n')
    with pytest.raises(AnchorvecError, match=r"corpus\.jsonl:2: this is not UTF-8"):
        load_beir(folder)


def test_load_beir_reports_a_missing_file(tmp_path: Path) -> None:
    """The message names the file that the folder lacks."""
    with pytest.raises(AnchorvecError, match=r"corpus\.jsonl: there is no such file, nor corpus\.jsonl\.gz"):
        load_beir(tmp_path)


def judgements(*rows: str) -> str:
    """`qrels/test.tsv` with these rows, whose fields are split by blanks."""
    return "".join("\t".join(row.split()) + "\n" for row in ("query-id corpus-id score", *rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["q9 d1 1"], r"1 of a query that is not in queries\.jsonl \(first: \S*test\.tsv:3\)"),
        (["q1 gone 1", "q2 lost 0"], r"2 of a document that is not in corpus\.jsonl \(first: \S*test\.tsv:3\)"),
        (["q1 gone 1", "q9 d1 1", "q9 d2 1"], r"1 of a document .*:3\), 2 of a query .*:4\)"),
    ],
    ids=["query", "documents", "both"],
)
def test_judgements_of_what_is_not_there_are_left_out(tmp_path: Path, rows: list[str], message: str) -> None:
    """All others are kept; one line has the number of each kind and the first place."""
    folder = write_beir(tmp_path / "animals", qrels=judgements("q1 d1 2", *rows, "q3 d3 1"))
    with pytest.warns(UserWarning, match=f"^animals: judgements left out: {message}$") as said:
        data = load_beir(folder)
    kept = {query: QUERIES[query] for query in ("q1", "q3")}
    assert data == BeirData(CORPUS, kept, {"q1": {"d1": 2}, "q3": {"d3": 1}}, name="animals")
    assert len([warning for warning in said if "animals" in str(warning.message)]) == 1


def test_a_judgement_of_a_document_that_is_the_query_itself_is_left_out(tmp_path: Path) -> None:
    """It could not be found, for it is left out of the ranking; both are said."""
    rows = [{"_id": "d3", "text": "Sheep The sheep sleeps."}, {"_id": "d4", "text": "Sheep The sheep sleeps."}]
    folder = write_beir(
        tmp_path / "animals",
        queries="".join(json.dumps(row) + "\n" for row in rows),
        qrels=judgements("d3 d3 1", "d3 d5 1", "d4 d4 1"),
    )
    with pytest.warns(UserWarning, match="left out") as said:
        data = load_beir(folder)
    assert data.qrels == {"d3": {"d5": 1}, "d4": {"d4": 1}}
    assert re.search(r"left out: 1 of a document that is the query itself \(first: \S*:2\)$", str(said[0].message))
    assert re.search(r"by id and text: 1; each is left out", str(said[1].message))


def test_a_folder_without_a_judgement_that_can_be_used_is_refused(tmp_path: Path) -> None:
    """The error counts why."""
    folder = write_beir(tmp_path / "animals", qrels=judgements("q1 gone 1", "q9 d1 1", "q2 gone 1"))
    with pytest.raises(AnchorvecError, match=r"test\.tsv: no judgement is left: 2 of a document .*, 1 of a query "):
        load_beir(folder)


def test_ids_titles_and_grades_are_read_as_other_programs_write_them(tmp_path: Path) -> None:
    """Numbers are ids, a title may be null, NaN or missing, grades may have a decimal point and a sign."""
    rows = [{"_id": 0, "title": None}, {"_id": -1, "title": float("nan")}, {"_id": 2**70}, {"_id": "03", "title": "c"}]
    folder = write_beir(
        tmp_path / "loose",
        corpus="".join(json.dumps(row | {"text": "x"}) + "\n" for row in rows),
        queries="".join(json.dumps({"_id": i, "title": None, "text": f"query {i}"}) + "\n" for i in range(4)),
        qrels=judgements("0 0 1.0", "0 03 2.", "1 -1 +3.00", f"2 {2**70} 0.0", "3 03 -1.0"),
    )
    titles = {"0": "", "-1": "", str(2**70): "", "03": "c"}
    assert load_beir(folder) == BeirData(
        {document: {"title": title, "text": "x"} for document, title in titles.items()},
        {str(i): f"query {i}" for i in range(4)},
        {"0": {"0": 1, "03": 2}, "1": {"-1": 3}, "2": {str(2**70): 0}, "3": {"03": -1}},
        name="loose",
    )


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(tmp_path: Path) -> None:
    """In texts, titles and ids, of documents and of queries; whole pairs are characters; one line counts the texts."""
    folder = write_beir(
        tmp_path / "halves",
        corpus=r'{"_id": "d0", "title": "a\ud83d", "text": "\ude00b \ud83d\ude00"}' + "\n"
        r'{"_id": "d1", "text": "\ud83d\ude00", "other": "\ud83d", "title": NaN}' + "\n"
        r'{"_id": "d\udfff", "text": "c"}' + "\n",
        queries='{"_id": "q0", "text": "plain"}\n' r'{"_id": "q1", "text": "\ud83d \ud83d"}' "\n",
        qrels=judgements("q0 d0 1", "q1 d\ufffd 1"),
    )
    with pytest.warns(UserWarning, match=r"^halves: .* U\+FFFD: 4 \(first: \S*corpus\.jsonl:1\)$") as said:
        data = load_beir(folder)
    assert data.corpus["d0"] == {"title": "a\ufffd", "text": "\ufffdb \N{GRINNING FACE}"}
    assert list(data.corpus) == ["d0", "d1", "d\ufffd"]
    assert data.queries == {"q0": "plain", "q1": "\ufffd \ufffd"}
    assert len(said) == 1
    bm25_scores(data)


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("", ""),
        ("na\u00efve \N{GRINNING FACE}\ufeff", "na\u00efve \N{GRINNING FACE}\ufeff"),
        ("\ud83d\ude00", "\N{GRINNING FACE}"),
        ("a\ud83db", "a\ufffdb"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude00\n", "\ufffd\N{GRINNING FACE}\n"),
    ],
)
def test_surrogates_are_joined_or_replaced(text: str, mended: str) -> None:
    """A pair is its character, a half alone U+FFFD; all else stays, a byte order mark too."""
    assert without_surrogates(text) == mended
    assert without_surrogates(mended) == mended


@pytest.mark.parametrize("row", ["[" * 100_000, '{"_id": ' + "7" * 5_000 + "}"], ids=["deep", "long"])
def test_what_the_json_reader_gives_up_on_has_its_place(tmp_path: Path, row: str) -> None:
    """Lists in lists without end, and numbers of thousands of digits."""
    with pytest.raises(AnchorvecError, match=r"corpus\.jsonl:1: this is no JSON"):
        load_beir(write_beir(tmp_path / "animals", corpus=f"{row}\n"))

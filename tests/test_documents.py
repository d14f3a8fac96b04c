"""Files to search: each is read as what it is, and what cannot be used is counted."""

import csv
import gzip
import io
import json
import os

import pytest

from anchorvec.data.documents import TEXT_COLUMNS, read_documents
from anchorvec.data.pairs import read_pairs
from anchorvec.errors import AnchorvecError

TEXTS = [f"note {i}, on [bees] and “où”" for i in range(5)]


def table(delimiter, rows):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return out.getvalue()


# name -> (content, line of each document); each file holds TEXTS
ROWS = {
    "objects.json": (json.dumps([{"text": text} for text in TEXTS]), [1] * 5),
    "indented.json": (json.dumps([{"text": text} for text in TEXTS], indent=1), [2, 5, 8, 11, 14]),
    "strings.json": (json.dumps(TEXTS, ensure_ascii=False), [1] * 5),
    "lines.json": ("\n".join(json.dumps({"text": text}) for text in TEXTS), [1, 2, 3, 4, 5]),
    "objects.jsonl": ("\n\n".join(json.dumps({"body": text}) for text in TEXTS), [1, 3, 5, 7, 9]),
    "strings.jsonl": ("\n".join(json.dumps(text) for text in TEXTS), [1, 2, 3, 4, 5]),
    "objects.ndjson": ("\r\n".join(json.dumps({"Content": text}) for text in TEXTS), [1, 2, 3, 4, 5]),
    "comma.csv": (table(",", [["n", "passage"], *enumerate(TEXTS)]), [2, 3, 4, 5, 6]),
    "bom.csv": ("\ufeff" + table(",", [["text", "n"], *((text, 0) for text in TEXTS)]), [2, 3, 4, 5, 6]),
    "tab.TSV": (table("\t", [["n", "Text"], *enumerate(TEXTS)]), [2, 3, 4, 5, 6]),
}


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_a_data_file_is_a_document(tmp_path, name, gzipped):
    """Its text column alone, with its line and number; a header is none."""
    content, lines = ROWS[name]
    path = tmp_path / (f"{name}.gz" if gzipped else name)
    path.write_bytes(gzip.compress(content.encode()) if gzipped else content.encode())
    corpus = read_documents(path)
    assert [document.text for document in corpus.documents] == TEXTS
    assert [document.line for document in corpus.documents] == lines
    assert {document.file for document in corpus.documents} == {str(path)}
    assert corpus.documents[-1].record >= 5
    assert (corpus.files, corpus.characters) == (1, sum(map(len, TEXTS)))


@pytest.mark.parametrize("column", TEXT_COLUMNS)
def test_title_and_text_are_joined(tmp_path, column):
    """As a test collection is scored; a null one is left out, and the first column for texts is taken."""
    rows = [{"title": "Bees", column: "sleep", "_id": 7}, {"title": None, column: "Owls", "id": "x"}, {"n": 1}]
    rows += [{"title": "alone", column: None}, {column: ""}, {column: ["a"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = read_documents(tmp_path / "a.jsonl")
    assert [(d.text, d.id, d.record) for d in corpus.documents] == [
        ("Bees sleep", "7", 1),
        ("Owls", "x", 2),
        ("alone", None, 4),
    ]
    assert corpus.losses() == f"left out: rows without a text: 3 (first: {tmp_path / 'a.jsonl'}:3)"


def test_a_lone_object_is_one_document(tmp_path):
    """Also where it is written over several lines."""
    (tmp_path / "a.json").write_text(json.dumps({"title": "Bees", "text": "sleep\n"}, indent=2))
    assert [document.text for document in read_documents(tmp_path / "a.json").documents] == ["Bees sleep"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "README", "code.py", "a.txt.gz"])
def test_a_file_of_text_is_one_document(tmp_path, name):
    """As it stands, but for its line ends."""
    content = b"\xef\xbb\xbf# One\r\n\r\ntwo\r\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    [document] = read_documents(tmp_path / name).documents
    assert (document.text, document.line, document.record) == ("# One\n\ntwo\n", 1, None)


def test_a_folder_is_read_at_any_depth_and_what_is_left_out_is_counted_by_reason(tmp_path):
    """In one line, with the first place of each reason."""
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "[b].md").write_text("B")
    (tmp_path / "rows.csv").write_text("n,text\n1,C\n2,\n3,D\n")
    (tmp_path / "settings.json").write_text('{"a": [1, 2]}')
    (tmp_path / "broken.json").write_text('[{"text": "a"}, ')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "sub" / "z.gz").write_bytes(gzip.compress(b"a\0b"))
    (tmp_path / "sub" / "damaged.gz").write_bytes(b"nothing")
    (tmp_path / "latin.txt").write_bytes("où".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "sub" / "deep" / "a.txt").write_text("A")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    os.mkfifo(tmp_path / "pipe")
    corpus = read_documents(tmp_path)
    places = {(d.file.removeprefix(f"{tmp_path}/"), d.line): d.text for d in corpus.documents}
    assert places == {("[b].md", 1): "B", ("rows.csv", 2): "C", ("rows.csv", 4): "D", ("sub/deep/a.txt", 1): "A"}
    assert corpus.files == 3
    expected = {
        "hidden files or folders": (2, ".git"),
        "rows without a text": (1, "rows.csv:3"),
        "data files without a text": (1, "settings.json"),
        "data files that break off": (1, "broken.json"),
        "binary files": (2, "picture.png"),
        "files or folders that cannot be read": (1, "sub/damaged.gz"),
        "files not in UTF-8": (1, "latin.txt"),
        "empty files": (1, "empty.txt"),
        "links to folders": (1, "link"),
        "neither a file nor a folder": (1, "pipe"),
    }
    found = {reason: (n, place.removeprefix(f"{tmp_path}/")) for reason, (n, place) in corpus.left_out.items()}
    assert found == expected
    assert "binary files: 2 (first: " in corpus.losses()
    assert "\n" not in corpus.losses()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_of_a_test_collection_the_corpus_alone_is_read(tmp_path, suffix):
    """Queries and judgements would be found by themselves; what else stands there is read."""
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    for name in ("corpus", "queries"):
        content = json.dumps({"_id": name, "title": "", "text": name}).encode()
        (tmp_path / f"{name}.jsonl{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    corpus = read_documents(tmp_path)
    assert [(document.id, document.text) for document in corpus.documents] == [("corpus", "corpus")]
    assert corpus.left_out["queries and judgements"][0] == 2


def test_no_row_disappears_unaccounted(tmp_path):
    """Rows that cannot be parsed, that are empty or not UTF-8, and a stray quote: each is read or counted."""
    lines = [b'{"text": "a"}', b"", b"{", b"[1]", b"3", b'{"text": "\xff"}', b'"\xff"', b'{"text": "b", "text": "c"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    corpus = read_documents(tmp_path / "a.jsonl")
    assert [document.text for document in corpus.documents] == ["a"]
    counts = {reason: number for reason, (number, _) in corpus.left_out.items()}
    assert counts == {"rows that are empty": 1, "rows that cannot be parsed": 4, "rows that are not UTF-8": 2}
    (tmp_path / "a.csv").write_bytes(b'n,text\n1,"one\n2,two\n3,\xff\n4\n5,five\n')
    corpus = read_documents(tmp_path / "a.csv")
    assert [(d.text, d.line) for d in corpus.documents] == [('"one', 2), ("two", 3), ("five", 6)]
    assert corpus.mended == {"rows with a stray quote": (1, f"{tmp_path / 'a.csv'}:2")}
    assert {reason: number for reason, (number, _) in corpus.left_out.items()} == {
        "rows that are not UTF-8": 1,
        "rows that cannot be parsed": 1,
    }


@pytest.mark.parametrize(
    "content",
    ['{"text": "half \\ud83d."}', '"half \\ud83d."', '{"title": "half \\ude00", "text": ""}', '{"body": "\\ud83d"}'],
)
def test_half_a_surrogate_pair_is_read_as_a_replacement_and_counted(tmp_path, content):
    """In texts and titles."""
    (tmp_path / "a.jsonl").write_text(content)
    corpus = read_documents(tmp_path / "a.jsonl")
    assert "\ufffd" in corpus.documents[0].text
    corpus.documents[0].text.encode()
    assert "mended: texts with half of a surrogate pair, now U+FFFD: 1 (first: " in corpus.losses()


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path):
    """With a replacement character."""
    name = os.fsdecode(b"\xff.txt")
    (tmp_path / name).write_text("a")
    for path in (tmp_path, tmp_path / name):
        [document] = read_documents(path).documents
        document.file.encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "n,note\n1,a\n", 'no column has the texts; found: "n", "note". Name the one with them text or doc'),
        ("a.csv", "text,n,text\na,1,b\n", 'two columns are called "text"'),
        ("a.csv", "text,n,n\na,1,b\n", 'two columns are called "n"'),
        ("a.csv", "", "the file is empty"),
        ("a.tsv", "text\tn\n", "the file is empty"),
        ("a.csv", "text,n\n,1\n", "rows without a text: 1"),
        ("a.json", '{"rows": [{"text": "a"}]}', '"rows". Name .* or write the list in "rows" as a file of its own'),
        ("a.json", '{\n"n": 1,\n"rows": [\n{"text": "a"}]}', 'found: "n", "rows"'),
        ("a.json", "[1, 2]", "rows that cannot be parsed: 2"),
        ("a.json", '[{"n": 1}]', 'found: "n"'),
        ("a.json", "[]", "the file is empty"),
        ("a.json", '["a"', r"a\.json:1: this is no JSON array"),
        ("a.json", '["a"]["b"]', "something stands behind the array"),
        ("a.jsonl", "nothing\n", r"a\.jsonl:1: not one JSON object"),
        ("a.jsonl.gz", "not zipped", "the file cannot be read"),
        ("a.txt", b"fine\n\xff\n", "line 2 is not UTF-8"),
        ("a.txt", "\n", "the file is empty"),
        ("a.bin", b"a\0b", "a binary file"),
        ("a.txt", "a".encode("utf-16"), "not UTF-8|a binary file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    """Its name, what was found, and what to write instead."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AnchorvecError, match=message) as error:
        read_documents(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_path_without_documents_is_refused(tmp_path):
    """A missing one, and a folder of which nothing is left, with the reasons."""
    with pytest.raises(AnchorvecError, match="nowhere: there is no such file"):
        read_documents(tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(b"\0")
    with pytest.raises(
        AnchorvecError, match=r"there is no document in it; left out: binary files: 1 \(first: .*a\.png"
    ):
        read_documents(tmp_path)


def test_pairs_keep_lines_with_unicode_line_ends_and_refuse_what_stands_behind_an_array(tmp_path):
    """The same readers: a raw U+2028 in a text is no end of its row, and a second array is not lost."""
    row = json.dumps({"query": "a\u2028b", "positive": "c\u0085d"}, ensure_ascii=False)
    (tmp_path / "a.json").write_text(row + "\n")
    assert read_pairs(tmp_path / "a.json").report.rows == 1
    (tmp_path / "a.json").write_text(f"[{row}]\n[{row}]")
    with pytest.raises(AnchorvecError, match="something stands behind the array"):
        read_pairs(tmp_path / "a.json")

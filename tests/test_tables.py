"""Tables of pairs, CSV, TSV, Parquet and JSON arrays: no row is lost unseen."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anchorvec.data import read_pairs
from anchorvec.errors import AnchorvecError

pytestmark = pytest.mark.usefixtures("own_data_cache")


def test_a_table_names_the_line_where_a_row_begins(tmp_path: Path) -> None:
    """Line numbers of CSV count the lines of the file, and name the one where a row begins."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'query,positive\na,"one\ntwo"\n"",b\nc,d,e\ncaf\xe9,b\nz,"open\n')
    report = read_pairs(path).report
    assert report.rejected == {"empty": 1, "unparsable": 1, "not UTF-8": 1}
    assert report.mended == {"with a stray quote": 1}
    places = {int(e.removeprefix(f"{path}:").split(":")[0]): e for e in report.examples}
    assert sorted(places) == [4, 5, 6, 7]
    assert "3 fields where the header has 2" in places[5]


def test_a_table_holds_negatives_as_a_json_list(tmp_path: Path) -> None:
    """In a table, `negatives` is a JSON list; an empty cell means none, anything else is a bad row."""
    path = tmp_path / "a.tsv"
    path.write_text('query\tpositive\tnegatives\na\tb\t"[""c"", ""d""]"\ne\tf\t\ng\th\ti\n')
    pairs = read_pairs(path)
    assert pairs.dataset["negatives"][:] == [["c", "d"], []]
    assert pairs.report.rejected == {"unparsable": 1}


def test_a_long_text_in_a_table_is_read(tmp_path: Path) -> None:
    """A CSV text above the 128 KiB that Python's reader allows by default is kept."""
    path = tmp_path / "a.csv"
    path.write_text(f"query,positive\na,{'b' * 200_000}\n")
    assert len(read_pairs(path, strict=True).dataset[0]["positive"]) == 200_000


def test_parquet_rows_are_numbered_from_one(tmp_path: Path) -> None:
    """A bad Parquet row is named by its number, also where its bytes are not UTF-8."""
    path = tmp_path / "a.parquet"
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xe9c"))
    pq.write_table(pa.table({"query": texts, "positive": ["x", "y", None]}), path)
    report = read_pairs(path).report
    assert report.rows == 1
    assert report.examples == [
        f"{path}:2: bytes that are not UTF-8",
        f"{path}:3: positive is null, not a string",
    ]


def test_a_table_with_a_broken_header_is_one_error(tmp_path: Path) -> None:
    """Quotes inside a name are no reason for a traceback."""
    (tmp_path / "a.csv").write_text('"a"b,positive\nq,p\n')
    with pytest.raises(AnchorvecError, match=r"a.csv cannot be read"):
        read_pairs(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ('q5,"p5', ("q5", '"p5')),  # never closed
        ('"q5,p5', ('"q5', "p5")),
        ('q5,"p5" and more', ("q5", '"p5" and more')),  # closed too early
        ('q5,"p, 5', None),  # no two fields, however its quotes are taken
    ],
)
@pytest.mark.parametrize("later", ["q{0},p{0}", 'q{0},"p{0}"', '"q{0}","p{0}"'])
def test_a_stray_quote_costs_its_row_at_most(
    tmp_path: Path, line: str, kept: tuple[str, str] | None, later: str
) -> None:
    """Every line of the file is kept, mended or counted; none of them vanishes in the row with the quote."""
    lines = [later.format(i) for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["query,positive", *lines[:5], line, *lines[6:]]) + "\n")
    pairs = read_pairs(tmp_path / "a.csv")
    report = pairs.report
    assert report.read == 40 == report.rows + sum(report.rejected.values())
    expected = [(f"q{i}", f"p{i}") for i in range(40) if i != 5]
    if kept is not None:
        expected.insert(5, kept)
        assert report.mended == {"with a stray quote": 1}
    assert list(zip(pairs.dataset["query"][:], pairs.dataset["positive"][:], strict=True)) == expected
    assert f"{tmp_path / 'a.csv'}:7: " in report.examples[0]


def test_a_text_in_quotes_may_run_over_lines(tmp_path: Path) -> None:
    """With quotes, commas and blank lines in it."""
    text = 'one, "two"\n\nthree'
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["query", "positive"], *([f"q{i}", f"{text} {i}"] for i in range(9))])
    pairs = read_pairs(tmp_path / "a.csv")
    assert pairs.dataset["positive"][:] == [f"{text} {i}" for i in range(9)]
    assert (pairs.report.read, pairs.report.mended) == (9, {})


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_array_is_read_member_by_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, indent: int | None
) -> None:
    """In parts of any size, with the line of each member."""
    rows = [*({"query": f"q {i}", "positive": f"p \u00fc {i}"} for i in range(50)), ["no object"], {"query": ""}]
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    for part in (7, 2**20):
        monkeypatch.setattr("anchorvec.data.formats._CHUNK", part)
        pairs = read_pairs(tmp_path / name)
        assert pairs.dataset["positive"][:] == [f"p \u00fc {i}" for i in range(50)]
        assert (pairs.report.read, pairs.report.rejected) == (52, {"unparsable": 1, "empty": 1})
        line = text[: text.index("[", 1)].count("\n") + 1
        assert f"{name}:{line}: a JSON list" in pairs.report.examples[0]


@pytest.mark.parametrize("end", ["", '{"query": "a"', "[1, "])
def test_a_json_array_that_breaks_off_is_an_error(tmp_path: Path, end: str) -> None:
    """It names the line; rows after it would be lost."""
    (tmp_path / "a.json").write_text('[\n{"query": "a", "positive": "b"},\n' + end)
    with pytest.raises(AnchorvecError, match=r"a\.json:3: this is no JSON array of objects"):
        read_pairs(tmp_path / "a.json")


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    """In a table; in JSON the row is left out."""
    (tmp_path / "a.csv").write_text("query,positive,positive\na,b,c\n")
    (tmp_path / "a.tsv").write_text("id\tquery\tpositive\tid\n1\ta\tb\t2\n")
    twice = pa.table([["a"], ["b"], ["c"]], names=["query", "positive", "query"])
    pq.write_table(twice, tmp_path / "a.parquet")
    for name, column in (("a.csv", "positive"), ("a.tsv", "id"), ("a.parquet", "query")):
        with pytest.raises(AnchorvecError, match=f'{name} has two columns "{column}"; rename one'):
            read_pairs(tmp_path / name)
    (tmp_path / "a.jsonl").write_text(
        '{"query": "a", "positive": "b", "query": "c"}\n' + json.dumps({"query": "d", "positive": "e"})
    )
    report = read_pairs(tmp_path / "a.jsonl").report
    assert (report.rows, report.rejected) == (1, {"unparsable": 1})
    assert 'a.jsonl:1: the name "query" is there twice' in report.examples[0]

"""Reading training pairs: what is kept, what is left out, and what the user is told."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from anchorvec.data import drawn_rows, read_pairs
from anchorvec.errors import AnchorvecError

ROWS = [
    {"query": "what eats grass?", "positive": " A hare does. ", "negative": "A lynx eats hares."},
    {"query": "où dort la loutre ?", "positive": 'Sur le dos,\nà la "surface", 水.', "negative": None},
]
EXPECTED = [
    {"query": "what eats grass?", "positive": " A hare does. ", "negatives": ["A lynx eats hares."]},
    {"query": "où dort la loutre ?", "positive": 'Sur le dos,\nà la "surface", 水.', "negatives": []},
]


pytestmark = pytest.mark.usefixtures("own_data_cache")


def json_lines(path: Path, rows: list[Any]) -> Path:
    """`path`, with one row a line; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def table(path: Path, delimiter: str) -> Path:
    """`path`, with ROWS as a table whose quoted text holds a line break."""
    text = delimiter.join(["query", "positive", "negative"]) + "\n"
    for row in ROWS:
        cells = [(row[key] or "").replace('"', '""') for key in ("query", "positive", "negative")]
        text += delimiter.join(f'"{cell}"' for cell in cells) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz", "a.parquet"]
)
def test_every_format_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    """JSON Lines, CSV, TSV (plain or gzipped) and Parquet with the same rows give the same data set."""
    path = tmp_path / name
    if ".json" in name:
        json_lines(path, ROWS)
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        table(path, "\t" if ".tsv" in name else ",")
    pairs = read_pairs(path, strict=True)
    assert pairs.dataset.to_list() == EXPECTED
    assert (pairs.report.rows, pairs.report.rejected) == (2, {})


def test_a_local_data_set_folder_is_read_by_split(tmp_path: Path) -> None:
    """A folder is loaded as a data set, the split by its name, and read again after it changed."""
    folder = tmp_path / "animals"
    folder.mkdir()
    json_lines(folder / "train.jsonl", ROWS)
    json_lines(folder / "validation.jsonl", ROWS[:1])
    assert read_pairs(str(folder)).dataset.to_list() == EXPECTED
    assert read_pairs(folder, split="validation").dataset.to_list() == EXPECTED[:1]
    with pytest.raises(AnchorvecError, match=r"animals.*tset"):
        read_pairs(folder, split="tset")
    with pytest.raises(AnchorvecError, match=r"train.jsonl has no splits"):
        read_pairs(folder / "train.jsonl", split="validation")
    json_lines(folder / "train.jsonl", ROWS[:1])
    assert read_pairs(folder).dataset.to_list() == EXPECTED[:1]


def test_a_subset_of_a_data_set_is_read_by_its_name(tmp_path: Path) -> None:
    """Of a data set with several subsets one must be named; the error of `datasets` lists them."""
    folder = tmp_path / "animals"
    folder.mkdir()
    json_lines(folder / "big.jsonl", ROWS)
    json_lines(folder / "small.jsonl", ROWS[:1])
    subsets = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("big", "small")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(subsets)}\n---\n")
    assert read_pairs(folder, subset="big").dataset.to_list() == EXPECTED
    assert read_pairs(folder, subset="small").dataset.to_list() == EXPECTED[:1]
    with pytest.raises(AnchorvecError, match=r"animals.*'big', 'small'\]; it goes into the key `subset`$"):
        read_pairs(folder)
    with pytest.raises(AnchorvecError, match=r"animals.*other.*small"):
        read_pairs(folder, subset="other")


def test_a_built_in_data_set_is_read_by_name() -> None:
    """`builtin:debug` needs no file."""
    pairs = read_pairs("builtin:debug", strict=True)
    assert pairs.dataset.column_names == ["query", "positive", "negatives"]
    assert len(pairs.dataset) == pairs.report.rows == 200


def test_bad_rows_are_left_out_and_counted_by_kind(tmp_path: Path) -> None:
    """Each kind of bad row is counted and shown with its line; the good rows stay."""
    rows = [
        {"query": "a", "positive": "b"},
        {"query": "a", "positive": "b", "negative": "c"},
        {"query": " \t", "positive": "b"},
        b"",
        {"query": 3, "positive": "b"},
        {"query": "a", "positive": None},
        {"query": "a", "positive": "b", "negatives": "c"},
        {"question": "a", "positive": "b"},
        b'{"query": "a", ',
        b'["a", "b"]',
        b'{"query": "caf\xe9", "positive": "b"}',
        b'{"query": "a", "positive": "\\ud800"}',
        {"query": "c", "positive": "d"},
    ]
    path = json_lines(tmp_path / "bad.jsonl", rows)
    pairs = read_pairs(path)
    assert pairs.dataset["query"][:] == ["a", "a", "c"]
    assert pairs.report.mended == {"with half of a surrogate pair, now U+FFFD": 1}
    assert pairs.report.read == len(rows) == pairs.report.rows + sum(pairs.report.rejected.values())
    assert pairs.report.rejected == {
        "duplicate": 1,
        "empty": 2,
        "not a string": 3,
        "missing column": 1,
        "unparsable": 2,
        "not UTF-8": 1,
    }
    lines = [int(example.removeprefix(f"{path}:").split(":")[0]) for example in pairs.report.examples]
    assert lines == list(range(2, 13))
    assert "question, positive" in pairs.report.examples[6]


def test_the_first_three_of_a_kind_are_shown(tmp_path: Path) -> None:
    """The report counts all bad rows and shows three; its text is one paragraph with both."""
    path = json_lines(tmp_path / "a.jsonl", [ROWS[0], *[{"query": "", "positive": "b"}] * 5])
    report = read_pairs(path).report
    assert report.rejected == {"empty": 5}
    assert report.examples == [f"{path}:{line}: query is empty" for line in (2, 3, 4)]
    assert "1 pairs" in str(report)
    assert "5 empty" in str(report)
    assert f"{path}:4" in str(report)
    assert "\n" not in str(report)


def test_strict_names_the_first_bad_line(tmp_path: Path) -> None:
    """With `strict`, one bad row is an error that says where and what."""
    path = json_lines(tmp_path / "a.jsonl", [*ROWS, {"query": "a", "positive": 5}])
    with pytest.raises(AnchorvecError, match=r"a\.jsonl:3: positive is of type int, not a string"):
        read_pairs(path, strict=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path, name: str) -> None:
    """A file that begins with a byte order mark reads as one without."""
    content = json.dumps(ROWS[0]) if name == "a.jsonl" else 'query,positive\n"what eats grass?",hares'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_pairs(tmp_path / name, strict=True).dataset[0]["query"] == "what eats grass?"


def test_negatives_that_are_none_are_dropped(tmp_path: Path) -> None:
    """A negative that is empty, repeated, or the row's own query or positive is dropped and counted."""
    row = {"query": "a", "positive": "b", "negative": "c", "negatives": ["b ", "a", "", "c", "d"]}
    pairs = read_pairs(json_lines(tmp_path / "a.jsonl", [row]), strict=True)
    assert pairs.dataset["negatives"][:] == [["c", "d"]]
    assert pairs.report.dropped_negatives == 4
    assert "negatives dropped: 4" in pairs.report.summary()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no usable row: it is empty"),
        ("a.jsonl", b'{"text": "a"}\n', 'a.jsonl:1: no column "query"; found: text'),
        ("a.jsonl", b"[\n", "a.jsonl:1: not one JSON object"),
        ("a.csv", b"question,positive\na,b\n", 'no column "query"; found: question, positive'),
        ("a.csv", b"", 'no column "query"; found: none'),
        ("a.xlsx", b"PK", "unknown extension; known are .jsonl"),
        ("a.parquet.gz", b"PK", "unknown extension"),
        ("a.parquet", b"PK", "cannot be read"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"query": "a", "positive": "b"}\n' * 9, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_file_without_pairs_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A file that is empty, broken, of an unknown kind or without the columns says so, with its path."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AnchorvecError) as error:
        read_pairs(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("path", ["missing.jsonl", "/nowhere/pairs", "a/b/c", "missing.csv.gz"])
def test_a_missing_file_is_not_looked_for_on_the_hub(path: str) -> None:
    """A path that can be no hub name, or ends like a file, is missing; the error names it."""
    with pytest.raises(AnchorvecError, match=f"{path} does not exist"):
        read_pairs(path)


def test_an_unknown_hub_name_is_an_error() -> None:
    """A name that is neither here nor on the hub (offline in tests) is an AnchorvecError."""
    with pytest.raises(AnchorvecError, match="nobody/nothing is no file here"):
        read_pairs("nobody/nothing")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """No cache outlives the content: a file written anew, and a like file elsewhere, give their own rows."""
    path = json_lines(tmp_path / "a.jsonl", ROWS[:1])
    before = read_pairs(path).dataset
    json_lines(path, ROWS[1:])
    assert read_pairs(path).dataset.to_list() == EXPECTED[1:]
    assert before.to_list() == EXPECTED[:1]
    json_lines(path, ROWS[:1])
    assert read_pairs(path).dataset.to_list() == EXPECTED[:1]


def test_pairs_are_memory_mapped_and_leave_one_file(tmp_path: Path) -> None:
    """The data set lies in one Arrow file, the same for the same rows, and no scratch file stays (T17)."""
    path = json_lines(tmp_path / "a.jsonl", ROWS)
    files = {read_pairs(path).dataset.cache_files[0]["filename"] for _ in range(2)}
    assert files == {str(file) for file in (tmp_path / "cache" / "anchorvec").iterdir()}
    with pytest.raises(AnchorvecError):
        read_pairs(json_lines(tmp_path / "b.jsonl", [{"query": "a", "positive": 5}]), strict=True)
    assert not list((tmp_path / "cache" / "anchorvec").glob("*.tmp"))


def test_an_input_file_is_never_changed(tmp_path: Path) -> None:
    """Reading leaves the bytes and the time of the file as they were."""
    path = json_lines(tmp_path / "a.jsonl", ROWS)
    before = path.read_bytes(), path.stat().st_mtime_ns
    read_pairs(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(("weight", "uses"), [(1, [1]), (2, [2]), (0.1, [0, 1]), (1.5, [1, 2]), (0.001, [0, 1])])
def test_a_weight_is_how_often_rows_are_drawn(weight: float, uses: list[int]) -> None:
    """Weight 2 holds each row twice, 0.1 a tenth of them, 1.5 each once and half again; never none at all."""
    rows = drawn_rows(50, weight, seed=0).tolist()
    assert len(rows) == max(1, round(50 * weight))
    assert sorted({rows.count(row) for row in range(50)}) == uses


def test_a_weighted_sample_depends_on_the_seed_alone() -> None:
    """The same seed draws the same rows, another seed others."""
    first, again, other = (drawn_rows(50, 0.5, seed).tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_must_be_above_zero(weight: float) -> None:
    """A weight that draws nothing, or without end, is an error."""
    with pytest.raises(AnchorvecError, match="above 0"):
        drawn_rows(1, weight, seed=0)


def test_columns_without_a_meaning_are_named(tmp_path: Path) -> None:
    """In every format; hard negatives under another name must not get lost in silence."""
    rows = [{"query": "q", "positive": "p", "neg": "n", "negative_1": "m"}]
    json_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text("query,positive,neg,negative_1\nq,p,n,m\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    json_lines(tmp_path / "folder" / "train.jsonl", rows)
    for name in ("a.jsonl", "a.csv", "a.parquet", "folder"):
        report = read_pairs(tmp_path / name).report
        assert report.ignored_columns == ["neg", "negative_1"]
        assert "columns without a meaning here: neg, negative_1" in str(report)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a recipe no shell replaces it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    json_lines(tmp_path / "a.jsonl", ROWS)
    assert read_pairs("~/a.jsonl").dataset.to_list() == EXPECTED


ROW = {"query": "a", "positive": "b"}


@pytest.mark.parametrize("negatives", [["c", None, "d"], ["c", 3, "d"], ["c", "", "d"], ["c", "d", ["e"]]])
def test_a_negative_that_is_no_text_costs_itself_alone(tmp_path: Path, negatives: list[object]) -> None:
    """Its row keeps the others; it is counted."""
    path = json_lines(tmp_path / "a.jsonl", [{**ROW, "negatives": negatives}])
    pairs = read_pairs(path)
    assert pairs.dataset["negatives"][:] == [["c", "d"]]
    assert (pairs.report.dropped_negatives, pairs.report.rejected) == (1, {})


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_of_save_to_disk_is_read(tmp_path: Path, split: str) -> None:
    """One split, or several by their names."""
    one = Dataset.from_list([{**ROW, "negatives": ["n"]}, {"query": "c", "positive": None, "negatives": []}])
    one.save_to_disk(tmp_path / "one")
    DatasetDict({split: one}).save_to_disk(tmp_path / "several")
    for report in (read_pairs(tmp_path / "one").report, read_pairs(tmp_path / "several", split=split).report):
        assert (report.read, report.rows, report.rejected) == (2, 1, {"not a string": 1})
    with pytest.raises(AnchorvecError, match=f"has no split validation; it has {split}"):
        read_pairs(tmp_path / "several", split="validation")
    with pytest.raises(AnchorvecError, match="as one split; leave validation out"):
        read_pairs(tmp_path / "one", split="validation")


def test_each_file_of_a_folder_has_its_own_columns(tmp_path: Path) -> None:
    """What has no pairs is counted, with file and line."""
    folder = tmp_path / "unlike"
    folder.mkdir()
    json_lines(folder / "a.jsonl", [{**ROW, "query": f"q {i}"} for i in range(4)])
    json_lines(folder / "b.jsonl", [{"question": "q", "answer": "a"}] * 2)
    json_lines(folder / "c.jsonl", [{**ROW, "negative": "n"}])
    report = read_pairs(folder).report
    assert (report.read, report.rows, report.rejected) == (7, 5, {"missing column": 2})
    assert f"{folder / 'b.jsonl'}:1: " in report.examples[0]
    (folder / "d.csv").write_text("query,positive\na,b\n")
    with pytest.raises(AnchorvecError, match=r"d\.csv would not be read beside a\.jsonl"):
        read_pairs(folder)


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the folder and what chooses another."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(AnchorvecError, match="HF_DATASETS_CACHE names another folder"):
        read_pairs(json_lines(tmp_path / "a.jsonl", [ROW]))

"""The documentation corpus: what becomes a pair, what is left out, and how the score set is pinned."""

import json
import random
import re
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorvec.data import DocstringPair, docstring_pairs, quickstart_data
from anchorvec.data.docstrings import near_duplicates
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import docstring_collection, write_beir

REST = "Each of them is looked at once, and whatever is found on the way goes to the caller."


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site-packages folder, the only place to find packages: the standard library is empty too."""
    site = tmp_path / "site-packages"
    (tmp_path / "stdlib").mkdir()
    site.mkdir()
    paths = sysconfig.get_paths  # others, such as coverage, ask for those of a scheme
    own = {"stdlib": str(tmp_path / "stdlib")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda *scheme: paths(*scheme) if scheme else own)
    monkeypatch.setattr(sys, "path", [str(site)])
    return site


def write(path: Path, *docstrings: str) -> None:
    """A module whose functions f0, f1, ... have these docstrings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    functions = (f'def f{i}():\n    """{text}\n    """\n' for i, text in enumerate(docstrings))
    path.write_text("".join(functions), encoding="utf-8")


def only_pair(site: Path, docstring: str) -> tuple[str, str] | None:
    """The query and the document of a function with this docstring; None where it gives no pair."""
    write(site / "module.py", docstring)
    pairs = docstring_pairs()
    return (pairs[0].query, pairs[0].document) if pairs else None


def different_pairs(package: str, count: int) -> list[str]:
    """Docstrings without a word in common but their package's."""
    words = (f"{package}{i}" for i in range(100 * count))
    return [f"Say {next(words)} {next(words)}.\n\n" + " ".join(next(words) for _ in range(12)) for _ in range(count)]


@pytest.mark.parametrize(
    ("docstring", "query", "document"),
    [
        (f"Count the red hares.\n\n{REST}", "Count the red hares", REST),
        (f"Count the red\nhares. {REST}", "Count the red hares", REST),
        (f"Count hares, e.g. Red ones, today. {REST}", "Count hares, e.g. Red ones, today", REST),
        (f"Count version 1.5 hares (cf. Hare).\n\n{REST}", "Count version 1.5 hares (cf. Hare)", REST),
        (f"Count the red hares\n:param hares: {REST}", "Count the red hares", f":param hares: {REST}"),
        (f"Count the red hares\n\n\n{REST}", "Count the red hares", REST),
        (f"Red hares today\n===============\n{REST}", "Red hares today", REST),
        (f"Count each :class:`~zoo.Hare` of ``zoo``.\n\n{REST}", "Count each zoo.Hare of zoo", REST),
        (f"Are there red hares? {REST}", "Are there red hares?", REST),
        (f"Count the hares.\n\n    {REST}\n      >>> hares()\n", "Count the hares", f"{REST}\n  >>> hares()"),
    ],
)
def test_the_first_sentence_asks_for_the_rest(site: Path, docstring: str, query: str, document: str) -> None:
    """The query is the first sentence, clean and on one line; the document is the rest as it stands."""
    assert only_pair(site, docstring) == (query, document)


@pytest.mark.parametrize(
    "docstring",
    [
        f"Count hares.\n\n{REST}",
        "Count the red hares.",
        "Count the red hares.\n\nAll of them, at once.",
        f":param hares: the hares to count\n\n{REST}",
        f">>> count(red, hares)\n\n{REST}",
        f"Copyright by the red hares.\n\n{REST}",
        f"Count the red hares.\n\nTo count the red  hares, see below. {REST}",
        f"{'Count the red hares ' * 20}.\n\n{REST}",
    ],
)
def test_what_says_too_little_is_left_out(site: Path, docstring: str) -> None:
    """A short summary or rest, markup, a licence, or a rest that contains its summary gives no pair."""
    assert only_pair(site, docstring) is None


def test_a_long_document_is_cut_at_a_word(site: Path) -> None:
    """A document has at most 2,000 characters and ends with a whole word."""
    pair = only_pair(site, "Count the red hares.\n\n" + "hares and lynxes " * 400)
    assert pair is not None
    assert 1_980 < len(pair[1]) <= 2_000
    assert set(pair[1].split()) == {"hares", "and", "lynxes"}


def test_names_are_dotted_and_sorted(site: Path) -> None:
    """Modules, classes and methods have their dotted name, also under `if`; the order is by name."""
    docs = [f'"""{text}"""' for text in different_pairs("zoo", 5)]
    (site / "zoo").mkdir()
    (site / "zoo" / "pen.py").write_text(
        f"{docs[0]}\nif True:\n    class Pen:\n        {docs[1]}\n        async def open(self):\n"
        f"            {docs[2]}\n            def inner():\n                {docs[4]}\n"
    )
    (site / "zoo" / "__init__.py").write_text(f"{docs[3]}\n")
    pairs = docstring_pairs()
    assert [pair.name for pair in pairs] == ["zoo", "zoo.pen", "zoo.pen.Pen", "zoo.pen.Pen.open"]
    assert {pair.package for pair in pairs} == {"zoo"}


def test_tests_vendored_copies_and_broken_files_are_skipped(site: Path) -> None:
    """Tests, vendored packages, generated files and files that Python cannot parse give nothing."""
    kept, *others = different_pairs("zoo", 8)
    write(site / "zoo" / "pen.py", kept)
    names = [
        "tests/pen.py",
        "_vendor/pen.py",
        "test_pen.py",
        "sub-folder/pen.py",
        "generated.py",
        "broken.py",
    ]
    for name, docstring in zip(names, others, strict=False):
        write(site / "zoo" / name, docstring)
    generated, broken = site / "zoo" / "generated.py", site / "zoo" / "broken.py"
    generated.write_text("# This file is automatically generated\n" + generated.read_text())
    broken.write_text(broken.read_text() + "def (:\n")
    write(site / "zoo-1.0.dist-info" / "pen.py", others[-1])
    assert [pair.name for pair in docstring_pairs()] == ["zoo.pen.f0"]


def test_files_of_code_are_not_parsed(site: Path) -> None:
    """A file that is documentation by less than 15% is left out: parsing it takes time and gives little."""
    write(site / "zoo.py", *different_pairs("zoo", 1))
    (site / "zoo.py").write_text((site / "zoo.py").read_text() + "hares = 1\n" * 300)
    assert docstring_pairs() == []


def test_sources_are_never_imported(site: Path) -> None:
    """A module that would fail when run is read all the same."""
    write(site / "zoo.py", *different_pairs("zoo", 1))
    (site / "zoo.py").write_text("raise SystemExit\n" + (site / "zoo.py").read_text())
    assert len(docstring_pairs()) == 1


def test_repeats_are_kept_once(site: Path) -> None:
    """A query or a document that comes again, or nearly again, is left out; the first by name stays."""
    first, other = different_pairs("zoo", 2)
    words = [f"w{i}" for i in range(200)]
    long = " ".join(words)
    nearly = " ".join([*words[:199], "else"])
    write(
        site / "zoo.py",
        first,
        first.split("\n\n")[0].upper() + "\n\n" + other.split("\n\n")[1],
        other.split("\n\n")[0] + "\n\n" + first.split("\n\n")[1].replace(" ", ", "),
        f"A long document first.\n\n{long}",
        f"Another long document second.\n\n{nearly}",
    )
    assert [pair.name for pair in docstring_pairs()] == ["zoo.f0", "zoo.f3"]


def test_a_missing_package_is_an_error(site: Path) -> None:
    """A package that is not installed is named, with the command that installs it."""
    with pytest.raises(AnchorvecError, match="pip install lynx"):
        docstring_pairs(["lynx"])


def test_the_standard_library_is_read() -> None:
    """Real sources of Python give pairs with the names that a user knows."""
    pairs = {pair.name: pair for pair in docstring_pairs(["contextlib", "textwrap"])}
    assert pairs["textwrap.fill"].query.startswith("Fill a single paragraph of text")
    assert pairs["textwrap.fill"].package == "textwrap"


WORDS = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


@given(st.lists(WORDS, max_size=25), st.lists(WORDS, max_size=5), st.sampled_from([1, 3]), st.booleans())
def test_near_duplicates_equal_a_plain_search(texts: list[str], reference: list[str], width: int, among: bool) -> None:
    """The search over rare shingles finds what comparing all sets with all kept ones finds."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1))}

    kept, expected = [shingles(text) for text in reference], []
    for text in texts:
        own = shingles(text)
        expected.append(any(5 * len(own & other) >= 4 * len(own | other) for other in kept))
        if among and not expected[-1]:
            kept.append(own)
    assert near_duplicates(texts, reference, width=width, among=among).tolist() == expected


@pytest.fixture
def zoo_and_park(site: Path) -> Path:
    """Two packages: `zoo` with 30 pairs and metadata, and `park` with 20, two of them much like zoo's."""
    zoo, park = different_pairs("zoo", 30), different_pairs("park", 18)
    write(site / "zoo.py", *zoo)
    query, document = zoo[0].split("\n\n")
    write(site / "park.py", *park, f"{query}\n\nabout park {document[::-1]}", f"Ask again, park.\n\n{document}")
    (site / "zoo_animals-1.2.dist-info").mkdir()
    (site / "zoo_animals-1.2.dist-info" / "METADATA").write_text("Name: zoo-animals\nVersion: 1.2\n")
    (site / "zoo_animals-1.2.dist-info" / "top_level.txt").write_text("zoo\n")
    return site


def test_whole_packages_are_held_out(zoo_and_park: Path) -> None:
    """The score set is of the held-out package; training pairs are of the others and resemble none of it."""
    data = quickstart_data(held_out=["zoo"], n_queries=10, n_documents=30)
    assert {pair.package for pair in data.score} == {"zoo"}
    assert (len(data.score), len(data.queries), len(data.train)) == (30, 10, 18)
    assert {pair.package for pair in data.train} == {"park"}
    assert set(data.queries) <= set(data.score)
    assert data.description["counts"]["train"]["near-duplicates"] == 2


def test_the_score_set_is_pinned(zoo_and_park: Path) -> None:
    """Seed and held-out sources decide the score set and its fingerprint; other packages do not."""
    draw = {"held_out": ["zoo"], "n_queries": 5, "n_documents": 15}
    data = quickstart_data(0, **draw)
    write(zoo_and_park / "park.py", *different_pairs("forest", 3))
    again, other = quickstart_data(0, **draw), quickstart_data(1, **draw)
    assert (data.score, data.queries, data.fingerprint) == (again.score, again.queries, again.fingerprint)
    assert data.fingerprint != other.fingerprint
    drawn = random.Random(0).sample(docstring_pairs(["zoo"]), 15)
    assert set(data.score) == set(drawn)
    assert set(data.queries) == set(drawn[:5])


def test_the_score_set_is_described(zoo_and_park: Path) -> None:
    """The description is JSON, with versions and counts, and says how many pairs were asked for."""
    data = quickstart_data(held_out=["zoo"], n_queries=500, n_documents=1_200)
    described = json.loads(json.dumps(data.description))
    assert described["packages"] == {
        "park": {"version": "unknown", "pairs": 18},
        "zoo-animals": {"version": "1.2", "pairs": 30},
    }
    assert described["fingerprint"] == data.fingerprint
    assert re.fullmatch("[0-9a-f]{64}", data.fingerprint)
    assert (described["score_documents"], described["score_documents_asked_for"]) == (30, 1_200)
    assert (described["score_queries"], described["score_queries_asked_for"]) == (30, 500)


def test_a_missing_held_out_package_is_an_error(zoo_and_park: Path) -> None:
    """Without a held-out package there is no score set, and the error says what to install."""
    with pytest.raises(AnchorvecError, match="pip install networkx"):
        quickstart_data(held_out=["zoo", "networkx"])


def test_the_score_set_is_written_in_beir_layout(zoo_and_park: Path, tmp_path: Path) -> None:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv hold the set, with dotted names as ids."""
    data = quickstart_data(held_out=["zoo"], n_queries=2, n_documents=3)
    write_beir(docstring_collection(data), tmp_path / "beir")

    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (tmp_path / "beir" / name).read_text("utf-8").splitlines()]

    def row(pair: DocstringPair, text: str) -> dict[str, str]:
        return {"_id": pair.name, "title": "", "text": text}

    assert rows("corpus.jsonl") == [row(pair, pair.document) for pair in data.score]
    assert rows("queries.jsonl") == [row(pair, pair.query) for pair in data.queries]
    assert (tmp_path / "beir" / "qrels" / "test.tsv").read_text().splitlines() == [
        "query-id\tcorpus-id\tscore",
        *(f"{pair.name}\t{pair.name}\t1" for pair in data.queries),
    ]


@pytest.mark.slow
def test_the_real_corpus_is_large_and_scored_in_full() -> None:
    """With our dependencies installed: tens of thousands of pairs, 1,200 documents, 500 queries."""
    data = quickstart_data()
    assert len(data.train) > 20_000
    assert (len(data.score), len(data.queries)) == (1_200, 500)
    assert len({pair.name for pair in data.score}) == 1_200

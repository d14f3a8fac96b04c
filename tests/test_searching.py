"""Asking a corpus: reading it, the nearest documents, the prompt in the terminal."""

import gzip
import io
from pathlib import Path

import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer

from anchorvec.commands.search import Hit, Index, prompt_loop, read_corpus, search
from anchorvec.errors import AnchorvecError
from anchorvec.model.embedder import build_embedder

DOCUMENTS = {
    "a": "The cat sleeps.",
    "b": "Trains to Berlin.",
    "c": "A recipe for soup.",
    "d": "Rain [bold]at[/bold] sea",
}
PROMPTS = {"query": "question: ", "document": "document: "}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """A random embedder with stored prompts."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return SentenceTransformer(str(build_embedder("tiny", folder, max_tokens=64, prompts=PROMPTS)), device="cpu")


@pytest.fixture(scope="module")
def index(model: SentenceTransformer) -> Index:
    """The four documents above."""
    return Index(model, DOCUMENTS)


def test_index_ranks_by_the_models_similarity_with_its_prompts(model: SentenceTransformer, index: Index) -> None:
    """Hits are sorted by the similarity of prompted query and prompted documents."""
    query = model.encode(["question: how to cook"], prompt="")
    documents = model.encode([f"document: {text}" for text in DOCUMENTS.values()], prompt="")
    [expected] = model.similarity(query, documents).tolist()
    hits = index.search("how to cook", top_k=3)
    ranked = sorted(zip(expected, DOCUMENTS.items(), strict=True), reverse=True)[:3]
    assert [(hit.id, hit.text) for hit in hits] == [document for _, document in ranked]
    assert [hit.score for hit in hits] == pytest.approx([score for score, _ in ranked], abs=1e-5)


def test_an_instruction_replaces_the_query_prompt(model: SentenceTransformer, index: Index) -> None:
    """Documents keep theirs."""
    instructed = Index(model, DOCUMENTS, instruction="ask ")
    query = model.encode(["ask how to cook"], prompt="")
    [expected] = model.similarity(query, model.encode_document(list(DOCUMENTS.values()))).tolist()
    found = {hit.id: hit.score for hit in instructed.search("how to cook")}
    assert found == pytest.approx(dict(zip(DOCUMENTS, expected, strict=True)), abs=1e-5)
    assert found != pytest.approx({hit.id: hit.score for hit in index.search("how to cook")}, abs=1e-5)


def test_index_gives_all_documents_if_there_are_fewer_than_asked(index: Index) -> None:
    """A small corpus is no error."""
    assert len(index.search("anything", top_k=10)) == len(index) == 4


def test_index_refuses_an_empty_corpus(model: SentenceTransformer) -> None:
    """There must be something to search."""
    with pytest.raises(AnchorvecError, match="the corpus is empty"):
        Index(model, {})


def test_search_answers_each_query(model: SentenceTransformer, index: Index, tmp_path: Path) -> None:
    """The function reads the corpus and gives each query its hits."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(DOCUMENTS.values()))
    answers = search(model, path, ["soup", "cat"], top_k=2)
    assert list(answers) == ["soup", "cat"]
    assert [hit.text for hit in answers["cat"]] == [hit.text for hit in index.search("cat", 2)]


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_read_corpus_joins_title_and_text_of_json_lines(tmp_path: Path, name: str) -> None:
    """Rows have `_id`, `id` or else their line number; a folder with a corpus.jsonl is read like the file."""
    rows = b'{"_id": "x", "title": "Cats", "text": "sleep"}\n\n{"id": 7, "text": "Dogs"}\n{"text": "Owls"}\n'
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    expected = {"x": "Cats sleep", "7": "Dogs", "4": "Owls"}
    assert read_corpus(tmp_path / name) == read_corpus(tmp_path) == expected


def test_read_corpus_takes_each_line_of_a_text_file(tmp_path: Path) -> None:
    """A document per line, its line number is its id, blank lines are left out."""
    (tmp_path / "notes.txt").write_text("one\n\nthree\n")
    assert read_corpus(tmp_path / "notes.txt") == {"1": "one", "3": "three"}


def test_read_corpus_takes_each_text_file_of_a_folder(tmp_path: Path) -> None:
    """A document per .txt or .md file at any depth, its path is its id; other files are left out."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("# B\nmore")
    (tmp_path / "sub" / "a.txt").write_text("A")
    (tmp_path / "c.py").write_text("C")
    (tmp_path / "empty.txt").write_text("\n")
    assert read_corpus(tmp_path) == {"b.md": "# B\nmore", "sub/a.txt": "A"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"corpus\.jsonl:2: found the fields \['body'\]"),
        (
            "corpus.jsonl",
            b'{"_id": 1, "text": "a"}\n{"_id": 1, "text": "b"}\n',
            r"corpus\.jsonl:2: .*used before",
        ),
        ("corpus.jsonl", b"nothing\n", r"corpus\.jsonl:1: this is no JSON"),
        ("corpus.jsonl.gz", b"not zipped", r"corpus\.jsonl\.gz: the file cannot be read"),
        ("notes.txt", b"fine\n\xff\n", r"notes\.txt:2: this is not UTF-8"),
        ("notes.txt", b"\n", r"notes\.txt: there is no document in it"),
    ],
)
def test_read_corpus_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A file that cannot be used is reported with its line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AnchorvecError, match=message):
        read_corpus(tmp_path / name)


def test_read_corpus_refuses_what_is_missing_or_empty(tmp_path: Path) -> None:
    """A missing path and a folder without texts are named."""
    with pytest.raises(AnchorvecError, match="nowhere: there is no such file"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(AnchorvecError, match="there is no document in it"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("typed", ["soup\ncat\n\nnever asked\n", "soup\ncat\n", "soup\ncat"])
def test_prompt_loop_reads_lines_until_an_empty_one_or_the_end(
    index: Index, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    """Standard input that is no terminal is read line by line; an empty line or its end leaves the loop."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    answers = prompt_loop(index, top_k=2, console=Console(file=io.StringIO()))
    assert answers == {"soup": index.search("soup", 2), "cat": index.search("cat", 2)}


def test_prompt_loop_leaves_on_ctrl_c(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt at the prompt ends the search without a traceback."""

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert prompt_loop(index, console=Console(file=io.StringIO())) == {}


def test_prompt_loop_shows_score_id_and_text_as_they_are(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square brackets of a document are no markup, and its control characters do not reach the terminal."""
    index = Index(model, {"doc[0]": "Rain [bold]at[/bold] sea\n\x1b[31mred"})
    monkeypatch.setattr("sys.stdin", io.StringIO("rain\n"))
    output = io.StringIO()
    [[hit]] = prompt_loop(index, console=Console(file=output)).values()
    assert isinstance(hit, Hit)
    assert f"{hit.score:.3f}  doc[0]" in output.getvalue()
    assert "Rain [bold]at[/bold] sea  [31mred" in output.getvalue()
    assert "\x1b" not in output.getvalue()

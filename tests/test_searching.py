"""Asking a corpus: the nearest passages, what is said and shown, the prompt in the terminal."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer

from anchorvec import cli
from anchorvec.commands.search import Hit, Index, print_hits, prompt_loop, search
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
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps(text) for text in DOCUMENTS.values()))
    answers = search(model, path, ["soup", "cat"], top_k=2)
    assert list(answers) == ["soup", "cat"]
    assert [hit.text for hit in answers["cat"]] == [hit.text for hit in index.search("cat", 2)]


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


NEEDLE = "The harbour master is called Oduya."


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with a long text, of which one line far from its beginning tells something, and data."""
    folder = tmp_path / "notes [v1]"
    folder.mkdir()
    lines = [f"Line {i} is about nothing." for i in range(100)]
    (folder / "long [b].txt").write_text("\n".join([*lines[:70], NEEDLE, *lines[70:]]))
    (folder / "rows.csv").write_text("n,text\n1,[/b] and :smile:\n2,half\n")
    (folder / "half.jsonl").write_text('{"text": "half \\ud83d."}\n')
    return folder


def test_a_hit_is_the_passage_that_was_found_with_file_and_line(model: SentenceTransformer, notes: Path) -> None:
    """Deep in a file; the model's own similarity, of passages that it reads whole."""
    [hits] = search(model, notes, [NEEDLE], top_k=1_000).values()
    of_text = [hit for hit in hits if hit.file.endswith("long [b].txt")]
    assert max(of_text, key=lambda hit: NEEDLE in hit.text).line in range(66, 72)
    assert {line for hit in of_text for line in hit.text.split("\n")} > {f"Line {i} is about nothing." for i in (0, 99)}
    for hit in of_text[:3]:
        expected = model.similarity(model.encode_query(NEEDLE), model.encode_document(hit.text)).item()
        assert hit.score == pytest.approx(expected, abs=1e-5)
    assert [(hit.line, hit.record) for hit in hits if hit.text == "half"] == [(3, 2)]


def test_it_says_on_stderr_how_much_it_reads(
    model: SentenceTransformer, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line; another one for what was left out or mended."""
    (notes / "a.png").write_bytes(b"\0")
    search(model, notes, ["x"])
    first, second = capsys.readouterr().err.splitlines()
    characters = sum(
        len(text) for text in ((notes / "long [b].txt").read_text(), "[/b] and :smile:", "half", "half ?.")
    )
    assert first.startswith(f"{notes}: files: 3, documents: 4, passages: ")
    assert first.endswith(f", characters: {characters:,}")
    assert "left out: binary files: 1 (first: " in second
    assert "now U+FFFD: 1" in second


def test_hits_are_shown_whole_in_a_pipe_line_by_line(notes: Path, model: SentenceTransformer) -> None:
    """Score, place, text; brackets and colons as they are; of thousands of characters the number that is not shown."""
    hits = search(model, notes, ["x"], top_k=1_000)["x"]
    output = io.StringIO()
    print_hits(
        Console(file=output, markup=False, emoji=False), [*hits, Hit(text="y" * 3_000, file="a\x1b[31m.txt", score=0.5)]
    )
    lines = output.getvalue().splitlines()
    assert f"{hits[0].score:.3f}  {hits[0].file}:{hits[0].line}" in lines[0]
    assert any(line.endswith("notes [v1]/rows.csv:2  row 1") for line in lines)
    assert "[/b] and :smile:" in lines
    assert lines[1::2][: len(hits)] == [" ".join(hit.text.split()) for hit in hits]
    assert lines[-2:] == ["0.500  a [31m.txt:1", "y" * 2_000 + " … (1,000 characters more)"]


def test_half_a_surrogate_pair_is_replaced_in_queries_instructions_and_texts(model: SentenceTransformer) -> None:
    """A terminal can hand them on, and texts of a program can have them."""
    index = Index(model, {"a": "half \ud83d."}, instruction="ask \udcff ")
    [hit] = index.search("half \udcff")
    assert (hit.id, hit.text) == ("a", "half \ufffd.")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone(
    model: SentenceTransformer,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
) -> None:
    """While the passages are encoded."""
    monkeypatch.setattr("anchorvec.model.loading.load_encoder", lambda _: model)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    cli.search("model", notes, ["x"])
    assert ("encoding" in capsys.readouterr().err) == is_terminal


def test_a_terminal_that_knows_ascii_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gets replacements for what it cannot show, in names, queries and texts, typed or given; the JSON file has all."""
    folder = build_embedder("tiny", tmp_path / "model", max_tokens=64)
    file, found = tmp_path / "où [b].txt", tmp_path / "found.json"
    file.write_text("là 水 [/b]", encoding="utf-8")
    streams = {name: io.BytesIO() for name in ("stdout", "stderr")} | {"stdin": io.BytesIO("où 水\n".encode())}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["anchorvec", "search", str(folder), str(file), "--json", str(found)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = streams["stdout"].getvalue()
    assert not end.value.code, streams["stderr"].getvalue()
    assert b"l? ? [/b]" in shown
    assert b"o? [b].txt:1" in shown
    assert b"o? [b].txt: files: 1" in streams["stderr"].getvalue()
    [[hit]] = json.loads(found.read_text(encoding="utf-8")).values()
    assert (hit["text"], hit["file"], hit["line"]) == ("là 水 [/b]", str(file), 1)
    assert set(hit) == {"text", "file", "line", "record", "id", "score"}

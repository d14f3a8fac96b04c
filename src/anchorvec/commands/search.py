"""Asks a corpus: the documents nearest to a query, in Python or at a prompt in the terminal."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.beir import document_text
from anchorvec.files import plain_or_gzipped, read_json_lines, read_lines, user_path
from anchorvec.terminal import terminal

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TEXT_SUFFIXES = {".txt", ".md"}
_SHOWN_CHARACTERS = 240


@dataclass(frozen=True)
class Hit:
    """A document that was found: the higher the score, the nearer to the query."""

    score: float
    id: str
    text: str


class Index:
    """A corpus, encoded once, that can be asked many times.

    `documents` maps ids to texts. Documents are encoded with the model's `document` prompt, queries with its
    `query` prompt or, in its place, with `instruction`, and compared by the model's own similarity, `batch_size`
    texts at a time, with a bar if `show_progress_bar`. All vectors stay on the model's device.
    """

    def __init__(
        self,
        model: "SentenceTransformer",
        documents: Mapping[str, str],
        *,
        instruction: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> None:
        if not documents:
            raise AnchorvecError("the corpus is empty; there is nothing to search")
        self.model = model
        self.instruction = instruction
        self._documents = list(documents.items())
        self._embeddings = model.encode_document(
            list(documents.values()),
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            convert_to_tensor=True,
        )  # (documents, dim)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._documents)

    def search(self, query: str, top_k: int = 5) -> list[Hit]:
        """The `top_k` documents nearest to `query`, the nearest first."""
        from sentence_transformers.util import semantic_search

        embedding = self.model.encode_query([query], prompt=self.instruction, convert_to_tensor=True)  # (1, dim)
        [found] = semantic_search(embedding, self._embeddings, top_k=top_k, score_function=self.model.similarity)
        return [Hit(float(hit["score"]), *self._documents[int(hit["corpus_id"])]) for hit in found]


def search(
    model: "SentenceTransformer | str | Path",
    corpus_path: str | Path,
    queries: Sequence[str] | None = None,
    top_k: int = 5,
    *,
    instruction: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> dict[str, list[Hit]]:
    """Each query with its `top_k` nearest documents of the corpus, the nearest first.

    Without `queries` they are asked for in the terminal. `instruction` replaces the model's stored query prompt.
    `model` is a SentenceTransformer, its folder, or its hub id; `corpus_path` is what `read_corpus` reads. `batch_size`
    texts are encoded at a time, with a bar if `show_progress_bar`. Raises AnchorvecError for a model or a corpus that
    cannot be read.
    """
    from anchorvec.model.loading import load_encoder, warn_of_named_prompts

    documents = read_corpus(corpus_path)
    encoder = load_encoder(model)
    if instruction is None:
        warn_of_named_prompts(encoder)
    index = Index(
        encoder, documents, instruction=instruction, batch_size=batch_size, show_progress_bar=show_progress_bar
    )
    if queries is None:
        return prompt_loop(index, top_k)
    return {query: index.search(query, top_k) for query in queries}


def read_corpus(path: str | Path) -> dict[str, str]:
    """Document id -> text, in the order of the corpus.

    A corpus is one of these; JSON Lines and text files may be gzipped, and blank lines are left out:

    - a JSON Lines file (`.jsonl`) of `text` and, if wanted, `title` and `_id` or `id` (else the line number);
    - a folder with such a `corpus.jsonl`, as BEIR has it;
    - a folder of `.txt` and `.md` files, at any depth: one document per file, its path there is its id;
    - any other file: one document per line, the line number is its id.

    Raises AnchorvecError if there is no such corpus, no document in it, or a row that cannot be used.
    """
    path = user_path(path)
    if path.is_dir():
        if any((path / name).is_file() for name in ("corpus.jsonl", "corpus.jsonl.gz")):
            return read_corpus(plain_or_gzipped(path / "corpus.jsonl"))
        documents = _read_text_files(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        documents = _read_json_lines(path)
    else:
        documents = {place.rpartition(":")[2]: line for place, line in read_lines(path)}
    if not documents:
        raise AnchorvecError(
            f"{path}: there is no document in it; name a .jsonl file, a text file of one document per line, "
            "or a folder of .txt and .md files"
        )
    return documents


def prompt_loop(index: Index, top_k: int = 5, console: Console | None = None) -> dict[str, list[Hit]]:
    """Answer queries from standard input until an empty line, its end, or Ctrl-C; return what was found.

    `index` is asked for `top_k` documents, which are shown on `console`, by default the terminal.
    Standard input need not be a terminal: `echo "a query" | anchorvec search MODEL CORPUS` works.
    """
    console = console or terminal()
    prompt = "query> " if sys.stdin.isatty() else ""
    if prompt:
        console.print(f"{len(index)} documents. An empty line ends the search.", highlight=False)
    answers: dict[str, list[Hit]] = {}
    while True:
        try:
            query = console.input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return answers
        if not query:
            return answers
        if not prompt:
            console.print(Text(_shortened(query), style="bold"))
        answers[query] = index.search(query, top_k)
        print_hits(console, answers[query])


def print_hits(console: Console, hits: Sequence[Hit]) -> None:
    """Show on `console` score, id and the beginning of the text of each of `hits`."""
    for hit in hits:
        console.print(Text.assemble((f"{hit.score:.3f}", "bold"), "  ", (_shortened(hit.id), "cyan")))
        console.print(Text(_shortened(hit.text), style="dim"))


def _shortened(text: str) -> str:
    """The beginning of `text` on one line, without the control characters that could steer a terminal."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


def _read_text_files(folder: Path) -> dict[str, str]:
    documents = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in TEXT_SUFFIXES or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise AnchorvecError(f"{path}: this is not UTF-8; save the file as UTF-8") from error
        except OSError as error:
            raise AnchorvecError(f"{path}: cannot be read: {error.strerror}") from error
        if text.strip():
            documents[path.relative_to(folder).as_posix()] = text
    return documents


def _read_json_lines(path: Path) -> dict[str, str]:
    documents: dict[str, str] = {}
    for place, row in read_json_lines(path):
        title, text = row.get("title", ""), row.get("text")
        if not isinstance(text, str) or not isinstance(title, str):
            raise AnchorvecError(f"{place}: found the fields {sorted(row)}; each row needs a string `text`")
        document = str(row.get("_id", row.get("id", place.rpartition(":")[2])))
        if document in documents:
            raise AnchorvecError(f"{place}: the document id {document!r} was used before; ids must differ")
        documents[document] = document_text({"title": title, "text": text})
    return documents

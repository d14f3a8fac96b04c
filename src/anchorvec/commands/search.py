"""Asks a corpus: the passages nearest to a query, in Python or at a prompt in the terminal."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from anchorvec.data.documents import Corpus, Document, read_documents
from anchorvec.data.passages import Passage, document_prompt, passages_of
from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path, without_surrogates
from anchorvec.model.nearest import IndexKind, check_index, nearest_index, scratch_array
from anchorvec.model.text_encoder import TextEncoder
from anchorvec.model.vector_cache import vector_cache
from anchorvec.terminal import Bar, say, terminal

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_SHOWN_CHARACTERS = 2_000
"""Of a passage; of models that read thousands of tokens it would fill the terminal."""


@dataclass(frozen=True, kw_only=True)
class Hit(Passage):
    """A passage that was found: the higher the `score`, the nearer to the query."""

    score: float


class Index:
    """A corpus, encoded once, that can be asked many times.

    `documents` maps ids to texts, which are read in passages where they are longer than `model` reads, or are such
    passages. They are encoded with the model's `document` prompt, queries with its `query` prompt or, in its place,
    with `instruction`, and compared by the model's own similarity, `batch_size` texts at a time, with a bar on a
    terminal if `show_progress_bar`. With `cache` their vectors are kept on disk, and no text is encoded of which one
    is; `devices` share the others out among as many processes, or `ray` among the workers of a Ray cluster. They are
    searched exactly, or by usearch if `index` says so, or if it says nothing and there are more than a million. Raises
    AnchorvecError if there is no text, and where what is asked for is not installed.
    """

    def __init__(
        self,
        model: "SentenceTransformer",
        documents: Mapping[str, str] | Sequence[Passage],
        *,
        instruction: str | None = None,
        batch_size: int = 32,
        cache: bool = True,
        devices: Sequence[str] = (),
        ray: bool = False,
        index: IndexKind | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        check_index(index, model)
        self.model = model
        self.instruction = None if instruction is None else without_surrogates(instruction)
        if isinstance(documents, Mapping):
            whole = [Document(without_surrogates(text), id=key) for key, text in documents.items()]
            documents = passages_of(whole, model)
        if not documents:
            raise AnchorvecError("the corpus is empty; there is nothing to search")
        self.passages = documents
        texts = [passage.text for passage in documents]
        kept = vector_cache() if cache else None
        options: dict[str, Any] = {"batch_size": batch_size, "cache": kept, "devices": devices, "ray": ray}
        sizes = {"encoding": sum(map(len, texts))}
        with TextEncoder(model, **options) as encode, Bar(sizes, shown=show_progress_bar) as bar:
            bar.start("encoding")
            encode.on_texts = bar.advance
            vectors = encode(texts, prompt=document_prompt(model), side="document", allocate=scratch_array)
        encode.say_kept()
        self._nearest = nearest_index(vectors, model, index)

    def __len__(self) -> int:
        """The number of passages."""
        return len(self.passages)

    def search(self, query: str, top_k: int = 5) -> list[Hit]:
        """The `top_k` passages nearest to `query`, the nearest first."""
        texts = [without_surrogates(query)]
        embedding = self.model.encode_query(texts, prompt=self.instruction, convert_to_tensor=True)  # (1, dim)
        [found] = self._nearest.search(embedding, top_k)
        return [Hit(**asdict(self.passages[row]), score=score) for row, score in found]


def search(
    model: "SentenceTransformer | str | Path",
    corpus_path: str | Path,
    queries: Sequence[str] | None = None,
    top_k: int = 5,
    *,
    instruction: str | None = None,
    batch_size: int = 32,
    cache: bool = True,
    devices: Sequence[str] = (),
    ray: bool = False,
    index: IndexKind | None = None,
    show_progress_bar: bool = False,
) -> dict[str, list[Hit]]:
    """Each query with its `top_k` nearest passages of the corpus, the nearest first.

    - `model`: a SentenceTransformer, its folder, or its hub id.
    - `corpus_path`: a file or a folder, whose files are read as what they are: JSON Lines, a JSON array, CSV and TSV
      with a header (a document in each row, under `text` or a like name), or text; each may be gzipped.
    - `queries`: without them they are asked for in the terminal.
    - `top_k`: passages for each query. A text is read in overlapping passages where it is longer than the model reads.
    - `instruction`: put before each query, in place of the model's stored query prompt.
    - `batch_size`: texts that are encoded at a time.
    - `cache`: keeps vectors on disk, and encodes no passage again of which one is kept.
    - `devices`: share the passages out among as many processes, such as `["cuda:0", "cuda:1"]` or `["cpu", "cpu"]`.
    - `ray`: encodes on the Ray cluster that is found, or one on this machine, with as many workers as `devices` if any.
    - `index`: `exact`, or `usearch`, which may miss a passage; by default exact up to a million passages.
    - `show_progress_bar`: shows a bar on a terminal while the corpus is encoded.

    How much is read, and what is left out, is said on stderr. Raises AnchorvecError for a model or a corpus that cannot
    be read.
    """
    from anchorvec.model.loading import load_encoder, warn_of_named_prompts

    corpus = read_documents(corpus_path)
    encoder = load_encoder(model)
    if instruction is None:
        warn_of_named_prompts(encoder)

    def index_of(corpus: Corpus) -> Index:
        passages = passages_of(corpus.documents, encoder)
        say(
            f"{corpus.path}: files: {corpus.files:,}, documents: {len(corpus.documents):,}, "
            f"passages: {len(passages):,}, characters: {corpus.characters:,}"
        )
        if losses := corpus.losses():
            say(f"{corpus.path}: {losses}")
        return Index(
            encoder,
            passages,
            instruction=instruction,
            batch_size=batch_size,
            cache=cache,
            devices=devices,
            ray=ray,
            index=index,
            show_progress_bar=show_progress_bar,
        )

    if queries is None:
        return prompt_loop(_Watched(corpus_path, corpus, index_of), top_k)
    asked = index_of(corpus)
    return {without_surrogates(query): asked.search(query, top_k) for query in queries}


class _Watched:
    """The index of the files under `path`, which were read as `corpus`; made again when one of them has changed."""

    def __init__(self, path: str | Path, corpus: Corpus, index_of: Callable[[Corpus], Index]) -> None:
        self._path, self._index_of = user_path(path), index_of
        self._states = _file_states(self._path)
        self._index = index_of(corpus)

    def search(self, query: str, top_k: int = 5) -> list[Hit]:
        states = _file_states(self._path)
        if states != self._states:
            self._states = states
            try:
                self._index = self._index_of(read_documents(self._path))
            except AnchorvecError as error:
                say(f"{error}; asked is what was read before")
        return self._index.search(query, top_k)


def _file_states(path: Path) -> dict[str, tuple[int, int]]:
    """Each file at or under `path`, with the time of its last change and its size."""
    states = {}
    inside = (Path(place, name) for place, _, names in os.walk(path) for name in names)
    for file in inside if path.is_dir() else [path]:
        with suppress(OSError):  # gone meanwhile
            found = file.stat()
            states[str(file)] = (found.st_mtime_ns, found.st_size)
    return states


def prompt_loop(index: Index | _Watched, top_k: int = 5, console: Console | None = None) -> dict[str, list[Hit]]:
    """Answer queries from standard input until an empty line, its end, or Ctrl-C; return what was found.

    `index` is asked for `top_k` passages, which are shown on `console`, by default the terminal.
    Standard input need not be a terminal: `echo "a query" | anchorvec search MODEL CORPUS` works.
    """
    console = console or terminal()
    prompt = "query> " if sys.stdin.isatty() else ""
    if prompt:
        console.print("An empty line ends the search.", highlight=False)
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
            console.print(Text(_on_one_line(query), style="bold"), soft_wrap=True)
        answers[query] = index.search(query, top_k)
        print_hits(console, answers[query])


def print_hits(console: Console, hits: Sequence[Hit]) -> None:
    """Show on `console` score, place and text of each of `hits`: in a terminal wrapped, else a line for each."""
    for hit in hits:
        console.print(
            Text.assemble((f"{hit.score:.3f}", "bold"), "  ", (_printable(_place(hit)), "cyan")), soft_wrap=True
        )
        text = _on_one_line(hit.text)
        if len(text) > _SHOWN_CHARACTERS:
            text = f"{text[:_SHOWN_CHARACTERS]} … ({len(text) - _SHOWN_CHARACTERS:,} characters more)"
        console.print(Text(text, style="dim"), soft_wrap=not console.is_terminal)


def _place(hit: Hit) -> str:
    """File and line, and of data the id or the number of the row; the id alone where there is no file."""
    if not hit.file:
        return hit.id or ""
    row = f"  id {hit.id}" if hit.id is not None else f"  row {hit.record}" if hit.record is not None else ""
    return f"{hit.file}:{hit.line}{row}"


def _on_one_line(text: str) -> str:
    """`text` with a space in place of each run of white space, as `_printable` shows it."""
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)

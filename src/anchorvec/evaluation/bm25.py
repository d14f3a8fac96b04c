"""BM25, by the library bm25s in its default setting: Lucene's variant, k1 = 1.5, b = 0.75.

Words are lower-cased, of two and more letters, without bm25s's English stop words, and not stemmed; title and text
are one field.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import bm25s
import numpy as np
from datasets import Dataset

from anchorvec.evaluation.beir import document_text


class Bm25:
    """BM25 as a searcher in mteb's sense, but for the description of itself that mteb wants."""

    def index(self, corpus: Dataset, **_: Any) -> None:
        """Count the words of each document of `corpus`, whose rows have `id`, `title` and `text`."""
        self._documents = list(corpus["id"])
        words = _words([document_text(row) for row in corpus])
        self._bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self._empty = not any(words.ids)  # bm25s cannot index that
        if not self._empty:
            self._bm25.index(words, show_progress=False)

    def search(
        self, queries: Dataset, *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        """Query id -> document id -> score, of the best `top_k` documents that share a word with the query.

        The rows of `queries` have `id` and `text`. With `top_ranked`, query id -> its candidates, these are ranked, and
        all of them; words are weighed by all documents.
        """
        if top_ranked is not None:
            return self._rank(queries, top_ranked)
        if self._empty:
            return {query: {} for query in queries["id"]}
        found, scores = self._bm25.retrieve(
            _words(list(queries["text"])), k=min(top_k, len(self._documents)), show_progress=False
        )  # (queries, k) each
        return {
            query: {self._documents[i]: float(score) for i, score in zip(row, row_scores, strict=True) if score > 0}
            for query, row, row_scores in zip(queries["id"], found, scores, strict=True)
        }

    def _rank(self, queries: Dataset, candidates: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
        """Query id -> candidate -> score, which is 0 where they share no word."""
        places = {document: i for i, document in enumerate(self._documents)}
        ranked = {}
        for query, text in zip(queries["id"], queries["text"], strict=True):
            words = bm25s.tokenize([text], stopwords="en", return_ids=False, show_progress=False)[0]
            found = self._bm25.get_scores(words) if words and not self._empty else np.zeros(len(places))
            ranked[query] = {document: float(found[places[document]]) for document in candidates[query]}
        return ranked


def _words(texts: list[str]) -> Any:
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)

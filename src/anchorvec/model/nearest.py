"""The nearest of many vectors: exactly, block by block, or approximately, with usearch.

Both give exact similarities, the model's own; an approximate search may miss a vector.
"""

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search
from torch import Tensor

from anchorvec.errors import AnchorvecError
from anchorvec.model.vector_cache import vector_cache
from anchorvec.terminal import say

IndexKind = Literal["exact", "usearch"]
Vectors = np.ndarray[Any, Any]
Found = list[list[tuple[int, float]]]
"""For each query the rows of the vectors that are nearest, the nearest first, with their similarities."""

EXACT_UP_TO = 1_000_000
"""Vectors that are searched exactly unless something else is asked for."""

_BLOCK = 50_000  # vectors: of 576 numbers 115 MB
_IN_MEMORY_BYTES = 2**28
_ON_DEVICE_BYTES = 2**31
_METRICS = {"cosine": "cos", "dot": "ip", "euclidean": "l2sq"}
_BY_ONE_THREAD = 1_000  # of the vectors of an index
_EXPANSION = 256  # candidates that are looked at; with usearch's default of 64 it misses more
_RECALL_QUERIES, _RECALL_AT = 100, 10


class Nearest(Protocol):
    """What finds the nearest of the vectors that it was made with."""

    def search(self, queries: Tensor, top_k: int) -> Found:
        """Of each of `queries` (queries, dim) the `top_k` nearest vectors, or all where there are fewer."""


def scratch_array(shape: tuple[int, int], dtype: Any) -> Vectors:
    """An array of this `shape` and `dtype` to be filled; a large one is mapped from a file that is gone when it is."""
    if shape[0] * shape[1] * np.dtype(dtype).itemsize <= _IN_MEMORY_BYTES:
        return np.empty(shape, dtype)
    # The mapping holds the file, which has no name any more: a killed process leaves nothing behind. The system's own
    # folder for such files may be in memory.
    kept = vector_cache()
    folder = kept.file.parent if kept is not None and os.access(kept.file.parent, os.W_OK) else None
    with tempfile.TemporaryFile(prefix="anchorvec-", dir=folder) as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


class ExactIndex:
    """Compares each query with all `vectors` (vectors, dim), by the similarity of `model`."""

    def __init__(self, vectors: Vectors, model: SentenceTransformer) -> None:
        self._vectors = torch.from_numpy(vectors)
        self._similarity = model.similarity
        if vectors.nbytes <= _ON_DEVICE_BYTES:
            self._vectors = self._vectors.to(model.device)

    def search(self, queries: Tensor, top_k: int) -> Found:
        """Of each of `queries` (queries, dim) the `top_k` nearest vectors, or all where there are fewer."""
        found = semantic_search(
            queries.to(self._vectors.dtype),
            self._vectors,
            top_k=top_k,
            corpus_chunk_size=_BLOCK,
            score_function=self._similarity,
        )
        return [[(int(hit["corpus_id"]), float(hit["score"])) for hit in hits] for hits in found]


class UsearchIndex:
    """Finds most of the nearest of `vectors` (vectors, dim) in a graph that usearch makes of them, in half precision.

    What it finds is compared with the query again, exactly, by the similarity of `model`. Raises AnchorvecError where
    usearch is not installed, and for a similarity that it does not have.
    """

    def __init__(self, vectors: Vectors, model: SentenceTransformer) -> None:
        check_index("usearch", model)
        from usearch.index import Index

        self._vectors, self._similarity = vectors, model.similarity
        metric = _METRICS[model.similarity_fn_name]
        self._index = Index(
            ndim=vectors.shape[1], metric=metric, dtype="f16", expansion_add=_EXPANSION, expansion_search=_EXPANSION
        )
        # in an empty graph several threads lose each other's links, and it is another one each time
        starts = [0, *range(_BY_ONE_THREAD, len(vectors), _BLOCK)]
        for start, end in itertools.pairwise([*starts, len(vectors)]):
            block = np.asarray(vectors[start:end], np.float32)
            self._index.add(np.arange(start, end), block, threads=1 if start == 0 else 0)

    def search(self, queries: Tensor, top_k: int) -> Found:
        """Of each of `queries` (queries, dim) at most `top_k` of the nearest vectors."""
        asked = queries.float().cpu()
        matches = self._index.search(asked.numpy(), min(top_k, len(self._vectors)))
        rows_of = [matches.keys] if asked.shape[0] == 1 and matches.keys.ndim == 1 else list(matches.keys)
        found = []
        for query, rows in zip(asked, rows_of, strict=True):
            near = torch.from_numpy(np.asarray(self._vectors[rows], np.float32))
            scores = self._similarity(query[None], near)[0].tolist()
            found.append(sorted(zip(map(int, rows), scores, strict=True), key=lambda hit: -hit[1]))
        return found


def check_index(kind: IndexKind | None, model: SentenceTransformer) -> None:
    """Raise AnchorvecError for a `kind` of index that cannot be had here, or not for the similarity of `model`."""
    if kind != "usearch":
        return
    if importlib.util.find_spec("usearch") is None:
        raise AnchorvecError("an approximate search needs the package usearch: pip install 'anchorvec[search]'")
    if model.similarity_fn_name not in _METRICS:
        raise AnchorvecError(
            f"usearch does not compare by {model.similarity_fn_name} similarity; search exactly: --index exact"
        )


def nearest_index(vectors: Vectors, model: SentenceTransformer, kind: IndexKind | None = None) -> Nearest:
    """An index of `vectors` (vectors, dim) of `model`: of the `kind`, or by default an exact one up to a million.

    What an approximate one finds is said, on some of the vectors. Raises AnchorvecError as `UsearchIndex` does.
    """
    if kind is None and len(vectors) > EXACT_UP_TO:
        try:
            check_index("usearch", model)
            kind = "usearch"
        except AnchorvecError as error:
            say(f"{len(vectors):,} vectors are searched exactly, which takes longer ({error})")
    exact = ExactIndex(vectors, model)
    if kind != "usearch":
        return exact
    say(f"usearch: indexing {len(vectors):,} vectors")
    index = UsearchIndex(vectors, model)
    rows = np.linspace(0, len(vectors) - 1, min(_RECALL_QUERIES, len(vectors)), dtype=np.int64)
    found = recall(index, exact, torch.from_numpy(np.asarray(vectors[rows])), own=rows.tolist())
    say(f"usearch: recall@{_RECALL_AT} is {found:.3f}, of the neighbours of {len(rows)} of them")
    return index


def recall(index: Nearest, exact: Nearest, queries: Tensor, *, own: Sequence[int] | None = None) -> float:
    """Of the ten vectors that are nearest to each of `queries` (queries, dim), the part that `index` finds.

    `exact` finds all. Vectors that are equally near stand for each other; those of the rows `own`, one a query, are
    left out.
    """
    parts = []
    top_k = _RECALL_AT + (own is not None)
    for i, both in enumerate(zip(index.search(queries, top_k), exact.search(queries, top_k), strict=True)):
        found, nearest = ([score for row, score in hits if own is None or row != own[i]] for hits in both)
        if nearest := nearest[:_RECALL_AT]:
            least = nearest[-1] - 1e-6 * abs(nearest[-1])
            parts.append(sum(score >= least for score in found[:_RECALL_AT]) / len(nearest))
    return sum(parts) / max(1, len(parts))

"""Batches of similar pairs: in-batch negatives that are hard, found by the texts' words before anything is encoded.

In a batch of random pairs most negatives have nothing to do with the query. Here a batch starts with a random pair and
takes the pairs most like it that are left, by the words of both their texts (`words.py`). A pair so like another of the
batch that its document may answer the other's query too is left for another batch, where there are others (T16).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor

BLOCK = 16_384
"""Pairs among which similar ones are sought, at most: they are tokenized together, and their vectors are in memory."""

TOO_SIMILAR = 0.7
"""Cosine similarity of the words of two queries, or of two documents, from which on one may answer the other's query.
Not tuned: the one value that was tried for documents (0.8 for queries)."""

_CONSIDERED = 8
"""Times the batch size: how many of the most similar pairs are considered before any others are taken."""


class SimilarPairs(DefaultBatchSampler):
    """A batch sampler for sentence-transformers' trainer; data sets have the columns query and positive, or more.

    `word_vectors` gives the vectors (texts, dim) of texts, of length 1 or 0. A batch has no text twice. The pairs that
    are left over at the end of a block of at most `BLOCK` pairs, fewer than a batch if texts are not repeated, are left
    out of that epoch.
    """

    def __init__(self, dataset: Dataset, *, word_vectors: Callable[[list[str]], Tensor], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.dataset = dataset.with_format(None)  # the trainer's adds the name of the data set to each row
        self.word_vectors = word_vectors

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)
        for block in order.chunk(math.ceil(len(order) / BLOCK)):
            batches = self._batches(block)
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield block[batches[i]].tolist()

    def _batches(self, block: Tensor) -> list[list[int]]:
        """Batches of the rows `block`, as positions in it; texts and vectors are freed before training goes on."""
        rows = self.dataset[block.tolist()]
        queries, documents = (self.word_vectors(rows[name]) for name in ("query", "positive"))
        texts = [set(row) for row in zip(*rows.values(), strict=True)]
        return similar_groups(queries, documents, texts, self.batch_size)


def similar_groups(queries: Tensor, documents: Tensor, texts: Sequence[set[str]], size: int) -> list[list[int]]:
    """Pairs in groups of `size`, each pair in one group or in none; the first pairs choose first.

    `queries` and `documents`: the vectors of each pair's texts, (pairs, dim), of length 1 or 0. `texts`: all texts of
    each pair; pairs that share one are in different groups. Where too few pairs are similar to the first of a group
    without being too similar to one of its members, those least like the first fill it.
    """
    vectors = F.normalize(queries + documents, dim=1)
    free = torch.ones(len(texts), dtype=torch.bool)
    groups = []
    for first in range(len(texts)):
        if not free[first]:
            continue
        free[first] = False
        others = free.nonzero()[:, 0]
        if len(others) < size - 1:
            break
        others = others[(vectors[others] @ vectors[first]).argsort(descending=True, stable=True)]
        near = torch.cat([torch.tensor([first]), others[: _CONSIDERED * size]])
        q, d = queries[near], documents[near]
        too_similar = (q @ q.T > TOO_SIMILAR) | (d @ d.T > TOO_SIMILAR)  # (considered, considered)
        group, taken = [first], set(texts[first])
        left_out = too_similar[0]
        for i, pair in enumerate(near.tolist()):
            if len(group) < size and not left_out[i] and taken.isdisjoint(texts[pair]):
                group.append(pair)
                taken |= texts[pair]
                left_out = left_out | too_similar[i]
        for pair in others.flip(0).tolist() if len(group) < size else ():
            if len(group) < size and taken.isdisjoint(texts[pair]):
                group.append(pair)
                taken |= texts[pair]
        if len(group) == size:
            free[group] = False
            groups.append(group)
    return groups

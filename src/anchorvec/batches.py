"""Batches of similar pairs: in-batch negatives that are hard, found by the texts' words before anything is encoded.

In a batch of random pairs most negatives have nothing to do with the query. Here a batch starts with a random pair and
takes the pairs most like it that are left, by the words of both their texts (`words.py`). A pair so like another of the
batch that its document may answer the other's query too is left for another batch, where there are others (T16).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor

BLOCK = 16_384
"""Pairs among which similar ones are sought, at most: they are tokenized together, and their vectors are in memory."""

TOO_SIMILAR = 0.7
"""Cosine similarity of the words of two pairs' texts from which on one pair may answer the other's query. Not tuned:
the one value that was tried for documents (0.8 for queries)."""

_CONSIDERED = 8
"""Times the batch size: how many of the most similar pairs are considered before any others are taken."""


class SimilarPairs(DefaultBatchSampler):
    """A batch sampler for sentence-transformers' trainer; the columns are query, document and hard negatives.

    `word_vectors` gives the vectors (texts, dim) of texts, of length 1 or 0, `prompts` what is put before the texts of
    each data set's columns first. A batch has no text twice. Where pairs are left over, because they do not fill the
    last batch of a block of `BLOCK` pairs or share their texts with too many others, the pairs are gone through once
    more until the epoch has all its batches; without a single batch, the epoch ends.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        word_vectors: Callable[[list[str]], Tensor],
        prompts: Mapping[str, Mapping[str, str]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self.prompts = (prompts or {}).get(dataset[0].get("dataset_name", ""), {})
        self.dataset = dataset.with_format(None)  # the trainer's adds the name of the data set to each row
        self.word_vectors = word_vectors

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        left = len(self)
        while left > 0:
            before = left
            for batch in islice(self._all_pairs(generator), left):
                left -= 1
                yield batch
            if left == before:
                break

    def _all_pairs(self, generator: torch.Generator) -> Iterator[list[int]]:
        """Batches of all pairs, but for those that are left over."""
        order = torch.randperm(len(self.dataset), generator=generator)
        for block in order.chunk(math.ceil(len(order) / BLOCK)):
            batches = self._batches(block)
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield block[batches[i]].tolist()

    def _batches(self, block: Tensor) -> list[list[int]]:
        """Batches of the rows `block`, as positions in it; texts and vectors are freed before training goes on."""
        rows = self.dataset[block.tolist()]
        vectors = [
            self.word_vectors([self.prompts.get(name, "") + text for text in column]) for name, column in rows.items()
        ]
        texts = [set(row) for row in zip(*rows.values(), strict=True)]
        return similar_groups(torch.stack(vectors), texts, self.batch_size)


def similar_groups(vectors: Tensor, texts: Sequence[set[str]], size: int) -> list[list[int]]:
    """Pairs in groups of `size`, each pair in one group or in none; the first pairs choose first.

    `vectors`: those of each pair's query, document and hard negatives, (columns, pairs, dim), of length 1 or 0.
    `texts`: all texts of each pair; pairs that share one are in different groups. Pairs are as similar as the sums of
    query and document. Two are too similar where the query or the document of one is like any text of the other. Where
    the pairs most like the first of a group do not fill it, those least like it do, and only then too similar ones.
    """
    sums = F.normalize(vectors[0] + vectors[1], dim=1)
    free = torch.ones(len(texts), dtype=torch.bool)
    groups = []
    for first in range(len(texts)):
        if not free[first]:
            continue
        free[first] = False
        n_free = int(free.sum())
        if n_free < size - 1:
            break
        similarity = (sums @ sums[first]).masked_fill(~free, -torch.inf)
        n = min(_CONSIDERED * size, n_free)
        near = similarity.topk(n).indices
        group = _filled([first], near, texts, size, vectors)
        if len(group) < size:
            far = similarity.argsort(stable=True)[len(free) - n_free :]
            group = _filled(group, far[:n], texts, size, vectors)
            group = _filled(group, far, texts, size)
        if len(group) == size:
            free[group] = False
            groups.append(group)
    return groups


def _filled(
    group: list[int], candidates: Tensor, texts: Sequence[set[str]], size: int, vectors: Tensor | None = None
) -> list[int]:
    """`group` with those of `candidates` that share no text with it and, by their `vectors`, are not too similar."""
    considered = torch.cat([torch.tensor(group), candidates])
    taken = {text for pair in group for text in texts[pair]}
    allowed = torch.ones(len(considered), dtype=torch.bool)
    if vectors is not None:
        too_similar = _too_similar(vectors[:, considered])
        allowed = ~too_similar[: len(group)].any(dim=0)
    group = list(group)
    for i, pair in enumerate(considered.tolist()):
        if len(group) == size:
            break
        if allowed[i] and taken.isdisjoint(texts[pair]):
            group.append(pair)
            taken |= texts[pair]
            if vectors is not None:
                allowed = allowed & ~too_similar[i]
    return group


def _too_similar(vectors: Tensor) -> Tensor:
    """Of pairs with these vectors (columns, pairs, dim), which are too similar to which: (pairs, pairs)."""
    columns, pairs, _ = vectors.shape
    similar = vectors[:2].flatten(0, 1) @ vectors.flatten(0, 1).T > TOO_SIMILAR
    one_way = similar.view(2, pairs, columns, pairs).any(dim=2).any(dim=0)
    return one_way | one_way.T

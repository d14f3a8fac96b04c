"""Batches in which no text occurs twice (T16), of random pairs or of similar ones; rows may have hard negatives or not.

In a batch of random pairs most negatives have nothing to do with the query. A batch of similar pairs has in-batch
negatives that are hard, found by the texts' words before anything is encoded: it starts with a random pair and takes
the pairs most like it that are left, by the words of both their texts (`objectives/bag_of_words.py`). A pair so like
another of the batch that its document may answer the other's query too is left for another batch, where there are
others.
"""

import itertools
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor

PATIENCE = 64
"""Batches that a pair of `DifferentTexts` waits for, at most, because they have one of its texts already."""

BLOCK = 16_384
"""Pairs among which similar ones are sought, at most: they are tokenized together, and their vectors are in memory."""

TOO_SIMILAR = 0.7
"""Cosine similarity of the words of two pairs' texts from which on one pair may answer the other's query. Not tuned:
the one value that was tried for documents (0.8 for queries)."""

_FEW_REPEATED = 0.9
"""Share of different texts among all from which on a pass fills as many batches as there are pairs for."""

_CONSIDERED = 8
"""Times the batch size: how many of the most similar pairs are considered before any others are taken."""


class _WholeEpochs(DefaultBatchSampler):
    """A batch sampler of `dataset` for sentence-transformers' trainer: in an epoch as many batches as its length says.

    They are full; `options` are those of the library's own samplers. Where pairs are left over because they fit into no
    batch, the pairs are gone through once more until the epoch has all its batches, as whoever goes on in the middle of
    training counts them; without a single batch, the epoch ends. Epoch and seed decide the batches.
    """

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.dataset = dataset
        self.name = dataset[0].get("dataset_name", "")  # the trainer adds it to each row

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        left = len(self)
        while left > 0:
            before = left
            for batch in islice(self._all_pairs(generator), left):
                left -= 1
                yield batch
            if left == before == len(self):
                break

    @abstractmethod
    def _all_pairs(self, generator: torch.Generator) -> Iterator[list[int]]:
        """Batches of all pairs, but for those that are left over."""


class DifferentTexts(_WholeEpochs):
    """Batches of random pairs of `dataset`.

    `hashes`: for each data set by its name, those of all texts of its pairs, (pairs, texts); 0 is no text. A pair that
    has a text of the batch already waits for the next one, `PATIENCE` times at most: the time that an epoch takes grows
    with the pairs, not with their square, however often a text is repeated.
    """

    def __init__(self, dataset: Dataset, *, hashes: Mapping[str, NDArray[np.uint64]], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.hashes = hashes[self.name]

    def _all_pairs(self, generator: torch.Generator) -> Iterator[list[int]]:
        return different_texts(self.hashes, self.batch_size, generator)


def different_texts(hashes: NDArray[np.uint64], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of `size` pairs without a text twice, of all pairs in random order, but for those that are left over.

    `hashes`: (pairs, texts), 0 is no text. `generator` decides the order.
    """
    fresh = map(int, torch.randperm(len(hashes), generator=generator, dtype=torch.int32).numpy())
    waiting: deque[tuple[int, int]] = deque()  # pairs, and how often each has waited
    while True:
        batch: list[int] = []
        texts: set[int] = set()
        passed_over = []
        while len(batch) < size:
            pair, waited = waiting.popleft() if waiting else (next(fresh, -1), 0)
            if pair < 0:
                break
            own = [text for text in hashes[pair].tolist() if text]
            if texts.isdisjoint(own):
                batch.append(pair)
                texts.update(own)
            elif waited < PATIENCE:
                passed_over.append((pair, waited + 1))
        if len(batch) == size:
            yield batch
        elif not batch:
            return
        waiting.extendleft(reversed(passed_over))


def steps_of_a_pass(hashes: NDArray[np.uint64], size: int, *, seed: int, most: int = 1_000) -> int:
    """How many batches of `size` pairs without a text twice one pass over all pairs gives, counted up to `most`.

    `hashes` as in `different_texts`, in an order that `seed` decides. Where few texts are there twice nothing is
    counted: as many as the pairs fill.
    """
    full = min(most, len(hashes) // size)
    texts = np.sort(hashes.ravel())
    texts = texts[texts > 0]
    if len(np.unique(texts)) > _FEW_REPEATED * len(texts):
        return full
    batches = different_texts(hashes, size, torch.Generator().manual_seed(seed))
    return sum(1 for _ in islice(batches, full))


class SimilarPairs(_WholeEpochs):
    """Batches of similar pairs of `dataset`; its columns are query, document and hard negatives, None where none is.

    `word_vectors` gives the vectors (texts, dim) of texts, of length 1 or 0, `prompts` what is put before the texts of
    each data set's columns first. Pairs are left over where they do not fill the last batch of a block of `BLOCK`
    pairs, or share their texts with too many others. `orders`: what was found in this epoch, by epoch, block
    and data set, as positions in the block (batches, pairs); what is there is not sought again.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        word_vectors: Callable[[list[str]], Tensor],
        prompts: Mapping[str, Mapping[str, str]] | None = None,
        orders: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self.orders = {} if orders is None else orders
        self.prompts = (prompts or {}).get(self.name, {})
        self.word_vectors = word_vectors

    def __iter__(self) -> Iterator[list[int]]:
        for key in list(self.orders):
            epoch, _, name = key.split(".", maxsplit=2)
            if name == self.name and int(epoch) != self.epoch:
                del self.orders[key]
        self._keys = (f"{self.epoch}.{block}.{self.name}" for block in itertools.count())
        yield from super().__iter__()

    def _all_pairs(self, generator: torch.Generator) -> Iterator[list[int]]:
        order = torch.randperm(len(self.dataset), generator=generator)
        for block in order.chunk(math.ceil(len(order) / BLOCK)):
            key = next(self._keys)
            if key not in self.orders:
                self.orders[key] = torch.tensor(self._batches(block), dtype=torch.int32)
            batches = self.orders[key].tolist()
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield block[batches[i]].tolist()

    def _batches(self, block: Tensor) -> list[list[int]]:
        """Batches of the rows `block`, as positions in it; texts and vectors are freed before training goes on."""
        columns = self.dataset[block.tolist()]
        columns.pop("dataset_name", None)
        there = [(name, texts) for name, texts in columns.items() if any(text is not None for text in texts)]
        vectors = torch.stack([self._vectors(name, texts) for name, texts in there])
        texts = [set(row) - {None} for row in zip(*columns.values(), strict=True)]
        return similar_groups(vectors, texts, self.batch_size)

    def _vectors(self, column: str, texts: Sequence[str | None]) -> Tensor:
        """The vectors of a column's texts (texts, dim), 0 where there is none."""
        prompt = self.prompts.get(column, "")
        found = self.word_vectors([prompt + text for text in texts if text is not None])
        vectors = found.new_zeros(len(texts), found.shape[1])
        vectors[torch.tensor([text is not None for text in texts])] = found
        return vectors


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

"""Pairs with their hard negatives, and all their texts as 64-bit hashes.

Millions of texts are compared without holding them in memory (T17): a hash has 8 bytes, whatever its text. Two of n
different texts have the same one with a probability of n^2 / 2^65, 1.5 in a million for 7.5 million texts; then a
negative is left out, or a pair waits for another batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

Hashes = NDArray[np.uint64]

_ROWS_AT_A_TIME = 1_000
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class ContrastiveRows:
    """Rows of query, positive and, where the data have any, negative_1 .. negative_n: None in a row without.

    `hashes`: of the texts of these columns, (rows, columns); 0 where there is none.
    """

    dataset: datasets.Dataset
    hashes: Hashes

    @property
    def columns(self) -> list[str]:
        """Their names, in order."""
        return ["query", "positive", *(f"negative_{n + 1}" for n in range(self.hashes.shape[1] - 2))]

    @property
    def with_negatives(self) -> int:
        """The rows that have hard negatives."""
        return int(np.count_nonzero(self.hashes[:, 2:].any(axis=1)))

    def select(self, rows: NDArray[np.int64]) -> "ContrastiveRows":
        """The rows of these numbers, which may repeat; the texts are referred to."""
        return ContrastiveRows(self.dataset.select(rows), self.hashes[rows])


def documents_twice(pairs: datasets.Dataset) -> ContrastiveRows:
    """The document of each row of `pairs` as query and as positive (SimCSE)."""
    hashes = np.zeros((len(pairs), 2), dtype=np.uint64)
    for start, part in _parts(pairs, "positive"):
        hashes[start : start + len(part)] = text_hashes(part["positive"])[:, None]
    return ContrastiveRows(pairs.select_columns(["query", "positive"]).with_transform(_document_twice), hashes)


def _document_twice(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    return {"query": rows["positive"], "positive": rows["positive"]}


def contrastive_rows(pairs: datasets.Dataset, *, negatives: int = 1) -> ContrastiveRows:
    """Each row of `pairs` with the first `negatives` of its hard negatives, or with none if it has fewer.

    `pairs` has rows of query, positive and a list of negatives. A negative that is a positive of the same query in
    another row is left out (T16). Of the texts only hashes are in memory, and which negatives are used.
    """
    hashes = np.zeros((len(pairs), 2 + negatives), dtype=np.uint64)
    for start, part in _parts(pairs, "query", "positive"):
        for i, column in enumerate(part.columns):
            hashes[start : start + len(column), i] = text_hashes(column)
    places = _hash_negatives(pairs, hashes)
    if not len(places):
        return ContrastiveRows(pairs.select_columns(["query", "positive"]), hashes[:, :2])
    ends = negatives * np.cumsum(hashes[:, 2] != 0)
    used = pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), pa.array(places, pa.int32()))
    dataset = pairs.add_column("used", used).with_transform(partial(_columns, negatives=negatives))
    return ContrastiveRows(dataset, hashes)


def text_hashes(texts: Any) -> Hashes:
    """The hash of each of `texts`, an Arrow array of strings: (texts,)."""
    return np.fromiter(map(xxh3_64_intdigest, texts.cast(pa.binary()).to_pylist()), np.uint64, len(texts))


def _hash_negatives(pairs: datasets.Dataset, hashes: Hashes) -> NDArray[np.int32]:
    """Fill `hashes` (rows, 2 + negatives) with those of the negatives that are used.

    Gives the places in their rows' lists, row after row: (rows with negatives * negatives,).
    """
    wanted = hashes.shape[1] - 2
    if not wanted:
        return np.zeros(0, dtype=np.int32)
    positives = np.sort(_joined(hashes[:, 0], hashes[:, 1]))
    places = [np.zeros(0, dtype=np.int32)]
    for start, part in _parts(pairs, "negatives"):
        listed = part["negatives"].combine_chunks()
        counts = pa.compute.list_value_length(listed).to_numpy()
        rows, place = np.repeat(start + np.arange(len(counts)), counts), _numbered(counts)
        found = text_hashes(listed.flatten())

        own = _joined(hashes[rows, 0], found)
        at = np.searchsorted(positives, own).clip(max=len(positives) - 1)
        left = positives[at] != own
        rows, place, found = rows[left], place[left], found[left]

        counts = np.bincount(rows - start, minlength=len(counts))
        number = _numbered(counts)  # among those of its row that are left
        use = (number < wanted) & (counts[rows - start] >= wanted)
        hashes[rows[use], 2 + number[use]] = found[use]
        places.append(place[use].astype(np.int32))
    return np.concatenate(places)


def _parts(pairs: datasets.Dataset, *columns: str) -> Iterator[tuple[int, pa.Table]]:
    """The columns of all rows, some at a time, each part with the number of its first row."""
    tables = pairs.select_columns(list(columns)).with_format("arrow").iter(batch_size=_ROWS_AT_A_TIME)
    return ((i * _ROWS_AT_A_TIME, table) for i, table in enumerate(tables))


def _joined(queries: Hashes, documents: Hashes) -> Hashes:
    """A hash for each query and document together."""
    return queries * _ODD + documents


def _numbered(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 .. n - 1 for each n of `counts`, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _columns(rows: dict[str, list[Any]], negatives: int) -> dict[str, list[str | None]]:
    """The columns of rows that have all their `negatives` in a list, and the places of those that are `used`."""
    columns: dict[str, list[str | None]] = {name: rows[name] for name in ("query", "positive")}
    for n in range(negatives):
        of_rows = zip(rows["negatives"], rows["used"], strict=True)
        columns[f"negative_{n + 1}"] = [listed[used[n]] if used else None for listed, used in of_rows]
    return columns

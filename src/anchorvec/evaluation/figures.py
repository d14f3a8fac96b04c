"""Figures of test sets that can be computed again for other draws of their items: means, and rank correlations.

A `Sample` is the figure of one system, a `Pair` the difference of two on the same items. `statistics` draws the items.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anchorvec.errors import AnchorvecError

ItemScores = Mapping[str, float]
"""Item id -> score of this item."""
Values = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Sample:
    """A figure of one test set, such as the mean score of its queries."""

    items: int
    of: Callable[[Index], Values]
    """From indices of items, (draws, drawn), the figure of each draw, (draws,)."""
    seeds: Values | None = None
    """The figure under each seed, (seeds,), where it is a mean over seeds, as that of a clustering is."""

    @property
    def figure(self) -> float:
        """The figure of all items."""
        return float(self.of(np.arange(self.items)[None])[0])


@dataclass(frozen=True)
class Pair(Sample):
    """By how much a second system's figure is above a first one's, on the same items."""

    exchanged: Callable[[Values], Values] = field(kw_only=True)
    """From signs, (draws, items), the figure of each draw, (draws,): the systems are exchanged in items with -1."""


def mean_sample(values: ArrayLike, seeds: ArrayLike | None = None) -> Sample:
    """The mean of `values`, (items,); `seeds` are its values under each seed, if it is a mean over these too.

    Raises AnchorvecError if there is no value.
    """
    array = as_scores(values)
    return Sample(array.size, lambda index: array[index].mean(axis=-1), _seeds(seeds))


def mean_pair(first: ItemScores, second: ItemScores, seeds: ArrayLike | None = None) -> Pair:
    """The mean difference `second - first` over the items that both have; `seeds` as in `mean_sample`.

    Raises AnchorvecError if no item is common.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise AnchorvecError("the two systems have no item in common; score both on the same data")
    array = as_scores([second[item] - first[item] for item in common])
    return Pair(
        array.size,
        lambda index: array[index].mean(axis=-1),
        _seeds(seeds),
        exchanged=lambda signs: (signs * array).mean(axis=-1),
    )


def correlation_sample(similarities: ItemScores, scores: ItemScores) -> Sample:
    """Spearman's correlation of `similarities` with `scores`, item id -> value; 0 where one side has no spread.

    Raises AnchorvecError if there is no item.
    """
    found, gold = _order(list(similarities.values())), _order([scores[item] for item in similarities])
    return Sample(found.size, lambda index: _pearson(_ranks(found[index]), _ranks(gold[index])))


def correlation_pair(first: ItemScores, second: ItemScores, scores: ItemScores) -> Pair:
    """By how much Spearman's correlation of `second` with `scores` is above that of `first`.

    A draw has the same items for both, and they are ranked anew. In an exchange it is the ranks of the two systems'
    similarities that change places, since the similarities themselves have scales of their own. Raises AnchorvecError
    if the systems do not have the same items.
    """
    if first.keys() != second.keys():
        raise AnchorvecError("the two systems were scored on other pairs; score both on the same")
    gold = _order([scores[item] for item in first])
    one, two = (_order([of_system[item] for item in first]) for of_system in (first, second))
    gold_ranks, ranks = _ranks(gold[None]), [_ranks(of_system[None]) for of_system in (one, two)]
    middle, half = (ranks[1] + ranks[0]) / 2, (ranks[1] - ranks[0]) / 2

    def of(index: Index) -> Values:
        drawn = _ranks(gold[index])
        return _pearson(_ranks(two[index]), drawn) - _pearson(_ranks(one[index]), drawn)

    def exchanged(signs: Values) -> Values:
        return _pearson(middle + signs * half, gold_ranks) - _pearson(middle - signs * half, gold_ranks)

    return Pair(gold.size, of, exchanged=exchanged)


def as_scores(values: ArrayLike) -> Values:
    """`values` as an array, (items,). Raises AnchorvecError if there is none."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise AnchorvecError("there is no score to take the mean of")
    return array


def _seeds(values: ArrayLike | None) -> Values | None:
    return None if values is None else as_scores(values)


def _order(values: ArrayLike) -> Index:
    """The place of each value among the different ones, (items,): ranks of a draw are counted by these, not sorted."""
    return np.unique(as_scores(values), return_inverse=True)[1]


def _ranks(places: Index) -> Values:
    """The ranks in each draw of `places` (draws, drawn), equal ones sharing theirs: `rankdata(places, axis=1)`."""
    draws, most = len(places), int(places.max()) + 1
    rows = np.arange(draws)[:, None] * most
    counts = np.bincount((places + rows).ravel(), minlength=draws * most).reshape(draws, most)
    ranks = counts.cumsum(axis=1) - (counts - 1) / 2  # (draws, places)
    return np.take_along_axis(ranks, places, axis=1)


def _pearson(x: Values, y: Values) -> Values:
    """The correlation of each row of `x` with that of `y`, (draws, drawn) both: (draws,); 0 without spread."""
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    norms = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    products = (x * y).sum(axis=-1)
    found: Values = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return found

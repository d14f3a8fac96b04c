"""Intervals and tests for means over items and over seeds. The arithmetic is scipy's.

All intervals are of 95%. Over items (queries, sentence pairs, ...) they are percentile bootstraps: an item is what is
drawn again. Over seeds, of which there are few, they are Student's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from anchorvec.errors import AnchorvecError

ItemScores = Mapping[str, float]
"""Item id -> score of this item."""

CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 2_000_000  # 16 MB of indices, whatever the number of items


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.553 [0.521, 0.585]`."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference with the ends of its 95% interval, and how likely one as large is by chance."""

    p_value: float
    """Two-sided, of the hypothesis that the sign of each item's difference is chance."""

    __str__ = Interval.__str__


def bootstrap_interval(values: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of `values` with its interval by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    The ends are the 2.5th and 97.5th percentiles of the means of `resamples` samples, each of as many values as there
    are, drawn with replacement: `scipy.stats.bootstrap` with `method="percentile"`. Its BCa has no answer (nan) where
    all values are the same; here both ends are that value then. Both are the value too where there is only one, and
    say nothing of how far others would lie from it.

    - `values`: scores, (items,), in any unit.
    - `resamples`: how many samples are drawn.
    - `seed`: of the draw; the same seed and values give the same interval.

    Raises AnchorvecError if there is no value.
    """
    array = _scores(values)
    mean = float(array.mean())
    if array.size == 1:  # which scipy refuses
        return Interval(mean, mean, mean)
    from scipy.stats import bootstrap

    interval = bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=_batch(array),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(interval.low), float(interval.high))


def student_interval(values: ArrayLike) -> Interval:
    """The mean of `values` with its interval by Student's t: mean ± t(0.975; n - 1) s / sqrt(n).

    - `values`: one figure a run, (runs,), such as the mean score of each seed; s is their standard deviation.

    For a single value the ends are -inf and inf. Raises AnchorvecError if there is no value.
    """
    array = _scores(values)
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, -np.inf, np.inf)
    from scipy.stats import sem, t

    reach = float(t.ppf((1 + CONFIDENCE) / 2, array.size - 1) * sem(array))
    return Interval(mean, mean - reach, mean + reach)


def paired_difference(first: ItemScores, second: ItemScores, *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """The mean difference `second - first` over the items that both have, item by item.

    Its interval is that of `bootstrap_interval`. The p-value is that of a permutation test for pairs, which flips the
    sign of each difference by chance: twice the share of `resamples` such flips, with 1 added to both counts, whose
    mean is as far from 0 on the same side; of all 2^n flips where there are no more (`scipy.stats.permutation_test`).

    - `first`, `second`: item id -> score, of two systems on the same task.
    - `resamples`: how many samples, and how many flips, are drawn.
    - `seed`: of both draws.

    Raises AnchorvecError if no item is common.
    """
    return paired_difference_over_seeds([(first, second)], resamples=resamples, seed=seed)


def paired_difference_over_seeds(
    pairs: Sequence[tuple[ItemScores, ItemScores]], *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """`paired_difference` of two systems that were trained with several seeds each.

    An item that several seeds were scored on counts once, with the mean of its differences: what is drawn again is the
    item, and the scores of one item under several seeds are not independent.

    - `pairs`: for each seed, item id -> score of the first and of the second system.
    - `resamples`, `seed`: as in `paired_difference`.

    Raises AnchorvecError if no pair has an item in common.
    """
    by_item: dict[str, list[float]] = {}
    for first, second in pairs:
        for item in sorted(first.keys() & second.keys()):
            by_item.setdefault(item, []).append(second[item] - first[item])
    if not by_item:
        raise AnchorvecError("the two systems have no item in common; score both on the same data")
    differences = _scores([np.mean(of_item) for of_item in by_item.values()])  # (items,)
    interval = bootstrap_interval(differences, resamples=resamples, seed=seed)
    return Difference(interval.mean, interval.low, interval.high, _chance(differences, resamples, seed))


def spearman_interval(
    similarities: ItemScores, scores: ItemScores, *, resamples: int = 2_000, seed: int = 0
) -> Interval:
    """Spearman's correlation of `similarities` with `scores`, item id -> value, with its interval.

    The interval is a percentile bootstrap: of `resamples` times as many pairs as there are, drawn with replacement and
    `seed`, the correlation is computed again. Without spread on one side it is 0. Raises AnchorvecError if there is no
    item.
    """
    pairs = np.stack([_scores(list(similarities.values())), _scores([scores[item] for item in similarities])])
    drawn = _spearman_of_draws(pairs, resamples, seed)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(_spearman(pairs[None])[0]), float(low), float(high))


def spearman_difference(
    first: ItemScores, second: ItemScores, scores: ItemScores, *, resamples: int = 2_000, seed: int = 0
) -> Difference:
    """By how much the correlation of `second` with `scores` is above that of `first`, over the same items.

    The interval draws pairs again, the same ones for both. The p-value is that of a permutation test: the ranks of the
    two systems' similarities are exchanged pair by pair by chance, in `resamples` ways drawn with `seed`; twice the
    share of these, with 1 added to both counts, whose difference is as far from 0 on the same side. Raises
    AnchorvecError if the systems do not have the same items.
    """
    if first.keys() != second.keys():
        raise AnchorvecError("the two systems were scored on other pairs; score both on the same")
    gold = _scores([scores[item] for item in first])
    ranks = [rankdata([of_system[item] for item in first]) for of_system in (first, second)]
    both = [np.stack([of_system, gold]) for of_system in ranks]
    observed = float(_spearman(both[1][None])[0] - _spearman(both[0][None])[0])
    drawn = _spearman_of_draws(both[1], resamples, seed) - _spearman_of_draws(both[0], resamples, seed)
    low, high = np.percentile(drawn, [2.5, 97.5])
    rng = np.random.default_rng(seed)
    as_far = 0
    for _ in range(resamples):
        exchanged = rng.random(gold.size) < 0.5
        new = [np.where(exchanged, ranks[1 - i], ranks[i]) for i in (0, 1)]
        found = _spearman(np.stack([new[1], gold])[None])[0] - _spearman(np.stack([new[0], gold])[None])[0]
        as_far += found >= observed if observed >= 0 else found <= observed
    p_value = min(1.0, 2 * (as_far + 1) / (resamples + 1))
    return Difference(observed, float(low), float(high), p_value)


def _spearman_of_draws(pairs: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Of so many draws of `pairs` (2, items) with replacement: (resamples,)."""
    rng, items = np.random.default_rng(seed), pairs.shape[1]
    size = max(1, _DRAWS_AT_ONCE // items)
    parts = []
    for begin in range(0, resamples, size):
        index = rng.integers(items, size=(min(size, resamples - begin), items))
        parts.append(_spearman(np.moveaxis(pairs[:, index], 0, 1)))
    return np.concatenate(parts)


def _spearman(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The correlation of the ranks in each of `pairs` (draws, 2, items): (draws,); 0 without spread."""
    ranks = rankdata(pairs, axis=2)
    ranks = ranks - ranks.mean(axis=2, keepdims=True)
    norms = np.sqrt((ranks**2).sum(axis=2)).prod(axis=1)
    found: NDArray[np.float64] = np.divide(
        (ranks[:, 0] * ranks[:, 1]).sum(axis=1), norms, out=np.zeros(len(ranks)), where=norms > 0
    )
    return found


def _chance(differences: NDArray[np.float64], resamples: int, seed: int) -> float:
    """The p-value of `paired_difference`. Of a single difference both flips are as far from 0."""
    if differences.size == 1:  # which scipy refuses
        return 1.0
    from scipy.stats import permutation_test

    found = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=_batch(differences),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)  # (items,)
    if array.size == 0:
        raise AnchorvecError("there is no score to take the mean of")
    return array


def _batch(array: NDArray[np.float64]) -> int:
    """How many resamples are drawn at a time."""
    return max(1, _DRAWS_AT_ONCE // array.size)

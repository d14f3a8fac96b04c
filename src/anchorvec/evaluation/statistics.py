"""Intervals and tests for figures over items and over seeds. The arithmetic is scipy's and statsmodels'.

All intervals are of 95%. Over items (queries, sentence pairs, ...) they are BCa bootstraps: an item is what is drawn
again, of several test sets within each of them; differences are tested by exchanging the two systems item by item.
Over seeds, of which there are few, they are Student's.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.figures import Index, ItemScores, Pair, Sample, Values, as_scores, mean_pair, mean_sample

CONFIDENCE = 0.95
RESAMPLES = 10_000
BCA, PERCENTILE, STUDENT = "BCa", "percentile", "Student"
NO_DIFFERENCE = "no difference shown"
_DRAWS_AT_ONCE = 2_000_000  # 16 MB of indices, whatever the number of items


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95% interval."""

    mean: float
    low: float
    high: float
    method: str = field(default=BCA, kw_only=True, compare=False)
    """`BCa`, `percentile` where values without spread have no BCa, or `Student`."""

    def __str__(self) -> str:
        """`0.553 [0.521, 0.585]`."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference with the ends of its 95% interval, and how likely one as large is by chance."""

    p_value: float
    """Two-sided, of the hypothesis that which system is which is chance."""
    p_holm: float | None = field(default=None, kw_only=True)
    """The same, corrected for all `comparisons` that were made together; see `holm`."""
    comparisons: int = field(default=1, kw_only=True)
    standard_error: float = field(default=np.inf, kw_only=True)
    degrees_of_freedom: float = field(default=1.0, kw_only=True)

    __str__ = Interval.__str__

    @property
    def verdict(self) -> str:
        """`higher`, `lower`, or `no difference shown`: at 5%, over all comparisons that were made together."""
        p_value = self.p_value if self.p_holm is None else self.p_holm
        if p_value > 1 - CONFIDENCE:
            return NO_DIFFERENCE
        return "higher" if self.mean > 0 else "lower"

    def detectable(self, *, power: float = 0.8, alpha: float = 0.05) -> float:
        """The smallest true difference that such a comparison shows with this `power`, from the spread that was seen.

        By the power of Student's test at `alpha`, of several `comparisons` at their share of it, which is Holm's first
        step; where seeds and items are sources of chance, with the degrees of freedom of Satterthwaite (1946). It is
        inf where no spread could be seen, as of one item, or of items that are all alike.
        """
        from scipy.optimize import brentq
        from statsmodels.stats.power import ttest_power

        if not 0 < self.standard_error < np.inf:
            return math.inf

        level = alpha / self.comparisons / 2  # of one tail; the other one adds nothing to such a power

        def missing(errors: float) -> float:
            """The power that a difference of so many standard errors lacks."""
            found = ttest_power(errors, nobs=1, alpha=level, df=self.degrees_of_freedom, alternative="larger")
            return float(power - found)

        enough = 4.0
        while missing(enough) > 0:
            enough *= 2
        return float(brentq(missing, 0.0, enough)) * self.standard_error


def bootstrap_interval(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of `values` with its interval by the BCa bootstrap (Efron and Tibshirani 1993, chapter 14).

    `scipy.stats.bootstrap` with `method="BCa"`, which corrects the percentiles of the means of drawn samples for bias
    and skew. It has no answer (nan) where all values are the same; both ends are that value then, and `method` says
    `percentile`. Both are the value too where there is only one, and say nothing of how far others would lie from it.

    - `values`: scores, (items,), in any unit.
    - `resamples`: how many samples are drawn, each of as many values as there are, with replacement.
    - `seed`: of the draw; the same seed and values give the same interval.

    Raises AnchorvecError if there is no value.
    """
    return interval([mean_sample(values)], resamples=resamples, seed=seed)


def interval(samples: Sequence[Sample], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The average of the figures of `samples`, a test set each, with its interval; items are drawn within each set.

    `resamples` and `seed` are as in `bootstrap_interval`. Where a figure is a mean over seeds, the interval is
    Student's, over seeds and items: see `difference`.
    """
    mean = float(np.mean([sample.figure for sample in samples]))
    if any(sample.seeds is not None for sample in samples):
        return _ends_of(_student(mean, _spread(samples, resamples, seed), resamples, seed))
    low, high, method, _ = _ends(samples, mean, resamples, seed)
    return Interval(mean, low, high, method=method)


def student_interval(values: ArrayLike) -> Interval:
    """The mean of `values` with its interval by Student's t: mean ± t(0.975; n - 1) s / sqrt(n).

    - `values`: one figure a run, (runs,), such as the mean score of each seed; s is their standard deviation.

    For a single value the ends are -inf and inf. Raises AnchorvecError if there is no value.
    """
    array = as_scores(values)
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, -np.inf, np.inf, method=STUDENT)
    return _ends_of(_student(mean, [(_of_mean(array), array.size - 1)], RESAMPLES, 0))


def paired_difference(
    first: ItemScores, second: ItemScores, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """The mean difference `second - first` over the items that both have, item by item, as `difference` has it.

    - `first`, `second`: item id -> score, of two systems on the same task.
    - `resamples`: how many samples, and how many exchanges, are drawn.
    - `seed`: of both draws.

    Raises AnchorvecError if no item is common.
    """
    return difference([mean_pair(first, second)], resamples=resamples, seed=seed)


def paired_difference_over_seeds(
    pairs: Sequence[tuple[ItemScores, ItemScores]], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """`paired_difference` of two systems that were trained with several seeds each, over the items alone.

    An item that several seeds were scored on counts once, with the mean of its differences: what is drawn again is the
    item, and the scores of one item under several seeds are not independent. Other seeds may give another difference:
    `difference_over_seeds` asks that too.

    - `pairs`: for each seed, item id -> score of the first and of the second system.
    - `resamples`, `seed`: as in `paired_difference`.

    Raises AnchorvecError if no pair has an item in common.
    """
    by_item: dict[str, list[float]] = {}
    for first, second in pairs:
        for item in first.keys() & second.keys():
            by_item.setdefault(item, []).append(second[item] - first[item])
    means = {item: float(np.mean(of_item)) for item, of_item in by_item.items()}
    return paired_difference(dict.fromkeys(means, 0.0), means, resamples=resamples, seed=seed)


def difference(pairs: Sequence[Pair], *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The average of the differences of `pairs`, a test set each, with its interval and p-value.

    The interval is that of `bootstrap_interval`, items drawn within each set, the same ones for both systems. The
    p-value is that of a permutation test for pairs, which exchanges the two systems in each item by chance: twice the
    share of `resamples` such exchanges, with 1 added to both counts, whose difference is as far from 0 on the same
    side; of all 2^n exchanges where there are no more (`scipy.stats.permutation_test`). Both draw by `seed`.

    Where a figure is a mean over seeds (of a clustering), both are over seeds and items, as in `difference_over_seeds`.
    """
    mean = float(np.mean([pair.figure for pair in pairs]))
    if any(pair.seeds is not None for pair in pairs):
        return _student(mean, _spread(pairs, resamples, seed), resamples, seed)
    low, high, method, error = _ends(pairs, mean, resamples, seed)
    return Difference(
        mean,
        low,
        high,
        _chance(pairs, resamples, seed),
        method=method,
        standard_error=error,
        degrees_of_freedom=float(_degrees(pairs)),
    )


def difference_over_seeds(
    by_seed: Sequence[Sequence[Pair]], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """`difference` of two systems that were trained with several seeds each, over items and seeds.

    Seeds and items are crossed: each seed's two models are scored on the same items. A difference that is shown holds
    for other seeds and other items. Its error has two parts, each of which is Student's: of the items, whose variance
    is that of a bootstrap which draws the same items for all seeds and both systems; and of the seeds, whose variance
    is that between them, less the noise of single items, which the first part has counted (Cornfield and Tukey 1956).
    Their sum is the distribution of Behrens and Fisher. Seeds are not drawn again: three of them would show differences
    that are not there (docs/statistics.md).

    - `by_seed`: for each seed the pairs, a test set each, in the same order. A single seed is `difference` over items.
    - `resamples`, `seed`: of the bootstrap, and of the errors.

    Raises AnchorvecError if the seeds were scored on different items.
    """
    sizes = [[pair.items for pair in pairs] for pairs in by_seed]
    if any(of_seed != sizes[0] for of_seed in sizes):
        raise AnchorvecError("the seeds were scored on different items; score all on the same data")
    if len(by_seed) == 1:
        return difference(by_seed[0], resamples=resamples, seed=seed)
    seeds = len(by_seed)
    of_seed = np.array([np.mean([pair.figure for pair in pairs]) for pairs in by_seed])
    between = _of_mean(of_seed)
    drawn = _bootstrap(by_seed, PERCENTILE, resamples, seed)
    covariance = np.zeros((seeds, seeds)) if drawn is None else np.cov(drawn.bootstrap_distribution)
    items = float(covariance.mean())
    both = (float(np.trace(covariance)) / seeds - items) / (seeds - 1)
    parts = [(between - both, seeds - 1), (items, _degrees(by_seed[0]))]
    return _student(float(of_seed.mean()), parts, resamples, seed)


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """`differences` with `p_holm`: p-values that are corrected for their number (Holm 1979, by statsmodels).

    At 5% the chance is 5% that any of them is taken for one though there is none, whichever depend on which.
    """
    if not differences:
        return []
    from statsmodels.stats.multitest import multipletests

    _, corrected, *_ = multipletests([found.p_value for found in differences], method="holm")
    return [
        replace(found, p_holm=float(p_holm), comparisons=len(differences))
        for found, p_holm in zip(differences, corrected, strict=True)
    ]


def _bootstrap(groups: Sequence[Sequence[Sample]], method: str, resamples: int, seed: int) -> Any:
    """The bootstrap of the average over sets, for each of `groups`, which draw the same items; None: no set varies.

    A set of one item is the same in every draw, and scipy refuses it.
    """
    varying = [i for i, sample in enumerate(groups[0]) if sample.items > 1]
    if not varying:
        return None
    fixed = [sum(sample.figure for sample in samples if sample.items == 1) for samples in groups]

    def averages(*index: Index, axis: int) -> Values:
        sums = [
            rest + sum(_figures(samples[i], of_set) for i, of_set in zip(varying, index, strict=True))
            for samples, rest in zip(groups, fixed, strict=True)
        ]
        found: Values = np.stack(sums) / len(groups[0])  # (groups, draws)
        return found[0] if len(groups) == 1 else found

    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        return bootstrap(
            [np.arange(groups[0][i].items) for i in varying],
            averages,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=CONFIDENCE,
            method=method,
            batch=_batch(groups[0]),
            rng=np.random.default_rng(seed),
        )


def _figures(sample: Sample, index: Index) -> Values:
    """The figure of each row of `index`. While scipy leaves items of another set out, all rows are one row."""
    if index.ndim == 1:
        return sample.of(index[None])[0]  # type: ignore[no-any-return]
    if index.strides[0] == 0:
        return np.broadcast_to(sample.of(index[:1]), len(index))
    return sample.of(index)


def _ends(samples: Sequence[Sample], mean: float, resamples: int, seed: int) -> tuple[float, float, str, float]:
    """The ends of the bootstrap interval, which method they are by, and the standard error."""
    found = _bootstrap([samples], BCA, resamples, seed)
    if found is None:
        return mean, mean, PERCENTILE, np.inf
    ends = found.confidence_interval
    if np.isfinite([ends.low, ends.high]).all():
        return float(ends.low), float(ends.high), BCA, float(found.standard_error)
    low, high = np.quantile(found.bootstrap_distribution, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high), PERCENTILE, float(found.standard_error)


def _chance(pairs: Sequence[Pair], resamples: int, seed: int) -> float:
    """The p-value of `difference`. Of a single item both exchanges are as far from 0, and scipy refuses it."""
    items = sum(pair.items for pair in pairs)
    if items == 1:
        return 1.0
    cuts = np.cumsum([pair.items for pair in pairs])[:-1]

    def average(signs: Values, axis: int) -> Values:
        of_sets = np.split(np.atleast_2d(signs), cuts, axis=-1)
        found: Values = np.mean([pair.exchanged(of_set) for pair, of_set in zip(pairs, of_sets, strict=True)], axis=0)
        return found if signs.ndim > 1 else found[0]

    from scipy.stats import permutation_test

    found = permutation_test(
        (np.ones(items),),
        average,
        vectorized=True,
        permutation_type="samples",
        n_resamples=resamples,
        batch=_batch(pairs),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _spread(samples: Sequence[Sample], resamples: int, seed: int) -> list[tuple[float, float]]:
    """The variances, with their degrees of freedom, of an average of sets of which some are means over seeds."""
    drawn = _bootstrap([samples], PERCENTILE, resamples, seed)
    items = 0.0 if drawn is None else float(drawn.standard_error) ** 2
    seeds = [sample.seeds for sample in samples if sample.seeds is not None and sample.seeds.size > 1]
    return [(items, _degrees(samples)), *((_of_mean(of) / len(samples) ** 2, of.size - 1) for of in seeds)]


def _student(mean: float, parts: Sequence[tuple[float, float]], resamples: int, seed: int) -> Difference:
    """`mean` against 0, where its variance is the sum of `parts`, each with its degrees of freedom.

    Of one part this is Student's test. The error of several is a sum of Student's, each of its own width (Behrens and
    Fisher), of which ten times `resamples` are drawn.
    """
    from scipy.stats import t

    parts = [(variance, freedom) for variance, freedom in parts if variance > 0]
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return Difference(mean, mean, mean, float(mean == 0), method=STUDENT, standard_error=0.0)
    error = float(np.sqrt(total))
    satterthwaite = total**2 / sum(variance**2 / freedom for variance, freedom in parts)
    if len(parts) == 1:
        reach = float(t.ppf((1 + CONFIDENCE) / 2, satterthwaite)) * error
        p_value = float(2 * t.sf(abs(mean) / error, satterthwaite))
    else:
        rng = np.random.default_rng(seed)
        drawn = [np.sqrt(variance) * rng.standard_t(freedom, 10 * resamples) for variance, freedom in parts]
        errors = np.abs(np.sum(drawn, axis=0))
        reach = float(np.quantile(errors, CONFIDENCE))
        p_value = float((np.sum(errors >= abs(mean)) + 1) / (errors.size + 1))
    return Difference(
        mean,
        mean - reach,
        mean + reach,
        p_value,
        method=STUDENT,
        standard_error=error,
        degrees_of_freedom=satterthwaite,
    )


def _ends_of(found: Difference) -> Interval:
    """`found` without what belongs to a difference alone."""
    return Interval(found.mean, found.low, found.high, method=found.method)


def _of_mean(values: Values) -> float:
    """The variance of the mean of `values`."""
    return float(values.var(ddof=1)) / values.size


def _degrees(samples: Sequence[Sample]) -> int:
    """Degrees of freedom of the average over the items of `samples`."""
    return max(1, sum(sample.items - 1 for sample in samples))


def _batch(samples: Sequence[Sample]) -> int:
    """How many resamples are drawn at a time."""
    return max(1, _DRAWS_AT_ONCE // sum(sample.items for sample in samples))

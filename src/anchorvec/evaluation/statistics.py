"""Intervals over queries by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from anchorvec.errors import AnchorvecError

_DRAWS_AT_ONCE = 2_000_000  # 16 MB of indices, whatever the number of queries


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.553 [0.521, 0.585]`."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(values: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of `values` and the 2.5th and 97.5th percentiles of the means of `resamples` random resamples.

    Raises AnchorvecError if there is no value.
    """
    array = np.asarray(values, dtype=np.float64)  # (queries,)
    if array.size == 0:
        raise AnchorvecError("there is no score to take the mean of")
    random = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // array.size)
    means = np.concatenate(
        [
            array[random.integers(array.size, size=(min(rows, resamples - start), array.size))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )  # (resamples,)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))


def paired_bootstrap(
    a: Mapping[str, float], b: Mapping[str, float], *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean difference `b - a` over the queries that both have, query by query, with its interval.

    An interval without 0 says that the two systems differ at the 5% level.
    Raises AnchorvecError if no query is common.
    """
    common: Sequence[str] = sorted(a.keys() & b.keys())
    if not common:
        raise AnchorvecError("the two systems have no query in common; score both on the same data")
    return bootstrap_interval([b[query] - a[query] for query in common], resamples=resamples, seed=seed)

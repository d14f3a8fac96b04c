"""Intervals and tests for means, against formulas, enumerated cases and known distributions."""

import itertools
import math
import warnings

import numpy as np
import pytest

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import (
    Interval,
    bootstrap_interval,
    paired_difference,
    paired_difference_over_seeds,
    student_interval,
)


@pytest.fixture(autouse=True)
def no_warnings():
    """Nothing here may warn: a degenerate case has an answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def numbered(values):
    """Item id -> value."""
    return {f"q{i}": value for i, value in enumerate(values)}


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    """For many values the ends lie 1.96 standard errors from the mean."""
    values = np.random.default_rng(0).normal(size=2_000)
    interval = bootstrap_interval(values)
    reach = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - reach, abs=reach / 20)
    assert interval.high == pytest.approx(values.mean() + reach, abs=reach / 20)


def test_bootstrap_interval_is_that_of_all_resamples():
    """Of four values all 256 resamples can be written down; the percentiles of their means are the ends."""
    values = [0.0, 0.1, 0.4, 1.0]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
    interval = bootstrap_interval(values, resamples=100_000)
    assert (interval.low, interval.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_bootstrap_interval_covers_the_true_mean():
    """Of 300 samples of 60 exponential values about 95% have the mean of the distribution, 1, in their interval."""
    samples = np.random.default_rng(0).exponential(size=(300, 60))
    intervals = [bootstrap_interval(sample, resamples=1_000) for sample in samples]
    assert 0.9 <= np.mean([interval.low <= 1 <= interval.high for interval in intervals]) <= 0.98


def test_an_interval_depends_on_the_seed_alone():
    """The same seed gives the same ends, another seed others."""
    values = np.arange(50) / 50
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    values = values[::5]  # ten: the ids of more are in another order
    a, b = numbered(values**2), numbered(values)
    difference, interval = paired_difference(a, b, seed=3), bootstrap_interval(values - values**2, seed=3)
    assert (difference.mean, difference.low, difference.high) == (interval.mean, interval.low, interval.high)
    state = np.random.get_state()[1].tolist()
    bootstrap_interval(values)
    assert np.random.get_state()[1].tolist() == state  # numpy's own generator is not drawn from


def test_resamples_drawn_in_parts_are_the_same(monkeypatch):
    """How many are drawn at a time for want of memory does not change them."""
    values = numbered(np.random.default_rng(0).random(30))
    whole = paired_difference(values, numbered([0.5] * 30), resamples=1_000)
    monkeypatch.setattr("anchorvec.evaluation.statistics._DRAWS_AT_ONCE", 7 * 30)
    assert paired_difference(values, numbered([0.5] * 30), resamples=1_000) == whole


def test_values_without_spread_have_an_interval_without_length():
    """One value, or equal ones: both ends are the value, and nothing is nan."""
    assert bootstrap_interval([0.5]) == Interval(0.5, 0.5, 0.5)
    assert bootstrap_interval([0.5] * 8) == Interval(0.5, 0.5, 0.5)
    assert student_interval([0.5] * 3) == Interval(0.5, 0.5, 0.5)


def test_no_values_have_no_mean():
    """An empty list is refused rather than answered with nan."""
    for interval in (bootstrap_interval, student_interval):
        with pytest.raises(AnchorvecError, match="no score to take the mean of"):
            interval([])


def test_student_interval_is_students():
    """4.302653 is t's 97.5% point with 2 degrees of freedom; one seed bounds nothing."""
    interval = student_interval([0.1, 0.2, 0.3])
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.2, 0.2 - reach, 0.2 + reach))
    assert student_interval([0.1]) == Interval(0.1, -math.inf, math.inf)


def test_systems_are_compared_item_by_item():
    """A gain that is the same in every item is certain, however much the items differ."""
    a = numbered(np.arange(50) / 100)
    b = {item: score + 0.25 for item, score in reversed(a.items())} | {"only in b": 0.0}
    difference = paired_difference(a, b)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.25, 0.25, 0.25))
    assert difference.p_value == pytest.approx(2 / 10_001)
    assert str(difference) == "0.250 [0.250, 0.250]"


def test_the_p_value_counts_flips_of_signs():
    """Of few items it is the share of all 2^n flips whose mean is as far from 0."""
    differences = [0.3, -0.1, 0.2, 0.25, 0.05, -0.02, 0.4]
    flipped = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=7)]
    share = np.mean([total >= sum(differences) - 1e-12 for total in flipped])
    assert paired_difference(numbered([0.0] * 7), numbered(differences)).p_value == pytest.approx(share)


def test_the_p_value_is_uniform_where_nothing_differs():
    """Of pairs of systems that differ by noise alone 5% have a p-value up to 0.05."""
    noise = np.random.default_rng(0).normal(size=(300, 2, 25))
    p = [paired_difference(numbered(a), numbered(b), resamples=500).p_value for a, b in noise]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.08
    assert np.mean(p) == pytest.approx(0.5, abs=0.05)


def test_one_item_or_no_difference_shows_nothing():
    """The p-value is 1, and the interval has no length."""
    one = paired_difference({"q": 0.25}, {"q": 0.75})
    assert (one.mean, one.low, one.high, one.p_value) == (0.5, 0.5, 0.5, 1.0)
    same = paired_difference(numbered([0.1, 0.5]), numbered([0.1, 0.5]))
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_systems_without_a_common_item_cannot_be_compared():
    """Scores on different data are refused."""
    with pytest.raises(AnchorvecError, match="no item in common"):
        paired_difference({"a": 1.0}, {"b": 1.0})


def test_an_item_of_several_seeds_is_one_item():
    """Scored for each of three seeds, the same two items give the interval of two, not of six."""
    one = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 1.0}
    assert paired_difference_over_seeds([one, one, one]) == paired_difference(*one)
    other = {"a": 0.0, "b": 0.0, "c": 0.0}, {"a": 1.0, "b": 1.0, "c": 1.0}
    assert paired_difference_over_seeds([one, other]).mean == pytest.approx((0.5 + 1 + 1) / 3)

"""Intervals and tests for means, against formulas, enumerated cases and known distributions."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, permutation_test, spearmanr
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import (
    Difference,
    Interval,
    bootstrap_interval,
    holm,
    paired_difference,
    paired_difference_over_seeds,
    student_interval,
)
from anchorvec.evaluation.figures import correlation_pair, correlation_sample, mean_pair, mean_sample
from anchorvec.evaluation.statistics import difference, interval


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
    """Of four values all 256 resamples can be written down; BCa takes other percentiles of them, by Efron's formula."""
    values = np.array([0.0, 0.1, 0.4, 1.0])
    means = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=4)])
    bias = norm.ppf((np.mean(means < values.mean()) + np.mean(means <= values.mean())) / 2)
    left_out = np.array([np.delete(values, i).mean() for i in range(4)])
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    z = bias + norm.ppf([0.025, 0.975])
    ends = np.quantile(means, norm.cdf(bias + z / (1 - acceleration * z)))
    interval = bootstrap_interval(values, resamples=100_000)
    assert (interval.low, interval.high) == pytest.approx(ends, abs=0.02)


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
    assert bootstrap_interval([0.5] * 8).method == "percentile"
    assert bootstrap_interval([0.5, 0.25]).method == "BCa"
    assert bootstrap_interval([0.5]) == Interval(0.5, 0.5, 0.5)
    assert bootstrap_interval([0.5] * 8) == Interval(0.5, 0.5, 0.5)
    assert student_interval([0.5] * 3) == Interval(0.5, 0.5, 0.5)


def test_no_values_have_no_mean():
    """An empty list is refused rather than answered with nan."""
    for of_values in (bootstrap_interval, student_interval):
        with pytest.raises(AnchorvecError, match="no score to take the mean of"):
            of_values([])


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


def drawn_by_scipy(samples, statistic, seed=0):
    """The ends of scipy's BCa interval, called by hand."""
    found = bootstrap(samples, statistic, n_resamples=10_000, method="BCa", rng=np.random.default_rng(seed))
    return tuple(map(float, found.confidence_interval))


def exchanged_by_scipy(samples, statistic, seed=0):
    """The p-value of scipy's test that exchanges, or changes signs of, paired samples, called by hand."""
    options = {"permutation_type": "samples", "n_resamples": 10_000, "rng": np.random.default_rng(seed)}
    return float(permutation_test(samples, statistic, **options).pvalue)


@pytest.mark.parametrize("items", [8, 40])
def test_a_paired_difference_is_scipys(items):
    """Interval and p-value, of all exchanges where they are few and of drawn ones, are those of scipy by hand."""
    scores = np.random.default_rng(1).random((2, items)) + np.array([[0.0], [0.2]])
    found = paired_difference(*(dict(enumerate(row)) for row in scores), seed=5)
    assert (found.low, found.high) == drawn_by_scipy((scores[1] - scores[0],), np.mean, 5)
    assert found.p_value == exchanged_by_scipy((scores[1] - scores[0],), np.mean, 5)
    assert found.method == "BCa"


def test_an_average_draws_items_within_each_set():
    """Of sets of 30, 9 and 1 items: scipy's bootstrap of several samples, and signs that change within each."""
    draw = np.random.default_rng(2)
    sets = [draw.normal(0.3, 1, 30), draw.normal(0.6, 1, 9), np.array([0.25])]
    found = difference([mean_pair(numbered(np.zeros(len(of))), numbered(of)) for of in sets])
    sets = in_order(sets)
    mean = np.mean([of.mean() for of in sets])

    def average(one, other, axis):
        return (one.mean(axis) + other.mean(axis) + 0.25) / 3

    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx(drawn_by_scipy(sets[:2], average))
    shares = np.concatenate([of / len(of) / 3 for of in sets])
    assert found.p_value == pytest.approx(exchanged_by_scipy((shares,), np.sum))
    alone = interval([mean_sample(of) for of in sets])
    assert (alone.mean, alone.low, alone.high) == pytest.approx((found.mean, found.low, found.high))


def in_order(sets):
    """The values of each set in the order of their items' names, in which they are drawn."""
    return [np.array([numbered(of)[item] for item in sorted(numbered(of))]) for of in sets]


def scored_pairs(items, seed=0):
    """What people say of pairs of sentences, and two systems' similarities, by pair; the second is better."""
    draw = np.random.default_rng(seed)
    gold = draw.integers(0, 6, items).astype(float)
    return gold, gold + 4 * draw.normal(size=items), gold + draw.normal(size=items)


def test_a_correlation_is_computed_again_for_each_draw():
    """Interval and difference are those of scipy with `spearmanr` on the drawn pairs; both systems have the same."""
    gold, one, two = scored_pairs(25)

    def of(*names):
        return lambda index: [spearmanr(values[index], gold[index])[0] for values in names]

    found = interval([correlation_sample(numbered(one), numbered(gold))], resamples=400, seed=3)
    options = {"n_resamples": 400, "vectorized": False, "method": "BCa"}
    ends = bootstrap((np.arange(25),), lambda i: of(one)(i)[0], rng=np.random.default_rng(3), **options)
    assert found.mean == pytest.approx(spearmanr(one, gold)[0])
    assert (found.low, found.high) == pytest.approx(tuple(ends.confidence_interval))
    pair = correlation_pair(numbered(one), numbered(two), numbered(gold))
    apart = difference([pair], resamples=400, seed=3)
    ends = bootstrap((np.arange(25),), lambda i: of(two)(i)[0] - of(one)(i)[0], rng=np.random.default_rng(3), **options)
    assert (apart.low, apart.high) == pytest.approx(tuple(ends.confidence_interval))


def test_the_ranks_of_similarities_change_places_pair_by_pair():
    """The p-value is scipy's, of the two systems' ranks as paired samples."""
    gold, one, two = scored_pairs(12, seed=4)
    ranks = [np.argsort(np.argsort(values)) + 1.0 for values in (one, two)]
    gold_ranks = np.array([np.mean(np.flatnonzero(np.sort(gold) == value)) for value in gold])

    def apart(first, second):
        return np.corrcoef(second, gold_ranks)[0, 1] - np.corrcoef(first, gold_ranks)[0, 1]

    exact = permutation_test(ranks, apart, permutation_type="samples", vectorized=False, n_resamples=10_000)
    found = difference([correlation_pair(numbered(one), numbered(two), numbered(gold))])
    assert found.p_value == pytest.approx(exact.pvalue)


def test_a_system_that_knows_the_scores_is_above_one_that_does_not():
    """And one as good as it is not."""
    gold, bad, good = scored_pairs(200)
    as_good = gold + np.random.default_rng(9).normal(size=200)
    above = difference([correlation_pair(numbered(bad), numbered(good), numbered(gold))], resamples=1_000)
    same = difference([correlation_pair(numbered(as_good), numbered(good), numbered(gold))], resamples=1_000)
    assert above.low > 0.2
    assert above.verdict == "higher"
    assert same.low < 0 < same.high
    assert same.verdict == "no difference shown"
    with pytest.raises(AnchorvecError, match="on other pairs"):
        correlation_pair({"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0})


def test_p_values_are_corrected_as_statsmodels_does():
    """Holm's: the smallest times their number, the next times one less, never below one before it."""
    p_values = [0.03, 0.001, 0.02, 0.8]
    found = holm([Difference(0.1, 0.0, 0.2, p) for p in p_values])
    assert [of.p_holm for of in found] == pytest.approx(multipletests(p_values, method="holm")[1])
    assert [of.p_holm for of in found] == pytest.approx([0.06, 0.004, 0.06, 0.8])
    assert [of.verdict for of in found] == [
        "no difference shown",
        "higher",
        "no difference shown",
        "no difference shown",
    ]
    assert {of.comparisons for of in found} == {4}
    assert holm([]) == []
    assert holm([Difference(-0.1, -0.2, 0.0, 0.01)])[0].verdict == "lower"


def test_the_smallest_difference_that_could_have_been_shown():
    """That of a paired t test with 80% power, by statsmodels; of several comparisons at Holm's first level."""
    values = np.random.default_rng(0).normal(0, 0.3, 60)
    found = paired_difference(numbered(np.zeros(60)), numbered(values))
    size = TTestPower().solve_power(nobs=60, alpha=0.05, power=0.8) * values.std(ddof=1)
    assert found.detectable() == pytest.approx(size, rel=0.02)
    corrected, _ = holm([found, found])
    size = TTestPower().solve_power(nobs=60, alpha=0.025, power=0.8) * values.std(ddof=1)
    assert corrected.detectable() == pytest.approx(size, rel=0.02)
    assert paired_difference({"q": 0.0}, {"q": 1.0}).detectable() == math.inf
    assert paired_difference({"q": 0.0, "r": 0.5}, {"q": 0.0, "r": 0.5}).detectable() == math.inf  # none was seen
    two_seeds = Difference(0, 0, 0, 1.0, standard_error=0.1, degrees_of_freedom=1.0, comparisons=50)
    limit, quantile = 636.6, 1.2816  # t's for 0.1% of one degree of freedom; |z| is below this in 80%
    assert two_seeds.detectable() == pytest.approx(limit * quantile * 0.1, rel=0.01)


def test_correlations_that_do_not_differ_are_seldom_said_to():
    """Of pairs of systems that are as good as each other about 5% have a p-value up to 0.05."""
    draw, p_values = np.random.default_rng(0), []
    for _ in range(150):
        gold, one, two = (numbered(values) for values in draw.normal(size=(3, 30)).cumsum(axis=0))
        two = {item: gold[item] + two[item] - one[item] for item in gold}  # as `one`: gold and noise
        p_values.append(difference([correlation_pair(one, two, gold)], resamples=200).p_value)
    assert 0.01 <= np.mean(np.array(p_values) <= 0.05) <= 0.10

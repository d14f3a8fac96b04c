"""Differences of systems that were trained with several seeds: over items and seeds, on simulated scores."""

import numpy as np
import pytest

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import difference_over_seeds, holm
from anchorvec.evaluation.figures import correlation_pair, mean_pair
from anchorvec.evaluation.statistics import NO_DIFFERENCE, difference

CASES = [(0.0, 0.2, 0.1), (0.0, 0.05, 0.3), (0.03, 0.2, 0.1), (0.05, 0.1, 0.1), (0.2, 0.02, 0.02)]
"""Deviations of the difference between seeds, between items, and of both: noise of a seed in an item."""


def numbered(values):
    """Item id -> value."""
    return {f"q{i}": value for i, value in enumerate(values)}


def simulated(draw, seeds, items, between_seeds, between_items, noise, mean=0.0):
    """Differences of two systems, (seeds, items)."""
    of_seed, of_item = draw.normal(0, between_seeds, (seeds, 1)), draw.normal(0, between_items, (1, items))
    return mean + of_seed + of_item + draw.normal(0, noise, (seeds, items))


def over_seeds(differences, resamples=200):
    """The difference of systems of which the second is above the first by `differences` (seeds, items)."""
    zeros = numbered(np.zeros(differences.shape[1]))
    pairs = [[mean_pair(zeros, numbered(of_seed))] for of_seed in differences]
    return difference_over_seeds(pairs, resamples=resamples)


def found_where_there_is_none(seeds, case, runs, items=40):
    """In which share of simulated comparisons without a difference one is shown."""
    draw = np.random.default_rng(0)
    found = [over_seeds(simulated(draw, seeds, items, *case)) for _ in range(runs)]
    return np.mean([of.verdict != NO_DIFFERENCE for of in found])


def test_seeds_and_items_are_both_sources_of_chance():
    """Their variances are those of the mean squares of a table of seeds and items; each has its Student error."""
    differences = simulated(np.random.default_rng(1), 4, 50, 0.05, 0.1, 0.1, mean=0.1)
    seeds, items = differences.shape
    of_seed, of_item, mean = differences.mean(axis=1), differences.mean(axis=0), differences.mean()
    squares_seeds = items * ((of_seed - mean) ** 2).sum() / (seeds - 1)
    squares_items = seeds * ((of_item - mean) ** 2).sum() / (items - 1)
    rest = differences - of_seed[:, None] - of_item + mean
    squares_rest = (rest**2).sum() / ((seeds - 1) * (items - 1))
    parts = np.array([squares_seeds - squares_rest, squares_items]) / (seeds * items)
    freedom = np.array([seeds - 1, items - 1])
    found = over_seeds(differences, resamples=20_000)
    assert found.mean == pytest.approx(mean)
    assert found.method == "Student"
    assert found.standard_error == pytest.approx(parts.sum() ** 0.5, rel=0.02)
    assert found.degrees_of_freedom == pytest.approx(parts.sum() ** 2 / (parts**2 / freedom).sum(), rel=0.04)
    errors = np.abs((np.random.default_rng(1).standard_t(freedom, (200_000, 2)) * parts**0.5).sum(axis=1))
    assert found.p_value == pytest.approx(np.mean(errors > mean), rel=0.1)
    assert found.high - found.mean == pytest.approx(np.quantile(errors, 0.95), rel=0.03)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_a_difference_is_seldom_shown_where_there_is_none(case):
    """Of three seeds, about one in twenty, whether seeds or items differ more; and not one in five."""
    assert found_where_there_is_none(3, case, runs=150) <= 0.09


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_differences_are_shown_at_their_rate_where_there_is_none(seeds, case):
    """At most one in twenty, within what 1,000 simulated comparisons can tell (0.05 and 3.6 standard errors)."""
    assert found_where_there_is_none(seeds, case, runs=1_000, items=100) <= 0.075


def test_seeds_that_differ_hide_a_difference_that_items_alone_would_show():
    """The mean over two unlike seeds is far from 0 for these items, but another seed may be anywhere."""
    unlike = np.array([[0.3], [0.1], [-0.1]])
    differences = unlike + simulated(np.random.default_rng(0), 3, 200, 0.0, 0.05, 0.05)
    zeros = numbered(np.zeros(200))
    averaged = difference([mean_pair(zeros, numbered(differences.mean(axis=0)))], resamples=500)
    assert averaged.verdict == "higher"
    assert over_seeds(differences).verdict == NO_DIFFERENCE


def test_a_known_difference_is_found_as_often_as_was_said():
    """One of the size that a first comparison calls detectable is shown in about four of five."""
    draw = np.random.default_rng(3)
    case = 0.02, 0.2, 0.2
    sizes = [over_seeds(simulated(draw, 5, 60, *case)).detectable() for _ in range(40)]
    runs = [over_seeds(simulated(draw, 5, 60, *case, mean=np.mean(sizes))) for _ in range(120)]
    assert 0.65 <= np.mean([of.verdict == "higher" for of in runs]) <= 0.92
    assert all(of.mean > 0 for of in runs if of.verdict != NO_DIFFERENCE)


def test_several_arms_are_corrected_together():
    """Of eight arms of which one is better, that one is shown; without Holm others would be, now and then."""
    draw = np.random.default_rng(5)
    arms = [simulated(draw, 3, 100, 0.005, 0.1, 0.1, mean=0.2 if i == 4 else 0.0) for i in range(8)]
    found = holm([over_seeds(of_arm) for of_arm in arms])
    assert [of.verdict for of in found] == [NO_DIFFERENCE] * 4 + ["higher"] + [NO_DIFFERENCE] * 3
    assert all(of.p_holm >= of.p_value for of in found)


def test_several_sets_of_several_kinds_are_one_average():
    """Means and correlations; each seed's average over sets is the figure of that seed."""
    draw = np.random.default_rng(6)
    gold = numbered(draw.normal(size=80))
    pairs = []
    for _ in range(3):
        similar = {item: score + draw.normal() for item, score in gold.items()}
        better = {item: score + 0.3 * draw.normal() for item, score in gold.items()}
        queries = mean_pair(numbered(draw.random(30)), numbered(draw.random(30) + 0.3))
        pairs.append([queries, correlation_pair(similar, better, gold)])
    found = difference_over_seeds(pairs, resamples=500)
    assert found.mean == pytest.approx(np.mean([[pair.figure for pair in of_seed] for of_seed in pairs]))
    assert found.verdict == "higher"


def test_one_seed_is_a_comparison_over_items():
    """With its interval and its p-value."""
    differences = simulated(np.random.default_rng(7), 1, 30, 0.0, 0.1, 0.1, mean=0.05)
    pair = mean_pair(numbered(np.zeros(30)), numbered(differences[0]))
    assert over_seeds(differences) == difference([pair], resamples=200)


def test_seeds_without_any_spread_have_an_interval_without_length():
    """Of equal differences, and of a single item, there is no spread between items to see."""
    assert over_seeds(np.full((3, 10), 0.25)).low == pytest.approx(0.25)
    assert over_seeds(np.zeros((3, 10))).p_value == 1.0
    one = over_seeds(np.array([[0.1], [0.2], [0.3]]))
    assert (one.mean, one.degrees_of_freedom) == pytest.approx((0.2, 2))


def test_seeds_that_were_scored_on_different_items_are_refused():
    """They cannot be paired."""
    zeros = numbered(np.zeros(4))
    with pytest.raises(AnchorvecError, match="on different items"):
        difference_over_seeds([[mean_pair(zeros, zeros)], [mean_pair({"q0": 0.0}, zeros)]])

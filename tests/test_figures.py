"""Figures that can be drawn again: their arithmetic against scipy's and scikit-learn's."""

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import v_measure_score

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.clustering import influence
from anchorvec.evaluation.figures import _ranks, correlation_pair, correlation_sample, mean_pair, mean_sample


def numbered(values):
    """Item id -> value."""
    return {f"q{i}": value for i, value in enumerate(values)}


def test_ranks_are_scipys():
    """Of each draw, equal values sharing theirs, whichever values it lacks."""
    places = np.random.default_rng(0).integers(0, 9, (50, 20))
    assert (_ranks(places) == rankdata(places, axis=1)).all()
    assert _ranks(np.full((2, 3), 4)).tolist() == [[2.0, 2.0, 2.0]] * 2


def test_a_correlation_is_spearmans_with_ties():
    """Of all items, and of drawn ones; without spread it is 0, where scipy's has no answer."""
    one, gold = np.random.default_rng(1).integers(0, 5, (2, 40)).astype(float)
    sample = correlation_sample(numbered(one), numbered(gold))
    assert sample.figure == pytest.approx(spearmanr(one, gold)[0])
    index = np.random.default_rng(2).integers(0, 40, (7, 40))
    assert sample.of(index) == pytest.approx([spearmanr(one[row], gold[row])[0] for row in index])
    assert correlation_sample(numbered([1.0, 1.0]), numbered([0.0, 1.0])).figure == 0


def test_systems_that_change_places_everywhere_have_the_difference_reversed():
    """And nowhere, the difference itself."""
    one, two, gold = (numbered(values) for values in np.random.default_rng(3).random((3, 15)))
    for pair in (mean_pair(one, two), correlation_pair(one, two, gold)):
        signs = np.ones((2, 15)) * [[1], [-1]]
        assert pair.exchanged(signs) == pytest.approx([pair.figure, -pair.figure])


def test_the_influence_of_texts_on_a_v_measure():
    """Its mean is scikit-learn's V-measure; each is V and what a little more of this text's weight does to it."""
    draw = np.random.default_rng(4)
    labels = draw.integers(0, 4, 50)
    clusters = (labels + draw.integers(0, 2, 50)) % 5
    found = influence(labels, clusters)
    v_measure = v_measure_score(labels, clusters)
    assert found.mean() == pytest.approx(v_measure)
    times = 20_000  # a text more among a million
    for text in (0, 7, 31):
        more = [np.append(np.tile(values, times), values[text]) for values in (labels, clusters)]
        slope = (v_measure_score(*more) - v_measure) * (50 * times + 1)
        assert found[text] == pytest.approx(v_measure + slope, abs=1e-4)
    assert influence(np.zeros(3, dtype=int), np.zeros(3, dtype=int)).tolist() == [1.0, 1.0, 1.0]


def test_figures_without_items_are_refused():
    """As are systems that share none."""
    with pytest.raises(AnchorvecError, match="no score"):
        mean_sample([])
    with pytest.raises(AnchorvecError, match="no item in common"):
        mean_pair({"a": 1.0}, {"b": 1.0})

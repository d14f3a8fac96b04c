"""Which hard negatives a pair is trained with, and the hashes of its texts."""

import random
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from anchorvec.data import contrastive_rows
from anchorvec.data.negatives import text_hashes


def hashes_of(*texts):
    """The hashes of texts, 0 for None."""
    return [0 if text is None else int(text_hashes(pa.array([text]))[0]) for text in texts]


def test_rows_with_and_without_negatives_stay_together():
    """A row with fewer negatives than wanted has none; where none are wanted, or there, there is no column of them."""
    rows = Dataset.from_dict(
        {"query": ["q1", "q2", "q3"], "positive": ["p1", "p2", "p3"], "negatives": [["n1", "n2", "n3"], [], ["n4"]]}
    )
    found = contrastive_rows(rows, negatives=2)
    assert found.columns == ["query", "positive", "negative_1", "negative_2"]
    assert found.dataset[:] == {
        "query": ["q1", "q2", "q3"],
        "positive": ["p1", "p2", "p3"],
        "negative_1": ["n1", None, None],
        "negative_2": ["n2", None, None],
    }
    assert found.with_negatives == 1
    pairs = [{"query": f"q{i}", "positive": f"p{i}"} for i in (1, 2, 3)]
    for wanted in (0, 4):
        without = contrastive_rows(rows, negatives=wanted)
        assert without.columns == ["query", "positive"]
        assert without.dataset.to_list() == pairs
        assert without.with_negatives == 0


def test_a_positive_of_the_same_query_is_no_negative():
    """A text that another row has as positive of the same query is left out of the negatives (T16)."""
    rows = Dataset.from_dict(
        {
            "query": ["q", "q", "other"],
            "positive": ["p1", "p2", "p3"],
            "negatives": [["p2", "n"], ["p1"], ["p1"]],
        }
    )
    found = contrastive_rows(rows, negatives=1)
    assert found.dataset[:]["negative_1"] == ["n", None, "p1"]


def test_every_text_is_hashed_by_itself():
    """The same text has the same hash in any column, whatever its neighbours; a missing one has none."""
    rows = Dataset.from_dict(
        {"query": ["q", "None", "é"], "positive": ["n1", "", "p"], "negatives": [["n1", "n2"], [], ["q", "None"]]}
    )
    found = contrastive_rows(rows, negatives=2)
    expected = [("q", "n1", None, None), ("None", "", None, None), ("é", "p", "q", "None")]
    assert found.hashes.dtype == np.uint64
    assert found.hashes.tolist() == [hashes_of(*row) for row in expected]


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_negatives_equal_the_plain_search(wanted):
    """Found in parts and by hashes, they are those that a dict of texts gives; hashes follow, chosen rows too."""
    draw = random.Random(wanted)
    rows = [
        {
            "query": f"q{draw.randrange(400)}",
            "positive": f"d{draw.randrange(40)}",
            "negatives": [f"d{i}" for i in draw.sample(range(40), draw.randrange(6))],
        }
        for _ in range(2_345)
    ]
    positives = defaultdict(set)
    for row in rows:
        positives[row["query"]].add(row["positive"])
    expected = []
    for row in rows:
        left = [text for text in row["negatives"] if text not in positives[row["query"]]][:wanted]
        left = left if len(left) == wanted else [None] * wanted
        expected.append((row["query"], row["positive"], *left))
    found = contrastive_rows(Dataset.from_list(rows), negatives=wanted)
    assert list(zip(*found.dataset[:].values(), strict=True)) == expected
    assert found.hashes.tolist() == [hashes_of(*row) for row in expected]
    assert found.with_negatives == sum(row[2] is not None for row in expected)
    drawn = np.array([7, 2_000, 7, 3])
    chosen = found.select(drawn)
    assert list(zip(*chosen.dataset[:].values(), strict=True)) == [expected[i] for i in drawn]
    assert chosen.hashes.tolist() == found.hashes[drawn].tolist()

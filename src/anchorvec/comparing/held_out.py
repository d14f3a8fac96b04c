"""Rows that no arm trains on, by which learning rates are chosen: a test set made of the training data."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from anchorvec.data import Pairs, contrastive_rows
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData

MOST, LEAST = 200, 10
"""Rows that are held out of all data sets together, and of each of them; a tenth of its rows at most."""


def hold_out(pairs: Mapping[str, Pairs]) -> tuple[dict[str, Pairs], list[BeirData]]:
    """The data sets `pairs` without the rows that are held out, and these as test sets of the same names.

    The rows are drawn, the same ones at every call. A row that has a query or a positive of theirs is left out as well.
    In a test set a query is answered by its positives, among those of all held-out rows and their hard negatives.
    Raises AnchorvecError for a data set with too few rows.
    """
    drawn = {name: _drawn(name, part, len(pairs)) for name, part in pairs.items()}
    hashes = {name: contrastive_rows(part.dataset, negatives=0).hashes for name, part in pairs.items()}
    texts = np.concatenate([hashes[name][rows].ravel() for name, rows in drawn.items()])
    left, tests = {}, []
    for name, part in pairs.items():
        kept = np.flatnonzero(~np.isin(hashes[name], texts).any(axis=1))
        if not len(kept):
            raise AnchorvecError(f"{name}: all rows share a text with those that are held out; write --tries 0")
        report = replace(
            part.report, rows=len(kept), fingerprint=f"{part.report.fingerprint} without {len(drawn[name])} drawn rows"
        )
        left[name] = Pairs(part.dataset.select(kept), report)
        tests.append(_test_set(name, part, drawn[name]))
    return left, tests


def _drawn(name: str, part: Pairs, sets: int) -> np.ndarray:
    rows = len(part.dataset)
    count = min(rows // 10, MOST // sets)
    if count < LEAST:
        raise AnchorvecError(
            f"{name}: of its {rows} rows {count} could be held out to choose learning rates by, too few; write "
            "--tries 0 to take the recipe's"
        )
    return np.sort(np.random.default_rng(0).choice(rows, size=count, replace=False))


def _test_set(name: str, part: Pairs, rows: np.ndarray) -> BeirData:
    """The `rows` of a data set as a collection, in which a text is there once."""
    texts: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for row in part.dataset.select(rows):
        for text in (row["positive"], *row["negatives"]):
            texts.setdefault(text, f"d{len(texts)}")
        query = queries.setdefault(row["query"], f"q{len(queries)}")
        qrels.setdefault(query, {})[texts[row["positive"]]] = 1
    corpus = {key: {"title": "", "text": text} for text, key in texts.items()}
    return BeirData(corpus, {key: text for text, key in queries.items()}, qrels, name=name)

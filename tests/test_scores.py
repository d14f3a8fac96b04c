"""Scores: what they say for others to compare with, and their table."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import (
    Interval,
    Scores,
    difference,
    paired_difference,
    scores_table,
)

ANIMALS = ["cat", "dog", "horse", "sheep", "goat", "cow", "duck", "goose"]  # each answers a query
ANIMALS += ["hen", "fox", "wolf", "bear", "deer", "mouse", "owl", "crow"]
CORPUS = {f"d{i}": {"title": name.title(), "text": f"The {name} sleeps."} for i, name in enumerate(ANIMALS)}
QUERIES = {f"q{i}": f"where does a {name} rest" for i, name in enumerate(ANIMALS[:8])}
QRELS = {f"q{i}": {f"d{i}": 1} for i in range(8)}
PROMPTS = {"query": "Find the animal of this question: ", "document": "An animal: "}


def made_up(per_item: dict[str, float], **changes: object) -> Scores:
    """Scores with these nDCG@10, and `changes` of other fields."""
    values = {
        "kind": "Retrieval",
        "main_score": 0.553,
        "metrics": {"ndcg_at_10": Interval(0.553, 0.521, 0.585)},
        "per_item": {"ndcg_at_10": per_item},
        "counts": {"queries": len(per_item), "documents": 16},
        "seed": 0,
        "fingerprint": "abc",
        "device": "cpu",
        "dtype": "float32",
        "seconds": 1.0,
    }
    return Scores(**values | changes)


def test_scores_on_the_same_data_are_compared_item_by_item() -> None:
    """The second minus the first, by the metric that is named or the kind's first."""
    first, second = made_up({"q0": 0.25, "q1": 0.5}), made_up({"q0": 0.5, "q1": 0.75})
    assert difference(first, second) == paired_difference(first.per_item["ndcg_at_10"], second.per_item["ndcg_at_10"])
    assert difference(first, second, metric="ndcg_at_10").mean == 0.25
    many = made_up({f"q{i}": i * i / 400 for i in range(20)}), made_up({f"q{i}": i / 20 for i in range(20)})
    assert difference(*many, seed=1) == paired_difference(*(scores.per_item["ndcg_at_10"] for scores in many), seed=1)
    assert difference(*many, seed=1) != difference(*many)
    with pytest.raises(AnchorvecError, match=r"no recall_at_10 .* there is ndcg_at_10"):
        difference(first, second, metric="recall_at_10")
    with pytest.raises(AnchorvecError, match="on different data"):
        difference(first, made_up({"q0": 0.5, "q1": 0.75}, fingerprint="abd"))
    with pytest.raises(AnchorvecError, match=r"no per-item metric .* scores of STS; there is none"):
        difference(*[replace(first, kind="STS", metrics={}, per_item={})] * 2)


def test_scores_table_shows_means_with_intervals() -> None:
    """A row names a system and shows its metrics with their intervals; a task without any shows its main score."""
    console = Console(width=100, file=io.StringIO())
    results = {"BM25": made_up({}), "other": made_up({}, metrics={}, main_score=0.25)}
    console.print(scores_table(results))
    headings, _, *rows = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert headings == "nDCG@10 main score"
    assert rows == ["BM25 0.553 [0.521, 0.585] 0.553", "other 0.250"]


def test_scores_are_plain_values_for_json() -> None:
    """The dictionary of a result can be written as JSON: a mean as a number, its interval beside it."""
    flat = json.loads(json.dumps(made_up({"q": 0.5}).to_dict()))
    assert (flat["ndcg_at_10"], flat["ndcg_at_10_interval"]) == (0.553, [0.521, 0.585])
    assert (flat["kind"], flat["queries"], flat["documents"]) == ("Retrieval", 1, 16)
    assert (flat["seed"], flat["fingerprint"], flat["per_item"]) == (0, "abc", {"ndcg_at_10": {"q": 0.5}})

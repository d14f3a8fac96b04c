"""Scores of embedders and BM25 on test collections, with intervals over queries."""

from anchorvec.evaluation.beir import BeirData, docstring_collection, load_beir, write_beir
from anchorvec.evaluation.evaluate import bm25_scores, check_test_data, evaluate, require_extra
from anchorvec.evaluation.scores import TaskScores, scores_table
from anchorvec.evaluation.statistics import (
    Difference,
    Interval,
    bootstrap_interval,
    paired_difference,
    student_interval,
)

__all__ = [
    "BeirData",
    "Difference",
    "Interval",
    "TaskScores",
    "bm25_scores",
    "bootstrap_interval",
    "check_test_data",
    "docstring_collection",
    "evaluate",
    "load_beir",
    "paired_difference",
    "require_extra",
    "scores_table",
    "student_interval",
    "write_beir",
]

"""Scores of embedders and BM25 on tasks, item by item, with intervals and tests over the items."""

from anchorvec.evaluation.averages import Averages, averages_tables
from anchorvec.evaluation.beir import BeirData, docstring_collection, load_beir, write_beir
from anchorvec.evaluation.comparison import Compared, Comparison
from anchorvec.evaluation.evaluate import (
    Evaluation,
    bm25_scores,
    check_test_data,
    evaluate,
    ranking_sets,
    require_extra,
)
from anchorvec.evaluation.scores import Scores, difference, scores_table
from anchorvec.evaluation.statistics import (
    Difference,
    Interval,
    bootstrap_interval,
    difference_over_seeds,
    holm,
    paired_difference,
    paired_difference_over_seeds,
    student_interval,
)
from anchorvec.evaluation.task_kind import LocalData

__all__ = [
    "Averages",
    "BeirData",
    "Compared",
    "Comparison",
    "Difference",
    "Evaluation",
    "Interval",
    "LocalData",
    "Scores",
    "averages_tables",
    "bm25_scores",
    "bootstrap_interval",
    "check_test_data",
    "difference",
    "difference_over_seeds",
    "docstring_collection",
    "evaluate",
    "holm",
    "load_beir",
    "paired_difference",
    "paired_difference_over_seeds",
    "ranking_sets",
    "require_extra",
    "scores_table",
    "student_interval",
    "write_beir",
]

"""What an evaluation gives back, and how it is shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from anchorvec.evaluation.statistics import Interval

METRICS = {"ndcg_at_10": "nDCG@10", "recall_at_10": "Recall@10", "mrr_at_10": "MRR@10"}


@dataclass(frozen=True)
class TaskScores:
    """The scores of one system on one task."""

    main_score: float
    """mteb's main score of the task; nDCG@10 for most retrieval tasks."""
    metrics: dict[str, Interval]
    """`ndcg_at_10`, `recall_at_10` and `mrr_at_10`, means over queries; empty if it is not retrieval."""
    per_query: dict[str, float]
    """Query id -> nDCG@10, for `paired_bootstrap`."""
    queries: int
    documents: int
    device: str
    dtype: str
    seconds: float
    """Wall time: encoding, search and metrics."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `ndcg_at_10` is the mean and `ndcg_at_10_interval` the two ends."""
        flat: dict[str, Any] = {"main_score": self.main_score}
        for name, interval in self.metrics.items():
            flat[name] = interval.mean
            flat[f"{name}_interval"] = [interval.low, interval.high]
        return flat | {
            "queries": self.queries,
            "documents": self.documents,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "per_query": self.per_query,
        }


def scores_table(results: Mapping[str, TaskScores], *, title: str | None = None) -> Table:
    """A row for each system or task of `results`, its three metrics as `0.553 [0.521, 0.585]`.

    A task that is not retrieval shows mteb's main score in a column of its own.
    """
    other = any(not scores.metrics for scores in results.values())
    # Without edges the three metrics and a name such as "after Stage II" fit into 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("", overflow="fold")
    for heading in [*METRICS.values(), *(["main score"] if other else [])]:
        table.add_column(heading, justify="right")
    for name, scores in results.items():
        cells = [str(scores.metrics[metric]) if scores.metrics else "" for metric in METRICS]
        table.add_row(escape(name), *cells, *([f"{scores.main_score:.3f}"] if other else []))
    return table

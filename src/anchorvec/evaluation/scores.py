"""What an evaluation gives back, how two of them are compared, and how they are shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import statistics
from anchorvec.evaluation.figures import Pair
from anchorvec.evaluation.statistics import Difference, Interval
from anchorvec.evaluation.task_kind import PerItem
from anchorvec.evaluation.tasks import headings, kind_of_mteb_type


@dataclass(frozen=True)
class Scores:
    """The scores of one system on one task, item by item, with what is needed to compare them later."""

    kind: str
    """mteb's type of the task: `Retrieval`, `STS`, ..."""
    main_score: float
    """mteb's main score of the task; nDCG@10 for most retrieval tasks."""
    metrics: Mapping[str, Interval]
    """Metric -> its value over all items with its interval: `ndcg_at_10`, `recall_at_10` and `mrr_at_10` for retrieval.

    Empty for a task that has the main score alone.
    """
    per_item: PerItem
    """The same metrics -> item id -> score. An item of retrieval is a query."""
    counts: Mapping[str, int]
    """How many items, and of what they are scored on: `{"queries": 500, "documents": 1200}`."""
    seed: int
    """Of the intervals."""
    fingerprint: str
    """A hash of what was scored on: texts and labels of a folder; name, repository and revision of a task of mteb."""
    device: str
    dtype: str
    seconds: float
    """Wall time: encoding of what is not kept from before, search and metrics; of all subsets of a task together."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What stood before each `query`, `document`, or `text` that is neither."""
    model: str = ""
    """The fingerprint of the model (`model_fingerprint`); empty for BM25."""

    sampled: int | None = None
    """How many documents were drawn beside the relevant ones; None: all documents were ranked."""
    recall: float | None = None
    """Of an approximate search: recall@10 against the exact one; None: it was exact."""

    @property
    def marks(self) -> str:
        """What makes these other scores than the usual ones, for a table; empty if nothing does."""
        marks = [f"sample: {self.sampled:,} others"] if self.sampled is not None else []
        marks += [f"usearch: recall {self.recall:.3f}"] if self.recall is not None else []
        return f" ({', '.join(marks)})" if marks else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `ndcg_at_10` is the mean and `ndcg_at_10_interval` the two ends; counts by name."""
        flat: dict[str, Any] = {"kind": self.kind, "main_score": self.main_score}
        for name, interval in self.metrics.items():
            flat[name] = interval.mean
            flat[f"{name}_interval"] = [interval.low, interval.high]
            flat[f"{name}_method"] = interval.method
        return flat | {
            **self.counts,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "device": self.device,
            "dtype": self.dtype,
            "prompts": dict(self.prompts),
            "model": self.model,
            "seconds": self.seconds,
            "sampled": self.sampled,
            "recall": self.recall,
            "per_item": {metric: dict(of_item) for metric, of_item in self.per_item.items()},
        }

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> "Scores":
        """The scores of which `flat` is the `to_dict`. Raises KeyError or TypeError where it is none."""
        names = [key.removesuffix("_interval") for key in flat if key.endswith("_interval")]
        metrics = {
            name: Interval(flat[name], *flat[f"{name}_interval"], method=flat.get(f"{name}_method", "percentile"))
            for name in names
        }
        own = {field.name: flat[field.name] for field in fields(cls) if field.name in flat}
        of_metrics = {f"{name}{end}" for name in names for end in ("", "_interval", "_method")}
        counts = {key: value for key, value in flat.items() if key not in own.keys() | of_metrics}
        return cls(**own, metrics=metrics, counts=counts)


def difference(first: Scores, second: Scores, *, metric: str | None = None, seed: int = 0) -> Difference:
    """By how much `second` is above `first`, item by item, as its kind of task says.

    - `metric`: one of `metrics`; by default the first one, nDCG@10 for retrieval.
    - `seed`: of interval and p-value.

    Raises AnchorvecError if the two were scored on different data, or have no per-item scores of the metric.
    """
    return statistics.difference([paired(first, second, metric)], seed=seed)


def paired(first: Scores, second: Scores, metric: str | None = None) -> Pair:
    """`first` and `second` item by item, for `statistics` to draw from; `metric` and errors as in `difference`."""
    if first.fingerprint != second.fingerprint:
        raise AnchorvecError("the two systems were scored on different data; score both on the same")
    metric = metric or next(iter(first.metrics), "per-item metric")
    kind = kind_of_mteb_type(first.kind)
    for scores in (first, second):
        if metric not in scores.metrics or kind is None:
            known = ", ".join(scores.metrics) or "none"
            raise AnchorvecError(f"there is no {metric} of single items in scores of {scores.kind}; there is {known}")
    assert kind is not None
    items = [{name: of_item.keys() for name, of_item in scores.per_item.items()} for scores in (first, second)]
    if items[0] != items[1]:
        raise AnchorvecError(f"scores of {first.kind} of another version, with other items; score both again")
    return kind.pair(first.per_item, second.per_item, metric)


def scores_table(results: Mapping[str, Scores], *, title: str | None = None) -> Table:
    """A row for each system or task of `results`, its metrics as `0.553 [0.521, 0.585]`, under `title`.

    A task without per-item metrics shows mteb's main score in a column of its own.
    """
    other = any(not scores.metrics for scores in results.values())
    columns = {
        metric: heading
        for metric, heading in headings().items()
        if any(metric in scores.metrics for scores in results.values())
    }
    # Without edges the three metrics and a name such as "after Stage II" fit into 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("", overflow="fold")
    for heading in [*columns.values(), *(["main score"] if other else [])]:
        table.add_column(heading, justify="right")
    for name, scores in results.items():
        cells = [str(scores.metrics[metric]) if metric in scores.metrics else "" for metric in columns]
        table.add_row(escape(name + scores.marks), *cells, *([f"{scores.main_score:.3f}"] if other else []))
    return table

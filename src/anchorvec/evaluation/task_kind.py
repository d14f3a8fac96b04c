"""What a kind of task is: how its folders are read, made into a task of mteb, and scored item by item."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anchorvec.evaluation.figures import Pair, Sample, mean_pair, mean_sample
from anchorvec.evaluation.statistics import Interval, interval

PerItem = Mapping[str, Mapping[str, float]]
"""Metric -> item id -> score of this item. What an item is depends on the kind: for retrieval it is a query."""


class LocalData(Protocol):
    """The test data of a local folder."""

    @property
    def name(self) -> str:
        """What the results call it."""

    @property
    def fingerprint(self) -> str:
        """A hash of all texts and labels, whatever the name."""


@dataclass(frozen=True)
class SubsetScores:
    """What was read back of one subset (a language, say) and split of a task."""

    split: str
    subset: str
    per_item: PerItem
    counts: Mapping[str, int]
    """How many items there were, and of what they are scored on: `{"queries": 500, "documents": 1200}`."""


def means(per_item: PerItem) -> dict[str, Sample]:
    """For each metric of `per_item` its mean over items."""
    return {metric: mean_sample(list(of_item.values())) for metric, of_item in per_item.items()}


def difference_of_means(first: PerItem, second: PerItem, metric: str) -> Pair:
    """The mean difference of `metric` over the items that `first` and `second` both have."""
    return mean_pair(first[metric], second[metric])


def nothing_of(data: LocalData) -> frozenset[str]:
    """Of `data` of a kind that ranks nothing: no ids."""
    return frozenset()


@dataclass(frozen=True)
class TaskKind:
    """A kind of task. A new one is a file with such an object, and a line in `tasks.py`.

    These files need no mteb: what they give it are plain values and data sets, what they get from it is a task object.
    """

    name: str
    """mteb's type of a local task of this kind, such as `Retrieval`."""
    mteb_types: Iterable[str]
    """The types of tasks in mteb's registry that are read back in this way."""
    mteb_class: str
    """The class in `mteb.abstasks` that runs a local task."""
    main_score: str
    """Which of the scores that mteb computes is a local task's main score."""
    metrics: Mapping[str, str]
    """Per-item metrics, the one by which systems are compared first, and how a table calls each."""
    layout: str
    """The files of a local folder, for an error to name."""
    recognises: Callable[[Path], bool]
    """Whether a folder is meant to be of this kind, though it may have faults."""
    load: Callable[[Path], Any]
    """The LocalData of a folder. Raises AnchorvecError, with `file:line`, for what cannot be used."""
    data: type
    """The class of what `load` returns."""
    fill: Callable[[Any, Any], None]
    """Gives a local task of mteb, the first argument, the LocalData in place of a download."""
    record: Callable[[Any], list[SubsetScores]]
    """Called with a task before mteb runs it: the list that has the scores of each subset and split after the run."""
    samples: Callable[[PerItem], Mapping[str, Sample]] = means
    """From the per-item scores each metric as a figure over all items, which can be drawn again."""
    pair: Callable[[PerItem, PerItem, str], Pair] = difference_of_means
    """From two systems' per-item scores and a metric, by how much the second is above the first."""
    method: str = "intervals: items are drawn again; p: the two systems are exchanged item by item"
    """What intervals and p-values of this kind are over, for a table to say."""
    draw_documents: Callable[[Any, int, int], None] | None = None
    """Before a run, has a task of mteb keep its relevant documents and so many others, drawn with a seed."""
    own_documents: Callable[[Any], Collection[str]] = nothing_of
    """From the LocalData the ids of queries that are documents as well, and are left out of their own ranking."""

    def intervals(self, per_item: PerItem, seed: int) -> dict[str, Interval]:
        """Each metric of `per_item` over all items with its interval, drawn with `seed`."""
        return {metric: interval([sample], seed=seed) for metric, sample in self.samples(per_item).items()}

"""Clustering: k-means on the vectors against the labels. An item is a text, in ten samples that mteb clusters.

The score, the mean V-measure of the samples, has two sources of chance: which texts are scored, and where k-means
starts. So a text has its share in the V-measure, averaged over the samples, and each sample's V-measure is kept too.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorvec.evaluation.figures import Pair, Sample, Values, mean_pair, mean_sample
from anchorvec.evaluation.labelled import RowsData, has_fields, predictions, read_rows, set_name
from anchorvec.evaluation.task_kind import PerItem, SubsetScores, TaskKind

V_MEASURE, OF_SAMPLES = "v_measure", "v_measure_of_samples"
"""Of a text: its share in the V-measure. Of a sample: its V-measure."""


class GroupedTexts(RowsData):
    """Texts with the groups that they belong to: `text` and `label`."""


def recognises(path: Path) -> bool:
    """Whether the rows of the file `path` are labelled texts; those to learn from are of classification before."""
    return has_fields(path, "text", "label")


def load(path: Path) -> GroupedTexts:
    """The texts of the file `path`. Raises AnchorvecError for what cannot be used."""
    return GroupedTexts(set_name(path), read_rows(path, {"text": str, "label": str}))


def fill(task: Any, data: GroupedTexts) -> None:
    """Give `task`, an `AbsTaskClustering`, the texts `data`, of which all are used, not the 4% of mteb's default."""
    from datasets import Dataset

    task.max_fraction_of_documents_to_embed = None
    rows = [{"sentences": row["text"], "labels": row["label"]} for row in data.rows]
    task.dataset = {"test": Dataset.from_list(rows)}


class _Recorded(random.Random):
    """The generator `of` as it stands, which takes down what it draws of ranges."""

    def __init__(self, of: random.Random) -> None:
        super().__init__()
        self.setstate(of.getstate())
        self.sampled: list[list[int]] = []
        self.chosen: list[tuple[int, NDArray[np.intp]]] = []

    def sample(self, population: Any, k: int, **options: Any) -> list[Any]:
        self.sampled.append(found := super().sample(population, k, **options))
        return found

    def choices(self, population: Any, *args: Any, **options: Any) -> list[Any]:
        found = super().choices(population, *args, **options)
        self.chosen.append((len(population), np.asarray(found)))
        return found


def record(task: Any) -> list[SubsetScores]:
    """The share of each text, and the V-measure of each sample, in a list that is filled while mteb runs `task`.

    mteb writes the clusters of each sample, but not which texts are in it: these are taken down where they are drawn.
    The older class of tasks has sets of texts in place of samples; these are its items.
    """
    task.rng_state = drawn = _Recorded(task.rng_state)

    def read(written: Any, scores: Mapping[str, Any], split: str, subset: str) -> SubsetScores:
        if not isinstance(scores.get("v_measures"), Mapping):
            of_sets = scores.get("v_measures", [scores[V_MEASURE]])
            per_item: PerItem = {V_MEASURE: {f"set {i}": float(score) for i, score in enumerate(of_sets)}}
            return SubsetScores(split, subset, per_item, {"sets": len(of_sets)})
        rows = task.dataset[split] if split in task.dataset else task.dataset[subset][split]
        kept = drawn.sampled.pop(0) if drawn.sampled else range(len(rows))
        labels = {str(row): rows[task.label_column_name][row] for row in kept}
        samples = [[drawn.chosen.pop(0) for _ in of_level] for of_level in written.values()]
        return SubsetScores(split, subset, _per_item(labels, samples, list(written.values())), {"texts": len(labels)})

    return predictions(task, read)


def _per_item(
    labels: Mapping[str, Any],
    samples: Sequence[Sequence[tuple[int, NDArray[np.intp]]]],
    clusters: Sequence[Sequence[Sequence[int]]],
) -> PerItem:
    """The per-item scores of texts with `labels`, a list of them for levels.

    `samples` and `clusters` are of each level and sample: among how many texts of this level which ones were drawn, and
    the cluster of each.
    """
    shares: dict[str, float] = {}
    of_samples = []
    for level, (drawn, assigned) in enumerate(zip(samples, clusters, strict=True)):
        lists = {row: label if isinstance(label, list) else [label] for row, label in labels.items()}
        of_level = {row: label[level] if len(label) > level else None for row, label in lists.items()}
        if drawn[0][0] < len(of_level):  # mteb leaves out texts without a label at this level
            of_level = {row: label for row, label in of_level.items() if label is not None}
        numbers = np.unique([str(label) for label in of_level.values()], return_inverse=True)[1]
        found = [_sampled(numbers, which, np.asarray(of)) for (_, which), of in zip(drawn, assigned, strict=True)]
        of_samples.append([v_measure for _, v_measure in found])
        mean = np.mean([share for share, _ in found], axis=0)  # (texts of this level,)
        names = of_level if len(samples) == 1 else [f"level {level}, {row}" for row in of_level]
        shares |= {name: float(share) / numbers.size for name, share in zip(names, mean, strict=True)}
    scale = len(shares) / len(samples)  # the score is the mean of the levels, however many texts each has
    shares = {name: share * scale for name, share in shares.items()}
    return {V_MEASURE: shares, OF_SAMPLES: {str(i): float(v) for i, v in enumerate(np.mean(of_samples, axis=0))}}


def _sampled(labels: NDArray[np.intp], drawn: NDArray[np.intp], clusters: NDArray[np.intp]) -> tuple[Values, float]:
    """Of texts with `labels` (texts,), some of which were `drawn` into `clusters` (draws,): shares and V-measure.

    The mean of the shares (texts,) is the V-measure.
    """
    shares = influence(labels[drawn], clusters)
    of_text = np.bincount(drawn, shares, minlength=labels.size)
    return of_text * labels.size / drawn.size, float(shares.mean())


def influence(labels: NDArray[np.intp], clusters: NDArray[np.intp]) -> Values:
    """What each text has done to the V-measure of `clusters` against `labels`, both (texts,) whole numbers: (texts,).

    V = 2 I / (H(labels) + H(clusters)), of mutual information and entropies. Each is a mean over texts, so V can be
    expanded in them: V and the derivative of V by the weight of the text (its influence function). Their mean is V,
    and their spread is that of V when texts are drawn again, in first order (Efron and Tibshirani 1993, chapter 21).
    """
    joint = np.zeros((labels.max() + 1, clusters.max() + 1))
    np.add.at(joint, (labels, clusters), 1 / labels.size)
    of_label, of_cluster = joint.sum(axis=1)[labels], joint.sum(axis=0)[clusters]  # (texts,) each
    entropies = -np.log(of_label) - np.log(of_cluster)
    information = np.log(joint[labels, clusters]) + entropies
    both = entropies.mean()
    if both == 0:  # one label and one cluster
        return np.ones(labels.size)
    v_measure = 2 * information.mean() / both
    found: Values = v_measure + (2 * (information - information.mean()) - v_measure * (entropies - both)) / both
    return found


def samples(per_item: PerItem) -> dict[str, Sample]:
    """The V-measure over texts and samples, of `per_item`."""
    of_samples = per_item.get(OF_SAMPLES)
    seeds = None if of_samples is None else list(of_samples.values())
    return {V_MEASURE: mean_sample(list(per_item[V_MEASURE].values()), seeds)}


def pair(first: PerItem, second: PerItem, metric: str) -> Pair:
    """By how much the V-measure of `second` is above that of `first`, over texts and samples; `metric` is V-measure."""
    seeds = None
    if OF_SAMPLES in first:
        one, two = first[OF_SAMPLES], second[OF_SAMPLES]
        seeds = [two[sample] - one[sample] for sample in one]
    return mean_pair(first[metric], second[metric], seeds)


CLUSTERING = TaskKind(
    name="Clustering",
    mteb_types=("Clustering",),
    mteb_class="AbsTaskClustering",
    main_score=V_MEASURE,
    metrics={V_MEASURE: "V-measure"},
    layout="NAME.jsonl with text and label",
    recognises=recognises,
    load=load,
    data=GroupedTexts,
    fill=fill,
    record=record,
    samples=samples,
    pair=pair,
    method="intervals and p: Student's over texts and over the seeds of the samples, whose variances are added",
)

"""Clustering: k-means on the vectors against the labels. An item is one of ten samples of texts, drawn with a seed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchorvec.evaluation.labelled import RowsData, has_fields, predictions, read_rows, set_name
from anchorvec.evaluation.task_kind import SubsetScores, TaskKind


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


def record(task: Any) -> list[SubsetScores]:
    """The V-measure of each sample, in a list that is filled while mteb runs `task`."""

    def read(written: Any, scores: Mapping[str, Any], split: str, subset: str) -> SubsetScores:
        if not isinstance(scores["v_measures"], Mapping):  # tasks of mteb's older class have sets in place of samples
            of_set = {f"set {i}": float(score) for i, score in enumerate(scores["v_measures"])}
            return SubsetScores(split, subset, {"v_measure": of_set}, {"sets": len(of_set)})
        rows = task.dataset[split] if split in task.dataset else task.dataset[subset][split]
        of_sample = {
            f"{level}, sample {i}": float(score)
            for level, found in scores["v_measures"].items()
            for i, score in enumerate(found)
        }
        return SubsetScores(split, subset, {"v_measure": of_sample}, {"texts": len(rows)})

    return predictions(task, read)


CLUSTERING = TaskKind(
    name="Clustering",
    mteb_types=("Clustering",),
    mteb_class="AbsTaskClustering",
    main_score="v_measure",
    metrics={"v_measure": "V-measure"},
    layout="NAME.jsonl with text and label",
    recognises=recognises,
    load=load,
    data=GroupedTexts,
    fill=fill,
    record=record,
)

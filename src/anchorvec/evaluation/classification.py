"""Classification: a linear classifier on the vectors. An item is a text; its score the share of trials it was right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.labelled import RowsData, has_fields, predictions, read_rows, set_name, splits_of
from anchorvec.evaluation.task_kind import SubsetScores, TaskKind


class LabelledTexts(RowsData):
    """Texts with labels, `text` and `label`, for training and for the test."""


def recognises(path: Path) -> bool:
    """Whether the rows of the file `path` are labelled texts with a part to learn from."""
    return has_fields(path, "text", "label") and "train" in splits_of(path)


def load(path: Path) -> LabelledTexts:
    """The labelled texts of the file `path`. Raises AnchorvecError for what cannot be used."""
    fields = {"text": str, "label": str}
    test, train = read_rows(path, fields, "test"), read_rows(path, fields, "train")
    if unknown := {row["label"] for row in test} - {row["label"] for row in train}:
        raise AnchorvecError(f"{path}: no row of the split train has the label {min(unknown)!r}, which is in test")
    return LabelledTexts(set_name(path), test, tuple(train))


def fill(task: Any, data: LabelledTexts) -> None:
    """Give `task`, an `AbsTaskClassification`, the texts `data`; labels become numbers, in the order of their names."""
    from datasets import Dataset, DatasetDict

    numbers = {label: i for i, label in enumerate(sorted({row["label"] for row in data.train}))}

    def numbered(rows: Sequence[dict[str, Any]]) -> Dataset:
        return Dataset.from_list([{"text": row["text"], "label": numbers[row["label"]]} for row in rows])

    task.dataset = DatasetDict({"train": numbered(data.train), "test": numbered(data.rows)})


def record(task: Any) -> list[SubsetScores]:
    """In which share of the trials each text was right, in a list that is filled while mteb runs `task`."""

    def read(written: Sequence[Sequence[Any]], scores: Any, split: str, subset: str) -> SubsetScores:
        rows = task.dataset[split] if split in task.dataset else task.dataset[subset][split]
        labels = rows[task.label_column_name]
        right = [sum(predicted[i] == label for predicted in written) / len(written) for i, label in enumerate(labels)]
        per_item = {"accuracy": {str(i): share for i, share in enumerate(right)}}
        return SubsetScores(split, subset, per_item, {"texts": len(labels), "labels": len(set(labels))})

    return predictions(task, read)


CLASSIFICATION = TaskKind(
    name="Classification",
    mteb_types=("Classification",),
    mteb_class="AbsTaskClassification",
    main_score="accuracy",
    metrics={"accuracy": "accuracy"},
    layout="NAME.jsonl with text, label and split (train, test)",
    recognises=recognises,
    load=load,
    data=LabelledTexts,
    fill=fill,
    record=record,
    method="intervals: test texts are drawn again, each with its share of right answers; p: the two models are "
    "exchanged text by text",
)

"""STS: how alike two sentences are, against what people said. An item is a pair, the score Spearman's correlation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchorvec.evaluation.figures import Pair, Sample, correlation_pair, correlation_sample
from anchorvec.evaluation.labelled import RowsData, has_fields, predictions, read_rows, set_name
from anchorvec.evaluation.task_kind import PerItem, SubsetScores, TaskKind

SIMILARITY, SCORE = "similarity", "score"
"""Of an item: the cosine of its vectors, and what people said."""


class ScoredPairs(RowsData):
    """Sentence pairs: `sentence1`, `sentence2`, `score`."""


def recognises(path: Path) -> bool:
    """Whether the rows of the file `path` are scored pairs of sentences."""
    return has_fields(path, "sentence1", "sentence2", "score")


def load(path: Path) -> ScoredPairs:
    """The pairs of the file `path`. Raises AnchorvecError for what cannot be used."""
    return ScoredPairs(set_name(path), read_rows(path, {"sentence1": str, "sentence2": str, "score": float}))


def fill(task: Any, data: ScoredPairs) -> None:
    """Give `task`, an `AbsTaskSTS`, the pairs `data`; their scores may have any range."""
    from datasets import Dataset

    scores = [row["score"] for row in data.rows]
    task.min_score, task.max_score = min(scores), max(*scores, min(scores) + 1)
    task.dataset = {"test": Dataset.from_list(data.rows)}


def record(task: Any) -> list[SubsetScores]:
    """Cosine and score of each pair, in a list that is filled while mteb runs `task`."""

    def read(written: Mapping[str, Any], scores: Any, split: str, subset: str) -> SubsetScores:
        rows = task.dataset[split] if split in task.dataset else task.dataset[subset][split]
        per_item = {
            SIMILARITY: {str(i): float(cosine) for i, cosine in enumerate(written["cosine_scores"])},
            SCORE: {str(i): float(score) for i, score in enumerate(rows["score"])},
        }
        return SubsetScores(split, subset, per_item, {"pairs": len(rows)})

    return predictions(task, read)


def samples(per_item: PerItem) -> dict[str, Sample]:
    """Spearman's correlation over the pairs of `per_item`."""
    return {"cosine_spearman": correlation_sample(per_item[SIMILARITY], per_item[SCORE])}


def pair(first: PerItem, second: PerItem, metric: str) -> Pair:
    """By how much the correlation of `second` is above that of `first`; `metric` is that one."""
    return correlation_pair(first[SIMILARITY], second[SIMILARITY], first[SCORE])


STS = TaskKind(
    name="STS",
    mteb_types=("STS",),
    mteb_class="AbsTaskSTS",
    main_score="cosine_spearman",
    metrics={"cosine_spearman": "Spearman"},
    layout="NAME.jsonl with sentence1, sentence2 and score",
    recognises=recognises,
    load=load,
    data=ScoredPairs,
    fill=fill,
    record=record,
    samples=samples,
    pair=pair,
    method="intervals: pairs are drawn again, and the correlation computed of each draw; p: the ranks of the two "
    "models' similarities are exchanged pair by pair",
)

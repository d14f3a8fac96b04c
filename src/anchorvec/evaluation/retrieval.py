"""Retrieval: documents are ranked for each query. Folders are in BEIR layout; an item is a query.

Metrics are mteb's and pytrec_eval's.
"""

import random
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from anchorvec.evaluation.beir import BeirData, load_beir
from anchorvec.evaluation.task_kind import SubsetScores, TaskKind


def recognises(folder: Path) -> bool:
    """Whether `folder` has any of the files of the BEIR layout, plain or gzipped."""
    files = [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv"]
    return any(file.is_file() or file.with_name(f"{file.name}.gz").is_file() for file in files)


def fill(task: Any, data: BeirData) -> None:
    """Give `task`, an `AbsTaskRetrieval` of one split and subset, the collection `data`."""
    from datasets import Dataset

    task.dataset = {
        "default": {
            "test": {
                "corpus": Dataset.from_list([{"id": document, **fields} for document, fields in data.corpus.items()]),
                "queries": Dataset.from_list([{"id": query, "text": text} for query, text in data.queries.items()]),
                "relevant_docs": {query: dict(grades) for query, grades in data.qrels.items()},
                "top_ranked": None,
            }
        }
    }


def record(task: Any) -> list[SubsetScores]:
    """nDCG@10, recall@10 and MRR@10 of each query, in a list that is filled while mteb runs `task`."""
    return record_of_queries(task, {"ndcg_at_10": "ndcg_cut_10", "recall_at_10": "recall_10"})


def record_of_queries(task: Any, measures: Mapping[str, str]) -> list[SubsetScores]:
    """`measures` (metric -> pytrec_eval's name) and MRR@10 of each query, in a list that is filled while `task` runs.

    mteb hands what pytrec_eval says of each query, and the ranking, to a hook for scores of a task's own,
    `task_specific_scores`; in this one object the hook is replaced by one that also takes them down. The documented
    way, `prediction_folder`, would write all rankings to a file: for every subset anew, and before a task has left out
    what it does not count.
    """
    found: list[SubsetScores] = []
    own_hook = task.task_specific_scores

    def task_specific_scores(
        scores: Mapping[str, Mapping[str, float]],
        qrels: dict[str, dict[str, int]],
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> Any:
        import pytrec_eval

        # mteb keeps the mean of MRR@10 only; of one query it is pytrec_eval's reciprocal rank, if >= 1/10.
        reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(results)
        ranks = {query: score["recip_rank"] for query, score in reciprocal.items()}
        per_item = {
            **{metric: {query: of[measure] for query, of in scores.items()} for metric, measure in measures.items()},
            "mrr_at_10": {query: rank if rank >= 0.1 else 0.0 for query, rank in ranks.items()},
        }
        counts = {"queries": len(scores), "documents": len(task.dataset[hf_subset][hf_split]["corpus"])}
        found.append(SubsetScores(hf_split, hf_subset, per_item, counts))
        return own_hook(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

    task.task_specific_scores = task_specific_scores
    return found


def draw_documents(task: Any, others: int, seed: int) -> None:
    """Have `task` rank the relevant documents alone with `others` that are drawn with `seed`, of each split and subset.

    Where candidates are given for each query, all of them stay. mteb brings older data into the present form directly
    before it runs a split, which is the last place for it.
    """
    own = task.convert_v1_dataset_format_to_v2

    def convert_v1_dataset_format_to_v2(*args: Any, **options: Any) -> None:
        own(*args, **options)
        for part in (part for of_splits in task.dataset.values() for part in of_splits.values()):
            if part["top_ranked"] is None:
                part["corpus"] = _sample_of(part, others, seed)  # of what is a sample already, all of it

    task.convert_v1_dataset_format_to_v2 = convert_v1_dataset_format_to_v2
    if task.data_loaded:
        task.convert_v1_dataset_format_to_v2(num_proc=None)


def _sample_of(part: Mapping[str, Any], others: int, seed: int) -> Any:
    relevant = {key for grades in part["relevant_docs"].values() for key, grade in grades.items() if grade > 0}
    rows = {key: i for i, key in enumerate(part["corpus"]["id"])}
    rest = sorted(rows.keys() - relevant)
    drawn = random.Random(seed).sample(rest, min(others, len(rest)))
    return part["corpus"].select(sorted(rows[key] for key in [*(relevant & rows.keys()), *drawn]))


RETRIEVAL = TaskKind(
    name="Retrieval",
    mteb_types=("Retrieval", "InstructionRetrieval", "Any2AnyRetrieval"),
    mteb_class="AbsTaskRetrieval",
    main_score="ndcg_at_10",
    metrics={"ndcg_at_10": "nDCG@10", "recall_at_10": "Recall@10", "mrr_at_10": "MRR@10"},
    layout="corpus.jsonl, queries.jsonl and qrels/test.tsv (BEIR layout)",
    recognises=recognises,
    load=load_beir,
    data=BeirData,
    fill=fill,
    own_documents=attrgetter("own_documents"),
    record=record,
    method="intervals: queries are drawn again; p: the two models are exchanged query by query",
    draw_documents=draw_documents,
)

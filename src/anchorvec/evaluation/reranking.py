"""Re-ranking: for each query its own candidates are ranked. An item is a query; the score is mean average precision."""

from pathlib import Path
from typing import Any

from anchorvec.evaluation.labelled import RowsData, has_fields, read_rows, set_name
from anchorvec.evaluation.retrieval import record_of_queries
from anchorvec.evaluation.task_kind import SubsetScores, TaskKind


class Candidates(RowsData):
    """Queries with their candidates: `query`, `positive` and `negative`, lists of texts."""


def recognises(path: Path) -> bool:
    """Whether the rows of the file `path` are queries with candidates."""
    return has_fields(path, "query", "positive", "negative")


def load(path: Path) -> Candidates:
    """The queries of the file `path`. Raises AnchorvecError for what cannot be used."""
    return Candidates(set_name(path), read_rows(path, {"query": str, "positive": list, "negative": list}))


def fill(task: Any, data: Candidates) -> None:
    """Give `task`, an `AbsTaskRetrieval` of one split and subset, the queries and candidates of `data`."""
    from datasets import Dataset

    corpus, queries, relevant, candidates = [], [], {}, {}
    for i, row in enumerate(data.rows):
        query = f"query {i}"
        queries.append({"id": query, "text": row["query"]})
        ids = [f"{query}, candidate {j}" for j in range(len(row["positive"]) + len(row["negative"]))]
        texts = [*row["positive"], *row["negative"]]
        corpus += [{"id": key, "title": "", "text": text} for key, text in zip(ids, texts, strict=True)]
        relevant[query] = dict.fromkeys(ids[: len(row["positive"])], 1)
        candidates[query] = ids
    part = {
        "corpus": Dataset.from_list(corpus),
        "queries": Dataset.from_list(queries),
        "relevant_docs": relevant,
        "top_ranked": candidates,
    }
    task.dataset = {"default": {"test": part}}


def record(task: Any) -> list[SubsetScores]:
    """Average precision, nDCG@10 and MRR@10 of each query, in a list that is filled while mteb runs `task`."""
    return record_of_queries(task, {"map": "map_cut_1000", "ndcg_at_10": "ndcg_cut_10"})


RERANKING = TaskKind(
    name="Reranking",
    mteb_types=("Reranking", "InstructionReranking"),
    mteb_class="AbsTaskRetrieval",
    main_score="map_at_1000",
    metrics={"map": "MAP", "ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10"},
    layout="NAME.jsonl with query, positive and negative (lists)",
    recognises=recognises,
    load=load,
    data=Candidates,
    fill=fill,
    record=record,
    method="intervals: queries are drawn again; p: the two models are exchanged query by query",
)

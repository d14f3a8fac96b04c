"""The only module that imports mteb: what mteb is given to run, and what is read back from it.

Metrics are mteb's. It hands the ranking and pytrec_eval's scores of each query to a task's own hook,
`task_specific_scores`; that is where the scores of single queries are taken from.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import bm25s
import mteb
import pytrec_eval
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.beir import BeirData, document_text


@dataclass(frozen=True)
class Ranking:
    """How well one subset of one retrieval task was ranked: three metrics of each query."""

    split: str
    subset: str
    documents: int
    ndcg_at_10: dict[str, float]
    recall_at_10: dict[str, float]
    mrr_at_10: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """What mteb says of one task; there is no ranking where the task is not retrieval."""

    main_score: float
    rankings: list[Ranking]


def run(model: Any, task: Any, *, batch_size: int = 32, show_progress_bar: bool = False) -> Outcome:
    """Score `model` (an encoder or a searcher in mteb's sense) on `task`; nothing is cached."""
    rankings: list[Ranking] = []
    if isinstance(task, AbsTaskRetrieval):
        _record_rankings(task, rankings)
    with _quiet_datasets():
        result = mteb.evaluate(
            model,
            task,
            cache=None,
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress_bar},
            show_progress_bar=show_progress_bar,
        )
    return Outcome(float(result.task_results[0].get_score()), rankings)


def named_task(name: str) -> Any:
    """The task of this name in mteb's registry."""
    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise AnchorvecError(f"mteb has no task {name!r} ({error.args[0].removeprefix('KeyError: ')})") from error


def encoder(model: SentenceTransformer, instruction: str | None) -> Any:
    """`model` as mteb calls it, with the model's own prompts for queries and documents.

    mteb drops each stored prompt whose key is neither a task in its registry nor a task or prompt type. Here
    all are kept, so that a prompt stored as `NAME-query` reaches the local folder NAME as well.
    `instruction` stands in for every query prompt.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the prompts that are put back below
        wrapped = SentenceTransformerEncoderWrapper(model)
    wrapped.model_prompts = {name: prompt for name, prompt in model.prompts.items() if prompt is not None}
    if instruction is not None:
        wrapped.model_prompts = {"document": wrapped.model_prompts.get("document", ""), "query": instruction}
    return wrapped


class BeirTask(AbsTaskRetrieval):  # type: ignore[misc]
    """A local test collection as a retrieval task."""

    def __init__(self, data: BeirData) -> None:
        self.metadata = TaskMetadata(
            name=data.name,
            description="A test collection in BEIR layout.",
            dataset={"path": data.name, "revision": "local"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],  # mteb wants one; it changes no score
            main_score="ndcg_at_10",
        )
        super().__init__()
        corpus = [{"id": document, **fields} for document, fields in data.corpus.items()]
        queries = [{"id": query, "text": text} for query, text in data.queries.items()]
        self.dataset = {
            "default": {
                "test": {
                    "corpus": Dataset.from_list(corpus),
                    "queries": Dataset.from_list(queries),
                    "relevant_docs": {query: dict(grades) for query, grades in data.qrels.items()},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


class Bm25:
    """BM25 as a searcher in mteb's sense."""

    mteb_model_meta = ModelMeta.create_empty()

    def index(self, corpus: Dataset, **_: Any) -> None:
        """Count the words of each document."""
        self._documents = list(corpus["id"])
        self._bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self._bm25.index(_words([document_text(row) for row in corpus]), show_progress=False)

    def search(self, queries: Dataset, *, top_k: int, **_: Any) -> dict[str, dict[str, float]]:
        """Query id -> document id -> score of the best `top_k` documents that share a word with the query."""
        found, scores = self._bm25.retrieve(
            _words(list(queries["text"])), k=min(top_k, len(self._documents)), show_progress=False
        )  # (queries, k) each
        return {
            query: {self._documents[i]: float(score) for i, score in zip(row, row_scores, strict=True) if score > 0}
            for query, row, row_scores in zip(queries["id"], found, scores, strict=True)
        }


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No bars for the copying of rows that mteb does before it encodes."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _words(texts: list[str]) -> Any:
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)


def _record_rankings(task: Any, rankings: list[Ranking]) -> None:
    """Have `task` add a Ranking for each subset and split that it scores."""
    compute = task.task_specific_scores

    def task_specific_scores(
        scores: Mapping[str, Mapping[str, float]],
        qrels: dict[str, dict[str, int]],
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> Any:
        # mteb keeps the mean of MRR@10 only; of one query it is pytrec_eval's reciprocal rank, if >= 1/10.
        reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(results)
        rankings.append(
            Ranking(
                split=hf_split,
                subset=hf_subset,
                documents=len(task.dataset[hf_subset][hf_split]["corpus"]),
                ndcg_at_10={query: score["ndcg_cut_10"] for query, score in scores.items()},
                recall_at_10={query: score["recall_10"] for query, score in scores.items()},
                mrr_at_10={
                    query: score["recip_rank"] if score["recip_rank"] >= 0.1 else 0.0
                    for query, score in reciprocal.items()
                },
            )
        )
        return compute(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

    task.task_specific_scores = task_specific_scores

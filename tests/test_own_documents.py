"""Queries that are documents as well: who leaves them out of their own ranking, and who does not."""

import warnings
from dataclasses import replace
from pathlib import Path

import mteb
import pytest
import pytrec_eval
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from anchorvec.evaluation import BeirData, bm25_scores, check_test_data, evaluate, write_beir
from anchorvec.evaluation.bm25 import Bm25
from anchorvec.evaluation.retrieval import RETRIEVAL
from anchorvec.model.embedder import build_embedder

THINGS = ["tea", "iron", "maps", "bees", "rain", "ink", "salt", "rope", "wax", "oil", "tin", "silk"]
TEXTS = [f"Of {thing} it is said, in note {i}, that it keeps {7 * i} days." for i, thing in enumerate(THINGS)]
PLAIN = {f"n{i}": {"title": "", "text": text} for i, text in enumerate(TEXTS)}
TITLED = {f"n{i}": {"title": text[:2], "text": f"\n {text[2:]}  "} for i, text in enumerate(TEXTS)}
QUERIES = {f"n{i}": TEXTS[i] for i in range(4)}
QRELS = {f"n{i}": {f"n{i + 4}": 1, f"n{11 - i}": 2} for i in range(4)}
IN_THE_CORPUS = BeirData(PLAIN, QUERIES, QRELS, name="notes")
NUMBERED = BeirData(  # each numbered from 0 on its own
    {str(i): fields for i, fields in enumerate(PLAIN.values())},
    {str(i): f"what is said of {thing}?" for i, thing in enumerate(THINGS[::-1])},
    {str(i): {str(11 - i): 1} for i in range(12)},
    name="numbered",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """A random embedder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return SentenceTransformer(str(build_embedder("tiny", folder, max_tokens=96)), device="cpu")


def expected(rankings: dict[str, dict[str, float]], data: BeirData, left_out: set[str]) -> dict[str, float]:
    """nDCG@10 of each query by pytrec_eval, whose ranking has no document of its own id where it is `left_out`."""
    kept = {
        query: {document: score for document, score in ranking.items() if document != query or query not in left_out}
        for query, ranking in rankings.items()
    }
    scores = pytrec_eval.RelevanceEvaluator(data.qrels, {"ndcg_cut.10"}).evaluate(kept)
    return {query: of_query["ndcg_cut_10"] for query, of_query in scores.items()}


def rankings(model: SentenceTransformer, data: BeirData) -> dict[str, dict[str, float]]:
    """All documents of each query with their similarities, from plain `encode` calls."""
    documents = model.encode([f"{fields['title']} {fields['text']}".strip() for fields in data.corpus.values()])
    similarity = model.similarity(model.encode(list(data.queries.values())), documents)  # (queries, documents)
    return {
        query: dict(zip(data.corpus, row, strict=True))
        for query, row in zip(data.queries, similarity.tolist(), strict=True)
    }


@pytest.mark.parametrize(
    ("data", "left_out"),
    [
        (IN_THE_CORPUS, set(QUERIES)),
        (replace(IN_THE_CORPUS, corpus=TITLED), set(QUERIES)),
        (replace(IN_THE_CORPUS, queries=QUERIES | {"n1": "a query of its own", "n2": TEXTS[7]}), {"n0", "n3"}),
        (replace(IN_THE_CORPUS, corpus=PLAIN | {"n3": {"title": "More", "text": TEXTS[3]}}), {"n0", "n1", "n2"}),
        (NUMBERED, set()),
    ],
    ids=["all", "by title and text", "some", "a title more", "independent numbers"],
)
def test_a_query_that_is_a_document_by_id_and_text_does_not_find_itself(
    model: SentenceTransformer, data: BeirData, left_out: set[str]
) -> None:
    """Scores are those of the vectors without this document, and without any other one of an equal id."""
    assert data.own_documents == left_out
    ranked = rankings(model, data)
    per_query = evaluate(model, data=[data])[data.name].per_item["ndcg_at_10"]
    assert per_query == pytest.approx(expected(ranked, data, left_out))
    assert (per_query == pytest.approx(expected(ranked, data, set()))) == (not left_out)


def test_scores_of_a_folder_with_independent_numbers_are_those_of_other_names(model: SentenceTransformer) -> None:
    """A number that a query and a document share by chance changes no score, of an embedder or of BM25."""
    renamed = BeirData(
        NUMBERED.corpus,
        {f"q{query}": text for query, text in NUMBERED.queries.items()},
        {f"q{query}": grades for query, grades in NUMBERED.qrels.items()},
        name="renamed",
    )
    scores = evaluate(model, data=[NUMBERED, renamed])
    for numbered, other in [
        (scores["numbered"], scores["renamed"]),
        (bm25_scores(NUMBERED), bm25_scores(renamed)),
    ]:
        for metric, of_query in numbered.per_item.items():
            assert {f"q{query}": score for query, score in of_query.items()} == other.per_item[metric]


@pytest.mark.parametrize(
    ("queries", "left_out"),
    [(QUERIES, set(QUERIES)), (QUERIES | {"n1": "said in note 7"}, {"n0", "n2", "n3"})],
    ids=["all", "some"],
)
def test_bm25_follows_the_same_rule(queries: dict[str, str], left_out: set[str]) -> None:
    """BM25 would rank a query's own text first."""
    data = replace(IN_THE_CORPUS, queries=queries)
    searcher = Bm25()
    searcher.index(Dataset.from_list([{"id": document, **fields} for document, fields in PLAIN.items()]))
    found = searcher.search(Dataset.from_dict({"id": list(queries), "text": list(queries.values())}), top_k=12)
    assert bm25_scores(data).per_item["ndcg_at_10"] == pytest.approx(expected(found, data, left_out))
    assert expected(found, data, left_out) != pytest.approx(expected(found, data, set()))


@pytest.mark.parametrize(("name", "left_out"), [("ArguAna", True), ("SciFact", False)])
def test_a_registered_task_follows_mteb(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, name: str, left_out: bool
) -> None:
    """Mteb goes by the ids alone where a task says so (`ignore_identical_ids`), and ranks everything elsewhere."""
    from anchorvec.evaluation import _mteb

    data = replace(IN_THE_CORPUS, queries=QUERIES | {"n1": "a text of its own"})
    kind = type(mteb.get_task(name))
    monkeypatch.setattr(kind, "data_loaded", True)  # in place of a download
    monkeypatch.setattr(kind, "dataset", _mteb.local_task(RETRIEVAL, data).dataset)
    per_query = evaluate(model, tasks=[name])[name].per_item["ndcg_at_10"]
    assert per_query == pytest.approx(expected(rankings(model, data), data, set(QUERIES) if left_out else set()))


def test_reading_a_folder_says_once_how_many_queries_are_documents(tmp_path: Path, model: SentenceTransformer) -> None:
    """One line with the number; none for a folder where only numbers are equal, and none for what was read already."""
    write_beir(IN_THE_CORPUS, tmp_path / "notes")
    write_beir(NUMBERED, tmp_path / "numbered")
    with pytest.warns(UserWarning, match="^notes: .*: 4; each is left out of its own ranking$") as said:
        data = check_test_data(data=[tmp_path / "notes", tmp_path / "numbered"])
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(model, data=data)
        bm25_scores(data[0])

"""Five kinds of test sets: each is told by its files, run by mteb, and scored item by item."""

import gzip
import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import check_test_data, difference, evaluate
from anchorvec.evaluation.tasks import kind_of_data, sets_in
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_model

TOPICS = ["tea", "iron", "maps"]


def rows_of(kind):
    """A small set of a kind."""
    texts = [(f"note {i} on {TOPICS[i % 3]} {'again ' * (i % 4)}", TOPICS[i % 3]) for i in range(60)]
    if kind == "sts":
        return [
            {"sentence1": a, "sentence2": b, "score": (i * 7 % 11) / 2, "split": "test" if i % 2 else "dev"}
            for i, ((a, _), (b, _)) in enumerate(zip(texts, texts[5:], strict=False))
        ]
    if kind == "classification":
        return [
            {"text": text, "label": label, "split": "test" if i % 4 == 0 else "train"}
            for i, (text, label) in enumerate(texts)
        ]
    if kind == "clustering":
        return [{"text": text, "label": label} for text, label in texts]
    return [
        {"query": f"which {topic} {i}?", "positive": [texts[i][0]], "negative": [texts[i + j][0] for j in (1, 2, 4)]}
        for i, topic in enumerate(TOPICS * 3)
    ]


KINDS = {"sts": "STS", "classification": "Classification", "clustering": "Clustering", "reranking": "Reranking"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a set of each kind, some gzipped, and what is none."""
    folder = tmp_path_factory.mktemp("sets")
    for i, kind in enumerate(KINDS):
        content = "".join(json.dumps(row) + "\n" for row in rows_of(kind)).encode()
        file = folder / f"{kind}.jsonl{'.gz' * (i % 2)}"
        file.write_bytes(gzip.compress(content) if i % 2 else content)
    (folder / "retrieval" / "qrels").mkdir(parents=True)
    for name, text in (("corpus", "tea"), ("queries", "which tea?")):
        (folder / "retrieval" / f"{name}.jsonl").write_text(json.dumps({"_id": name, "text": text}) + "\n")
    judgement = "query-id\tcorpus-id\tscore\nqueries\tcorpus\t1\n"
    (folder / "retrieval" / "qrels" / "test.tsv").write_text(judgement)
    (folder / "notes.md").write_text("no test set")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny embedder."""
    folder = build_embedder("tiny", tmp_path_factory.mktemp("model") / "model", max_tokens=64)
    return load_model(folder)


@pytest.fixture(scope="module")
def scores(model, folder):
    """Of the model on all sets of the folder."""
    return evaluate(model, data=[folder])


def test_a_folder_of_sets_is_all_of_them(folder, capsys):
    """Each by its kind; a line names what is none."""
    sets = sets_in(folder)
    assert "notes.md" in capsys.readouterr().err
    kinds = {data.name: kind_of_data(data).name for data in check_test_data(data=[folder])}
    assert kinds == {**KINDS, "retrieval": "Retrieval"}
    assert len(sets) == 5
    assert sets_in(folder / "sts.jsonl") == [folder / "sts.jsonl"]


def test_each_set_has_the_main_score_of_its_kind(scores):
    """Its mean over items, which comparisons go by, is mteb's own score of the task."""
    assert {name: of.kind for name, of in scores.items()} == {**KINDS, "retrieval": "Retrieval"}
    for name, of in scores.items():
        first = next(iter(of.metrics.values()))
        assert first.mean == pytest.approx(of.main_score, abs=1e-5), name  # mteb rounds some
        assert first.low <= first.mean <= first.high
    assert scores["sts"].counts == {"pairs": 27}  # of the split test
    assert scores["classification"].counts == {"texts": 15, "labels": 3}
    assert scores["clustering"].counts == {"texts": 60}
    assert scores["reranking"].counts["queries"] == 9


def test_sts_is_the_correlation_of_cosines(model, scores):
    """With the scores of people, over the pairs of the test split."""
    rows = [row for row in rows_of("sts") if row["split"] == "test"]
    sides = [model.encode([row[side] for row in rows]) for side in ("sentence1", "sentence2")]
    cosines = model.similarity_pairwise(*sides)
    assert scores["sts"].main_score == pytest.approx(spearmanr(cosines, [row["score"] for row in rows])[0], abs=1e-6)


def test_reranking_is_average_precision_over_a_querys_own_candidates(model, scores):
    """The mean over queries."""
    expected = []
    for row in rows_of("reranking"):
        texts = [*row["positive"], *row["negative"]]
        similarities = model.similarity(model.encode_query([row["query"]]), model.encode_document(texts))[0]
        labels = [1] * len(row["positive"]) + [0] * len(row["negative"])
        expected.append(average_precision_score(labels, similarities))
    found = [scores["reranking"].per_item["map"][f"query {i}"] for i in range(len(expected))]
    assert found == pytest.approx(expected, abs=1e-6)


def test_classification_counts_each_text(model, scores):
    """In which share of mteb's ten trials it was right; a classifier on all vectors is not far from their mean."""
    of_text = scores["classification"].per_item["accuracy"]
    assert len(of_text) == 15
    assert all(share * 10 == pytest.approx(round(share * 10)) for share in of_text.values())
    rows = rows_of("classification")
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    fitted = LogisticRegression(max_iter=100).fit(model.encode([r["text"] for r in train]), [r["label"] for r in train])
    right = fitted.score(model.encode([row["text"] for row in test]), [row["label"] for row in test])
    assert abs(np.mean(list(of_text.values())) - right) < 0.35


def test_differences_are_those_of_the_kind(scores):
    """Of a system with itself there is none, in any kind."""
    for of in scores.values():
        found = difference(of, of)
        assert (found.mean, found.low, found.high) == (0, 0, 0)
        assert found.p_value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "a",
            [{"sentence1": "a", "sentence2": "b", "score": "high"}],
            r"a\.jsonl:1: score is \"high\"; it must be a number",
        ),
        ("a", [{"query": "a", "positive": "b", "negative": ["c"]}], r"positive is \"b\"; it must be a list of texts"),
        ("a", [{"text": None, "label": "b"}], "text is null; it must be a text"),
        ("a", [{"text": "a", "label": "x", "split": s} for s in ("train", "test")][:1], "no row of the split test"),
        (
            "a",
            [{"text": "a", "label": "x", "split": "train"}, {"text": "a", "label": "y", "split": "test"}],
            "no row of the split train has the label 'y'",
        ),
        ("a", [{"title": "a"}], "there is no test data in it, which is one of: Retrieval"),
    ],
)
def test_a_set_that_cannot_be_scored_is_one_error(tmp_path, name, rows, message):
    """With its place."""
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AnchorvecError, match=message):
        check_test_data(data=[file])

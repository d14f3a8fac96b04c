"""Scores on test collections: reading them, mteb's numbers, the model's prompts, intervals, BM25."""

import json
import math
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import (
    BeirData,
    Interval,
    bm25_scores,
    bootstrap_interval,
    evaluate,
)
from anchorvec.evaluation.retrieval import RETRIEVAL
from anchorvec.evaluation.task_kind import SubsetScores, TaskKind
from anchorvec.files import read_json_lines, write_json_lines
from anchorvec.model.embedder import build_embedder
from anchorvec.terminal import Bar

ANIMALS = ["cat", "dog", "horse", "sheep", "goat", "cow", "duck", "goose"]  # each answers a query
ANIMALS += ["hen", "fox", "wolf", "bear", "deer", "mouse", "owl", "crow"]
CORPUS = {f"d{i}": {"title": name.title(), "text": f"The {name} sleeps."} for i, name in enumerate(ANIMALS)}
QUERIES = {f"q{i}": f"where does a {name} rest" for i, name in enumerate(ANIMALS[:8])}
QRELS = {f"q{i}": {f"d{i}": 1} for i in range(8)}
PROMPTS = {"query": "Find the animal of this question: ", "document": "An animal: "}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """A random embedder with stored prompts for queries and documents."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return SentenceTransformer(str(build_embedder("tiny", folder, max_tokens=96, prompts=PROMPTS)), device="cpu")


@pytest.fixture
def collection() -> BeirData:
    """Sixteen documents and eight queries, each answered by one document."""
    return BeirData(CORPUS, QUERIES, QRELS, name="animals")


def write_beir(
    folder: Path, *, corpus: str | None = None, queries: str | None = None, qrels: str | None = None
) -> Path:
    """Write the collection above in BEIR layout, with some file replaced by other text."""
    documents = "".join(json.dumps({"_id": i, **fields}) + "\n" for i, fields in CORPUS.items())
    questions = "".join(json.dumps({"_id": i, "text": text}) + "\n" for i, text in QUERIES.items())
    grades = "".join(f"{q}\t{d}\t{grade}\n" for q, row in QRELS.items() for d, grade in row.items())
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(documents if corpus is None else corpus)
    (folder / "queries.jsonl").write_text(questions if queries is None else queries)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + grades if qrels is None else qrels)
    return folder


def ndcg_by_hand(model: SentenceTransformer, query_prompt: str, document_prompt: str) -> dict[str, float]:
    """nDCG@10 of each query above, which has one relevant document, from plain `encode` calls."""
    queries = model.encode([query_prompt + text for text in QUERIES.values()], prompt="")
    texts = [f"{fields['title']} {fields['text']}" for fields in CORPUS.values()]
    documents = model.encode([document_prompt + text for text in texts], prompt="")
    similarity = model.similarity(queries, documents)  # (queries, documents)
    ranks = (similarity > similarity.diagonal()[:, None]).sum(dim=1).tolist()  # query i is answered by document i
    return {q: 1 / math.log2(rank + 2) if rank < 10 else 0.0 for q, rank in zip(QUERIES, ranks, strict=True)}


def test_evaluate_uses_the_prompts_stored_with_the_model(model: SentenceTransformer, collection: BeirData) -> None:
    """Every query's nDCG@10 is that of embeddings made with the stored prompts, and differs without them."""
    per_query = evaluate(model, data=[collection])["animals"].per_item["ndcg_at_10"]
    assert per_query == pytest.approx(ndcg_by_hand(model, PROMPTS["query"], PROMPTS["document"]))
    assert per_query != pytest.approx(ndcg_by_hand(model, "", PROMPTS["document"]))
    assert per_query != pytest.approx(ndcg_by_hand(model, PROMPTS["query"], ""))


def test_evaluate_uses_a_prompt_stored_for_the_name_of_a_folder(
    model: SentenceTransformer, collection: BeirData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt stored as NAME-query serves the folder NAME, which mteb does not know, and is not changed."""
    prompts = PROMPTS | {"animals-query": "Which animal? "}
    monkeypatch.setattr(model, "prompts", prompts)
    per_query = evaluate(model, data=[collection])["animals"].per_item["ndcg_at_10"]
    assert per_query == pytest.approx(ndcg_by_hand(model, "Which animal? ", PROMPTS["document"]))
    assert model.prompts is prompts


def test_evaluate_instruction_replaces_the_query_prompt(model: SentenceTransformer, collection: BeirData) -> None:
    """`instruction` stands before each query in place of the stored prompt; documents keep theirs."""
    per_query = evaluate(model, data=[collection], instruction="Name it: ")["animals"].per_item["ndcg_at_10"]
    assert per_query == pytest.approx(ndcg_by_hand(model, "Name it: ", PROMPTS["document"]))


def test_evaluate_describes_the_result(model: SentenceTransformer, collection: BeirData) -> None:
    """Counts, device and dtype are reported, and the mean of the queries is mteb's own score."""
    scores = evaluate(model, data=[collection], seed=3)["animals"]
    assert (scores.kind, scores.counts) == ("Retrieval", {"queries": 8, "documents": 16})
    assert (scores.device, scores.dtype, scores.seed) == ("cpu", "float32", 3)
    assert scores.seconds > 0
    mean = np.mean(list(scores.per_item["ndcg_at_10"].values()))
    assert scores.metrics["ndcg_at_10"].mean == pytest.approx(mean)
    for metric, of_query in scores.per_item.items():
        assert scores.metrics[metric] == bootstrap_interval(list(of_query.values()), seed=3)
    assert scores.main_score == pytest.approx(mean, abs=1e-5)  # mteb rounds to five digits


def test_evaluate_mean_reciprocal_rank_and_recall_are_those_of_mteb(
    model: SentenceTransformer, collection: BeirData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The means over single queries equal mteb's own MRR@10 and Recall@10."""
    from anchorvec.evaluation import _mteb

    results = []
    original = _mteb.mteb.evaluate
    monkeypatch.setattr(_mteb.mteb, "evaluate", lambda *a, **k: results.append(original(*a, **k)) or results[-1])
    metrics = evaluate(model, data=[collection])["animals"].metrics
    [scores] = results[0].task_results[0].scores["test"]
    for name in ("mrr_at_10", "recall_at_10"):
        assert metrics[name].mean == pytest.approx(scores[name], abs=1e-5)


def test_evaluate_reads_a_model_folder_without_network(
    model: SentenceTransformer,
    collection: BeirData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model's folder scores as the loaded model does, and no connection is opened, offline mode or not."""
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    opened: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: opened.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: opened.append(address))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    from_folder = evaluate(tmp_path / "model", data=[write_beir(tmp_path / "animals")])
    loaded = evaluate(model, data=[collection])["animals"]
    assert from_folder["animals"].per_item == loaded.per_item
    assert from_folder["animals"].fingerprint == loaded.fingerprint
    assert opened == []


def test_evaluate_scores_tasks_of_mteb_by_name(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retrieval task of mteb has the three metrics; any other task has mteb's main score alone."""
    import mteb

    from anchorvec.evaluation import _mteb

    rows = {"sentence1": ANIMALS, "sentence2": ANIMALS[::-1], "score": [float(i) for i in range(16)]}
    stored = {
        "BIOSSES": {"test": Dataset.from_dict(rows)},
        "SciFact": _mteb.local_task(RETRIEVAL, BeirData(CORPUS, QUERIES, QRELS)).dataset,
    }
    for name, dataset in stored.items():  # in place of a download
        kind = type(mteb.get_task(name))
        monkeypatch.setattr(kind, "data_loaded", True)
        monkeypatch.setattr(kind, "dataset", dataset)
    results = evaluate(model, tasks=["BIOSSES", "SciFact"])
    assert results["SciFact"].counts == {"queries": 8, "documents": 16}
    assert set(results["SciFact"].metrics) == {"ndcg_at_10", "recall_at_10", "mrr_at_10"}
    assert (results["BIOSSES"].kind, results["BIOSSES"].counts) == ("STS", {"pairs": len(rows["score"])})
    assert results["BIOSSES"].metrics["cosine_spearman"].mean == pytest.approx(results["BIOSSES"].main_score)
    assert -1 <= results["BIOSSES"].main_score <= 1


@dataclass(frozen=True)
class ScoredPairs:
    """Sentence pairs with a score each, as a folder of STS would hold them."""

    rows: list[dict[str, object]]
    name: str
    fingerprint: str = "of these rows"


def cosines(task: Any) -> list[SubsetScores]:
    """The cosine similarity of each pair, read from what mteb writes of a run."""
    found: list[SubsetScores] = []
    own = task.evaluate

    def evaluate(model: Any, split: str, **options: Any) -> Any:
        with TemporaryDirectory() as folder:
            scores = own(model, split, **options | {"prediction_folder": Path(folder)})
            [file] = Path(folder).iterdir()
            of_pair = json.loads(file.read_text())["default"][split]["cosine_scores"]
        per_item = {"cosine": {str(i): cosine for i, cosine in enumerate(of_pair)}}
        found.append(SubsetScores(split, "default", per_item, {"pairs": len(of_pair)}))
        return scores

    task.evaluate = evaluate
    return found


def test_another_kind_of_task_is_one_entry_of_the_table(
    model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STS, in a few lines: its folders are known from BEIR's, run by mteb, and scored pair by pair."""

    def load(folder: Path) -> ScoredPairs:
        return ScoredPairs([row for _, row in read_json_lines(folder / "pairs.jsonl")], folder.name)

    def fill(task: Any, data: ScoredPairs) -> None:
        task.dataset = {"test": Dataset.from_list(data.rows)}

    sts = TaskKind(
        name="STS",
        mteb_types=["STS"],
        mteb_class="AbsTaskSTS",
        main_score="cosine_spearman",
        metrics={"cosine": "mean cosine"},
        layout="pairs.jsonl",
        recognises=lambda folder: (folder / "pairs.jsonl").is_file(),
        load=load,
        data=ScoredPairs,
        fill=fill,
        record=cosines,
    )
    monkeypatch.setattr("anchorvec.evaluation.tasks.KINDS", [RETRIEVAL, sts])
    rows = [
        {"sentence1": a, "sentence2": b, "score": i / 4}
        for i, (a, b) in enumerate(zip(ANIMALS[3:], ANIMALS, strict=False))
    ]
    write_json_lines(tmp_path / "sentences" / "pairs.jsonl", rows)
    scores = evaluate(model, data=[write_beir(tmp_path / "animals"), tmp_path / "sentences"])
    assert list(scores["animals"].per_item) == ["ndcg_at_10", "recall_at_10", "mrr_at_10"]
    of_pairs = scores["sentences"]
    prompt = PROMPTS["query"]  # nothing else is stored for such texts
    sides = (model.encode([str(row[side]) for row in rows], prompt=prompt) for side in ("sentence1", "sentence2"))
    cosine = model.similarity_pairwise(*sides).tolist()
    assert list(of_pairs.per_item["cosine"].values()) == pytest.approx(cosine, abs=1e-5)
    assert of_pairs.main_score == pytest.approx(spearmanr(cosine, [row["score"] for row in rows])[0], abs=1e-5)
    assert of_pairs.metrics["cosine"] == bootstrap_interval(list(of_pairs.per_item["cosine"].values()))
    assert (of_pairs.kind, of_pairs.counts) == ("STS", {"pairs": len(rows)})
    with pytest.raises(AnchorvecError, match="BM25 is scored on retrieval"):
        bm25_scores(tmp_path / "sentences")


def test_a_folder_of_no_kind_is_refused(tmp_path: Path, model: SentenceTransformer) -> None:
    """The error says which files each kind has."""
    with pytest.raises(AnchorvecError, match=r"no test data in it, .*Retrieval: corpus\.jsonl, queries\.jsonl"):
        evaluate(model, data=[tmp_path])
    with pytest.raises(AnchorvecError, match="there is no such folder"):
        evaluate(model, data=[tmp_path / "none"])
    with pytest.raises(AnchorvecError, match="dict is no test data"):
        bm25_scores({"corpus": {}})


def test_a_task_of_several_subsets_has_an_entry_for_each(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own scores, counts and fingerprint; the main score is the task's."""
    import mteb

    from anchorvec.evaluation import _mteb

    one, other = (
        _mteb.local_task(RETRIEVAL, BeirData(CORPUS, queries, QRELS)).dataset["default"]["test"]
        for queries in (QUERIES, {"q1": QUERIES["q1"]})
    )
    kind = type(mteb.get_task("MultiLongDocRetrieval"))  # in place of a download
    splits, languages = kind.metadata.eval_splits, list(kind.metadata.eval_langs)
    parts = {language: {split: dict(other) for split in splits} for language in languages}
    parts[languages[0]][splits[0]] = one
    monkeypatch.setattr(kind, "data_loaded", True)
    monkeypatch.setattr(kind, "dataset", parts)
    results = evaluate(model, tasks=["MultiLongDocRetrieval"])
    names = [f"MultiLongDocRetrieval/{split}/{language}" for split in splits for language in languages]
    assert list(results) == names
    assert [scores.counts["queries"] for scores in results.values()] == [8] + [1] * (len(names) - 1)
    assert len({scores.fingerprint for scores in results.values()}) == len(names)
    assert len({scores.main_score for scores in results.values()}) == 1


def test_evaluate_leaves_the_random_state_alone(model: SentenceTransformer, collection: BeirData) -> None:
    """The random generators, which mteb seeds, go on after an evaluation as if there had been none."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    evaluate(model, data=[collection])
    assert draw() == expected


def test_evaluate_names_the_extra_that_is_missing(
    model: SentenceTransformer, collection: BeirData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without mteb or bm25s the message is the command that installs them."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for score in (lambda: evaluate(model, data=[collection]), lambda: bm25_scores(collection)):
        with pytest.raises(AnchorvecError, match=r"pip install 'anchorvec\[evaluate\]'"):
            score()


@pytest.mark.slow
def test_evaluate_writes_nothing_in_the_home_folder(tmp_path: Path) -> None:
    """A fresh process that scores a folder leaves the home folder empty."""
    home = tmp_path / "home"
    home.mkdir()
    script = "import sys; from anchorvec.evaluation import bm25_scores; bm25_scores(sys.argv[1])"
    drop = ("HF_HOME", "MTEB_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    subprocess.run(
        [sys.executable, "-c", script, str(write_beir(tmp_path / "animals"))],
        env=environment | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert list(home.rglob("*")) == []


def test_evaluate_refuses_unknown_tasks_models_and_empty_requests(tmp_path: Path) -> None:
    """A misspelt task, a missing folder and nothing to do are each answered with what to write."""
    with pytest.raises(AnchorvecError, match=r"no task, type or benchmark 'SciFac'; nearest: SciFact"):
        evaluate(tmp_path, tasks=["SciFac"])
    with pytest.raises(AnchorvecError, match="there is no such folder; name a model's folder"):
        evaluate(tmp_path / "missing", data=[write_beir(tmp_path / "animals")])
    with pytest.raises(AnchorvecError, match="nothing to score on"):
        evaluate(tmp_path)


def test_evaluate_refuses_weights_that_are_not_safetensors(
    model: SentenceTransformer, collection: BeirData, tmp_path: Path
) -> None:
    """A folder with pickled weights is not read."""
    folder = tmp_path / "pickled"
    model.save_pretrained(str(folder), create_model_card=False)
    (folder / "model.safetensors").unlink()
    torch.save(model[0].auto_model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(AnchorvecError, match="safetensors"):
        evaluate(folder, data=[collection])


def test_bm25_ranks_by_shared_words(collection: BeirData) -> None:
    """Each query shares its animal with one document alone, which BM25 ranks first."""
    scores = bm25_scores(collection)
    assert scores.per_item["ndcg_at_10"] == dict.fromkeys(QUERIES, 1.0)
    assert scores.fingerprint == bm25_scores(replace(collection, name="other")).fingerprint
    assert scores.fingerprint != bm25_scores(replace(collection, queries=QUERIES | {"q0": "a cat"})).fingerprint
    assert scores.metrics["mrr_at_10"] == Interval(1.0, 1.0, 1.0)


def test_bm25_gives_zero_to_a_query_without_a_shared_word(collection: BeirData) -> None:
    """Documents that share no word with the query are not counted as found."""
    queries = QUERIES | {"q1": "whale", "q2": "of the"}
    per_query = bm25_scores(BeirData(CORPUS, queries, QRELS)).per_item["ndcg_at_10"]
    assert per_query == {query: float(query not in {"q1", "q2"}) for query in QUERIES}


def test_bm25_finds_nothing_where_no_document_has_a_word() -> None:
    """Single characters and stop words alone are no words of BM25; the scores are 0."""
    corpus = {"d0": {"title": "", "text": "\u65e5"}, "d1": {"title": "of", "text": "the"}}
    data = BeirData(corpus, {"q0": "\u65e5", "q1": "a word"}, {"q0": {"d0": 1}, "q1": {"d1": 1}})
    assert bm25_scores(data).per_item["ndcg_at_10"] == {"q0": 0.0, "q1": 0.0}


def test_one_bar_shows_the_time_left_of_all_sets(
    model: SentenceTransformer,
    collection: BeirData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a terminal, on stderr; it comes to its end with the last text, and mteb shows none of its own."""
    done: list[Any] = []
    advance, start = Bar.advance, Bar.start
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(Bar, "advance", lambda bar, amount: (done.append(amount), advance(bar, amount)))
    monkeypatch.setattr(Bar, "start", lambda bar, name: (done.append(name), start(bar, name)))
    evaluate(model, data=[collection, replace(collection, name="again")], show_progress_bar=True)
    sizes = [
        sum(amount for amount in part) for part in (done[1 : done.index("again")], done[done.index("again") + 1 :])
    ]
    texts = [*QUERIES.values(), *(f"{fields['title']} {fields['text']}" for fields in CORPUS.values())]
    assert sizes == [sum(map(len, texts))] * 2
    out, err = capsys.readouterr()
    assert (out, "again (2 of 2)" in err, "it/s" in err) == ("", True, False)


@pytest.mark.parametrize("name", ["SciFact", "STS12", "Banking77Classification", "TwentyNewsgroupsClustering"])
def test_the_size_of_a_task_is_known_before_it_is_fetched(name: str) -> None:
    """From the statistics that mteb has of it."""
    import mteb

    from anchorvec.evaluation import _mteb

    assert _mteb.characters(mteb.get_task(name)) > 100_000

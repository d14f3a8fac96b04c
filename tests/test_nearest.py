"""The nearest vectors: all of them block by block, or most of them by usearch; samples of documents."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import LlamaConfig, LlamaForCausalLM

from anchorvec import cli
from anchorvec.commands.search import Index
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData, Scores, bm25_scores, difference, evaluate, scores_table
from anchorvec.model import nearest
from anchorvec.model.embedder import build_embedder
from anchorvec.model.nearest import ExactIndex, UsearchIndex, nearest_index, recall, scratch_array
from anchorvec.terminal import terminal
from support import make_tokenizer, register_mock_tasks

WORDS = ["cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant", "elk", "eel", "emu", "gnu"]
DATA = BeirData(
    {f"d{i}": {"title": "", "text": f"The {word} sleeps."} for i, word in enumerate(WORDS)},
    {f"q{i}": f"where is the {WORDS[i]}" for i in range(3)},
    {"q0": {"d0": 1, "d5": 0}, "q1": {"d1": 2, "d7": 1}, "q2": {"d2": 1}},
    name="animals",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """A random embedder."""
    folder = build_embedder("tiny", tmp_path_factory.mktemp("model") / "tiny", max_tokens=64)
    return SentenceTransformer(str(folder), device="cpu")


def random_vectors(rows: int, dim: int = 64) -> "np.ndarray[Any, Any]":
    return np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_exact_search_by_blocks_is_one_big_product(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, similarity: str
) -> None:
    """By every similarity that a model may have, whatever the size of a block."""
    monkeypatch.setattr(model, "similarity_fn_name", similarity)
    vectors, queries = random_vectors(1_000), torch.from_numpy(random_vectors(1_005)[1_000:])
    scores, rows = model.similarity(queries, vectors).topk(20, dim=1)
    for block in (1, 7, 300, 2_000):
        monkeypatch.setattr(nearest, "_BLOCK", block)
        found = ExactIndex(vectors, model).search(queries, 20)
        assert [[row for row, _ in hits] for hits in found] == rows.tolist()
        np.testing.assert_allclose([[score for _, score in hits] for hits in found], scores, rtol=1e-4, atol=1e-5)


def test_a_large_array_is_on_disk_and_leaves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file has no name any more, so that it goes with the process, however that ends."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small, large = scratch_array((10, 10), np.float32), scratch_array((2**13, 2**14), np.float32)
    assert (type(small), type(large)) == (np.ndarray, np.memmap)
    large[-1] = 3
    assert (large[-1] == 3).all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_usearch_finds_most_of_what_is_nearest_with_exact_scores(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, similarity: str
) -> None:
    """Its scores are the model's own similarities, and sorted by these."""
    monkeypatch.setattr(model, "similarity_fn_name", similarity)
    vectors, queries = random_vectors(2_000), torch.from_numpy(random_vectors(2_005)[2_000:])
    index, exact = UsearchIndex(vectors, model), ExactIndex(vectors, model)
    assert recall(index, exact, queries) > 0.9
    scores = model.similarity(queries, vectors)
    for query, hits in enumerate(index.search(queries, 10)):
        assert len(hits) == 10
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)
        for row, score in hits:
            assert score == pytest.approx(scores[query, row].item(), rel=1e-4, abs=1e-5)
    assert index.search(queries[:1], 5_000)[0][0][0] == exact.search(queries[:1], 1)[0][0][0]


def test_recall_counts_what_is_found_of_the_ten_nearest(model: SentenceTransformer) -> None:
    """A vector that is as near as another stands for it; a vector does not count as its own neighbour."""

    class Half(ExactIndex):
        def search(self, queries: torch.Tensor, top_k: int) -> nearest.Found:
            return [hits[::2] for hits in super().search(queries, top_k)]

    vectors = random_vectors(100)
    exact, half = ExactIndex(vectors, model), Half(vectors, model)
    queries = torch.from_numpy(vectors[:7])
    assert recall(exact, exact, queries) == recall(exact, exact, queries, own=range(7)) == 1
    assert recall(half, exact, queries) == 0.5
    assert recall(half, exact, queries, own=range(7)) == 0.5
    twice = np.concatenate([vectors, vectors])
    assert recall(ExactIndex(vectors, model), ExactIndex(vectors, model), torch.from_numpy(twice[:3])) == 1


def test_what_usearch_finds_is_said_and_it_is_taken_above_a_million(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here above ten; where it cannot be had, the search is exact, and a line says why."""
    vectors = random_vectors(200)
    assert isinstance(nearest_index(vectors, model), ExactIndex)
    monkeypatch.setattr(nearest, "EXACT_UP_TO", 10)
    assert isinstance(nearest_index(vectors, model), UsearchIndex)
    assert isinstance(nearest_index(vectors, model, "exact"), ExactIndex)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "usearch: indexing 200 vectors"
    assert second == "usearch: recall@10 is 1.000, of the neighbours of 100 of them"
    monkeypatch.setattr(model, "similarity_fn_name", "manhattan")
    assert isinstance(nearest_index(vectors, model), ExactIndex)
    assert "200 vectors are searched exactly, which takes longer (usearch does not" in capsys.readouterr().err


def test_an_index_that_cannot_be_had_is_refused_before_the_work(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without usearch, the error names what to install."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "usearch" else find(name))
    with pytest.raises(AnchorvecError, match=r"pip install 'anchorvec\[search\]'"):
        Index(model, {"a": "text"}, index="usearch")
    with pytest.raises(AnchorvecError, match=r"pip install 'anchorvec\[search\]'"):
        evaluate(model, data=[DATA], index="usearch")


def test_search_by_usearch_finds_the_same(model: SentenceTransformer, tmp_path: Path) -> None:
    """In a small corpus, by the option of the command; scores are the same."""
    documents = {f"{i}": f"{word} and {other}" for i, (word, other) in enumerate(itertools.pairwise(WORDS))}
    answers = [Index(model, documents, index=kind).search("the cow", 4) for kind in ("exact", "usearch")]
    assert [hit.id for hit in answers[0]] == [hit.id for hit in answers[1]]
    assert [hit.score for hit in answers[0]] == pytest.approx([hit.score for hit in answers[1]], abs=1e-6)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    (tmp_path / "a.txt").write_text("the cow")
    arguments = ["search", str(tmp_path / "model"), str(tmp_path / "a.txt"), "--query", "cow", "--index", "usearch"]
    cli.app(arguments, standalone_mode=False)


MILLION = """
import os, resource, sys
from pathlib import Path
import numpy as np
from sentence_transformers import SentenceTransformer
from anchorvec import Index, Passage
from anchorvec.data.passages import document_prompt
from anchorvec.model.text_encoder import TextEncoder
from anchorvec.model.vector_cache import vector_cache

resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, 4 * 2**30))  # memory of its own; not what is mapped from files
N, DIM, BLOCK = int(os.environ.get("ANCHORVEC_TEST_PASSAGES", 1_000_000)), 576, 20_000
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = [f"Passage {i} is about the things that are numbered {i % 977} and {i % 1009}." for i in range(N)]
keys = TextEncoder(model, cache=vector_cache())._keys(texts, document_prompt(model), "document")
query = model.encode_query(["which one"])[0]
query /= np.linalg.norm(query)
best = []
for start in range(0, N, BLOCK):
    vectors = np.random.default_rng(start).standard_normal((BLOCK, DIM), dtype=np.float32)
    vector_cache().keep(keys[start : start + BLOCK], vectors)
    scores = vectors @ query / np.linalg.norm(vectors, axis=1)
    best += [(float(scores[row]), texts[start + row]) for row in np.argsort(-scores)[:5]]
best = sorted(best, reverse=True)[:5]
hits = Index(model, [Passage(text) for text in texts]).search("which one")
assert [hit.text for hit in hits] == [text for _, text in best], hits
np.testing.assert_allclose([hit.score for hit in hits], [score for score, _ in best], atol=1e-5)
status = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmHWM", "RssAnon", "VmData")))
print({name: value.strip() for name, value in status.items()})
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_million_passages_are_searched_exactly_in_four_gigabytes(save_base: Any, tmp_path: Path) -> None:
    """With their texts, from kept vectors of 576 numbers to an answer; it takes some five gigabytes of disk."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=260, hidden_size=576, num_hidden_layers=1, num_attention_heads=9, eos_token_id=0)
    )
    folder = build_embedder(save_base(model, make_tokenizer()), tmp_path / "model", max_tokens=64)
    environment = os.environ | {"ANCHORVEC_CACHE": str(tmp_path / "kept"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MILLION, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "texts encoded: 0" in done.stderr


# Scores


def test_scores_by_usearch_are_marked_with_their_recall(model: SentenceTransformer) -> None:
    """In a small corpus it finds all, and the scores are those of the exact search."""
    exact, approximate = (evaluate(model, data=[DATA], index=kind)["animals"] for kind in ("exact", "usearch"))
    assert (exact.recall, approximate.recall) == (None, 1.0)
    assert approximate.per_item == exact.per_item
    assert approximate.to_dict()["recall"] == 1.0
    assert "animals (usearch: recall 1.000)" in shown({"animals": approximate})


def test_many_queries_are_scored_over_fewer_documents_at_a_time(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are the same."""
    from anchorvec.evaluation import _mteb

    asked: list[int] = []
    search = _mteb.SearchEncoderWrapper.search

    def recorded(self: Any, queries: Any, **options: Any) -> Any:
        asked.append(self.corpus_chunk_size)
        self.corpus_chunk_size = 5
        return search(self, queries, **options)

    expected = evaluate(model, data=[DATA])["animals"]
    monkeypatch.setattr(_mteb.SearchEncoderWrapper, "search", recorded)
    assert evaluate(model, data=[DATA])["animals"].per_item == expected.per_item
    assert asked == [50_000]


@pytest.mark.parametrize("others", [0, 4, 100])
def test_a_sample_has_all_relevant_documents_and_so_many_others(model: SentenceTransformer, others: int) -> None:
    """The same ones for each model and for BM25; where there are not so many, all."""
    sampled = evaluate(model, data=[DATA], sample=others)["animals"]
    assert sampled.counts == {"queries": 3, "documents": min(4 + others, 12)}
    assert bm25_scores(DATA, sample=others).fingerprint == sampled.fingerprint
    if others == 100:
        assert sampled.per_item == evaluate(model, data=[DATA])["animals"].per_item
    if others == 0:
        assert set(sampled.per_item["recall_at_10"].values()) == {1.0}


def test_a_sample_is_another_one_with_another_seed(model: SentenceTransformer) -> None:
    """And its scores can't be compared with those on other documents."""
    draws = ((3, 0), (3, 1), (4, 0), (3, 0), (None, 0))
    results = [evaluate(model, data=[DATA], sample=sample, seed=seed)["animals"] for sample, seed in draws]
    assert len({scores.fingerprint for scores in results}) == 4
    assert results[0].per_item == results[3].per_item
    with pytest.raises(AnchorvecError, match="different data"):
        difference(results[0], results[-1])


def test_sampled_scores_are_marked(model: SentenceTransformer) -> None:
    """In the table and in JSON."""
    sampled, whole = (evaluate(model, data=[DATA], sample=sample)["animals"] for sample in (3, None))
    assert (sampled.to_dict()["sampled"], whole.to_dict()["sampled"]) == (3, None)
    assert "animals (sample: 3 others)" in shown({"animals": sampled})
    assert "sample" not in shown({"animals": whole})


def test_a_task_of_mteb_is_sampled_and_others_are_named(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task's data come with its run; candidates that are given for each query all stay."""
    register_mock_tasks(monkeypatch)
    names = ["MockRetrievalTask", "MockRerankingTask", "MockSTSTask"]
    results = evaluate(model, tasks=names, sample=0, instruction="Find: ")
    assert {name.split("/")[0]: scores.sampled for name, scores in results.items()} == dict(
        zip(names, [0, None, None], strict=True)
    )
    assert "scored in whole: MockRerankingTask, MockSTSTask" in capsys.readouterr().err


def shown(results: dict[str, Scores]) -> str:
    """The table of `results`, as on a wide terminal."""
    console = terminal()
    console.width = 200
    with console.capture() as captured:
        console.print(scores_table(results))
    return captured.get()

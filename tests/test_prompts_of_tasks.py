"""Which prompt stands before which text, in every kind of task that mteb has for texts."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import evaluate
from anchorvec.model.embedder import build_embedder
from support import register_mock_tasks

KINDS = {
    "BitextMining": "MockBitextMiningTask",
    "Classification": "MockClassificationTask",
    "Clustering": "MockMultilingualClusteringFastTask",
    "InstructionReranking": "MockInstructionReranking",
    "InstructionRetrieval": "MockInstructionRetrieval",
    "MultilabelClassification": "MockMultilabelClassification",
    "PairClassification": "MockPairClassificationTask",
    "Regression": "MockRegressionTask",
    "Reranking": "MockRerankingTask",
    "Retrieval": "MockRetrievalTask",
    "STS": "MockSTSTask",
    "Summarization": "MockSummarizationTask",
}
"""mteb's type of task -> a task of it with a few rows."""
Encoded = list[tuple[str | None, list[str], np.ndarray]]
"""Of each call: query, document or neither, the texts as mteb has them, and their vectors, (texts, dim)."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """A random embedder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return SentenceTransformer(str(build_embedder("tiny", folder, max_tokens=96)), device="cpu")


@pytest.fixture
def encoded(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoded]:
    """What the model encodes in a test; mteb's small tasks are in its registry by the names of their classes."""
    calls: Encoded = []
    plain = model.encode

    def encode(inputs: list[str], **options: Any) -> Any:
        vectors = plain(inputs, **options)
        calls.append((options.get("task"), list(inputs), np.asarray(vectors)))
        return vectors

    register_mock_tasks(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(model, "encode", encode)
        yield calls


def assert_read_with(model: SentenceTransformer, encoded: Encoded, prompts: dict[str | None, str]) -> None:
    """Each text's vector is that of the prompt of its side and the text."""
    assert encoded
    calls = list(encoded)
    for side, texts, vectors in calls:
        expected = model.encode([prompts[side] + text for text in texts], prompt="")
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_instruction_acts_on_every_kind_of_task(model: SentenceTransformer, encoded: Encoded, kind: str) -> None:
    """It stands before each text but documents, so that vectors change; nothing is said of stored prompts."""
    instruction = "Say what it is: "
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the texts of these tasks")
        scores = evaluate(model, tasks=[KINDS[kind]], instruction=instruction)
    assert next(iter(scores.values())).kind == kind
    assert_read_with(model, encoded, {None: instruction, "query": instruction, "document": ""})
    _, texts, vectors = next(call for call in encoded if call[0] != "document")
    assert not np.allclose(vectors, model.encode(texts, prompt=""), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_query_prompt_acts_on_every_kind_of_task(
    model: SentenceTransformer, encoded: Encoded, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that are neither queries nor documents have it too, and a line names their tasks."""
    monkeypatch.setattr(model, "prompts", {"query": "Find: ", "document": "Text: "})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        evaluate(model, tasks=[KINDS[kind]])
    neither = any(side is None for side, _, _ in encoded)
    assert_read_with(model, encoded, {None: "Find: ", "query": "Find: ", "document": "Text: "})
    lines = [str(line.message) for line in said if "neither queries nor documents" in str(line.message)]
    assert [line.rpartition(": ")[2] for line in lines] == [KINDS[kind]] * neither


@pytest.mark.parametrize(
    ("prompts", "default", "expected", "named"),
    [
        ({"query": "Q: ", "STS": "S: "}, None, "S: ", False),
        ({"query": "Q: ", "STS": "S: ", "MockSTSTask": "M: "}, None, "M: ", False),
        ({"query": "Q: ", "STS": ""}, None, "", False),
        ({"query": "Q: ", "MockSTSTask-query": "M: "}, None, "M: ", True),
        ({"query": "Q: ", "STS-query": "S: "}, None, "S: ", True),
        ({"query": "Q: ", "own": "O: "}, "own", "O: ", False),
        ({"query": "Q: ", "own": ""}, "own", "", False),
        ({"query": "", "document": "D: "}, None, "", False),
        ({"document": "D: "}, None, "", False),
        ({}, None, "", False),
    ],
)
def test_which_stored_prompt_stands_before_a_text_that_is_no_query(
    model: SentenceTransformer,
    encoded: Encoded,
    monkeypatch: pytest.MonkeyPatch,
    prompts: dict[str, str],
    default: str | None,
    expected: str,
    named: bool,
) -> None:
    """The task's, the task type's, the model's default one, or the query's; a line where it is this and not empty."""
    monkeypatch.setattr(model, "prompts", prompts)
    monkeypatch.setattr(model, "default_prompt_name", default)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        evaluate(model, tasks=["MockSTSTask"])
    assert_read_with(model, encoded, {None: expected})
    assert any("neither queries nor documents" in str(line.message) for line in said) == named
    assert model.prompts is prompts


def test_an_instruction_leaves_documents_their_own_prompt(
    model: SentenceTransformer, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored for the task, for documents, or under another name that sentence-transformers takes for these."""
    for prompts in ({"MockRetrievalTask-document": "D: ", "document": "E: "}, {"document": "D: "}, {"passage": "D: "}):
        encoded.clear()
        monkeypatch.setattr(model, "prompts", prompts | {"query": "Q: ", "MockRetrievalTask-query": "R: "})
        evaluate(model, tasks=["MockRetrievalTask"], instruction="Instruct: ")
        assert {side for side, _, _ in encoded} == {"query", "document"}
        assert_read_with(model, encoded, {"query": "Instruct: ", "document": "D: "})


def test_a_task_made_of_others_has_the_main_score_alone(model: SentenceTransformer, encoded: Encoded) -> None:
    """Its parts are read with the instruction."""
    [scores] = evaluate(model, tasks=["MockAggregatedTask"], instruction="Say: ").values()
    assert scores.metrics == {}
    assert 0 <= scores.main_score <= 1
    assert_read_with(model, encoded, {None: "Say: ", "query": "Say: ", "document": ""})


@pytest.mark.parametrize(
    ("task", "what"), [("MockImageClassificationTask", "image"), ("MockAny2AnyRetrievalT2ITask", "image")]
)
def test_a_task_that_the_model_cannot_read_is_refused_before_the_work(
    model: SentenceTransformer, encoded: Encoded, task: str, what: str
) -> None:
    """With an instruction or without; no task is run."""
    for instruction in (None, "Say: "):
        with pytest.raises(AnchorvecError, match=f"a task with {what}, which this model cannot read"):
            evaluate(model, tasks=["MockSTSTask", task], instruction=instruction)
    assert encoded == []

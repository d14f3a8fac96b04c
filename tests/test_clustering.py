"""Clustering: the shares of texts and the V-measures of samples, which comparisons go by, are those of mteb's run."""

from dataclasses import replace

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb.abstasks import AbsTaskClustering

from anchorvec.evaluation import difference, evaluate
from anchorvec.evaluation.clustering import CLUSTERING, OF_SAMPLES, V_MEASURE, GroupedTexts
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_model
from anchorvec.model.text_encoder import TextEncoder
from support import register_mock_tasks

ROWS = [{"text": f"{'abc'[i % 3] * (3 + i % 5)} {i}", "label": "xyz"[i % 3]} for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny embedder."""
    return load_model(build_embedder("tiny", tmp_path_factory.mktemp("model") / "model", max_tokens=64))


@pytest.fixture
def of_mteb(monkeypatch):
    """What mteb computes in a test, by split and subset, in its order; its samples are of 300 draws, not of 16,384."""
    monkeypatch.setattr(AbsTaskClustering, "max_documents_per_cluster", 300)
    found, run = [], mteb.evaluate

    def recorded(*args, **options):
        result = run(*args, **options)
        found.extend(scores for of_split in result.task_results[0].scores.values() for scores in of_split)
        return result

    monkeypatch.setattr(mteb, "evaluate", recorded)
    register_mock_tasks(monkeypatch)
    return found


def leveled(task, data):
    """Fill `task` with two levels of labels, of which a third of the texts have the first alone."""
    CLUSTERING.fill(task, data)
    labels = [[i % 2, i % 5] if i % 3 else [i % 2] for i in range(len(data.rows))]
    task.dataset = {"test": Dataset.from_list([{"sentences": ROWS[i]["text"], "labels": labels[i]} for i in range(40)])}


@pytest.mark.parametrize("levels", [1, 2])
def test_shares_of_texts_and_samples_have_mtebs_mean(model, of_mteb, monkeypatch, levels):
    """With a hierarchy of labels too, in which not every text has all levels."""
    if levels == 2:
        monkeypatch.setattr("anchorvec.evaluation.tasks.KINDS", [replace(CLUSTERING, fill=leveled)])
    [scores] = evaluate(model, data=[GroupedTexts("notes", ROWS)]).values()
    v_measures = np.array(list(of_mteb[0]["v_measures"].values()))  # (levels, samples)
    assert v_measures.shape == (levels, 10)
    assert list(scores.per_item[OF_SAMPLES].values()) == pytest.approx(v_measures.mean(axis=0))
    assert np.mean(list(scores.per_item[V_MEASURE].values())) == pytest.approx(of_mteb[0]["v_measure"])
    texts = 40 if levels == 1 else 40 + sum(1 for i in range(40) if i % 3)
    assert len(scores.per_item[V_MEASURE]) == texts


def test_the_samples_are_those_that_mteb_draws(model, of_mteb):
    """Taking down the draws does not change them: mteb's own run of the same task has the same scores."""
    from anchorvec.evaluation import _mteb

    data = GroupedTexts("notes", ROWS)
    evaluate(model, data=[data])
    mteb.evaluate(
        _mteb.Encoder(TextEncoder(model), None), _mteb.local_task(CLUSTERING, data), cache=None, co2_tracker=False
    )
    assert of_mteb[0]["v_measures"] == of_mteb[1]["v_measures"]


def test_tasks_that_use_a_part_of_their_texts(model, of_mteb):
    """As mteb's own do: the texts of each subset that were drawn are the items."""
    results = evaluate(model, tasks=["MockMultilingualClusteringFastTask"])
    assert len(results) == len(of_mteb) == 2
    for scores, expected in zip(results.values(), of_mteb, strict=True):
        assert scores.metrics[V_MEASURE].mean == pytest.approx(expected["v_measure"])
        assert len(scores.per_item[V_MEASURE]) == scores.counts["texts"] == 3


def test_the_older_class_of_tasks_has_sets_of_texts(model, of_mteb):
    """Each set, which k-means clusters once, is an item; their mean is mteb's score."""
    [scores] = evaluate(model, tasks=["MockClusteringTask"]).values()
    assert list(scores.per_item[V_MEASURE].values()) == pytest.approx(list(of_mteb[0]["v_measures"]))
    assert scores.metrics[V_MEASURE].mean == pytest.approx(scores.main_score)
    assert scores.counts == {"sets": len(of_mteb[0]["v_measures"])}
    assert difference(scores, scores).p_value == 1.0


@pytest.mark.usefixtures("of_mteb")
def test_a_difference_is_over_texts_and_samples(model, tmp_path):
    """Its standard error has both parts: that between texts, and that between samples."""
    other = load_model(build_embedder("tiny", tmp_path / "other", max_tokens=64, seed=1))
    one, two = (evaluate(of, data=[GroupedTexts("notes", ROWS)])["notes"] for of in (model, other))
    found = difference(one, two)
    texts, samples = (
        np.array([two.per_item[part][item] - score for item, score in one.per_item[part].items()])
        for part in (V_MEASURE, OF_SAMPLES)
    )
    assert found.mean == pytest.approx(samples.mean()) == pytest.approx(texts.mean())
    variance = texts.var() / texts.size + samples.var(ddof=1) / samples.size
    assert found.standard_error == pytest.approx(variance**0.5, rel=0.02)
    assert (found.method, two.metrics[V_MEASURE].method) == ("Student", "Student")

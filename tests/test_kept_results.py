"""Results of mteb's tasks are kept as mteb keeps them: it reads them back, and none is run twice on the same model."""

import json
import shutil
import sys
from pathlib import Path

import datasets.config
import mteb
import pytest

from anchorvec.cli import main
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import _mteb, evaluate
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_model, name_and_revision
from support import MOCK_TASKS, register_mock_tasks

FEW = ["MockSTSTask", "MockClassificationTask", "MockRetrievalTask"]
AGGREGATE = "MockMultilingualInstructionReranking"
"""What mteb calls its small task that averages two others."""


@pytest.fixture(scope="module", autouse=True)
def mock_tasks():
    """Small tasks of every kind stand in mteb's registry."""
    with pytest.MonkeyPatch.context() as patched:
        register_mock_tasks(patched)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny embedder, `tiny/model`."""
    return build_embedder("tiny", tmp_path_factory.mktemp("runs") / "tiny" / "model", max_tokens=64)


@pytest.fixture(scope="module")
def kept(folder, tmp_path_factory):
    """The results of all small tasks, in a folder, and what `evaluate` gave."""
    results = tmp_path_factory.mktemp("kept")
    return results, evaluate(folder, tasks=MOCK_TASKS, results=results)


@pytest.fixture
def ran(monkeypatch):
    """The names of the tasks that are run in a test."""
    names = []
    run = _mteb.run

    def recorded(model, task, **options):
        names.append(task.metadata.name)
        return run(model, task, **options)

    monkeypatch.setattr(_mteb, "run", recorded)
    return names


def comparable(scores):
    """What is the same whenever it was run: main scores are rounded to six digits on disk."""
    return {
        name: (of.kind, round(of.main_score, 5), of.per_item, of.counts, of.fingerprint, of.device, of.dtype)
        for name, of in scores.items()
    }


def files_in(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MOCK_TASKS)
def test_mteb_reads_what_is_kept(folder, kept, name):
    """By its own loader, under the model's name and revision, with every number of its own run of the task."""
    task = mteb.get_task(name)
    model_name, revision = name_and_revision(folder)
    cache = mteb.ResultCache(kept[0])
    [of_model] = cache.load_results(models=[model_name], tasks=[task.metadata.name], validate_and_filter=False)
    assert (of_model.model_name, of_model.model_revision) == ("tiny/model", revision)
    [found] = of_model.task_results
    [expected] = mteb.evaluate(load_model(folder), task, cache=None, show_progress_bar=False).task_results
    assert (found.task_name, found.dataset_revision) == (expected.task_name, expected.dataset_revision)
    assert found.scores.keys() == expected.scores.keys()
    for split, of_split in expected.scores.items():
        for ours, theirs in zip(found.scores[split], of_split, strict=True):
            assert ours.keys() == theirs.keys()
            numbers = {key for key, value in theirs.items() if isinstance(value, float)}
            assert {key: ours[key] for key in numbers} == pytest.approx(
                {key: theirs[key] for key in numbers}, abs=1e-6, nan_ok=True
            )
            assert (ours["hf_subset"], ours["languages"]) == (theirs["hf_subset"], theirs["languages"])
    assert cache.load_task_result(task.metadata.name, model_name, revision).main_score == pytest.approx(
        expected.main_score, abs=1e-6
    )


def test_mteb_makes_its_table_of_them(kept, monkeypatch):
    """The columns that its leaderboard has."""
    results = mteb.ResultCache(kept[0]).load_results(tasks=[mteb.get_task(name) for name in FEW])
    table = results.to_dataframe()
    assert sorted(table["task_name"]) == sorted(FEW)
    assert "tiny/model" in table.columns


def test_nothing_is_run_or_loaded_again(folder, kept, ran, monkeypatch, capsys):
    """The scores are the same, item by item; one line names the tasks."""
    results, first = kept
    before = files_in(results)
    monkeypatch.setattr("anchorvec.model.loading.load_encoder", lambda *_: pytest.fail("the model was loaded"))
    again = evaluate(folder, tasks=MOCK_TASKS, results=results)
    assert ran == []
    assert comparable(again) == comparable(first)
    assert list(again) == list(first)
    said = [line for line in capsys.readouterr().err.splitlines() if "not run again" in line]
    assert len(said) == 1
    assert said[0].startswith(f"16 of 16 tasks have a result in {results} and are not run again: {AGGREGATE}, Mock")
    assert files_in(results) == before


def test_an_interrupted_evaluation_goes_on_with_the_next_task(folder, tmp_path, ran, monkeypatch, kept):
    """No finished task is lost or run again, a task made of others goes on within it, and no score differs."""
    names = [*FEW, "MockAggregatedTask", "MockMultilingualClusteringFastTask"]
    recorded = _mteb.run

    def stop_at_reranking(model, task, **options):
        if task.metadata.name == "MockRerankingTask":
            raise KeyboardInterrupt
        return recorded(model, task, **options)

    with monkeypatch.context() as patched:
        patched.setattr(_mteb, "run", stop_at_reranking)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder, tasks=names, results=tmp_path)
    assert ran == FEW  # the aggregate's own retrieval has a result already
    ran.clear()
    whole = evaluate(folder, tasks=names, results=tmp_path)
    assert ran == ["MockRerankingTask", "MockMultilingualClusteringFastTask"]
    expected = comparable(kept[1])
    assert comparable(whole) == {name: expected[name] for name in whole}


def test_a_file_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """A disk that is full while mteb writes leaves what was there."""
    evaluate(folder, tasks=["MockSTSTask"], results=tmp_path)
    before = {path: (tmp_path / path).read_bytes() for path in files_in(tmp_path)}
    to_disk = mteb.TaskResult.to_disk

    def half(self, path):
        to_disk(self, path)
        path.write_text(path.read_text()[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(mteb.TaskResult, "to_disk", half)
        with pytest.raises(AnchorvecError, match=r"MockClassificationTask\.json cannot be written: No space left"):
            evaluate(folder, tasks=["MockSTSTask", "MockClassificationTask"], results=tmp_path)
    results = files_in(tmp_path / "results")
    assert {path.name for path in results} == {"MockSTSTask.json", "model_meta.json", "run_settings.jsonl"}
    assert all((tmp_path / path).read_bytes() == content for path, content in before.items())
    evaluate(folder, tasks=["MockSTSTask", "MockClassificationTask"], results=tmp_path)
    settings = next((tmp_path / "results").rglob("run_settings.jsonl")).read_text().splitlines()
    assert {json.loads(line)["task"] for line in settings} == {"MockSTSTask", "MockClassificationTask"}


def test_another_model_of_the_same_name_has_results_of_its_own(tmp_path, folder, ran):
    """The revision is a hash of what the folder holds: weights, tokenizer, modules and prompts, not the model card."""
    copies = [tmp_path / str(i) / "tiny" / "model" for i in range(5)]
    for copy in copies:
        shutil.copytree(folder, copy)
    same, prompts, weights, tokenizer, pooling = copies
    (same / "README.md").write_text("another card")
    change_json(prompts / "config_sentence_transformers.json", prompts={"query": "Find: ", "document": ""})
    change_json(tokenizer / "tokenizer_config.json", model_max_length=32)
    change_json(pooling / "1_Pooling" / "config.json", include_prompt=False)
    raw = bytearray((weights / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (weights / "model.safetensors").write_bytes(raw)
    names, revisions = zip(*map(name_and_revision, copies), strict=True)
    assert set(names) == {"tiny/model"}
    assert revisions[0] == name_and_revision(folder)[1]
    assert len(set(revisions)) == 5
    for model in (folder, same, prompts):
        evaluate(model, tasks=["MockSTSTask"], results=tmp_path / "kept")
    assert ran == ["MockSTSTask"] * 2
    assert len(list((tmp_path / "kept" / "results" / "tiny__model").iterdir())) == 2


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapters_revision_is_also_that_of_its_start(run):
    """The folder of Stage II has the adapter alone."""
    name, revision = name_and_revision(run / "stage_two")
    assert name == f"{run.name}/stage_two"
    card = run / "stage_one" / "notes.txt"
    card.write_text("the start is another one")
    changed = name_and_revision(run / "stage_two")[1]
    card.unlink()
    assert changed != revision == name_and_revision(run / "stage_two")[1]


def test_a_model_of_the_hub_has_its_commit_as_revision(folder, tmp_path, monkeypatch):
    """And its id as its name."""
    commit = "b" * 40
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert name_and_revision("org/tiny") == ("org/tiny", commit)
    with pytest.raises(AnchorvecError, match="org/none"):
        name_and_revision("org/none")


def test_an_instruction_is_an_experiment_of_its_own(folder, tmp_path, ran):
    """As mteb calls what changes a model's scores and is no part of it."""
    for instruction in (None, "Say: ", "Instruct: {instruction}\nQuery: ", "Say: "):
        evaluate(folder, tasks=["MockSTSTask"], results=tmp_path, instruction=instruction)
    assert ran == ["MockSTSTask"] * 3
    cache = mteb.ResultCache(tmp_path)
    assert len(cache.load_results().model_results) == 1  # those are left out by default
    everything = cache.load_results(load_experiments="match_name").model_results
    said = {dict(of.model_meta.experiment_kwargs or {}).get("instruction") for of in everything}
    assert said == {None, "Say: ", "Instruct: {instruction}\nQuery: "}


def test_more_of_a_task_is_added_to_what_is_kept(folder, tmp_path, ran, monkeypatch):
    """A task with a part of its languages is run; what is kept of others stays."""
    name = "MockMultilingualSTSTask"
    few = evaluate(folder, tasks=[name], languages=["fra"], results=tmp_path)
    assert list(few) == [name]
    one = evaluate(folder, tasks=[name], languages=["eng"], results=tmp_path)
    both = evaluate(folder, tasks=[name], results=tmp_path)
    assert ran == [name] * 2
    assert list(both) == [f"{name}/test/eng", f"{name}/test/fra"]
    assert both[f"{name}/test/fra"].per_item == few[name].per_item
    assert both[f"{name}/test/eng"].per_item == one[name].per_item
    assert both[f"{name}/test/eng"].main_score == pytest.approx((few[name].main_score + one[name].main_score) / 2)
    assert evaluate(folder, tasks=[name], languages=["fra"], results=tmp_path)[name].per_item == few[name].per_item


def test_a_result_that_mteb_wrote_has_the_main_score_alone(folder, tmp_path, ran):
    """There are no scores of single items beside it."""
    name, revision = name_and_revision(folder)
    [result] = mteb.evaluate(load_model(folder), mteb.get_task("MockSTSTask"), cache=None).task_results
    mteb.ResultCache(tmp_path).save_to_cache(result, name, revision)
    found = evaluate(folder, tasks=["MockSTSTask"], results=tmp_path)["MockSTSTask"]
    assert ran == []
    assert (found.metrics, found.device) == ({}, "unknown")
    assert found.main_score == pytest.approx(result.get_score(), abs=1e-6)


def test_what_cannot_be_kept_or_read_is_one_error(folder, tmp_path):
    """A model without a folder, a folder that cannot be written, a damaged file."""
    with pytest.raises(AnchorvecError, match="results are kept by a hash of the model's folder; name the folder"):
        evaluate(load_model(folder), tasks=["MockSTSTask"], results=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(AnchorvecError, match="file cannot be written"):
        evaluate(folder, tasks=["MockSTSTask"], results=tmp_path / "file")
    evaluate(folder, tasks=["MockSTSTask"], results=tmp_path)
    for file in tmp_path.rglob("MockSTSTask.json"):
        content = file.read_text()
        file.write_text(content[:40])
        with pytest.raises(AnchorvecError, match=r"MockSTSTask\.json, or what is kept beside it, cannot be read"):
            evaluate(folder, tasks=["MockSTSTask"], results=tmp_path)
        file.write_text(content)
    with pytest.raises(AnchorvecError, match="there is no such folder"):
        evaluate(tmp_path / "missing", tasks=["MockSTSTask"], results=tmp_path)
    with pytest.raises(AnchorvecError, match="an embedder is needed"):
        evaluate(tmp_path, tasks=["MockSTSTask"], results=tmp_path)


def test_the_command_keeps_results_in_the_folder_results(folder, tmp_path, monkeypatch, capsys):
    """As mteb's own command does; local data write nothing."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(
        '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "sentence2": "c", "score": 2}\n'
    )
    for words in (["--data", "pairs.jsonl"], ["--task", "MockSTSTask"], ["--task", "MockSTSTask"]):
        monkeypatch.setattr(sys, "argv", ["anchorvec", "evaluate", str(folder), *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        assert Path("results").exists() == ("--task" in words)
    assert "1 of 1 tasks have a result in results and are not run again: MockSTSTask" in capsys.readouterr().err


REAL = {
    "STSBenchmark": {
        "test.jsonl": [
            {"sentence1": f"a dog of {i}", "sentence2": f"a cat of {i * i % 7}", "score": i % 6} for i in range(12)
        ]
    },
    "EmotionClassification": {
        f"{split}.jsonl": [
            {"text": f"{split} {i} is {['good', 'bad'][i % 2]}", "label": i % 2, "label_text": str(i % 2)}
            for i in range(30)
        ]
        for split in ("train", "test")
    },
    "TwentyNewsgroupsClustering": {
        "test.jsonl": [
            {"sentences": [f"set {j}, text {i} on {i % 3}" for i in range(12)], "labels": [i % 3 for i in range(12)]}
            for j in range(3)
        ]
    },
    "SprintDuplicateQuestions": {
        "test.jsonl": [
            {"sent1": f"how is {i}?", "sent2": f"why is {i + i % 2}?", "labels": (i + 1) % 2} for i in range(12)
        ]
    },
    "SciFact": {
        "corpus.jsonl": [{"_id": f"d{i}", "title": f"on {i}", "text": f"This is about {i}."} for i in range(12)],
        "queries.jsonl": [{"_id": f"q{i}", "text": f"what is {i}"} for i in range(6)],
        "qrels.jsonl": [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1.0} for i in range(6)],
        "README.md": "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {file}.jsonl\n"
            for name, split, file in [
                ("default", "test", "qrels"),
                ("corpus", "corpus", "corpus"),
                ("queries", "queries", "queries"),
            ]
        )
        + "---\n",
    },
}
"""Tasks of mteb, and the files of their data sets, cut to a few rows."""


def test_real_tasks_are_scored_as_mteb_scores_them(folder, tmp_path, monkeypatch):
    """Mteb reads, cuts and scores their data, which are local files here, and are fetched elsewhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, files in REAL.items():
        data = tmp_path / name
        data.mkdir()
        for file, rows in files.items():
            lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (data / file).write_text(lines)
        kind = type(mteb.get_task(name))
        metadata = kind.metadata.model_copy(update={"dataset": {"path": str(data), "revision": "local"}})
        monkeypatch.setattr(kind, "metadata", metadata)
    with pytest.warns(UserWarning, match="left out, as their data cannot be had: ArguAna, NFCorpus, Stack"):
        scores = evaluate(folder, tasks=["paper-15"], results=tmp_path / "kept")
    assert set(scores) == set(REAL)
    assert (scores.averages["paper-15"].scored, scores.averages["paper-15"].tasks) == (5, 15)
    model = load_model(folder)
    for name, of in scores.items():
        [expected] = mteb.evaluate(model, mteb.get_task(name), cache=None, show_progress_bar=False).task_results
        assert of.main_score == pytest.approx(expected.get_score(), abs=1e-6), name
    assert scores["TwentyNewsgroupsClustering"].counts == {"sets": 3}
    assert scores["SciFact"].counts == {"queries": 6, "documents": 12}

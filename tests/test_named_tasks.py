"""Tasks of mteb by name: which a name stands for, on which splits and subsets, with which instruction and averages."""

import sys
import warnings

import mteb
import numpy as np
import pytest
from mteb.abstasks import AbsTaskSTS

from anchorvec.cli import main
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import _mteb, _mteb_names, check_test_data, evaluate
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_model
from anchorvec.model.text_encoder import TextEncoder
from support import register_mock_tasks

PAPER_15 = {
    **dict.fromkeys(["ArguAna", "NFCorpus", "SciFact"], "Retrieval"),
    **dict.fromkeys(["StackOverflowDupQuestions", "SciDocsRR"], "Reranking"),
    **dict.fromkeys(["BiorxivClusteringS2S", "MedrxivClusteringS2S", "TwentyNewsgroupsClustering"], "Clustering"),
    "SprintDuplicateQuestions": "PairClassification",
    **dict.fromkeys(["Banking77Classification", "EmotionClassification"], "Classification"),
    "MassiveIntentClassification": "Classification",
    **dict.fromkeys(["STS17", "SICK-R", "STSBenchmark"], "STS"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny embedder without prompts."""
    return build_embedder("tiny", tmp_path_factory.mktemp("model") / "model", max_tokens=64)


@pytest.fixture(scope="module")
def model(folder):
    """The same, loaded."""
    return load_model(folder)


@pytest.fixture(scope="module", autouse=True)
def mock_tasks():
    """Small tasks of every kind stand in mteb's registry."""
    with pytest.MonkeyPatch.context() as patched:
        register_mock_tasks(patched, Unreachable)
        yield


class Unreachable(AbsTaskSTS):
    """A task whose data stand nowhere."""

    metadata = mteb.get_task("STS12").metadata.model_copy(
        update={"name": "Unreachable", "dataset": {"path": "no/such-data", "revision": "0"}}
    )


def tasks_of(name, languages=()):
    """The tasks that a name stands for, as (splits, subsets) by name."""
    found = _mteb_names.tasks_of(_mteb_names.groups([name], languages))
    return {name: (list(task.eval_splits), list(task.hf_subsets)) for name, task in found.items()}


def benchmark(*names, title="Mocks"):
    """The small tasks `names` as a benchmark of mteb."""
    return mteb.Benchmark(name=title, tasks=[mteb.get_task(name) for name in names])


@pytest.fixture
def a_benchmark(monkeypatch):
    """A function that puts a benchmark among mteb's."""
    from mteb.benchmarks.get_benchmark import _build_registry

    return lambda found: monkeypatch.setitem(_build_registry(), found.name, found)


@pytest.mark.parametrize(
    ("name", "tasks"), [("MTEB(eng, v1)", 56), ("MTEB(eng, v2)", 41), ("BEIR", 15), ("NanoBEIR", 13)]
)
def test_a_benchmark_is_its_tasks_as_it_names_them(name, tasks):
    """On its own splits and subsets."""
    found = tasks_of(name)
    assert len(found) == tasks
    own = {task.metadata.name: (list(task.eval_splits), list(task.hf_subsets)) for task in mteb.get_benchmark(name)}
    assert found == own


def test_every_benchmark_of_mteb_has_a_name_here():
    """By each of its names."""
    for found in mteb.get_benchmarks():
        for name in [found.name, *(found.aliases or ())]:
            assert _mteb_names.groups([name])[0].name == mteb.get_benchmark(name).name


def test_paper_15_is_the_15_tasks_of_the_paper():
    """As MTEB(eng, v1) has them: the test split, English alone."""
    found = tasks_of("paper-15")
    assert {name: mteb.get_task(name).metadata.type for name in found} == PAPER_15
    assert all(splits == ["test"] for splits, _ in found.values())
    assert found["STS17"] == (["test"], ["en-en"])
    assert found["MassiveIntentClassification"] == (["test"], ["en"])
    assert all(subsets in (["default"], ["en"], ["en-en"]) for _, subsets in found.values())


def test_a_type_is_all_of_its_tasks_for_texts():
    """In the languages that were named; of a task in several languages these alone."""
    found = tasks_of("STS", ["kor"])
    assert found["KorSTS"] == (["test"], ["default"])
    assert found["STS17"] == (["test"], ["ko-ko"])
    assert "STSBenchmark" not in found
    assert len(tasks_of("STS")) > len(tasks_of("STS", ["eng"])) > len(found)
    assert tasks_of("STS17", ["kor"]) == {"STS17": (["test"], ["ko-ko"])}


def test_what_two_names_share_is_one_task():
    """With the splits and subsets of both."""
    together = _mteb_names.tasks_of(_mteb_names.groups(["paper-15", "STS17", "SciFact"]))
    assert len(together) == 15
    assert set(together["STS17"].hf_subsets) == set(mteb.get_task("STS17").hf_subsets)
    assert together["STS17"].hf_subsets[0] == "en-en"
    assert list(together["SciFact"].hf_subsets) == ["default"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SciFct", "SciFact"),
        ("scifact", "SciFact"),
        ("MTEB(eng,v1)", "MTEB(eng, v1)"),
        ("beir", "BEIR"),
        ("sts", "STS"),
        ("Paper15", "paper-15"),
        ("Retreival", "Retrieval"),
        ("zzzzzzzzzz", "mteb available-tasks"),
    ],
)
def test_a_nearly_right_name_gets_the_nearest_ones(name, nearest):
    """Before anything is loaded."""
    with pytest.raises(AnchorvecError, match="no task, type or benchmark") as refused:
        evaluate("/no/model", tasks=[name])
    assert nearest in str(refused.value)


@pytest.mark.parametrize(
    ("names", "languages", "message"),
    [
        (["STS"], ["en"], "Invalid language code: en.*write them as in eng"),
        (["SciFact"], ["kor"], "No subsets were found for SciFact"),
        (["VisualSTS(eng)"], [], "no task of the type VisualSTS"),
    ],
)
def test_languages_and_types_without_a_task_are_refused(names, languages, message):
    """With what to write."""
    with pytest.raises(AnchorvecError, match=message):
        check_test_data(tasks=names, languages=languages)


def test_a_folder_may_not_have_the_name_of_a_task_in_a_benchmark(tmp_path):
    """Both would be one key of the result."""
    (tmp_path / "SciFact.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n')
    with pytest.raises(AnchorvecError, match="two data sets are named 'SciFact'"):
        check_test_data(data=[tmp_path / "SciFact.jsonl"], tasks=["paper-15"])


def test_a_score_does_not_depend_on_what_ran_before(model):
    """Tasks that draw at random draw as in a run of their own; tests of what is kept compare all kinds with mteb's."""
    names = ["MockMultilingualClusteringFastTask", "MockClassificationTask", "MockMultilabelClassification"]
    for scores in (evaluate(model, tasks=names), evaluate(model, tasks=names[::-1])):
        for name in names:
            [expected] = mteb.evaluate(model, mteb.get_task(name), cache=None, show_progress_bar=False).task_results
            found = next(of for key, of in scores.items() if key.split("/")[0] == name)
            assert found.main_score == pytest.approx(expected.get_score(), abs=1e-6)


def test_a_benchmarks_averages_are_those_of_mteb(model, a_benchmark):
    """By type and over all; of single tasks there are none."""
    names = ["MockSTSTask", "MockMultilingualSTSTask", "MockClassificationTask", "MockRetrievalTask"]
    a_benchmark(benchmark(*names))
    scores = evaluate(model, tasks=["Mocks", "MockPairClassificationTask"])
    by_mteb = mteb.evaluate(model, [mteb.get_task(name) for name in names], cache=None, show_progress_bar=False)
    [expected] = mteb.get_benchmark("Mocks").get_score(mteb.BenchmarkResults(model_results=[by_mteb])).values()
    assert list(scores.averages) == ["Mocks"]
    found = scores.averages["Mocks"]
    assert (found.scored, found.tasks) == (4, 4)
    assert found.means == {key: pytest.approx(expected[key], abs=1e-6) for key in expected if key != "Rank"}
    assert set(found.means) == {"Mean(Task)", "Mean(TaskType)", "STS", "Classification", "Retrieval"}
    of_type = [scores["MockSTSTask"].main_score, scores["MockMultilingualSTSTask/test/eng"].main_score]
    assert found.means["STS"] == pytest.approx(np.mean(of_type), abs=1e-6)
    assert "MockPairClassificationTask" in scores


def test_a_benchmark_is_averaged_over_its_own_subsets(model, a_benchmark):
    """Though another name asked for more of the same task."""
    own = mteb.Benchmark(
        name="Mocks", tasks=[mteb.get_task("MockMultilingualSTSTask", languages=["fra"]), mteb.get_task("MockSTSTask")]
    )
    a_benchmark(own)
    few = evaluate(model, tasks=["Mocks"]).averages["Mocks"]
    many = evaluate(model, tasks=["Mocks", "MockMultilingualSTSTask"])
    assert many.averages["Mocks"] == few
    assert {"MockMultilingualSTSTask/test/eng", "MockMultilingualSTSTask/test/fra"} <= many.keys()


def test_a_task_without_data_is_named_before_anything_is_encoded(model, a_benchmark, monkeypatch):
    """The others are run; averages say of how many they are."""
    a_benchmark(benchmark("MockSTSTask", "Unreachable", "MockClassificationTask"))
    order = []
    monkeypatch.setattr(warnings, "warn", lambda message, *_, **__: order.append(str(message)))
    run = _mteb.run
    monkeypatch.setattr(_mteb, "run", lambda system, task, **o: order.append("run") or run(system, task, **o))
    scores = evaluate(model, tasks=["Mocks"])
    assert set(scores) == {"MockSTSTask", "MockClassificationTask"}
    said = [line for line in order if line.startswith("left out, as their data cannot be had")]
    assert len(said) == 1
    assert "Unreachable (ConnectionError: Couldn't reach it on the Hub" in said[0]
    assert order.index(said[0]) < order.index("run")
    assert (scores.averages["Mocks"].scored, scores.averages["Mocks"].tasks) == (2, 3)


def test_it_is_an_error_if_no_task_has_data(folder, monkeypatch, capsys, tmp_path):
    """One error, and exit code 2; with local data these are scored."""
    words = ["evaluate", str(folder), "--task", "Unreachable", "--results", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", ["anchorvec", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0] == "fetching the data of MTEB tasks: 1"
    assert lines[1].startswith("error: none of the tasks can be scored, as their data cannot be had: Unreachable (")
    assert len(lines) == 2
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "sentence2": "c", "score": 2}\n'
    )
    with pytest.warns(UserWarning, match="left out, as their data cannot be had: Unreachable"):
        assert list(evaluate(folder, data=[file], tasks=["Unreachable"])) == ["pairs"]


def test_without_network_nothing_is_asked_twice(monkeypatch, capsys):
    """One question tells; then only what is in the cache is used, and a line says so."""
    import datasets.config
    import huggingface_hub.constants as hub

    asked = []

    class Session:
        def head(self, url, **options):
            asked.append(url)
            raise ConnectionError("no network")

    def offline():
        return hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE

    monkeypatch.setattr(_mteb_names, "get_session", Session)
    for module in (hub, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    with _mteb_names.offline_unless_reachable():
        assert offline() == (True, True)
        assert list(_mteb_names.without_data([Unreachable()])) == ["Unreachable"]
    assert offline() == (False, False)
    assert asked == [hub.ENDPOINT]
    assert f"{hub.ENDPOINT} cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(_mteb_names, "get_session", lambda: type("Session", (), {"head": lambda *_, **__: None})())
    with _mteb_names.offline_unless_reachable():
        assert offline() == (False, False)


@pytest.mark.parametrize(
    ("task", "instruction"),
    [
        ("SciFact", "Given a scientific claim, retrieve documents that support or refute the claim"),
        ("STSBenchmark", "Retrieve semantically similar text."),
        ("Banking77Classification", "Given a online banking query, find the corresponding intents"),
        ("TwentyNewsgroupsClustering", "Identify the topic or theme of the given news articles"),
        ("MockMultilingualClusteringFastTask", "Identify categories in user passages."),
    ],
)
def test_a_task_has_its_own_instruction(model, task, instruction):
    """Where `{instruction}` stands in the instruction that is given."""
    encoder = _mteb.Encoder(TextEncoder(model), "Instruct: {instruction}\nQuery: ")
    found = mteb.get_task(task).metadata
    side = mteb.types.PromptType.query if found.type == "Retrieval" else None
    assert encoder._prompt(found, side) == f"Instruct: {instruction}\nQuery: "


def test_a_local_set_has_the_instruction_of_its_kind(model, tmp_path, monkeypatch):
    """mteb's, for tasks of this class."""
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"text": "text {i}", "label": {i % 2}}}\n' for i in range(8)))
    encoded = []
    plain = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **o: encoded.append(o.get("prompt")) or plain(texts, **o))
    evaluate(model, data=[tmp_path / "mine.jsonl"], instruction="Task: {instruction} Text: ")
    assert set(encoded) == {"Task: Identify categories in user passages. Text: "}


def test_a_newer_version_and_languages_of_no_use_are_said(model, capsys):
    """Once each; a benchmark's older tasks are chosen on purpose."""
    _mteb_names_said = _mteb_names.notes(_mteb_names.groups(["paper-15", "STSBenchmark"], ["eng"]), ["eng"])
    assert _mteb_names_said == [
        "paper-15: a benchmark names its own languages; --language does not act on it",
        "STSBenchmark: mteb has a newer version of it, STSBenchmark.v2",
    ]


def test_the_table_has_the_averages(folder, a_benchmark, monkeypatch, capsys, tmp_path):
    """Under the tables by kind, and says where they are not of the whole benchmark."""
    a_benchmark(benchmark("MockSTSTask", "Unreachable", "MockClassificationTask"))
    monkeypatch.setattr(sys, "argv", ["anchorvec", "evaluate", str(folder), "--task", "Mocks", "--results", "kept"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert not end.value.code
    assert "Mocks: 2 of 3 tasks Mean(Task)" in shown
    assert "of the tasks that were scored, not the benchmark's own" in shown
    assert (tmp_path / "kept" / "results").is_dir()

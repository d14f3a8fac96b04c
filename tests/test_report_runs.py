"""Pages about runs: of a real one all its figures; of several what they differ in; what is missing is said."""

import json
import re
import shutil
from statistics import fmean

import pytest
from huggingface_hub import ModelCard

import anchorvec
from anchorvec.commands.report import report
from anchorvec.evaluation import BeirData, Scores, statistics, write_beir
from anchorvec.evaluation.scores import paired
from anchorvec.reporting.assemble import assemble
from anchorvec.reporting.reading import read_sources
from comparisons import KINDS, write_comparison
from pages import Page
from support import QUICK, write_rows

SYSTEMS = {
    "BM25": "bm25",
    "untrained": "untrained",
    "after Stage I": "stage_one",
    "after Stage II": "stage_two",
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The folder of a run that was scored on two kinds of test sets, after each stage."""
    folder = tmp_path_factory.mktemp("real")
    corpus = {f"d{i}": {"text": f"note {i} of animal {i * 7 % 5}"} for i in range(12)}
    queries = {f"q{i}": f"which animal {i}?" for i in range(8)}
    write_beir(BeirData(corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(8)}), folder / "animals")
    write_rows(
        folder / "alike.jsonl", [{"sentence1": f"a {i}", "sentence2": f"b {i * 3}", "score": i} for i in range(9)]
    )
    values = [f"output={folder / 'first'}", *QUICK, "evaluation.bm25=true", f"evaluation.data=[{folder}]"]
    anchorvec.train(anchorvec.load_recipe("debug", values))
    return folder / "first"


@pytest.fixture(scope="module")
def page(real, tmp_path_factory):
    """The page about it, and its card."""
    folder = tmp_path_factory.mktemp("pages")
    report(real, folder / "page.html", markdown=folder / "page.md")
    return Page(folder / "page.html")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_runs_verdict_compares_its_last_model_with_the_untrained_one(real, page):
    """Item by item, over all of its test sets."""
    scores = json.loads((real / "scores.json").read_text())
    before, after = (
        {task: Scores.from_dict(of_task) for task, of_task in scores[name].items()}
        for name in ("untrained", "stage_two")
    )
    expected = statistics.difference([paired(before[task], after[task]) for task in after])
    table = page.tables("Differences")["Differences to the untrained model"]
    assert table.numbers_of("Difference", "After Stage II", "All test sets") == [
        pytest.approx(value) for value in (expected.mean, expected.low, expected.high)
    ]
    assert table.numbers_of("p", "After Stage II", "All test sets") == [pytest.approx(expected.p_value)]
    assert table.row("After Stage II", "All test sets")[3] == expected.verdict
    assert [row[1] for row in table.rows] == ["All test sets", "alike", "animals"]
    assert f"{abs(expected.mean):.3f} [" in page.verdict[0]
    assert page.verdict[1].startswith("The smallest difference that this budget could have shown: ")
    assert page.root.get("header").get("p").text == (
        "A text embedder made from tiny: Stage I of 3 steps, then Stage II of 3 steps."
    )


def test_a_runs_scores_and_losses_are_those_of_its_files(real, page):
    """Every system on every set with its interval, every metric; each logged step."""
    scores = json.loads((real / "scores.json").read_text())
    tables = page.tables("Scores")
    for title, system in SYSTEMS.items():
        for task, metric, column in (
            ("animals", "ndcg_at_10", "animals (Retrieval), nDCG@10"),
            ("alike", "cosine_spearman", "alike (STS), Spearman"),
        ):
            of_task = scores[system].get(task)
            expected = [] if of_task is None else [of_task[metric], *of_task[f"{metric}_interval"]]
            assert tables["Scores"].numbers_of(column, title) == expected
    metrics = tables["Retrieval: all metrics"]
    assert metrics.columns == ["Test set", "System", "nDCG@10", "Recall@10", "MRR@10"]
    assert metrics.numbers_of("MRR@10", "animals", "BM25")[0] == scores["bm25"]["animals"]["mrr_at_10"]
    log = log_of(real)
    losses = page.tables("Training")["Stage I: reconstruction loss by direction"]
    gaps = page.tables("Exchange gap")["Exchange gap by direction"]
    for record in [record for record in log if record["stage"] == "stage_one"]:
        step = str(record["step"])
        for direction in ("query to document", "document to query"):
            key = direction.replace(" ", "_")
            assert losses.numbers_of(direction, step) == [record[key]]
            assert gaps.numbers_of(direction, step) == [record[f"exchange_{key}"]]
    loss = page.tables("Training")["Stage II: loss"]
    assert [row[0] for row in loss.numbers] == [[], [], []]
    assert [row[1] for row in loss.numbers] == [[r["loss"]] for r in log if r["stage"] == "stage_two"]


def test_a_runs_cost_recipe_data_and_versions_are_those_of_its_files(real, page):
    """Tokens, speed and memory of each stage; what its recipe changes; how to make it again."""
    last = {record["stage"]: record for record in log_of(real)}
    record = json.loads((real / "run.json").read_text())
    table = page.tables("Cost")["What each stage took"]
    for title, stage in (("Stage I", "stage_one"), ("Stage II", "stage_two")):
        engine = record["engine"][stage]
        held = engine["micro_batch_tokens"] * engine["bytes_per_token"]
        assert table.numbers_of("Tokens", title) == [last[stage]["tokens"]]
        assert table.numbers_of("Tokens a second", title) == [last[stage]["tokens_per_second"]]
        assert table.numbers_of("Minutes", title) == [pytest.approx(last[stage]["seconds"] / 60)]
        assert table.numbers_of("Its memory, MB", title) == [pytest.approx(held / 1e6)]
    tokens = sum(of_stage["tokens"] for of_stage in last.values())
    [title] = [title for title in page.charts("Cost") if title.startswith("Score against decoder tokens")]
    quality = page.tables("Cost")[title]
    assert quality.numbers_of("Decoder tokens", "after Stage II") == [tokens]
    assert quality.numbers_of("Decoder tokens", "untrained") == [0]
    changes = page.tables("Recipe")["What differs from a recipe's defaults"]
    assert changes.row("stage_one.steps")[1] == "3"
    assert changes.row("model.base") == ["model.base", "tiny", "smollm2"]
    assert changes.row("stage_two.lora")[1:] == ["null", "on"]
    assert not any(row[0].startswith(("output", "data.train")) for row in changes.rows)
    data = page.tables("Data")["Training pairs"]
    assert data.numbers_of("Pairs kept", "debug") == [record["data"]["debug"]["rows"]]
    versions = page.tables("Versions and machine")["What it ran with"]
    assert {row[0]: row[1] for row in versions.rows}.items() >= record["versions"].items()
    install, command = page.code("To repeat it")
    assert f"torch=={record['versions']['torch'].partition('+')[0]} " in install
    assert command == "anchorvec train first/recipe.yaml output=first-again"
    assert page.sections["Not on this page"].get("p").text == (
        "Left out, for want of numbers: scores against Stage II steps."
    )


def test_a_runs_markdown_is_a_model_card(real, tmp_path):
    """With its scores where the hub reads them."""
    report(real, markdown=tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    scores = json.loads((real / "scores.json").read_text())["stage_two"]
    assert {(r.dataset_name, r.task_type): (r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("animals", "Retrieval"): ("ndcg_at_10", scores["animals"]["ndcg_at_10"]),
        ("alike", "STS"): ("cosine_spearman", scores["alike"]["cosine_spearman"]),
    }
    assert data.library_name == "sentence-transformers"


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """The folder of a comparison, whose runs are runs too."""
    folder = tmp_path_factory.mktemp("arms")
    write_comparison(folder, seeds=2)
    return folder


def test_runs_are_compared_with_the_first(arms, tmp_path):
    """Item by item, Holm's method over the runs; recipes, versions and curves beside each other."""
    runs = [arms / "0" / "0", arms / "1" / "0", arms / "2" / "1"]
    report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.root.get("header").get("p").text == "3 runs from tiny, each against the first, 0."
    scores = [json.loads((run / "scores.json").read_text())["stage_two"] for run in runs]
    read = [{task: Scores.from_dict({**s, "prompts": {}}) for task, s in of_run.items()} for of_run in scores]
    found = [statistics.difference([paired(read[0][task], one[task]) for task in KINDS]) for one in read[1:]]
    corrected = statistics.holm(found)
    table = page.tables("Differences")["Differences to 0"]
    for name, one in zip(("0 (2)", "1"), corrected, strict=True):
        assert table.numbers_of("Difference", name, "All test sets")[0] == pytest.approx(one.mean)
        assert table.numbers_of("p, Holm", name, "All test sets") == [pytest.approx(one.p_holm)]
    assert page.charts("Training")["Stage II: loss"].keys == [
        "0, without Stage I", "0 (2), without Stage I", "1, after Stage I",
    ]  # fmt: skip
    changes = page.tables("Recipe")["What differs from the recipe of 0"]
    assert changes.row("1", "stage_one") == ["1", "stage_one", "on", "null"]
    assert changes.row("1", "seed") == ["1", "seed", "1", "0"]


def test_a_run_and_a_comparison_stand_on_one_page(arms, tmp_path):
    """A verdict for each; all series have colours of their own."""
    result = report([arms, arms / "0" / "0", arms / "2" / "1"], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert len(page.sections["Verdict"].all("p")) == 2
    assert len(result.verdict) > 2
    curves = page.charts("Training")["Stage II: loss"].spec["layer"]
    assert [layer["mark"]["color"] for layer in curves] == [f"var(--series-{i})" for i in range(1, 6)]


def test_of_many_test_sets_kinds_are_shown(arms, tmp_path):
    """Each with the average over its sets; every set is in a table of its kind."""
    runs = [shutil.copytree(arms / name / "0", tmp_path / name) for name in ("0", "1")]
    for run in runs:
        scores = json.loads((run / "scores.json").read_text())
        many = {name: {f"{task}{i}": v for task, v in of.items() for i in range(3)} for name, of in scores.items()}
        (run / "scores.json").write_text(json.dumps(many))
    report(runs, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert list(page.charts("Scores")) == [
        "Retrieval, average of 6 test sets", "STS, average of 3 test sets", "Classification, average of 3 test sets",
    ]  # fmt: skip
    stored = json.loads((runs[1] / "scores.json").read_text())["stage_two"]
    mean = fmean(of["ndcg_at_10"] for of in stored.values() if of["kind"] == "Retrieval")
    tables = page.tables("Scores")
    assert tables["Scores"].numbers_of("Retrieval, average of 6 test sets", "1")[0] == pytest.approx(mean)
    assert len(tables["Classification: all metrics"].rows) == 3 * 3
    assert [row[1] for row in page.tables("Differences")["Differences to 0"].rows] == [
        "All test sets", "Retrieval", "STS", "Classification",
    ]  # fmt: skip


def test_what_cannot_be_compared_is_said(arms, tmp_path):
    """Test sets with other data, scores without items; and what a table of samples is of."""
    runs = [shutil.copytree(arms / name / "0", tmp_path / name) for name in ("0", "1")]
    scores = json.loads((runs[1] / "scores.json").read_text())
    scores["stage_two"]["scifact"]["fingerprint"] = "other data"
    del scores["stage_two"]["stsbenchmark"]["per_item"]
    scores["stage_two"]["banking"] |= {"sampled": 100, "recall": 0.98}
    (runs[1] / "scores.json").write_text(json.dumps(scores))
    result = report(runs, markdown=tmp_path / "page.md")
    assert "1, scifact: the two systems were scored on different data; score both on the same" in result.left_out
    assert "1, stsbenchmark: not compared, since its scores are incomplete" in result.left_out
    text = (tmp_path / "page.md").read_text()
    assert (
        "banking: 100 other documents, drawn, beside the relevant ones, an approximate search, recall 0.980 (1)."
        in text
    )


def test_a_run_that_was_killed_has_a_page(arms, tmp_path):
    """With its losses; the line of the log that was cut is named, and what is missing."""
    run = tmp_path / "killed"
    run.mkdir()
    shutil.copy(arms / "2" / "0" / "recipe.yaml", run)
    records = log_of(arms / "2" / "0")[:60]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"stage": "stage_two", "st')
    result = report(run, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.verdict == [
        "No two systems have scores on the same data, so nothing is said of which is better. The loss went from "
        f"{records[40]['loss']:.3f} to {records[-1]['loss']:.3f} in 20 steps."
    ]
    assert result.left_out[0] == (
        "Left out, for want of numbers: scores, differences, scores against Stage II steps, data counts and versions."
    )
    assert result.left_out[1].startswith("killed: the log is read up to log.jsonl:61: this is no JSON")
    assert [line.text for line in page.sections["Not on this page"].all("p")] == result.left_out
    assert "Left out" in result.__rich__()


def test_a_run_without_anything_says_so(tmp_path):
    """A record alone is a page with no charts."""
    (tmp_path / "run.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}, "data": None, "engine": []}))
    (tmp_path / "log.jsonl").write_text('{"stage": "stage_one"}\n')
    found = assemble(read_sources([tmp_path]))
    assert [section.name for section in found.sections] == ["versions"]
    assert found.verdicts[0].headline == [
        "No two systems have scores on the same data, so nothing is said of which is better."
    ]
    assert found.left_out[1].endswith("log.jsonl:1: this is no record of a step")


HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>"


def test_nobodys_text_is_markup(tmp_path):
    """Names of arms, reasons, paths, recipe values: shown as they are, in HTML and in Markdown."""
    arm = f"# {HOSTILE} \u202e\x07 [a](http://b) | `c`"
    folder = tmp_path / "arms"
    content = write_comparison(folder, ("e5", "echo", arm), seeds=1, failing={"echo": HOSTILE})
    content["recipe"] = HOSTILE
    content["arms"]["e5"]["differences"] = {"stage_one": HOSTILE}
    content["command"] = ["anchorvec", "compare", HOSTILE + "\nrm -rf /"]
    (folder / "comparison.json").write_text(json.dumps(content))
    run = folder / "0" / "0" / "run.json"
    run.write_text(run.read_text().replace("nq.jsonl", HOSTILE).replace("AMD EPYC", HOSTILE))
    report(folder, tmp_path / "page.html", markdown=tmp_path / "page.md")
    page = Page(tmp_path / "page.html")
    assert page.root.all("img") == []
    assert all("type" in s.attributes or "alert(" not in s.raw for s in page.root.all("script"))
    assert len([s for s in page.root.all("script") if "type" not in s.attributes]) == 2
    assert page.title == f"{HOSTILE}: 3 arms"
    shown = arm.replace("\u202e", "\ufffd").replace("\x07", "\ufffd")
    assert shown in page.verdict[0]
    assert [row[0] for row in page.tables("Scores")["Scores"].rows][:2] == ["e5", shown]
    assert page.tables("Data")["Training pairs of 0/0"].row("nq")[1] == HOSTILE
    assert f"echo, seed 0, failed: {HOSTILE}." in page.verdict
    assert page.code("To repeat it")[1].splitlines()[0] == f"anchorvec compare '{HOSTILE} rm -rf /'"
    text = (tmp_path / "page.md").read_text()
    outside = re.sub(r"^(```+).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<" not in outside
    assert "[a](" not in outside
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) >= 3 for row in rows)

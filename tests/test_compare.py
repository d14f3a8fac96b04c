"""A comparison of arms: the same budget on the same rows, rates by held-out rows, failures as rows, over a kill."""

import io
import json
import math

import pytest

import anchorvec
from anchorvec.comparing.asked import Amount
from anchorvec.comparing.differences import arm_differences
from anchorvec.comparing.held_out import hold_out
from anchorvec.data import read_pairs
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData, write_beir
from anchorvec.reporting.reading import ComparisonFile, read_sources
from anchorvec.run import Run
from interrupting import killed_after
from support import write_rows

HOT = "stage_two.temperature=0.2"
ARMS = ["debug", "e5", "echo", HOT]
SMALL = [
    f"{stage}.{key}={value}"
    for stage in ("stage_one", "stage_two")
    for key, value in {"pairs_per_step": 4, "warmup_steps": 0, "steps": 4}.items()
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Small steps, and a small test set."""
    folder = tmp_path_factory.mktemp("data") / "animals"
    animals = ["otter", "heron", "badger", "lynx", "raven", "trout"]
    corpus = {f"d{i}": {"title": "", "text": f"The {animal} is an animal."} for i, animal in enumerate(animals)}
    queries = {f"q{i}": f"what is the {animal}" for i, animal in enumerate(animals)}
    write_beir(BeirData(corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(len(animals))}), folder)
    return [*SMALL, f"evaluation.data=[{json.dumps(str(folder))}]"]


@pytest.fixture(scope="module")
def compared(overrides, tmp_path_factory):
    """A comparison of four arms with two seeds and two learning rates."""
    folder = tmp_path_factory.mktemp("compared") / "comparison"
    options = {"budget": "6000tokens", "seeds": 2, "tries": 2, "at": [0, 2]}
    return folder, anchorvec.compare("debug", ARMS, **options, overrides=[*overrides, f"output={folder}"])


def test_the_record_is_what_a_report_reads(compared):
    """A run for each arm and seed, with tokens, steps, minutes and scores; differences of all but the control."""
    folder, result = compared
    [source] = read_sources([folder])
    assert [series.name for series in source.series] == ARMS
    assert source.comparison.budget.model_dump() == {"kind": "tokens", "amount": 6000}
    for series in source.series:
        assert [run.seed for run in series.runs] == [0, 1]
        for run in series.runs:
            assert run.last["animals"].kind == "Retrieval"
            assert run.minutes > 0
            assert run.tokens.keys() == run.steps.keys() == run.log.keys()
    assert [change.arm for change in source.changes] == ARMS[1:]
    assert {change.kind for change in source.changes} == {"animals"}
    assert all(change.p_holm >= change.p_value for change in source.changes)
    assert all(change.detectable is None or change.detectable > 0 for change in source.changes)
    assert result.to_dict()["arms"].keys() == set(ARMS)


def test_scores_on_the_way_are_the_arms_curves(compared):
    """At the steps that were asked for, and after the last."""
    _, result = compared
    for arm in result.file.arms.values():
        for run in arm.runs:
            assert [point.step for point in run.curve] == sorted({0, 2, run.steps["stage_two"]})
            assert run.curve[-1].scores == {"animals": pytest.approx(run.scores["animals"].main_score)}


def test_a_plan_says_what_a_comparison_takes(overrides, tmp_path):
    """Steps, tokens, time and disk of each arm; nothing is kept."""
    options = {"budget": "6000tokens", "seeds": 2, "tries": 3, "overrides": [*overrides, f"output={tmp_path / 'all'}"]}
    plan = anchorvec.plan_comparison("debug", ["debug", "e5"], **options)
    assert plan.arms["e5"].differences == {"stage_one": None}
    for arm in plan.arms.values():
        assert sum(arm.tokens.values()) == pytest.approx(6000, abs=2)
        assert arm.seconds > 0
        assert arm.disk > 10_000
    assert plan.arms["debug"].steps.keys() == {"stage_one", "stage_two"}
    assert plan.tokens == pytest.approx(2 * 2.3 * 6000, rel=0.01)
    assert plan.seconds == pytest.approx(2.3 * sum(arm.seconds for arm in plan.arms.values()))
    assert anchorvec.plan_comparison("debug", ["debug", "e5"], **options, step=False).seconds is None
    assert not (tmp_path / "all").exists()


def test_arms_have_the_same_tokens(compared):
    """All that another step would not go beyond, however it is divided between stages."""
    _, result = compared
    for arm in result.file.arms.values():
        for run in arm.runs:
            steps = sum(run.steps.values())
            assert 6000 * (1 - 1.5 / steps) < sum(run.tokens.values()) <= 6000 * (1 + 1 / steps)
    shares = result.file.arms["debug"].runs[0].tokens
    assert 0.5 < shares["stage_one"] / sum(shares.values()) < 0.67  # each text is read, and written


def test_arms_see_the_same_rows(compared):
    """Up to the last step that all have made, of which the hash is noted; Echo stops earlier."""
    folder, result = compared
    for seed in (0, 1):
        rows = {arm: Run(folder / arm_folder(arm) / str(seed)).read_rows()["stage_two"] for arm in ARMS}
        common = min(map(len, rows.values()))
        assert common == len(rows["debug"])
        assert len(rows["echo"]) < len(rows["e5"])
        assert len({hashes[common - 1] for hashes in rows.values()}) == 1
        noted = {run.rows_hash for arm in result.file.arms.values() for run in arm.runs if run.seed == seed}
        assert noted == {rows["e5"][common - 1]}


def arm_folder(arm):
    """The folder of an arm."""
    return arm.replace("=", "-")


def test_what_arms_share_is_made_once(compared):
    """Base and Stage I of the same settings and seed: the same files; of others, others. Scores too."""
    folder, _ = compared

    def file(arm, seed, stage):
        return (folder / arm_folder(arm) / str(seed) / stage / "model.safetensors").stat().st_ino

    for seed in (0, 1):
        assert file("debug", seed, "stage_one") == file(HOT, seed, "stage_one")
        assert file("debug", seed, "base") == file(HOT, seed, "base")
        assert file("debug", seed, "stage_two") != file(HOT, seed, "stage_two")
        scores = [json.loads((folder / arm_folder(arm) / str(seed) / "scores.json").read_text()) for arm in ARMS]
        assert scores[0]["stage_one"] == scores[3]["stage_one"]
        assert scores[0]["untrained"] == scores[1]["untrained"] != scores[2]["untrained"]
    assert file("debug", 0, "stage_one") != file("debug", 1, "stage_one")
    log = [(folder / arm / "0" / "log.jsonl").read_text() for arm in ("debug", arm_folder(HOT))]
    stage_one = [[line for line in lines.splitlines() if '"stage_one"' in line] for lines in log]
    assert stage_one[0] == stage_one[1] != []


def test_each_arm_tries_as_many_learning_rates(compared):
    """Around its own, at a tenth of the budget; the best of them is what its runs have. The models are removed."""
    folder, result = compared
    for name, arm in result.file.arms.items():
        assert [trial.learning_rate for trial in arm.tries] == [0.000333, 0.001]
        assert all(0 < trial.tokens <= 1200 for trial in arm.tries)  # of each stage a step at least
        best = max(arm.tries, key=lambda trial: trial.score).learning_rate
        assert arm.learning_rate["stage_two"] == best
        assert anchorvec.load_recipe(folder / arm_folder(name) / "1" / "recipe.yaml").stage_two.learning_rate == best
    assert not list(folder.glob("tries/*/*/*/model.safetensors"))
    assert len(list(folder.glob("tries/*/*/log.jsonl"))) == 8


def test_the_table_has_each_arm_and_each_way_to_read_untrained(compared):
    """And ends with the command for the report."""
    from rich.console import Console

    folder, result = compared
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result)
    text = console.export_text()
    assert "no difference shown" in text or "higher" in text or "lower" in text
    assert set(result.untrained) == {f"debug, e5, {HOT}", "echo"}
    assert "echo, untrained" in text
    assert text.strip().endswith(f"anchorvec report {folder} --output report.html")


def test_held_out_rows_are_trained_on_by_nobody(tmp_path):
    """Nor are rows that have a text of theirs; the rest is all there, and a query is answered by its positives."""
    rows = [{"query": f"question {i // 2}", "positive": f"answer {i}", "negative": f"wrong {i}"} for i in range(200)]
    pairs = {"own": read_pairs(write_rows(tmp_path / "own.jsonl", rows))}
    left, [test] = hold_out(pairs)
    asked = set(test.queries.values())
    assert 10 <= len(asked) <= 20
    trained = left["own"].dataset
    assert not asked & set(trained["query"])
    assert not {document["text"] for document in test.corpus.values()} & set(trained["positive"])
    assert len(trained) == left["own"].report.rows == 200 - 2 * len(asked)
    assert left["own"].report.fingerprint != pairs["own"].report.fingerprint
    assert test.name == "own"
    for query, answers in test.qrels.items():
        number = int(test.queries[query].split()[1])
        assert {test.corpus[answer]["text"] for answer in answers} <= {
            f"answer {2 * number}",
            f"answer {2 * number + 1}",
        }
    assert hold_out(pairs)[1] == [test]
    few = {"few": read_pairs(write_rows(tmp_path / "few.jsonl", rows[:50]))}
    with pytest.raises(AnchorvecError, match=r"few: of its 50 rows 5 could be held out .*too few; write --tries 0"):
        hold_out(few)


def test_an_arm_that_fails_is_a_row_and_the_others_go_on(overrides, tmp_path):
    """With its reason; mended, the comparison goes on with what had failed alone."""
    broken = "stage_two.learning_rate=1e30"
    options = {"budget": "3steps", "seeds": 1, "tries": 0, "overrides": [*overrides, f"output={tmp_path / 'all'}"]}
    result = anchorvec.compare("debug", [broken, "e5", "stage_one=null"], **options)
    arms = result.file.arms
    assert "stage_two: " in arms[broken].runs[0].failed
    assert "no finite number" in arms[broken].runs[0].failed
    assert arms["e5"].runs[0].steps == {"stage_two": 3}
    assert not result.file.differences  # to a control that failed
    assert json.loads((tmp_path / "all" / "comparison.json").read_text())["arms"][broken]["runs"][0]["failed"]
    with pytest.raises(AnchorvecError, match="every run failed, the first one because: stage_two: "):
        anchorvec.compare(
            "debug",
            [broken, "stage_two.learning_rate=1e31"],
            **options | {"overrides": [*overrides, f"output={tmp_path / 'no'}"]},
        )


def test_a_killed_comparison_goes_on(overrides, tmp_path):
    """What is finished is not done again, a run under way goes on, and all ends as if nothing had been."""
    more = ["stage_two.save_steps=1", "stage_one.save_steps=1"]
    whole, part = ([*overrides, *more, f"output={tmp_path / name}"] for name in ("whole", "part"))
    options = {"budget": "4steps", "seeds": 1, "tries": 0}
    expected = anchorvec.compare("debug", ["e5", "debug"], **options, overrides=whole)
    with killed_after(4 + 4 + 2):  # in Stage II of the second arm
        anchorvec.compare("debug", ["e5", "debug"], **options, overrides=part)
    finished = (tmp_path / "part" / "e5" / "0" / "log.jsonl").stat()
    with pytest.raises(AnchorvecError, match="holds a comparison; go on with --resume"):
        anchorvec.compare("debug", ["e5", "debug"], **options, overrides=part)
    for changed, message in (
        ({"budget": "5steps"}, "holds another comparison: budget is .*4.* there, and .*5.* here"),
        ({"seeds": 2}, r"seeds is \[0\] there, and \[0, 1\] here"),
        ({"overrides": [*part, "stage_two.temperature=0.3"]}, r'settings is {"stage_two.temperature": 0.05} there'),
    ):
        with pytest.raises(AnchorvecError, match=message):
            anchorvec.compare("debug", ["e5", "debug"], **options | {"overrides": part} | changed, resume=True)
    found = anchorvec.compare("debug", ["e5", "debug"], **options, overrides=part, resume=True)
    assert (tmp_path / "part" / "e5" / "0" / "log.jsonl").stat() == finished
    for arm, expected_arm in expected.file.arms.items():
        [run], [expected_run] = found.file.arms[arm].runs, expected_arm.runs
        assert (run.steps, run.tokens, run.rows_hash) == (
            expected_run.steps,
            expected_run.tokens,
            expected_run.rows_hash,
        )
        assert run.scores["animals"].metrics == expected_run.scores["animals"].metrics
    assert [change.mean for change in found.differences] == [change.mean for change in expected.differences]


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        (
            ["e5", "ecko"],
            {},
            "arms: there is no arm ecko; did you mean echo. the shipped ones are alpha-0.5, .*llm2vec",
        ),
        (["e5"], {}, "arms: 1 of them; a comparison needs two or more"),
        (["e5", "e5"], {}, "arms: e5 is named twice"),
        (["e5", "echo"], {"budget": "300"}, "budget: '300' has no unit; write, for example, 300000tokens"),
        (["e5", "echo"], {"budget": "3 days"}, "budget: '3 days' is none of tokens, steps, minutes"),
        (["e5", "echo"], {"budget": "0tokens"}, "budget: '0tokens' is no whole number above 0"),
        (["e5", "echo"], {"budget": "1.5steps"}, "budget: '1.5steps' is no whole number"),
        (["e5", "echo"], {"seeds": 0}, "seeds: 0 of them; give 1 or more"),
        (["e5", "echo"], {"tries": 1}, "tries: 1 learning rates leave nothing to choose"),
        (["e5", "echo"], {"control": "anchor"}, "control: anchor is none of the arms; they are e5, echo"),
        (["e5", "seed=3"], {}, "arm seed=3: seed: all arms of a comparison share it"),
        (["e5", "model.base=smollm2"], {}, "model.base=smollm2: model.base: all arms of a comparison share it"),
        (["e5", "stage_two=null"], {"budget": "3steps"}, "budget: stage_two=null has no Stage II"),
        (["e5", "stage_one.step=3"], {}, "arm stage_one.step=3: stage_one.step: unknown key"),
        (["e5", "echo"], {"overrides": ["output=there"]}, "evaluation: there is nothing to score the arms on"),
        (
            ["e5", "stage_two.pairs_per_step=500"],
            {},
            "stage_two.pairs_per_step=500: stage_two.pairs_per_step: 500 is more",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_before_any_work(overrides, tmp_path, arms, options, message):
    """With what is wrong and what to write instead; nothing is written."""
    given = {"budget": "300tokens", "overrides": [*overrides, f"output={tmp_path / 'all'}"], "tries": 0} | options
    with pytest.raises(AnchorvecError, match=message):
        anchorvec.compare("debug", arms, **given)
    assert not (tmp_path / "all").exists()


def test_a_folder_with_something_else_is_refused(overrides, tmp_path):
    """It is no comparison's."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AnchorvecError, match="is in use, and no comparison is in it; name a new folder"):
        anchorvec.compare("debug", ["e5", "echo"], budget="9steps", overrides=[*overrides, f"output={tmp_path}"])


def test_amounts():
    """As they may be written, and a tenth of them."""
    assert str(Amount.parse("300_000 tokens")) == "300,000 tokens"
    assert Amount.parse("1e6tokens").amount == 1_000_000
    assert (Amount.parse("125steps").part().amount, Amount.parse("3steps").part().amount) == (12, 1)
    assert Amount.parse("7.5minutes").part().amount == 0.75


def test_differences_without_a_common_seed_are_said(capsys):
    """An arm is compared over the seeds that it has in common with the control."""
    assert arm_differences({"a": [{"seed": 0, "scores": {}}], "b": [{"seed": 1, "failed": "it"}]}, "a") == []
    assert "b: not compared, as it has no seed in common with the control" in capsys.readouterr().err


def test_the_command_line(overrides, tmp_path, monkeypatch, capsys):
    """Arms stand behind --arms; bad input is one line and exit code 2."""
    from anchorvec.cli import main

    for words, code, said in (
        (["debug", "--arms", "e5", "stage_one=null", "debug"], 0, "anchorvec report"),
        (["debug", "--arms", "e5", "nobody"], 2, "error: arms: there is no arm nobody"),
        (["debug", "--arms", "e5", "echo", "--budget", "9"], 2, "error: budget: '9' has no unit"),
    ):
        options = ["--budget", "2steps", "--seeds", "1", "--tries", "0", *overrides, f"output={tmp_path / 'all'}"]
        command = ["anchorvec", "compare", words[0], *options[:2], *words[1:], *options[2:]]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code or 0) == code, err
        assert said in " ".join((out + err).split())
    content = ComparisonFile.model_validate_json((tmp_path / "all" / "comparison.json").read_text())
    assert list(content.arms) == ["e5", "debug"]
    assert math.isfinite(content.arms["e5"].runs[0].minutes)

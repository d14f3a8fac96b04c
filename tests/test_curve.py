"""A model is scored while it trains, and training goes on as if it had not been."""

import itertools
import json
import os
import re
import signal

import pytest
import torch

import anchorvec
from anchorvec import pipeline
from anchorvec.errors import AnchorvecError, Interrupted
from anchorvec.model.loading import load_model
from anchorvec.reporting.reading import read_run
from anchorvec.run import Run
from anchorvec.training.budget import Budget
from interrupting import STEPS, Killed, at_step, killed_after, log, weights
from support import Clock, recipe, write_rows

WAY = {"evaluation.at": [0, 3, 5, STEPS], "evaluation.every": 2}
"""Of both stages steps 2, 4 and 6; of Stage II also 3 and 5, what it starts from and what it ends with."""


def score_set(folder, name):
    """Documents of which some answer a query, in BEIR layout."""
    beir = folder / name
    (beir / "qrels").mkdir(parents=True)
    write_rows(beir / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"{i} {name} {i * i}"} for i in range(12)])
    write_rows(beir / "queries.jsonl", [{"_id": f"q{i}", "text": f"{name} {i}"} for i in range(8)])
    (beir / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(8))
    )
    return str(beir)


@pytest.fixture(scope="session")
def scored_values(interrupted_values, tmp_path_factory):
    """Those of runs that are interrupted, with two score sets and scores on the way."""
    folder = tmp_path_factory.mktemp("score_sets")
    sets = [score_set(folder, name) for name in ("owl", "fox")]
    return {**interrupted_values, "evaluation.data": sets, **WAY}


@pytest.fixture(scope="session")
def scored_run(scored_values, tmp_path_factory):
    """A run that nothing interrupted, with scores on the way."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    anchorvec.train(recipe({**scored_values, "output": str(folder)}))
    return folder


def points(folder):
    """The stages and steps of the curve."""
    return [(point["stage"], point["step"]) for point in Run(folder).curve()]


POINTS = [*(("stage_one", step) for step in (2, 4, 6, 7)), *(("stage_two", step) for step in (0, 2, 3, 4, 5, 6, 7))]


def test_training_goes_as_it_does_without(scored_run, uninterrupted):
    """Weights, losses, rows and checkpoints, bit for bit, of both stages; no model on the way is left."""
    assert points(scored_run) == POINTS
    found, expected = weights(scored_run), weights(uninterrupted)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert [record for record in log(scored_run) if "scores" not in record] == log(uninterrupted)
    assert not list(scored_run.glob("*_step_*"))


def test_the_scores_stand_beside_the_losses(scored_run):
    """In the log after that step's loss, in the order of training; both ends are the scores of start and end."""
    records = [json.loads(line) for line in (scored_run / "log.jsonl").read_text().splitlines()]
    scored = [record for record in records if "scores" in record]
    curve = Run(scored_run).curve()
    inner = [point for point in curve if point["step"] not in (0, STEPS)]
    assert [{key: record[key] for key in ("stage", "step", "scores")} for record in scored] == inner
    assert all(record["scoring_seconds"] > 0 for record in scored)
    places = [(record["stage"], record["step"], "scores" in record) for record in records]
    assert places == sorted(places)
    assert all(set(point["scores"]) == {"owl", "fox"} for point in curve)
    scores = json.loads((scored_run / "scores.json").read_text())
    ends = {("stage_two", 0): "stage_one", ("stage_one", STEPS): "stage_one", ("stage_two", STEPS): "stage_two"}
    for place, system in ends.items():
        [point] = [point for point in curve if (point["stage"], point["step"]) == place]
        assert point["scores"] == {task: of_task["main_score"] for task, of_task in scores[system].items()}
    assert len({json.dumps(point["scores"]) for point in curve}) > 3


@pytest.mark.parametrize(
    ("stage", "lora"),
    [
        ("stage_one", None),
        ("stage_one", {"r": 4, "alpha": 8, "dropout": 0.2}),
        ("stage_two", {"r": 4, "alpha": 8}),
        ("stage_two", None),
    ],
    ids=["Stage I", "Stage I, LoRA", "Stage II, LoRA", "Stage II"],
)
def test_the_model_on_the_way_is_that_of_a_stage_that_ends_there(scored_values, tmp_path, monkeypatch, stage, lora):
    """The constant rate makes it the same training: its weights are those of a run of so many steps."""
    other = "stage_two" if stage == "stage_one" else "stage_one"
    values = {key: value for key, value in scored_values.items() if not key.startswith((other, "evaluation.at"))}
    values |= {other: None, f"{stage}.schedule": "constant", f"{stage}.warmup_steps": 0, f"{stage}.lora": lora}
    values |= {"evaluation.every": 4, "model.max_tokens": 64, "data.max_tokens": 32}
    seen = []

    def kept(recipe, tests, model):
        seen.append(load_model(model))
        return {"owl": 0.5}

    monkeypatch.setattr("anchorvec.pipeline.score_on_the_way", kept)
    anchorvec.train(recipe({**values, "output": str(tmp_path / "way")}))
    short = {**values, "evaluation.every": None, f"{stage}.steps": 4, "output": str(tmp_path / "short")}
    anchorvec.train(recipe(short))
    [found], expected = seen, load_model(tmp_path / "short" / stage)
    assert found.max_seq_length == expected.max_seq_length == 64
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def canned(monkeypatch, scores, *, other=0.1):
    """The folders that are scored from here on; what they get is that of their step in `scores`, or `other`."""
    seen = []

    def score(recipe, tests, model):
        seen.append(model)
        found = scores.get(int(model.name.rpartition("_")[2]), other)
        if isinstance(found, BaseException):
            raise found
        return {"owl": found, "fox": found}

    monkeypatch.setattr("anchorvec.pipeline.score_on_the_way", score)
    return seen


def without_time(folder):
    """The records of a run, without what the clock decides."""
    return [{k: v for k, v in record.items() if k != "scoring_seconds"} for record in log(folder)]


@pytest.mark.parametrize("where", ["Stage I", "Stage II", "while it is scored"])
def test_a_killed_run_scores_no_step_before_its_checkpoint_again(
    scored_values, scored_run, tmp_path, monkeypatch, where
):
    """Those after it belong to steps that are made again. Log and curve are those of the run that was not killed."""
    score, scored = pipeline.score_on_the_way, []

    def recorded(recipe, tests, model):
        scored.append(model.name)
        if where == "while it is scored" and scored == ["stage_one_step_2", "stage_one_step_4", "stage_one_step_6"]:
            raise Killed
        return score(recipe, tests, model)

    monkeypatch.setattr("anchorvec.pipeline.score_on_the_way", recorded)
    asked = recipe({**scored_values, "output": str(tmp_path / "run")})
    with killed_after({"Stage I": 5, "Stage II": STEPS + 5}.get(where, 99)):
        anchorvec.train(asked)
    before = scored.copy()
    scored.clear()
    anchorvec.train(asked, resume=True)
    twice = {"while it is scored": {"stage_one_step_6"}}
    assert set(before) & set(scored) == twice.get(where, set())
    assert {*before, *scored} == {f"{stage}_step_{step}" for stage, step in POINTS if step not in (0, STEPS)}
    assert Run(tmp_path / "run").curve() == Run(scored_run).curve()
    assert without_time(tmp_path / "run") == without_time(scored_run)
    found, expected = weights(tmp_path / "run"), weights(scored_run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "run").glob("*_step_*"))


def test_a_signal_does_not_wait_for_scores(scored_values, scored_run, tmp_path, monkeypatch):
    """The step that it came in is scored when the run goes on."""
    asked = recipe({**scored_values, "stage_two": None, "evaluation.at": [], "output": str(tmp_path / "run")})
    with at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Interrupted):
        anchorvec.train(asked)
    assert points(tmp_path / "run") == POINTS[:1]
    anchorvec.train(asked, resume=True)
    assert Run(tmp_path / "run").curve() == Run(scored_run).curve()[:4]


def test_the_best_is_exported(scored_values, tmp_path, monkeypatch):
    """And what is kept for it is not lost where a run goes on from before a better one that does not come again."""
    values = {**scored_values, "stage_one": None, "evaluation.keep_best": True}
    values = {key: value for key, value in values.items() if not key.startswith("stage_one.")}
    asked = recipe({**values, "output": str(tmp_path / "run")})
    canned(monkeypatch, {2: 8.0, 3: 5.0, 5: 9.0})
    with killed_after(6):
        anchorvec.train(asked)
    assert sorted(path.name for path in (tmp_path / "run").glob("*_step_*")) == ["stage_two_step_2", "stage_two_step_5"]
    canned(monkeypatch, {})
    result = anchorvec.train(asked, resume=True)
    assert sorted(path.name for path in (tmp_path / "run").glob("*_step_*")) == ["stage_two_step_2"]
    assert result.export.stage.endswith("stage_two_step_2")
    texts = ["owl 1", "a fox"]
    exported, best, last = (
        load_model(tmp_path / "run" / name).encode(texts, prompt="")
        for name in ("model", "stage_two_step_2", "stage_two")
    )
    assert best == pytest.approx(exported, abs=1e-5)
    assert abs(last - exported).max() > 1e-4
    card = " ".join((tmp_path / "run" / "model" / "README.md").read_text().split())
    assert "the model after step 2 of 7 of Stage II: of the 7 steps that were scored, the one with the best" in card
    assert "Stage II, contrastive" in card
    assert anchorvec.train(asked, resume=True).export == result.export
    assert anchorvec.export(tmp_path / "run", tmp_path / "again").stage == result.export.stage


@pytest.mark.parametrize(("scores", "folder"), [({}, "base"), ({4: -1.0}, "stage_two")], ids=["start", "end"])
def test_the_best_may_be_the_start_or_the_end(scored_values, tmp_path, monkeypatch, scores, folder):
    """Which are in the run anyway."""
    ends = {"base": 1.0, "stage_two": 0.5} if folder == "base" else {"base": 0.5, "stage_two": 1.0}
    monkeypatch.setattr(
        "anchorvec.pipeline.main_scores",
        lambda scores, system, whole: {"owl": ends["base" if system == "untrained" else system]},
    )
    values = {key: value for key, value in scored_values.items() if not key.startswith("stage_one.")}
    canned(monkeypatch, scores)
    values |= {"stage_one": None, "evaluation.keep_best": True, "output": str(tmp_path / "run")}
    result = anchorvec.train(recipe(values))
    assert result.export.stage == str(tmp_path / "run" / folder)
    assert not list((tmp_path / "run").glob("*_step_*"))


def test_the_time_for_scores_is_none_of_the_training(scored_values, tmp_path, monkeypatch, capsys):
    """It is a part of the minutes of a run; but the schedule stands still, and none is begun that would not end."""
    clock = Clock()
    monkeypatch.setattr("anchorvec.training.budget.pace", lambda: 1.0)
    of_training = ("progress", "trainers", "budget", "scoring")
    for module in (*(f"training.{name}" for name in of_training), "pipeline", "resuming", "run_scores"):
        monkeypatch.setattr(f"anchorvec.{module}.time", clock)

    def slow(recipe, tests, model):
        clock.now += 10
        return {"owl": 0.5}

    monkeypatch.setattr("anchorvec.pipeline.score_on_the_way", slow)
    asked = anchorvec.load_recipe(
        "debug",
        [
            f"output={tmp_path / 'run'}",
            "stage_one=null",
            "stage_two.warmup_steps=0",
            f"evaluation.data={scored_values['evaluation.data']}",
            "evaluation.every=1",
            "evaluation.at=[500]",
        ],
    )
    result = anchorvec.train(asked, budget=Budget(3.9, began=0.0))
    assert result.minutes < 3.9
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scored = [record for record in records if "scores" in record]
    steps = [record for record in records if "loss" in record]
    assert len(scored) >= 3
    assert sum(record["scoring_seconds"] for record in scored) + steps[-1]["seconds"] < 3.9 * 60
    seconds = [record["seconds"] for record in records]
    assert max(b - a for a, b in itertools.pairwise(seconds)) < 20
    rates = [record["learning_rate"] for record in steps]
    assert rates == sorted(rates, reverse=True)
    falls = [before - after for before, after in itertools.pairwise(rates)]
    assert max(falls) < 2 * sorted(falls)[len(falls) // 2]
    assert rates[-1] < 0.25 * asked.stage_two.learning_rate
    said = capsys.readouterr().err
    assert "Stage II: no time is left for scores after step" in said
    assert f"evaluation.at: Stage II has {steps[-1]['step']} steps, so there are no scores after 500" in said


def test_a_step_that_is_never_made_is_said_before_the_work(scored_values, tmp_path, capsys, monkeypatch):
    """It is no error: a recipe that was given a time is saved with the steps that it made."""
    canned(monkeypatch, {})
    values = {**scored_values, "evaluation.at": [3, 8, 50], "evaluation.every": None, "output": str(tmp_path / "run")}
    anchorvec.train(recipe(values))
    said = capsys.readouterr().err
    assert said.index("Stage II has 7 steps, so there are no scores after 8, 50") < said.index("scoring: untrained")
    assert points(tmp_path / "run") == [("stage_two", 3), ("stage_two", STEPS)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluation.data": []}, "evaluation.at: there is nothing to score on; name test sets in evaluation.data"),
        ({"stage_two": None}, "evaluation.at: these are steps of Stage II, which is null"),
        (
            {"evaluation.at": [], "evaluation.every": None, "evaluation.keep_best": True},
            "evaluation.keep_best: no step but the last is scored; say after which",
        ),
        ({"evaluation.at": [-1]}, "evaluation.at.0: should be greater than or equal to 0, not -1"),
    ],
    ids=["no test set", "no Stage II", "no steps", "a negative step"],
)
def test_what_cannot_be_scored_is_refused(scored_values, tmp_path, values, message):
    """Before anything is written."""
    all_values = {**scored_values, **values}
    if "stage_two" in values:
        all_values = {key: value for key, value in all_values.items() if not key.startswith("stage_two.")}
    with pytest.raises(AnchorvecError, match=message):
        anchorvec.train(recipe({**all_values, "output": str(tmp_path / "run")}))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_disk_has_room_for_the_models_on_the_way(scored_values, tmp_path, monkeypatch):
    """One that is scored, and up to two that may be the best."""
    sizes = []
    for own in ({"evaluation.at": [], "evaluation.every": None}, {}, {"evaluation.keep_best": True}):
        full = type("Usage", (), {"free": 0})
        monkeypatch.setattr("anchorvec.disk.shutil.disk_usage", lambda folder, full=full: full)
        with pytest.raises(AnchorvecError, match="GB free, and the run needs") as refused:
            anchorvec.train(recipe({**scored_values, **own, "output": str(tmp_path / str(len(sizes)))}))
        sizes.append(
            dict(re.findall(r"(scored models of stage_\w+|stage_one|stage_two) ([\d.e-]+)", str(refused.value)))
        )
    assert "scored models of stage_two" not in sizes[0]
    for found, times in zip(sizes[1:], (1, 3), strict=True):
        assert float(found["scored models of stage_one"]) == pytest.approx(float(found["stage_one"]), rel=0.02)
        assert float(found["scored models of stage_two"]) == pytest.approx(times * float(found["stage_two"]), rel=0.02)


def test_a_report_draws_the_curve(scored_run):
    """From the record; its logs are those of the training."""
    run = read_run(scored_run)
    assert [(point.stage, point.step) for point in run.curve] == POINTS
    assert all("loss" in record for records in run.log.values() for record in records)
    assert set(run.tokens) == {"stage_one", "stage_two"}

"""How the quickstart divides its time; the whole of it runs in the gate, with the real model."""

import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from anchorvec.commands.quickstart import contrastive_alone, part_of, quickstart
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData
from anchorvec.pipeline import WholeSet, load_training_data, run_stages, train, with_steps
from anchorvec.recipe import load_recipe
from anchorvec.run import Run
from anchorvec.run_scores import seconds_of_whole
from anchorvec.start import build_base
from anchorvec.training.budget import Budget, Limit, Measured
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import train_stage_one
from anchorvec.training.stage_two import train_stage_two
from anchorvec.training.trainers import ReconstructionTrainer
from support import QUICK, Clock


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_a_stage_lasts_until_its_deadline(monkeypatch, tmp_path, stage):
    """It makes as many steps as fit, and its learning rate reaches 0 with the last of them, by the clock (T13)."""
    clock = Clock()
    for module in ("progress", "budget", "trainers"):
        monkeypatch.setattr(f"anchorvec.training.{module}.time", clock)
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", f"{stage}.steps=2", f"{stage}.warmup_steps=0"])
    run = Run(tmp_path / "run")
    start = build_base(recipe, run.base)
    inputs = load_training_data(recipe)
    records = []
    train_stage = train_stage_one if stage == "stage_one" else train_stage_two
    train_stage(Stage(stage, recipe, run, start, inputs, Limit(lambda: 60.0), records.append))
    assert records[-1]["step"] > 10  # more than the recipe's
    assert 50 < clock.now < 63  # as long as another step would have fitted
    assert run.steps() == {stage: records[-1]["step"]}
    rates = [record["learning_rate"] for record in records]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.15 * getattr(recipe, stage).learning_rate


@pytest.mark.parametrize(
    ("schedule", "at_70_percent"),
    [("linear", 0.3 / 0.9), ("cosine", (1 + math.cos(math.pi * 2 / 3)) / 2), ("constant", 1.0)],
)
def test_the_learning_rate_follows_the_clock(monkeypatch, tmp_path, schedule, at_70_percent):
    """With a deadline the share of the time stands for the share of the steps, warm-up included; else steps count."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    for module in ("budget", "trainers"):
        monkeypatch.setattr(f"anchorvec.training.{module}.time", clock)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    arguments = TrainingArguments(
        tmp_path, max_steps=1000, warmup_steps=100, learning_rate=2.0, lr_scheduler_type=name, use_cpu=True
    )
    rates = []
    for deadline in (180.0, None):
        clock.now = 100.0
        trainer = ReconstructionTrainer(nn.Linear(1, 1), arguments, micro_batch_tokens=1)
        trainer.limit = None if deadline is None else Limit(lambda: 260.0)
        trainer.kept_seconds = lambda: 80.0  # for scores on the way, in which no rate is spent
        trainer.create_optimizer()
        scheduler = trainer.create_scheduler(1000)
        trainer.optimizer.step()
        for clock.now in (104.0, 108.0, 156.0, 200.0):  # 5%, 10%, 70% of the time; after it
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
    assert rates[:2] == pytest.approx([1.0, 2.0])
    assert rates[2] == pytest.approx(2 * at_70_percent)
    assert rates[3] == pytest.approx(2.0 if schedule == "constant" else 0.0, abs=1e-9)
    assert rates[4:] == pytest.approx([0.02, 0.04, 0.06, 0.08])


def test_a_stage_whose_time_is_over_makes_one_step(tmp_path):
    """A folder is there to go on from, however long the set-up took; its learning rate has reached 0 (T13)."""
    # without a warm-up, which would start at a rate of 0 too
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", "stage_one.warmup_steps=0"])
    run = Run(tmp_path / "run")
    start = build_base(recipe, run.base)
    folder = train_stage_one(
        Stage("stage_one", recipe, run, start, load_training_data(recipe), limit=Limit(lambda: 0.0))
    )
    before, after = (load_file(stage / "model.safetensors") for stage in (start, folder))
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
    assert run.steps() == {"stage_one": 1}


def test_the_saved_recipe_has_the_steps_that_were_made():
    """The warm-up keeps its share of them."""
    recipe = load_recipe("quickstart", ["stage_two.steps=40", "stage_two.warmup_steps=2"])
    made = with_steps(recipe, "stage_two", 500)
    assert (made.stage_two.steps, made.stage_two.warmup_steps) == (500, 25)
    assert made.stage_one == recipe.stage_one


def test_the_contrastive_arm_has_no_words():
    """Without Stage I its loss is not beside Stage II's either; all else is the default's."""
    recipe = load_recipe("quickstart")
    alone = contrastive_alone(recipe)
    assert recipe.stage_one is not None
    assert recipe.stage_two.bag_of_words_weight > 0
    assert alone.stage_one is None
    assert alone.stage_two == recipe.stage_two.model_copy(update={"bag_of_words_weight": 0.0})
    assert (alone.model, alone.data) == (recipe.model, recipe.data)
    with pytest.raises(AnchorvecError, match="both stages are off"):
        contrastive_alone(recipe.model_copy(update={"stage_two": None}))


@pytest.mark.parametrize("minutes", [0, -5, float("nan"), float("inf")])
def test_no_time_is_refused_at_once(tmp_path, minutes):
    """Nothing is read or written."""
    with pytest.raises(AnchorvecError, match="no time to train in"):
        quickstart(tmp_path / "run", minutes=minutes)
    assert not (tmp_path / "run").exists()


def test_any_recipe_runs_for_a_time(tmp_path, monkeypatch):
    """Instead of its steps, which are saved as they were made; a tenth of the time is Stage I's."""
    clock = Clock()
    monkeypatch.setattr("anchorvec.training.budget.pace", lambda: 1.0)  # however busy this machine is
    of_training = (f"training.{name}" for name in ("progress", "trainers", "budget"))
    for module in (*of_training, "pipeline", "resuming"):
        monkeypatch.setattr(f"anchorvec.{module}.time", clock)
    overrides = [f"output={tmp_path / 'run'}", "stage_one.warmup_steps=0", "stage_two.warmup_steps=0"]
    result = train(load_recipe("debug", overrides), budget=Budget(3.0, began=0.0))
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert result.steps == {"stage_one": recipe.stage_one.steps, "stage_two": recipe.stage_two.steps}
    assert result.steps["stage_two"] > 4 * result.steps["stage_one"]
    assert 2.3 < result.minutes < 2.6  # but for the half minute of the export, which no clock saw
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    with pytest.raises(AnchorvecError, match="minutes: -1"):
        Budget(-1)


def test_the_docstrings_are_read_beside_the_base(tmp_path):
    """By another process, also where it is started by a script that does not guard its lines."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "print('started', flush=True)\n"
        "from pathlib import Path\n"
        "from anchorvec.commands import quickstart\n"
        "from anchorvec.recipe import load_recipe\n"
        "from anchorvec.run import Run\n"
        "quickstart.docstrings.quickstart_data = lambda **asked: (os.getpid(), asked['n_queries'])\n"
        "run = Run(Path('run'))\n"
        "pid, queries = quickstart._data_and_base(load_recipe('debug', ['output=run']), run)\n"
        "print(pid != os.getpid(), queries, (run.base / 'modules.json').is_file())\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["started", "True", "500", "True"], done.stderr


def test_a_budget_leaves_time_for_scoring_and_the_export(monkeypatch):
    """What is left of ten minutes is divided: a tenth for Stage I; the last scoring takes longer."""
    monkeypatch.setattr("anchorvec.training.budget.pace", lambda: 1.0)
    budget = Budget(10.0, began=time.monotonic())
    scoring = Measured(45.0, 1.0)
    first, second = (budget.deadline(stages, scoring, 20.0)() - budget.began for stages in (2, 1))
    assert first == pytest.approx(0.1 * (600 - 30 - 45 - 65), abs=1)
    assert second == pytest.approx(600 - 30 - 65, abs=1)
    assert budget.left() == pytest.approx(600 - 30, abs=1)
    budget.check(2, scoring, 20.0)
    with pytest.raises(AnchorvecError, match=r"the time is too short: 50 s are left .*; give 11 minutes or more"):
        budget.check(2, Measured(240.0, 1.0), 40.0)
    assert Budget().deadline(2, scoring) is None


def test_a_deadline_moves_when_the_machine_slows_down(monkeypatch):
    """Scoring and export will take as many times as long, by the fastest of three looks, noise left aside."""
    machine = SimpleNamespace(pace=1.0, now=1000.0)
    monkeypatch.setattr("anchorvec.training.budget.pace", lambda: machine.pace)
    monkeypatch.setattr("anchorvec.training.budget.time", SimpleNamespace(monotonic=lambda: machine.now))
    deadline = Budget(10.0, began=1000.0).deadline(1, Measured(50.0, 1.0), 40.0)
    machine.pace = 2.0
    assert deadline() == pytest.approx(1000 + 600 - 30 - 90)
    looks = [(2.0, 1.0), (2.0, 1.0), (3.0, 2.0), (3.0, 2.0), (3.0, 3.0), (1.1, 1.0), (9.0, 1.0), (9.0, 1.0), (9.0, 9.0)]
    looks += [(0.9, 1.0), (0.5, 0.5)]  # faster than it was
    for machine.pace, times in looks:
        machine.now += 21.0
        # what can be left out takes no more than a quarter of the time
        assert deadline() == pytest.approx(1000 + 600 - times * (30 + 50) - min(times * 40, 150))


def test_a_burst_of_other_programs_ends_no_stage(monkeypatch):
    """A hundred seconds in which all takes four times as long, early in ten minutes: the rest of the time is used."""
    machine = SimpleNamespace(now=0.0)
    monkeypatch.setattr("anchorvec.training.budget.pace", lambda: 4.0 if 130 < machine.now < 230 else 1.0)
    monkeypatch.setattr("anchorvec.training.budget.time", SimpleNamespace(monotonic=lambda: machine.now))
    deadline = Budget(10.0, began=0.0).deadline(1, Measured(20.0, 1.0), 80.0)
    while machine.now < deadline():
        machine.now += 4.0
    assert machine.now == pytest.approx(600 - 30 - 20 - 80, abs=4)


@pytest.mark.parametrize(("minutes", "at_the_end"), [(None, {"part", "whole"}), (1.6, {"part"})])
def test_the_whole_set_is_scored_at_the_end_if_its_time_is_there(tmp_path, monkeypatch, capsys, minutes, at_the_end):
    """By BM25 and the last stage; where no time is left for that, a line says so."""
    documents = {"d": {"title": "", "text": "a"}, "e": {"title": "", "text": "b"}}
    part, whole = (BeirData(documents, {"q": "a"}, {"q": {"d": 1}}, name) for name in ("part", "whole"))
    monkeypatch.setattr("anchorvec.training.budget._LEAST_SECONDS", -1e9)
    overrides = ["evaluation.bm25=true", "evaluation.data=[part]", f"output={tmp_path / 'run'}", *QUICK]
    recipe = load_recipe("debug", overrides)
    budget = Budget(minutes, began=time.monotonic() - 60 * (minutes or 0))
    run = Run.create(tmp_path / "run")
    found = run_stages(
        recipe, run, load_training_data(recipe), [part], budget=budget, whole=WholeSet(whole, times=5.0)
    ).scores
    assert {name: set(scores) for name, scores in found.items()} == {
        "bm25": {"part", "whole"},
        "untrained": {"part"},
        "stage_one": {"part"},
        "stage_two": at_the_end,
    }
    assert ("whole: no time is left to score" in capsys.readouterr().err) == (at_the_end == {"part"})


def test_a_whole_set_that_takes_too_long_is_left_out_before_training(tmp_path, monkeypatch, capsys):
    """Where it would take more than a quarter of the time; what is left is for training."""
    assert Budget(10.0).affords(150.0)
    assert not Budget(10.0).affords(151.0)
    assert Budget().affords(1e9)
    documents = {"d": {"title": "", "text": "a"}, "e": {"title": "", "text": "b"}}
    part, whole = (BeirData(documents, {"q": "a"}, {"q": {"d": 1}}, name) for name in ("part", "whole"))
    recipe = load_recipe("debug", ["evaluation.data=[part]", f"output={tmp_path / 'run'}", *QUICK])
    run, inputs = Run.create(tmp_path / "run"), load_training_data(recipe)
    monkeypatch.setattr("anchorvec.training.budget._LEAST_SECONDS", -1e9)
    over = Budget(10.0, began=time.monotonic() - 600)  # each stage makes one step
    found = run_stages(recipe, run, inputs, [part], budget=over, whole=WholeSet(whole, times=1e9)).scores
    assert set(found["stage_two"]) == {"part"}
    assert "whole: scoring on the whole of it would take" in capsys.readouterr().err


def test_the_part_of_the_score_set_is_a_part():
    """Its queries and documents are those of the whole, and the same ones at every call."""
    documents = {f"d{i}": {"title": "", "text": f"text {i}"} for i in range(60)}
    whole = BeirData(documents, {f"q{i}": f"query {i}" for i in range(25)}, {f"q{i}": {f"d{i}": 1} for i in range(25)})
    part = part_of(whole, queries=10, documents=24)
    assert (len(part.queries), len(part.corpus)) == (10, 24)
    assert part.queries.items() <= whole.queries.items()
    assert part.corpus.items() <= whole.corpus.items()
    assert part.qrels == {query: whole.qrels[query] for query in part.queries}
    assert {document for of_query in part.qrels.values() for document in of_query} <= set(part.corpus)
    assert part_of(whole, queries=10, documents=24) == part


@pytest.mark.slow
def test_too_little_time_is_an_error_before_training(tmp_path):
    """Found once a scoring has been timed; the error says how many minutes would do."""
    with pytest.raises(AnchorvecError, match=r"the time is too short: 0 s are left .*; give \d+ minutes or more"):
        quickstart(tmp_path / "run", minutes=0.01, overrides=["model.base=tiny"])
    assert not (tmp_path / "run" / "stage_one").exists()


def test_steps_that_ran_are_read_from_the_log(tmp_path):
    """The last record of each stage counts."""
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"stage": "stage_one", "step": 1}\n{"stage": "stage_one", "step": 2}\n{"stage": "stage_two", "step": 9}\n'
    )
    assert Run(tmp_path).steps() == {"stage_one": 2, "stage_two": 9}


@pytest.mark.slow
def test_the_whole_quickstart_on_the_tiny_model(tmp_path):
    """With a model of random weights: scores with intervals, an export, and the wall time that was given."""
    result = quickstart(tmp_path / "run", minutes=3, seed=7, overrides=["model.base=tiny"])
    assert list(result.scores) == ["bm25", "untrained", "stage_one", "stage_two"]
    assert list(result.whole_scores) == ["bm25", "stage_two"]
    assert (result.score_set["score_queries"], result.score_set["seed"]) == (500, 0)
    assert {scores.counts["queries"] for scores in result.scores.values()} == {100}
    assert {scores.counts["queries"] for scores in result.whole_scores.values()} == {500}
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert result.minutes <= 3.3
    recipe = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert result.steps == {"stage_one": recipe.stage_one.steps, "stage_two": recipe.stage_two.steps}


def test_the_whole_set_is_reckoned_by_scores_of_the_part():
    """By those of the model that is asked for: the last one's tell how fast the machine is now."""
    taken = {"untrained": 9.0, "stage_two": 2.0}
    scores = {system: {"part": SimpleNamespace(seconds=seconds)} for system, seconds in taken.items()}
    whole = WholeSet(None, times=5.0)
    assert [seconds_of_whole(whole, scores, system) for system in taken] == [45.0, 10.0]

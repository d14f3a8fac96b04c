"""How the quickstart divides its time; the whole of it runs in the gate, with the real model."""

import pytest

from anchorvec.errors import AnchorvecError
from anchorvec.quickstarting import contrastive_alone, measure_step, plan_steps, quickstart, steps_run
from anchorvec.recipe import load_recipe
from anchorvec.training import build_base, load_training_data


def test_steps_fill_the_seconds_that_are_left():
    """As many steps as fit into 92% of the time; Stage I gets one at least, Stage II too little time is an error."""
    recipe = load_recipe("quickstart")
    assert plan_steps(recipe, "stage_two", 10.0, 440.0).stage_two.steps == 40
    assert plan_steps(recipe, "stage_two", 10.0, 440.0).stage_two.warmup_steps == 2
    assert plan_steps(recipe, "stage_one", 10.0, 5.0).stage_one.steps == 1
    with pytest.raises(AnchorvecError, match="give more --minutes"):
        plan_steps(recipe, "stage_two", 10.0, 5.0)


def test_a_step_is_measured_by_running_some(tmp_path):
    """Both stages are timed on the real path, in scratch folders, and leave the start as it was."""
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}"])
    start = build_base(recipe, tmp_path / "base")
    before = sorted(path.name for path in tmp_path.iterdir())
    pairs = load_training_data(recipe)
    for stage in ("stage_one", "stage_two"):
        set_up, step = measure_step(recipe, stage, start, pairs)
        assert 0 < set_up < 60
        assert 0 < step < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_contrastive_arm_has_no_words():
    """Without Stage I its loss is not beside Stage II's either; all else is the default's."""
    recipe = load_recipe("quickstart")
    alone = contrastive_alone(recipe)
    assert recipe.stage_one is not None
    assert recipe.stage_two.words_weight > 0
    assert alone.stage_one is None
    assert alone.stage_two == recipe.stage_two.model_copy(update={"words_weight": 0.0})
    assert (alone.model, alone.data) == (recipe.model, recipe.data)
    with pytest.raises(AnchorvecError, match="both stages are off"):
        contrastive_alone(recipe.model_copy(update={"stage_two": None}))


@pytest.mark.parametrize("minutes", [0, -5, float("nan"), float("inf")])
def test_no_time_is_refused_at_once(tmp_path, minutes):
    """Nothing is read or written."""
    with pytest.raises(AnchorvecError, match="no time to train in"):
        quickstart(tmp_path / "run", minutes=minutes)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_too_little_time_is_an_error_before_training(tmp_path):
    """Too few minutes for a step of each stage are found once a step has been measured."""
    with pytest.raises(AnchorvecError, match="the time is too short: 0 s are left for training"):
        quickstart(tmp_path / "run", minutes=0.01, overrides=["model.base=tiny"])
    assert not (tmp_path / "run" / "stage_one").exists()


def test_steps_that_ran_are_read_from_the_log(tmp_path):
    """The last record of each stage counts."""
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"stage": "stage_one", "step": 1}\n{"stage": "stage_one", "step": 2}\n{"stage": "stage_two", "step": 9}\n'
    )
    assert steps_run(log) == {"stage_one": 2, "stage_two": 9}


@pytest.mark.slow
def test_the_whole_quickstart_on_the_tiny_model(tmp_path):
    """With a model of random weights: four scores with intervals, an export, and the wall time that was given."""
    result = quickstart(tmp_path / "run", minutes=3, overrides=["model.base=tiny"])
    assert list(result.scores) == ["bm25", "untrained", "stage_one", "stage_two"]
    assert result.score_set["score_queries"] == 100
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert result.minutes <= 3.3
    assert all(0 < result.steps[stage] <= planned for stage, planned in result.planned_steps.items())

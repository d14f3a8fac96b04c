"""Runs that last for decoder tokens: how many, the schedule to its end, between the stages, and over a kill."""

import json

import pytest

import anchorvec
from anchorvec.errors import AnchorvecError
from anchorvec.run import Run
from anchorvec.training.budget import Budget, Limit
from interrupting import assert_same_run, killed_after
from support import recipe

VALUES = {
    f"{stage}.{key}": value
    for stage in ("stage_one", "stage_two")
    for key, value in {"pairs_per_step": 4, "warmup_steps": 2, "save_steps": 2, "log_every": 1}.items()
}
TOKENS = 12_000


def asked(folder, **values):
    """The debug recipe with small steps; what it says of steps means only shares."""
    return recipe({**VALUES, "output": str(folder), "model.precision": "fp32", **values})


@pytest.fixture(scope="module")
def spent(tmp_path_factory):
    """A run of so many tokens, of which three tenths are Stage I's."""
    folder = tmp_path_factory.mktemp("tokens") / "run"
    result = anchorvec.train(asked(folder), budget=Budget(tokens=TOKENS, stage_one_share=0.3))
    return Run(folder), result


def records(run, stage):
    """Those of the log."""
    lines = (json.loads(line) for line in run.log.read_text().splitlines())
    return [record for record in lines if record["stage"] == stage]


def test_a_run_takes_so_many_tokens_and_no_more(spent):
    """Less than another step would have been is left; Stage I has its share, Stage II all that is left."""
    run, result = spent
    tokens, steps = run.tokens(), run.steps()
    assert result.steps == steps
    of_step = {stage: tokens[stage] / steps[stage] for stage in tokens}
    assert 0.3 * TOKENS - 1.5 * of_step["stage_one"] < tokens["stage_one"] <= 0.3 * TOKENS + of_step["stage_one"]
    assert TOKENS - 1.5 * of_step["stage_two"] < sum(tokens.values()) <= TOKENS + 0.5 * of_step["stage_two"]


def test_the_learning_rate_follows_the_tokens_to_its_end(spent):
    """It rises over the warm-up's share of the recipe's steps, and falls with what is used to about 0 (T13)."""
    run, _ = spent
    for stage in ("stage_one", "stage_two"):
        of_stage = records(run, stage)
        limit = 0.3 * TOKENS if stage == "stage_one" else TOKENS - run.tokens()["stage_one"]
        used = [0.0, *(record["tokens"] / limit for record in of_stage)]
        for before, record in zip(used, of_stage, strict=False):
            share = min(before / 0.1, (1 - before) / 0.9)  # of 20 steps 2 are warm-up
            assert record["learning_rate"] == pytest.approx(1e-3 * share, abs=2e-6)
        assert of_stage[-1]["learning_rate"] < 0.5e-3
    assert Limit(tokens=100).used(0.0, 25) == 0.25


def test_the_saved_recipe_and_record_have_what_was_made(spent):
    """Steps as they came, the budget, and after each step a hash of the rows so far."""
    run, result = spent
    made = anchorvec.load_recipe(run.recipe)
    assert {"stage_one": made.stage_one.steps, "stage_two": made.stage_two.steps} == result.steps
    assert run.noted("budget") == {"minutes": None, "tokens": TOKENS, "stage_one_share": 0.3}
    rows = run.read_rows()
    assert {stage: len(hashes) for stage, hashes in rows.items()} == result.steps
    for stage, hashes in rows.items():
        assert [record["rows"] for record in records(run, stage)] == hashes


def test_a_killed_run_goes_on_with_the_tokens_it_had_left(spent, tmp_path):
    """Bit for bit, and not with another number of them."""
    run, result = spent
    with killed_after(result.steps["stage_one"] + 3):
        anchorvec.train(asked(tmp_path / "run"), budget=Budget(tokens=TOKENS, stage_one_share=0.3))
    with pytest.raises(AnchorvecError, match=r"tokens: .* was begun with 12,000 tokens, not with 5 tokens"):
        anchorvec.train(asked(tmp_path / "run"), budget=Budget(tokens=5), resume=True)
    anchorvec.train(asked(tmp_path / "run"), resume=True)
    assert_same_run(tmp_path / "run", run.folder)
    assert Run(tmp_path / "run").read_rows() == run.read_rows()


def test_a_budget_is_one_of_two():
    """And more than nothing."""
    with pytest.raises(AnchorvecError, match="tokens: 0 is nothing to train on"):
        Budget(tokens=0)
    with pytest.raises(AnchorvecError, match="a time or tokens, not both"):
        Budget(5.0, tokens=5)


@pytest.mark.parametrize("values", [{"model.read": "twice"}, {"model.end": {"before": "", "after": " so:"}}], ids=str)
def test_rows_are_the_same_whatever_reads_them(spent, tmp_path, values):
    """Their hashes are those of the texts in the data; an arm that needs more tokens a pair stops earlier in them."""
    run, _ = spent
    budget = Budget(tokens=3_000, stage_one_share=0.3)
    anchorvec.train(asked(tmp_path / "run", **values, **{"stage_one": None}), budget=budget)
    found = Run(tmp_path / "run").read_rows()["stage_two"]
    assert 0 < len(found) < len(run.read_rows()["stage_two"])
    assert run.read_rows()["stage_two"][: len(found)] == found
    anchorvec.train(asked(tmp_path / "other", **{"stage_one": None, "seed": 1}), budget=budget)
    assert Run(tmp_path / "other").read_rows()["stage_two"][0] != found[0]

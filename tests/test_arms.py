"""The systems that the paper compares with, as recipes: each trains on a tiny model, and is what it says it is."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer

import anchorvec
from anchorvec.recipe import load_arm, recipe_names
from anchorvec.recipe.reading import SHIPPED

ARMS = [name for name in recipe_names() if name.startswith("arms/") and name != "arms/base"]
TINY = ["model.base=tiny", "data.train=[{path: 'builtin:debug', instruction: 'find:'}]"]
STEPS = {"steps": 3, "warmup_steps": 1, "pairs_per_step": 8}


RARE = {"arms/llama2vec": ["stage_one.max_df=0.8"]}
"""The tiny model's tokens are letters, of which few are rare."""


def tiny(name, *more):
    """The arm on the tiny model and the toy corpus, a few steps a stage."""
    stages = anchorvec.load_recipe(name).stages
    quick = [f"{stage}.{key}={value}" for stage in stages for key, value in STEPS.items()]
    return anchorvec.load_recipe(name, [*TINY, *quick, *RARE.get(name, []), *more])


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_trains_and_its_folder_has_the_vectors_of_the_run(name, tmp_path):
    """In plain sentence-transformers and transformers; plan and card say what it is."""
    asked = tiny(name, f"output={tmp_path / 'run'}")
    result = anchorvec.train(asked)
    assert list(result.steps) == asked.stages
    assert min(result.export.cosines.values()) > 0.9999
    assert [key.split()[0] for key in result.export.cosines] == ["sentence-transformers", "transformers"]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    plan = anchorvec.plan(tiny(name), step=False)
    assert asked.about
    assert asked.about in card
    assert plan.description["what it is"] == asked.about
    assert plan.description["a text is"] in card
    assert list(plan.description)[2:] == asked.stages
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(record["loss"] > 0 for record in records)


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_a_small_difference_from_one_recipe(name):
    """A few lines, nothing of data or evaluation, so that it can be laid over another recipe too."""
    lines = (SHIPPED / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 24
    base = anchorvec.load_recipe("arms/base")
    arm = anchorvec.load_recipe(name)
    assert (arm.data, arm.evaluation, arm.model.base) == (base.data, base.evaluation, base.model.base)
    assert load_arm("arms/base", name) == arm
    assert load_arm("debug", name).model.base == "tiny"


def test_contrastive_learning_alone_has_as_many_steps_as_two_stages():
    """Of the recipe that all arms extend."""
    base, long = (anchorvec.load_recipe(f"arms/{name}") for name in ("base", "e5-long"))
    assert long.stage_two.steps == base.stage_one.steps + base.stage_two.steps
    assert base.stage_one.pairs_per_step == base.stage_two.pairs_per_step


def test_an_arm_learns(tmp_path):
    """Its loss falls, and its vectors are no longer those of the base."""
    anchorvec.train(tiny("arms/echo", f"output={tmp_path / 'run'}", "stage_two.steps=20", "stage_two.log_every=1"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    before, after = (
        SentenceTransformer(str(tmp_path / "run" / name), device="cpu").encode(["fish"], convert_to_tensor=True)
        for name in ("base", "model")
    )
    assert torch.cosine_similarity(before, after) < 0.999


BOTH_WAYS = ["model.attention_direction=bidirectional"]
BAGS = ["stage_one.target=bag_of_words", "stage_one.candidates=vocabulary"]
REFUSED = [
    (["stage_one.target=masked"], r"stage_one\.target: masked tokens are told from those on both sides"),
    (["stage_one.target=masked", *BOTH_WAYS, "model.read=twice"], r"stage_one\.target: one copy would show"),
    (
        ["stage_one.masking.mask_replace_prob=0.95"],
        r"mask_replace_prob, stage_one\.masking\.random_replace_prob: together they are more than all",
    ),
    (BAGS[1:], r"stage_one\.candidates: candidates are those of bags of words"),
    ([*BAGS[:1], "stage_one.source=own"], r"stage_one\.source: it is for candidates: vocabulary"),
    ([*BAGS, *BOTH_WAYS], r"stage_one\.lm_weight: a token is predicted .* attention in both directions shows it"),
    ([*BAGS, "model.read=twice"], r"stage_one\.lm_weight: .* the first copy of a text shows it"),
    (
        ["stage_two.generation_weight=1", "model.read=twice"],
        r"stage_two\.generation_weight: a document is written after",
    ),
    (["model.end=none"], r"model\.end: `none` leaves nothing to pool the last token's state at"),
    (["model.read=twice", "model.pooling=mean"], r"model\.pooling: mean would pool both copies of a text"),
    (["model.between=x"], r"model\.between: there are no copies to stand between"),
    (["model.pool_prompt=false"], r"model\.pool_prompt: false is for means"),
    (
        ["model.pool_prompt=false", "model.pooling=mean", "model.end={before: a, after: b}"],
        r"model\.end: sentence-transformers takes the words after a text for a part of its prompt",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_can_not_be_is_refused_before_any_work(values, message):
    """One line says which keys don't go together, and what to write."""
    with pytest.raises(anchorvec.AnchorvecError, match=message):
        anchorvec.load_recipe("debug", values)

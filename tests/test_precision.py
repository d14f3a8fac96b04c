"""The number format: chosen once, fp32 where weights are kept."""

import pytest
import torch
from safetensors.torch import load_file

from anchorvec.precision import resolve_precision
from anchorvec.recipe import load_recipe
from anchorvec.training import train


def test_a_named_precision_is_taken_and_auto_is_stable():
    """`auto` measures once and gives one of the two."""
    assert resolve_precision("bf16") == "bf16"
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("auto") in ("bf16", "fp32")
    assert resolve_precision("auto") == resolve_precision("auto")


@pytest.mark.parametrize("words", [[], ["stage_one.target=words", "stage_two.words_weight=1"]], ids=["text", "words"])
def test_bf16_training_keeps_fp32_weights(tmp_path, words):
    """Under bf16 autocast both stages train fp32 master weights, and updates below bf16's resolution survive (T9)."""
    small_steps = ["stage_one.learning_rate=1e-5", "stage_two.learning_rate=1e-5", "model.precision=bf16"]
    few = ["stage_one.steps=3", "stage_one.warmup_steps=0", "stage_two.steps=3", "stage_two.warmup_steps=0"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *small_steps, *few, *words]))
    weights = [
        load_file(tmp_path / "run" / stage / "model.safetensors") for stage in ("base", "stage_one", "stage_two")
    ]
    name = "layers.0.mlp.up_proj.weight"
    base, one, two = weights[0][f"model.{name}"], weights[1][f"model.{name}"], weights[2][name]
    assert {base.dtype, one.dtype, two.dtype} == {torch.float32}
    assert 0 < (one - base).abs().max() < 1e-4
    assert 0 < (two - one).abs().max() < 1e-4

"""The number format: chosen once, fp32 where weights are kept."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from anchorvec.device import keep_frozen_in_bf16, resolve_precision
from anchorvec.pipeline import train
from anchorvec.recipe import load_recipe
from support import FAMILIES, make_model


def test_a_named_precision_is_taken_and_auto_is_stable():
    """`auto` measures once and gives one of the two."""
    assert resolve_precision("bf16") == "bf16"
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("auto") in ("bf16", "fp32")
    assert resolve_precision("auto") == resolve_precision("auto")


@pytest.mark.parametrize(
    "words", [[], ["stage_one.target=bag_of_words", "stage_two.bag_of_words_weight=1"]], ids=["text", "words"]
)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_weights_in_bf16_change_nothing(family):
    """Under autocast, states and gradients of LoRA are the same bits as with frozen weights in fp32."""
    model = make_model(family).float().base_model
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def states_and_gradients():
        with torch.autocast("cpu", torch.bfloat16):
            states = model(torch.arange(12)[None], use_cache=False).last_hidden_state
        return states, torch.autograd.grad(states.float().sin().sum(), list(trained.values()))

    states, gradients = states_and_gradients()
    keep_frozen_in_bf16(model)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = [p.dtype for p in model.parameters() if not p.requires_grad and p.dim() == 2]
    assert frozen.count(torch.bfloat16) == 14  # of two layers
    new_states, new_gradients = states_and_gradients()
    assert torch.equal(states, new_states)
    assert all(gradient.any() for gradient in gradients)
    assert all(map(torch.equal, gradients, new_gradients))

"""Adapters that add to what their layers give in one operation."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from anchorvec.model.base import tiny_causal_lm
from anchorvec.pipeline import train
from anchorvec.recipe import load_recipe
from anchorvec.training.lora import fuse_adapters, lora_config, merged


def adapted(dtype=torch.float64):
    """A small decoder with adapters that do something, and the same one with its adapters fused."""
    model = tiny_causal_lm(seed=1).to(dtype)
    get_peft_model(model, lora_config(model.model, r=4, alpha=12, dropout=0.0))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    fused = copy.deepcopy(model)
    fuse_adapters(fused)
    assert any(type(module).__name__ == "_FusedLinear" for module in fused.modules())
    return model, fused


def states_and_gradients(model, ids, **autocast):
    """The states of the texts `ids`, and the gradients of the adapters from a function of them."""
    with torch.autocast("cpu", **autocast):
        states = model.model(ids).last_hidden_state
    states.float().square().mean().backward()
    return states.detach().double(), torch.cat(
        [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    )


def distance(one, other):
    """How far the two are apart, in relation to the first."""
    return float((one - other).norm() / one.norm())


def test_fused_adapters_compute_the_same():
    """X W' + scale (x A') B', value and gradient, to 1e-12 in fp64."""
    plain, fused = adapted()
    ids = torch.arange(24).view(2, 12)
    for one, other in zip(*(states_and_gradients(m, ids, enabled=False) for m in (plain, fused)), strict=True):
        assert distance(one, other) < 1e-12


def test_fused_adapters_are_as_near_to_fp32_in_bf16():
    """Under autocast they are no further from fp32 than peft's own are, by a tenth."""
    plain, fused = adapted(torch.float32)
    ids = torch.arange(48).view(2, 24)
    right = states_and_gradients(copy.deepcopy(plain), ids, enabled=False)
    own = states_and_gradients(plain, ids, dtype=torch.bfloat16)
    ours = states_and_gradients(fused, ids, dtype=torch.bfloat16)
    for exact, one, other in zip(right, own, ours, strict=True):
        assert distance(exact, other) < 1.1 * distance(exact, one)


def test_fused_adapters_are_peft_s_own_otherwise():
    """They are left out where they are disabled, and merged into their layers as ever."""
    plain, fused = adapted()
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = plain.model(ids).last_hidden_state
        for module in fused.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        without = fused.model(ids).last_hidden_state
        base = tiny_causal_lm(seed=1).double().model(ids).last_hidden_state
        assert torch.equal(without, base)
        for module in fused.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(True)
        assert distance(expected, merged(fused).model(ids).last_hidden_state) < 1e-12


def test_dropout_acts_in_fused_adapters():
    """In training; not in evaluation."""
    model = tiny_causal_lm(seed=1)
    get_peft_model(model, lora_config(model.model, r=4, alpha=12, dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    fuse_adapters(model)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        model.train()
        assert not torch.equal(model.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
        model.eval()
        assert torch.equal(model.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("bf16", [True, False])
def test_stage_two_fuses_them_in_bf16_alone(monkeypatch, tmp_path, bf16):
    """fp32 stays what it was, to the bit."""
    called = []
    monkeypatch.setattr("anchorvec.training.stage_two.fuse_adapters", called.append)
    short = ["stage_one=null", "stage_two.steps=1", "stage_two.warmup_steps=0"]
    adapters = ["stage_two.lora={r: 2, alpha: 4, dropout: 0}", f"model.precision={'bf16' if bf16 else 'fp32'}"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *short, *adapters]))
    assert bool(called) is bf16

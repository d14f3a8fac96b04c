"""Weights that are converted to bf16 once a step give what autocast gives by converting them at each use."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.reconstruction import TextReconstruction
from support import make_model, make_pairs


@pytest.mark.parametrize("tied", [True, False])
def test_cast_once_is_autocast(tied):
    """Loss bit for bit, gradients to fp32's rounding, over two micro-batches of each of two steps of SGD."""
    found = []
    for cast_once in (False, True):
        model = make_model(tied=tied).float().train()
        objective = TextReconstruction(model, packed=True)
        working = WorkingWeights(objective) if cast_once else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for seed in (0, 1):
            pairs = make_pairs(8)[seed::2]
            optimizer.zero_grad()
            with working.in_use() if working else nullcontext():
                for part in (pairs[:2], pairs[2:]):
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = objective(part).loss
                    loss.backward()
                    losses.append(loss.detach())
            optimizer.step()
        found.append(
            (torch.stack(losses), [p.detach() for p in model.parameters()], [p.grad for p in model.parameters()])
        )
    (losses, weights, gradients), (losses_once, weights_once, gradients_once) = found
    assert torch.equal(losses, losses_once)
    for a, b in zip([*weights, *gradients], [*weights_once, *gradients_once], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)


def test_the_fp32_weights_stand_again_after_a_step():
    """The layers hold bf16 copies within a step only; what is frozen gets no gradient."""
    model = make_model(tied=False).float()
    model.get_output_embeddings().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    working = WorkingWeights(model)

    def step_that_fails():
        with working.in_use():
            assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert model.model.norm.weight.dtype == torch.float32
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step_that_fails()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with working.in_use(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(4)[None], use_cache=False).logits.float().sum().backward()
    assert parameters["lm_head.weight"].grad is None
    assert parameters["model.layers.0.mlp.up_proj.weight"].grad.dtype == torch.float32


def test_lora_adapters_have_copies_too():
    """The adapters' gradients are those under autocast, to bf16's rounding; the copies follow the weights."""
    found = []
    for cast_once in (False, True):
        torch.manual_seed(0)
        model = make_model().float()
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        working = WorkingWeights(model) if cast_once else None
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)  # after the copies were made first
        with working.in_use() if working else nullcontext(), torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=torch.arange(9)[None], use_cache=False).logits.float().sin().sum()
            loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-2, atol=1e-2)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).norm() <= 3e-2 * a.norm()

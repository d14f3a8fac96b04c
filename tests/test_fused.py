"""For a step on a GPU norms, rotation and products of one input are few operations, with the same result."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from anchorvec.model import fused
from anchorvec.model.attention import PACKED_ATTENTION
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.reconstruction import TextReconstruction
from support import FAMILIES, make_model, make_pairs
from test_compiling import gpu_path

__all__ = ["gpu_path"]


def step(family, fuse, dtype=torch.bfloat16, packed=True):
    """Loss and gradients of two micro-batches; `fuse` None: in fp32."""
    model = make_model(family).float().train()
    objective = TextReconstruction(model)
    if packed:
        model.set_attn_implementation(PACKED_ATTENTION)
        objective.packed = True
    working = WorkingWeights(objective, fuse=fuse) if fuse is not None else None
    losses = []
    with working.in_use() if working else nullcontext():
        for part in (make_pairs(8)[:4], make_pairs(8)[4:]):
            with torch.autocast("cpu", dtype, enabled=fuse is not None):
                loss = objective(part, targets=(50, 20)).loss
            loss.backward()
            losses.append(loss.detach())
    return torch.stack(losses), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_every_family_are_found(family):
    """All norms, the rotation of all layers, query, key and value, gate and up; by what they do, not by name."""
    model = make_model(family).float()
    norms = {m for m in model.modules() if "Norm" in type(m).__name__}
    assert set(fused.fused_norms(model)) == norms
    assert list(fused.fused_rotary(model)) == [layer.self_attn for layer in model.model.layers]
    expected = []
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        expected += [[a.q_proj, a.k_proj, a.v_proj], [m.gate_proj, m.up_proj]]
    assert fused.shared_inputs(model) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_step_is_autocasts(request, family):
    """Loss and gradient are no further from those in fp32 than 1.2 times what autocast's own are; nothing is left."""
    packed = family != "gemma2"  # its soft cap has no kernel; padded it goes the same way
    exact = step(family, None, packed=packed)
    if packed:
        request.getfixturevalue("gpu_path")
    own, few = (step(family, fuse, packed=packed) for fuse in (False, True))

    def distance(found):
        squares = [((found[1][name] - g).norm() ** 2, g.norm() ** 2) for name, g in exact[1].items()]
        of_gradient = (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5
        return float((found[0] - exact[0]).abs().max()), float(of_gradient)

    assert distance(few)[0] <= 1.2 * distance(own)[0] + 1e-4
    assert 0 < distance(few)[1] <= 1.2 * distance(own)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_fp32_the_parts_are_the_familys_own(family):
    """Norms, rotation and joined products, with weights in fp32: output and gradient of the decoder to 1e-6."""
    found = []
    for few in (False, True):
        model = make_model(family).float().train()
        parts = {}
        if few:
            parts = fused.fused_norms(model)
            for layers in fused.shared_inputs(model):
                bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
                together = fused.LinearTogether(layers, torch.cat([layer.weight for layer in layers]), bias)
                parts |= together.forwards()
        with fused.in_place_of(parts):
            states = model.model(inputs_embeds=torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)))[0]
            states.sin().sum().backward()
        found.append((states.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=2e-6)
    assert len(found[0][1]) == len(found[1][1])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).norm() <= 3e-6 * a.norm()


def test_a_rotation_is_the_familys_own_with_gradient():
    """In fp32, also where both halves of the angles differ."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found = []
    draw = torch.Generator().manual_seed(0)
    cos, sin = (torch.randn(1, 5, 8, generator=draw) for _ in range(2))
    values = [torch.randn(1, heads, 5, 8, generator=draw) for heads in (4, 2)]
    for rotate in (apply_rotary_pos_emb, fused._RotaryTogether(apply_rotary_pos_emb)):
        q, k = (value.clone().requires_grad_() for value in values)
        with nullcontext() if rotate is apply_rotary_pos_emb else InFp32():
            turned = torch.cat(rotate(q, k, cos, sin), dim=1)
        turned.sin().sum().backward()
        found.append((turned.detach(), q.grad, k.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


class InFp32:
    """Autocast whose format is fp32, which PyTorch refuses to enter by itself."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch, "is_autocast_enabled", lambda device=None: True)
        self.patch.setattr(torch, "get_autocast_dtype", lambda device=None: torch.float32)

    def __exit__(self, *_):
        self.patch.undo()


class OtherNorm(nn.Module):
    """Looks like an RMSNorm and is none: it takes the mean away."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def test_what_is_something_else_goes_its_own_way():
    """A norm that takes the mean away, one with another eps inside, a rotation of pairs side by side."""
    assert not fused.fused_norms(OtherNorm())

    def by_pairs(q, k, cos, sin):
        return tuple(x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))

    assert not fused._RotaryTogether(by_pairs).is_own()


def test_what_the_models_own_code_computes_is_told():
    """GPT-2 has other norms, no rotation, and one product for query, key and value."""
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=260, bos_token_id=0, eos_token_id=0, n_embd=32, n_layer=2, n_head=4)
    ).train()
    working = WorkingWeights(model, fuse=True)
    assert working.own_way == ("norms", "rotation of query and key", "products of one input")
    with working.in_use(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert WorkingWeights(make_model().float(), fuse=True).own_way == ()


def test_layers_that_are_trained_apart_are_multiplied_apart():
    """A frozen one among them ends the group; without `fuse`, and in what is frozen in bf16, nothing is joined."""
    model = make_model().float()
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    assert [len(group) for group in fused.shared_inputs(model)] == [2, 3, 2]
    assert not WorkingWeights(model)._fused


def test_operations_are_half_of_what_they_were(gpu_path, monkeypatch):
    """A layer has 100 operations in both passes and their backward passes; b98c275 had 285."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import operations

    monkeypatch.setattr(fused, "rms_norm", operations.one_norm)
    one, two = (operations.counted("tiny", 4, layers).total() for layers in (1, 2))
    assert two - one <= 100
    assert 2 * one - two <= 90

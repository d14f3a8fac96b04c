"""Compiled decoder layers compute what the layers themselves do."""

from pathlib import Path

import pytest
import torch

from anchorvec.model import attention
from anchorvec.model.compiling import decoder_layers
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.reconstruction import TextReconstruction
from conftest import FAMILIES, make_model
from test_reconstruction import make_pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_decoder_layers_are_found(family):
    """Each layer of the decoder, and nothing else."""
    model = make_model(family)
    assert decoder_layers(model) == list(model.model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_compiled_is_plain(monkeypatch, family):
    """Loss and gradient to bf16's rounding, over micro-batches of several sizes, in one graph for all layers.

    A CPU takes the code path of a GPU, where one kernel attends to all packed texts.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from operations import one_kernel

    monkeypatch.setattr(attention, "varlen_attn", one_kernel)
    monkeypatch.setattr(attention, "_kernel_dtype", lambda query, value: torch.bfloat16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        model = make_model(family).float().train()
        model.set_attn_implementation(attention.PACKED_ATTENTION)
        objective = TextReconstruction(model)
        objective.packed = True
        if compiled:
            objective.compile_layers()
        working = WorkingWeights(objective)
        with working.in_use():
            for n in (4, 7, 5):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = objective(make_pairs(8)[:n]).loss
                loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)
    for name, expected in found[0][1].items():
        assert (found[1][1][name] - expected).norm() <= 3e-2 * expected.norm(), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6

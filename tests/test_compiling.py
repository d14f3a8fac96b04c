"""Compiled decoder layers compute what the layers themselves do."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from anchorvec.model import attention, packing
from anchorvec.model.compiling import decoder_layers
from anchorvec.model.embedder import build_embedder
from anchorvec.model.packing import use_packed_texts
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.contrastive import contrastive_loss
from anchorvec.objectives.reconstruction import TextReconstruction
from support import FAMILIES, make_model, make_pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_decoder_layers_are_found(family):
    """Each layer of the decoder, and nothing else."""
    model = make_model(family)
    assert decoder_layers(model) == list(model.model.layers)


@pytest.fixture
def gpu_path(monkeypatch):
    """A CPU takes the code path of a GPU, where one kernel attends to all packed texts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from operations import one_kernel

    monkeypatch.setattr(attention, "varlen_attn", one_kernel)
    monkeypatch.setattr(attention, "_kernel_dtype", lambda query, value: torch.bfloat16)
    monkeypatch.setattr(packing, "reads_no_mask", lambda device: True)


class HostReads(TorchDispatchMode):
    """Counts what brings a value to the host, from the first call of the decoder to the last."""

    def __init__(self, decoder):
        super().__init__()
        self.waits, self.at_calls = 0, []
        decoder.register_forward_pre_hook(lambda *_: self.at_calls.append(self.waits))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


def test_nothing_is_asked_of_the_device_within_a_step_of_stage_one(gpu_path):
    """No value comes to the host from the first micro-batch to the end of the last one's backward pass."""
    model = make_model().float()
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    objective = TextReconstruction(model)
    objective.packed = True
    working = WorkingWeights(objective, fuse=True)
    with working.in_use(), HostReads(model.model.layers[0]) as reads:
        for part in (make_pairs(8)[:4], make_pairs(8)[4:]):
            with torch.autocast("cpu", torch.bfloat16):
                loss = objective(part, targets=(50, 20)).loss
            loss.backward()
    assert len(reads.at_calls) == 4
    assert reads.waits == 0


@pytest.mark.parametrize("micro_batch_tokens", [None, 40])
def test_nothing_is_asked_of_the_device_within_a_step_of_stage_two(tmp_path, request, micro_batch_tokens):
    """What the library wants to know of the texts' lengths is read before the first micro-batch."""
    model = SentenceTransformer(str(build_embedder("tiny", tmp_path / "base", max_tokens=32)), device="cpu")
    assert use_packed_texts(model)  # in fp32, which a GPU's kernel does not have
    request.getfixturevalue("gpu_path")
    texts = [["one", "two two", "three"], ["a", "bb bb " * 3, "ccc"]]
    loss = contrastive_loss(model, micro_batch_tokens=micro_batch_tokens, one_pass=True)
    features = [dict(model.preprocess(column)) for column in texts]
    with HostReads(model[0].model.layers[0]) as reads:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(features, None)
        value.backward()
    assert len(reads.at_calls) == (1 if micro_batch_tokens is None else 4)
    assert reads.at_calls[-1] == reads.at_calls[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_compiled_is_plain(gpu_path, family):
    """Loss and gradient to bf16's rounding, over micro-batches of several sizes, in one graph for all layers."""
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
        working = WorkingWeights(objective, fuse=compiled)
        for n in (4, 7, 5):  # each a step; their gradients are added up
            with working.in_use():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = objective(make_pairs(8)[:n]).loss
                loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)
    for name, expected in found[0][1].items():
        assert (found[1][1][name] - expected).norm() <= 3e-2 * expected.norm(), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6

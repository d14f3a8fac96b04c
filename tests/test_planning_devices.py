"""A plan for several devices: what is shared out, what goes over the network, what cannot be, and generation."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

import anchorvec
from anchorvec.device import keep_frozen_in_bf16
from anchorvec.errors import AnchorvecError
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.planning.advice import advice
from anchorvec.planning.estimate import estimate_stage, weights_of
from anchorvec.planning.machines import find_machine
from anchorvec.planning.memory import memory_of_weights, shared_out
from anchorvec.planning.network import exchanged_bytes, waiting_seconds
from anchorvec.planning.outline import Outline
from anchorvec.training.lora import lora_config
from anchorvec.training.tokens import tokens_of_a_step
from planned import config, machine, set_up_debug
from support import recipe


@pytest.fixture
def setup(tmp_path):
    """A function that sets up the recipe `debug` on a base without weights."""
    return partial(set_up_debug, tmp_path)


EIGHT = """
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.training.sharding import shard
from planned import config
from support import make_pairs

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
sent = 0


class Counted(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        global sent
        if func.namespace == "c10d":
            sent += max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


model = LlamaForCausalLM(config(vocabulary=264, tied=False)).train()
objective = TextReconstruction(model, packed=True)
shard(objective, model, bf16=True)
with Counted():
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(make_pairs(3)).loss
    loss.backward()
torch.optim.AdamW(objective.parameters()).step()
held = [p.to_local() for p in objective.parameters()]
gradients = [p.grad.to_local() for p in objective.parameters()]
print(json.dumps({"sent": sent, "held": sum(t.nbytes for t in held), "gradients": sum(t.nbytes for t in gradients)}))
"""
"""One of eight processes, the others of which are not there: what it holds and sends is what it would be."""


def test_what_is_shared_out_and_sent_is_what_a_process_holds_and_sends():
    """Weights and gradients of a part, and the bytes that one of eight sends in a micro-batch of two passes."""
    paths = os.pathsep.join([str(Path(anchorvec.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "WORLD_SIZE": "8", "RANK": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    outline = Outline(config(vocabulary=264, tied=False))
    weights = weights_of(outline, recipe({}), "stage_one", bf16=True)
    parts = {"in_layers": outline.in_layers, "layers": outline.layers, "head": outline.head}
    memory = shared_out(weights, devices=8, **parts, bf16=True)
    assert memory.master_weights == found["held"]
    assert memory.optimizer == 2 * found["held"]
    layer, outside = outline.in_layers / 3, weights.trained - outline.in_layers
    gathered = 6 * layer + 4 * outside + 8 * outline.head
    assert memory.gradients == found["gradients"] + gathered
    sent = exchanged_bytes(weights.trained, 8, sharded=True, passes=2, outside=outside, bf16=True)
    assert sent == pytest.approx(found["sent"] * 7 / 8)


def test_bytes_by_hand():
    """Copies exchange fp32 gradients once; what is shared out goes in each micro-batch; candidates and gradients."""
    assert exchanged_bytes(1000, 4, micro_batches=3) == 8000 * 3 / 4
    assert exchanged_bytes(1000, 1) == 0
    options = {"micro_batches": 3, "sharded": True, "outside": 100}
    assert exchanged_bytes(1000, 2, **options) == 3 * (8 * 900 + 8 * 100) / 2
    assert exchanged_bytes(1000, 2, **options, passes=2, bf16=False) == 3 * (20 * 900 + 8 * 100) / 2
    assert exchanged_bytes(0, 2, candidates=10) == 40


def test_a_network_between_machines_slows_down():
    """Beyond the devices of one machine the slower of link and network counts, where nothing hides it."""
    near, far = machine(8, network_gbs=25), machine(16, network_gbs=25)
    assert (near.exchange_gbs, far.exchange_gbs) == (300, 25)
    waited = partial(waiting_seconds, 50e9, micro_batches=2, sharded=False)
    assert waited(0.9, far) == pytest.approx(2 - 0.3)
    assert waited(0.9, near) == 0
    assert waiting_seconds(50e9, 0.9, far, micro_batches=2, sharded=True) == pytest.approx(1.1)
    assert find_machine("a100-80gb:16").exchange_gbs == 200


LARGE = {"hidden_size": 512, "intermediate_size": 2048, "layers": 24}


def test_a_model_that_eight_hold_and_one_does_not(setup):
    """Moments and master weights are divided by the devices; what copies cannot do is advised; one device holds all."""
    found = setup({"stage_two": None, "model.precision": "bf16"}, **LARGE)
    shared = found.recipe.model_copy(update={"stage_one": found.recipe.stage_one.model_copy(update={"sharded": True})})
    eight = machine(8, memory_gb=2.2)
    copies, parts = (estimate_stage(found, asked, "stage_one", eight) for asked in (found.recipe, shared))
    assert parts.memory.optimizer == pytest.approx(copies.memory.optimizer / 8)
    assert parts.memory.master_weights == pytest.approx(copies.memory.master_weights / 8)
    assert (copies.fits, parts.fits) == (False, True)
    assert advice(found, found.recipe, "stage_one", eight) == ("stage_one.sharded=true",)
    assert parts.whole_model == 4 * found.outline.parameters
    alone = [estimate_stage(found, asked, "stage_one", machine()) for asked in (found.recipe, shared)]
    assert alone[0] == alone[1]
    assert alone[0].exchanged == 0 < copies.exchanged < parts.exchanged


def test_a_model_that_no_device_holds_when_it_starts(setup):
    """The whole model stands on each device then, however many there are."""
    found = setup({"stage_two": None, "stage_one.sharded": True, "model.precision": "bf16"}, layers=100)
    little = machine(1000, memory_gb=1.01)
    stage = estimate_stage(found, found.recipe, "stage_one", little)
    assert stage.memory.peak < stage.capacity < stage.whole_model
    assert not stage.fits


def test_pairs_that_devices_cannot_share(setup):
    """Stage II needs as many for each, and says which numbers do; Stage I says who waits, and takes as long."""
    found = setup({"stage_two.pairs_per_step": 8, "stage_one.pairs_per_step": 8})
    with pytest.raises(AnchorvecError, match=r"stage_two.pairs_per_step: 8 pairs .* of 3 devices; set it to 6 or 9"):
        anchorvec.plan(found.recipe, machine="h100:3")
    only = found.recipe.model_copy(update={"stage_two": None})
    plan = anchorvec.plan(only, machine="h100:3")
    assert any("2 of 3 devices have 3 of its 8 pairs and the others 2" in note for note in plan.estimate.notes)
    assert any("converted to bf16 in each micro-batch" in line for line in plan.engine["stage_one"].slower)
    fast = {"link_gbs": 1e9, "bandwidth_gbs": 1e9}
    three, four = (estimate_stage(found, only, "stage_one", machine(n, **fast)).seconds for n in (3, 4))
    assert three / four == pytest.approx(3 / 2, rel=0.01)


GENERATES = {"stage_two.generation_weight": 0.5, "data.max_tokens": 200, "model.precision": "bf16"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_generation_holds_the_head_too(setup, tied, lora):
    """Stage II with documents that are written: bytes of a model with its LM head, and of what trains in it."""
    found = setup(GENERATES | {"stage_two.lora": {"r": 4} if lora else None}, tied=tied)
    memory = memory_of_weights(weights_of(found.outline, found.recipe, "stage_two", bf16=True), bf16=True)
    model = LlamaForCausalLM(config(tied=tied)).train()
    if lora:
        get_peft_model(model, lora_config(model.model, r=4, alpha=8, dropout=0.0))
        keep_frozen_in_bf16(model.model if tied else model)
    copies = sum(copy.nbytes for *_, copy in WorkingWeights(model)._places)
    assert memory.master_weights == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert memory.weights == copies + sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def test_generation_is_planned(setup):
    """Tokens of the passes that write, their targets, and more memory and arithmetic; for one process alone."""
    plain, writes = setup(GENERATES | {"stage_two.generation_weight": 0}), setup(GENERATES)
    stages = [estimate_stage(each, each.recipe, "stage_two", machine()) for each in (plain, writes)]
    steps = writes.recipe.stage_two.steps
    tokens = tokens_of_a_step(writes.recipe, writes.inputs, writes.sample(writes.recipe))["stage_two"]
    assert stages[1].tokens == pytest.approx(tokens * steps, rel=0.1)
    assert stages[0].tokens < 0.7 * stages[1].tokens
    assert stages[0].flops < 0.7 * stages[1].flops
    assert stages[0].memory.head == 0 < stages[1].memory.head
    with pytest.raises(AnchorvecError, match=r"stage_two.generation_weight: .* by one process alone"):
        anchorvec.plan(writes.recipe, machine="h100:2")
    assert torch.isfinite(torch.tensor(anchorvec.plan(writes.recipe, machine="h100").estimate.total_seconds))

"""What a run will take, told without its weights: against hand formulas, real tensors, and torch's own counts."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import anchorvec
from anchorvec.cli import main
from anchorvec.errors import AnchorvecError
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.planning.activations import kept_for_a_token
from anchorvec.planning.advice import advice
from anchorvec.planning.arithmetic import Layers, Passes, forward_flops, step_flops
from anchorvec.planning.estimate import estimate_stage, weights_of
from anchorvec.planning.machines import Machine, find_machine, machines, share_of_peak
from anchorvec.planning.memory import memory_of_stage, memory_of_weights
from anchorvec.planning.outline import Outline
from anchorvec.recipe import load_recipe
from anchorvec.training.engine import Engine
from anchorvec.training.lora import lora_config
from anchorvec.training.memory import kept_bytes
from planned import config, folder_of, set_up_debug
from support import make_pairs, recipe


@pytest.fixture(scope="module", autouse=True)
def layers_are_not_timed():
    """Here they are."""


@pytest.fixture
def setup(tmp_path):
    """A function that sets up the recipe `debug` on a base without weights."""
    return partial(set_up_debug, tmp_path)


# Sizes, memory


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_model(tied):
    """Counted without weights, as `parameters()` of the model with weights has them."""
    outline, model = Outline(config(tied=tied)), LlamaForCausalLM(config(tied=tied))
    assert outline.model.device.type == "meta"
    assert outline.parameters == sum(p.numel() for p in model.parameters())
    assert outline.body_parameters == sum(p.numel() for p in model.model.parameters())
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert outline.linear == outline.linear_parameters == 3 * layer
    assert (outline.head, outline.tied) == (260 * 64, tied)
    get_peft_model(model.model, lora_config(model.model, r=4, alpha=8, dropout=0.0))
    assert outline.adapters(4) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def tensors(module):
    """Bytes of parameters, of those that train, and of the gradients."""
    unique = {id(p): p for p in module.parameters()}.values()
    frozen = sum(p.nbytes for p in unique if not p.requires_grad)
    return (
        frozen,
        sum(p.nbytes for p in unique if p.requires_grad),
        sum(p.grad.nbytes for p in unique if p.grad is not None),
    )


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_memory_of_weights_is_that_of_the_tensors(setup, bf16, tied, lora):
    """Weights, bf16 copies, gradients and moments of Stage I after a real step of AdamW."""
    asked = {"stage_one.lora": {"r": 4, "alpha": 8} if lora else None, "model.precision": "bf16" if bf16 else "fp32"}
    found = setup(asked, tied=tied)
    memory = memory_of_weights(weights_of(found.outline, found.recipe, "stage_one", bf16=bf16), bf16=bf16)
    model = LlamaForCausalLM(config(tied=tied)).train()
    if lora:
        get_peft_model(model, lora_config(model.model, r=4, alpha=8, dropout=0.0))
    objective = TextReconstruction(model)
    working = WorkingWeights(objective) if bf16 else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    objective(make_pairs(3)).loss.backward()
    optimizer.step()
    frozen, trained, gradients = tensors(model)
    copies = sum(copy.nbytes for *_, copy in working._places) if working else 0
    moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    assert memory.weights == frozen + copies
    assert memory.master_weights == trained
    assert memory.gradients - 0 == gradients + (0 if lora else 8 * found.outline.head)  # summed, of both uses
    assert memory.optimizer == moments


@pytest.mark.parametrize(("bf16", "share"), [(True, 2), (False, 4)])
def test_frozen_layers_of_stage_two_are_in_bf16_where_it_is(setup, bf16, share):
    """The body alone, without the LM head; embeddings and norms stay in fp32, adapters have copies."""
    found = setup({"stage_two.lora": {"r": 4}}, tied=False)
    memory = memory_of_weights(weights_of(found.outline, found.recipe, "stage_two", bf16=bf16), bf16=bf16)
    outline = found.outline
    others = outline.body_parameters - outline.linear
    adapters = outline.adapters(4)
    assert memory.weights == share * outline.linear + 4 * others + (2 * adapters if bf16 else 0)
    assert (memory.master_weights, memory.optimizer) == (4 * adapters, 8 * adapters)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("attention", "real"), [("kernel", "sdpa"), ("eager", "eager")])
@pytest.mark.parametrize("lora", [None, (4, 0.1)])
def test_activations_are_those_that_autograd_keeps(bf16, attention, real, lora):
    """Of all layers, counted on one and two layers without data; matrices of the longest text where it keeps them."""
    made = config(layers=4, tied=False)
    found = kept_for_a_token(Outline(made), bf16=bf16, checkpointing=False, longest=100, attention=attention, lora=lora)
    model = LlamaForCausalLM._from_config(made, attn_implementation=real).train()
    if lora is not None:
        get_peft_model(model.model, lora_config(model.model, r=lora[0], alpha=8, dropout=lora[1]))

    def forward(n):
        embedded = torch.randn(1, 64 * n, 64, requires_grad=lora is None)
        return model.model(inputs_embeds=embedded, use_cache=False)[0], 64 * n

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept, _ = kept_bytes(model.model, forward, 100)
    assert found == pytest.approx(kept, rel=1e-6)


@pytest.mark.parametrize(("bf16", "least"), [(True, 0.95), (False, 0.999)])
def test_activations_are_those_of_the_engine(bf16, least):
    """As packed texts of Stage I are measured when it starts; in bf16 its attention copies some of them, uncounted."""
    made = config(layers=4, tied=False)
    model = LlamaForCausalLM(made).train()
    objective = TextReconstruction(model, packed=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        real, _ = kept_bytes(model, lambda n: (objective.encode([[5] * 64 * n]), 64 * n), 256)
    found = kept_for_a_token(Outline(made), bf16=bf16, checkpointing=False, longest=256)
    assert least * real <= found <= real


def test_what_depends_on_the_texts():
    """Activations of what is held, scores, and the embeddings that cached gradients keep with their gradients."""
    engine = Engine(True, False, 100, 7, True, cached_gradients=True)
    fixed = memory_of_weights(weights_of(Outline(config()), recipe({}), "stage_one", bf16=False), bf16=False)
    memory = memory_of_stage(fixed, engine, held=50, score_bytes=11, embeddings=13, cpu=False)
    assert (memory.activations, memory.head, memory.cached_gradients) == (350, 11, 104)
    assert memory.peak == sum(memory.parts().values()) == fixed.peak + 350 + 11 + 104
    here = memory_of_stage(fixed, engine, held=50, score_bytes=11, embeddings=13, cpu=True)
    assert here.process > 10**8
    assert 0 < here.gaps < 361


def test_scores_are_those_of_the_targets_that_are_held(setup):
    """Of 256 tokens at a time, half of which are written over 260 tokens of vocabulary; not of a whole step."""
    found = setup()
    stage = estimate_stage(found, found.recipe, "stage_one", find_machine("h100"))
    passes = found.passes("stage_one", found.recipe)
    held = max(256, 4 * found.recipe.longest_read)
    expected = 16 * 260 * min(held, passes.tokens) * passes.targets / passes.tokens
    assert stage.memory.head == pytest.approx(expected)


# Arithmetic


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_flops_are_those_that_torch_counts(tied, lora, checkpointing):
    """Forward and backward passes of two texts, attention and LM head included; to the last one."""
    outline = Outline(config(tied=tied))
    model = LlamaForCausalLM._from_config(config(tied=tied), attn_implementation="eager").train()
    adapters = 0
    if lora:
        get_peft_model(model, lora_config(model.model, r=4, alpha=8, dropout=0.0))
        adapters = outline.adapters(4)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    last = outline.last_adapters(4) if lora else outline.last
    layers = Layers(outline.linear, outline.attention_width * outline.layers, outline.head, adapters, last, frozen=lora)
    passes = Passes([70, 70], targets=140).times(1)
    ids = torch.randint(0, 260, (2, 70))
    with FlopCounterMode(display=False) as counter:
        states = model.model(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_(), use_cache=False)
        forward = counter.get_total_flops()
        model.lm_head(states[0]).sum().backward()
    assert forward == forward_flops(layers, passes)
    head = 2 * outline.head * 140 if lora else 0  # frozen: no gradient of its own
    assert counter.get_total_flops() == step_flops(layers, passes, checkpointing=checkpointing) - head


# Machines


def test_the_table_of_machines():
    """Each has its figures and says where they are from; a number of them may be named."""
    table = machines()
    assert set(table) >= {"a100-80gb", "h100", "h200", "rtx4090", "l4"}
    assert all("https://" in machine.source and machine.memory > 10**10 for machine in table.values())
    eight = find_machine("a100-80gb:8")
    assert (eight.devices, eight.bf16_tflops, str(eight)) == (8, 312, "8 x a100-80gb")


def test_an_unknown_machine_is_refused_with_the_list():
    """And so is a number that is none."""
    with pytest.raises(AnchorvecError, match=r"'tpu' is none of a100-80gb, h100, h200, rtx4090, l4"):
        find_machine("tpu:4")
    with pytest.raises(AnchorvecError, match="write, for example, l4:8"):
        find_machine("l4:many")


LINE = "{bf16_tflops: 1, fp32_tflops: 1, memory_gb: 2, bandwidth_gbs: 10, link_gbs: 5}"


def test_a_line_of_the_users_own(tmp_path):
    """Is added to the table; a faulty one is refused with its place."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"mine: {LINE}\n")
    assert find_machine("mine:2", file) == Machine("mine", 1, 1, 2, 10, 5, "yours", devices=2)
    assert find_machine("h100", file) == find_machine("h100")
    for text, message in {
        "mine: {bf16_tflops: 1}": "mine.yaml, mine: fp32_tflops must be a positive number, and is None",
        f"mine: {LINE[:-1]}, watts: 3}}": "unknown key watts",
        "nothing": "holds no `NAME",
        "{": "is no YAML",
    }.items():
        file.write_text(text)
        with pytest.raises(AnchorvecError, match=message):
            find_machine("mine", file)
    with pytest.raises(AnchorvecError, match="cannot be read"):
        find_machine("mine", tmp_path / "none.yaml")


def test_shares_of_the_peak_are_those_that_were_measured():
    """At the two sizes; between them they rise, and without compiling they are lower."""
    shares = [share_of_peak("stage_one", size, lora=False, compiled=True) for size in (64, 576, 1024, 2048, 8192)]
    assert shares == sorted(shares)
    assert (shares[1], shares[3], shares[4]) == (0.168, 0.476, 0.476)
    assert share_of_peak("stage_two", 576, lora=True, compiled=False) == pytest.approx(0.107 * 0.334 / 0.517)


# The whole plan


def test_time_on_a_machine_is_arithmetic_by_speed(setup):
    """Twice the devices take half the time where the exchange is fast; steps cost alike."""
    found = setup()
    one, two = (estimate_stage(found, found.recipe, "stage_one", find_machine(f"h100{n}")) for n in ("", ":2"))
    assert one.seconds == pytest.approx(one.seconds_per_step * found.recipe.stage_one.steps)
    assert one.flops == two.flops
    optimizer = (32 * one.trained + 6 * (found.outline.linear + found.outline.head)) / 3.35e12
    assert one.seconds_per_step == pytest.approx(one.flops / 20 / (one.share * 989e12) + optimizer, rel=1e-6)


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_advice_is_true(setup, tmp_path, stage):
    """What is advised fits by the same estimate, and what is asked does not; nothing is advised where nothing helps."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"mine: {LINE}\n".replace("memory_gb: 2", "memory_gb: 14"))
    values = {f"{stage}.micro_batch_tokens": 4_000_000, f"{stage}.gradient_checkpointing": False}
    found = setup({"stage_two.lora": None, "model.precision": "bf16", **values}, vocabulary=100_000)
    mine = find_machine("mine", file)
    assert not estimate_stage(found, found.recipe, stage, mine).fits
    words = advice(found, found.recipe, stage, mine)
    assert words
    changed = load_recipe(write_recipe(tmp_path, found.recipe), list(words))
    assert estimate_stage(found, changed, stage, mine).fits
    tiny = Machine("tiny", 1, 1, 1.0001, 1, 1, "")
    assert advice(found, found.recipe, stage, tiny) == ()


def write_recipe(folder, asked):
    from anchorvec.recipe import dump_recipe

    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(asked))
    return str(path)


def test_a_plan_without_weights_says_so(tmp_path):
    """Everything else is there, the time of both stages included; with weights a real step is made."""
    base = folder_of(tmp_path / "base")
    plan = anchorvec.plan(recipe({"model.base": str(base)}))
    assert str(plan.trial_steps["stage_one"]) == "left out: the weights are not on this machine"
    assert set(plan.estimate.seconds) == {"base", "stage_one", "stage_two", "export"}
    assert all(seconds > 0 for seconds in plan.estimate.seconds.values())
    found = plan.to_dict()["estimate"]
    assert found["stages"]["stage_one"]["seconds_per_step"] > 0
    assert found["stages"]["stage_two"]["memory"]["activations"] > 0
    LlamaForCausalLM(config()).save_pretrained(base)
    assert anchorvec.plan(recipe({"model.base": str(base)})).trial_steps["stage_one"].seconds > 0


def test_scores_and_layers_that_are_too_large(tmp_path, monkeypatch):
    """Scoring local test data counts; where the layers are too large to try out, one line says so."""
    pytest.importorskip("mteb")
    corpus = tmp_path / "set"
    (corpus / "qrels").mkdir(parents=True)
    (corpus / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": "a b " * 9}) + "\n" for i in range(9))
    )
    (corpus / "queries.jsonl").write_text('{"_id": "q", "text": "a"}\n')
    (corpus / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")
    asked = recipe({"model.base": str(folder_of(tmp_path / "base")), "evaluation.data": [str(corpus)]})
    assert anchorvec.plan(asked).estimate.seconds["scoring"] > 0
    monkeypatch.setattr("anchorvec.planning.probe._SHARE_OF_FREE", 0.0)
    found = anchorvec.plan(asked).estimate
    assert any("more than a quarter of the" in note for note in found.notes)
    assert "stage_one" not in found.seconds


SEVENTY = """
import resource, time, psutil
import anchorvec
from anchorvec.recipe import load_recipe
import transformers, sentence_transformers, peft
before, start = psutil.Process().memory_info().rss, time.monotonic()
recipe = load_recipe("debug", ["model.base={base}", "stage_two.lora={{}}"])
found = anchorvec.plan(recipe, machine="h100:8").estimate
assert found.parameters > 70e9, found.parameters
assert not found.stages["stage_one"].fits
assert time.monotonic() - start < 30, time.monotonic() - start
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert peak - before < 2e9, peak - before
"""


@pytest.mark.slow
def test_a_model_of_70_billion_is_planned_in_seconds(tmp_path):
    """From its configuration alone, within 30 seconds and 2 GB of memory."""
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    base = folder_of(tmp_path / "base", layers=80, tied=False, vocabulary=128_256, **large)
    subprocess.run([sys.executable, "-c", SEVENTY.format(base=base)], check=True)


def test_a_base_that_is_no_decoder_is_refused_without_its_weights(tmp_path):
    """As `train` refuses it, by its own name."""
    base = folder_of(tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    with pytest.raises(AnchorvecError, match=str(base)):
        anchorvec.plan(recipe({"model.base": str(base)}))


def test_the_command_names_a_machine(monkeypatch, capsys):
    """On the command line, with the list where there is none of that name."""
    monkeypatch.setattr(sys, "argv", ["anchorvec", "plan", "debug", "--machine", "abacus"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "'abacus' is none of a100-80gb" in capsys.readouterr().err

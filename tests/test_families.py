"""Families of decoders: that both stages train them, or that they are refused before the work, with the reason."""

import pytest
import torch
from safetensors.torch import load_file

import anchorvec
from anchorvec.errors import AnchorvecError
from anchorvec.model.decoder import check_decoder, final_states
from anchorvec.model.head import output_head
from families import BREAKS, TRAINS, config_classes, sweep, tiny_model

DENSE = ["gemma2", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "opt", "phi3", "qwen3"]
"""With learned and rotary positions, soft caps, biases, a decoder inside a decoder."""

OTHERS = ["llama4_text", "mamba", "mixtral"]
"""Mixtures of experts, and a recurrent family."""


@pytest.mark.parametrize("family", [*DENSE, *OTHERS])
def test_a_family_trains(family, tmp_path):
    """Both stages and the export run, and the head gives the model's own logits from its final states (T19)."""
    model = tiny_model(config_classes()[family], tmp_path / "base").eval()
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        states = final_states(model, input_ids=ids)
        torch.testing.assert_close(output_head(model)(states[0]), model(ids).logits[0], rtol=1e-6, atol=1e-6)
    values = ["model.precision=fp32", *(f"stage_{n}.{key}" for n in ("one", "two") for key in QUICK)]
    recipe = anchorvec.load_recipe("debug", [f"model.base={tmp_path / 'base'}", f"output={tmp_path / 'run'}", *values])
    result = anchorvec.train(recipe)
    assert min(result.export.cosines.values()) > 0.9999


QUICK = ["steps=2", "warmup_steps=0", "pairs_per_step=4"]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bart", "is part of a larger model, such as an encoder-decoder: AutoModel reads it as BartModel"),
        ("bert", "reads in both directions"),
        ("cpmant", "reads token ids alone, no embeddings in the place of tokens"),
        ("trocr", "has no decoder that transformers' AutoModel loads without the head"),
        ("reformer", "its states have 128 numbers, token embeddings 64"),
        ("xlstm", "reads texts in pieces of 32 tokens, and cannot read one of 33"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_for_what_it_is(family, reason, tmp_path):
    """The reason is a property of the model; its family is named only to say which one it is."""
    model = tiny_model(config_classes()[family], tmp_path)
    model.train()
    with pytest.raises(AnchorvecError, match=reason):
        check_decoder(model, "here")
    assert model.training


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("mixtral", ["mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("qwen2_moe", ["mlp.experts.gate_up_proj"]),
        ("deepseek_v3", ["mlp.experts.gate_up_proj", "mlp.shared_experts.gate_proj"]),
    ],
)
def test_lora_leaves_stacked_experts_out_and_says_so(family, left_out, tmp_path):
    """Linear layers have adapters, with dropout; a line names what has none, once for all layers."""
    tiny_model(config_classes()[family], tmp_path / "base")
    values = ["stage_one=null", "stage_two.lora={r: 2, alpha: 4, dropout: 0.1}", "model.precision=fp32"]
    quick = [f"stage_two.{key}" for key in QUICK]
    recipe = anchorvec.load_recipe(
        "debug", [f"model.base={tmp_path / 'base'}", f"output={tmp_path / 'run'}", *values, *quick]
    )
    with pytest.warns(UserWarning, match="LoRA adapts linear layers; without adapters, and frozen: ") as warned:
        result = anchorvec.train(recipe)
    [line] = [str(warning.message) for warning in warned if "LoRA adapts" in str(warning.message)]
    names = line.partition("frozen: ")[2].split(", ")
    assert len(set(names)) == len(names)
    assert {name.removeprefix("layers.*.") for name in names} >= set(left_out)
    assert min(result.export.cosines.values()) > 0.9999
    weights = load_file(tmp_path / "run" / "stage_two" / "adapter_model.safetensors")
    assert any("self_attn" in name for name in weights)
    assert not any(".experts." in name for name in weights)


@pytest.mark.slow
def test_every_family_trains_or_is_refused(tmp_path):
    """No family breaks, and of those that are no encoders nine tenths train."""
    trials = sweep(list(config_classes()), tmp_path / "trials.json")
    assert [t for t in trials if t.outcome == BREAKS] == []
    assert sum(t.outcome == TRAINS for t in trials) >= 130

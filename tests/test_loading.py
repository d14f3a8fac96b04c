"""Loading an embedder by its folder: adapters over what they were trained on."""

import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from anchorvec.errors import AnchorvecError
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_model, warn_of_named_prompts
from support import make_model, make_tokenizer


def test_what_cannot_be_loaded_is_one_error(tmp_path):
    """A weights file that breaks off, whole or of an adapter, and the folder of a run, which holds several models."""
    folder = build_embedder("tiny", tmp_path / "run" / "base", max_tokens=32)
    with pytest.raises(AnchorvecError, match=r"this is a run, and an embedder is needed; name .*/model"):
        load_model(tmp_path / "run")
    model = SentenceTransformer(str(folder), device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", task_type="FEATURE_EXTRACTION"))
    model.save_pretrained(str(tmp_path / "run" / "stage_two"), create_model_card=False)
    for weights in (tmp_path / "run" / "stage_two" / "adapter_model.safetensors", folder / "model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(AnchorvecError, match=rf"{weights.name} is damaged or cut short: copy it again"):
            load_model(weights.parent)


def test_a_model_with_named_prompts_alone_asks_for_one(tmp_path):
    """Queries of another name than the training data's have no instruction; that is said."""
    prompts = {"one-query": "one ", "two-query": "two ", "three-query": ""}
    folder = build_embedder("tiny", tmp_path / "base", max_tokens=32, prompts=prompts)
    model = SentenceTransformer(str(folder), device="cpu")
    with pytest.warns(UserWarning, match="one-query, two-query.*these queries have none"):
        warn_of_named_prompts(model)
    with pytest.warns(UserWarning, match=", four have none"):
        warn_of_named_prompts(model, ["one", "four"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_named_prompts(model, ["one", "three"])
        model.prompts["query"] = "find "
        warn_of_named_prompts(model)


def test_small_updates_survive_the_merge(save_base, tmp_path):
    """LoRA over a base in bf16 is merged in fp32: updates below the precision of its weights are not rounded away."""
    base = save_base(make_model(), make_tokenizer())
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    folder = build_embedder(base, tmp_path / "run" / "base", max_tokens=32)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    before = model.encode("a text")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", task_type="FEATURE_EXTRACTION"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 1e-4)
    trained = model.eval().encode("a text")
    model.save_pretrained(str(tmp_path / "run" / "stage_two"), create_model_card=False)
    assert np.abs(trained - before).max() > 1e-4
    np.testing.assert_allclose(load_model(tmp_path / "run" / "stage_two").encode("a text"), trained, atol=1e-6)


def test_an_adapter_is_merged_or_left_as_it_is(run):
    """Both give the same vectors; unmerged, the adapter is a part of its own."""
    merged, unmerged = (load_model(run / "stage_two", merge=merge) for merge in (True, False))
    assert isinstance(unmerged[0].model, PeftModel)
    assert not isinstance(merged[0].model, PeftModel)
    vectors = [model.encode(["a text", "another"], convert_to_tensor=True) for model in (merged, unmerged)]
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=1e-5)

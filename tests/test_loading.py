"""Loading an embedder by its folder: adapters over what they were trained on."""

import numpy as np
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from anchorvec.embedder import build_embedder
from anchorvec.loading import load_model
from conftest import make_model, make_tokenizer


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

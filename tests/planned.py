"""Bases without weights, from which plans are made."""

import tempfile
from pathlib import Path

from transformers import LlamaConfig

from anchorvec.model.base import byte_tokenizer
from anchorvec.pipeline import load_training_data
from anchorvec.planning.machines import Machine
from anchorvec.planning.setup import set_up
from support import recipe

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def config(*, layers=3, tied=True, vocabulary=260, **others):
    """A Llama that is small in every way."""
    sizes = {**SIZES, "num_hidden_layers": layers, "vocab_size": vocabulary, "tie_word_embeddings": tied, **others}
    return LlamaConfig(**sizes, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=None)


def folder_of(folder, **sizes):
    """A base without weights: its configuration and its tokenizer."""
    made = config(**sizes)
    made.architectures = ["LlamaForCausalLM"]
    made.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def set_up_debug(folder, values=None, **sizes):
    """The recipe `debug` with `values`, set up below `folder` on a base of such `sizes` without weights."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    base = folder_of(folder / "base", **sizes)
    asked = recipe({"model.base": str(base), "stage_one.micro_batch_tokens": 256, **(values or {})})
    return set_up(asked, load_training_data(asked), folder / "scratch")


def machine(devices=1, **figures):
    """A machine of such `figures`; the others are those of an A100."""
    known = {"bf16_tflops": 312, "fp32_tflops": 19.5, "memory_gb": 84.9, "bandwidth_gbs": 2039, "link_gbs": 300}
    return Machine("mine", **(known | figures), source="", devices=devices)

"""Tiny real models and tokenizers: random weights, every family that the product names."""

import gc
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from anchorvec.model.base import byte_tokenizer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
TOKENIZERS = ["plain", "bos", "chat", "left"]


def make_model(family: str = "llama", *, tied: bool = True, vocab_size: int = 260, seed: int = 0) -> PreTrainedModel:
    """A random two-layer causal LM of `family` in float64, in evaluation mode."""
    config = CONFIG_MAPPING[family](
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=257,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).double().eval()


def make_tokenizer(kind: str = "plain") -> PreTrainedTokenizerFast:
    """A byte tokenizer with the end token `<|end|>` (id 0).

    `bos`: it puts `<|bos|>` before each text, through the two chained post-processors of Llama 3. `chat`: it has a chat
    template and a pad token of its own. `left`: it pads on the left.
    """
    tokenizer = byte_tokenizer()
    if kind == "bos":
        tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
        template = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.convert_tokens_to_ids("<|bos|>"))]
        )
        tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=True), template])
    if kind == "chat":
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>\n{% endfor %}"
    if kind == "left":
        tokenizer.padding_side = "left"
    return tokenizer


def write_rows(path, rows):
    """Write `rows` as JSON Lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def save_base(tmp_path):
    """A function that saves a model and a tokenizer as a base folder and returns the folder."""

    def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str = "base"):
        folder = tmp_path / name
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module", autouse=True)
def cheap_collections():
    """A run collects garbage several times; what was there before a module need not be gone through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def texts_run(tmp_path_factory):
    """The run with the values `wiring.TEXTS`, and what it must have done."""
    return _watched_run(tmp_path_factory.mktemp("texts"), "TEXTS")


@pytest.fixture(scope="session")
def words_run(tmp_path_factory):
    """The run with the values `wiring.WORDS`, and what it must have done."""
    return _watched_run(tmp_path_factory.mktemp("words"), "WORDS")


def _watched_run(folder, name):
    import support
    import wiring

    values = {"data.train": wiring.sources(folder / "data"), **getattr(wiring, name)}
    return wiring.expected(support.train(folder / "run", values), values)

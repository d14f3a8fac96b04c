"""From a decoder LLM to a sentence-transformers model whose pooled position is guaranteed.

An embedder folder is two things at once: a causal LM (`AutoModelForCausalLM`, head included) and a
sentence-transformers model `[Transformer, Pooling("lasttoken")]`. What ends a text is written into the
tokenizer's own post-processor, so `tokenizer.json` carries it into every program that reads the folder.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from anchorvec.errors import AnchorvecError
from anchorvec.files import new_folder, write_json
from anchorvec.model.base import check_fit, load_base, without_rowless_tokens
from anchorvec.model.decoder import check_decoder, decoder_of, read_both_ways
from anchorvec.model.end import EndPrompt, template_of
from anchorvec.model.folders import START, read_json, reading, start_of_adapter
from anchorvec.model.portable import make_portable
from anchorvec.model.readout import Readout
from anchorvec.run import is_embedder


def build_embedder(
    base: str | Path,
    folder: str | Path,
    *,
    max_tokens: int = 512,
    end_prompt: EndPrompt | None = None,
    readout: Readout | None = None,
    prompts: Mapping[str, str] | None = None,
    revision: str | None = None,
    seed: int = 0,
    head: bool = True,
    writes: bool = False,
) -> Path:
    """Write `base` as an untrained embedder into `folder` and return the folder.

    `base` is a hub id (of which `revision` names a branch, tag or commit), a local folder, a GGUF file, `smollm2`, or
    `tiny` (a random model for trials). `max_tokens` counts everything: what the tokenizer adds, the prompt, the text
    and its end. With `end_prompt` None each text ends in the tokenizer's end token; otherwise in the prompt's words. A
    `readout` says all of how texts are read, in place of these two. `prompts` are stored with the model under
    sentence-transformers' names (`query`, `document`, ...). `seed` matters for `tiny` and for new modules. Without
    `head` an embedder that has no LM head will do as base, and has none then. `writes`: whether it is to write texts
    too, which a decoder that reads in both directions must be able to do in one. Raises AnchorvecError if the base is
    no decoder, has no end token or fewer positions than `max_tokens`, or if `folder` is in use.
    """
    folder = Path(folder)
    with new_folder(folder) as scratch:
        model, tokenizer = load_base(base, revision=revision, seed=seed, head=head)
        check_decoder(model, base)
        readout = readout or Readout(max_tokens, end_prompt)
        if readout.attention_direction == "bidirectional":
            read_both_ways(model, base, writes=writes)
        tokenizer = readout.tokenizer(without_rowless_tokens(model, tokenizer, base))
        check_fit(model, tokenizer, base)
        _drop_pad_token(model, tokenizer, base)
        model.save_pretrained(scratch)
        save_tokenizer(tokenizer, scratch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # for new modules
            _add_sentence_transformers_files(scratch, readout, prompts or {})
    return folder


def _drop_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, base: str | Path) -> None:
    """Take the pad token from the config: a model never trains its embedding, and often it is the end token (T2)."""
    config = model.config.get_text_config()
    before = getattr(config, "pad_token_id", None)  # some configs have none
    try:
        config.pad_token_id = None
    except StrictDataclassError as error:  # the family must have one
        config.pad_token_id = before
        if before in template_of(tokenizer).ids:
            raise AnchorvecError(
                f"model.base: the pad token of {base} (id {before}) stands in every text, and its embedding is never "
                "trained; set pad_token_id in its config.json to another id"
            ) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save `tokenizer` in `folder` with its own truncation and no padding, whatever the last call used (T25)."""
    tokenizer.backend_tokenizer.enable_truncation(tokenizer.model_max_length)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    # The general class reads tokenizer.json as it is; a family's own class would rebuild the post-processor.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def save_causal_lm(model: PreTrainedModel, like: str | Path, folder: str | Path) -> None:
    """Save `model`, a causal LM, head included (T12), in `folder`, as an embedder with the other files of `like`."""
    like, folder = Path(like), Path(folder)
    model.save_pretrained(folder)
    for path in like.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif not path.name.startswith(("model", "config.json", "generation_config", "README")):
            shutil.copy2(path, folder / path.name)
    if is_embedder(folder):
        make_portable(folder)


def put_head_back(model: PreTrainedModel, folder: Path) -> None:
    """Save `model`, a causal LM, over its decoder's body, which sentence-transformers saved in `folder` (T26)."""
    for weights in folder.glob("model*.safetensors*"):
        weights.unlink()
    model.save_pretrained(folder)


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
    if not (folder / "config.json").is_file():
        model = load_causal_lm(start_of_adapter(folder), attention=attention)
        with reading(folder):
            PeftModel.from_pretrained(decoder_of(model), str(folder)).merge_and_unload()  # in place
        return model
    options = attention_options(attention)
    with reading(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the embedder in `folder`; AnchorvecError if it has lost what closes and limits a text."""
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None or tokenizer.model_max_length > 10**9:
        raise AnchorvecError(
            f"{folder}: its tokenizer has no end token, pad token or length limit; the folder has lost a part of its "
            "tokenizer_config.json, copy it again"
        )
    return tokenizer


def attention_options(attention: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the recipe's `model.attention`."""
    return {} if attention == "auto" else {"attn_implementation": attention}


def can_write(folder: str | Path) -> bool:
    """Whether the folder holds a causal LM, head included, rather than a decoder body alone (T26).

    That of an adapter does if it was trained to write, too.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():  # a LoRA adapter, over a start that has the head
        return bool((read_json(str(folder), START) or {}).get("writes"))
    with reading(folder):
        architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


def stored_prompt(folder: str | Path, name: str) -> str:
    """The prompt that is stored with the embedder in `folder` under `name`; empty if there is none.

    Raises AnchorvecError if it is no embedder.
    """
    path = Path(folder) / "config_sentence_transformers.json"
    if not path.is_file():
        raise AnchorvecError(f"{folder}: not an embedder, no {path.name}; name a folder that anchorvec wrote")
    with reading(folder):
        return str(json.loads(path.read_text(encoding="utf-8"))["prompts"].get(name) or "")


def _add_sentence_transformers_files(folder: Path, readout: Readout, prompts: Mapping[str, str]) -> None:
    """Write modules.json and the module folders beside the causal LM, which stays as it is (T26)."""
    transformer = Transformer(
        str(folder),
        # Texts go to the tokenizer as they are; a chat template would move the pooled position (T21).
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
        model_kwargs={"dtype": "auto"},
    )
    model = SentenceTransformer(
        modules=[transformer, *readout.modules(transformer.get_embedding_dimension())],
        prompts={"query": "", "document": "", **prompts},
        similarity_fn_name="cosine",
        device="cpu",
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch, create_model_card=False)
        for name in ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]:
            shutil.copy2(Path(scratch) / name, folder / name)
        for module in Path(scratch).glob("[0-9]*_*"):
            shutil.copytree(module, folder / module.name)
    make_portable(folder)

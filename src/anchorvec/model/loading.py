"""Loads an embedder that is named by a folder or a hub id."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers.utils.hub import cached_file

from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path
from anchorvec.model.folders import (
    faulty_weights,
    folder_fingerprint,
    identify,
    instead,
    is_local,
    read_json,
    reading,
    start_of_adapter,
)
from anchorvec.model.latent_attention import LatentAttention, is_of_tokens
from anchorvec.model.packing import packing_pays, use_packed_texts
from anchorvec.model.untrusted import OWN_MODULE


def load_model(
    model: SentenceTransformer | str | Path, *, merge: bool = True, revision: str | None = None
) -> SentenceTransformer:
    """`model` itself if it is one, else the embedder of that folder or hub id, in its own dtype.

    `revision` names a branch, tag or commit of a hub id.

    The folder of a Stage II with LoRA holds an adapter alone; it is put over the stage it started from, which
    stands beside it, and with `merge` merged into it, in fp32. Nothing is trusted: no code from the folder is run,
    and the weights are read from safetensors only. Raises AnchorvecError if there is no such model, or if it is no
    embedder: sentence-transformers would make one up, with mean pooling.
    """
    if isinstance(model, SentenceTransformer):
        return model
    name = str(model)
    folder, is_here = user_path(name), is_local(model)
    found = identify(model, revision=revision)
    if found.kind not in ("embedder", "LoRA stage"):
        raise AnchorvecError(instead(found, wanted="an embedder"))
    with reading(model):
        if found.kind == "LoRA stage":
            if fault := faulty_weights(folder):  # peft would read a pickle
                raise AnchorvecError(fault)
            loaded = load_model(start_of_adapter(folder)).float()  # small updates would be lost in half precision (T9)
            adapted = PeftModel.from_pretrained(loaded[0].model, str(folder))
            loaded[0].model = adapted.merge_and_unload() if merge else adapted
            _load_trained_modules(loaded, folder)
            loaded = loaded.eval()
        else:
            loaded = load_sentence_transformer(
                str(folder) if is_here else name,
                local_files_only=is_here,
                revision=revision,
                model_kwargs={"use_safetensors": True},
            )
    if getattr(loaded.tokenizer, "pad_token", "") is None:
        raise AnchorvecError(
            f"{name}: its tokenizer has no pad token; the folder has lost a part of its tokenizer_config.json, copy it "
            "again"
        )
    return loaded


def load_sentence_transformer(
    name: str, *, local_files_only: bool = True, revision: str | None = None, **options: Any
) -> SentenceTransformer:
    """The embedder `name`, a folder or hub id, with our own module where it has one, and no other code than libraries'.

    `local_files_only`, `revision` and `options` are those of `SentenceTransformer`.
    """
    where: dict[str, Any] = {"local_files_only": local_files_only, "revision": revision}
    listed = read_json(name, "modules.json", revision) or []
    if all(module["type"] != OWN_MODULE for module in listed):
        return SentenceTransformer(name, trust_remote_code=False, **where, **options)
    device = options.pop("device", None)
    modules: list[Any] = []
    for module in listed:
        kind = LatentAttention if module["type"] == OWN_MODULE else _library_class(module["type"])
        given = options if kind is Transformer else {}
        modules.append(kind.load(name, subfolder=module["path"], trust_remote_code=False, **where, **given))
    settings = read_json(name, "config_sentence_transformers.json", revision) or {}
    kept: dict[str, Any] = {key: settings.get(key) for key in ("prompts", "default_prompt_name", "similarity_fn_name")}
    return SentenceTransformer(modules=modules, device=device, **kept)


def _library_class(name: str) -> Any:
    """The module of sentence-transformers that a `modules.json` calls `name`, which may be an older name."""
    kinds = {kind.__name__: kind for kind in (Transformer, Pooling, Normalize, Dense)}
    kind = kinds.get(name.rpartition(".")[2]) if name.startswith("sentence_transformers.") else None
    if kind is None:
        raise AnchorvecError(f"its module {name} is none that anchorvec puts beside its own; name another model")
    return kind


def _load_trained_modules(model: SentenceTransformer, folder: Path) -> None:
    """Put the modules that trained beside an adapter, as they are in its `folder`, into `model`, its start."""
    for i, module in enumerate(read_json(str(folder), "modules.json")):
        if is_of_tokens(model[i]):
            trained = type(model[i]).load(str(folder), subfolder=module["path"])  # type: ignore[attr-defined]
            model[i] = trained.to(model.device)


def load_encoder(model: SentenceTransformer | str | Path, dtype: torch.dtype | None = None) -> SentenceTransformer:
    """`model` itself if it is one, else as `load_model` loads it, but encoding without padding where that is faster.

    `dtype` converts what is loaded; None: it stays as it is. The vectors differ by rounding alone.
    """
    if isinstance(model, SentenceTransformer):
        return model
    loaded = load_model(model)
    if dtype is not None:
        loaded = loaded.to(dtype)
    if packing_pays(loaded.device, loaded.dtype or torch.float32):
        use_packed_texts(loaded)
    return loaded


def name_and_revision(model: str | Path) -> tuple[str, str]:
    """What results call `model`: PARENT/FOLDER and a hash of all that is in it, or its hub id and its commit there.

    Raises AnchorvecError if it is no embedder, or cannot be read.
    """
    found = identify(model)
    if found.kind not in ("embedder", "LoRA stage"):
        raise AnchorvecError(instead(found, wanted="an embedder"))
    if not is_local(model):
        with reading(model):
            return str(model), Path(str(cached_file(str(model), "modules.json"))).parent.name
    folder = user_path(model).resolve()
    revision = folder_fingerprint(folder)
    if found.kind == "LoRA stage":  # the folder has the adapter alone
        start = folder_fingerprint(start_of_adapter(folder))
        revision = hashlib.sha256(f"{revision} {start}".encode()).hexdigest()[:40]
    return f"{folder.parent.name or 'local'}/{folder.name}", revision


def warn_of_named_prompts(model: SentenceTransformer, names: Sequence[str] = ()) -> None:
    """Warn if `model` was trained with query instructions, has none by default, and none for one of `names`."""
    known = sorted(key for key, prompt in model.prompts.items() if key.endswith("-query") and prompt)
    missing = [name for name in names if f"{name}-query" not in model.prompts] or ([] if names else ["these queries"])
    if known and missing and not model.prompts.get("query"):
        warnings.warn(
            f"this model's training queries had instructions ({', '.join(known)}), {', '.join(missing)} have none; "
            "give one as --instruction (in Python: instruction=)",
            stacklevel=3,
        )

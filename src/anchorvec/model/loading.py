"""Loads an embedder that is named by a folder or a hub id."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers.utils.hub import cached_file

from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path
from anchorvec.model.folders import (
    faulty_weights,
    folder_fingerprint,
    identify,
    instead,
    is_local,
    reading,
    start_of_adapter,
)
from anchorvec.model.packing import packing_pays, use_packed_texts


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
            loaded = loaded.eval()
        else:
            loaded = SentenceTransformer(
                str(folder) if is_here else name,
                trust_remote_code=False,
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

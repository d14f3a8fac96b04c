"""A hash of all that decides which vectors a loaded model gives, its weights above all."""

import itertools
import json
from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from sentence_transformers import SentenceTransformer

_NAMES = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Of a configuration, what says where it came from; the numbers' format is hashed with the weights."""


def model_fingerprint(model: SentenceTransformer) -> str | None:
    """A hash of `model` as it is now, as 32 hexadecimal digits; None where its weights are not at hand.

    It covers every weight and buffer, bit by bit, the modules with their settings, the tokenizer and all limits of
    length; of its prompts none, for a text is hashed with its own. xxh3 tells weights apart as fast as they are read.
    """
    if model.get_backend() != "torch":  # other runtimes hold them
        return None
    modules: Iterable[Any] = model
    described = {
        "modules": [(name, _class(module), module.extra_repr()) for name, module in model.named_modules()],
        "settings": [module.get_config_dict() for module in modules if hasattr(module, "get_config_dict")],
        "limits": [model.truncate_dim, model.max_seq_length],
        **_of_transformer(model[0]),
        "tokenizer": _tokenizer(getattr(model, "tokenizer", None)),
    }
    digest = xxhash.xxh3_128(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _class(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _of_transformer(body: Any) -> dict[str, Any]:
    """The configuration and the adapters of the first module's decoder, and its limits by side, where it has them."""
    decoder = getattr(body, "model", None)
    config: Any = getattr(decoder, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return {
        "config": {key: value for key, value in settings.items() if key not in _NAMES},
        "adapters": repr(getattr(decoder, "peft_config", None)),
        "limits by side": [getattr(body, name, None) for name in ("query_length", "document_length")],
    }


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What the tokenizer does with a text; what the last call left of truncation and padding is not of it (T25)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    else:
        state = {"vocab": tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else repr(tokenizer)}
    sides = ("model_max_length", "padding_side", "truncation_side", "chat_template")
    return {"class": _class(tokenizer), **state, "sides": [getattr(tokenizer, name, None) for name in sides]}

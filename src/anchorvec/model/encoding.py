"""Encoding many texts without padding, in batches of tokens instead of texts."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from anchorvec.model.compiling import compile_decoder_layers
from anchorvec.model.packing import packed_row, reads_packed, to_device

BATCH_TOKENS = {"cpu": 2_048, "cuda": 32_768}
"""Tokens that are encoded at a time, by device."""

COMPILE_CHARACTERS = 20_000_000
"""From so much text on, the decoder layers are compiled on a GPU, which takes some ten seconds."""

_TOKENIZED_AT_ONCE = 2_048
"""Texts. The next ones are tokenized while a GPU encodes."""


def encode_packed(
    model: SentenceTransformer, texts: Sequence[str], *, prompt: str = "", compiled: bool | None = None
) -> Tensor:
    """The embeddings of `texts`, each with `prompt` before it: (texts, dim), on the model's device, in its dtype.

    `model` reads packed texts (`use_packed_texts`); the vectors are those of its own `encode`, but for rounding.
    `compiled`: whether the decoder layers are compiled for it; None: on a GPU, where there is much text. Raises
    ValueError for a model that reads padded texts.
    """
    if not reads_packed(model):
        raise ValueError("the model reads padded texts; use its own encode")
    device = model.device
    if compiled is None:
        compiled = device.type == "cuda" and sum(map(len, texts)) >= COMPILE_CHARACTERS
    if compiled:
        body: Any = model[0]
        compile_decoder_layers(body.model)
    # Long texts first, so that memory is short at once or never.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    embeddings: list[Tensor] = []
    places: list[int] = []
    with torch.inference_mode():
        read: dict[str, Any] = model.preprocess(["a text"], prompt=prompt)
        left_out = {"prompt_length": read["prompt_length"]} if "prompt_length" in read else {}
        for start in range(0, len(order), _TOKENIZED_AT_ONCE):
            rows = order[start : start + _TOKENIZED_AT_ONCE]
            ids = model.tokenizer([prompt + texts[i] for i in rows], truncation=True)["input_ids"]
            for group in _groups([len(text) for text in ids], BATCH_TOKENS.get(device.type, 2_048)):
                features = packed_row([ids[i] for i in group], device) | left_out
                embeddings.append(model(features)["sentence_embedding"])
                places += [rows[i] for i in group]
        if not embeddings:
            return torch.empty(0, model.get_embedding_dimension() or 0, device=device)
        together = torch.cat(embeddings)
        return torch.empty_like(together).index_copy(0, to_device(np.asarray(places), device), together)


def _groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The indices of the texts, long ones first, in groups of at most `most` tokens, or of one text."""
    group: list[int] = []
    held = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if group and held + lengths[i] > most:
            yield group
            group, held = [], 0
        group.append(i)
        held += lengths[i]
    if group:
        yield group

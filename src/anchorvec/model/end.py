"""How a text ends, which is where it is read: the guarantee that every text has its end, at its last position.

It lives in the tokenizer's own post-processor (T1), so that every program that reads the folder has it.
"""

import json
from collections.abc import Mapping
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from anchorvec.errors import AnchorvecError

EndPrompt = tuple[str, str]
"""Words before and after a text; the state at the last of them is the embedding."""


def with_end(
    tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, end_prompt: EndPrompt | None = None
) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` that closes every text with exactly one end, kept under truncation.

    Its post-processor is one template: what the base's tokenizer puts before a text (BOS, read from a probe, or asked
    for by `add_bos_token`: T22), then either `text, end token`, or `before, text, after` of `end_prompt`. Truncation to
    `max_tokens` reserves the template's place (T1). Padding is on the right; a tokenizer without a pad token pads with
    its end token, which is harmless because padding is found by mask, never by id (T2).

    If a text contains the literal of the end token, that literal becomes the same id inside the text, as in
    any tokenizer; the pooled position is still the one that the template added, the last. Raises AnchorvecError for a
    tokenizer that is no fast one or has no end token, and where no room is left for a text.
    """
    _check_usable(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()

    def ids(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    prefix = _prefix(backend)
    if not prefix and tokenizer.init_kwargs.get("add_bos_token") and tokenizer.bos_token_id is not None:
        prefix = [tokenizer.bos_token_id]  # asked for in tokenizer_config.json, which not every class obeys
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


def stored_end(tokenizer: PreTrainedTokenizerBase) -> EndPrompt | Literal["token"] | None:
    """How `tokenizer` closes a text, if `with_end` made it: with its end token, or with an end prompt; else None."""
    template = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"] if tokenizer.is_fast else None
    pieces = (template or {}).get("special_tokens", {})
    if "after" not in pieces:
        return None
    before, after = (pieces.get(name, {}).get("ids", []) for name in ("before", "after"))
    if not before and after == [tokenizer.eos_token_id]:
        return "token"
    return str(tokenizer.decode(before)), str(tokenizer.decode(after))


def _check_usable(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise AnchorvecError(
            f"model.base: {type(tokenizer).__name__} has no tokenizer.json; convert it to a fast tokenizer first"
        )
    if tokenizer.eos_token_id is None:
        raise AnchorvecError(
            "model.base: the tokenizer has no end token; set `eos_token` in its tokenizer_config.json "
            "to the token that closes a text"
        )


def template_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that the tokenizer puts before and after each text."""
    return _around_text(tokenizer.backend_tokenizer)


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

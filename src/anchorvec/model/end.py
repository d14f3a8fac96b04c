"""How a text ends, which is where it is read: the guarantee that every text has its end, at its last position.

It lives in the tokenizer's own post-processor (T1), so that every program that reads the folder has it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from anchorvec.errors import AnchorvecError

EndPrompt = tuple[str, str]
"""Words before and after a text; the state at the last of them is the embedding."""

_PIECES = ("prefix", "before", "between", "after")
"""Of the template, in their order; what the base's own tokenizer puts before a text is the prefix."""


@dataclass(frozen=True)
class Template:
    """The token ids that stand `before` a text and `after` it, and `between` its copies where it is read twice.

    None: it is read once.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    between: tuple[int, ...] | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.before, *(self.between or ()), *self.after)

    @property
    def copies(self) -> int:
        """How often a text stands in it."""
        return 1 if self.between is None else 2

    def span(self, ids: Sequence[int]) -> slice:
        """Where the text stands in `ids`, with its prompt: of two copies the second one."""
        stop = len(ids) - len(self.after)
        return slice(stop - (len(ids) - len(self.ids)) // self.copies, stop)

    def once(self, ids: Sequence[Any]) -> Sequence[Any]:
        """The part of `ids` that is of one copy of a text, where a tokenizer gave them without special tokens.

        Copies are made without these too. `ids`: or whatever else there is of each token.
        """
        return ids[: len(ids) // self.copies]

    def tokens(self, limit: int) -> int:
        """The tokens of a text that is cut at `limit`, in which it counts once, in all its copies."""
        return len(self.ids) + self.copies * (limit - len(self.ids))


def with_end(
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    end_prompt: EndPrompt | None = None,
    closed: bool = True,
    between: str | None = None,
) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` that closes every text with exactly one end, kept under truncation.

    Its post-processor is one template: what the base's tokenizer puts before a text (BOS, read from a probe, or asked
    for by `add_bos_token`: T22), then either `text, end token`, or `before, text, after` of `end_prompt`, or the text
    alone if it is not `closed`. With `between` the text stands there twice, with these words between. Truncation to
    `max_tokens`, which counts it once, reserves the template's place (T1). Padding is on the right; a tokenizer without
    a pad token pads with its end token, which is harmless because padding is found by mask, never by id (T2).

    If a text contains the literal of the end token, that literal becomes the same id inside the text, as in
    any tokenizer; the pooled position is still the one that the template added, the last. Raises AnchorvecError for a
    tokenizer that is no fast one or has no end token, and where no room is left for a text.
    """
    _check_usable(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    prefix = _prefix(backend)
    backend.post_processor = None

    def ids(text: str) -> list[int]:
        return list(backend.encode(text).ids)

    if not prefix and tokenizer.init_kwargs.get("add_bos_token") and tokenizer.bos_token_id is not None:
        prefix = [tokenizer.bos_token_id]  # asked for in tokenizer_config.json, which not every class obeys
    before, after = (ids(part) for part in end_prompt) if end_prompt else ([], [tokenizer.eos_token_id])
    if not after:
        raise AnchorvecError("model.end: the words after the text are empty; write at least one")
    pieces = {"prefix": prefix, "before": before, "after": after if closed else [], "between": ids(between or "")}
    around = sum(map(len, pieces.values()))
    if max_tokens <= around:
        raise AnchorvecError(
            f"model.max_tokens: {max_tokens} leaves no room for a text; the tokens around it are {around}"
        )
    backend.post_processor = _post_processor(backend, pieces, twice=between is not None)
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


def stored_end(tokenizer: PreTrainedTokenizerBase) -> EndPrompt | Literal["token", "none"] | None:
    """How `tokenizer` closes a text, if `with_end` made it: with its end token, an end prompt, or not; else None."""
    pieces = _own_pieces(tokenizer.backend_tokenizer) if tokenizer.is_fast else None
    if pieces is None:
        return None
    before, after = pieces["before"], pieces["after"]
    if not after:
        return "none"
    if not before and after == [tokenizer.eos_token_id]:
        return "token"
    return str(tokenizer.decode(before)), str(tokenizer.decode(after))


def stored_between(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The words between the copies of a text that `tokenizer`, made by `with_end`, reads twice; None: it does not."""
    between = template_of(tokenizer).between
    return None if between is None else str(tokenizer.decode(list(between)))


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


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The token ids that the tokenizer puts around each text, and whether the text stands there twice."""
    backend = tokenizer.backend_tokenizer
    pieces = _own_pieces(backend)
    if pieces is None:
        return Template(*map(tuple, _around_text(backend)))
    before, after = (*pieces["prefix"], *pieces["before"]), tuple(pieces["after"])
    return Template(before, after, tuple(pieces["between"]) if _stands_twice(backend) else None)


def _around_text(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after the text `probe`, whatever its truncation."""
    bare = backend.encode("probe", add_special_tokens=False)
    full = backend.post_processor.process(bare).ids if backend.post_processor else bare.ids
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare.ids)
    return full[:start], full[start + len(bare) :]


def _prefix(backend: Tokenizer) -> list[int]:
    """The ids that a base's tokenizer puts before a text; of an embedder's, not its end prompt."""
    pieces = _own_pieces(backend)
    return _around_text(backend)[0] if pieces is None else pieces["prefix"]


def _own_pieces(backend: Tokenizer) -> dict[str, list[int]] | None:
    """The ids of each piece of a template that `with_end` made; None: it did not make this one."""
    template = _stored_template(backend)
    named = template.get("special_tokens", {})
    if template.get("type") != "TemplateProcessing" or not named.keys() <= set(_PIECES):
        return None
    return {name: list(named.get(name, {}).get("ids", [])) for name in _PIECES}


def _stands_twice(backend: Tokenizer) -> bool:
    return sum("Sequence" in piece for piece in _stored_template(backend)["single"]) == 2


def _stored_template(backend: Tokenizer) -> dict[str, Any]:
    return json.loads(backend.to_str())["post_processor"] or {}


def _post_processor(backend: Tokenizer, pieces: Mapping[str, list[int]], *, twice: bool) -> TemplateProcessing:
    """`prefix before TEXT after`, or `TEXT between TEXT`, for a pair of texts too; empty pieces are left out."""
    tokens = [
        {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]} for name, ids in pieces.items() if ids
    ]

    def around(text: Sequence[str]) -> list[str]:
        named = {name: [f"{name}:0"] if ids else [] for name, ids in pieces.items()}
        again = [*named["between"], *text] if twice else []
        return [*named["prefix"], *named["before"], *text, *again, *named["after"]]

    return TemplateProcessing(single=around(["$A:0"]), pair=around(["$A:0", "$B:0"]), special_tokens=tokens)

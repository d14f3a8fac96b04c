"""How the texts of a recipe are read: its readout, and where in the tokens of a text the text itself stands."""

from collections.abc import Callable
from typing import Any

from anchorvec.errors import AnchorvecError
from anchorvec.model.end import Template, template_of
from anchorvec.model.readout import Readout, prompt_length
from anchorvec.recipe import Recipe
from anchorvec.terminal import say


def readout_of(recipe: Recipe) -> Readout:
    """How the embedder of `recipe` reads texts."""
    model = recipe.model
    return Readout(
        max_tokens=model.max_tokens,
        end_prompt=None if isinstance(model.end, str) else (model.end.before, model.end.after),
        closed=model.end != "none",
        between=model.between if model.read == "twice" else None,
        attention_direction=model.attention_direction,
        pooling=model.pooling,
        pool_prompt=model.pool_prompt,
    )


def check_instructions(recipe: Recipe, tokenizer: Any) -> None:
    """Raise AnchorvecError for a length limit in training, or an instruction, that leaves no room for a text.

    And, where a mean leaves it out, for an instruction that is read otherwise before a text than alone. `recipe` has
    them, `tokenizer`, the embedder's, adds what stands around every text.
    """
    limit = recipe.training_tokens
    key = "model.max_tokens" if recipe.data.max_tokens is None else "data.max_tokens"
    template = template_of(tokenizer)
    if len(template.ids) >= limit:
        raise AnchorvecError(
            f"{key}: {limit} leaves no room for a text; the {len(template.ids)} tokens around it count too"
        )
    for i, source in enumerate(recipe.data.train):
        for name in ("instruction", "document_instruction"):
            instruction = getattr(source, name)
            ids = template.once(tokenizer(instruction, add_special_tokens=False)["input_ids"])
            if len(ids) + len(template.ids) >= limit:
                raise AnchorvecError(
                    f"data.train.{i}.{name}: it leaves no room for a text within {key} = {limit}; "
                    "shorten it, or raise the limit"
                )
            if not recipe.model.pool_prompt and instruction:
                _check_left_out(f"data.train.{i}.{name}", instruction, tokenizer, template)


def _check_left_out(key: str, instruction: str, tokenizer: Any, template: Template) -> None:
    """Raise AnchorvecError where the tokens of the instruction alone are not those that stand before a text.

    sentence-transformers counts the former to leave out the latter (T32), versions before 6 without white space at its
    end.
    """
    alone = tokenizer(instruction, add_special_tokens=False)["input_ids"]
    joined = any(
        tokenizer(instruction + word, add_special_tokens=False)["input_ids"][: len(alone)] != alone
        for word in ("a", "The", "2", "日", "(")
    )
    counted = prompt_length(tokenizer, instruction) == len(template.before) + len(alone)
    if joined or not counted or instruction != instruction.rstrip():
        raise AnchorvecError(
            f"{key}: {instruction[-20:]!r} is read otherwise before a text than alone, so that model.pool_prompt=false "
            "would leave out a part of the text or keep a part of the instruction; end it in a word or a colon, "
            "without white space"
        )


def mask_token(tokenizer: Any, token: str) -> int:
    """The id that masks a token: `token` if `tokenizer` has one for it, else its own mask token, which is said.

    Raises AnchorvecError where there is neither.
    """
    ids = template_of(tokenizer).once(tokenizer(token, add_special_tokens=False)["input_ids"])
    if len(ids) == 1:
        return int(ids[0])
    if tokenizer.mask_token_id is not None:
        own = f"the tokenizer's own {tokenizer.mask_token!r} is taken"
        say(f"stage_one.masking.token: {token!r} is {len(ids)} tokens of this model; {own}")
        return int(tokenizer.mask_token_id)
    single = [c for c in _MASKS if len(tokenizer(c, add_special_tokens=False)["input_ids"]) == 1]
    raise AnchorvecError(
        f"stage_one.masking.token: {token!r} is {len(ids)} tokens of this model, and masks are one; of one token are, "
        f"for example, {' '.join(single) or 'none of those that were tried'}"
    )


_MASKS = ["_", "#", "*", "~", "^", "|", "@", "<mask>", "[MASK]", "<unk>", "?", "x"]


def text_span(tokenizer: Any, recipe: Recipe) -> Callable[[list[int]], slice]:
    """The function that finds in the ids of a text those of the text alone, without its prompt and what is around it.

    `tokenizer` reads it, with an instruction of `recipe` before it. A tokenizer may join the first word with the space
    before it, so these ids may differ from those of the text read without a prompt. A text that has no instruction, but
    begins with the words of one, loses these. Of two copies it is the second one.
    """
    prompts = {text for source in recipe.data.train for text in (source.instruction, source.document_instruction)}
    template = template_of(tokenizer)
    heads = [
        list(template.once(tokenizer(prompt, add_special_tokens=False)["input_ids"])) for prompt in sorted(prompts)
    ]

    def shared(body: list[int], head: list[int]) -> int:
        """How many ids of `head` are at the beginning of a text that has its words there; else 0."""
        n = next((i for i, (a, b) in enumerate(zip(body, head, strict=False)) if a != b), min(len(body), len(head)))
        rest = "".join(tokenizer.convert_ids_to_tokens(head[n:]))
        joined = "".join(tokenizer.convert_ids_to_tokens(body[n : n + len(rest)]))
        return n if joined.startswith(rest) else 0

    def span(ids: list[int]) -> slice:
        with_prompt = template.span(ids)
        body = ids[with_prompt]
        return slice(with_prompt.start + max(shared(body, head) for head in heads), with_prompt.stop)

    return span


def without_prompt_and_end(tokenizer: Any, recipe: Recipe) -> Callable[[list[int]], list[int]]:
    """The function that leaves of the ids of a text those of the text alone, as `text_span` finds them.

    `tokenizer` and `recipe` as there.
    """
    span = text_span(tokenizer, recipe)
    return lambda ids: ids[span(ids)]

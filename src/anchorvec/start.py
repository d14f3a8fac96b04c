"""What a run starts from: the untrained embedder of its base model, and what the recipe takes over from that."""

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import HfApi
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from anchorvec.data.reading import check_instructions, readout_of
from anchorvec.data.rows import is_on_hub
from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path
from anchorvec.model.base import base_on_hub
from anchorvec.model.decoder import layers_with_dropout
from anchorvec.model.embedder import build_embedder
from anchorvec.model.end import stored_between, stored_end
from anchorvec.model.folders import ModelFolder, commit_of_model, identify, reading
from anchorvec.recipe import EndPrompt, ModelSettings, Recipe, TrainData
from anchorvec.terminal import say

_SECONDS = 10.0
"""For the hub to say which commit a data set has."""


def with_settings_of_base(recipe: Recipe) -> Recipe:
    """`recipe` with the limit, way to read and prompts of its base, where that is an embedder and it names no others.

    Of any base it takes a limit within its positions, where the recipe names none. One line on stderr says what is
    kept, and what of an embedder is replaced or left out. Raises AnchorvecError where texts would be longer in training
    than the limit that is kept.
    """
    asked = recipe.model
    if asked.base in ("tiny", "smollm2") or asked.base.endswith(".gguf"):
        return recipe
    found = identify(asked.base, revision=asked.revision)
    if found.kind not in ("embedder", "LoRA stage"):
        return _within_positions(recipe, found)
    kept: list[str] = []
    replaced: list[str] = []
    model = _kept_model(found, asked, kept, replaced)
    sources = [_with_prompts(source, found.prompts) for source in recipe.data.train]
    if sources != recipe.data.train:
        kept.append("prompts " + ", ".join(f"{name} {prompt!r}" for name, prompt in found.prompts.items()))
    elif found.prompts:
        replaced.append("its prompts, by the recipe's instructions")
    replaced += [f"its module {name}, left out" for name in found.other_modules]
    _check_data_limit(recipe, model)
    say(
        f"model.base: {asked.base} is {found}; kept: {'; '.join(kept) or 'nothing of its own'}; "
        f"replaced: {'; '.join(replaced) or 'nothing'}"
    )
    return recipe.model_copy(update={"model": model, "data": recipe.data.model_copy(update={"train": sources})})


def is_commit(revision: object) -> bool:
    """Whether `revision` is the hash of a commit, whose files never change."""
    return isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def pinned(recipe: Recipe) -> Recipe:
    """`recipe` with the commit of what it takes from the hub as `revision`, so that its base and data stay the same.

    Where the hub can not be asked, a line says so, and the revision stays as it is.
    """
    model = recipe.model
    if (repo := base_on_hub(model.base)) is not None:
        commit = commit_of_model(repo, revision=model.revision)
        model = model.model_copy(update={"revision": commit or _not_pinned("model.base", repo, model.revision)})
    sources = []
    for i, source in enumerate(recipe.data.train):
        if is_on_hub(source.path) and not is_commit(source.revision):
            try:
                commit = HfApi().dataset_info(source.path, revision=source.revision, timeout=_SECONDS).sha
            except Exception:  # of the hub, of the http library, of the network
                commit = _not_pinned(f"data.train.{i}.path", source.path, source.revision)
            source = source.model_copy(update={"revision": commit})
        sources.append(source)
    return recipe.model_copy(update={"model": model, "data": recipe.data.model_copy(update={"train": sources})})


def _not_pinned(key: str, repo: str, revision: str | None) -> str | None:
    say(f"{key}: the hub did not say which commit of {repo} this is; another run of this recipe may take another one")
    return revision


def _within_positions(recipe: Recipe, found: ModelFolder) -> Recipe:
    """`recipe` with the positions of the causal LM `found` as its limit, where it names none that is lower."""
    asked = recipe.model
    if "max_tokens" in asked.model_fields_set or found.positions is None or asked.max_tokens <= found.positions:
        return recipe
    model = asked.model_copy(update={"max_tokens": found.positions})
    _check_data_limit(recipe, model)
    say(f"model.max_tokens: {found.positions}, the positions of {asked.base}; by default it is {asked.max_tokens}")
    return recipe.model_copy(update={"model": model})


def _check_data_limit(recipe: Recipe, model: ModelSettings) -> None:
    if recipe.data.max_tokens is not None and recipe.data.max_tokens > model.max_tokens:
        raise AnchorvecError(
            f"data.max_tokens: {recipe.data.max_tokens} is more than the {model.max_tokens} tokens that "
            f"{model.base} reads; lower it, or set model.max_tokens"
        )


def _kept_model(found: ModelFolder, asked: ModelSettings, kept: list[str], replaced: list[str]) -> ModelSettings:
    """`asked` with the limit of the embedder `found`, and its way to read; what was done is added to the two lists."""
    update: dict[str, object] = {}
    if found.max_tokens is not None and "max_tokens" not in asked.model_fields_set:
        update["max_tokens"] = found.max_tokens
        kept.append(f"its limit of {found.max_tokens} tokens")
    elif found.max_tokens not in (None, asked.max_tokens):
        replaced.append(f"its limit of {found.max_tokens} tokens, by model.max_tokens = {asked.max_tokens}")
    with reading(asked.base):
        tokenizer = AutoTokenizer.from_pretrained(str(user_path(asked.base)), revision=asked.revision)
    end = stored_end(tokenizer)
    if end == "none" and "lasttoken" in (found.pooling, asked.pooling if "pooling" in asked.model_fields_set else None):
        end = None  # it pools the last token of the text itself
    ours = asked.end if isinstance(asked.end, str) else (asked.end.before, asked.end.after)
    if end is not None and "end" not in asked.model_fields_set:
        update["end"] = end if isinstance(end, str) else EndPrompt(before=end[0], after=end[1])
        kept.append(_words_for_end(end))
    elif end != ours:
        replaced.append(f"the end of its texts, by {'an end prompt' if isinstance(ours, tuple) else _ENDS[ours]}")
    for key, value in _own_reading(found, stored_between(tokenizer), asked).items():
        default = ModelSettings.model_fields[key].default
        if key not in asked.model_fields_set and value != default:
            update[key] = value
            kept.append(f"{key} {value!r}")
        elif value != getattr(asked, key):
            replaced.append(f"its {key} {value!r}, by {getattr(asked, key)!r}")
    try:
        return ModelSettings.model_validate(asked.model_dump() | update)
    except ValidationError as error:
        key, reason = error.errors()[0]["ctx"]["keys"][0], error.errors()[0]["msg"]
        raise AnchorvecError(f"model.{'.'.join(key)}: {reason}; {asked.base} reads texts so") from None


_ENDS = {"token": "the end token", "none": "nothing"}


def _words_for_end(end: tuple[str, str] | str) -> str:
    if isinstance(end, tuple):
        return f"its end prompt {end[0]!r} TEXT {end[1]!r}"
    return "its end token" if end == "token" else "no end"


def _own_reading(found: ModelFolder, between: str | None, asked: ModelSettings) -> dict[str, Any]:
    """The keys of `model` that say how the embedder `found` reads texts, with `between` its copies; but for its end.

    A pooling that a recipe can't ask for is left out, and so is what stands between copies that are not `asked` for.
    """
    poolings = get_args(ModelSettings.model_fields["pooling"].annotation)
    not_twice = asked.read == "once" and "read" in asked.model_fields_set
    return {
        "attention_direction": "causal" if found.is_causal else "bidirectional",
        "read": "once" if between is None else "twice",
        **({} if between is None or not_twice else {"between": between}),
        **({"pooling": found.pooling, "pool_prompt": found.pool_prompt} if found.pooling in poolings else {}),
    }


def _with_prompts(source: TrainData, prompts: dict[str, str]) -> TrainData:
    """`source` with the prompts of its name, or else of queries and documents, where it has no instruction."""
    update = {}
    for key, side in (("instruction", "query"), ("document_instruction", "document")):
        prompt = prompts.get(f"{source.name}-{side}", prompts.get(side))
        if prompt and key not in source.model_fields_set:
            update[key] = prompt
    return source.model_copy(update=update)


def stored_prompts(recipe: Recipe) -> dict[str, str]:
    """The prompts that are stored with the model that `recipe` trains (T15).

    `query` and `document` are the instructions that all data sets share. Where data sets differ there is none by
    default, and each one's are stored as `NAME-query` and `NAME-document`, the keys that mteb looks up too.
    """
    sources = recipe.data.train
    instructions = {"query": [s.instruction for s in sources], "document": [s.document_instruction for s in sources]}
    prompts = {}
    for side, values in instructions.items():
        same = len(set(values)) == 1
        prompts[side] = values[0] if same else ""
        if not same:
            prompts |= {f"{s.name}-{side}": value for s, value in zip(sources, values, strict=True)}
    return prompts


def build_base(recipe: Recipe, folder: Path) -> Path:
    """The untrained embedder of the recipe's base model, written into `folder`.

    Raises AnchorvecError for a base that cannot be used, and for an instruction that leaves no room for a text.
    """
    settings = recipe.model
    build_embedder(
        settings.base,
        folder,
        readout=readout_of(recipe),
        prompts=stored_prompts(recipe),
        revision=settings.revision,
        seed=recipe.seed,
        head=recipe.stage_one is not None or recipe.writes,
        writes=recipe.writes,
    )
    try:
        check_instructions(recipe, AutoTokenizer.from_pretrained(folder))
        _check_generation(recipe, folder)
        _check_attention_dropout(recipe, folder)
        if settings.pooling == "latent_attention" and settings.attention_direction == "causal":
            say("model.pooling: latent_attention behind causal attention is not NV-Embed's; that is bidirectional")
    except AnchorvecError:
        shutil.rmtree(folder)  # so that the mended recipe may use the run's folder
        raise
    return folder


def _check_attention_dropout(recipe: Recipe, folder: Path) -> None:
    """Raise AnchorvecError where the decoder has no dropout of attention weights to set."""
    if recipe.stage_two is None or not recipe.stage_two.attention_dropout:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    if not layers_with_dropout(model):
        raise AnchorvecError(
            f"stage_two.attention_dropout: the layers of {recipe.model.base} have no dropout of attention weights that "
            "could be set; take 0"
        )


def _check_generation(recipe: Recipe, folder: Path) -> None:
    """Raise AnchorvecError where a query and a document after it are longer than the positions of the decoder."""
    if recipe.stage_two is None or not recipe.stage_two.generation_weight:
        return
    positions, longest = identify(folder).positions, recipe.longest_generated
    if positions is not None and longest > positions:
        raise AnchorvecError(
            f"stage_two.generation_weight: a query and the document after it may have {longest} tokens, more than the "
            f"{positions} positions of {recipe.model.base}; lower data.max_tokens"
        )

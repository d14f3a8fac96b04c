"""What a recipe can't ask for: combinations of keys that are refused before any work."""

from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from anchorvec.recipe.settings import ModelSettings, Recipe
    from anchorvec.recipe.stages import Masking, StageOne, StageTwo

_Key = tuple[str, ...]


def check_reading(model: "ModelSettings") -> None:
    """Raise PydanticCustomError where `model` has a way to read texts that no plain folder can say."""
    means = model.pooling != "lasttoken"
    if model.end == "none" and not means:
        _refuse("`none` leaves nothing to pool the last token's state at; take token, or another model.pooling", "end")
    if model.read == "twice" and means:
        _refuse(
            "{pooling} would pool both copies of a text that is read twice; take lasttoken",
            "pooling",
            pooling=model.pooling,
        )
    if model.read == "once" and model.between != "\n":
        _refuse("there are no copies to stand between; it needs model.read: twice", "between")
    if not model.pool_prompt and not means:
        _refuse("false is for means; lasttoken pools one token, which is never the prompt's", "pool_prompt")
    if not model.pool_prompt and not isinstance(model.end, str):
        _refuse(
            "sentence-transformers takes the words after a text for a part of its prompt, and would leave out as many "
            "of the text; take `token` or `none`, or model.pool_prompt: true",
            "end",
        )


def check_masking(masking: "Masking") -> None:
    """Raise PydanticCustomError for shares of `masking` that are more than all."""
    if masking.mask_replace_prob + masking.random_replace_prob > 1:
        _refuse("together they are more than all tokens that are chosen", "mask_replace_prob", "random_replace_prob")


def check_target(stage: "StageOne") -> None:
    """Raise PydanticCustomError where what is told in Stage I, with the settings `stage`, has no such form."""
    over_vocabulary = stage.candidates == "vocabulary"
    if over_vocabulary and stage.target != "bag_of_words":
        _refuse("candidates are those of bags of words; it needs target: bag_of_words", "candidates")
    if stage.source != "other" and not over_vocabulary:
        _refuse("it is for candidates: vocabulary; among texts the other one of a pair is told", "source")


def check_recipe(recipe: "Recipe") -> None:
    """Raise PydanticCustomError for keys of different sections of `recipe` that don't go together."""
    if recipe.training_tokens > recipe.model.max_tokens:
        _refuse(
            "{training} is more than the {limit} of model.max_tokens; lower it, or raise that",
            "data.max_tokens",
            training=recipe.training_tokens,
            limit=recipe.model.max_tokens,
        )
    if recipe.stage_one is None and recipe.stage_two is None:
        _refuse("both are null, so there is nothing to train; leave one on", "stage_one", "stage_two")
    if recipe.evaluation.at and recipe.stage_two is None:
        _refuse("these are steps of Stage II, which is null; for Stage I take evaluation.every", "evaluation.at")
    if recipe.evaluation.keep_best and not (recipe.evaluation.at or recipe.evaluation.every):
        _refuse(
            "no step but the last is scored; say after which, with evaluation.at or evaluation.every",
            "evaluation.keep_best",
        )
    if recipe.stage_one is not None:
        _check_stage_one(recipe.stage_one, recipe.model)
    if recipe.stage_two is not None and recipe.stage_two.generation_weight and recipe.model.read == "twice":
        _refuse(
            "a document is written after a query that stands there once; it needs model.read: once",
            "stage_two.generation_weight",
        )
    if recipe.stage_two is not None and recipe.stage_two.positives == "dropout":
        _check_dropout(recipe.stage_two)


def _check_dropout(stage: "StageTwo") -> None:
    """A text is its own positive: nothing else of its pair can be asked for."""
    others = {
        "bag_of_words_weight": (stage.bag_of_words_weight, 0),
        "generation_weight": (stage.generation_weight, 0),
        "in_batch_negatives": (stage.in_batch_negatives, "random"),
        "negatives": (stage.negatives, 0),
    }
    for key, (value, needed) in others.items():
        if value != needed:
            _refuse(
                "each document is its own positive (positives: dropout), and nothing else of a pair is read; take "
                "{needed}",
                f"stage_two.{key}",
                needed=needed,
            )
    if not stage.attention_dropout and not (stage.lora and stage.lora.dropout):
        _refuse(
            "both passes over a text would give the same vector; set stage_two.attention_dropout, 0.3 for example",
            "stage_two.positives",
        )


def _check_stage_one(stage: "StageOne", model: "ModelSettings") -> None:
    if stage.sharded and stage.lora is not None:
        _refuse(
            "what is shared out is all that trains; adapters are small: take false, or stage_one.lora: null",
            "stage_one.sharded",
        )
    both_ways, twice = model.attention_direction == "bidirectional", model.read == "twice"
    if model.pooling in ("latent_attention", "dense_mean") and stage.target != "masked":
        _refuse(
            "{pooling} is trained in Stage II alone, and Stage I reads embeddings; it needs stage_one: null, or "
            "stage_one.target: masked",
            "model.pooling",
            pooling=model.pooling,
        )
    if stage.target == "masked" and not both_ways:
        _refuse(
            "masked tokens are told from those on both sides; it needs model.attention_direction: bidirectional",
            "stage_one.target",
        )
    if stage.target == "masked" and twice:
        _refuse("one copy would show what is masked in the other; it needs model.read: once", "stage_one.target")
    if stage.candidates == "vocabulary" and stage.lm_weight and (both_ways or twice):
        shows = "attention in both directions shows" if both_ways else "the first copy of a text shows"
        _refuse(
            "a token is predicted from those before it, and {shows} it; it needs model.attention_direction: causal and "
            "model.read: once, or 0",
            "stage_one.lm_weight",
            shows=shows,
        )


def _refuse(message: str, *keys: str, **values: Any) -> None:
    """Raise PydanticCustomError with the `message`, filled with `values`, at the dotted `keys`."""
    places: list[_Key] = [tuple(key.split(".")) for key in keys]
    raise PydanticCustomError("combination", message, {**values, "keys": places})

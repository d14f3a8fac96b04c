"""The decoder tokens that a step of each stage takes in its forward passes, estimated before it is made."""

import statistics
from collections.abc import Sequence
from typing import Any

from anchorvec.data.stage_inputs import StageInputs, reconstructs, sample_rows
from anchorvec.objectives.pairs import TokenPair
from anchorvec.recipe import Recipe
from anchorvec.run import StageName
from anchorvec.training.stage_one import pair_tokenizer

SAMPLED_PAIRS = 64
"""From which the tokens of a pair are estimated."""


def sampled_pairs(recipe: Recipe, inputs: StageInputs, tokenizer: Any) -> list[TokenPair]:
    """Some pairs of `inputs` as `recipe` reads and writes them; `tokenizer` is the embedder's."""
    tokenize = pair_tokenizer(recipe, tokenizer)
    return tokenize(sample_rows(inputs.reconstruction, SAMPLED_PAIRS, recipe.seed))["pairs"]


def tokens_of_a_pair(recipe: Recipe, batch: Sequence[TokenPair]) -> float:
    """Tokens in all passes of Stage I of `recipe` over a pair, on average over `batch`; without one, as it would be."""
    target = reconstructs(recipe)
    alpha, writes = (recipe.stage_one.alpha, target == "text") if recipe.stage_one else (0.5, False)
    alpha = 0.5 if target == "masked" else alpha  # both texts are read
    return statistics.mean(pair.tokens(alpha, writes=writes) for pair in batch)


def tokens_of_a_step(recipe: Recipe, inputs: StageInputs, batch: Sequence[TokenPair]) -> dict[StageName, float]:
    """Tokens in all passes of a step of each stage of `recipe`, which reads `inputs`, from a sample, `batch`.

    A hard negative is taken to be as long as a positive.
    """
    tokens: dict[StageName, float] = {}
    if one := recipe.stage_one:
        tokens["stage_one"] = tokens_of_a_pair(recipe, batch) * one.pairs_per_step
    if two := recipe.stage_two:
        own = two.positives == "dropout"
        read = statistics.mean(len(pair.document if own else pair.query) + len(pair.document) for pair in batch)
        rows = sum(report.rows for report in inputs.reports.values())
        with_negatives = sum(inputs.rows_with_negatives.values()) / rows
        read += with_negatives * two.negatives * statistics.mean(len(pair.document) for pair in batch)
        if two.generation_weight:  # a document is written behind its query
            read += statistics.mean(len(pair.query) + len(pair.document) for pair in batch)
        tokens["stage_two"] = read * two.pairs_per_step
    return tokens

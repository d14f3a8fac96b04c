"""What bags of words, or of tokens, take from the data of a run, and from the embedder before the stage."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anchorvec.data.stage_inputs import StageInputs, sample_rows
from anchorvec.data.tokens import PairTokenizer
from anchorvec.errors import AnchorvecError
from anchorvec.objectives.bag_of_tokens import BagOfTokens
from anchorvec.objectives.bag_of_words import SAMPLE_PAIRS, BagOfWordsLoss
from anchorvec.objectives.pairs import TokenPair

ORIGIN_PAIRS = 16
"""Pairs whose mean embedding before training is the origin."""


def bag_of_words_loss(
    model: Any,
    inputs: StageInputs,
    tokenize: PairTokenizer,
    *,
    seed: int,
    encode: Callable[[list[list[int]], list[int]], Tensor] | None,
    bf16: bool,
) -> BagOfWordsLoss:
    """The loss with the token embeddings of `model`, and candidates that `seed` draws from the rows of `inputs`.

    `tokenize` makes pairs of rows. `encode` gives the embeddings (texts, dim) of texts before the stage, from their ids
    and the tokens of their prompts, under autocast with `bf16`. Without it the loss has no origin, and is there for its
    vectors alone. Raises AnchorvecError where the texts of the data don't differ in their words.
    """
    pairs = _sample(inputs, tokenize, seed)
    origin = None
    if encode is not None:
        training = model.training
        model.eval()  # without dropout
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            first = pairs[:ORIGIN_PAIRS]
            texts, prompts = ([t for pair in first for t in pair.read()], [n for pair in first for n in pair.prompts()])
            origin = encode(texts, prompts).mean(dim=0)
        model.train(training)
    try:
        return BagOfWordsLoss(
            model.get_input_embeddings().weight,
            [pair.query_targets for pair in pairs],
            [pair.document_targets for pair in pairs],
            origin=origin,
        )
    except ValueError as error:
        raise AnchorvecError(
            f"data.train: texts can not be told apart by their words, because {error}; give more pairs, of texts that "
            "differ"
        ) from error


def bag_of_tokens(model: Any, inputs: StageInputs, tokenize: PairTokenizer, *, seed: int, max_df: float) -> BagOfTokens:
    """The bags of texts in the tokens of `model`; stop tokens stand in more than the share `max_df` of the texts.

    That is of a sample of the pairs of `inputs`, which `seed` draws; `tokenize` makes pairs of rows. Raises
    AnchorvecError where no token is left.
    """
    pairs = _sample(inputs, tokenize, seed)
    texts = [pair.query_targets for pair in pairs], [pair.document_targets for pair in pairs]
    try:
        return BagOfTokens(model.config.get_text_config().vocab_size, *texts, max_df=max_df)
    except ValueError as error:
        raise AnchorvecError(f"stage_one.max_df: {max_df:g} leaves no token to tell, as {error}; raise it") from error


def _sample(inputs: StageInputs, tokenize: PairTokenizer, seed: int) -> list[TokenPair]:
    """Pairs of `inputs`, at most `SAMPLE_PAIRS`, the same ones for the same `seed`."""
    rows = sample_rows(inputs.reconstruction, SAMPLE_PAIRS, seed)
    return [pair for i in range(0, len(rows), 256) for pair in tokenize(rows[i : i + 256])["pairs"]]

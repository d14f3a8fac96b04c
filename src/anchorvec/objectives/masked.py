"""Masked next-token prediction: what makes a decoder that reads in both directions worth reading (LLM2Vec).

    L = -1/M * sum over masked positions i of log P(x_i | x with masks)

read in both directions, and predicted through the model's own LM head from the state at i - 1, as a decoder has always
predicted (arXiv 2404.05961). M counts the masked positions of the whole optimizer step, of queries and documents alike.
Of those that are chosen, a share has the mask token in its place, a share some other token, and the rest itself. The
first token of a text has no state before it, and is never chosen; prompts and ends are not either.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from anchorvec.model.packing import to_device
from anchorvec.objectives.pairs import TokenPair
from anchorvec.objectives.reconstruction import VocabularyReconstruction

IGNORED = -100
"""In the place of a target: this token is not predicted."""


@dataclass(frozen=True)
class TokenMasking:
    """Which tokens of a text are predicted, and what stands in their place; the names are those of transformers.

    `token`: the id of the mask. `vocabulary`: ids below it may stand there, too. `after`: tokens that close each text.
    Each token of a text is chosen with `mlm_probability`, of its first `most` tokens (None: of all).
    `mask_replace_prob` of the chosen become the mask, `random_replace_prob` any token.
    """

    token: int
    vocabulary: int
    after: int = 0
    mlm_probability: float = 0.2
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    most: int | None = None
    seed: int = 0

    def draw(self, pairs: Sequence[TokenPair], step: int, first: int = 0) -> list[TokenPair]:
        """`pairs` as they are read in the optimizer step number `step`, with a label or IGNORED for each token.

        Their targets, which become the labels, are the ids of the texts in them. What is random follows the seed, the
        step and the pair's place in it, that of the `first` of them and on.
        """
        places = enumerate(pairs, start=first)
        return [self._masked(pair, np.random.default_rng([self.seed, step, i])) for i, pair in places]

    def _masked(self, pair: TokenPair, draws: np.random.Generator) -> TokenPair:
        query, query_labels = self._text(pair.query, len(pair.query_targets), draws)
        document, document_labels = self._text(pair.document, len(pair.document_targets), draws)
        return replace(
            pair, query=query, document=document, query_targets=query_labels, document_targets=document_labels
        )

    def _text(self, ids: list[int], length: int, draws: np.random.Generator) -> tuple[list[int], list[int]]:
        """A text as it is read, and its labels; the text itself has so many tokens, before those that close it."""
        read: NDArray[np.int64] = np.array(ids, dtype=np.int64)
        stop = len(ids) - self.after
        start = stop - length
        positions = np.arange(max(1, start), stop if self.most is None else min(stop, start + self.most))
        chosen = positions[draws.random(len(positions)) < self.mlm_probability]
        labels = np.full(len(ids), IGNORED)
        labels[chosen] = read[chosen]
        how = draws.random(len(chosen))
        read[chosen[how < self.mask_replace_prob]] = self.token
        others = chosen[(how >= self.mask_replace_prob) & (how < self.mask_replace_prob + self.random_replace_prob)]
        read[others] = draws.integers(self.vocabulary, size=len(others))
        return read.tolist(), labels.tolist()


class MaskedReconstruction(VocabularyReconstruction):
    """Masked next-token prediction in both texts of a pair, as `masking` draws it.

    `model` and `options` are those of `Reconstruction`; the model reads in both directions.
    """

    writes = False

    def __init__(self, model: PreTrainedModel, *, masking: TokenMasking, **options: Any) -> None:
        super().__init__(model, **options)
        self.masking = masking

    @property
    def parts(self) -> dict[str, float]:
        """One, the loss."""
        return {"masked": 1.0}

    @property
    def exchanges(self) -> tuple[str, ...]:
        """None: no embedding is read."""
        return ()

    def draw(self, pairs: Sequence[TokenPair], step: int, first: int = 0) -> list[TokenPair]:
        """`pairs` with masks, and labels in the place of targets; `step` and `first` as in `TokenMasking.draw`."""
        return self.masking.draw(pairs, step, first)

    def targets(self, pairs: Sequence[TokenPair]) -> tuple[int]:
        """The masked positions of `pairs`."""
        return (sum(label != IGNORED for p in pairs for label in (*p.query_targets, *p.document_targets)),)

    def sums(self, pairs: Sequence[TokenPair], read: Sequence[TokenPair]) -> tuple[Tensor]:
        """-log P of the masked tokens of `pairs`, which are what is `read`."""
        texts = [text for pair in read for text in (pair.query, pair.document)]
        labels = np.array([n for pair in pairs for n in (*pair.query_targets, *pair.document_targets)], dtype=np.int64)
        [places] = np.nonzero(labels != IGNORED)
        states = self.states(texts)  # (tokens, dim)
        before = states[to_device(places - 1, states.device)]  # (masked positions, dim)
        return (self.negative_log_likelihood(before, to_device(labels[places], states.device)).sum(),)

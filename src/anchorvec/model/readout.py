"""How a text becomes one vector: what closes it, where its state is read, and what the saved folder says of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from anchorvec.model.end import EndPrompt, with_end
from anchorvec.model.packing import to_device


@dataclass(frozen=True)
class Readout:
    """A text is read once, by a causal decoder, up to `max_tokens` tokens, everything counted.

    It is closed by the tokenizer's end token, or by the words of an `end_prompt`, before and after it; its embedding is
    the decoder's final state as `pooling` reads it, one of `POOLINGS`.
    """

    max_tokens: int = 512
    end_prompt: EndPrompt | None = None
    pooling: str = "lasttoken"

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
        """A copy of `tokenizer` that closes every text so, as `with_end`, which says what it raises."""
        return with_end(tokenizer, max_tokens=self.max_tokens, end_prompt=self.end_prompt)

    def module(self, dim: int) -> Pooling:
        """The pooling module of the saved folder, of states of `dim` numbers."""
        module: Pooling = Pooling(dim, pooling_mode=self.pooling)
        return module

    def pool(self, states: Tensor, lengths: Sequence[int]) -> Tensor:
        """The embeddings (texts, dim) of texts of these `lengths`, whose `states` (tokens, dim) stand in one row."""
        return POOLINGS[self.pooling](states, lengths)


def last_states(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """The state at the last token of each text: (texts, dim); `states` and `lengths` as in `Readout.pool`."""
    return states[to_device(np.cumsum(lengths) - 1, states.device)]


def last_states_of_padded(states: Tensor, mask: Tensor) -> Tensor:
    """The state at each text's last real token: (texts, dim), of padded `states` (texts, length, dim).

    `mask`: (texts, length), 1 at tokens and 0 at padding, on whatever side that is.
    """
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


POOLINGS: dict[str, Callable[[Tensor, Sequence[int]], Tensor]] = {"lasttoken": last_states}
"""sentence-transformers' name of a pooling -> the same for packed texts."""

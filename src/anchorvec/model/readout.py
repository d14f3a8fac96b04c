"""How a text becomes one vector: what it is read with, where its states are pooled, and what the folder says of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules.module import Module
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from anchorvec.model.end import EndPrompt, stored_between, stored_end, with_end
from anchorvec.model.folders import identify, reading
from anchorvec.model.latent_attention import LatentAttention, dense_layers
from anchorvec.model.packing import to_device

AttentionDirection = Literal["causal", "bidirectional"]


@dataclass(frozen=True)
class Readout:
    """A text is read by a decoder whose attention goes in one direction or in both, up to `max_tokens` tokens.

    These count everything around the text, and the text once, though with `between` it stands there twice, with these
    words between. It is closed by the tokenizer's end token, by the words of an `end_prompt`, before and after it, or
    not at all if it is not `closed`. Its embedding is what `pooling`, one of `POOLINGS`, makes of the decoder's final
    states; without `pool_prompt` a mean leaves out those of a text's prompt.
    """

    max_tokens: int = 512
    end_prompt: EndPrompt | None = None
    closed: bool = True
    between: str | None = None
    attention_direction: AttentionDirection = "causal"
    pooling: str = "lasttoken"
    pool_prompt: bool = True

    def __str__(self) -> str:
        """How a text is read, and what its embedding is, after `a text is`."""
        copies = "once," if self.between is None else f"twice, with {self.between!r} between its copies,"
        end = (
            f"between {self.end_prompt[0]!r} and {self.end_prompt[1]!r}" if self.end_prompt else "before the end token"
        )
        place = end if self.closed else "with nothing after it"
        pooled = _POOLED[self.pooling]
        if self.pooling != "lasttoken":
            pooled += " of all its tokens, " + ("what stands around it and " if self.closed else "")
            pooled += "its instruction included" if self.pool_prompt else "its instruction left out"
        return f"read {copies} with {self.attention_direction} attention, {place}; its embedding is {pooled}"

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
        """A copy of `tokenizer` that puts this around every text, as `with_end`, which says what it raises."""
        return with_end(
            tokenizer,
            max_tokens=self.max_tokens,
            end_prompt=self.end_prompt,
            closed=self.closed,
            between=self.between,
        )

    def modules(self, dim: int) -> list[Module]:
        """The modules of the saved folder behind the decoder, for states of `dim` numbers; new ones, where they train.

        Raises AnchorvecError for a `dim` that its pooling cannot do with.
        """
        before: dict[str, Callable[[], list[Module]]] = {
            "latent_attention": lambda: [LatentAttention(dim)],
            "dense_mean": lambda: [*dense_layers(dim)],
        }
        mode = "mean" if self.pooling in before else self.pooling
        pooling = Pooling(dim, pooling_mode=mode, include_prompt=self.pool_prompt)
        return [*before.get(self.pooling, list)(), pooling]

    def pool(self, states: Tensor, lengths: Sequence[int], prompts: Sequence[int] | None = None) -> Tensor:
        """The embeddings (texts, dim) of texts of these `lengths`, whose `states` (tokens, dim) stand in one row.

        Where modules come before the pooling, `states` are what these give. `prompts`: the tokens of each text's prompt
        and of what stands before it, as `prompt_length` counts them.
        """
        left_out = [0] * len(lengths) if self.pool_prompt or prompts is None else prompts
        return POOLINGS[self.pooling](states, lengths, left_out)


def stored_readout(folder: str | Path) -> Readout:
    """How the embedder in `folder`, which anchorvec made, reads texts.

    Raises AnchorvecError for a folder that cannot be read.
    """
    found = identify(folder)
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    end = stored_end(tokenizer)
    return Readout(
        max_tokens=tokenizer.model_max_length,
        end_prompt=end if isinstance(end, tuple) else None,
        closed=end != "none",
        between=stored_between(tokenizer),
        attention_direction="causal" if found.is_causal else "bidirectional",
        pooling=found.pooling_with_modules or "lasttoken",
        pool_prompt=found.pool_prompt,
    )


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """The tokens that `tokenizer` reads of `prompt`, by which sentence-transformers leaves a prompt out of a mean.

    It counts those of the prompt alone, whatever they are, but for a special one at the end (T32).
    """
    if not prompt:
        return 0
    ids = tokenizer(prompt, truncation=True)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def last_states(states: Tensor, lengths: Sequence[int], left_out: Sequence[int]) -> Tensor:
    """The state at the last token of each text: (texts, dim); `states` and `lengths` as in `Readout.pool`.

    That is no prompt's, so that none is `left_out`.
    """
    return states[to_device(np.cumsum(lengths) - 1, states.device)]


def mean_states(states: Tensor, lengths: Sequence[int], left_out: Sequence[int]) -> Tensor:
    """The mean of the states of each text, but for as many at its beginning as are `left_out`: (texts, dim).

    `states` and `lengths` as in `Readout.pool`.
    """
    return _weighted_mean(states, lengths, _positions(lengths) >= np.repeat(left_out, lengths))


def position_weighted_states(states: Tensor, lengths: Sequence[int], left_out: Sequence[int]) -> Tensor:
    """As `mean_states` of `states`, `lengths` and `left_out`, the n-th state of a text weighted by n."""
    positions = _positions(lengths)
    return _weighted_mean(states, lengths, (positions + 1) * (positions >= np.repeat(left_out, lengths)))


def _positions(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Of each token in its text, from 0: (tokens,)."""
    return np.concatenate([np.arange(length) for length in lengths])


def _weighted_mean(states: Tensor, lengths: Sequence[int], weights: NDArray[np.generic]) -> Tensor:
    """The mean of the states of each text with these `weights` (tokens,), in fp32 at least: (texts, dim)."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    weight = to_device(weights.astype(np.float32), states.device).to(dtype)[:, None]
    text = to_device(np.repeat(np.arange(len(lengths)), lengths), states.device)
    sums = states.new_zeros(len(lengths), states.shape[1], dtype=dtype).index_add(0, text, states.to(dtype) * weight)
    totals = weight.new_zeros(len(lengths), 1).index_add(0, text, weight)
    return (sums / totals).to(states.dtype)


_POOLED = {
    "lasttoken": "the final state at the last token",
    "mean": "the mean of the final states",
    "weightedmean": "the mean of the final states, each weighted by its place,",
    "latent_attention": "the mean, behind attention to 512 trained latents, of the final states",
    "dense_mean": "the mean, behind dense layers, of the final states",
}

POOLINGS: dict[str, Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]] = {
    "lasttoken": last_states,
    "mean": mean_states,
    "weightedmean": position_weighted_states,
    "latent_attention": mean_states,
    "dense_mean": mean_states,
}
"""sentence-transformers' name of a pooling -> the same for packed texts. The last two have modules before it."""

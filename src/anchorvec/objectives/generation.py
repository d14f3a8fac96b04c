"""Generation beside the contrastive loss: the decoder that embeds also writes the document after the query (GritLM).

    L_gen = -1/N * sum over pairs, t of log P(d_t | q, separator, d_<t)
    loss  = L_contrastive + weight * L_gen

q is the query as it is read, its instruction included, d the document alone, closed by the end token where all of it
was read, N the tokens of all documents of the optimizer step (arXiv 2402.09906, equation 3; there the texts that are
written are conversations). Both losses are of the same weights in one step, not of the same activations: the pass that
writes is causal, also in a model that reads in both directions.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from anchorvec.model.packing import to_device
from anchorvec.objectives.pairs import TokenPair, micro_batches, tokens_at_once
from anchorvec.objectives.reconstruction import VocabularyReconstruction


class Generation(VocabularyReconstruction):
    """The documents of pairs are written, token by token, after their queries.

    Between a query and its document stands the `separator`, token ids. Of a document as it is read `content` leaves the
    text alone; it is closed by the id `end` where it has fewer than `limit` tokens, and so was not cut. `model` and
    `options` are those of `Reconstruction`.
    """

    writes = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        separator: Sequence[int],
        end: int,
        limit: int,
        content: Callable[[list[int]], list[int]] = lambda ids: ids,
        **options: Any,
    ) -> None:
        super().__init__(model, alpha=1.0, **options)
        self.separator, self.end, self.limit, self.content = list(separator), end, limit, content

    @property
    def parts(self) -> dict[str, float]:
        """One, the loss."""
        return {"generation": 1.0}

    @property
    def exchanges(self) -> tuple[str, ...]:
        """None: no embedding is read."""
        return ()

    def pair(self, query: list[int], document: list[int]) -> TokenPair:
        """What is written after what, of a `query` and a `document` as they are read."""
        closed = [self.end] if len(document) < self.limit else []
        return TokenPair([*query, *self.separator], [], [], [*self.content(document), *closed])

    def targets(self, pairs: Sequence[TokenPair]) -> tuple[int]:
        """The tokens of the documents of `pairs`."""
        return (sum(len(pair.document_targets) for pair in pairs),)

    def sums(self, pairs: Sequence[TokenPair], read: Sequence[TokenPair]) -> tuple[Tensor]:
        """-log P of the documents of `pairs`, which are what is `read`."""
        texts = [[*pair.query, *pair.document_targets] for pair in read]
        lengths = [len(text) for text in texts]
        embedded = self._embed(list(itertools.chain.from_iterable(texts)))
        states = self._states(embedded, lengths, writing=True)  # (tokens, dim)
        stops = np.cumsum(lengths)
        sizes = [len(pair.document_targets) for pair in pairs]
        places = np.concatenate([np.arange(stop - size, stop) - 1 for stop, size in zip(stops, sizes, strict=True)])
        labels = np.array([token for pair in pairs for token in pair.document_targets], dtype=np.int64)
        before = states[to_device(places, states.device)]  # (target tokens, dim)
        return (self.negative_log_likelihood(before, to_device(labels, states.device)).sum(),)


def generation_loss(
    objective: Generation,
    queries: Sequence[list[int]],
    documents: Sequence[list[int]],
    *,
    micro_batch_tokens: int | None = None,
    bf16: bool = False,
) -> tuple[Tensor, int]:
    """L_gen of a step with these `queries` and `documents`, as token ids as they are read, by `objective`.

    And the tokens that were passed over for it. With `micro_batch_tokens` the activations of so many are held at a
    time, and are computed again in the backward pass; value and gradient are the same. `bf16`: under autocast, which is
    not on outside of the model that a trainer knows.
    """
    pairs = [objective.pair(query, document) for query, document in zip(queries, documents, strict=True)]
    targets = objective.targets(pairs)

    def loss(part: Sequence[TokenPair]) -> Tensor:
        with torch.autocast(objective.model.device.type, torch.bfloat16, enabled=bf16):
            found: Tensor = objective(part, targets=targets).loss
        return found

    tokens = tokens_at_once(pairs, **objective.cut | {"packed": True})
    if micro_batch_tokens is None:
        return loss(pairs), tokens
    parts = micro_batches(pairs, micro_batch_tokens, **objective.cut)
    losses: list[Tensor] = [checkpoint(loss, part, use_reentrant=False) for part in parts]
    return sum(losses[1:], losses[0]), tokens

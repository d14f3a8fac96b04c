"""Stage II: sentence-transformers' InfoNCE loss on the same embedding, set up for pairs with hard negatives.

    L = -log( exp(cos(q, d+) / tau) / sum over d of exp(cos(q, d) / tau) )

The candidates d of a query are all positives and all hard negatives of the step. The loss is the library's own,
unmodified: it takes all candidates together, so a step may have fewer hard negatives than pairs. Word reconstruction,
which can be added to it, is ours.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor

from anchorvec.packing import reads_packed, token_ids
from anchorvec.words import WordLoss


def contrastive_loss(
    model: SentenceTransformer,
    *,
    temperature: float = 0.05,
    micro_batch_tokens: int | None = None,
    words: WordLoss | None = None,
    words_weight: float = 1.0,
    content: Callable[[list[int]], list[int]] = lambda ids: ids,
) -> CachedMultipleNegativesRankingLoss | MultipleNegativesRankingLoss:
    """InfoNCE with in-batch negatives over cosine similarities divided by `temperature`.

    Texts of at most `micro_batch_tokens`, padding included, are held in memory at a time through cached gradients
    (GradCache), which encode every text twice; None encodes the whole step once. Loss and gradient are the same.
    With `words`, `words_weight` times word reconstruction is added: each embedding tells the words of the pair's other
    text. `content` takes the ids of a text as it is read, and leaves out its prompt and its end.
    """
    options: dict[str, Any] = {"scale": 1 / temperature, "directions": ("query_to_doc",)}
    loss: CachedMultipleNegativesRankingLoss | MultipleNegativesRankingLoss
    plain, cached = MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss
    if words is not None:
        plain, cached = _AndWords, _CachedAndWords
    if micro_batch_tokens is None:
        loss = plain(model, **options)
    elif reads_packed(model):
        loss = cached(model, mini_batch_num_tokens=micro_batch_tokens, **options)
    else:
        # The library's count of tokens leaves padding out, which takes memory too: as many texts as always fit.
        texts = max(1, micro_batch_tokens // (model.max_seq_length or micro_batch_tokens))
        loss = cached(model, mini_batch_size=texts, **options)
    if isinstance(loss, _Words) and words is not None:
        loss.words, loss.words_weight, loss.content, loss.word_losses = words, words_weight, content, []
    return loss


class _Words:
    """What adds word reconstruction to one of the library's losses."""

    words: WordLoss
    words_weight: float
    content: Callable[[list[int]], list[int]]
    word_losses: list[float]
    """Of each step, without the weight."""
    texts: list[list[list[int]]]  # of the batch: queries, positives

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        features = list(sentence_features)
        self.texts = [[self.content(text) for text in token_ids(column)] for column in features[:2]]
        loss: Tensor = super().forward(features, labels)  # type: ignore[misc]
        return loss

    def weighted_word_loss(self, from_queries: Tensor, from_documents: Tensor) -> Tensor:
        """The weighted loss of word reconstruction from the embeddings of the batch, both directions alike."""
        queries, documents = self.texts
        to_document = self.words(from_queries, queries, documents, to="document")
        to_query = self.words(from_documents, documents, queries, to="query")
        loss: Tensor = (to_document + to_query).mean() / 2
        self.word_losses.append(float(loss.detach()))
        return self.words_weight * loss


class _AndWords(_Words, MultipleNegativesRankingLoss):
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
        return loss + self.weighted_word_loss(*embeddings[:2])


class _CachedAndWords(_Words, CachedMultipleNegativesRankingLoss):
    def calculate_loss(
        self, reps: list[list[Tensor]], *args: Any, with_backward: bool = False, **options: Any
    ) -> Tensor:
        loss: Tensor = super().calculate_loss(reps, *args, with_backward=with_backward, **options)
        told = self.weighted_word_loss(torch.cat(reps[0]), torch.cat(reps[1]))
        if with_backward:
            torch.autograd.backward(told)
        return loss + told.detach() if with_backward else loss + told

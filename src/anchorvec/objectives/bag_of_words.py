"""Bag-of-words reconstruction: an embedding must tell the words of the pair's other text among thousands of texts.

A decoder that writes a text predicts most words from those before, and soon does without the embedding. Here all words
are told at once, and are judged against other texts instead of against the vocabulary, so that nothing is learned from
words that all texts share. The words of a text T are one vector: the sum of their token embeddings, weighted by how
rare they are and whitened, at length 1.

    b(T)    = normalized( C^(-1/2) * sum over distinct words w of T of log(N / n_w) * (E_w - mean) )
    p(T|e)  = exp(cos(e - e_0, b(T)) / tau) / sum over candidates T' of exp(cos(e - e_0, b(T')) / tau)

N is the number of pairs in a sample, n_w how many of their queries or of their documents have the word, whichever are
more, at least 1; E are the model's own token embeddings, mean and C their mean and covariance by frequency (variances
below 1e-4 of the largest count as that). A word is a token of the model. The candidates are the right text and those of
the sample, the same at every step, but for texts with the same words, texts with the words that were read, other
documents of a query that was read and other queries of a document that was read (T16), and texts without a vector; a
text that the sample has twice counts twice. They are not encoded, so thousands of them cost little,
and no pair depends on another pair of its step. e_0 is the mean embedding before the stage, which tells no text.

Its parts are known ones: a bag of words told from one embedding (LLaMA2Vec, arXiv 2312.15503, against the vocabulary),
inverse document frequencies, whitening (arXiv 2103.15316), and candidates that are a sample (sampled softmax, arXiv
1412.2007). "Words" are what a text consists of, here the tokens of the model.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorvec.model.packing import to_device
from anchorvec.objectives.pairs import TokenPair
from anchorvec.objectives.reconstruction import Reconstruction

SAMPLE_PAIRS = 8_192
"""Pairs in the sample, at most."""

_LEAST_VARIANCE = 1e-4
"""Directions with less than this share of the largest variance are amplified as those that have it."""

_SAME_WORDS = 1 - 1e-4
"""Cosine similarity from which on a candidate has the words of the right text, and is none."""


class BagOfWordsLoss(nn.Module):
    """-log p(T | e) as above, from a model's token embeddings (vocabulary, dim) and the texts of a sample of pairs.

    `queries` and `documents`: the token ids of the sample's texts, without prompts and ends. The token embeddings are
    copied if they are trained: the candidates stay what they are. `origin`: (dim,), e_0; None is 0. `temperature`:
    tau. Raises ValueError for a sample without two pairs, or whose texts do not differ.
    """

    embeddings: Tensor
    origin: Tensor
    weights: Tensor
    mean: Tensor
    whitening: Tensor
    query_candidates: Tensor
    document_candidates: Tensor

    def __init__(
        self,
        embeddings: Tensor,
        queries: Sequence[Sequence[int]],
        documents: Sequence[Sequence[int]],
        *,
        origin: Tensor | None = None,
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        if len(queries) != len(documents) or len(queries) < 2:
            raise ValueError(f"{len(queries)} queries and {len(documents)} documents are no sample of pairs")
        fixed = _at_least_fp32(embeddings.detach())
        fixed = fixed.clone() if embeddings.requires_grad else fixed
        share = _count(fixed, [word for texts in (queries, documents) for text in texts for word in text])
        if not share.any():
            raise ValueError("the texts of the sample have no words")
        share /= share.sum()
        texts_with = [_count(fixed, [word for text in texts for word in set(text)]) for texts in (queries, documents)]
        used = share.nonzero()[:, 0]  # a vocabulary may be much larger
        mean = share[used] @ fixed[used]
        centred = fixed[used] - mean
        covariance = (centred * share[used, None]).T @ centred
        variances, directions = torch.linalg.eigh(covariance.cpu().double())
        if not variances[-1] > 0:
            raise ValueError("the texts of the sample do not differ")
        variances = variances.clamp(min=float(variances[-1]) * _LEAST_VARIANCE)
        self.register_buffer("embeddings", fixed, persistent=False)
        self.register_buffer("origin", torch.zeros_like(mean) if origin is None else origin.to(mean), persistent=False)
        self.register_buffer("weights", torch.log(len(queries) / torch.maximum(*texts_with).clamp(min=1)), False)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("whitening", ((directions / variances.sqrt()) @ directions.T).to(mean), persistent=False)
        self.register_buffer("query_candidates", self.vectors(queries), persistent=False)
        self.register_buffer("document_candidates", self.vectors(documents), persistent=False)
        if not self.query_candidates.any() or not self.document_candidates.any():
            raise ValueError("the words of the sample's queries, or of its documents, are those of all texts")

    def vectors(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The vector b of each text: (texts, dim), of length 1; 0 for a text without a word that weighs anything."""
        device = self.embeddings.device
        if not texts:
            return self.mean.new_zeros(0, len(self.mean))
        words = [sorted(set(text)) for text in texts]
        ids = to_device(np.array([word for text in words for word in text], dtype=np.int64), device)
        starts = to_device(np.array([0, *map(len, words[:-1])]).cumsum(), device)
        weights = self.weights[ids]
        with torch.autocast(device.type, enabled=False):
            sums = F.embedding_bag(ids, self.embeddings, starts, mode="sum", per_sample_weights=weights)
            totals = F.embedding_bag(ids, self.weights[:, None], starts, mode="sum")
            return F.normalize((sums - totals * self.mean) @ self.whitening, dim=1)

    def forward(
        self,
        embeddings: Tensor,
        read: Sequence[Sequence[int]],
        told: Sequence[Sequence[int]],
        *,
        to: Literal["document", "query"],
    ) -> Tensor:
        """-log p(T | e) for each of `embeddings` (texts, dim): (texts,).

        `read` and `told`: the token ids of the text that each is the embedding of, and of its partner T, which is a
        document or a query (`to`). A text without a vector has no loss.
        """
        if not told:
            return embeddings.new_zeros(0)
        candidates, partners = self.document_candidates, self.query_candidates
        if to == "query":
            candidates, partners = partners, candidates
        right, own = self.vectors(told), self.vectors(read)
        with torch.autocast(embeddings.device.type, enabled=False):
            no_candidate = (right @ candidates.T > _SAME_WORDS) | (own @ candidates.T > _SAME_WORDS)
            no_candidate |= (own @ partners.T > _SAME_WORDS) | ~candidates.any(dim=1)
            e = F.normalize(_at_least_fp32(embeddings) - self.origin, dim=1)
            wrong = (e @ candidates.T).masked_fill(no_candidate, -torch.inf)
            scores = torch.cat([(e * right).sum(dim=1, keepdim=True), wrong], dim=1) / self.temperature
            losses = F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long), reduction="none")
            return losses * right.any(dim=1)


class BagOfWordsReconstruction(Reconstruction):
    """Each text of a pair is told, all its words at once, from the other's embedding: one target a text.

    `bag_of_words` is set before `forward`: it may want the model's embeddings before the stage as its origin.
    """

    writes = False
    bag_of_words: BagOfWordsLoss

    @property
    def computed(self) -> BagOfWordsLoss:
        """The candidates and the origin."""
        return self.bag_of_words

    def targets(self, pairs: Sequence[TokenPair]) -> tuple[int, int]:
        """The texts of `pairs`: documents, and queries."""
        return len(pairs), len(pairs)

    def losses(self, embeddings: Tensor, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        """-log p(T | e) of the texts T of `pairs`, summed by direction; `embeddings` as in `Reconstruction.losses`."""
        split = len(pairs) if self.alpha > 0 else 0
        queries, documents = [p.query_targets for p in pairs], [p.document_targets for p in pairs]
        other = len(embeddings) - split  # all pairs, or none
        to_document = self.bag_of_words(embeddings[:split], queries[:split], documents[:split], to="document")
        to_query = self.bag_of_words(embeddings[split:], documents[:other], queries[:other], to="query")
        return to_document.sum(), to_query.sum()

    def score_bytes(self, pairs_per_step: int, tokens: int, device: torch.device) -> int:
        """Similarities of both directions to all candidates, in a step of `pairs_per_step` pairs of any `tokens`.

        The same on any `device`.
        """
        return 4 * 4 * 2 * SAMPLE_PAIRS * pairs_per_step


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _count(embeddings: Tensor, words: Sequence[int]) -> Tensor:
    """How often each word of the vocabulary occurs in `words`: (vocabulary,)."""
    ids = torch.tensor(words, dtype=torch.long, device=embeddings.device)
    return torch.bincount(ids, minlength=len(embeddings)).to(embeddings.dtype)

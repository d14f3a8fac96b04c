"""Stage II: sentence-transformers' InfoNCE loss on the same embedding, set up for pairs with hard negatives.

    L = -log( exp(cos(q, d+) / tau) / sum over d of exp(cos(q, d) / tau) )

The candidates d of a query are all positives and all hard negatives of the step. The loss is the library's own,
unmodified: it takes all candidates together, so a step may have fewer hard negatives than pairs. Of several processes
each has its share of the queries, and the candidates of all. What can be added to it, word reconstruction and
generation, is ours.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import RandContext
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor

from anchorvec.model.end import template_of
from anchorvec.model.packing import part_of_row, reads_packed, side_by_side, token_ids
from anchorvec.objectives.bag_of_words import BagOfWordsLoss
from anchorvec.processes import all_gather, gathered
from anchorvec.ranks import rank, ranks

Loss = CachedMultipleNegativesRankingLoss | MultipleNegativesRankingLoss
Written = Callable[[Sequence[list[int]], Sequence[list[int]]], tuple[Tensor, int]]
"""Of the queries and documents of a step, as token ids as they are read: the generation loss, and its tokens."""


def contrastive_loss(
    model: SentenceTransformer,
    *,
    temperature: float = 0.05,
    micro_batch_tokens: int | None = None,
    bag_of_words: BagOfWordsLoss | None = None,
    bag_of_words_weight: float = 1.0,
    content: Callable[[list[int]], list[int]] = lambda ids: ids,
    generation: Written | None = None,
    generation_weight: float = 1.0,
    one_pass: bool = False,
) -> Loss:
    """InfoNCE with in-batch negatives over cosine similarities divided by `temperature`.

    Texts of at most `micro_batch_tokens`, padding included, are held in memory at a time through cached gradients
    (GradCache), which encode every text twice; None encodes the whole step once. Loss and gradient are the same. With
    `bag_of_words`, `bag_of_words_weight` times that loss is added, of each embedding and the pair's other text.
    `content` takes the ids of a text as it is read, and leaves out its prompt and its end. With `generation`,
    `generation_weight` times its loss is added. With `one_pass` the columns
    of a batch, if they are packed, go through `model` together instead of one after another; the library takes one
    length of all their prompts then, so it is for a pooling that leaves none out.
    """
    options: dict[str, Any] = {"scale": 1 / temperature, "directions": ("query_to_doc",)}
    loss: _PlainAndBeside | _CachedAndBeside
    if micro_batch_tokens is None:
        loss = _PlainAndBeside(model, **options)
    elif reads_packed(model):
        loss = _CachedAndBeside(model, mini_batch_num_tokens=micro_batch_tokens, **options)
    else:
        # The library's count of tokens leaves padding out, which takes memory too: as many texts as always fit.
        longest = template_of(model.tokenizer).tokens(model.max_seq_length or micro_batch_tokens)
        texts = max(1, micro_batch_tokens // longest)
        loss = _CachedAndBeside(model, mini_batch_size=texts, **options)
    loss.one_pass = one_pass
    loss.bag_of_words, loss.bag_of_words_weight, loss.content = bag_of_words, bag_of_words_weight, content
    loss.generation, loss.generation_weight = generation, generation_weight
    there = {"bag_of_words": bag_of_words, "generation": generation}
    loss.beside = {name: [] for name, part in there.items() if part is not None}
    return loss


class _Plain(MultipleNegativesRankingLoss):
    """The library's loss; with `one_pass` the packed texts of all columns go through the model together."""

    one_pass = False

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        if not self.one_pass or not _packed(columns):
            loss: Tensor = super().forward(columns, labels)
            return loss
        row, _ = side_by_side(columns)
        embeddings = self.model(row)["sentence_embedding"].split(_texts(columns))
        return self.compute_loss_from_embeddings(list(embeddings), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        candidates = [*embeddings[1:], *candidates_elsewhere(embeddings[1:])]
        loss: Tensor = super().compute_loss_from_embeddings([embeddings[0], *candidates], labels)
        return loss


class _Cached(CachedMultipleNegativesRankingLoss):
    """The library's loss with cached gradients; with `one_pass` a micro-batch may have texts of all columns."""

    one_pass = False
    texts_of_columns: list[int] | None = None  # of one row with all columns; else the columns come one by one

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        self.texts_of_columns = None
        if self.one_pass and _packed(columns):
            self.texts_of_columns = _texts(columns)
            row, lengths = side_by_side(columns)
            columns = [row | {"lengths": lengths}]
        loss: Tensor = self.forward_cached(columns, labels)
        return loss

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        if "lengths" not in sentence_feature:
            embedded: tuple[Tensor, RandContext | None] = super().embed_minibatch(
                sentence_feature, begin, end, with_grad, copy_random_state, random_state
            )
            return embedded
        # The library would ask the device for the lengths, and wait for all that it still has to do.
        lengths = sentence_feature["lengths"]
        part = part_of_row({k: v for k, v in sentence_feature.items() if k != "lengths"}, lengths, begin, end)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(part["input_ids"]) if copy_random_state else None
            return self.model(part)["sentence_embedding"], state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        if self.texts_of_columns is None:
            return self.loss_of_columns(reps, labels, with_backward=with_backward)
        [row] = reps
        columns = [part.detach().requires_grad_() for part in torch.split(torch.cat(row), self.texts_of_columns)]
        loss = self.loss_of_columns([[column] for column in columns], labels, with_backward=with_backward)
        if with_backward:
            gradient = torch.cat([column.grad for column in columns if column.grad is not None])
            for rep, part in zip(row, torch.split(gradient, [len(rep) for rep in row]), strict=True):
                rep.grad = part
        return loss

    def loss_of_columns(self, reps: list[list[Tensor]], labels: Tensor | None, *, with_backward: bool) -> Tensor:
        """The loss from the embeddings of each column, cut into micro-batches."""
        elsewhere = candidates_elsewhere([torch.cat(column) for column in reps[1:]])
        leaves = [embeddings.detach().requires_grad_() for embeddings in elsewhere]
        candidates = [*reps, *([leaf] for leaf in leaves)]
        loss: Tensor = super().calculate_loss(candidates, labels, with_backward=with_backward)
        if with_backward and elsewhere:
            torch.autograd.backward(elsewhere, [leaf.grad for leaf in leaves])
        return loss


def candidates_elsewhere(embeddings: list[Tensor]) -> list[Tensor]:
    """The candidates of all other processes, one after another; `embeddings`: those of this one, (texts, dim) each.

    Gradients flow back to where they were computed. A process may have any number, as rows may lack negatives: for the
    exchange they are padded to the most.
    """
    if ranks() == 1:
        return []
    own = torch.cat(embeddings)
    sizes = [size for [size] in gathered([len(own)])]
    padded = F.pad(own, (0, 0, 0, max(sizes) - len(own)))
    parts = zip(all_gather(padded), sizes, strict=True)
    return [part[:size] for i, (part, size) in enumerate(parts) if i != rank()]


def _packed(columns: Iterable[dict[str, Any]]) -> bool:
    return all("cu_seq_lens_q" in column for column in columns)


def _texts(columns: Iterable[dict[str, Any]]) -> list[int]:
    """The texts of each packed column."""
    return [len(column["cu_seq_lens_q"]) - 1 for column in columns]


class _Beside:
    """What may stand beside one of the losses: bag-of-words reconstruction, and generation."""

    bag_of_words: BagOfWordsLoss | None  # no default: a module is not found behind a class's own attribute
    bag_of_words_weight = 1.0
    content: Callable[[list[int]], list[int]]
    generation: Written | None = None
    generation_weight = 1.0
    beside: dict[str, list[Tensor]]
    """The losses beside the contrastive one by name: of each step, without their weights."""
    written_tokens = 0
    """Tokens of the last step that were passed over for generation."""
    texts: list[list[list[int]]]  # of the batch, as they are read: queries, positives

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        features = list(sentence_features)
        if self.bag_of_words is not None or self.generation is not None:
            self.texts = [token_ids(column) for column in features[:2]]
        loss: Tensor = super().forward(features, labels)  # type: ignore[misc]
        if self.generation is None:
            return loss
        written, self.written_tokens = self.generation(*self.texts)
        self.beside["generation"].append(written.detach())
        return loss + self.generation_weight * written

    def weighted_bag_of_words(self, from_queries: Tensor, from_documents: Tensor) -> Tensor:
        """The weighted loss of bag-of-words reconstruction from the embeddings of the batch, both directions alike."""
        assert self.bag_of_words is not None
        queries, documents = ([self.content(text) for text in column] for column in self.texts)
        to_document = self.bag_of_words(from_queries, queries, documents, to="document")
        to_query = self.bag_of_words(from_documents, documents, queries, to="query")
        loss: Tensor = (to_document + to_query).mean() / 2
        self.beside["bag_of_words"].append(loss.detach())
        return self.bag_of_words_weight * loss


class _PlainAndBeside(_Beside, _Plain):
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        loss = super().compute_loss_from_embeddings(embeddings, labels)
        return loss if self.bag_of_words is None else loss + self.weighted_bag_of_words(*embeddings[:2])


class _CachedAndBeside(_Beside, _Cached):
    def loss_of_columns(self, reps: list[list[Tensor]], labels: Tensor | None, *, with_backward: bool) -> Tensor:
        loss = super().loss_of_columns(reps, labels, with_backward=with_backward)
        if self.bag_of_words is None:
            return loss
        told = self.weighted_bag_of_words(torch.cat(reps[0]), torch.cat(reps[1]))
        if with_backward:
            torch.autograd.backward(told)
        return loss + told.detach() if with_backward else loss + told

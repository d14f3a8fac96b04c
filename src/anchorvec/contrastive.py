"""Stage II: sentence-transformers' InfoNCE loss on the same embedding, set up for pairs with hard negatives.

    L = -log( exp(cos(q, d+) / tau) / sum over d of exp(cos(q, d) / tau) )

The candidates d of a query are all positives and all hard negatives of the step. The loss is the library's own,
unmodified; only the arrangement of the data is ours.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from anchorvec.packing import reads_packed


def contrastive_loss(
    model: SentenceTransformer, *, temperature: float = 0.05, micro_batch_tokens: int | None = None
) -> CachedMultipleNegativesRankingLoss | MultipleNegativesRankingLoss:
    """InfoNCE with in-batch negatives over cosine similarities divided by `temperature`.

    Texts of at most `micro_batch_tokens`, padding included, are held in memory at a time through cached gradients
    (GradCache), which encode every text twice; None encodes the whole step once. Loss and gradient are the same.
    """
    options: dict[str, Any] = {"scale": 1 / temperature, "directions": ("query_to_doc",)}
    if micro_batch_tokens is None:
        return MultipleNegativesRankingLoss(model, **options)
    if reads_packed(model):
        return CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=micro_batch_tokens, **options)
    # The library's count of tokens leaves padding out, which takes memory too: as many texts as always fit.
    texts = max(1, micro_batch_tokens // (model.max_seq_length or micro_batch_tokens))
    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=texts, **options)


def contrastive_datasets(name: str, pairs: Dataset, *, negatives: int = 1) -> dict[str, Dataset]:
    """Data sets for sentence-transformers' trainer: columns query, positive, negative_1 .. negative_n.

    `pairs` has rows of query, positive and a list of negatives. A batch needs the same columns in every row, so
    where only some rows have `negatives` of them there are two: `name` and `name+negatives`; rows with fewer are
    used without. A negative that is a positive of the same query in another row is left out (T16).
    """
    if negatives:
        pairs = pairs.map(_without_own_positives(pairs))
    has_negatives = [len(listed) >= negatives > 0 for listed in pairs["negatives"]]
    with_rows = [i for i, has in enumerate(has_negatives) if has]
    without_rows = [i for i, has in enumerate(has_negatives) if not has]
    arranged = {}
    if without_rows:
        arranged[name] = pairs.select(without_rows).select_columns(["query", "positive"])
    if with_rows:
        arranged[f"{name}+negatives" if without_rows else name] = pairs.select(with_rows).map(
            lambda row: {f"negative_{n + 1}": row["negatives"][n] for n in range(negatives)},
            remove_columns=[column for column in pairs.column_names if column not in ("query", "positive")],
        )
    return arranged


def _without_own_positives(dataset: Dataset) -> Callable[[dict[str, Any]], dict[str, list[str]]]:
    """The map that drops, from each row's negatives, all positives that its query has in any row (T16)."""
    positives = defaultdict(set)
    for query, positive in zip(dataset["query"], dataset["positive"], strict=True):
        positives[query].add(positive)
    return lambda row: {"negatives": [text for text in row["negatives"] if text not in positives[row["query"]]]}

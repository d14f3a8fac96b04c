"""Stage II: sentence-transformers' InfoNCE loss on the same embedding, set up for pairs with hard negatives.

    L = -log( exp(cos(q, d+) / tau) / sum over d of exp(cos(q, d) / tau) )

The candidates d of a query are all positives and all hard negatives of the step. The loss is the library's own,
unmodified; only the arrangement of the data is ours.
"""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)


def contrastive_loss(
    model: SentenceTransformer, *, temperature: float = 0.05, mini_batch_size: int | None = None
) -> CachedMultipleNegativesRankingLoss | MultipleNegativesRankingLoss:
    """InfoNCE with in-batch negatives over cosine similarities divided by `temperature`.

    `mini_batch_size` texts are held in memory at a time through cached gradients (GradCache), which encodes
    every text twice; None encodes the whole step once. Loss and gradient are the same.
    """
    options: dict[str, Any] = {"scale": 1 / temperature, "directions": ("query_to_doc",)}
    if mini_batch_size is None:
        return MultipleNegativesRankingLoss(model, **options)
    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size, **options)


def contrastive_datasets(pairs: Mapping[str, Dataset], *, negatives: int = 1) -> dict[str, Dataset]:
    """Data sets for sentence-transformers' trainer: columns query, positive, negative_1 .. negative_n.

    `pairs` maps a name to rows of query, positive and a list of negatives. A batch needs the same columns in
    every row, so a data set in which only some rows have `negatives` of them is split in two: `name` and
    `name+negatives`; rows with fewer are used without.
    """
    arranged = {}
    for name, dataset in pairs.items():
        has_negatives = [len(row) >= negatives > 0 for row in dataset["negatives"]]
        with_rows = [i for i, has in enumerate(has_negatives) if has]
        without_rows = [i for i, has in enumerate(has_negatives) if not has]
        if without_rows:
            arranged[name] = dataset.select(without_rows).select_columns(["query", "positive"])
        if with_rows:
            key = f"{name}+negatives" if without_rows else name
            arranged[key] = dataset.select(with_rows).map(
                lambda row: {f"negative_{n + 1}": row["negatives"][n] for n in range(negatives)},
                remove_columns=[c for c in dataset.column_names if c not in ("query", "positive")],
            )
    return arranged

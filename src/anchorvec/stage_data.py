"""What the stages read: their rows, prompts and lengths, from the data of a recipe."""

import heapq
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import pyarrow.compute
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer

from anchorvec.contrastive import contrastive_datasets
from anchorvec.data import Pairs, weighted
from anchorvec.embedder import template_ids
from anchorvec.errors import AnchorvecError
from anchorvec.packing import reads_packed
from anchorvec.recipe import Recipe

LENGTH_SAMPLE = 256
"""Rows from which the tokens of a step are estimated."""

_NEGATIVES = "+negatives"


def stage_two_datasets(recipe: Recipe, pairs: Mapping[str, Pairs]) -> dict[str, Dataset]:
    """All data sets, weighted, as columns of query, positive and hard negatives."""
    assert recipe.stage_two is not None
    datasets: dict[str, Dataset] = {}
    for source in recipe.data.train:
        parts = contrastive_datasets(source.name, pairs[source.name].dataset, negatives=recipe.stage_two.negatives)
        datasets |= {name: weighted(part, source.weight, recipe.seed) for name, part in parts.items()}
    return datasets


def reconstruction_dataset(recipe: Recipe, pairs: Mapping[str, Pairs]) -> Dataset:
    """All data sets, weighted, as rows of query, positive and the two instructions."""
    parts = []
    for source in recipe.data.train:
        part = weighted(pairs[source.name].dataset, source.weight, recipe.seed).select_columns(["query", "positive"])
        part = part.add_column("query_prompt", [source.instruction] * len(part))
        parts.append(part.add_column("document_prompt", [source.document_instruction] * len(part)))
    return concatenate_datasets(parts)


def reconstructs(recipe: Recipe) -> Literal["text", "words"] | None:
    """What is reconstructed from an embedding, in Stage I or else beside Stage II's loss; None: nothing."""
    if recipe.stage_one is not None:
        return recipe.stage_one.target
    return "words" if recipe.stage_two is not None and recipe.stage_two.words_weight else None


def check_rows(recipe: Recipe, pairs: Mapping[str, Pairs]) -> None:
    """Raise AnchorvecError where a step of a stage needs more pairs than there are; it would be skipped silently.

    For Stage II these must be of different texts.
    """
    if recipe.stage_one is not None:
        _check_rows("stage_one", recipe.stage_one.pairs_per_step, {"the data": reconstruction_dataset(recipe, pairs)})
    if recipe.stage_two is not None:
        datasets = stage_two_datasets(recipe, pairs)
        _check_rows("stage_two", recipe.stage_two.pairs_per_step, datasets)
        for name, dataset in datasets.items():
            _check_texts(name.removesuffix(_NEGATIVES), dataset, recipe.stage_two.pairs_per_step)


def _check_rows(stage: str, pairs_per_step: int, datasets: Mapping[str, Dataset]) -> None:
    for name, dataset in datasets.items():
        if len(dataset) >= pairs_per_step:
            continue
        rows, help_ = f"rows of {name}", "lower it"
        source = name.removesuffix(_NEGATIVES)
        if source + _NEGATIVES in datasets:  # its rows are in two parts, each with steps of its own
            rows = f"rows of {source} {'without' if name == source else 'with'} hard negatives"
            help_ = "lower it, or set stage_two.negatives=0"
        raise AnchorvecError(
            f"{stage}.pairs_per_step: {pairs_per_step} is more than the {len(dataset)} {rows}; {help_}"
        )


def _check_texts(name: str, dataset: Dataset, pairs_per_step: int) -> None:
    for column in ("query", "positive"):
        different: set[str] = set()
        for rows in dataset.select_columns(column).iter(batch_size=1_000):
            different.update(rows[column])
            if len(different) >= pairs_per_step:
                break
        else:
            raise AnchorvecError(
                f"stage_two.pairs_per_step: {pairs_per_step} is more than the {len(different)} different texts in the "
                f"column {column} of {name}; a step has none twice; lower it"
            )


def check_instructions(recipe: Recipe, tokenizer: Any) -> None:
    """Raise AnchorvecError for a length limit in training, or an instruction, that leaves no room for a text."""
    limit = recipe.training_tokens
    key = "model.max_tokens" if recipe.data.max_tokens is None else "data.max_tokens"
    around = len(tokenizer("")["input_ids"])
    if around >= limit:
        raise AnchorvecError(f"{key}: {limit} leaves no room for a text; the {around} tokens around it count too")
    for i, source in enumerate(recipe.data.train):
        for name in ("instruction", "document_instruction"):
            tokens = len(tokenizer(getattr(source, name))["input_ids"])
            if tokens >= limit:
                raise AnchorvecError(
                    f"data.train.{i}.{name}: it leaves no room for a text within {key} = {limit}; "
                    "shorten it, or raise the limit"
                )


def large_step(model: SentenceTransformer, dataset: Dataset, prompts: Mapping[str, str], recipe: Recipe) -> float:
    """Tokens of a large step of Stage II on the data set: their mean and three standard deviations.

    With padding, what the longest text makes of each column; all documents are padded to one length.
    """
    assert recipe.stage_two is not None
    pairs = recipe.stage_two.pairs_per_step

    def lengths(column: str, texts: Iterable[str]) -> list[int]:
        return [len(ids) for ids in model.tokenizer([prompts[column] + t for t in texts], truncation=True)["input_ids"]]

    if not reads_packed(model):
        query, *documents = (max(lengths(column, _longest(dataset, column))) for column in dataset.column_names)
        return float(pairs * (query + len(documents) * max(documents)))
    sample = dataset.shuffle(seed=recipe.seed).select(range(min(LENGTH_SAMPLE, len(dataset))))
    rows = zip(*(lengths(column, sample[column]) for column in sample.column_names), strict=True)
    tokens = [float(sum(row)) for row in rows]
    return pairs * statistics.mean(tokens) + 3 * math.sqrt(pairs) * statistics.pstdev(tokens)


def _longest(dataset: Dataset, column: str) -> list[str]:
    """The texts of the most bytes, found without reading the column into memory (T17)."""
    longest: list[tuple[int, str]] = []
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        sizes = pyarrow.compute.binary_length(table[column])
        top = pyarrow.compute.sort_indices(sizes, sort_keys=[("", "descending")])[:LENGTH_SAMPLE]
        found = zip(sizes.take(top).to_pylist(), table[column].take(top).to_pylist(), strict=True)
        longest = heapq.nlargest(LENGTH_SAMPLE, [*longest, *found])
    return [text for _, text in longest]


def prompts_by_dataset(recipe: Recipe, datasets: Mapping[str, Dataset]) -> dict[str, dict[str, str]]:
    """For each data set of Stage II, the instruction of each of its columns."""
    prompts = {}
    for source in recipe.data.train:
        for name in (source.name, source.name + _NEGATIVES):
            if name in datasets:
                prompts[name] = {
                    column: source.instruction if column == "query" else source.document_instruction
                    for column in datasets[name].column_names
                }
    return prompts


def without_prompt_and_end(tokenizer: Any, recipe: Recipe) -> Callable[[list[int]], list[int]]:
    """The function that leaves of the ids of a text as it is read those of the text alone.

    A tokenizer may join the first word with the space before it, so these ids may differ from those of the text read
    without a prompt. A text that has no instruction, but begins with the words of one, loses these.
    """
    prompts = {text for source in recipe.data.train for text in (source.instruction, source.document_instruction)}
    before, after = template_ids(tokenizer)
    heads = [before + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in sorted(prompts)]

    def shared(body: list[int], head: list[int]) -> int:
        """How many ids of `head` are at the beginning of a text that has its words there; else 0."""
        n = next((i for i, (a, b) in enumerate(zip(body, head, strict=False)) if a != b), min(len(body), len(head)))
        rest = "".join(tokenizer.convert_ids_to_tokens(head[n:]))
        joined = "".join(tokenizer.convert_ids_to_tokens(body[n : n + len(rest)]))
        return n if joined.startswith(rest) else 0

    def content(ids: list[int]) -> list[int]:
        body = ids[: len(ids) - len(after)]
        return body[max(len(before), *(shared(body, head) for head in heads)) :]

    return content

"""What the stages read: their rows, prompts and lengths, from the data of a recipe."""

import heapq
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow.compute
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset

from anchorvec.data import ContrastiveRows, Pairs, ReadReport, contrastive_rows, documents_twice, drawn_rows
from anchorvec.data.pairs import places_of
from anchorvec.data.samplers import steps_of_a_pass
from anchorvec.errors import AnchorvecError
from anchorvec.recipe import Recipe
from anchorvec.run import StageName

LENGTH_SAMPLE = 256
"""Rows from which the tokens of a step are estimated."""

Rows = ConcatDataset[dict[str, Any]]
"""Rows of all data sets, one data set after another."""


@dataclass(frozen=True)
class StageInputs:
    """What the stages read, made once from a recipe and its data. The texts stay on disk, in mapped files (T17).

    `reconstruction`: query, positive, and the instructions `query_prompt` and `document_prompt`. The others are of
    Stage II, by the name of the data set, and empty without one. `contrastive`: query, positive, and negative_1 ..
    negative_n, which are None in rows without. `hashes` of these texts, 0 for none: (rows, columns). `prompts`: the
    instruction of each column. `rows_with_negatives` counts before weights, and is empty where none are wanted.
    `steps_of_a_pass`: the steps of Stage II that each data set fills before its rows come again, 1,000 at most.
    """

    reports: dict[str, ReadReport]
    reconstruction: Rows
    contrastive: dict[str, Dataset]
    hashes: dict[str, NDArray[np.uint64]]
    prompts: dict[str, dict[str, str]]
    rows_with_negatives: dict[str, int]
    steps_of_a_pass: dict[str, int]


def stage_inputs(recipe: Recipe, pairs: Mapping[str, Pairs]) -> StageInputs:
    """What the stages of `recipe` read of its data sets, `pairs`, weighted.

    Raises AnchorvecError where a step of a stage needs more pairs than there are; it would be skipped silently. For
    Stage II these must be of different texts.
    """
    steps_of = {}
    reconstruction = []
    contrastive: dict[str, ContrastiveRows] = {}
    with_negatives, prompts = {}, {}
    for source in recipe.data.train:
        dataset = pairs[source.name].dataset
        drawn = None if source.weight == 1 else drawn_rows(len(dataset), source.weight, recipe.seed)
        texts = dataset.select_columns(["query", "positive"])
        texts = texts if drawn is None else texts.select(drawn)
        instructions = {"query_prompt": source.instruction, "document_prompt": source.document_instruction}
        reconstruction.append(texts.with_transform(partial(_with_prompts, prompts=instructions)))
        if recipe.stage_two is not None:
            own = recipe.stage_two.positives == "dropout"
            rows = documents_twice(dataset) if own else contrastive_rows(dataset, negatives=recipe.stage_two.negatives)
            if recipe.stage_two.negatives:
                with_negatives[source.name] = rows.with_negatives
            contrastive[source.name] = rows if drawn is None else rows.select(drawn)
            prompts[source.name] = {
                column: source.instruction if column == "query" and not own else source.document_instruction
                for column in contrastive[source.name].columns
            }
    if recipe.stage_one is not None:
        _check_rows("stage_one", recipe.stage_one.pairs_per_step, sum(map(len, reconstruction)), "the data")
    if recipe.stage_two is not None:
        for name, rows in contrastive.items():
            _check_rows("stage_two", recipe.stage_two.pairs_per_step, len(rows.hashes), name)
            _check_texts(name, rows, recipe.stage_two.pairs_per_step)
            steps_of[name] = _steps_of_a_pass(name, rows, recipe.stage_two.pairs_per_step, recipe.seed)
    return StageInputs(
        reports={name: part.report for name, part in pairs.items()},
        reconstruction=ConcatDataset(reconstruction),
        contrastive={name: rows.dataset for name, rows in contrastive.items()},
        hashes={name: rows.hashes for name, rows in contrastive.items()},
        prompts=prompts,
        rows_with_negatives=with_negatives,
        steps_of_a_pass=steps_of,
    )


def rows_with_places(
    recipe: Recipe, inputs: StageInputs, stage: StageName, rows: Sequence[int]
) -> list[dict[str, str]]:
    """The `rows` that `stage` of `recipe` reads of `inputs`, by their numbers over all data sets: place and texts.

    The place is `file:line` in the source, or a number in the data set where the source is not what it was.
    """
    listed: list[Any] = inputs.reconstruction.datasets if stage == "stage_one" else [*inputs.contrastive.values()]
    ends = np.cumsum([len(dataset) for dataset in listed])
    found: dict[int, dict[str, str]] = {}
    for number, source in enumerate(recipe.data.train):
        start = int(ends[number]) - len(listed[number])
        own = [row for row in rows if start <= row < ends[number]]
        texts = {row: listed[number][row - start] for row in own}
        pairs = {(row["query"], row["positive"]) for row in texts.values()}
        read = partial(places_of, split=source.split, subset=source.subset, revision=source.revision)
        places = read(pairs, source.path) if pairs else {}
        for row, text in texts.items():
            pair = text["query"], text["positive"]
            place = places.get(pair, f"row {row - start} of {source.name}")
            found[row] = {"place": place, "query": pair[0], "positive": pair[1]}
    return [found[row] for row in rows]


def sample_rows(rows: Dataset | Rows, n: int, seed: int) -> list[dict[str, Any]]:
    """`n` different rows, or all if there are fewer, in an order that `seed` decides."""
    return [rows[int(i)] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]


def _with_prompts(rows: dict[str, list[str]], prompts: Mapping[str, str]) -> dict[str, list[str]]:
    """`rows`, as they are read, each with the same prompts: in no memory, and on no disk (T17)."""
    return rows | {name: [prompt] * len(rows["query"]) for name, prompt in prompts.items()}


def _check_rows(stage: str, pairs_per_step: int, rows: int, name: str) -> None:
    if rows < pairs_per_step:
        raise AnchorvecError(
            f"{stage}.pairs_per_step: {pairs_per_step} is more than the {rows} rows of {name}; lower it"
        )


def _check_texts(name: str, rows: ContrastiveRows, pairs_per_step: int) -> None:
    for column, hashes in zip(("query", "positive"), rows.hashes.T, strict=False):
        different = len(np.unique(hashes))
        if different < pairs_per_step:
            raise AnchorvecError(
                f"stage_two.pairs_per_step: {pairs_per_step} is more than the {different} different texts in the "
                f"column {column} of {name}; a step has none twice; lower it"
            )


def _steps_of_a_pass(name: str, rows: ContrastiveRows, pairs_per_step: int, seed: int) -> int:
    steps = steps_of_a_pass(rows.hashes, pairs_per_step, seed=seed)
    if not steps:
        different = {
            column: len(np.unique(hashes[hashes > 0]))
            for column, hashes in zip(rows.columns, rows.hashes.T, strict=True)
        }
        fewest = min(different, key=lambda column: different[column] or math.inf)
        raise AnchorvecError(
            f"stage_two.pairs_per_step: no {pairs_per_step} rows of {name} were found in which no text is there twice, "
            f"as its texts repeat so often; its column {fewest} has {different[fewest]} different ones; lower "
            f"pairs_per_step{', or take fewer stage_two.negatives' if fewest.startswith('negative') else ''}"
        )
    return steps


def reconstructs(recipe: Recipe) -> Literal["text", "bag_of_words", "masked"] | None:
    """What `recipe` reconstructs, in Stage I or else beside Stage II's loss; None: nothing."""
    if recipe.stage_one is not None:
        return recipe.stage_one.target
    return "bag_of_words" if recipe.stage_two is not None and recipe.stage_two.bag_of_words_weight else None


def large_step(tokenizer: Any, dataset: Dataset, prompts: Mapping[str, str], recipe: Recipe, *, packed: bool) -> float:
    """Tokens of a large step of the Stage II of `recipe` on `dataset`: their mean and three standard deviations.

    `tokenizer` reads the texts, `prompts` are put before those of each column. Unless `packed`, what the longest text
    makes of each column; all documents are padded to one length.
    """
    assert recipe.stage_two is not None
    pairs = recipe.stage_two.pairs_per_step

    def lengths(texts: Iterable[tuple[str, str | None]]) -> list[int]:
        """Of texts with their columns; None is no text."""
        read = [prompts[column] + text for column, text in texts if text is not None]
        limit = {"truncation": True, "max_length": recipe.training_tokens}
        return [len(ids) for ids in tokenizer(read, **limit)["input_ids"]]

    if not packed:
        query, *documents = (max(lengths((column, text) for text in _longest(dataset, column))) for column in prompts)
        return float(pairs * (query + len(documents) * max(documents)))
    sample = sample_rows(dataset, LENGTH_SAMPLE, recipe.seed)
    tokens = [float(sum(lengths((column, row[column]) for column in prompts))) for row in sample]
    return pairs * statistics.mean(tokens) + 3 * math.sqrt(pairs) * statistics.pstdev(tokens)


def _longest(dataset: Dataset, column: str) -> list[str]:
    """The texts of the most bytes in a column, found without reading it into memory (T17).

    For a column of negatives, of all that are listed.
    """
    name = column if column in dataset.column_names else "negatives"
    longest: list[tuple[int, str]] = []
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
        texts = table[name] if name == column else pyarrow.compute.list_flatten(table[name])
        sizes = pyarrow.compute.binary_length(texts)
        top = pyarrow.compute.sort_indices(sizes, sort_keys=[("", "descending")])[:LENGTH_SAMPLE]
        found = zip(sizes.take(top).to_pylist(), texts.take(top).to_pylist(), strict=True)
        longest = heapq.nlargest(LENGTH_SAMPLE, [*longest, *found])
    return [text for _, text in longest]

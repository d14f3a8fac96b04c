"""The whole job on this machine, in a given time: an ordinary decoder LLM becomes a tested embedder."""

import json
import random
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from joblib.externals.loky import ProcessPoolExecutor
from rich.console import Group
from rich.text import Text

from anchorvec.data import DocstringData, docstrings
from anchorvec.device import check_one_device
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import (
    BeirData,
    LocalData,
    Scores,
    check_test_data,
    difference,
    docstring_collection,
    require_extra,
    scores_table,
    write_beir,
)
from anchorvec.exporting.folder import Exported
from anchorvec.files import write_json, write_text
from anchorvec.pipeline import TrainResult, load_training_data, run_stages
from anchorvec.recipe import Recipe, load_recipe
from anchorvec.resuming import as_begun
from anchorvec.run import SYSTEM_TITLES, Run, is_embedder
from anchorvec.run_scores import WholeSet
from anchorvec.start import build_base
from anchorvec.terminal import say
from anchorvec.training.budget import Budget

_WHOLE = 500, 1_200
"""Queries and documents of the score set, always those of seed 0."""
_PART = 100, 240
"""Of these the queries and documents that the untrained model and Stage I are scored on too, a fifth of the time."""


@dataclass(frozen=True)
class QuickstartResult:
    """What `quickstart` made: the run's folder, the exported model, the steps of each stage, the scores on the way.

    `scores` are those on a part of the score set, by system; `whole_scores` those on all of it, of BM25 and the last
    stage, or of BM25 alone where the time was over.
    """

    output: str
    model: str
    corpus: str
    minutes: float
    steps: dict[str, int]
    scores: dict[str, Scores]
    whole_scores: dict[str, Scores]
    score_set: dict[str, Any]
    export: Exported

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {
            "scores": {name: scores.to_dict() for name, scores in self.scores.items()},
            "whole_scores": {name: scores.to_dict() for name, scores in self.whole_scores.items()},
        }

    def __rich__(self) -> Group:
        packages = " and ".join(self.score_set["held_out"])
        whole, part = (
            scores_table(
                {SYSTEM_TITLES[name]: scores for name, scores in of_systems.items()},
                title="{queries} queries over {documents:,} documents of {packages}{part}; 95% intervals".format(
                    **next(iter(of_systems.values())).counts, packages=packages, part=part
                ),
            )
            for of_systems, part in ((self.whole_scores, ""), (self.scores, ", a part of these"))
        )
        last = list(self.scores)[-1]
        change = difference(self.scores["untrained"], self.scores[last])
        line = f"{SYSTEM_TITLES[last]} against untrained, on the queries that both have: {change}"
        return Group(whole, part, Text(line), self.export)


def quickstart(
    output: str | Path,
    *,
    minutes: float = 10,
    seed: int = 0,
    stage_one: bool = True,
    overrides: Sequence[str] = (),
    started: float | None = None,
    resume: bool = False,
) -> QuickstartResult:
    """Train the recipe `quickstart` within `minutes` of wall time, scoring included, and export it, all in `output`.

    The score set is made of docstrings of packages that no training pair comes from: 500 queries over 1,200 documents,
    the same ones for every `seed`. BM25 and the model before training and after each stage are scored on a part of it,
    100 queries over 240 documents, BM25 and the last model on all of it too. What scoring leaves of
    the time is for training, a tenth of it for Stage I; a stage makes as many steps as fit, and its learning rate
    follows the clock. The run's recipe is saved with the steps that were made. `seed` and `overrides` replace values of
    that recipe; its training data, steps and score set are the quickstart's own, whatever `data.train`, the stages'
    `steps` and `evaluation.data` say. Without `stage_one` the contrastive loss is alone: no Stage I, and no bag of
    words in Stage II. The time counts from `started`, a `time.time()` (default: now). With `resume` the quickstart in
    `output` goes on where it was left, with the time that it had left.
    Raises AnchorvecError if `output` is in use, on several devices, or if scoring leaves less than a minute.
    """
    budget = Budget(minutes, began=time.monotonic() - (time.time() - started if started else 0))
    recipe = load_recipe("quickstart", [f"output={json.dumps(str(output))}", f"seed={seed}", *overrides])
    recipe = recipe if stage_one else contrastive_alone(recipe)
    require_extra()
    check_one_device()
    run = (Run.resume if resume else Run.create)(recipe.output)
    say("reading the docstrings of the installed packages, and the base model")
    data = _data_and_base(recipe, run)
    part, whole = _score_sets(data, run)
    recipe = on_score_set(with_pairs(recipe, data, run.pairs), run.score_set_part)
    recipe, budget = as_begun(run, recipe, budget)
    options = ["--output", str(output), "--minutes", f"{minutes:g}", "--seed", str(seed)]
    trained = run_stages(
        recipe,
        run,
        load_training_data(recipe),
        [part],
        budget=budget,
        whole=WholeSet(whole, times=_WHOLE[1] / _PART[1]),
        record={"score_set": data.description},
        command=shlex.join(["anchorvec", "quickstart", *options, *["--no-stage-one"] * (not stage_one), "--resume"]),
    )
    result = _result(trained, data, part.name, whole.name)
    write_json(run.result, result.to_dict())
    return result


def _data_and_base(recipe: Recipe, run: Run) -> DocstringData:
    """The pairs and the score set, which a process of their own reads while this one makes the base of `run`."""
    executor = ProcessPoolExecutor(max_workers=1)
    try:
        reading = executor.submit(docstrings.quickstart_data, seed=0, n_queries=_WHOLE[0], n_documents=_WHOLE[1])
        if not is_embedder(run.base):
            build_base(recipe, run.base)
        data: DocstringData = reading.result()
    finally:
        executor.shutdown(kill_workers=True)
    return data


def _result(trained: TrainResult, data: DocstringData, part: str, whole: str) -> QuickstartResult:
    """What the run made, with its scores on the sets that are called `part` and `whole`."""
    return QuickstartResult(
        output=trained.output,
        model=trained.export.folder,
        corpus=str(Run(Path(trained.output)).score_set),
        minutes=trained.minutes,
        steps=trained.steps,
        scores={system: tasks[part] for system, tasks in trained.scores.items()},
        whole_scores={system: tasks[whole] for system, tasks in trained.scores.items() if whole in tasks},
        score_set=data.description,
        export=trained.export,
    )


def _score_sets(data: DocstringData, run: Run) -> tuple[LocalData, LocalData]:
    """The part of the score set of `data` and all of it, written into the folder of `run` and read again."""
    collection = docstring_collection(data)
    write_beir(collection, run.score_set)
    write_beir(part_of(collection, *_PART), run.score_set_part)
    part, whole = check_test_data(data=[run.score_set_part, run.score_set])
    return part, whole


def part_of(data: BeirData, queries: int, documents: int) -> BeirData:
    """So many `queries` of `data` with what answers them, among so many `documents`: the same at every call."""
    draw = random.Random(0)
    asked = sorted(draw.sample(sorted(data.queries), min(queries, len(data.queries))))
    right = {document for query in asked for document in data.qrels[query]}
    others = sorted(set(data.corpus) - right)
    kept = sorted(right | set(draw.sample(others, max(0, min(documents - len(right), len(others))))))
    return BeirData(
        {document: data.corpus[document] for document in kept},
        {query: data.queries[query] for query in asked},
        {query: data.qrels[query] for query in asked},
        name=data.name,
    )


def contrastive_alone(recipe: Recipe) -> Recipe:
    """`recipe` without Stage I and without bag-of-words reconstruction in Stage II, whose batches are made as before.

    Raises AnchorvecError if Stage II is off too.
    """
    if recipe.stage_two is None:
        raise AnchorvecError("both stages are off, so there is nothing to train; leave one on")
    stage_two = recipe.stage_two.model_copy(update={"bag_of_words_weight": 0.0})
    return recipe.model_copy(update={"stage_one": None, "stage_two": stage_two})


def with_pairs(recipe: Recipe, data: DocstringData, file: Path) -> Recipe:
    """`recipe` on the pairs of `data`, which are written to `file`, so that a rerun sees the same ones."""
    rows = [{"query": pair.query, "positive": pair.document} for pair in data.train]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source = recipe.data.train[0].model_copy(update={"path": str(file)})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": [source]})})


def on_score_set(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` scored on the score set in `folder` alone."""
    evaluation = recipe.evaluation.model_copy(update={"data": [str(folder)], "tasks": []})
    return recipe.model_copy(update={"evaluation": evaluation})

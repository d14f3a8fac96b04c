"""The whole job on this machine, in a given time: an ordinary decoder LLM becomes a tested embedder."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from anchorvec.data import DocstringData, docstrings
from anchorvec.device import check_one_device
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import Scores, check_test_data, docstring_collection, require_extra, scores_table, write_beir
from anchorvec.exporting.folder import Exported
from anchorvec.files import write_json, write_text
from anchorvec.pipeline import TITLES, Budget, load_training_data, run_stages
from anchorvec.recipe import Recipe, load_recipe
from anchorvec.run import Run
from anchorvec.terminal import say

_FULL_SCORE_SET = 500, 1200  # queries, documents
_SMALL_SCORE_SET = 100, 240
_FULL_SCORE_SET_MINUTES = 15
"""From here on; on two slow cores the full set takes ten minutes of scoring."""


@dataclass(frozen=True)
class QuickstartResult:
    """What `quickstart` made: the run's folder, the exported model, the steps of each stage, the scores on the way."""

    output: str
    model: str
    corpus: str
    minutes: float
    steps: dict[str, int]
    scores: dict[str, Scores]
    score_set: dict[str, Any]
    export: Exported

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {"scores": {name: scores.to_dict() for name, scores in self.scores.items()}}

    def __rich__(self) -> Table:
        queries, documents = self.score_set["score_queries"], self.score_set["score_documents"]
        packages = " and ".join(self.score_set["held_out"])
        return scores_table(
            {TITLES[name]: scores for name, scores in self.scores.items()},
            title=f"{queries} queries over {documents:,} documents of {packages}; 95% intervals",
        )


def quickstart(
    output: str | Path,
    *,
    minutes: float = 20,
    seed: int = 0,
    stage_one: bool = True,
    overrides: Sequence[str] = (),
    started: float | None = None,
) -> QuickstartResult:
    """Train the recipe `quickstart` within `minutes` of wall time, scoring included, and export it, all in `output`.

    BM25 and the model before training and after each stage are scored on docstrings of packages that no training
    pair comes from: 500 queries over 1,200 documents, a fifth of that if `minutes` is below 15. What scoring leaves of
    the time is for training, a tenth of it for Stage I; a stage makes as many steps as fit, and its learning rate
    follows the clock. The run's recipe is saved with the steps that were made. `seed` and `overrides` replace values of
    that recipe; its training data, steps and score set are the quickstart's own, whatever `data.train`, the stages'
    `steps` and `evaluation.data` say. Without `stage_one` the contrastive loss is alone: no Stage I, and no bag of
    words in Stage II. The time counts from `started`, a `time.time()` (default: now).
    Raises AnchorvecError if `output` is in use, on several devices, or if scoring leaves less than a minute.
    """
    budget = Budget(minutes, began=time.monotonic() - (time.time() - started if started else 0))
    recipe = load_recipe("quickstart", [f"output={json.dumps(str(output))}", f"seed={seed}", *overrides])
    recipe = recipe if stage_one else contrastive_alone(recipe)
    require_extra()
    check_one_device()
    run = Run.create(recipe.output)
    say("reading the docstrings of the installed packages")
    n_queries, n_documents = _FULL_SCORE_SET if minutes >= _FULL_SCORE_SET_MINUTES else _SMALL_SCORE_SET
    data = docstrings.quickstart_data(seed=seed, n_queries=n_queries, n_documents=n_documents)
    write_beir(docstring_collection(data), run.score_set)
    recipe = on_score_set(with_pairs(recipe, data, run.pairs), run.score_set)
    inputs, tests = load_training_data(recipe), check_test_data(data=recipe.evaluation.data)
    trained = run_stages(recipe, run, inputs, tests, budget=budget, record={"score_set": data.description})
    result = QuickstartResult(
        output=trained.output,
        model=trained.export.folder,
        corpus=str(run.score_set),
        minutes=trained.minutes,
        steps=trained.steps,
        scores={system: tasks[run.score_set.name] for system, tasks in trained.scores.items()},
        score_set=data.description,
        export=trained.export,
    )
    write_json(run.result, result.to_dict())
    return result


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

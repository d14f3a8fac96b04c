"""The whole job on this machine, in a given time: an ordinary decoder LLM becomes a tested embedder."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from anchorvec.data import DocstringData, docstrings, read_pairs
from anchorvec.data.stage_inputs import StageInputs, stage_inputs
from anchorvec.device import resolve_precision
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import (
    Scores,
    bm25_scores,
    docstring_collection,
    evaluate,
    require_extra,
    scores_table,
    write_beir,
)
from anchorvec.exporting.folder import Exported, export
from anchorvec.files import write_json, write_text
from anchorvec.model.loading import load_encoder
from anchorvec.pipeline import build_base, describe_run, new_run_folder
from anchorvec.recipe import Recipe, StageOne, StageTwo, load_recipe, save_recipe
from anchorvec.training.memory import release_freed_memory
from anchorvec.training.progress import STAGE_TITLES
from anchorvec.training.stages import train_stage_one, train_stage_two

STAGE_ONE_SHARE = 0.1
"""Of the time for training; the rest is Stage II's."""

_EXPORT_SECONDS = 30.0

_LEAST_SECONDS = 60.0
"""For training, set-up of the stages included."""

_FULL_SCORE_SET = 500, 1200  # queries, documents
_SMALL_SCORE_SET = 100, 240
_FULL_SCORE_SET_MINUTES = 15
"""From here on; on two slow cores the full set takes ten minutes of scoring."""

TITLES = {
    "bm25": "BM25",
    "untrained": "untrained",
    **{name: f"after {title}" for name, title in STAGE_TITLES.items()},
}


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
    """Train the recipe `quickstart` within `minutes` of wall time, scoring included, and export the result.

    BM25 and the model before training and after each stage are scored on docstrings of packages that no training
    pair comes from: 500 queries over 1,200 documents, a fifth of that if `minutes` is below 15. What scoring leaves of
    the time is for training, a tenth of it for Stage I; a stage makes as many steps as fit, and its learning rate
    follows the clock. The run's recipe is saved with the steps that were made. `overrides` replace values of that
    recipe; its training data, steps and score set are the quickstart's own, whatever `data.train`, the stages' `steps`
    and `evaluation` say. Without `stage_one` the contrastive
    loss is alone: no Stage I, and no words in Stage II. The time counts from `started`, a `time.time()` (default: now).
    Raises AnchorvecError if `output` is in use, on several devices, or if scoring leaves less than a minute.
    """
    if not 0 < minutes < math.inf:
        raise AnchorvecError(f"minutes: {minutes} is no time to train in; give, for example, 20")
    began = time.monotonic() - (time.time() - started if started else 0)
    deadline = began + 60 * minutes
    say = Console(stderr=True).print
    recipe = load_recipe("quickstart", [f"output={json.dumps(str(output))}", f"seed={seed}", *overrides])
    recipe = recipe if stage_one else contrastive_alone(recipe)
    require_extra()
    folder = new_run_folder(recipe)

    say("reading the docstrings of the installed packages")
    n_queries, n_documents = _FULL_SCORE_SET if minutes >= _FULL_SCORE_SET_MINUTES else _SMALL_SCORE_SET
    data = docstrings.quickstart_data(seed=seed, n_queries=n_queries, n_documents=n_documents)
    corpus = folder / "score_set"
    write_beir(docstring_collection(data), corpus)
    recipe, inputs = with_pairs(recipe, data, folder / "pairs.jsonl")
    save_recipe(recipe, folder / "recipe.yaml")
    write_json(folder / "run.json", describe_run(recipe, inputs) | {"score_set": data.description})
    stage = build_base(recipe, folder / "base")

    scores: dict[str, Scores] = {}

    def score(name: str) -> None:
        say(f"scoring: {TITLES[name]}")
        release_freed_memory()  # of a finished stage
        scores[name] = bm25_scores(corpus) if name == "bm25" else embedder_scores(recipe, stage, corpus)
        say(f"  nDCG@10 {scores[name].metrics['ndcg_at_10']}")
        write_json(folder / "scores.json", {key: {corpus.name: value.to_dict()} for key, value in scores.items()})

    score("bm25")
    score("untrained")

    # Each later scoring takes as long as the first one of a model did.
    names = [name for name in ("stage_one", "stage_two") if getattr(recipe, name) is not None]
    scoring = scores["untrained"].seconds
    left = deadline - len(names) * scoring - _EXPORT_SECONDS - time.monotonic()
    if left < _LEAST_SECONDS:
        raise AnchorvecError(
            f"the time is too short: {max(0.0, left):.0f} s are left for training, since a scoring takes "
            f"{scoring:.0f} s here; give {math.ceil(minutes + (_LEAST_SECONDS - left) / 60)} minutes or more"
        )
    for i, name in enumerate(names):
        ends = deadline - (len(names) - i) * scoring - _EXPORT_SECONDS
        if name == "stage_one" and "stage_two" in names:
            ends -= (1 - STAGE_ONE_SHARE) * (ends - time.monotonic())
        say(f"{STAGE_TITLES[name]}: {(ends - time.monotonic()) / 60:.1f} minutes")
        train_stage = train_stage_one if name == "stage_one" else train_stage_two
        stage = train_stage(recipe, stage, folder / name, inputs, deadline=ends)
        recipe = with_steps(recipe, name, steps_run(folder / "log.jsonl")[name])
        save_recipe(recipe, folder / "recipe.yaml")
        score(name)

    say("exporting, and comparing the export with the run")
    exported = export(folder, folder / "model")
    result = QuickstartResult(
        output=str(folder),
        model=exported.folder,
        corpus=str(corpus),
        minutes=(time.monotonic() - began) / 60,
        steps=steps_run(folder / "log.jsonl"),
        scores=scores,
        score_set=data.description,
        export=exported,
    )
    write_json(folder / "result.json", result.to_dict())
    return result


def contrastive_alone(recipe: Recipe) -> Recipe:
    """`recipe` without Stage I and without telling words in Stage II, whose batches are made in the same way.

    Raises AnchorvecError if Stage II is off too.
    """
    if recipe.stage_two is None:
        raise AnchorvecError("both stages are off, so there is nothing to train; leave one on")
    stage_two = recipe.stage_two.model_copy(update={"words_weight": 0.0})
    return recipe.model_copy(update={"stage_one": None, "stage_two": stage_two})


def with_steps(recipe: Recipe, name: str, steps: int) -> Recipe:
    """`recipe` with so many steps of the stage; its warm-up keeps its share of them."""
    stage: StageOne | StageTwo = getattr(recipe, name)
    changed = {"steps": steps, "warmup_steps": round(steps * stage.warmup_steps / stage.steps)}
    return recipe.model_copy(update={name: stage.model_copy(update=changed)})


def steps_run(log: Path) -> dict[str, int]:
    """The last step of each stage in a run's log."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {record["stage"]: record["step"] for record in records}


def with_pairs(recipe: Recipe, data: DocstringData, file: Path) -> tuple[Recipe, StageInputs]:
    """The recipe that reads its pairs from `file`, so that a rerun sees the same ones, and what its stages read."""
    rows = [{"query": pair.query, "positive": pair.document} for pair in data.train]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source = recipe.data.train[0].model_copy(update={"path": str(file)})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": [source]})})
    return recipe, stage_inputs(recipe, {source.name: read_pairs(source.path)})


def embedder_scores(recipe: Recipe, stage: Path, corpus: Path) -> Scores:
    """The scores of the embedder in `stage`, in the number format that trains: bf16 saves minutes where it is fast."""
    dtype = torch.bfloat16 if resolve_precision(recipe.model.precision) == "bf16" else torch.float32
    [scores] = evaluate(
        load_encoder(stage, dtype),
        data=[corpus],
        batch_size=recipe.evaluation.batch_size,
        show_progress_bar=sys.stderr.isatty(),
    ).values()
    return scores

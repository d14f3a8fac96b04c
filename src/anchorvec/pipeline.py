"""Runs a recipe: from a base model to a folder per stage, scores, and an export, within steps or within a time.

`train`, `quickstart` and the benchmarks' trials are this pipeline with a recipe and a budget; `plan` is it up to the
first step. Both stages go through transformers' Trainer.
"""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group

from anchorvec.data import read_pairs
from anchorvec.data.stage_inputs import StageInputs, stage_inputs
from anchorvec.device import check_one_device, device_name, resolve_precision
from anchorvec.evaluation import LocalData, Scores, bm25_scores, check_test_data, evaluate, scores_table
from anchorvec.exporting.folder import Exported, export
from anchorvec.files import write_json
from anchorvec.model.loading import load_encoder
from anchorvec.recipe import Recipe, StageOne, StageTwo, load_recipe, save_recipe
from anchorvec.run import STAGE_TITLES, SYSTEM_TITLES, Run, StageName
from anchorvec.start import build_base, with_settings_of_base
from anchorvec.terminal import say
from anchorvec.training.budget import Budget, Measured
from anchorvec.training.memory import release_freed_memory
from anchorvec.training.progress import OnLog
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import train_stage_one
from anchorvec.training.stage_two import train_stage_two

Scored = dict[str, dict[str, Scores]]
"""Scores by system, an untrained or a trained model or BM25, and task."""


@dataclass(frozen=True)
class TrainResult:
    """What a run made: its folder, the exported model, the scores that its recipe asked for by system and task.

    `steps` are those that each stage made, `minutes` is the wall time of it all.
    """

    output: str
    export: Exported
    scores: Scored
    steps: dict[str, int]
    minutes: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {"scores": _plain(self.scores)}

    def __rich__(self) -> Group:
        tables = [scores_table(of_system, title=system) for system, of_system in self.scores.items()]
        return Group(*tables, self.export)


def train(recipe: Recipe | str | Path, *, budget: Budget | None = None, on_log: OnLog | None = None) -> TrainResult:
    """Run the stages that `recipe` switches on, score them, and export the last one to `model` in the run folder.

    The run folder is `recipe.output`. The `budget` is a time, or by default the steps of the recipe. `on_log` is called
    with every record that is also appended to `log.jsonl`. Raises AnchorvecError if the folder already holds a run, if
    the recipe or its data cannot be used, or if the time is too short.
    """
    recipe = with_settings_of_base(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    budget = budget or Budget()
    check_one_device()
    run = Run.create(recipe.output)
    tests = check_test_data(data=recipe.evaluation.data, tasks=recipe.evaluation.tasks)
    return run_stages(recipe, run, load_training_data(recipe), tests, budget=budget, on_log=on_log)


@dataclass(frozen=True)
class WholeSet:
    """Data that only BM25 and the last stage are scored on, as they take `times` as long as those on the way."""

    data: LocalData
    times: float


def run_stages(
    recipe: Recipe,
    run: Run,
    inputs: StageInputs,
    tests: Sequence[LocalData],
    *,
    budget: Budget,
    whole: WholeSet | None = None,
    record: Mapping[str, Any] | None = None,
    on_log: OnLog | None = None,
) -> TrainResult:
    """`train` in the new folder of `run`, on `inputs` and `tests` that are read already.

    `recipe`, `budget` and `on_log` are as there. BM25 and the last stage are scored on the `whole` too; the last stage
    only if the time is still there. `record` is added to the run's record.
    """
    stage = build_base(recipe, run.base)
    save_recipe(recipe, run.recipe)
    write_json(run.record, describe_run(recipe, inputs) | dict(record or {}))
    scores: Scored = {}
    if recipe.evaluation.bm25 and not recipe.evaluation.data:
        say("evaluation.bm25: there is no folder in evaluation.data to score it on")
    elif recipe.evaluation.bm25:
        _score(recipe, run, [*tests, *([whole.data] if whole else [])], scores, "bm25", None)
    # before training, so that a task that cannot be fetched costs nothing
    # of a time to keep within, how long it takes is measured: no vectors of an earlier run
    scoring = Measured(_score(recipe, run, tests, scores, "untrained", stage, cache=budget.minutes is None))
    if whole is not None and not budget.affords(whole.times * scoring.seconds):
        say(f"{whole.data.name}: scoring on the whole of it would take {whole.times * scoring.seconds:.0f} s; left out")
        whole = None
    last = replace(scoring, seconds=scoring.seconds * (1 + (whole.times if whole else 0)))
    budget.check(len(recipe.stages), scoring, last)
    for i, name in enumerate(recipe.stages):
        deadline = budget.deadline(len(recipe.stages) - i, scoring, last)
        if deadline is not None:
            say(f"{STAGE_TITLES[name]}: {(deadline() - time.monotonic()) / 60:.1f} minutes")
        train_stage = train_stage_one if name == "stage_one" else train_stage_two
        stage = train_stage(Stage(name, recipe, run, stage, inputs, deadline, on_log))
        if deadline is not None:
            recipe = with_steps(recipe, name, run.steps()[name])
            save_recipe(recipe, run.recipe)
        _score(recipe, run, tests, scores, name, stage)
    if whole is not None and budget.left() < whole.times * scoring.now():
        say(f"{whole.data.name}: no time is left to score on the whole of it")
    elif whole is not None:
        _score(recipe, run, [whole.data], scores, recipe.stages[-1], stage, tasks=False)
    say("exporting, and comparing the export with the run")
    exported = export(run.folder, run.model)
    return TrainResult(
        str(run.folder), exported, scores, steps=run.steps(), minutes=(time.monotonic() - budget.began) / 60
    )


def _score(
    recipe: Recipe,
    run: Run,
    tests: Sequence[LocalData],
    scores: Scored,
    system: str,
    model: Path | None,
    *,
    tasks: bool = True,
    cache: bool = True,
) -> float:
    """Add the scores of `model`, or of BM25, and write all; the seconds it took, 0 where nothing is scored."""
    settings = recipe.evaluation
    names = settings.tasks if tasks else []
    if not tests and not names:
        return 0.0
    start = time.monotonic()
    say(f"scoring: {SYSTEM_TITLES[system]}")
    release_freed_memory()  # of a finished stage
    if model is None:
        found = {test.name: bm25_scores(test) for test in tests}
    else:
        bf16 = resolve_precision(settings.precision) == "bf16"
        found = evaluate(
            load_encoder(model, torch.bfloat16 if bf16 else torch.float32),
            data=tests,
            tasks=names,
            batch_size=settings.batch_size,
            cache=cache,
            show_progress_bar=True,
        )
    scores[system] = {**scores.get(system, {}), **found}
    write_json(run.scores, _plain(scores))
    for task, of_task in found.items():
        say(f"  {task}: {of_task.main_score:.3f}")
    return time.monotonic() - start


def with_steps(recipe: Recipe, name: StageName, steps: int) -> Recipe:
    """`recipe` with so many `steps` of the stage `name`; its warm-up keeps its share of them."""
    stage: StageOne | StageTwo = getattr(recipe, name)
    changed = {"steps": steps, "warmup_steps": round(steps * stage.warmup_steps / stage.steps)}
    return recipe.model_copy(update={name: stage.model_copy(update=changed)})


def load_training_data(recipe: Recipe) -> StageInputs:
    """What the stages read of the recipe's data sets; what was left out of one is said on stderr.

    Raises AnchorvecError for data that cannot be read, or that have fewer pairs than a step of a stage.
    """
    loaded = {}
    for source in recipe.data.train:
        loaded[source.name] = read_pairs(
            source.path, strict=recipe.data.strict, split=source.split, subset=source.subset
        )
        report = loaded[source.name].report
        if report.rejected or report.mended or report.dropped_negatives or report.ignored_columns:
            say(report.summary())
    return stage_inputs(recipe, loaded)


def describe_run(recipe: Recipe, inputs: StageInputs) -> dict[str, Any]:
    """What a reader needs to repeat the run beside `recipe`: versions, machine, seed, and what `inputs` were read."""
    packages = [
        "anchorvec",
        "torch",
        "transformers",
        "sentence-transformers",
        "peft",
        "accelerate",
        "datasets",
    ]
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "precision": resolve_precision(recipe.model.precision),
        "seed": recipe.seed,
        "data": {name: asdict(report) for name, report in inputs.reports.items()},
    }


def _plain(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Any]:
    return {stage: {task: value.to_dict() for task, value in tasks.items()} for stage, tasks in scores.items()}

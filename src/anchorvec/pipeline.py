"""Runs a recipe: from a base model to a folder per stage, scores, and an export, within steps or within a time.

`train`, `quickstart` and the benchmarks' trials are this pipeline with a recipe and a budget; `plan` is it up to the
first step. Both stages go through transformers' Trainer.
"""

import platform
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from anchorvec.curve import check_curve, end_curve, scoring_of
from anchorvec.data import Pairs, read_pairs
from anchorvec.data.stage_inputs import StageInputs, stage_inputs
from anchorvec.device import check_a_process_each, device_name, resolve_precision
from anchorvec.disk import check_disk
from anchorvec.evaluation import LocalData, check_test_data, scores_table
from anchorvec.exporting.folder import Exported, export
from anchorvec.exporting.hub import make_repository, push_folder
from anchorvec.files import write_json
from anchorvec.following import Followers, check_shares, follow, train_stage
from anchorvec.interrupts import Interrupts
from anchorvec.ranks import rank, ranks
from anchorvec.recipe import Recipe, StageOne, StageTwo, load_recipe, save_recipe
from anchorvec.resuming import check_same_data, opened, time_left
from anchorvec.run import STAGE_TITLES, Run, StageName, is_embedder
from anchorvec.run_scores import (
    Scored,
    WholeSet,
    affordable,
    first_scoring,
    main_scores,
    plain_scores,
    score_bm25,
    score_model,
    score_on_the_way,
    scores_of,
    seconds_of_whole,
    stored_scores,
    system_of,
)
from anchorvec.start import build_base, with_settings_of_base
from anchorvec.terminal import say
from anchorvec.training.budget import Budget, Limit, Measured
from anchorvec.training.checkpoints import Checkpoints
from anchorvec.training.progress import OnLog
from anchorvec.training.stage import Stage
from anchorvec.training.trackers import check_trackers


@dataclass(frozen=True)
class TrainResult:
    """What a run made: its folder, the exported model, the scores that its recipe asked for by system and task.

    `steps` are those that each stage made, `minutes` is the wall time of it all, without that of interruptions.
    `pushed` is the address of the model on the hub; empty where it was not asked for. `curve` has a point for each
    step after which a model was scored on the way: `stage`, `step`, and `scores` by task.
    """

    output: str
    export: Exported
    scores: Scored
    steps: dict[str, int]
    minutes: float
    pushed: str = ""
    curve: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {"scores": plain_scores(self.scores)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainResult":
        """The result that `to_dict` gave the `values` of."""
        return cls(**{**values, "export": Exported(**values["export"]), "scores": scores_of(values["scores"])})

    def __rich__(self) -> Group:
        tables = [scores_table(of_system, title=system) for system, of_system in self.scores.items()]
        pushed = [Text(f"pushed to {self.pushed}", no_wrap=True, overflow="ignore")] if self.pushed else []
        return Group(*tables, self.export, *pushed)


def train(
    recipe: Recipe | str | Path,
    *,
    budget: Budget | None = None,
    resume: bool = False,
    push: str | None = None,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Run the stages that `recipe` switches on, score them, and export the last one to `model` in the run folder.

    The run folder is `recipe.output`. The `budget` is a time, or by default the steps of the recipe. With `resume` the
    run in that folder goes on where it was left, however it ended; what is finished is not done again. `push` names a
    repository of the hub for the export, which is made before anything is trained. `on_log` is called with every record
    that is also appended to `log.jsonl`. Started by torchrun or accelerate launch, it trains on all devices, with a
    process each, and gives the same result in all of them.

    Raises AnchorvecError if the folder already holds a run, or with `resume` that of another recipe, if the recipe or
    its data cannot be used, or if time or disk are too short. Raises Interrupted after Ctrl-C or SIGTERM.
    """
    check_a_process_each()
    if rank() > 0:
        return TrainResult.from_dict(follow(load_training_data))
    followers = Followers()
    with followers.led():
        trained = _train_first(recipe, followers, budget=budget, resume=resume, push=push, on_log=on_log)
        followers.result = trained.to_dict()
    return trained


def _train_first(
    recipe: Recipe | str | Path,
    followers: Followers,
    *,
    budget: Budget | None,
    resume: bool,
    push: str | None,
    on_log: OnLog | None,
) -> TrainResult:
    """`train`, in the first of several processes."""
    recipe = with_settings_of_base(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    check_shares(recipe, ranks())
    run, recipe, budget = opened(recipe, budget, resume=resume)
    tests = check_test_data(data=recipe.evaluation.data, tasks=recipe.evaluation.tasks)
    inputs = load_training_data(recipe)
    check_trackers(recipe.report_to)
    options: dict[str, Any] = {"budget": budget, "on_log": on_log, "train_stage": followers.train}
    if push is None:
        return run_stages(recipe, run, inputs, tests, **options)
    make_repository(push)
    command = shlex.join(["anchorvec", "train", str(run.recipe), "--resume", "--push", push])
    trained = run_stages(recipe, run, inputs, tests, **options, command=command)
    return replace(trained, pushed=push_folder(run.model, push))


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
    command: str = "",
    train_stage: Callable[[Stage], None] = train_stage,
) -> TrainResult:
    """`train` in the folder of `run`, on `inputs` and `tests` that are read already; what is done there stays.

    `recipe`, `budget` and `on_log` are as there. BM25 and the last stage are scored on the `whole` too; the last stage
    only if the time is still there. `record` is added to the run's record. `command` is what to type to go on where it
    is interrupted; by default `train` with the recipe that is saved. `train_stage` trains a stage, in this process.
    """
    command = command or shlex.join(["anchorvec", "train", str(run.recipe), "--resume"])
    timed = budget.minutes is not None
    check_curve(recipe, tests=len(tests) + len(recipe.evaluation.tasks), timed=budget.is_limited)
    with run.locked(), Interrupts(command) as interrupts:
        _begin(recipe, run, inputs, budget, record)
        check_disk(recipe, run, timed=budget.is_limited)
        checkpoint = _checkpoint_under_way(recipe, run)
        budget = time_left(run, budget, checkpoint)
        as_begun, scores = _with_number_formats(recipe, run), stored_scores(run)
        score_bm25(as_begun, run, [*tests, *([whole.data] if whole else [])], scores)
        # before training, so that a task that cannot be fetched costs nothing
        scoring = first_scoring(as_begun, run, tests, scores, timed=timed)
        whole, whole_seconds = affordable(whole, budget, scores)
        if checkpoint is None and not is_embedder(run.stage(recipe.stages[0])):
            budget.check(len(recipe.stages), scoring, whole_seconds)
        of_run = partial(Stage, inputs=inputs, on_log=on_log, interrupts=interrupts, spent=budget.spent)
        for i, name in enumerate(recipe.stages):
            stage = run.stage(name)
            if not is_embedder(stage):
                limit = _limit(run, name, budget, len(recipe.stages) - i, scoring, whole_seconds)
                start = run.start_of(name) or run.base
                before = main_scores(scores, system_of(run, start), whole)
                score = partial(score_on_the_way, as_begun, tests)
                way = scoring_of(as_begun, run, name, before=before, score=score, seconds=scoring.seconds)
                train_stage(of_run(name, as_begun, run, start, limit=limit, checkpoint=checkpoint, scoring=way))
                run.note("seconds", {name: budget.spent()})
                checkpoint = None
            recipe = _finished(name, recipe, run, budget)
            interrupts.stop()
            score_model(as_begun, run, tests, scores, name, stage)
            end_curve(as_begun, run, name, main_scores(scores, name, whole), timed=budget.is_limited)
        if whole is not None and budget.left() < seconds_of_whole(whole, scores, name):  # as it went just now
            say(f"{whole.data.name}: no time is left to score on the whole of it")
        elif whole is not None:
            score_model(as_begun, run, [whole.data], scores, name, stage, tasks=False)
        exported = _export(run)
    return TrainResult(str(run.folder), exported, scores, run.steps(), budget.spent() / 60, curve=run.curve())


def _begin(recipe: Recipe, run: Run, inputs: StageInputs, budget: Budget, record: Mapping[str, Any] | None) -> None:
    """Write recipe, untrained embedder and record of `run`, or check that those that are there are its own."""
    if not run.recipe.is_file():
        save_recipe(recipe, run.recipe)
    if not is_embedder(run.base):
        try:
            build_base(recipe, run.base)
        except Exception:
            run.recipe.unlink()  # so that the mended recipe may use the folder
            raise
    described = describe_run(recipe, inputs) | dict(record or {})
    if run.record.is_file():
        check_same_data(run, described)
        return
    noted = {"minutes": budget.minutes, "tokens": budget.tokens, "stage_one_share": budget.stage_one_share}
    write_json(run.record, described | {"budget": noted, "seconds": {"base": budget.spent()}})


def _checkpoint_under_way(recipe: Recipe, run: Run) -> Path | None:
    """The newest checkpoint of the first stage that is not finished; None: there is none."""
    for name in recipe.stages:
        if not is_embedder(run.stage(name)):
            return Checkpoints(run.checkpoints(name), limit=1).newest()
    return None


def _with_number_formats(recipe: Recipe, run: Run) -> Recipe:
    """`recipe` with the number formats that were measured when `run` began, in place of `auto`."""
    formats = run.read_record()["precision"], run.read_record()["evaluation_precision"]
    sections = {"model": recipe.model, "evaluation": recipe.evaluation}
    fixed = {
        key: section.model_copy(update={"precision": format_})
        for (key, section), format_ in zip(sections.items(), formats, strict=True)
    }
    return recipe.model_copy(update=fixed)


def _finished(name: StageName, recipe: Recipe, run: Run, budget: Budget) -> Recipe:
    """`recipe` with the steps that the finished stage `name` made where it ended at a limit; it is saved.

    The checkpoints of the stage are removed.
    """
    if budget.is_limited:
        recipe = with_steps(recipe, name, run.steps()[name])
        save_recipe(recipe, run.recipe)
    run.remove_checkpoints(name)
    return recipe


def _limit(
    run: Run, name: StageName, budget: Budget, stages: int, scoring: Measured, whole_seconds: float
) -> Limit | None:
    """What the first of so many `stages`, `name`, may use; None: it makes its steps.

    It began when the record of `run` says, or now. `scoring` and `whole_seconds` are those of `Budget.deadline`.
    """
    before = [used for stage, used in run.tokens().items() if stage != name]
    if (tokens := budget.tokens_of_stage(stages, sum(before))) is not None:
        say(f"{STAGE_TITLES[name]}: {tokens:,} tokens")
        return Limit(tokens=tokens)
    began = run.noted("seconds").get(f"{name}_began", budget.spent())
    moving = budget.deadline(stages, scoring, whole_seconds, began)
    if moving is None:
        return None
    run.note("seconds", {f"{name}_began": began})
    say(f"{STAGE_TITLES[name]}: {(moving() - time.monotonic()) / 60:.1f} minutes")
    return Limit(deadline=moving)


def _export(run: Run) -> Exported:
    """The export of the last stage of `run`; what it was found to be where that is done already."""
    if noted := run.noted("export"):
        return Exported(**noted)
    if run.model.is_dir():
        shutil.rmtree(run.model)  # killed before it was noted what it agrees with
    say("exporting, and comparing the export with the run")
    exported = export(run.folder, run.model)
    run.note("export", exported.to_dict())
    return exported


def with_steps(recipe: Recipe, name: StageName, steps: int) -> Recipe:
    """`recipe` with so many `steps` of the stage `name`; its warm-up keeps its share of them."""
    stage: StageOne | StageTwo = getattr(recipe, name)
    changed = {"steps": steps, "warmup_steps": round(steps * stage.warmup_steps / stage.steps)}
    return recipe.model_copy(update={name: stage.model_copy(update=changed)})


def load_training_data(recipe: Recipe) -> StageInputs:
    """What the stages read of the recipe's data sets; what was left out of one is said on stderr.

    Raises AnchorvecError for data that cannot be read, or that have fewer pairs than a step of a stage.
    """
    return stage_inputs(recipe, load_pairs(recipe))


def load_pairs(recipe: Recipe) -> dict[str, Pairs]:
    """The pairs of the recipe's data sets by their names; what was left out of one is said on stderr.

    Raises AnchorvecError for data that cannot be read.
    """
    loaded = {}
    for source in recipe.data.train:
        loaded[source.name] = read_pairs(
            source.path,
            strict=recipe.data.strict,
            split=source.split,
            subset=source.subset,
            revision=source.revision,
        )
        report = loaded[source.name].report
        if report.rejected or report.mended or report.dropped_negatives or report.ignored_columns:
            say(report.summary())
    return loaded


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
        "evaluation_precision": resolve_precision(recipe.evaluation.precision),
        "seed": recipe.seed,
        "data": {name: asdict(report) for name, report in inputs.reports.items()},
    }

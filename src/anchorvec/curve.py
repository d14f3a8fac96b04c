"""Scores of a run while its stages train: when they are taken, which models are kept, and which one is the best.

Each is a point of the run's curve: the stage, the step, and the main score of each test set. A point of step 0 is what
Stage II starts from, and the last one what the stage has trained; both are scored anyway.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from anchorvec.errors import AnchorvecError
from anchorvec.ranks import ranks
from anchorvec.recipe import Recipe
from anchorvec.run import STAGE_TITLES, Run, StageName, is_embedder
from anchorvec.terminal import say
from anchorvec.training.checkpoints import Checkpoints
from anchorvec.training.scoring import Scoring, is_scored_on_the_way

Point = Mapping[str, Any]


def check_curve(recipe: Recipe, *, tests: int, timed: bool) -> None:
    """Raise AnchorvecError where `recipe` has models scored on the way, on none of so many `tests` or several devices.

    Steps that no stage comes to are said, unless it is `timed`: it makes any number of steps.
    """
    scored = any(is_scored_on_the_way(recipe, name) for name in recipe.stages)
    key = "at" if recipe.evaluation.at else "every"
    if scored and ranks() > 1:
        raise AnchorvecError(f"evaluation.{key}: on several devices models are not scored on the way; leave it out")
    if scored and not tests:
        raise AnchorvecError(
            f"evaluation.{key}: there is nothing to score on; name test sets in evaluation.data, or evaluation.tasks"
        )
    if recipe.stage_two is not None and not timed:
        _say_unreached(recipe, recipe.stage_two.steps)


def scoring_of(
    recipe: Recipe,
    run: Run,
    name: StageName,
    *,
    before: Mapping[str, float],
    score: Callable[[Path], Mapping[str, float]],
    seconds: float,
) -> Scoring | None:
    """How the stage `name` of `run` is scored on the way, as `recipe` says; None: it is not.

    `before` are the scores by test set of what it starts from, which are noted where they are asked for. `score` gives
    those of an embedder folder, and takes so many `seconds`.
    """
    if not is_scored_on_the_way(recipe, name):
        return None
    settings = recipe.evaluation
    if name == "stage_two" and 0 in settings.at:
        run.add_to_curve(name, 0, dict(before))

    def done() -> list[int]:
        return [point["step"] for point in _points(run, name)]

    def scored(step: int, folder: Path) -> Mapping[str, float]:
        found = dict(score(folder))
        run.add_to_curve(name, step, found)
        _remove_all_but_the_best(recipe, run, name)
        say(f"{STAGE_TITLES[name]}, step {step}: " + ", ".join(f"{task} {value:.3f}" for task, value in found.items()))
        return found

    at = settings.at if name == "stage_two" else []
    return Scoring(at, settings.every, done, partial(_new_folder, run, name), scored, seconds)


def end_curve(recipe: Recipe, run: Run, name: StageName, scores: Mapping[str, float], *, timed: bool) -> None:
    """Add the `scores` of what the stage `name` of `run` has trained; note which step is the best, if `recipe` asks.

    `timed`: it may have made fewer steps than those that are named, which is said.
    """
    if not is_scored_on_the_way(recipe, name):
        return
    steps = run.steps()[name]
    run.add_to_curve(name, steps, dict(scores))
    _remove_all_but_the_best(recipe, run, name)
    if name == "stage_two" and timed:
        _say_unreached(recipe, steps)
    if recipe.evaluation.keep_best and name == recipe.stages[-1]:
        _note_best(run, name, steps)


def _say_unreached(recipe: Recipe, steps: int) -> None:
    """Name the steps that a Stage II of so many `steps` does not come to."""
    if late := [str(step) for step in sorted(set(recipe.evaluation.at)) if step > steps]:
        say(f"evaluation.at: Stage II has {steps} steps, so there are no scores after {', '.join(late)}")


def _new_folder(run: Run, name: StageName, step: int) -> Path:
    """The folder for the model after a step; what a process has left there that was killed is removed."""
    folder = run.stage_after(name, step)
    if folder.is_dir():
        shutil.rmtree(folder)
    return folder


def _points(run: Run, name: StageName) -> list[Point]:
    return [point for point in run.curve() if point["stage"] == name]


def _mean(point: Point) -> float:
    """The mean score over the test sets."""
    return fmean(point["scores"].values())


def _best(points: Sequence[Point]) -> Point:
    """The best of `points`, of equal ones the last."""
    return max(points, key=lambda point: (_mean(point), point["step"]))


def _remove_all_but_the_best(recipe: Recipe, run: Run, name: StageName) -> None:
    """Remove the models on the way that will not be exported.

    One that may be is kept, and the best of those up to the newest checkpoint, from which the stage may go on.
    """
    kept = set()
    if recipe.evaluation.keep_best and name == recipe.stages[-1]:
        newest = Checkpoints(run.checkpoints(name), limit=1).newest_step()
        points = _points(run, name)
        for candidates in (points, [point for point in points if point["step"] <= newest]):
            if candidates:
                kept.add(run.stage_after(name, _best(candidates)["step"]))
    for folder in run.folder.glob(f"{name}_step_*"):
        if folder not in kept:
            shutil.rmtree(folder)


def _note_best(run: Run, name: StageName, steps: int) -> None:
    """Note in the record which of the points of the last stage `name`, which made so many `steps`, is the best."""

    def folder_of(step: int) -> Path | None:
        return run.start_of(name) if step == 0 else run.stage(name) if step == steps else run.stage_after(name, step)

    points = _points(run, name)
    there = {point["step"]: folder for point in points if is_embedder(folder := folder_of(point["step"]) or run.model)}
    best = _best([point for point in points if point["step"] in there])
    for point in points:
        if _mean(point) > _mean(best):
            say(f"evaluation.keep_best: the model after step {point['step']} was better, and is not there any more")
    found = {"stage": name, "step": best["step"], "of_steps": steps, "score": _mean(best), "scored": len(points)}
    run.note("best", {**found, "folder": there[best["step"]].name})
    say(f"{STAGE_TITLES[name]}: of {len(points)} steps that were scored, step {best['step']} is the best, and exported")
